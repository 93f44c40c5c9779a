"""Placement keeps its promises on arbitrary fleets, and does the sensible thing on plain ones."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_fleets import UNBOUND, apply, fleets, replica, version

from adapters.placement import Limits, Move, plan

_MAX_PLANS = 60
# Other processes on the same core must not fail a test.
unhurried = settings(deadline=None)


def usable(one):
    """Whether a replica takes adapters at all."""
    return one.is_healthy and one.gpu_slots > 0 and one.max_registered > 0


def copies(placed, name):
    """On how many replicas a version is to be."""
    return sum(name in versions for versions in placed.values())


@unhurried
@given(fleets())
def test_capacity_is_never_exceeded(fleet):
    """What is desired and what drains fit together, and so does every replica after the moves."""
    versions, replicas = fleet
    made = plan(versions, replicas)
    for one, after in zip(replicas, apply(made, replicas), strict=True):
        assert len(made.desired[one.name]) + len(one.draining) <= one.max_registered or not usable(
            one
        )
        assert len(after.resident) <= one.max_registered


@unhurried
@given(fleets())
def test_moves_lead_from_what_is_to_what_is_desired(fleet):
    """Following the moves gives exactly the desired sets; nothing is moved twice or in vain."""
    versions, replicas = fleet
    made = plan(versions, replicas)
    for one, after in zip(replicas, apply(made, replicas), strict=True):
        if usable(one):
            assert after.resident - one.draining == made.desired[one.name]
    assert len(set(made.loads)) == len(made.loads)
    assert len(set(made.unloads)) == len(made.unloads)
    assert not set(made.loads) & set(made.unloads)


@unhurried
@given(fleets())
def test_nothing_goes_where_it_cannot_be(fleet):
    """No other base model, no version the replica cannot load or drains, no dead replica."""
    versions, replicas = fleet
    known = {one.version: one for one in versions}
    made = plan(versions, replicas)
    by_name = {one.name: one for one in replicas}
    for name, placed in made.desired.items():
        one = by_name[name]
        assert not placed & one.unloadable
        assert not placed & one.draining
        assert all(known[item].base == one.base for item in placed)
        if not usable(one):
            assert placed == frozenset()
    for move in (*made.loads, *made.unloads):
        assert usable(by_name[move.replica])
    for move in made.unloads:
        assert move.version in by_name[move.replica].resident


@unhurried
@given(fleets())
def test_draining_versions_are_left_alone(fleet):
    """A version that drains on a replica is neither loaded nor unloaded there."""
    versions, replicas = fleet
    made = plan(versions, replicas)
    draining = {Move(item, one.name) for one in replicas for item in one.draining}
    assert not draining & {*made.loads, *made.unloads}


@unhurried
@given(fleets())
def test_minimum_copies_are_met_where_possible(fleet):
    """A version lacks a copy only if every open replica is full of versions that must stay."""
    versions, replicas = fleet
    made = plan(versions, replicas, UNBOUND)
    required = {one.version: one for one in versions if one.min_copies}
    for name, one in required.items():
        if copies(made.desired, name) >= one.min_copies:
            continue
        for where in replicas:
            if not usable(where) or where.base != one.base or name in made.desired[where.name]:
                continue
            if name in where.unloadable or name in where.draining:
                continue
            placed = made.desired[where.name]
            assert len(placed) + len(where.draining) >= where.max_registered
            assert all(
                item in required and copies(made.desired, item) <= required[item].min_copies
                for item in placed
            )


@unhurried
@given(fleets(), st.randoms(use_true_random=False))
def test_the_order_of_arguments_does_not_matter(fleet, rng):
    """The same fleet in another order gets the same plan."""
    versions, replicas = fleet
    made = plan(versions, replicas)
    shuffled_versions, shuffled_replicas = list(versions), list(replicas)
    rng.shuffle(shuffled_versions)
    rng.shuffle(shuffled_replicas)
    again = plan(shuffled_versions, shuffled_replicas)
    assert again.loads == made.loads
    assert again.unloads == made.unloads
    assert dict(again.desired) == dict(made.desired)


@unhurried
@given(fleets(), st.integers(1, 3), st.floats(0.01, 1.0))
def test_plans_come_to_rest(fleet, per_replica, fraction):
    """With the demand as it is, plans followed one after the other end in one without moves."""
    versions, replicas = fleet
    limits = Limits(max_loads_per_replica=per_replica, max_loads_fraction=fraction)
    for _ in range(_MAX_PLANS):
        made = plan(versions, replicas, limits)
        if not made.loads and not made.unloads:
            return
        replicas = apply(made, replicas)
    pytest.fail(f"After {_MAX_PLANS} plans there are still moves: {made}")


@unhurried
@given(fleets())
def test_a_whole_plan_needs_no_second(fleet):
    """Where loads are not bounded, one plan does everything."""
    versions, replicas = fleet
    made = plan(versions, replicas, UNBOUND)
    again = plan(versions, apply(made, replicas), UNBOUND)
    assert again.loads == ()
    assert again.unloads == ()


@unhurried
@given(fleets(), st.integers(1, 3), st.floats(0.0, 0.5))
def test_churn_is_bounded(fleet, per_replica, fraction):
    """No replica loads more than its bound; beyond required copies the fleet's bound holds."""
    versions, replicas = fleet
    versions = [replace(one, min_copies=0) for one in versions]
    limits = Limits(max_loads_per_replica=per_replica, max_loads_fraction=fraction)
    made = plan(versions, replicas, limits)
    for one in replicas:
        assert sum(move.replica == one.name for move in made.loads) <= per_replica
    for base in {one.base for one in replicas}:
        mine = [one for one in replicas if one.base == base and usable(one)]
        bound = max(1, int(sum(one.max_registered for one in mine) * fraction))
        names = {one.name for one in mine}
        assert sum(move.replica in names for move in made.loads) <= bound


