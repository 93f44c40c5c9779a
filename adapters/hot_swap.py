"""What to do next with the adapters of one replica: a state machine, and nothing else.

Owns phases, transitions, and the rules of retry, backoff and giving up. Never does I/O and reads no
clock: whoever drives it (`serving/control/replica_sync.py`) tells it what is wanted, what the engine
lists and how each step ended, and asks for the next step.

    absent ──load──> LOADING ──loaded──> LOADED ──proven──> READY
                        │ ^                │ mismatch          │ not wanted
                        v │ its time       v                   v
                     RETRYING          UNLOADING <──acked── DRAINING
                        │ too often        │
                        v                  v
                      FAILED            absent, LOADING again, or FAILED

Rules that hold in every state:

- READY comes from a proof alone, and is lost at once when the engine no longer lists the version or
  has restarted.
- What the engine may hold, versions that drain and foreign adapters included, is never made more than
  `max_registered` by a load.
- FAILED is terminal until the replica restarts or somebody asks for a retry.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from adapters.swap_slot import (
    DEFAULT_RULES,
    LOST,
    RESTARTED,
    STEP_KINDS,
    Phase,
    RetryRules,
    Slot,
    Step,
    StepKind,
    is_ours,
    is_to_unload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping


class HotSwap:
    """The versions of one replica.

    Attributes:
        slots: Version → where it stands.
        wanted: Versions that shall be there.
        max_registered: Adapters that the engine may know at once.
        num_foreign: Adapters that the engine has and that are not ours.
        is_up: Whether the engine answers.
    """

    def __init__(
        self, max_registered: int, chance: Callable[[], float], rules: RetryRules = DEFAULT_RULES
    ) -> None:
        """Start with nothing, on a replica that has not answered yet.

        Args:
            max_registered: Adapters that the engine may know at once.
            chance: Random numbers in [0, 1).
            rules: When to try again.
        """
        self.slots: dict[str, Slot] = {}
        self.wanted: frozenset[str] = frozenset()
        self.max_registered = max_registered
        self.num_foreign = 0
        self.is_up = False
        self._chance = chance
        self._urgent: str | None = None
        self._rules = rules

    @property
    def num_registered(self) -> int:
        """Adapters that the engine has or may have."""
        return self.num_foreign + sum(slot.holds_place for slot in self.slots.values())

    # What is told.

    def want(self, versions: Collection[str]) -> None:
        """Take note of what shall be there; what need not be unloaded is dropped at once."""
        self.wanted = frozenset(versions)
        for version in sorted(self.wanted - self.slots.keys()):
            self.slots[version] = Slot(Phase.LOADING)
        for version, slot in list(self.slots.items()):
            if version in self.wanted:
                if slot.phase is Phase.DRAINING and not slot.is_busy:
                    self._set(version, phase=Phase.LOADED, not_before_s=0.0)
            else:
                self._drop_if_idle(version)

    def hurry(self, version: str) -> None:
        """Load this one before the others: a request waits for it."""
        self._urgent = version

    def forget(self, known: Collection[str]) -> None:
        """Drop the failures of versions that exist no more."""
        for version in self.slots.keys() - known:
            if self.slots[version].phase is Phase.FAILED:
                self._set(version, phase=Phase.LOADING)
                self._drop_if_idle(version)

    def restore(self, version: str, slot: Slot) -> None:
        """Take over what was recorded before this process started."""
        self.slots[version] = slot

    def observe(self, listed: Mapping[str, str] | None) -> bool:
        """Compare with what the engine lists.

        Args:
            listed: Adapter → path; None where the engine's kind lists none.

        Returns:
            Whether a version was found lost that the engine had before: it has restarted.
        """
        self.is_up = True
        if listed is None:
            return False
        self.num_foreign = sum(not is_ours(name) for name in listed)
        has_lost = False
        for version, slot in list(self.slots.items()):
            if slot.is_busy or version in listed:
                continue
            if slot.phase is Phase.UNLOADING or slot.phase is Phase.DRAINING:
                self._let_go(version)
            elif slot.phase in (Phase.LOADED, Phase.READY):
                has_lost = True
                self._set(version, **_ABSENT, phase=Phase.LOADING, reason=LOST)
            elif slot.is_registered:
                self._set(version, is_registered=False)
                self._drop_if_idle(version)
        for version, path in listed.items():
            if is_ours(version):
                self._find(version, path)
        return has_lost

    def is_silent(self) -> None:
        """Do nothing more until the engine answers again; what it had, it may still have."""
        self.is_up = False

    def went_down(self, reason: str = RESTARTED) -> None:
        """Forget all that the engine knew: whatever it is when it answers again, it is not that."""
        self.is_up = False
        for version, slot in list(self.slots.items()):
            if version in self.wanted or slot.is_busy:
                self.slots[version] = Slot(
                    Phase.LOADING,
                    is_busy=slot.is_busy,
                    reason=reason,
                    load_s=slot.load_s,
                )
            else:
                del self.slots[version]

    def retry(self, version: str) -> None:
        """Give a version that has failed another chance."""
        slot = self.slots.get(version)
        if slot is not None and slot.phase in (Phase.FAILED, Phase.RETRYING) and not slot.is_busy:
            self._set(version, phase=Phase.LOADING, num_attempts=0, num_mismatches=0)
            self._set(version, not_before_s=0.0, reason=None)

    # What is to be done.

    def next_step(self, now_s: float, kinds: Collection[StepKind] = STEP_KINDS) -> Step | None:
        """Return the most urgent step, or None.

        Proofs come before loads, as somebody may wait for them; loads where there is room come before
        unloads, which may take as long as a request.

        Args:
            now_s: Time on the driver's clock.
            kinds: What may begin now, as engines do one load and one unload at a time.
        """
        if not self.is_up:
            return None
        return next((step for step in self._steps(now_s) if step.kind in kinds), None)

    def next_time_s(self, now_s: float) -> float | None:
        """Return when a step will be due that is not yet, if any."""
        times = [slot.not_before_s for slot in self.slots.values() if not slot.is_busy]
        return min((time for time in times if time > now_s), default=None)

    def _steps(self, now_s: float) -> Iterator[Step]:
        due = {
            version: slot
            for version, slot in self.slots.items()
            if not slot.is_busy and slot.not_before_s <= now_s
        }
        for version, slot in due.items():
            if version not in self.wanted and slot.phase in (Phase.LOADED, Phase.READY):
                yield Step("drain", version)
        for version, slot in due.items():
            if version in self.wanted and slot.phase is Phase.LOADED:
                yield Step("probe", version)
        for version, slot in sorted(due.items(), key=lambda pair: pair[0] != self._urgent):
            is_new = version in self.wanted and slot.phase in (Phase.LOADING, Phase.RETRYING)
            has_room = slot.is_registered or self.num_registered < self.max_registered
            if is_new and has_room:
                yield Step("load", version, slot.num_mismatches > 0)
        for version, slot in due.items():
            if is_to_unload(slot, is_wanted=version in self.wanted):
                yield Step("unload", version)

    # How steps begin and end.

    def begin(self, step: Step) -> None:
        """A step has begun; a drain has ended as well."""
        if step.kind == "load":
            self._set(step.version, phase=Phase.LOADING, is_busy=True)
        elif step.kind == "probe":
            self._set(step.version, is_busy=True)
        elif step.kind == "drain":
            self._set(step.version, phase=Phase.DRAINING, not_before_s=0.0, after_unload="forget")
        else:
            self._begin_unload(step.version)

    def still_unwanted(self, version: str) -> bool:
        """Return whether an unload that waited may go on; if not, the version is to be proven anew."""
        slot = self.slots.get(version)
        if slot is None:
            return False
        if slot.phase is Phase.LOADING:
            self._set(version, is_busy=False)  # The replica has restarted meanwhile.
            return False
        if version in self.wanted and slot.after_unload == "forget":
            self._set(version, phase=Phase.LOADED, is_busy=False, not_before_s=0.0)
            return False
        self._set(version, phase=Phase.UNLOADING)
        return True

    def loaded(self, version: str, path: str, load_s: float) -> None:
        """The engine has it; a proof is due at once."""
        self._set(version, phase=Phase.LOADED, path=path, is_registered=True, is_busy=False)
        self._set(version, not_before_s=0.0, load_s=load_s, reason=None)

    def proven(self, version: str, now_s: float) -> None:
        """The version's weights have answered."""
        if self.slots[version].phase is not Phase.LOADED:
            self._set(version, is_busy=False)
            return
        self._set(version, phase=Phase.READY, is_busy=False, num_attempts=0, num_mismatches=0)
        self._set(version, not_before_s=0.0, reason=None, ready_at_s=now_s)

    def waits(self, version: str, reason: str, until_s: float) -> None:
        """Nothing can be said of it now, through no fault of the replica: no attempt is counted."""
        self._set(version, is_busy=False, reason=reason, not_before_s=until_s)

    def load_failed(
        self, version: str, reason: str, now_s: float, *, is_terminal: bool, may_have: bool
    ) -> None:
        """A load has failed.

        Args:
            version: Which.
            reason: One sentence.
            now_s: Time on the driver's clock.
            is_terminal: Whether trying again is of no use.
            may_have: Whether the engine may have it all the same.
        """
        # A refusal does not undo an earlier load whose answer was lost: the next listing tells.
        if may_have:
            self._set(version, is_registered=True)
        self._count_failure(version, reason, now_s, is_terminal=is_terminal)
        self._drop_if_idle(version)

    def probe_failed(self, version: str, reason: str, now_s: float) -> None:
        """The engine did not answer a probe as it should; the version stays loaded meanwhile."""
        if self.slots[version].phase is not Phase.LOADED:
            self._set(version, is_busy=False)
            return
        self._count_failure(version, reason, now_s, is_terminal=False, retrying=Phase.LOADED)

    def mismatched(self, version: str, reason: str) -> None:
        """Other weights answered: once it is loaded anew from checked files, then it has failed."""
        slot = self.slots[version]
        if slot.phase is not Phase.LOADED:
            self._set(version, is_busy=False)
            return
        num = slot.num_mismatches + 1
        after: Literal["reload", "fail"] = "fail" if num >= self._rules.max_mismatches else "reload"
        self._set(version, phase=Phase.UNLOADING, is_busy=False, num_mismatches=num)
        self._set(version, reason=reason, after_unload=after, not_before_s=0.0, ready_at_s=None)

    def unloaded(self, version: str) -> None:
        """The engine has let it go."""
        if version in self.slots:
            self._let_go(version)

    def unload_failed(self, version: str, reason: str, now_s: float) -> None:
        """It could not be unloaded; it is tried until it can, as the place is needed."""
        slot = self.slots.get(version)
        if slot is None:
            return
        num = slot.num_attempts + 1
        self._set(version, is_busy=False, num_attempts=num, reason=reason)
        self._set(version, not_before_s=now_s + self._rules.wait_s(num, self._chance()))

    def _count_failure(
        self,
        version: str,
        reason: str,
        now_s: float,
        *,
        is_terminal: bool,
        retrying: Phase = Phase.RETRYING,
    ) -> None:
        num = self.slots[version].num_attempts + 1
        self._set(version, is_busy=False, num_attempts=num, reason=reason, ready_at_s=None)
        if not is_terminal and num < self._rules.max_attempts:
            wait_s = self._rules.wait_s(num, self._chance())
            self._set(version, phase=retrying, not_before_s=now_s + wait_s)
        elif self.slots[version].is_registered:
            self._set(version, phase=Phase.UNLOADING, after_unload="fail", not_before_s=0.0)
        else:
            self._set(version, phase=Phase.FAILED, not_before_s=0.0)

    def _let_go(self, version: str) -> None:
        after = self.slots[version].after_unload
        if after == "fail":
            self._set(version, **_ABSENT, phase=Phase.FAILED)
        elif version not in self.wanted:
            del self.slots[version]
        else:
            self._set(version, **_ABSENT, phase=Phase.LOADING)

    def _find(self, version: str, path: str) -> None:
        """The engine lists a version of ours."""
        slot = self.slots.get(version)
        if slot is None:
            self.slots[version] = Slot(Phase.LOADED, path, is_registered=True)
        elif not slot.is_busy and slot.phase in (Phase.LOADING, Phase.RETRYING):
            # A load that was said to have failed, or that an earlier process began.
            self._set(version, phase=Phase.LOADED, path=path, is_registered=True, not_before_s=0.0)
        elif not slot.is_registered:
            self._set(version, is_registered=True, path=path)

    def _begin_unload(self, version: str) -> None:
        phase = self.slots[version].phase
        self._set(version, is_busy=True)
        if phase is Phase.FAILED:
            self._set(version, phase=Phase.UNLOADING, after_unload="fail")
        elif phase is not Phase.DRAINING:
            self._set(version, phase=Phase.UNLOADING)

    def _drop_if_idle(self, version: str) -> None:
        """Failures are kept: without them it would be placed here again."""
        slot = self.slots[version]
        if version in self.wanted or slot.is_registered or slot.is_busy:
            return
        if slot.phase is not Phase.FAILED:
            del self.slots[version]

    def _set(self, version: str, **fields: object) -> None:
        self.slots[version] = replace(self.slots[version], **fields)  # type: ignore[arg-type]


_ABSENT = {
    "is_registered": False,
    "is_busy": False,
    "not_before_s": 0.0,
    "ready_at_s": None,
    "after_unload": "forget",
}
