"""The fleet as one worker sees it: snapshots, and how they follow the replicas."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from eventually import DEADLINE_S, eventually
from hypothesis import given
from hypothesis import strategies as st

from serving.config import ReplicaConfig
from serving.engines import dialect_of
from serving.fleet import registry as registry_module
from serving.fleet.learn import Served, ServedModel
from serving.fleet.registry import FleetRegistry, build_snapshot
from serving.routing.snapshot import Replica

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from scripted_engine import ScriptedEngine, StartEngine

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
    assert (fast.name, fast.engine_name, fast.healthy) == ("fast", "m", {CHAT: (REPLICAS[0],)})
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
        assert model.engine_name == aliases.get(name, name)
        for path in (CHAT, EMBED):
            holders = {
                index
                for index, answer in served.items()
                if model.engine_name in [one.name for one in answer.models]
                and path in answer.offered
            }
            assert (path in model.offered) == bool(holders)
            assert {r.index for r in model.healthy.get(path, ())} == holders & healthy
    assert snapshot.is_complete == (len(served) == 3)


@asynccontextmanager
async def _watching(
    *engines: ScriptedEngine,
) -> AsyncIterator[tuple[FleetRegistry, list[Snapshot]]]:
    published: list[Snapshot] = []
    configs = [ReplicaConfig.parse(f"vllm={engine.url}") for engine in engines]
    registry = FleetRegistry(configs, {}, None, published.append)
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(registry.run())
        await registry.first_round()
        try:
            yield registry, published
        finally:
            watching.cancel()


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes every 20 ms, and models asked for each time."""
    monkeypatch.setattr(registry_module, "PROBE_INTERVAL_S", 0.02)
    monkeypatch.setattr(registry_module, "LEARN_INTERVAL_S", 0.0)
    monkeypatch.setattr(registry_module, "PROBE_TIMEOUT_S", 0.2)


def _engine_of(registry: FleetRegistry, index: int = 0) -> Replica:
    return next(iter(registry.snapshot.models["m"].healthy[CHAT][index : index + 1]))


async def test_first_round(start_engine: StartEngine) -> None:
    """After it, what can be reached is known; what cannot, is not waited for."""
    up, down = await start_engine(), await start_engine()
    down.die()
    async with _watching(up, down) as (registry, _):
        assert registry.snapshot.is_ready
        assert not registry.snapshot.is_complete
        assert list(registry.snapshot.replica_health.values()) == [True, False]


@pytest.mark.usefixtures("quick_probes")
async def test_health_follows_the_engine(scripted: ScriptedEngine) -> None:
    """Down after two failed probes, up after one that succeeds; each change is a new version."""
    async with _watching(scripted) as (registry, published):
        for version in (2, 4, 6):
            scripted.is_healthy = False
            await eventually(lambda: not registry.snapshot.is_ready)
            assert registry.snapshot.version == version
            scripted.is_healthy = True
            await eventually(lambda: registry.snapshot.is_ready)
        assert [snapshot.version for snapshot in published] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.usefixtures("quick_probes")
async def test_one_late_probe_is_not_down(scripted: ScriptedEngine) -> None:
    """A single failure changes nothing."""
    async with _watching(scripted) as (registry, published):
        probes = len(scripted.probes)
        scripted.failing_probes = 1
        await eventually(lambda: len(scripted.probes) > probes + 9)
        assert scripted.failing_probes == 0
        assert len(published) == 1
        assert registry.snapshot.is_ready


async def test_report_down(scripted: ScriptedEngine) -> None:
    """A refused connection takes a replica out at once, and a probe that succeeds brings it back."""
    async with _watching(scripted) as (registry, published):
        registry.report_down(_engine_of(registry))
        assert not registry.snapshot.is_ready
        await eventually(lambda: registry.snapshot.is_ready)
        assert [snapshot.is_ready for snapshot in published] == [True, False, True]


async def test_many_reports_do_not_cause_many_probes(scripted: ScriptedEngine) -> None:
    """However many requests fail, probes are bounded."""
    async with _watching(scripted) as (registry, _):
        before = len(scripted.probes)
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(50):
                registry.probe_soon()
                await asyncio.sleep(0.01)
        assert 1 <= len(scripted.probes) - before <= 8


@pytest.mark.usefixtures("quick_probes")
async def test_models_are_learnt_again(scripted: ScriptedEngine) -> None:
    """An adapter that the engine loads later appears, and goes with it; no change, no snapshot."""
    async with _watching(scripted) as (registry, published):
        scripted.models.append({"id": "lora", "parent": "m"})
        await eventually(lambda: "lora" in registry.snapshot.models)
        assert registry.snapshot.models["lora"].parent == "m"
        scripted.models.pop()
        await eventually(lambda: "lora" not in registry.snapshot.models)
        probes = len(scripted.probes)
        await eventually(lambda: len(scripted.probes) > probes + 9)
        assert len(published) == 3


@pytest.mark.usefixtures("quick_probes")
async def test_healthy_engine_without_models_is_not_used(scripted: ScriptedEngine) -> None:
    """Health alone is not enough: it must say what it serves."""
    scripted.probe_script = [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n\xff\xfe"]
    async with _watching(scripted) as (registry, published):
        await eventually(lambda: len(scripted.probes) > 9)
        assert (registry.snapshot.version, published) == (0, [])
        scripted.probe_script = None
        await eventually(lambda: registry.snapshot.is_ready)
