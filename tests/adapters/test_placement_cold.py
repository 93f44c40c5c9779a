"""Where a cold adapter's first request waits for it, and what goes for it."""

from hypothesis import given, settings
from placement_fleets import fleets, replica, version

from adapters.placement import ColdPlacement, Limits, place_cold

COLD = version("cold@1", 0.01)


def test_room_is_taken_first():
    """A replica with room is chosen though another's victim is worthless."""
    replicas = [replica("r0", 1, ["quiet@1"]), replica("r1", 1)]
    quiet = version("quiet@1", 0.0, idle_s=500.0)
    assert place_cold(COLD, [quiet], replicas) == ColdPlacement("r1", None)


def test_the_least_valuable_goes():
    """Rate times load seconds, over all replicas."""
    versions = [
        version("a@1", 3.0, load_s=1.0, idle_s=60.0),
        version("b@1", 1.0, load_s=1.0, idle_s=60.0),
        version("c@1", 0.2, load_s=20.0, idle_s=60.0),
        version("d@1", 5.0, load_s=1.0, idle_s=60.0),
    ]
    replicas = [replica("r0", 2, ["a@1", "c@1"]), replica("r1", 2, ["b@1", "d@1"])]
    assert place_cold(COLD, versions, replicas) == ColdPlacement("r1", "b@1")


def test_busy_replicas_are_spared():
    """A replica far above the mean of outstanding tokens is not chosen, whatever its victim."""
    versions = [version("a@1", 0.1, idle_s=60.0), version("b@1", 9.0, idle_s=60.0)]
    replicas = [
        replica("r0", 1, ["a@1"], load_tokens=9000.0),
        replica("r1", 1, ["b@1"], load_tokens=1000.0),
    ]
    assert place_cold(COLD, versions, replicas) == ColdPlacement("r1", "b@1")


def test_equal_victims_are_told_apart_by_load():
    """Of victims worth about the same, the one on the least loaded replica goes."""
    versions = [version("a@1", 1.0, idle_s=60.0), version("b@1", 1.3, idle_s=60.0)]
    replicas = [
        replica("r0", 1, ["a@1"], load_tokens=1000.0),
        replica("r1", 1, ["b@1"], load_tokens=900.0),
    ]
    assert place_cold(COLD, versions, replicas) == ColdPlacement("r1", "b@1")


def test_what_was_just_used_goes_last():
    """A version whose requests may still run is spared for one that is worth more."""
    versions = [version("now@1", 0.1, idle_s=1.0), version("then@1", 1.0, idle_s=60.0)]
    replicas = [replica("r0", 2, ["now@1", "then@1"])]
    assert place_cold(COLD, versions, replicas) == ColdPlacement("r0", "then@1")
    assert place_cold(COLD, versions, replicas, Limits(settle_s=0.0)) == ColdPlacement(
        "r0", "now@1"
    )


def test_spare_copies_go_before_lone_ones():
    """A second copy that the load does not ask for is worth nothing."""
    versions = [version("twice@1", 5.0, 10.0, idle_s=60.0), version("once@1", 0.1, idle_s=60.0)]
    replicas = [replica("r0", 1, ["twice@1"]), replica("r1", 2, ["twice@1", "once@1"])]
    placed = place_cold(COLD, versions, replicas)
    assert placed is not None
    assert placed.evict == "twice@1"


def test_pinned_and_draining_versions_never_go():
    """Where nothing else is, there is no place."""
    pinned = version("pinned@1", 0.0, min_copies=1, idle_s=1e6)
    replicas = [replica("r0", 2, ["pinned@1", "leaving@1"], draining=frozenset(["leaving@1"]))]
    assert place_cold(COLD, [pinned], replicas) is None


def test_only_replicas_that_can_have_it():
    """Dead ones, other base models, and those that cannot load it are left out."""
    replicas = [
        replica("r0", is_healthy=False),
        replica("r1", base="other"),
        replica("r2", unloadable=frozenset(["cold@1"])),
        replica("r3", draining=frozenset(["cold@1"])),
    ]
    assert place_cold(COLD, [], replicas) is None


def test_a_replica_above_capacity_takes_nothing():
    """One that goes would leave no place: the plan has to bring it below first."""
    versions = [version("a@1", idle_s=60.0), version("b@1", idle_s=60.0)]
    assert place_cold(COLD, versions, [replica("r0", 1, ["a@1", "b@1"])]) is None


def test_a_resident_version_stays_where_it_is():
    """If it came meanwhile, the least loaded holder is named and nobody goes."""
    replicas = [
        replica("r0", 1, ["cold@1"], load_tokens=9.0),
        replica("r1", 1, ["cold@1"], load_tokens=5.0),
    ]
    assert place_cold(COLD, [COLD], replicas) == ColdPlacement("r1", None)


@settings(deadline=None)
@given(fleets())
def test_the_victim_may_go_and_makes_room(fleet):
    """Whatever the fleet: the choice is open, its victim expendable, and capacity holds after it."""
    versions, replicas = fleet
    placed = place_cold(COLD, versions, replicas)
    if placed is None:
        return
    one = next(one for one in replicas if one.name == placed.replica)
    assert one.is_healthy
    assert one.base == COLD.base
    assert COLD.version not in one.unloadable | one.draining
    resident = one.resident | one.draining
    if placed.evict is None:
        assert len(resident) < one.max_registered
        return
    assert placed.evict in one.resident - one.draining
    assert len(resident - {placed.evict}) < one.max_registered
    known = {item.version: item for item in versions if item.base == one.base}
    if placed.evict in known and placed.evict not in one.unloadable:
        holders = [
            other
            for other in replicas
            if other.is_healthy
            and other.base == one.base
            and other.gpu_slots
            and placed.evict in other.resident - other.draining - other.unloadable
        ]
        assert len(holders) > known[placed.evict].min_copies
