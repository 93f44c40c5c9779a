"""Hot swap over real HTTP servers: loads, proofs, drift, failures, unloads, flips."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from eventually import eventually
from reconcile_world import World, make_version
from sglang_options import SglangOptions
from sglang_server import SglangServer
from tensorrt_llm_options import TensorrtLlmOptions
from tensorrt_llm_server import TensorrtLlmServer
from vllm_server import VllmServer

from serving.control.ledger import PendingFlip, PlacementPhase

KINDS = ("vllm", "sglang", "tensorrt-llm")


def server_of(kind: str):
    """A dialect server without adapters."""
    if kind == "vllm":
        return VllmServer()
    if kind == "sglang":
        options = SglangOptions(checks_lora_paths=True, max_loaded_loras=4)
        return SglangServer(options=options, health_s=0.0)
    return TensorrtLlmServer(options=TensorrtLlmOptions())


@pytest.fixture
async def start(tmp_path):
    """Starts engines of these kinds, and a world around them."""
    async with AsyncExitStack() as stack:

        async def begin(*kinds: str, **limits):
            servers = [await stack.enter_async_context(server_of(kind)) for kind in kinds]
            world = World(tmp_path / "cache", list(zip(kinds, servers, strict=True)), **limits)
            await stack.enter_async_context(world.gateway)
            return world, servers

        yield begin


@pytest.fixture
def version(tmp_path):
    """Makes versions."""

    def make(name="support", lora_id=1, **fields):
        return make_version(tmp_path / "cache", name, lora_id, **fields)

    return make


def is_ready(world, one, num=1):
    """Whether a version is ready on so many replicas."""
    return lambda: world.ledger.phases(one.version) == ["ready"] * num


def paths(server):
    """The routes that were posted to, but for generation."""
    return [seen.target for seen in server.requests if "lora_adapter" in seen.target]


@pytest.mark.parametrize("kind", KINDS)
async def test_version_is_loaded_proven_and_ready(start, version, kind):
    """It is recorded as loading, loaded and ready, in this order, with its proof and its path."""
    world, (server,) = await start(kind)
    one = version()
    world.ledger.want(one)
    async with world.running():
        await eventually(is_ready(world, one))
        await eventually(lambda: world.resident(one.version) == 1)
    (name,) = world.names
    assert world.ledger.history(name, one.version) == ["loading", "loaded", "ready"]
    row = world.ledger.rows[name, one.version]
    assert row.path.endswith(one.version)
    assert row.load_s is not None
    assert row.reason is None
    assert len(world.ledger.goldens[one.version, kind]) > 12
    assert world.count("headrace_adapter_loads_total", replica=name, outcome="loaded") == 1
    if kind == "sglang":
        assert server.loras.paths() == {one.version: row.path}
    elif kind == "vllm":
        assert server.adapters == {one.version: row.path}
        assert all("load_inplace" not in seen.json for seen in server.requests)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_lost_adapter_leaves_ready_and_comes_back(start, version, kind):
    """An engine that has forgotten its adapters gets them back, proven anew before it is ready."""
    world, (server,) = await start(kind)
    one = version()
    world.ledger.want(one)
    (name,) = world.names
    async with world.running():
        await eventually(is_ready(world, one))
        world.ledger.log.clear()
        (server.loras if kind == "sglang" else server).restart()
        await eventually(lambda: "loading" in world.ledger.history(name, one.version))
        await eventually(is_ready(world, one))
    assert world.ledger.history(name, one.version) == ["loading", "loaded", "ready"]


@pytest.mark.parametrize("kind", KINDS)
async def test_dead_replica_is_not_ready_until_it_has_proven_it_again(start, version, kind):
    """A replica whose port refuses loses its readiness at once and regains it by a proof."""
    world, (server,) = await start(kind)
    one = version()
    world.ledger.want(one)
    async with world.running():
        await eventually(is_ready(world, one))
        server.die()
        await eventually(lambda: world.ledger.phases(one.version) == ["loading"])
        num_proofs = len([seen for seen in server.requests if seen.target == "/v1/completions"])
        if kind == "vllm":
            server.restart()
        elif kind == "sglang":
            server.loras.restart()
        await server.listen()
        await eventually(is_ready(world, one))
        proofs = [seen for seen in server.requests if seen.target == "/v1/completions"]
        assert len(proofs) >= num_proofs + 2


async def test_base_answering_is_not_ready(start, version):
    """Where the base model answers in the version's name it fails, with the reason."""
    world, (server,) = await start("vllm")
    server.set(wrong_contents="m")
    one = version()
    world.ledger.want(one)
    async with world.running():
        await eventually(lambda: world.ledger.phases(one.version) == ["failed"])
    (name,) = world.names
    assert "cannot be told from the base" in world.ledger.rows[name, one.version].reason
    assert "ready" not in world.ledger.history(name, one.version)
    assert world.files.verified == [one.version]
    assert server.adapters == {}
    assert world.count("headrace_adapter_probe_failures_total", replica=name) == 2


