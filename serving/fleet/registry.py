"""The fleet as one worker sees it: health by probing, models by asking, a snapshot at every change.

Active health: each replica is probed in its own loop. Passive: a refused connection takes a replica out at
once (`report_down`), and any broken one has it probed without waiting (`probe_soon`). Only a
successful probe brings a replica back.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from serving.engines import dialect_of
from serving.fleet.learn import Served, ServedModel, is_healthy, learn
from serving.routing.snapshot import Model, Replica, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from serving.config import ReplicaConfig

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 5.0
"""A busy CPU engine answers late; being late once is not being down."""
LEARN_INTERVAL_S = 5.0
FAILURES_TO_BE_DOWN = 2
_FIRST_ROUND_S = 5.0


class _State:
    """What is known of one replica."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.is_healthy = False
        self.served: Served | None = None
        self.failures = 0
        self.learnt_at = float("-inf")
        self.wake = asyncio.Event()
        self.was_probed = asyncio.Event()


class FleetRegistry:
    """Probes the replicas and publishes snapshots.

    Attributes:
        snapshot: The newest one.
    """

    def __init__(
        self,
        replicas: Sequence[ReplicaConfig],
        aliases: Mapping[str, str],
        api_key: str | None,
        on_change: Callable[[Snapshot], None],
    ) -> None:
        """Probes nothing until `run`.

        Args:
            replicas: The fleet; a replica's place in it is its index.
            aliases: Public name → served name.
            api_key: Bearer token for the replicas, or None.
            on_change: Gets every new snapshot.
        """
        self._aliases = dict(aliases)
        self._api_key = api_key
        self._on_change = on_change
        self._states = [
            _State(Replica(index, config.name, config.host, config.port, dialect_of(config.kind)))
            for index, config in enumerate(replicas)
        ]
        self.snapshot = Snapshot(replica_health={s.replica.name: False for s in self._states})

    async def run(self) -> None:
        """Probes until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for state in self._states:
                tasks.create_task(self._watch(state))

    async def first_round(self) -> None:
        """Returns when every replica has been probed once, or after five seconds."""
        try:
            async with asyncio.timeout(_FIRST_ROUND_S):
                for state in self._states:
                    await state.was_probed.wait()
        except TimeoutError:
            log.warning("first probes are not complete", extra={"deadline_s": _FIRST_ROUND_S})

    def report_down(self, replica: Replica) -> None:
        """A connection was refused: no more requests until a probe succeeds."""
        state = self._states[replica.index]
        state.failures = FAILURES_TO_BE_DOWN
        if state.is_healthy:
            self._set_health(state, healthy=False)
        state.wake.set()

    def probe_soon(self) -> None:
        """Something broke: find out now, not in a second."""
        for state in self._states:
            state.wake.set()

    async def _watch(self, state: _State) -> None:
        while True:
            await self._probe(state)
            state.was_probed.set()
            state.wake.clear()
            try:
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await state.wake.wait()
            except TimeoutError:
                continue
            # Woken by failures: at most ten probes a second, however many requests fail.
            await asyncio.sleep(0.1)

    async def _probe(self, state: _State) -> None:
        healthy = await is_healthy(state.replica, timeout_s=PROBE_TIMEOUT_S, api_key=self._api_key)
        if not healthy:
            state.failures += 1
            if state.is_healthy and state.failures >= FAILURES_TO_BE_DOWN:
                self._set_health(state, healthy=False)
            return
        state.failures = 0
        is_due = monotonic() - state.learnt_at >= LEARN_INTERVAL_S
        if not state.is_healthy or is_due:
            await self._learn(state)
        if state.served is not None and not state.is_healthy:
            self._set_health(state, healthy=True)

    async def _learn(self, state: _State) -> None:
        served = await learn(state.replica, timeout_s=PROBE_TIMEOUT_S, api_key=self._api_key)
        if served is None:
            return
        state.learnt_at = monotonic()
        changed, state.served = served != state.served, served
        if changed and state.is_healthy:
            self._publish()

    def _set_health(self, state: _State, *, healthy: bool) -> None:
        state.is_healthy = healthy
        event = "replica is up" if healthy else "replica is down"
        log.warning(event, extra={"replica": state.replica.name})
        self._publish()

    def _publish(self) -> None:
        served = {s.replica: s.served for s in self._states if s.served is not None}
        healthy = frozenset(s.replica.index for s in self._states if s.is_healthy)
        self.snapshot = build_snapshot(
            version=self.snapshot.version + 1,
            served=served,
            healthy=healthy,
            aliases=self._aliases,
            replica_health={s.replica.name: s.is_healthy for s in self._states},
        )
        self._on_change(self.snapshot)


def build_snapshot(
    *,
    version: int,
    served: Mapping[Replica, Served],
    healthy: frozenset[int],
    aliases: Mapping[str, str],
    replica_health: Mapping[str, bool],
) -> Snapshot:
    """Turns what is known of each replica into what routing reads; pure.

    Args:
        version: Of the new snapshot.
        served: What each replica serves, by its last answer: one that is down keeps its models.
        healthy: Indexes of the replicas that take requests.
        aliases: Public name → served name; one whose target nobody serves is left out.
        replica_health: Replica name → healthy.
    """
    by_name: dict[str, list[tuple[Replica, ServedModel]]] = {}
    for replica, answer in served.items():
        for model in answer.models:
            by_name.setdefault(model.name, []).append((replica, model))
    models = {
        name: _model(name, name, holders, served, healthy) for name, holders in by_name.items()
    }
    for alias, target in aliases.items():
        if target in by_name:
            models[alias] = _model(alias, target, by_name[target], served, healthy)
    bases = [m for m in models.values() if m.parent is None and m.name not in aliases]
    return Snapshot(
        version=version,
        models=models,
        default_model=bases[0] if len(bases) == 1 else None,
        is_complete=len(served) == len(replica_health),
        is_ready=any(any(model.healthy.values()) for model in models.values()),
        replica_health=replica_health,
    )


def _model(
    name: str,
    engine_name: str,
    holders: Sequence[tuple[Replica, ServedModel]],
    served: Mapping[Replica, Served],
    healthy: frozenset[int],
) -> Model:
    offered = frozenset[str]().union(*(served[replica].offered for replica, _ in holders))
    by_path = {
        path: tuple(r for r, _ in holders if r.index in healthy and path in served[r].offered)
        for path in offered
    }
    first = holders[0][1]
    return Model(name, engine_name, first.max_model_len, first.parent, by_path, offered)
