"""Whether a pending alias flip can happen, has to wait, or never can; pure. Called by `reconcile.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from adapters.swap_slot import Phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapters.swap_slot import Slot
    from serving.control.ledger import PendingFlip, WantedVersion


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that may have the target.

    Attributes:
        kind: Of its engine.
        slot: Where the target stands there.
    """

    name: str
    kind: str
    slot: Slot | None


class Decision(NamedTuple):
    """What to do with a flip, and why not."""

    act: Literal["flip", "wait", "fail"]
    reason: str = ""


def decide(
    flip: PendingFlip, target: WantedVersion | None, candidates: Sequence[Candidate]
) -> Decision:
    """Decide.

    Args:
        flip: What waits.
        target: Its version, None if it was deleted.
        candidates: Replicas of its base model, and those that have not said theirs yet.
    """
    if target is None:
        return Decision("fail", f"The version {flip.target} does not exist any more.")
    num_ready = sum(one.slot is not None and one.slot.phase is Phase.READY for one in candidates)
    if num_ready >= flip.num_ready:
        return Decision("flip")
    refusals = {one.name: reason for one in candidates if (reason := _refusal(one, target))}
    num_possible = len(candidates) - len(refusals)
    if num_possible >= flip.num_ready:
        return Decision("wait")
    told = " ".join(f"{name}: {reason}" for name, reason in sorted(refusals.items()))
    return Decision(
        "fail",
        f"{flip.target} has to be ready on {flip.num_ready} of the {len(candidates)} replicas that "
        f"serve {target.manifest.base.name}, and can be on {num_possible} at most. {told}".strip(),
    )


def _refusal(one: Candidate, target: WantedVersion) -> str | None:
    if one.kind in target.unloadable:
        return target.unloadable[one.kind]
    if one.slot is not None and one.slot.phase is Phase.FAILED:
        return one.slot.reason or "It has failed there."
    return None