async def test_version_without_effect_needs_no_difference(start, version):
    """A version that was taken although it may answer as the base does is ready all the same."""
    world, (server,) = await start("vllm")
    server.set(wrong_contents="m")
    one = version(may_do_nothing=True)
    world.ledger.want(one)
    async with world.running():
        await eventually(is_ready(world, one))


async def test_wrong_weights_on_one_replica(start, version):
    """What differs from the version's record fails there after one reload, and stays ready elsewhere."""
    world, servers = await start("vllm", "vllm")
    servers[1].set(wrong_contents="somebody else's")
    one = version(min_copies=2)
    world.ledger.want(one)
    first, second = world.names
    world.ledger.goldens.clear()
    servers[1].refuse()
    async with world.running():
        await eventually(lambda: world.ledger.phases(one.version) == ["ready"])
        await servers[1].listen()
        await eventually(lambda: world.ledger.phases(one.version) == ["failed", "ready"])
    assert world.ledger.rows[first, one.version].phase == "ready"
    assert "Other weights answered" in world.ledger.rows[second, one.version].reason
    assert paths(servers[1]).count("/v1/load_lora_adapter") == 2


async def test_tensorrt_llm_is_proven_by_logprobs_where_it_gives_them(start, version):
    """With logprobs the record holds five tokens a prompt, without them one text."""
    world, (server,) = await start("tensorrt-llm")
    server.set(gives_logprobs=True)
    one, two = version("one", 1), version("two", 2)
    world.ledger.want(one)
    async with world.running() as reconciler:
        await eventually(is_ready(world, one))
        assert len(world.ledger.goldens[one.version, "tensorrt-llm"]) == 1 + 12 * 10
        server.set(gives_logprobs=False)
        world.ledger.want(one, two)
        reconciler.wake()
        await eventually(is_ready(world, two))
        assert len(world.ledger.goldens[two.version, "tensorrt-llm"]) == 1 + 12


async def test_tensorrt_llm_number_used_twice(start, version):
    """Its cache is keyed by the number alone: a second version under it never becomes ready."""
    world, _ = await start("tensorrt-llm")
    one, two = version("one", 7), version("two", 7)
    world.ledger.want(one)
    async with world.running() as reconciler:
        await eventually(is_ready(world, one))
        record = world.ledger.goldens[one.version, "tensorrt-llm"]
        world.ledger.goldens[two.version, "tensorrt-llm"] = (
            0.0,
            *[value + 1 for value in record[1:]],
        )
        world.ledger.want(one, two)
        reconciler.wake()
        await eventually(lambda: world.ledger.phases(two.version) == ["failed"])
    assert "Other weights" in world.ledger.rows[world.names[0], two.version].reason


async def test_failing_load_ends_and_can_be_retried(start, version):
    """It is tried three times, then failed with the engine's words; a retry gives it all again."""
    world, (server,) = await start("vllm")
    server.set(lora_load_error="cannot read /secret/place/adapter: rank 64 is greater than 16")
    one = version()
    world.ledger.want(one)
    key = (world.names[0], one.version)
    async with world.running() as reconciler:
        await eventually(lambda: world.ledger.phases(one.version) == ["failed"])
        row = world.ledger.rows[key]
        assert row.num_attempts == 3
        assert "rank 64 is greater than 16" in row.reason
        assert "/secret" not in row.reason
        assert world.ledger.history(*key).count("retrying") == 2
        assert paths(server) == ["/v1/load_lora_adapter"] * 3
        server.set(lora_load_error=None)
        world.ledger.rows[key] = replace(
            row, phase=PlacementPhase.RETRYING, num_attempts=0, retry_at_s=0.0
        )
        reconciler.wake()
        await eventually(is_ready(world, one))
    assert world.ledger.rows[key].num_attempts == 0


async def test_load_whose_answer_is_lost(start, version):
    """The engine has it although it said no: the list tells, and it is proven."""
    world, (server,) = await start("vllm")
    server.set(num_loads_lost=1)
    one = version()
    world.ledger.want(one)
    async with world.running():
        await eventually(is_ready(world, one))
    assert set(server.adapters) == {one.version}


