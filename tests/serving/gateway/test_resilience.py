"""The gateway bends and does not break: hidden failures, breakers, budgets, canaries, warm-up."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from base_server import DONE
from eventually import eventually
from scripted_engine import (
    STREAM_HEAD,
    Act,
    chat_events,
    chunk,
    error_body,
    event,
    json_reply,
    stream_reply,
)

from serving.config import Resilience
from serving.fleet import registry as registry_module

if TYPE_CHECKING:
    from collections.abc import Sequence

    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine, StartEngine, Step

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
ROLE, TEXT = chat_events("x", "m", 1, usage=None)[:2]
ABORT = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]})
FULL = event({"error": {"message": "full", "type": "SERVICE_UNAVAILABLE", "code": 503}})
BROKEN = json_reply(error_body("boom", "InternalServerError", 500), status=500)
ABORTED = json_reply(
    b'{"choices":[{"index":0,"message":{"content":""},"finish_reason":"abort"}],"usage":null}'
)
QUICK = Resilience(canary_interval_s=0.05, canary_timeout_s=0.1)


async def _fleet(
    start_engine: StartEngine,
    start_gateway: StartGateway,
    size: int,
    resilience: Resilience | None = None,
) -> tuple[Gateway, list[ScriptedEngine]]:
    engines = [await start_engine() for _ in range(size)]
    settings = resilience or Resilience(canary=False)
    return await start_gateway(*engines, resilience=settings), engines


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes every 20 ms."""
    monkeypatch.setattr(registry_module, "PROBE_INTERVAL_S", 0.02)


# What an engine hides under a 200.


@pytest.mark.parametrize(
    "script",
    [
        stream_reply([FULL, DONE]),
        stream_reply([ROLE, FULL, DONE]),
        stream_reply([ABORT, DONE]),
        stream_reply([ROLE, ABORT, DONE]),
        ABORTED,
    ],
    ids=["full", "role, then full", "abort", "role, then abort", "abort of a whole answer"],
)
async def test_failure_under_a_200_is_tried_elsewhere(
    start_engine: StartEngine, start_gateway: StartGateway, script: Sequence[Step]
) -> None:
    """The client sees the answer of the other replica, from its first byte."""
    gateway, engines = await _fleet(start_engine, start_gateway, 2)
    for engine in engines:
        engine.scripts.append(script)
    engines[1].scripts.clear()
    for _ in range(2):
        answer = await gateway.post(STREAM)
        assert answer.status == 200
        assert answer.body.startswith(b'data: {"id":"chatcmpl-')
        assert answer.body.endswith(DONE)
        assert b"abort" not in answer.body
    assert gateway.metric("headrace_retries_total") == 1


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (stream_reply([FULL, DONE]), 503, "overloaded"),
        (stream_reply([event({"error": {"message": "x", "code": 400}}), DONE]), 400, None),
        (stream_reply([ABORT, DONE]), 502, "upstream_error"),
        (ABORTED, 502, "upstream_error"),
    ],
)
async def test_failure_under_a_200_gets_its_status(
    gateway: Gateway,
    scripted: ScriptedEngine,
    script: Sequence[Step],
    status: int,
    code: str | None,
) -> None:
    """With nobody else to ask, a client that can read statuses gets one."""
    scripted.scripts.append(script)
    answer = await gateway.post(STREAM)
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["content-type"] == "application/json"


