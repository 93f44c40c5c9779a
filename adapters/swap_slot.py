"""Where one version stands on one replica, and the rules of trying again: values of `hot_swap.py`.

Owns phases, slots, steps and the arithmetic of backoff. Never changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from adapters.errors import InvalidName
from adapters.version import parse_version

RESTARTED = "The replica has restarted or does not answer: its adapters are loaded and proven anew."
LOST = "The engine no longer has it: it is loaded and proven anew."


class Phase(StrEnum):
    """Where one version stands on one replica."""

    LOADING = "loading"
    LOADED = "loaded"
    READY = "ready"
    DRAINING = "draining"
    UNLOADING = "unloading"
    RETRYING = "retrying"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Slot:
    """One version on one replica.

    Attributes:
        path: Its folder as the engine sees it; empty before it is known.
        is_registered: Whether the engine has it, or may have it.
        is_busy: Whether a step on it is under way.
        num_attempts: Failed in a row.
        num_mismatches: Probes that other weights answered, since it was last ready.
        not_before_s: Earliest time of the next step, on the driver's clock.
        reason: Of the last failure or of the wait, one sentence.
        load_s: How long the last load took.
        ready_at_s: Time of the proof.
        after_unload: What becomes of it once the engine has let it go.
    """

    phase: Phase
    path: str = ""
    is_registered: bool = False
    is_busy: bool = False
    num_attempts: int = 0
    num_mismatches: int = 0
    not_before_s: float = 0.0
    reason: str | None = None
    load_s: float | None = None
    ready_at_s: float | None = None
    after_unload: Literal["forget", "reload", "fail"] = "forget"

    @property
    def holds_place(self) -> bool:
        """Whether it counts against the engine's capacity: it may be there, or is on its way."""
        return self.is_registered or (self.is_busy and self.phase is Phase.LOADING)


StepKind = Literal["load", "probe", "drain", "unload"]
STEP_KINDS: tuple[StepKind, ...] = ("load", "probe", "drain", "unload")


class Step(NamedTuple):
    """What to do next."""

    kind: StepKind
    version: str
    verify: bool = False
    """Whether a load has to check the files first, since others answered in the version's name."""


@dataclass(frozen=True, slots=True)
class RetryRules:
    """When to try again.

    Attributes:
        first_s: Wait after the first failure; each one after it waits twice as long.
        longest_s: Longest wait.
        jitter: Share of a wait that is left to chance, so that replicas do not retry in step.
        max_attempts: Failures in a row that end in FAILED.
        max_mismatches: Probes answered by other weights that end in FAILED.
    """

    first_s: float = 1.0
    longest_s: float = 60.0
    jitter: float = 0.5
    max_attempts: int = 5
    max_mismatches: int = 2

    def wait_s(self, num_attempts: int, chance: float) -> float:
        """Return the wait after so many failures in a row; `chance` is in [0, 1)."""
        whole_s = min(self.longest_s, self.first_s * 2.0 ** min(num_attempts - 1, 30))
        return whole_s * (1 - self.jitter * chance)


DEFAULT_RULES = RetryRules()


def is_ours(name: str) -> bool:
    """Return whether an adapter's name is one of our scheme, `name@digest12`."""
    try:
        return str(parse_version(name)) == name
    except InvalidName:
        return False


def is_to_unload(slot: Slot, *, is_wanted: bool) -> bool:
    """Return whether the engine has to let a version go."""
    if slot.phase in (Phase.DRAINING, Phase.UNLOADING):
        return True
    if slot.phase is Phase.FAILED:
        return slot.is_registered
    return slot.is_registered and not is_wanted and slot.phase in (Phase.LOADING, Phase.RETRYING)