async def test_data_parallel_sglang_says_why(start, version):
    """An engine with dp_size above 1 fails for good, with the reason."""
    world, (server,) = await start("sglang")
    server.options.dp_size = 2
    one = version()
    world.ledger.want(one)
    async with world.running():
        await eventually(lambda: world.ledger.phases(one.version) == ["failed"])
    assert "dp_size" in world.ledger.rows[world.names[0], one.version].reason
    assert paths(server) == ["/load_lora_adapter"]


async def test_hung_replica_delays_nobody(start, version):
    """While one replica's load hangs the other gets its versions."""
    world, servers = await start("vllm", "sglang")
    servers[0].set(lora_load_hangs=True)
    one = version(min_copies=2)
    world.ledger.want(one)
    async with world.running():
        await eventually(lambda: world.ledger.phases(one.version) == ["loading", "ready"])
        two = version("two", 2, min_copies=2)
        world.ledger.want(one, two)
        await eventually(lambda: "ready" in world.ledger.phases(two.version))


async def test_probe_waits_for_a_gateway(start, version):
    """Without a gateway it stays loaded, which is shown with the reason, and is tried on."""
    world, _ = await start("vllm")
    world.gateway.is_open = False
    one = version()
    world.ledger.want(one)
    key = (world.names[0], one.version)
    async with world.running():
        await eventually(
            lambda: key in world.ledger.rows and world.ledger.rows[key].reason is not None
        )
        row = world.ledger.rows[key]
        assert (row.phase, row.num_attempts) == ("loaded", 0)
        world.gateway.is_open = True
        await eventually(is_ready(world, one))


@asynccontextmanager
async def request_in_flight(server, model):
    """A request that goes on until the block ends."""
    server.set(token_interval_s=60.0)
    async with httpx.AsyncClient(timeout=30.0) as client, asyncio.TaskGroup() as group:
        body = {"model": model, "prompt": "hi", "max_tokens": 3}
        task = group.create_task(client.post(f"{server.url}/v1/completions", json=body))
        await eventually(lambda: server.counts.running == 1)
        yield
        task.cancel()


async def test_unload_is_recorded_followed_and_then_done(start, version):
    """Gateways follow the draining row before the engine is told; then the row goes."""
    world, (server,) = await start("vllm")
    one, two = version(), version("two", 2)
    world.ledger.want(one, two)
    (name,) = world.names
    async with world.running() as reconciler:
        await eventually(is_ready(world, one))
        await eventually(is_ready(world, two))
        world.ledger.log.clear()
        world.ledger.want(two)
        reconciler.wake()
        await eventually(lambda: not world.ledger.phases(one.version))
        log = world.ledger.log
        draining = log.index((name, one.version, "draining"))
        followed = log.index(("followed",))
        assert draining < followed < log.index((name, one.version, "forgotten"))
        assert set(server.adapters) == {two.version}
        # Whatever still runs may make the engine read the folder again.
        assert reconciler.in_use() == {one.version, two.version}
        await eventually(lambda: world.resident(one.version) is None)
    assert world.count("headrace_adapter_evictions_total", replica=name) == 1


async def test_sglang_unload_waits_for_requests(start, version):
    """While a request runs the version drains; it goes when the request has ended."""
    world, (server,) = await start("sglang")
    one = version()
    world.ledger.want(one)
    async with world.running() as reconciler:
        await eventually(is_ready(world, one))
        async with request_in_flight(server, f"m:{one.version}"):
            world.ledger.want()
            reconciler.wake()
            await eventually(lambda: "/unload_lora_adapter" in paths(server))
            assert world.ledger.phases(one.version) == ["draining"]
            server.set(disconnect_s=0.0)
        await eventually(lambda: not world.ledger.rows)


async def test_gateway_that_does_not_follow_holds_files_not_places(start, version):
    """After the bound the version is unloaded, and its files stay while the engine lives."""
    world, _ = await start("vllm")
    one = version()
    world.ledger.want(one)
    async with world.running() as reconciler:
        await eventually(is_ready(world, one))
        world.gateways.does = False
        world.ledger.want()
        reconciler.wake()
        await eventually(lambda: not world.ledger.rows)
        assert next(iter(reconciler.replicas.values())).released == {one.version: None}
        assert reconciler.in_use() == {one.version}


async def test_strays_go_and_foreigners_stay(start, version, tmp_path):
    """A version of ours that nobody wants is unloaded; others' adapters count as room taken."""
    world, (server,) = await start("vllm")
    stray = f"stray@{'0' * 12}"
    server.adapters.update({"theirs": str(tmp_path), stray: str(tmp_path)})
    one = version()
    world.ledger.want(one)
    async with world.running(max_registered=2):
        await eventually(is_ready(world, one))
    assert set(server.adapters) == {"theirs", one.version}


