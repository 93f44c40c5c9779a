"""The fleet as one worker sees it: how snapshots follow the replicas."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING

import pytest
from eventually import DEADLINE_S, eventually
from scripted_engine import Act, error_body, json_reply

from serving.config import ReplicaConfig, Resilience
from serving.fleet import registry as registry_module
from serving.fleet.registry import FleetRegistry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from scripted_engine import ScriptedEngine, StartEngine

    from serving.routing.snapshot import Replica, Snapshot

CHAT = "/v1/chat/completions"
CANARY = {"model": "m", "prompt": "1", "max_tokens": 1}
NO_CANARY = Resilience(canary=False)
QUICK_CANARY = Resilience(canary_interval_s=0.05, canary_timeout_s=0.1)
DRAINING = json_reply(
    error_body("cannot schedule new futures after shutdown", "InternalServerError", 500), status=500
)


@asynccontextmanager
async def _watching(
    *engines: ScriptedEngine,
    resilience: Resilience = NO_CANARY,
    last_heard_at: Callable[[Replica], float] = lambda replica: float("-inf"),
) -> AsyncIterator[tuple[FleetRegistry, list[Snapshot]]]:
    published: list[Snapshot] = []
    configs = [ReplicaConfig.parse(f"vllm={engine.url}") for engine in engines]
    registry = FleetRegistry(configs, {}, None, published.append, resilience, last_heard_at)
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
    monkeypatch.setattr(registry_module, "PROBE_TIMEOUT_S", 1.0)


def _routable(registry: FleetRegistry) -> list[int]:
    return [replica.index for replica in registry.snapshot.models["m"].healthy[CHAT]]


def _engine_of(registry: FleetRegistry, index: int = 0) -> Replica:
    return registry.snapshot.models["m"].healthy[CHAT][index]


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
        replica = _engine_of(registry)
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(50):
                registry.report_failure(replica)
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


@pytest.mark.usefixtures("quick_probes")
async def test_replace(start_engine: StartEngine) -> None:
    """Who stays keeps what is known of him, who goes is asked no more, who comes is asked first."""
    staying, going, coming = [await start_engine() for _ in range(3)]
    async with _watching(staying, going) as (registry, _):
        before = registry.snapshot.models["m"].healthy[CHAT]
        configs = [ReplicaConfig.parse(f"vllm={one.url}") for one in (coming, staying)]
        gone = registry.replace(configs, [2, 0], {"fast": "m"})
        assert gone == [before[1]]
        models = registry.snapshot.models
        assert models["m"].healthy[CHAT] == models["fast"].healthy[CHAT] == (before[0],)
        assert registry.snapshot.is_complete is False
        await eventually(lambda: registry.snapshot.is_complete)
        assert {one.index for one in registry.snapshot.models["m"].healthy[CHAT]} == {0, 2}
        probes = len(going.probes), len(staying.probes)
        await eventually(lambda: len(staying.probes) > probes[1] + 9)
        assert len(going.probes) == probes[0]
        registry.report_down(gone[0])
        registry.report_failure(gone[0])
        assert registry.snapshot.replica_health == {configs[0].name: True, configs[1].name: True}


# The canary: a token that has to be generated.


async def test_canary_before_the_first_request(scripted: ScriptedEngine) -> None:
    """A replica that comes up generates one token first, and none again while it is new."""
    async with _watching(scripted, resilience=Resilience()) as (registry, _):
        assert registry.snapshot.is_ready
        assert [seen.json for seen in scripted.requests] == [CANARY]
        assert scripted.requests[0].target == "/v1/completions"


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize("script", [DRAINING, [Act.HANG], [Act.RESET]])
async def test_engine_that_does_not_generate_never_comes_up(
    scripted: ScriptedEngine, script: list[bytes | float | asyncio.Event | Act]
) -> None:
    """Health says 200, but no token comes: it gets no request, until one does."""
    scripted.always = script
    async with _watching(scripted, resilience=QUICK_CANARY) as (registry, published):
        await eventually(lambda: len(scripted.requests) > 3)
        assert published == []
        scripted.always = None
        await eventually(lambda: registry.snapshot.is_ready)


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize(
    "script", [DRAINING, [Act.HANG]], ids=["draining: 500", "paused: requests hang"]
)
async def test_vllm_that_stops_generating_goes_down_and_comes_back(
    scripted: ScriptedEngine, script: list[bytes | float | asyncio.Event | Act]
) -> None:
    """Its health route stays 200 all the while."""
    async with _watching(scripted, resilience=QUICK_CANARY) as (registry, _):
        scripted.always = script
        await eventually(lambda: not registry.snapshot.is_ready)
        assert scripted.is_healthy
        scripted.always = None
        await eventually(lambda: registry.snapshot.is_ready)


@pytest.mark.usefixtures("quick_probes")
async def test_canary_after_a_failure(scripted: ScriptedEngine) -> None:
    """One failed request has the replica prove itself at once, however lately it was well."""
    async with _watching(scripted, resilience=Resilience()) as (registry, published):
        registry.report_failure(_engine_of(registry))
        await eventually(lambda: len(scripted.requests) == 2)
        scripted.always = DRAINING
        registry.report_failure(_engine_of(registry))
        await eventually(lambda: not registry.snapshot.is_ready)
        scripted.always = None
        await eventually(lambda: registry.snapshot.is_ready)
        assert [snapshot.is_ready for snapshot in published] == [True, False, True]


@pytest.mark.usefixtures("quick_probes")
async def test_no_canary_while_requests_succeed(scripted: ScriptedEngine) -> None:
    """Answered requests are proof enough."""
    resilience = Resilience(canary_interval_s=0.5, canary_timeout_s=0.1)
    async with _watching(scripted, resilience=resilience) as (registry, _):
        replica = _engine_of(registry)
        for _ in range(100):
            registry.report_success(replica)
            await asyncio.sleep(0.01)
        assert len(scripted.requests) == 1
        await eventually(lambda: len(scripted.requests) > 1)


@pytest.mark.usefixtures("quick_probes")
async def test_busy_engine_may_be_late_with_its_canary(scripted: ScriptedEngine) -> None:
    """Late and well while something else comes of it; one that refuses is not, full or not."""
    async with _watching(
        scripted, resilience=QUICK_CANARY, last_heard_at=lambda replica: monotonic()
    ) as (
        registry,
        published,
    ):
        scripted.always = [Act.HANG]
        registry.report_failure(_engine_of(registry))
        await eventually(lambda: len(scripted.requests) > 4)
        assert len(published) == 1
        scripted.always = DRAINING
        await eventually(lambda: not registry.snapshot.is_ready)


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize("status", [400, 404, 503])
async def test_refused_canary_is_an_answer(scripted: ScriptedEngine, status: int) -> None:
    """An engine that does not like the canary, or has a full queue, works."""
    scripted.always = json_reply(error_body("no", "X", status), status=status)
    async with _watching(scripted, resilience=QUICK_CANARY) as (registry, published):
        await eventually(lambda: len(scripted.requests) > 4)
        assert [snapshot.is_ready for snapshot in published] == [True]
        assert registry.snapshot.is_ready


@pytest.mark.usefixtures("quick_probes")
async def test_engine_without_completions_has_no_canary(scripted: ScriptedEngine) -> None:
    """Nothing is made up where the engine offers nothing cheap: health has to do."""
    scripted.paths = (CHAT,)
    async with _watching(scripted, resilience=QUICK_CANARY) as (registry, _):
        probes = len(scripted.probes)
        await eventually(lambda: len(scripted.probes) > probes + 9)
        assert registry.snapshot.is_ready
        assert scripted.requests == []


# Breakers and the floor.


async def test_breaker_opens_and_lets_one_through(start_engine: StartEngine) -> None:
    """Five failures take a replica out; after its time it gets one request, and that decides."""
    resilience = Resilience(canary=False, breaker_open_s=0.01)
    engines = [await start_engine(), await start_engine()]
    async with _watching(*engines, resilience=resilience) as (registry, published):
        replica = _engine_of(registry)
        for _ in range(4):
            registry.report_failure(replica)
        assert _routable(registry) == [0, 1]
        registry.report_failure(replica)
        assert _routable(registry) == [1]
        assert registry.snapshot.replica_health[replica.name] is True
        await eventually(lambda: registry.trials == 1)
        assert _routable(registry) == [0, 1]
        registry.report_chosen(replica)
        assert (registry.trials, _routable(registry)) == (0, [1])
        registry.report_success(replica)
        assert _routable(registry) == [0, 1]
        assert [snapshot.version for snapshot in published] == list(range(1, len(published) + 1))


async def test_failed_trial_opens_again(start_engine: StartEngine) -> None:
    """For twice as long."""
    resilience = Resilience(canary=False, breaker_open_s=0.01)
    engines = [await start_engine(), await start_engine()]
    async with _watching(*engines, resilience=resilience) as (registry, _):
        replica = _engine_of(registry)
        for _ in range(5):
            registry.report_failure(replica)
        await eventually(lambda: registry.trials == 1)
        registry.report_chosen(replica)
        registry.report_failure(replica)
        assert (registry.trials, _routable(registry)) == (0, [1])
        await eventually(lambda: registry.trials == 1)


async def test_trial_without_a_verdict_is_made_again(start_engine: StartEngine) -> None:
    """A client that leaves in the middle of the trial does not shut the replica out for good."""
    resilience = Resilience(canary=False, breaker_open_s=0.01)
    engines = [await start_engine(), await start_engine()]
    async with _watching(*engines, resilience=resilience) as (registry, _):
        replica = _engine_of(registry)
        for _ in range(5):
            registry.report_failure(replica)
        for _ in range(2):
            await eventually(lambda: registry.trials == 1)
            registry.report_chosen(replica)
            assert _routable(registry) == [1]


@pytest.mark.parametrize(("size", "num_left"), [(1, 1), (2, 1), (3, 2), (5, 3)])
async def test_breakers_leave_half_of_the_fleet(
    start_engine: StartEngine, size: int, num_left: int
) -> None:
    """Where everybody fails it is not the replicas: the floor stays routable."""
    engines = [await start_engine() for _ in range(size)]
    async with _watching(*engines) as (registry, _):
        for replica in registry.snapshot.models["m"].healthy[CHAT]:
            for _ in range(5):
                registry.report_failure(replica)
        assert len(_routable(registry)) == num_left


async def test_reports_of_a_replica_that_has_left(start_engine: StartEngine) -> None:
    """Its last requests may still report: nothing comes of it."""
    engines = [await start_engine(), await start_engine()]
    async with _watching(*engines) as (registry, _):
        gone = _engine_of(registry)
        stays = ReplicaConfig.parse(f"vllm={engines[1].url}")
        assert registry.replace([stays], [1], {}) == [gone]
        assert _routable(registry) == [1]
        for report in (registry.report_down, registry.report_success, registry.report_chosen):
            report(gone)
        for _ in range(5):
            registry.report_failure(gone)
        assert _routable(registry) == [1]


# Slow start.


@pytest.mark.usefixtures("quick_probes")
async def test_new_replica_of_a_running_fleet_warms_up(start_engine: StartEngine) -> None:
    """It begins at a tenth of its share; a fleet that starts as a whole does not."""
    resilience = Resilience(canary=False, slow_start_s=0.2)
    engines = [await start_engine(), await start_engine()]
    async with _watching(*engines, resilience=resilience) as (registry, _):
        assert registry.warming == {}
        replica = _engine_of(registry)
        engines[0].is_healthy = False
        await eventually(lambda: _routable(registry) == [1])
        grown_up_at = monotonic() + resilience.slow_start_s
        await eventually(lambda: monotonic() > grown_up_at)
        engines[0].is_healthy = True
        await eventually(lambda: _routable(registry) == [0, 1])
        up_since = registry.warming[0]
        assert registry.share(replica, up_since) == pytest.approx(0.1)
        assert registry.share(replica, up_since + 0.1) == pytest.approx(0.5)
        assert registry.share(replica, up_since + 0.2) == 1.0
        assert registry.warming == {}
