"""What replicas serve, kept up to date: asked of them, compared with what is published, doubted.

Owns `served`, `learnt_at` and `trust` of every `ReplicaState`. Knows no health and publishes nothing
itself: it tells by its return values or `on_change`. Used by `registry.py` alone.
"""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING

from serving.fleet.learn import learn, learn_models
from serving.fleet.replica_state import NEVER

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from serving.fleet.learn import Served
    from serving.fleet.replica_state import ReplicaState
    from serving.routing.published import Published

log = logging.getLogger(__name__)


class Learner:
    """Asks replicas for what they serve.

    Attributes:
        published: What the control plane said last, or None.
        tasks: Owns questions that are asked at once; None until the registry runs.
    """

    def __init__(
        self, api_key: str | None, timeout_s: float, on_change: Callable[[], None]
    ) -> None:
        """Asks nothing yet.

        Args:
            api_key: Bearer token for the replicas, or None.
            timeout_s: Deadline of each question.
            on_change: Called when an answer changes what a healthy replica may be asked for.
        """
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._on_change = on_change
        self.published: Published | None = None
        self.tasks: asyncio.TaskGroup | None = None

    def take_published(self, published: Published, states: Iterable[ReplicaState]) -> None:
        """Takes what the control plane says now, and asks where an engine's list lags behind it."""
        before = {} if self.published is None else self.published.versions
        self.published = published
        by_name = {state.replica.name: state for state in states}
        for name, version in published.versions.items():
            if before.get(name) == version:
                continue
            for replica_name in version.placements:
                state = by_name.get(replica_name)
                listed = None if state is None else state.listed_versions
                if state is not None and listed is not None and name not in listed:
                    self.relearn(state)
        for state in by_name.values():
            self.review(state)

    async def learn(self, state: ReplicaState) -> None:
        """Asks a replica for its models and routes."""
        asked_at = monotonic()
        served = await learn(state.replica, timeout_s=self._timeout_s, api_key=self._api_key)
        if served is not None:
            self._take_served(state, served, asked_at)

    def relearn(self, state: ReplicaState) -> None:
        """Has a replica asked for its models at once, beside its probes."""
        state.must_relearn = True
        if not state.is_relearning and state.served is not None and self.tasks is not None:
            state.is_relearning = True
            self.tasks.create_task(self._ask_models(state))

    async def _ask_models(self, state: ReplicaState) -> None:
        try:
            while state.must_relearn and state.served is not None:
                state.must_relearn = False
                asked_at = monotonic()
                served = await learn_models(
                    state.replica, state.served, timeout_s=self._timeout_s, api_key=self._api_key
                )
                if served is not None:
                    self._take_served(state, served, asked_at)
        except Exception:
            # What one replica answers must not stop the probes of the others.
            log.exception("learning failed unexpectedly", extra={"replica": state.replica.name})
        finally:
            state.is_relearning = False

    def _take_served(self, state: ReplicaState, served: Served, asked_at: float) -> None:
        if asked_at < state.learnt_at:
            return  # two questions at once: the answer to the later one is known already
        before, state.served = state.served, served
        state.learnt_at = asked_at
        if before is not None and self.published is not None:
            lost = before.versions - served.versions
            state.trust.doubt(lost, "lost", self.published, monotonic())
        is_cleared = self.review(state)
        if (served != before or is_cleared) and state.is_healthy:
            self._on_change()

    def review(self, state: ReplicaState) -> bool:
        """Ends the doubts about a replica's adapters that have been answered; whether there was one."""
        if self.published is None:
            return False
        return state.trust.review(
            state.replica.name, self.published, state.listed_versions, state.learnt_at, monotonic()
        )

    def missing(self, state: ReplicaState, version: str) -> None:
        """An engine answered that it does not have a version."""
        if self.published is None:
            return
        log.warning("adapter is missing", extra={"replica": state.replica.name, "version": version})
        state.trust.doubt([version], "failed", self.published, monotonic())
        self.relearn(state)

    def restarted(self, state: ReplicaState) -> None:
        """A replica comes up. One that lists its adapters tells by its list which of them it lost."""
        published = self.published
        if published is None or state.up_since == NEVER or state.replica.dialect.lists_adapters:
            return
        name = state.replica.name
        placed = [v for v, known in published.versions.items() if name in known.placements]
        state.trust.doubt(placed, "restarted", published, monotonic())