@unhurried
@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=12), st.data())
def test_more_demand_never_costs_a_version_copies(rates, data):
    """From an empty fleet: a version asked for more often has at least as many copies as before."""
    chosen = data.draw(st.integers(0, len(rates) - 1))
    factor = data.draw(st.floats(1.0, 50.0))
    replicas = [replica(f"r{number}", 3) for number in range(3)]

    def copies_at(scale):
        versions = [
            version(f"v{number:02d}", rate * (scale if number == chosen else 1.0))
            for number, rate in enumerate(rates)
        ]
        return copies(plan(versions, replicas, UNBOUND).desired, f"v{chosen:02d}")

    assert copies_at(factor) >= copies_at(1.0)


@pytest.mark.parametrize("seed", range(10))
def test_rates_that_wobble_move_next_to_nothing(seed):
    """Twelve rounds of rates that vary by a twentieth cost a settled fleet one load at most."""
    rng = random.Random(seed)  # noqa: S311
    rates = [rng.uniform(0.01, 5.0) for _ in range(20)]
    replicas = [replica(f"r{number}", 4, gpu_slots=4) for number in range(4)]

    def wobbling(share):
        return [
            version(f"v{number:02d}", rate * (1 + share * rng.uniform(-1, 1)))
            for number, rate in enumerate(rates)
        ]

    replicas = apply(plan(wobbling(0.0), replicas, UNBOUND), replicas)
    num_loads = 0
    for _ in range(12):
        made = plan(wobbling(0.05), replicas, UNBOUND)
        replicas = apply(made, replicas)
        num_loads += len(made.loads)
    assert num_loads <= 1


def test_the_most_valuable_get_the_places():
    """Rate times load seconds decides: a slow loader outweighs a somewhat busier quick one."""
    versions = [
        version("busy@1", 3.0, load_s=1.0),
        version("slow@1", 2.0, load_s=5.0),
        version("cold@1", 0.1, load_s=1.0),
    ]
    made = plan(versions, [replica("r0", 2)], UNBOUND)
    assert made.desired["r0"] == {"busy@1", "slow@1"}
    assert made.loads == (Move("slow@1", "r0"), Move("busy@1", "r0"))


def test_a_resident_gives_way_only_to_what_is_worth_much_more():
    """With a margin of 3 a newcomer must be worth four times as much."""
    resident = version("here@1", 1.0)
    replicas = [replica("r0", 1, ["here@1"])]
    near = plan([resident, version("new@1", 3.9)], replicas, UNBOUND)
    assert (near.loads, near.unloads) == ((), ())
    far = plan([resident, version("new@1", 4.1)], replicas, UNBOUND)
    assert far.loads == (Move("new@1", "r0"),)
    assert far.unloads == (Move("here@1", "r0"),)


