"""From what is known of each replica to what routing reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from serving.engines import dialect_of
from serving.fleet.learn import Served, ServedModel
from serving.fleet.snapshot_builder import build_snapshot
from serving.routing.snapshot import Replica

if TYPE_CHECKING:
    from serving.routing.snapshot import Snapshot

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
REPLICAS = [Replica(index, f"r{index}", "h", 1, dialect_of("vllm")) for index in range(3)]
BASE = ServedModel("m", None, 2048)


def _snapshot(
    served: dict[int, Served], healthy: set[int], aliases: dict[str, str] | None = None
) -> Snapshot:
    return build_snapshot(
        version=1,
        served={REPLICAS[index]: answer for index, answer in served.items()},
        healthy=frozenset(healthy),
        aliases=aliases or {},
        replica_health={replica.name: replica.index in healthy for replica in REPLICAS},
    )


def test_replicas_of_a_model() -> None:
    """Per endpoint: the healthy replicas that serve the model and offer it."""
    snapshot = _snapshot(
        {
            0: Served((BASE,), frozenset({CHAT})),
            1: Served((BASE,), frozenset({CHAT, EMBED})),
            2: Served((ServedModel("other", None, 99),), frozenset({CHAT})),
        },
        {0, 1, 2},
    )
    assert snapshot.models["m"].healthy == {CHAT: (REPLICAS[0], REPLICAS[1]), EMBED: (REPLICAS[1],)}
    assert snapshot.models["other"].healthy == {CHAT: (REPLICAS[2],)}
    assert snapshot.models["m"].max_model_len == 2048
    assert snapshot.default_model is None
    assert (snapshot.is_complete, snapshot.is_ready) == (True, True)


def test_a_dead_replica_keeps_its_models() -> None:
    """Its model is unavailable, not unknown, and what it offers is still offered."""
    snapshot = _snapshot({0: Served((BASE,), frozenset({CHAT}))}, set())
    model = snapshot.models["m"]
    assert (model.healthy, model.offered) == ({CHAT: ()}, frozenset({CHAT}))
    assert snapshot.is_ready is False
    assert snapshot.is_complete is False


def test_aliases() -> None:
    """An alias answers with its target's replicas; one whose target nobody serves is not there."""
    snapshot = _snapshot({0: Served((BASE,), frozenset({CHAT}))}, {0}, {"fast": "m", "gone": "x"})
    assert set(snapshot.models) == {"m", "fast"}
    fast = snapshot.models["fast"]
    assert (fast.name, fast.version, fast.engine_names) == ("fast", "m", {0: "m"})
    assert fast.healthy == {CHAT: (REPLICAS[0],)}
    assert snapshot.default_model is snapshot.models["m"]


def test_adapters_are_no_default() -> None:
    """The default model is the only base model; adapters and aliases do not count."""
    adapter = ServedModel("lora", "m", None)
    snapshot = _snapshot({0: Served((BASE, adapter), frozenset({CHAT}))}, {0}, {"fast": "lora"})
    assert snapshot.default_model is snapshot.models["m"]
    assert snapshot.models["fast"].parent == "m"


@given(
    served=st.dictionaries(
        st.integers(0, 2),
        st.builds(
            Served,
            st.lists(st.sampled_from([BASE, ServedModel("a", "m", None), ServedModel("b", None, 1)]), unique=True).map(tuple),
            st.frozensets(st.sampled_from([CHAT, EMBED])),
        ),
    ),
    healthy=st.sets(st.integers(0, 2)),
    aliases=st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["m", "a", "b", "none"])),
)  # fmt: skip
def test_any_fleet(served: dict[int, Served], healthy: set[int], aliases: dict[str, str]) -> None:
    """Every candidate is healthy, serves the model and offers the endpoint; none is missing."""
    snapshot = _snapshot(served, healthy, aliases)
    names = {model.name for answer in served.values() for model in answer.models}
    assert set(snapshot.models) == names | {a for a, target in aliases.items() if target in names}
    for name, model in snapshot.models.items():
        assert model.version == aliases.get(name, name)
        assert set(model.engine_names.values()) == {model.version}
        for path in (CHAT, EMBED):
            holders = {
                index
                for index, answer in served.items()
                if model.version in [one.name for one in answer.models] and path in answer.offered
            }
            assert (path in model.offered) == bool(holders)
            assert {r.index for r in model.healthy.get(path, ())} == holders & healthy
    assert snapshot.is_complete == (len(served) == 3)


def test_each_engine_has_its_own_name_for_an_adapter() -> None:
    """In a mixed fleet a request is named as the replica that gets it wants it."""
    mixed = [
        Replica(index, kind, "h", 1, dialect_of(kind))
        for index, kind in enumerate(("vllm", "sglang"))
    ]
    adapter = ServedModel("support", "m", None)
    snapshot = build_snapshot(
        version=1,
        served=dict.fromkeys(mixed, Served((BASE, adapter), frozenset({CHAT}))),
        healthy=frozenset({0, 1}),
        aliases={"help": "support"},
        replica_health={},
    )
    assert snapshot.models["support"].engine_names == {0: "support", 1: "m:support"}
    assert snapshot.models["help"].engine_names == {0: "support", 1: "m:support"}
    assert snapshot.models["m"].engine_names == {0: "m", 1: "m"}
    assert snapshot.models["help"].version == "support"