async def test_never_more_than_sglang_may_have(start, version):
    """While versions come and go the engine never has to push one out by itself."""
    world, (server,) = await start("sglang")
    server.loras.max_loaded = server.options.max_loaded_loras = 2
    versions = [version(f"v{n}", n + 1) for n in range(6)]
    async with world.running() as reconciler:
        for pair in (versions[:2], versions[2:4], versions[4:]):
            world.ledger.want(*pair)
            reconciler.wake()
            for one in pair:
                await eventually(is_ready(world, one))
    assert server.loras.num_evicted == 0
    assert set(server.loras.loaded) == {one.version for one in versions[4:]}


async def test_restarted_control_plane_changes_nothing(start, version):
    """What was ready and is listed stays ready, also what an alias has just left, for a rollback."""
    world, (server,) = await start("vllm")
    one, left = version(), version("left", 2)
    world.ledger.want(one, left)
    async with world.running():
        await eventually(is_ready(world, one))
        await eventually(is_ready(world, left))
    world.ledger.want(one, replace(left, min_copies=0, is_aliased=False))
    server.requests.clear()
    server.probes.clear()
    world.ledger.log.clear()
    async with world.running():
        await eventually(lambda: len(server.probes) > 5)
    assert server.requests == []
    assert world.ledger.log == []


async def test_flip_waits_for_proofs_and_old_version_goes_after(start, version):
    """The alias flips once the target is ready on two replicas; the old one is ready until then."""
    world, servers = await start("vllm", "sglang", keep_warm_s=0.0)
    old, new = version("old", 1, min_copies=2), version("new", 2, min_copies=2, aliased=False)
    world.ledger.want(old)
    async with world.running() as reconciler:
        await eventually(is_ready(world, old, 2))
        servers[1].set(lora_load_error="not yet")
        world.ledger.flips["alias"] = PendingFlip("alias", new.version, 2)
        world.ledger.want(old, new)
        reconciler.wake()
        await eventually(lambda: "ready" in world.ledger.phases(new.version))
        assert "alias" in world.ledger.flips
        servers[1].set(lora_load_error=None)
        await eventually(lambda: not world.ledger.flips)
        assert world.ledger.phases(old.version) == ["ready", "ready"]
        world.ledger.want(
            replace(old, min_copies=0, is_aliased=False), replace(new, is_aliased=True)
        )
        reconciler.wake()
        await eventually(lambda: not world.ledger.phases(old.version))
    assert world.ledger.failed_flips == {}
    assert world.ledger.phases(new.version) == ["ready", "ready"]


async def test_flip_to_what_fails_everywhere_is_given_up(start, version):
    """With the target failed for good the flip ends, and says where and why."""
    world, servers = await start("vllm")
    servers[0].set(lora_load_error="no such module")
    new = version("new", 2)
    world.ledger.want(new)
    world.ledger.flips["alias"] = PendingFlip("alias", new.version, 1)
    async with world.running():
        await eventually(lambda: bool(world.ledger.failed_flips))
    assert "no such module" in world.ledger.failed_flips["alias"]
    assert world.names[0] in world.ledger.failed_flips["alias"]


async def test_failed_version_is_placed_elsewhere(start, version):
    """A replica that cannot have it is not asked again; another one gets it."""
    world, servers = await start("vllm", "vllm")
    one = version()
    for server in servers:
        server.set(lora_load_error="full")
    world.ledger.want(one)
    async with world.running():
        await eventually(lambda: "failed" in world.ledger.phases(one.version))
        for server in servers:
            server.set(lora_load_error=None)
        await eventually(lambda: "ready" in world.ledger.phases(one.version))
    assert world.ledger.phases(one.version) == ["failed", "ready"]


async def test_cold_version_is_loaded_when_asked_for(start, version):
    """A version that nobody needs is loaded on one replica when a request waits for it."""
    world, _ = await start("vllm", "sglang", placement_s=60.0)
    one = version(min_copies=0)
    world.ledger.want(one)
    async with world.running() as reconciler:
        await eventually(lambda: all(r.base for r in reconciler.replicas.values()))
        assert world.ledger.rows == {}
        reconciler.asked.ask(one.version)
        await eventually(lambda: world.ledger.phases(one.version) == ["ready"])
        assert reconciler.asked.rate(one.version).requests_per_s > 0


async def test_refused_by_the_linter(start, version):
    """A kind that the linter refuses is not asked."""
    world, servers = await start("vllm", "sglang")
    one = replace(version(), unloadable={"vllm": "DoRA is not supported."})
    world.ledger.want(one)
    async with world.running():
        await eventually(is_ready(world, one))
    assert paths(servers[0]) == []
