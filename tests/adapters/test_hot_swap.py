"""The state machine of one replica's adapters, by example and under any order of events."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from adapters.hot_swap import HotSwap
from adapters.swap_slot import LOST, Phase, RetryRules, Slot, Step, is_ours

A, B, C = (f"{name}@{digit * 12}" for name, digit in (("a", "0"), ("b", "1"), ("c", "2")))
RULES = RetryRules(first_s=1.0, longest_s=8.0, jitter=0.0, max_attempts=3, max_mismatches=2)


def machine(*wanted: str, max_registered: int = 2) -> HotSwap:
    """One whose engine answers and has nothing."""
    swap = HotSwap(max_registered, lambda: 0.0, RULES)
    swap.observe({})
    swap.want(wanted)
    return swap


def load(swap: HotSwap, version: str, now_s: float = 0.0) -> None:
    """Loads a version whose turn it is."""
    step = swap.next_step(now_s)
    assert step is not None
    assert (step.kind, step.version) == ("load", version)
    swap.begin(step)
    swap.loaded(version, f"/{version}", 0.5)


def prove(swap: HotSwap, version: str) -> None:
    """Proves a version that was loaded."""
    step = swap.next_step(0.0)
    assert step == Step("probe", version)
    swap.begin(step)
    swap.proven(version, 7.0)


def ready(*versions: str, max_registered: int = 2) -> HotSwap:
    """One with these versions proven."""
    swap = machine(*versions, max_registered=max_registered)
    for version in sorted(versions):
        load(swap, version)
        prove(swap, version)
    return swap


def test_load_then_probe_then_ready() -> None:
    """A wanted version is loaded, probed, and only then ready."""
    swap = machine(A)
    assert swap.slots[A].phase is Phase.LOADING
    load(swap, A)
    assert swap.slots[A].phase is Phase.LOADED
    prove(swap, A)
    assert (swap.slots[A].phase, swap.slots[A].ready_at_s) == (Phase.READY, 7.0)
    assert swap.next_step(0.0) is None


def test_nothing_is_done_before_the_engine_answers() -> None:
    """Steps wait for the first listing."""
    swap = HotSwap(2, lambda: 0.0, RULES)
    swap.want([A])
    assert swap.next_step(0.0) is None
    swap.observe({})
    assert swap.next_step(0.0) == Step("load", A)


def test_unload_drains_first_and_waits_its_turn() -> None:
    """What is not wanted drains, is unloaded, and is forgotten."""
    swap = ready(A)
    swap.want([])
    step = swap.next_step(0.0)
    assert step == Step("drain", A)
    swap.begin(step)
    assert swap.slots[A].phase is Phase.DRAINING
    assert swap.next_step(0.0, ("load", "probe")) is None
    step = swap.next_step(0.0)
    assert step == Step("unload", A)
    swap.begin(step)
    assert swap.still_unwanted(A)
    swap.unloaded(A)
    assert swap.slots == {}


def test_version_wanted_again_while_it_drains_is_proven_anew() -> None:
    """It goes back to loaded, not to ready."""
    swap = ready(A)
    swap.want([])
    swap.begin(Step("drain", A))
    swap.begin(Step("unload", A))
    swap.want([A])
    assert not swap.still_unwanted(A)
    assert swap.next_step(0.0) == Step("probe", A)


def test_full_replica_unloads_before_it_loads() -> None:
    """No load begins while a draining version holds the last place."""
    swap = ready(A, B)
    swap.want([B, C])
    drain = swap.next_step(0.0)
    assert drain == Step("drain", A)
    swap.begin(drain)
    unload = swap.next_step(0.0)
    assert unload == Step("unload", A)
    swap.begin(unload)
    assert swap.next_step(0.0) is None
    swap.still_unwanted(A)
    assert swap.next_step(0.0) is None
    swap.unloaded(A)
    assert swap.next_step(0.0) == Step("load", C)


def test_foreign_adapters_take_room_and_are_left_alone() -> None:
    """An adapter that is not named by our scheme is counted and never unloaded."""
    swap = machine(A, max_registered=1)
    swap.observe({"somebody": "/elsewhere"})
    assert swap.num_registered == 1
    assert swap.next_step(0.0) is None
    swap.observe({})
    assert swap.next_step(0.0) == Step("load", A)


def test_stray_version_of_ours_is_drained_and_unloaded() -> None:
    """A version that the engine lists and nobody wants goes."""
    swap = machine()
    swap.observe({A: "/a"})
    step = swap.next_step(0.0)
    assert step == Step("drain", A)


def test_lost_adapter_is_not_ready_and_is_loaded_again() -> None:
    """A version that the engine no longer lists leaves READY at once."""
    swap = ready(A, B)
    assert swap.observe({B: "/b"})
    assert (swap.slots[A].phase, swap.slots[A].reason) == (Phase.LOADING, LOST)
    assert swap.slots[A].ready_at_s is None
    assert swap.slots[B].phase is Phase.READY
    assert swap.next_step(0.0) == Step("load", A)


def test_restart_forgets_everything_and_failures_too() -> None:
    """After a restart what is wanted begins anew, with all its attempts."""
    swap = ready(A)
    swap.want([A, B])
    swap.begin(Step("load", B))
    swap.load_failed(B, "no", 0.0, is_terminal=True, may_have=False)
    assert swap.slots[B].phase is Phase.FAILED
    swap.went_down()
    assert {slot.phase for slot in swap.slots.values()} == {Phase.LOADING}
    assert swap.next_step(0.0) is None
    swap.observe({})
    assert swap.slots[B].num_attempts == 0
    load(swap, A)


def test_silent_replica_keeps_what_it_has() -> None:
    """A replica that cannot be asked is left as it is until it lists again."""
    swap = ready(A)
    swap.is_silent()
    assert swap.next_step(0.0) is None
    assert swap.slots[A].phase is Phase.READY
    swap.observe({A: f"/{A}"})
    assert swap.slots[A].phase is Phase.READY


def test_refusal_does_not_undo_a_load_whose_answer_was_lost() -> None:
    """A version that the engine may have holds its place until a listing says otherwise."""
    swap = machine(A, max_registered=1)
    for may_have in (True, False):
        swap.begin(Step("load", A))
        swap.load_failed(A, "no", 0.0, is_terminal=False, may_have=may_have)
        assert swap.num_registered == 1
    swap.observe({})
    assert swap.num_registered == 0


def test_failures_back_off_and_end() -> None:
    """Waits double from the first; the third failure in a row is the last."""
    swap, now_s = machine(A), 0.0
    for wait_s in (1.0, 2.0):
        swap.begin(Step("load", A))
        swap.load_failed(A, "no room", now_s, is_terminal=False, may_have=False)
        assert swap.slots[A].phase is Phase.RETRYING
        assert swap.slots[A].not_before_s == now_s + wait_s
        assert swap.next_step(now_s + wait_s - 0.01) is None
        now_s += wait_s
    swap.begin(Step("load", A))
    swap.load_failed(A, "no room", now_s, is_terminal=False, may_have=False)
    assert (swap.slots[A].phase, swap.slots[A].reason) == (Phase.FAILED, "no room")
    assert swap.next_step(1e9) is None
    swap.retry(A)
    assert swap.next_step(now_s) == Step("load", A)


def test_failure_outlives_placement_elsewhere() -> None:
    """A failed version that is placed elsewhere is not placed here again by forgetting."""
    swap = machine(A)
    swap.begin(Step("load", A))
    swap.load_failed(A, "no", 0.0, is_terminal=True, may_have=False)
    swap.want([])
    assert swap.slots[A].phase is Phase.FAILED
    swap.forget({A})
    assert swap.slots[A].phase is Phase.FAILED
    swap.forget(set())
    assert swap.slots == {}


def test_wrong_weights_are_reloaded_once_from_checked_files() -> None:
    """A mismatch unloads and loads with a check; the second one is terminal."""
    swap = machine(A)
    load(swap, A)
    for is_last in (False, True):
        swap.begin(Step("probe", A))
        swap.mismatched(A, "other weights")
        step = swap.next_step(0.0)
        assert step == Step("unload", A)
        swap.begin(step)
        assert swap.still_unwanted(A)
        swap.unloaded(A)
        if not is_last:
            step = swap.next_step(0.0)
            assert step == Step("load", A, verify=True)
            swap.begin(step)
            swap.loaded(A, "/a/2", 0.5)
    assert (swap.slots[A].phase, swap.slots[A].reason) == (Phase.FAILED, "other weights")
    assert swap.num_registered == 0


def test_proof_that_comes_after_a_restart_proves_nothing() -> None:
    """A probe that was under way when the replica went down does not make it ready."""
    swap = machine(A)
    load(swap, A)
    swap.begin(Step("probe", A))
    swap.went_down()
    swap.proven(A, 9.0)
    assert swap.slots[A].phase is Phase.LOADING
    swap.observe({})
    assert swap.next_step(0.0) == Step("load", A)


def test_engine_that_lists_nothing_needs_no_list() -> None:
    """For TensorRT-LLM a listing tells only that it is up."""
    swap = machine()
    swap.observe(None)
    swap.want([A])
    load(swap, A)
    prove(swap, A)
    swap.observe(None)
    assert swap.slots[A].phase is Phase.READY


@pytest.mark.parametrize(
    ("name", "expected"),
    [(A, True), ("support", False), ("a@123", False), (f"a@{'0' * 64}", False)],
)
def test_our_names(name: str, expected: bool) -> None:
    """Only `name@digest12` is ours."""
    assert is_ours(name) is expected


@dataclass
class Engine:
    """What the engine really has, and how often each version was proven in its present life."""

    has: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, the rules hold."""

    versions = Bundle("versions")

    def __init__(self) -> None:
        super().__init__()
        self.max_registered = 3
        self.swap = HotSwap(self.max_registered, lambda: 0.5, RULES)
        self.engine = Engine()
        self.now_s = 0.0
        self.under_way: dict[str, Step] = {}
        self.proven_since_load: set[str] = set()

    def listed(self) -> dict[str, str]:
        return {name: f"/{name}" for name in self.engine.has | self.engine.foreign}

    @rule(wanted=st.sets(st.sampled_from([f"v@{n:012x}" for n in range(6)])))
    def want(self, wanted: set[str]) -> None:
        self.swap.want(wanted)

    @rule()
    def look(self) -> None:
        self.swap.observe(self.listed())

    @rule(seconds=st.floats(0.1, 20.0))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def begin(self) -> None:
        step = self.swap.next_step(self.now_s)
        if step is None:
            return
        if step.kind == "load":
            # What is really there may be more than is listed only by what is under way.
            assert self.swap.num_registered < self.max_registered or (
                self.swap.slots[step.version].is_registered
            )
        self.swap.begin(step)
        if step.kind != "drain":
            self.under_way[step.version] = step

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), outcome=st.sampled_from(["well", "badly", "unknown", "terminally"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        version = data.draw(st.sampled_from(sorted(self.under_way)))
        step = self.under_way.pop(version)
        if version not in self.swap.slots:
            return
        getattr(self, f"_end_{step.kind}")(version, outcome)

    def _end_load(self, version: str, outcome: str) -> None:
        if outcome in ("well", "unknown"):
            self.engine.has.add(version)
            self.proven_since_load.discard(version)
        if outcome == "well":
            self.swap.loaded(version, f"/{version}", 0.1)
            return
        self.swap.load_failed(
            version,
            outcome,
            self.now_s,
            is_terminal=outcome == "terminally",
            may_have=outcome == "unknown",
        )

    def _end_probe(self, version: str, outcome: str) -> None:
        if outcome == "well":
            if version in self.engine.has:
                self.proven_since_load.add(version)
                self.swap.proven(version, self.now_s)
            else:
                self.swap.mismatched(version, "the base answered")
        elif outcome == "badly":
            self.swap.probe_failed(version, outcome, self.now_s)
        elif outcome == "unknown":
            self.swap.waits(version, outcome, self.now_s + 1)
        else:
            self.swap.mismatched(version, outcome)

    def _end_unload(self, version: str, outcome: str) -> None:
        if not self.swap.still_unwanted(version):
            return
        if outcome == "well":
            self.engine.has.discard(version)
            self.proven_since_load.discard(version)
            self.swap.unloaded(version)
        else:
            self.swap.unload_failed(version, outcome, self.now_s)

    @rule(lost=st.booleans())
    def restart(self, lost: bool) -> None:
        self.engine.has.clear()
        self.proven_since_load.clear()
        if lost:
            self.swap.went_down()
        else:
            self.swap.observe(self.listed())

    @rule(name=st.sampled_from(["theirs", "others"]))
    def foreign_comes_or_goes(self, name: str) -> None:
        self.engine.foreign ^= {name}
        self.swap.observe(self.listed())

    @invariant()
    def ready_only_after_a_proof(self) -> None:
        for version, slot in self.swap.slots.items():
            if slot.phase is Phase.READY and version not in self.under_way:
                assert version in self.proven_since_load

    @invariant()
    def what_the_engine_has_is_counted(self) -> None:
        registered = {v for v, slot in self.swap.slots.items() if slot.is_registered}
        assert self.engine.has <= registered | self.under_way.keys() | self.strays()

    def strays(self) -> set[str]:
        """What only the next listing can tell."""
        return {v for v in self.engine.has if v not in self.swap.slots}

    @invariant()
    def never_more_than_it_may_know(self) -> None:
        ours = sum(slot.holds_place for slot in self.swap.slots.values())
        assert ours <= self.max_registered


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_restored_ready_version_needs_the_list() -> None:
    """What was recorded as ready stays so only while the engine lists it."""
    swap = HotSwap(2, lambda: 0.0, RULES)
    for version in (A, B):
        swap.restore(version, Slot(Phase.READY, "/x", is_registered=True, ready_at_s=1.0))
    swap.want([A, B])
    swap.observe({A: "/x"})
    assert swap.slots[A].phase is Phase.READY
    assert swap.slots[B].phase is Phase.LOADING
