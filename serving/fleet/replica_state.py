"""What one worker knows of one replica. Owned by `registry.py`, which alone changes it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from serving.engines import dialect_of
from serving.fleet.adapter_trust import AdapterTrust
from serving.fleet.breaker import Breaker, BreakerState
from serving.gateway.tls import replica_context
from serving.routing.adapter_models import Standing
from serving.routing.snapshot import Replica

if TYPE_CHECKING:
    from serving.config import ReplicaConfig, Resilience
    from serving.fleet.learn import Served

NEVER = float("-inf")


class ReplicaState:
    """Health, models and trust of one replica.

    Attributes:
        is_healthy: By its probes.
        served: What it serves, by its last answer.
        failures: Probes failed in a row.
        learnt_at: When it was asked what it serves, the last time that it said so, by
            `time.monotonic()`, as all times here.
        is_relearning: Whether it is being asked beside its probes.
        must_relearn: Whether to ask again after that: what is known may be older than the wish.
        trust: Which adapters it is not believed to have.
        breaker: Whether requests to it succeed.
        is_on_trial: Whether its half-open breaker lets one request through now.
        up_since: When it became healthy.
        proven_at: When it last generated something.
        is_suspect: Whether it has to generate something before it is believed again.
        wake: Set to have it probed now.
        was_probed: Set once it has been.
    """

    def __init__(self, index: int, config: ReplicaConfig, resilience: Resilience) -> None:
        self.config = config
        self.replica = Replica(
            index,
            config.name,
            config.host,
            config.port,
            dialect_of(config.kind),
            replica_context(config),
        )
        self.watching: asyncio.Task[None] | None = None
        self.is_healthy = False
        self.served: Served | None = None
        self.failures = 0
        self.learnt_at = NEVER
        self.is_relearning = False
        self.must_relearn = False
        self.trust = AdapterTrust()
        self.breaker = Breaker(resilience)
        self.is_on_trial = False
        self.up_since = NEVER
        self.proven_at = NEVER
        self.is_suspect = True
        self.wake = asyncio.Event()
        self.was_probed = asyncio.Event()

    @property
    def is_held_back(self) -> bool:
        """Whether its breaker keeps requests away."""
        return self.breaker.state is not BreakerState.CLOSED and not self.is_on_trial

    @property
    def listed_versions(self) -> frozenset[str] | None:
        """Versions that its engine listed last; None where its kind lists none."""
        if not self.replica.dialect.lists_adapters:
            return None
        return frozenset() if self.served is None else self.served.versions

    @property
    def standing(self) -> Standing:
        """What is known of its adapters."""
        return Standing(self.listed_versions, self.trust.doubted)