async def test_abort_after_text_is_an_end(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """What has begun to be said is not said again."""
    scripted.scripts.append(stream_reply([ROLE, TEXT, ABORT, DONE]))
    answer = await gateway.post(STREAM)
    assert answer.body == ROLE + TEXT + ABORT + DONE
    assert len(scripted.requests) == 1


@pytest.mark.parametrize(
    ("pieces", "relayed"),
    [
        ([ROLE, TEXT], ROLE + TEXT),
        ([TEXT, TEXT[:20]], TEXT),
        ([], b""),
    ],
    ids=["no [DONE]", "half an event", "nothing at all"],
)
async def test_stream_without_its_end(
    gateway: Gateway, scripted: ScriptedEngine, pieces: list[bytes], relayed: bytes
) -> None:
    """A stream that just stops ends with one error event, on an event's boundary."""
    scripted.scripts.append(stream_reply(pieces))
    answer = await gateway.post(STREAM)
    assert answer.body.startswith(relayed + b'data: {"error":')
    assert answer.body.count(b'"error"') == 1
    error = json.loads(answer.body.removeprefix(relayed).removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_error"
    assert gateway.metric("headrace_requests_total", code="502") == 1


# Breakers.


@pytest.mark.parametrize(
    "script",
    [BROKEN, [Act.RESET], stream_reply([TEXT]), stream_reply([TEXT, *[event({"error": {"code": 500}})], DONE]),
     [STREAM_HEAD, chunk(TEXT), Act.RESET]],
    ids=["500", "reset", "no [DONE]", "error event", "death in mid-stream"],
)  # fmt: skip
async def test_breaker_opens(
    start_engine: StartEngine, start_gateway: StartGateway, script: Sequence[Step]
) -> None:
    """Five failures of any kind, and a replica gets nothing more for a while."""
    gateway, engines = await _fleet(start_engine, start_gateway, 2)
    engines[0].always = script
    for _ in range(30):
        await gateway.post(STREAM)
    assert len(engines[0].requests) == 5
    assert len(engines[1].requests) >= 25


@pytest.mark.parametrize(
    "script",
    [json_reply(error_body("bad", "X", 400), status=400),
     json_reply(error_body("full", "X", 503), status=503)],
    ids=["refused", "full"],
)  # fmt: skip
async def test_answers_do_not_open_it(
    start_engine: StartEngine, start_gateway: StartGateway, script: Sequence[Step]
) -> None:
    """A refusal is the client's fault, a full queue nobody's."""
    gateway, engines = await _fleet(start_engine, start_gateway, 2)
    engines[0].always = script
    for _ in range(30):
        await gateway.post(CHAT)
    assert len(engines[0].requests) >= 15


@pytest.mark.usefixtures("quick_probes")
async def test_one_request_tries_a_broken_replica(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """Half-open, it gets one of a burst; once that has succeeded, it gets its share again."""
    settings = Resilience(canary=False, breaker_open_s=1.0)
    gateway, engines = await _fleet(start_engine, start_gateway, 2, settings)
    engines[0].always = BROKEN
    for _ in range(12):
        await gateway.post(CHAT)
    assert len(engines[0].requests) == 5
    gate = asyncio.Event()
    engines[0].always = [gate, *json_reply({})]
    engines[1].always = [gate, *json_reply({})]
    await eventually(lambda: gateway.worker.registry.trials == 1)
    clients = [await gateway.connect() for _ in range(10)]
    for client in clients:
        await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 13\r\n\r\n"
                          b'{"model":"m"}')  # fmt: skip
    await eventually(lambda: len(gateway.worker.exchanges) == 10)
    await eventually(lambda: engines[1].counts.running == 9)
    assert engines[0].counts.running == 1
    gate.set()
    for client in clients:
        assert (await client.response()).status == 200
    for _ in range(10):
        await gateway.post(CHAT)
    assert len(engines[0].requests) >= 10


# Outages.


@pytest.mark.parametrize("script", [BROKEN, [Act.RESET]], ids=["500", "reset"])
async def test_outage_is_not_multiplied(
    start_engine: StartEngine, start_gateway: StartGateway, script: Sequence[Step]
) -> None:
    """With every replica failing, engines see at most a fifth more than clients send, and a reserve."""
    settings = Resilience(canary=False, min_retries_per_s=1.0, retry_ratio=0.2)
    gateway, engines = await _fleet(start_engine, start_gateway, 3, settings)
    for engine in engines:
        engine.always = script
    started = asyncio.get_running_loop().time()
    for _ in range(300):
        assert (await gateway.post(CHAT)).status in (502, 503)
    reserve = 10.0 + asyncio.get_running_loop().time() - started
    seen = sum(len(engine.requests) for engine in engines)
    assert 300 < seen <= 300 * 1.2 + reserve
    assert gateway.metric("headrace_retries_total") == seen - 300
    # The floor keeps half of the fleet in use: it may be the requests and not the replicas.
    for engine in engines:
        engine.always = None
    assert (await gateway.post(CHAT)).status == 200


async def test_outage_of_one_is_not_noticed(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """Within the budget, every request of one failing replica is answered by another."""
    gateway, engines = await _fleet(start_engine, start_gateway, 3)
    engines[0].always = BROKEN
    assert {(await gateway.post(CHAT)).status for _ in range(60)} == {200}


# Health that routes of health do not show.


@pytest.mark.usefixtures("quick_probes")
async def test_draining_vllm(start_engine: StartEngine, start_gateway: StartGateway) -> None:
    """Its health says 200, requests get 500: none of them is lost, and soon none goes there."""
    gateway, engines = await _fleet(start_engine, start_gateway, 2, Resilience())
    text = "cannot schedule new futures after shutdown"
    engines[0].always = json_reply(error_body(text, "InternalServerError", 500), status=500)
    statuses = {(await gateway.post(CHAT)).status for _ in range(4)}
    name = f"127.0.0.1:{engines[0].port}"
    await eventually(lambda: not gateway.worker.snapshot.replica_health[name])
    before = len(engines[1].requests)
    statuses |= {(await gateway.post(CHAT)).status for _ in range(10)}
    assert statuses == {200}
    assert len(engines[1].requests) == before + 10


@pytest.mark.usefixtures("quick_probes")
async def test_paused_vllm(scripted: ScriptedEngine, start_gateway: StartGateway) -> None:
    """Its health says 200, requests hang: idle, it is found out by its canary, and comes back."""
    gateway = await start_gateway(scripted, resilience=QUICK)
    scripted.always = [Act.HANG]
    await eventually(lambda: not gateway.worker.snapshot.is_ready)
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code) == (503, "no_replica_available")
    scripted.always = None
    await eventually(lambda: gateway.worker.snapshot.is_ready)
    assert (await gateway.post(CHAT)).status == 200


@pytest.mark.usefixtures("quick_probes")
async def test_paused_vllm_under_traffic(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """A request that hangs does not hide that nothing comes of the engine any more."""
    paused, well = await start_engine(), await start_engine()
    gateway = await start_gateway(paused, well, resilience=QUICK)
    paused.always = [Act.HANG]
    name = f"127.0.0.1:{paused.port}"
    async with asyncio.TaskGroup() as tasks:
        waiting = [tasks.create_task(gateway.post(CHAT)) for _ in range(4)]
        await eventually(lambda: not gateway.worker.snapshot.replica_health[name])
        assert gateway.worker.snapshot.is_ready
        assert (await gateway.post(CHAT)).status == 200
        for task in waiting:
            task.cancel()


async def test_canary_is_not_a_request(
    scripted: ScriptedEngine, start_gateway: StartGateway
) -> None:
    """The engine sees it; the gateway's counters and its users do not."""
    gateway = await start_gateway(scripted, resilience=Resilience())
    assert len(scripted.requests) == 1
    assert gateway.metric("headrace_requests_total") == 0
    assert (await gateway.post(CHAT)).status == 200
    assert gateway.metric("headrace_requests_total") == 1


@pytest.mark.usefixtures("quick_sweep")
async def test_silence_counts_against_a_replica(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """One that lets its requests run into the deadline is left alone like one that fails them."""
    engines = [await start_engine(), await start_engine()]
    gateway = await start_gateway(*engines, first_byte_s=0.05)
    engines[0].always = [Act.HANG]
    statuses = [(await gateway.post(CHAT)).status for _ in range(20)]
    assert statuses.count(504) == 5
    assert len(engines[0].requests) == 5


@pytest.mark.usefixtures("quick_probes")
async def test_replica_that_comes_back_warms_up(
    start_engine: StartEngine, start_gateway: StartGateway
) -> None:
    """Of equal requests that are held, it gets a tenth of what the other has."""
    settings = Resilience(canary=False, slow_start_s=0.3)
    gateway, engines = await _fleet(start_engine, start_gateway, 2, settings)
    name = f"127.0.0.1:{engines[0].port}"
    engines[0].is_healthy = False
    await eventually(lambda: not gateway.worker.snapshot.replica_health[name])
    loop = asyncio.get_running_loop()
    grown_up_at = loop.time() + settings.slow_start_s
    await eventually(lambda: loop.time() > grown_up_at)
    engines[0].is_healthy = True
    await eventually(lambda: gateway.worker.snapshot.replica_health[name])
    gateway.worker.registry.warming[0] += 3600.0
    gate = asyncio.Event()
    for engine in engines:
        engine.always = [gate, *json_reply({})]
    clients = [await gateway.connect() for _ in range(22)]
    for number, client in enumerate(clients):
        await client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-length: 13\r\n\r\n"
                          b'{"model":"m"}')  # fmt: skip
        await eventually(lambda number=number: len(gateway.worker.exchanges) == number + 1)
    await eventually(lambda: sum(engine.counts.running for engine in engines) == 22)
    assert engines[0].counts.running == pytest.approx(2, abs=1)
    gate.set()
    for client in clients:
        assert (await client.response()).status == 200
