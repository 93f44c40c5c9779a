"""Adapters on SGLang and TensorRT-LLM under load: flips, restarts and a dead control plane.

The engines are the dialect servers of `tests/engines`; control plane and gateway are the real
processes.
"""

import asyncio
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from dialect_load import DialectLoad
from dialect_platform import (
    DEADLINE_S,
    MODEL,
    STEADY,
    SWING,
    DialectPlatform,
    is_proof,
    named_version,
)
from eventually import eventually

NUM_CLIENTS = 8
NUM_FLIPS = 20
ALIASES = (SWING, STEADY)
KINDS = ("sglang", "tensorrt-llm")


@pytest.fixture(scope="module", params=KINDS)
def platform(request, session_daemons, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with DialectPlatform(request.param, session_daemons, folder).running() as started:
        yield started


@pytest.fixture
async def load(platform):
    """Requests to the platform's aliases."""
    async with DialectLoad(platform.server.url, ALIASES) as made:
        yield made


@pytest.fixture
async def admin(platform):
    """A client of the admin API, through the gateway."""
    async with platform.client() as client:
        yield client


async def put_alias(admin, alias, target):
    """Flips an alias; returns when it is flipped."""
    answer = await admin.put(
        f"/admin/v1/aliases/{alias}", json={"target": target}, params={"wait_s": 60}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["target"] == target


def check(answers, platform):
    """No request failed, and each answer is by the weights of the version that it names."""
    assert [answer for answer in answers if answer.error is not None] == []
    weights = platform.weights()
    assert [a for a in answers if a.said_version(weights) != a.model] == []
    assert {a.model for a in answers if a.alias == STEADY} <= {platform.steady}
    assert {a.model for a in answers if a.alias == SWING} <= set(platform.versions)


async def test_twenty_flips_under_load(platform, load, admin):
    """An alias flipped twenty times: no failure, no wrong version, and none late."""
    first, second = platform.versions
    flips = [(0.0, 0.0, first)]
    await put_alias(admin, SWING, first)
    async with load.running(NUM_CLIENTS):
        for turn in range(NUM_FLIPS):
            version = first if turn % 2 else second
            asked_at = time.monotonic()
            await put_alias(admin, SWING, version)
            flips.append((asked_at, time.monotonic(), version))
            for kind in ("chat", "stream", "completion"):
                assert (await load.ask(SWING, kind)).model == version
            await load.until_more(NUM_CLIENTS)
    check(load.answers, platform)
    swung = [answer for answer in load.answers if answer.alias == SWING]
    assert [a for a in swung if a.model not in a.possible_targets(flips)] == []
    assert len({(a.kind, a.model) for a in swung}) == 6


@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "at once"])
async def test_a_restarted_replica_gets_its_adapters_back(platform, load, is_noticed):
    """A replica starts anew without adapters: it is proven before clients get to it, none is wrong."""
    engine, versions = platform.engines[0], served(platform)
    await eventually(lambda: has_adapters(platform, engine, versions), DEADLINE_S)
    async with load.running(NUM_CLIENTS):
        platform.crash(engine)
        crashed_at = time.monotonic()
        if is_noticed:
            await eventually(
                lambda: not any(platform.is_ready_on(engine, one) for one in versions), DEADLINE_S
            )
        num_before = len(engine.requests)
        platform.revive(engine)
        await eventually(
            lambda: (
                versions <= asked_by_clients(engine.requests[num_before:])
                and has_adapters(platform, engine, versions)
            ),
            DEADLINE_S,
        )
        await load.until_more(4 * NUM_CLIENTS)
    # What the replica was at when it went may be lost; nothing that came later.
    lost = [a for a in load.answers if a.error is not None and a.begun_at < crashed_at]
    assert len(lost) <= NUM_CLIENTS
    check([a for a in load.answers if a not in lost], platform)
    if is_noticed:
        for version in versions:
            named = [s for s in engine.requests[num_before:] if named_version(s) == version]
            assert is_proof(named[0])


def has_adapters(platform, engine, versions):
    """Whether a replica has them and clients are routed to it."""
    is_loaded = platform.kind != "sglang" or versions <= engine.loras.loaded.keys()
    return is_loaded and all(platform.is_ready_on(engine, version) for version in versions)


def asked_by_clients(requests):
    """Versions that clients' requests to an engine named."""
    return {named_version(seen) for seen in requests if not is_proof(seen)}


def served(platform):
    """Versions that the aliases stand for."""
    return {platform.published()["aliases"][alias]["target"] for alias in ALIASES}


async def test_serves_on_while_the_control_plane_is_dead(platform, load, admin):
    """The control plane is killed under load: aliases answer on; it comes back and takes a flip."""
    first, second = platform.versions
    await put_alias(admin, SWING, first)
    async with load.running(NUM_CLIENTS):
        platform.control.kill_group()
        refused = await admin.put(f"/admin/v1/aliases/{SWING}", json={"target": second})
        assert refused.status_code == 503
        await load.until_more(4 * NUM_CLIENTS)
        assert {a.model for a in load.answers} == {first, platform.steady}
        platform.control.start()
        await asyncio.to_thread(platform.wait_control)
        await put_alias(admin, SWING, second)
        assert (await load.ask(SWING)).model == second
    check(load.answers, platform)


