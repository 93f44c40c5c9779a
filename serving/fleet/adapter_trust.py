"""Which adapter versions a replica is not believed to have, whatever was said of it before.

Pure: times are arguments, and `registry.py` owns one for each replica. A doubt about a version ends
with a published snapshot newer than it that says `ready` there, and by what each cause allows:

- `failed`: the engine answered that it does not have it; ends too when it lists it after that.
- `lost`: the engine listed it and does so no more (it restarted, or was told to unload).
- `restarted`: an engine that lists none has come up again; ends too after `HOLD_S`, since such an engine
  reads adapters at use and a control plane that is down can publish nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serving.routing.published import Published

HOLD_S = 10.0
"""Time for the control plane to notice a restart itself: two rounds of its own look at a replica."""

Cause = Literal["failed", "lost", "restarted"]


class _Doubt(NamedTuple):
    cause: Cause
    epoch: str
    number: int
    at: float


class AdapterTrust:
    """The doubts about one replica.

    Attributes:
        doubted: Versions that are not to be routed there.
    """

    __slots__ = ("_doubts", "doubted")

    def __init__(self) -> None:
        self._doubts: dict[str, _Doubt] = {}
        self.doubted: frozenset[str] = frozenset()

    def doubt(
        self, versions: Iterable[str], cause: Cause, published: Published, now: float
    ) -> None:
        """Takes versions out of routing.

        Args:
            versions: Which.
            cause: Why.
            published: The newest snapshot: only a newer one can clear them.
            now: `time.monotonic()`.
        """
        for version in versions:
            self._doubts[version] = _Doubt(cause, published.epoch, published.version, now)
        self.doubted = frozenset(self._doubts)

    def review(
        self,
        replica_name: str,
        published: Published,
        listed: frozenset[str] | None,
        learnt_at: float,
        now: float,
    ) -> bool:
        """Ends the doubts that have been answered.

        Args:
            replica_name: Whose they are.
            published: The newest snapshot.
            listed: What the engine listed last; None where it lists none.
            learnt_at: When it was asked for that, by `time.monotonic()`.
            now: The same clock.

        Returns:
            Whether one has ended.
        """
        if not self._doubts:
            return False
        for version, doubt in list(self._doubts.items()):
            is_newer = (published.epoch, published.version) != (doubt.epoch, doubt.number)
            known = published.versions.get(version)
            placement = None if known is None else known.placements.get(replica_name)
            is_listed = listed is not None and version in listed and learnt_at > doubt.at
            if (
                # Not placed: not routed there anyway, and a new placement comes with a new snapshot.
                placement is None
                or (is_newer and placement.state == "ready")
                or (doubt.cause == "failed" and is_listed)
                or (doubt.cause == "restarted" and now - doubt.at > HOLD_S)
            ):
                del self._doubts[version]
        before, self.doubted = self.doubted, frozenset(self._doubts)
        return before != self.doubted
