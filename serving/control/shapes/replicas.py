"""Bodies of the replica routes."""

from __future__ import annotations

from serving.control.ledger import PlacementPhase
from serving.control.shapes.common import Shape


class PlacementAnswer(Shape):
    """One version on one replica."""

    version: str
    replica: str
    phase: PlacementPhase
    reason: str | None
    """Why it is not ready."""
    num_attempts: int
    """Failed in a row."""
    retry_at: float | None
    """Unix time of the next attempt."""
    load_s: float | None
    """Of the last load, in seconds."""
    ready_at: float | None
    """Unix time of its proof."""


class ReplicaAnswer(Shape):
    """One replica with what it has."""

    replica: str
    engine: str
    reachable: bool | None
    """Whether it answered last; null if nobody has asked yet."""
    reason: str | None
    """Why it does not answer."""
    versions: list[PlacementAnswer]


class GatewayAnswer(Shape):
    """One gateway that follows this control plane."""

    gateway: str
    snapshot_version: int
    """That it has in effect."""
    heard_s_ago: float
    """Seconds since its last poll; 0 while one waits."""


class ReplicaList(Shape):
    """The fleet, and the gateways before it."""

    data: list[ReplicaAnswer]
    gateways: list[GatewayAnswer]
    snapshot_version: int
    """The newest."""


class PlacementList(Shape):
    """Where a version is."""

    data: list[PlacementAnswer]