def test_a_hot_version_is_on_as_many_replicas_as_its_load_asks_for():
    """Half of all tokens over four replicas is twice the fair part: eight quarters, so all four."""
    versions = [version("hot@1", 8.0), *(version(f"v{number}@1", 0.5) for number in range(16))]
    replicas = [replica(f"r{number}", 8, gpu_slots=4) for number in range(4)]
    made = plan(versions, replicas, UNBOUND)
    assert copies(made.desired, "hot@1") == 4
    assert all(copies(made.desired, f"v{number}@1") == 1 for number in range(16))


def test_an_idle_fleet_makes_no_copies():
    """One version with a few tokens a second is all the load there is, and needs no second copy."""
    replicas = [replica(f"r{number}") for number in range(4)]
    made = plan([version("only@1", 0.01, 5.0)], replicas, UNBOUND)
    assert copies(made.desired, "only@1") == 1


def test_load_is_spread_evenly():
    """Forty versions with Zipf rates: no replica is expected to carry a quarter above the mean."""
    rng = random.Random(5)  # noqa: S311
    tokens = [4000.0 / (rank + 1) for rank in range(40)]
    rng.shuffle(tokens)
    versions = [version(f"v{number:02d}", 1.0 + load, load) for number, load in enumerate(tokens)]
    replicas = [replica(f"r{number}", 16, gpu_slots=8) for number in range(4)]
    made = plan(versions, replicas, UNBOUND)
    shares = {
        name: sum(
            one.tokens_per_s / copies(made.desired, one.version)
            for one in versions
            if one.version in placed
        )
        for name, placed in made.desired.items()
    }
    assert max(shares.values()) <= 1.25 * sum(tokens) / 4


def test_uneven_residents_change_places():
    """Two busy versions on one replica and two quiet ones on the other: one of each moves."""
    versions = [version("a@1", 2.0), version("b@1", 2.0), version("c@1", 0.1), version("d@1", 0.1)]
    replicas = [replica("r0", 2, ["a@1", "b@1"]), replica("r1", 2, ["c@1", "d@1"])]
    made = plan(versions, replicas, replace(UNBOUND, max_share=2.0))
    assert len(made.desired["r0"] & {"a@1", "b@1"}) == 1
    assert len(made.desired["r1"] & {"a@1", "b@1"}) == 1
    assert len(made.loads) == len(made.unloads) == 2


def test_versions_of_a_dead_replica_are_placed_elsewhere():
    """What a replica had comes to the others by worth when it dies, pinned versions first."""
    versions = [
        version("pinned@1", 0.0, min_copies=1),
        version("hot@1", 9.0),
        version("warm@1", 1.0),
        version("other@1", 0.01),
    ]
    dead = replica("r0", 4, ["pinned@1", "hot@1", "warm@1"], is_healthy=False)
    made = plan(versions, [dead, replica("r1", 3, ["other@1"])], UNBOUND)
    assert made.desired == {"r0": frozenset(), "r1": {"pinned@1", "hot@1", "warm@1"}}
    assert made.loads[0] == Move("pinned@1", "r1")
    assert made.unloads == (Move("other@1", "r1"),)


def test_idle_versions_leave_unless_they_must_stay():
    """After the idle time a version goes, down to its minimum."""
    versions = [
        version("idle@1", 0.0, idle_s=4000.0),
        version("kept@1", 0.0, idle_s=4000.0, min_copies=1),
    ]
    replicas = [replica("r0", 4, ["idle@1", "kept@1"]), replica("r1", 4, ["kept@1"])]
    made = plan(versions, replicas, UNBOUND)
    assert copies(made.desired, "idle@1") == 0
    assert copies(made.desired, "kept@1") == 1


def test_unwanted_versions_leave_at_once():
    """A resident that nobody names, or that cannot be loaded, is unloaded though there is room."""
    replicas = [replica("r0", 4, ["gone@1", "odd@1", "a@1"], unloadable=frozenset(["odd@1"]))]
    made = plan([version("a@1"), version("odd@1")], replicas, UNBOUND)
    assert set(made.unloads) == {Move("gone@1", "r0"), Move("odd@1", "r0")}
    assert made.desired["r0"] == {"a@1"}


def test_names_must_be_unique():
    """Two replicas of one name cannot be told apart."""
    with pytest.raises(ValueError, match="'r0' is given twice"):
        plan([], [replica("r0"), replica("r0")])
    with pytest.raises(ValueError, match="'a@1' is given twice"):
        plan([version("a@1"), version("a@1")], [])
