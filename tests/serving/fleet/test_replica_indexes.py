"""The identity of replicas over reloads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import ReplicaConfig
from serving.errors import ConfigError
from serving.fleet import replica_indexes
from serving.fleet.replica_indexes import ReplicaIndexes

FLEET = [ReplicaConfig(kind="vllm", host="h", port=1 + number) for number in range(12)]


def _always(index: int) -> bool:
    return True


def test_a_replica_keeps_its_index() -> None:
    """While it stays, and when it comes back; a newcomer gets a fresh one."""
    indexes = ReplicaIndexes(FLEET[:3])
    assert indexes.assign([FLEET[2], FLEET[3], FLEET[0]], _always) == (2, 3, 0)
    assert indexes.assign([FLEET[1], FLEET[4]], _always) == (1, 4)


def test_another_engine_at_an_address_is_another_replica() -> None:
    """What is charged to the one is not charged to the other."""
    indexes = ReplicaIndexes(FLEET[:1])
    other = FLEET[0].model_copy(update={"kind": "sglang"})
    assert indexes.assign([other], _always) == (1,)


def test_reuse_when_all_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused idle index, never one in use or that left just now."""
    monkeypatch.setattr(replica_indexes, "MAX_REPLICAS", 4)
    indexes = ReplicaIndexes(FLEET[:4])
    indexes.assign(FLEET[1:4], _always)
    indexes.assign(FLEET[2:4], _always)
    with pytest.raises(ConfigError, match="4 addresses are in use or still busy"):
        indexes.assign([*FLEET[2:4], FLEET[5]], lambda index: False)
    assert indexes.assign([*FLEET[2:4], FLEET[5]], lambda index: index != 0) == (2, 3, 1)
    assert indexes.assign([*FLEET[2:4], FLEET[6]], _always) == (2, 3, 0)
    with pytest.raises(ConfigError):
        indexes.assign([FLEET[7], FLEET[8], FLEET[9], FLEET[10]], _always)
    assert indexes.assign(FLEET[2:4], _always) == (2, 3)


@given(
    st.lists(st.lists(st.sampled_from(FLEET), unique=True, min_size=1, max_size=5), max_size=20),
    st.sets(st.integers(0, 7)),
)
def test_any_history(history: list[list[ReplicaConfig]], busy: set[int]) -> None:
    """Indexes are in bounds and distinct; who stays keeps his; nobody gets a busy one of another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica_indexes, "MAX_REPLICAS", 8)
        indexes = ReplicaIndexes(FLEET[:2])
        owner = {0: FLEET[0], 1: FLEET[1]}
        current = dict(zip(FLEET[:2], (0, 1), strict=True))
        for fleet in history:
            try:
                assigned = indexes.assign(fleet, lambda index: index not in busy)
            except ConfigError:
                continue
            assert len(set(assigned)) == len(fleet)
            for replica, index in zip(fleet, assigned, strict=True):
                assert 0 <= index < 8
                assert current.get(replica, index) == index
                if owner.get(index, replica) != replica:
                    assert index not in busy
                    assert index not in current.values()
                owner[index] = replica
            current = dict(zip(fleet, assigned, strict=True))
