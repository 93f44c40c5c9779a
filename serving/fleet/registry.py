"""The fleet as one worker sees it: health by probing, models by asking, a snapshot at every change.

Active health: each replica is probed in its own loop, by its health route, and by a generated token when
it comes up, after a failure, and when it has been idle. Passive: a refused connection takes a
replica out at once, failed requests open its breaker (`breaker.py`), and either has it probed without
waiting. Breakers never take away more than a share of the fleet.
"""

from __future__ import annotations

import asyncio
import logging
import math
from time import monotonic
from typing import TYPE_CHECKING

from serving.fleet.breaker import BreakerState
from serving.fleet.engine_metrics import Target
from serving.fleet.learn import generates, is_healthy
from serving.fleet.learner import Learner
from serving.fleet.replica_state import ReplicaState
from serving.fleet.snapshot_builder import build_snapshot
from serving.routing import slow_start
from serving.routing.snapshot import Replica, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from serving.config import ReplicaConfig, Resilience
    from serving.routing.published import Published

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
PROBE_TIMEOUT_S = 5.0
"""A busy CPU engine answers late; being late once is not being down."""
LEARN_INTERVAL_S = 5.0
FAILURES_TO_BE_DOWN = 2
_FIRST_ROUND_S = 10.0


class FleetRegistry:
    """Probes the replicas and publishes snapshots.

    Attributes:
        snapshot: The newest one.
        trials: Number of replicas whose half-open breaker lets one request through.
        warming: Index of each replica that came up a moment ago → when, by `time.monotonic()`.
    """

    def __init__(
        self,
        replicas: Sequence[ReplicaConfig],
        aliases: Mapping[str, str],
        api_key: str | None,
        on_change: Callable[[Snapshot], None],
        resilience: Resilience,
        last_heard_at: Callable[[Replica], float],
        indexes: Sequence[int] | None = None,
        *,
        is_controlled: bool = False,
    ) -> None:
        """Probes nothing until `run`.

        Args:
            replicas: The fleet.
            aliases: Public name → served name.
            api_key: Bearer token for the replicas, or None.
            on_change: Gets every new snapshot.
            resilience: Thresholds.
            last_heard_at: When a response that is under way last had bytes from a replica, by
                `time.monotonic()`: an engine whose canary is late is stuck only if nothing else comes.
            indexes: Of the replicas; None numbers them from 0.
            is_controlled: Whether a control plane says which adapters are where.
        """
        self._is_controlled = is_controlled
        self._learner = Learner(api_key, PROBE_TIMEOUT_S, self._publish)
        self._aliases = dict(aliases)
        self._api_key = api_key
        self._on_change = on_change
        self._resilience = resilience
        self._last_heard_at = last_heard_at
        self.warming: dict[int, float] = {}
        self.trials = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._states = {
            index: ReplicaState(index, config, resilience)
            for index, config in zip(indexes or range(len(replicas)), replicas, strict=False)
        }
        self.snapshot = Snapshot(
            replica_health={state.replica.name: False for state in self._states.values()}
        )

    async def run(self) -> None:
        """Probes until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._learner.tasks = self._tasks
            for state in self._states.values():
                state.watching = self._tasks.create_task(self._watch(state))

    def replace(
        self, replicas: Sequence[ReplicaConfig], indexes: Sequence[int], aliases: Mapping[str, str]
    ) -> list[Replica]:
        """Takes another fleet; replicas that stay keep what is known of them.

        Args:
            replicas: The new fleet.
            indexes: Of its replicas; one that stays has the index that it had.
            aliases: The new aliases.

        Returns:
            The replicas that are gone; what they work on, they finish.
        """
        before = self._states
        self._states = {
            index: before[index]
            if index in before and before[index].config == config
            else ReplicaState(index, config, self._resilience)
            for index, config in zip(indexes, replicas, strict=True)
        }
        self._aliases = dict(aliases)
        gone = [state for index, state in before.items() if self._states.get(index) is not state]
        for state in self._states.values():
            if state.watching is None and self._tasks is not None:
                state.watching = self._tasks.create_task(self._watch(state))
        for state in gone:
            self.warming.pop(state.replica.index, None)
            if state.watching is not None:
                state.watching.cancel()
        self._count_trials()
        self._publish()
        return [state.replica for state in gone]

    def configure(self, resilience: Resilience) -> None:
        """Takes other thresholds; what is known of each replica stays."""
        self._resilience = resilience
        for state in self._states.values():
            state.breaker.configure(resilience)
        self._publish()

    def take_published(self, published: Published) -> None:
        """Takes what the control plane says now, whole."""
        self._learner.take_published(published, self._states.values())
        self._publish()

    def report_missing(self, replica: Replica, version: str) -> None:
        """An engine answered that it does not have a version: not routed there until it is confirmed."""
        state = self._state_of(replica)
        if state is not None:
            self._learner.missing(state, version)
            self._publish()

    def named(self, name: str) -> Replica | None:
        """The replica of a name (`host:port`), healthy or not."""
        return next((s.replica for s in self._states.values() if s.replica.name == name), None)

    def scrape_targets(self) -> list[Target]:
        """The replicas whose models are known and that are well, to ask for their metrics."""
        return [
            Target(state.replica, sum(model.parent is not None for model in state.served.models))
            for state in self._states.values()
            if state.is_healthy and state.served is not None
        ]

    async def first_round(self) -> None:
        """Returns when every replica has been probed once, or after ten seconds."""
        try:
            async with asyncio.timeout(_FIRST_ROUND_S):
                for state in self._states.values():
                    await state.was_probed.wait()
        except TimeoutError:
            log.warning("first probes are not complete", extra={"deadline_s": _FIRST_ROUND_S})

    def report_down(self, replica: Replica) -> None:
        """A connection was refused: no more requests until a probe succeeds."""
        state = self._state_of(replica)
        if state is None:
            return
        state.failures = FAILURES_TO_BE_DOWN
        if state.is_healthy:
            self._set_health(state, healthy=False)
        state.wake.set()

    def report_failure(self, replica: Replica) -> None:
        """A request failed by the replica's fault: counts against it, and has it probed now."""
        state = self._state_of(replica)
        if state is None:
            return
        state.is_suspect = True
        state.wake.set()
        if state.breaker.failed(monotonic()):
            self._breaker_changed(state)

    def report_success(self, replica: Replica) -> None:
        """A request was answered."""
        state = self._state_of(replica)
        if state is None:
            return
        state.proven_at = monotonic()
        if state.breaker.succeeded():
            self._breaker_changed(state)

    def report_chosen(self, replica: Replica) -> None:
        """A replica on trial got its one request: nothing more until that has ended."""
        state = self._state_of(replica)
        if state is not None and state.is_on_trial:
            state.is_on_trial = False
            self._count_trials()
            self._publish()

    def _count_trials(self) -> None:
        self.trials = sum(state.is_on_trial for state in self._states.values())

    def _state_of(self, replica: Replica) -> ReplicaState | None:
        """None once the replica has left the fleet; its last requests may still report."""
        state = self._states.get(replica.index)
        return state if state is not None and state.replica is replica else None

    def _breaker_changed(self, state: ReplicaState) -> None:
        state.is_on_trial = state.breaker.state is BreakerState.HALF_OPEN
        self._count_trials()
        log.warning(
            "breaker changed",
            extra={"replica": state.replica.name, "state": state.breaker.state.value},
        )
        self._publish()

    def share(self, replica: Replica, now: float) -> float:
        """The share of its normal load that a replica should take now, 0.1 to 1."""
        up_since = self.warming.get(replica.index)
        if up_since is None:
            return 1.0
        share_now = slow_start.share(up_since, now, self._resilience.slow_start_s)
        if share_now >= 1.0:
            del self.warming[replica.index]
        return share_now

    async def _watch(self, state: ReplicaState) -> None:
        while True:
            try:
                await self._probe(state)
            except Exception:
                # What one replica answers must not stop the probes of the others.
                log.exception("a probe failed unexpectedly", extra={"replica": state.replica.name})
            state.was_probed.set()
            state.wake.clear()
            try:
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await state.wake.wait()
            except TimeoutError:
                continue
            # Woken by failures: at most ten probes a second, however many requests fail.
            await asyncio.sleep(0.1)

    async def _probe(self, state: ReplicaState) -> None:
        if state.breaker.tick(monotonic()) and not state.is_on_trial:
            self._breaker_changed(state)
        if self._learner.review(state):
            self._publish()
        healthy = await is_healthy(state.replica, timeout_s=PROBE_TIMEOUT_S, api_key=self._api_key)
        if healthy:
            is_due = monotonic() - state.learnt_at >= LEARN_INTERVAL_S
            if not state.is_healthy or is_due:
                await self._learner.learn(state)
            healthy = await self._is_proven(state)
        if not healthy:
            state.failures += 1
            if state.is_healthy and state.failures >= FAILURES_TO_BE_DOWN:
                self._set_health(state, healthy=False)
            return
        state.failures = 0
        if state.served is not None and not state.is_healthy:
            self._set_health(state, healthy=True)

    async def _is_proven(self, state: ReplicaState) -> bool:
        """Whether the replica has generated of late, or does so now."""
        if state.served is None or not self._resilience.canary:
            return True
        asked_at = monotonic()
        is_silent = asked_at - self._heard_at(state) > self._resilience.canary_interval_s
        if not (state.is_suspect or is_silent):
            return True
        timeout_s = self._resilience.canary_timeout_s
        try:
            does_generate = await generates(
                state.replica, state.served, timeout_s=timeout_s, api_key=self._api_key
            )
        except TimeoutError:
            # A busy engine may be late and well, if something else of it came meanwhile.
            state.is_suspect = True
            return state.is_healthy and self._heard_at(state) > asked_at
        if not does_generate:
            state.is_suspect = True
            return False
        state.is_suspect = False
        state.proven_at = monotonic()
        return True

    def _heard_at(self, state: ReplicaState) -> float:
        """When the replica last answered a request, or was in the middle of doing so."""
        return max(state.proven_at, self._last_heard_at(state.replica))

    def _set_health(self, state: ReplicaState, *, healthy: bool) -> None:
        if healthy:
            self._learner.restarted(state)
        state.is_healthy = healthy
        state.is_suspect = not healthy
        state.up_since = monotonic()
        if healthy and self._is_warming_worthwhile():
            self.warming[state.replica.index] = monotonic()
        event = "replica is up" if healthy else "replica is down"
        log.warning(event, extra={"replica": state.replica.name})
        self._publish()

    def _is_warming_worthwhile(self) -> bool:
        """A fleet that starts as a whole has nobody to leave the load to."""
        slow_start_s = self._resilience.slow_start_s
        now = monotonic()
        return slow_start_s > 0 and any(
            now - state.up_since > slow_start_s
            for state in self._states.values()
            if state.is_healthy
        )

    def _routable(self) -> frozenset[int]:
        """Healthy replicas less those that breakers hold back, down to the floor."""
        healthy = [state for state in self._states.values() if state.is_healthy]
        held_back = [state for state in healthy if state.is_held_back]
        num_kept = math.ceil(self._resilience.min_routable_ratio * len(healthy))
        ejected = held_back[: max(0, len(healthy) - num_kept)]
        return frozenset(state.replica.index for state in healthy if state not in ejected)

    def _publish(self) -> None:
        served = {s.replica: s.served for s in self._states.values() if s.served is not None}
        healthy = self._routable()
        self.snapshot = build_snapshot(
            version=self.snapshot.version + 1,
            served=served,
            healthy=healthy,
            aliases=self._aliases,
            replica_health={s.replica.name: s.is_healthy for s in self._states.values()},
            published=self._learner.published,
            standings={index: state.standing for index, state in self._states.items()},
            is_controlled=self._is_controlled,
        )
        self._on_change(self.snapshot)