async def test_a_gateway_starts_from_its_snapshot(platform, load, admin):
    """Without a control plane a gateway starts from its disk, and follows when there is one."""
    second = platform.versions[1]
    await put_alias(admin, SWING, second)
    await eventually(lambda: platform.published()["aliases"][SWING]["target"] == second)
    platform.control.kill_group()
    assert platform.gateway.end() == 0
    platform.gateway.start()
    await asyncio.to_thread(platform.wait_gateway)
    for alias, version in ((SWING, second), (STEADY, platform.steady)):
        for kind in ("chat", "stream", "completion"):
            assert (await load.ask(alias, kind)).model == version
    cards = {card["id"]: card for card in (await admin.get("/v1/models")).json()["data"]}
    assert set(cards) == {MODEL, *ALIASES}
    assert cards[SWING]["root"] == second
    platform.control.start()
    await asyncio.to_thread(platform.wait_control)
    await until_followed(admin)
    check(load.answers, platform)


async def until_followed(admin):
    """Returns once the control plane hears from the gateway."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            answer = await admin.get("/admin/v1/replicas")
            if answer.status_code == 200 and answer.json()["gateways"]:
                return
            await asyncio.sleep(0.02)


def gone_from(platform, version):
    """Whether neither gateway nor engines know a version any more, by their own lists."""
    if version in platform.published()["versions"]:
        return False
    if platform.kind != "sglang":
        return True  # It has no list.
    return not any(version in engine.loras.loaded for engine in platform.engines)


async def test_an_unloaded_version_is_not_routed(platform, load, admin):
    """A deleted version is asked of no engine again, though SGLang would load it without a word."""
    gone = platform.push(4, "gone", "gone")
    for name in ("gone", gone):
        assert (await load.ask(name)).model == gone
    assert [a.said_version(platform.weights()) for a in load.answers] == [gone, gone]
    for path in ("aliases/gone", "adapters/gone"):
        assert (await admin.delete(f"/admin/v1/{path}")).is_success
    await eventually(lambda: gone_from(platform, gone), DEADLINE_S)
    num_before = [len(engine.requests) for engine in platform.engines]
    for name in (gone, "gone", f"{MODEL}:{gone}"):
        for _ in range(4):
            answer = await admin.post("/v1/chat/completions", json=question(name))
            assert answer.status_code == 404, answer.text
    for engine, num in zip(platform.engines, num_before, strict=True):
        assert gone not in {named_version(seen) for seen in engine.requests[num:]}


def question(model):
    """A request to a model."""
    return {"model": model, "messages": [{"role": "user", "content": "Are you there?"}]}


async def test_what_the_engine_loads_again_is_unloaded(platform, admin):
    """A version that somebody else makes SGLang load again goes again, and is never routed."""
    if platform.kind != "sglang":
        pytest.skip("only SGLang loads again what was unloaded")
    stray = platform.push(5, "stray")
    # It has no alias: the request itself waits for its load.
    assert (await admin.post("/v1/chat/completions", json=question(stray))).status_code == 200
    holder = next(one for one in platform.engines if stray in one.loras.loaded)
    assert (await admin.delete("/admin/v1/adapters/stray")).is_success
    await eventually(lambda: gone_from(platform, stray), DEADLINE_S)
    asked = question(f"{MODEL}:{stray}")
    direct = await admin.post(f"{holder.url}/v1/chat/completions", json=asked)
    assert direct.json()["choices"][0]["message"]["content"].startswith(f"{stray} from ")
    assert stray in holder.loras.loaded
    for name in (stray, f"{MODEL}:{stray}"):
        answer = await admin.post("/v1/chat/completions", json=question(name))
        assert answer.status_code == 404
    await eventually(lambda: gone_from(platform, stray), DEADLINE_S)


async def test_versions_have_numbers_of_their_own(platform, load, admin):
    """TensorRT-LLM's cache goes by number: each version has one, and one folder, on all replicas."""
    if platform.kind != "tensorrt-llm":
        pytest.skip("only TensorRT-LLM is told numbers")
    for version in platform.versions:
        await put_alias(admin, SWING, version)
        await load.ask(SWING)
    check(load.answers, platform)
    # Without an alias: its first request waits for the load, and has to know the folder by then.
    cold = platform.push(6, "cold")
    assert (await load.ask(cold)).model == cold
    numbers = {}
    for engine in platform.engines:
        for asked in (s.json["lora_request"] for s in engine.requests if named_version(s)):
            known = numbers.setdefault(asked["lora_int_id"], set())
            known.add((asked["lora_name"], asked["lora_path"]))
    assert {number: known for number, known in numbers.items() if len(known) > 1} == {}
    names = [name for ((name, _),) in numbers.values()]
    assert len(names) == len(set(names))
    assert {*platform.versions, platform.steady, cold} <= set(names)
    assert all(Path(path).is_absolute() for ((_, path),) in numbers.values())
