"""Published aliases and versions: what they resolve to, where they go, how engines and clients see them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from fake_control import adapter, give, placed, until_resolved, version_of
from raw_client import get, post
from scripted_engine import STREAM_HEAD, chunk, error_body, event, json_reply

if TYPE_CHECKING:
    from fake_control import FakeControl
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine, StartEngine

V1, V2 = version_of("support", "1"), version_of("support", "2")
CHAT = {"model": "help", "messages": []}
EVENT = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
DONE = b"data: [DONE]\n\n"


def asked_models(engine: ScriptedEngine) -> list[str]:
    """What requests named on an engine."""
    return [seen.json["model"] for seen in engine.requests]


def _takes(gateway: Gateway, name: str, engine: ScriptedEngine) -> bool:
    """Whether requests for a model may go to an engine."""
    model = gateway.worker.snapshot.find(name)
    assert model is not None
    ports = [replica.port for replica in model.healthy["/v1/chat/completions"]]
    return engine.port in ports


async def test_alias_version_and_listing(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """An alias is answered by its version and under its name; versions answer, and are not listed."""
    give(scripted, V1, version_of("stray", "9"), "by-hand")
    control.publish({"help": V1, "plain": "m"}, {V1: adapter(placed(scripted))})
    gateway = await start_gateway(scripted, control=control)
    await until_resolved(gateway, "help", V1)
    for name in ("help", V1):
        answer = await gateway.post({**CHAT, "model": name})
        assert (answer.status, answer.json["model"]) == (200, V1)
    assert asked_models(scripted) == [V1, V1]
    assert (await gateway.post({**CHAT, "model": "plain"})).json["model"] == "m"
    assert (await gateway.post({**CHAT, "model": "by-hand"})).json["model"] == "by-hand"
    stray = await gateway.post({**CHAT, "model": version_of("stray", "9")})
    assert (stray.status, stray.code) == (404, "model_not_found")
    listed = {card["id"]: card for card in (await gateway.ask(get("/v1/models"))).json["data"]}
    assert set(listed) == {"m", "by-hand", "help", "plain"}
    assert listed["help"] == {
        "id": "help",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "team",
        "root": V1,
        "parent": "m",
        "max_model_len": 2048,
    }
    assert (listed["plain"]["root"], listed["plain"]["parent"]) == ("m", None)
    card = (await gateway.ask(get(f"/v1/models/{V1}"))).json
    assert (card["id"], card["root"], card["parent"]) == (V1, V1, "m")
    assert (await gateway.ask(get("/v1/models/nope"))).status == 404


async def test_published_alias_beats_a_configured_one(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """Of one name the published alias counts, and the engine's own model before both."""
    give(scripted, V1)
    control.publish({"help": V1, "m": V1}, {V1: adapter(placed(scripted))})
    gateway = await start_gateway(
        scripted, control=control, aliases={"help": "m", "mine": V1, "old": "m"}
    )
    await until_resolved(gateway, "help", V1)
    assert (await gateway.post(CHAT)).json["model"] == V1
    assert (await gateway.post({**CHAT, "model": "mine"})).json["model"] == V1
    assert (await gateway.post({**CHAT, "model": "old"})).json["model"] == "m"
    assert (await gateway.post({**CHAT, "model": "m"})).json["model"] == "m"


async def test_only_where_ready_and_listed(
    start_engine: StartEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """Of four replicas the one that is said to be ready and lists it takes every request."""
    engines = [await start_engine() for _ in range(4)]
    ready, loaded, draining, forgetful = engines
    for engine in (ready, loaded, draining):
        give(engine, V1)
    where = [
        placed(ready),
        placed(loaded, "loaded"),
        placed(draining, "draining"),
        placed(forgetful),
    ]
    control.publish({"help": V1}, {V1: adapter(*where)})
    gateway = await start_gateway(*engines, control=control)
    await until_resolved(gateway, "help", V1)
    for _ in range(12):
        assert (await gateway.post(CHAT)).status == 200
    assert [len(engine.requests) for engine in engines] == [12, 0, 0, 0]


async def test_flip_under_streams(
    start_engine: StartEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """Streams that began on v1 end on v1; every request after the flip is v2's, and none fails."""
    engines = [await start_engine(), await start_engine()]
    gate = asyncio.Event()
    for engine in engines:
        give(engine, V1)
        engine.always = [STREAM_HEAD, chunk(EVENT), gate, chunk(EVENT + DONE), b"0\r\n\r\n"]
    first = {V1: adapter(*map(placed, engines))}
    control.publish({"help": V1}, first)
    gateway = await start_gateway(*engines, control=control)
    await until_resolved(gateway, "help", V1)
    clients = [await gateway.connect() for _ in range(20)]
    for client in clients:
        await client.send(post({**CHAT, "stream": True}))
        assert (await client.head()).status == 200
        assert await client.chunk() == EVENT
    for engine in engines:
        engine.always = None
        give(engine, V1, V2)
    loaded = adapter(*[placed(engine, "loaded") for engine in engines])
    control.publish({"help": V1}, {**first, V2: loaded})
    assert (await gateway.post(CHAT)).json["model"] == V1
    control.publish({"help": V2}, {**first, V2: adapter(*map(placed, engines))})
    await until_resolved(gateway, "help", V2)
    for _ in range(20):
        answer = await gateway.post(CHAT)
        assert (answer.status, answer.json["model"]) == (200, V2)
    gate.set()
    for client in clients:
        assert await client.chunk() == EVENT + DONE
        assert await client.chunk() == b""
    names = [name for engine in engines for name in asked_models(engine)]
    assert (names.count(V1), names.count(V2)) == (21, 20)
    assert gateway.metric("headrace_adapter_requests_total", alias="help", version=V1) == 21
    assert gateway.metric("headrace_adapter_requests_total", alias="help", version=V2) == 20
    assert gateway.metric("headrace_adapter_errors_total") == 0
    assert gateway.metric("headrace_adapter_prompt_tokens_total", version=V2) == 140


async def test_missing_adapter_is_found_elsewhere(
    start_engine: StartEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """An engine that lost a version is asked for it no more; the request is answered, no breaker counts."""
    lost, kept = await start_engine(), await start_engine()
    give(lost, V1)
    give(kept, V1)
    control.publish({"help": V1}, {V1: adapter(placed(lost))})
    gateway = await start_gateway(lost, kept, control=control)
    await until_resolved(gateway, "help", V1)
    assert (await gateway.post(CHAT)).status == 200
    # By now it is in a slot there: requests prefer that replica.
    control.publish({"help": V1}, {V1: adapter(placed(lost), placed(kept))})
    await eventually(lambda: _takes(gateway, V1, kept))
    missing = json_reply(error_body("The model does not exist.", "NotFoundError", 404), status=404)
    lost.always = missing
    give(lost)
    for _ in range(10):
        assert (await gateway.post(CHAT)).json["model"] == V1
    assert len(lost.requests) == 2
    assert gateway.metric("headrace_retries_total") == 1
    lost.always = None
    assert (await gateway.post({**CHAT, "model": "m"})).status == 200
    assert _takes(gateway, V1, kept)
    assert not _takes(gateway, V1, lost)
    # Loaded again: not before a snapshot newer than the loss says so.
    give(lost, V1)
    learnt = len([seen for seen in lost.probes if seen.target == "/v1/models"])
    both = adapter(placed(lost), placed(kept))
    control.publish({"help": V1}, {V1: adapter(placed(lost, "loaded"), placed(kept))})
    await eventually(
        lambda: len([seen for seen in lost.probes if seen.target == "/v1/models"]) > learnt
    )
    control.publish({"help": V1}, {V1: both})

    await eventually(lambda: _takes(gateway, V1, lost))
    assert _takes(gateway, V1, kept)


@pytest.mark.parametrize("is_dead", [True, False], ids=["killed", "restarted at once"])
async def test_restarted_replica(
    scripted: ScriptedEngine,
    start_engine: StartEngine,
    control: FakeControl,
    start_gateway: StartGateway,
    is_dead: bool,
) -> None:
    """It takes base requests as soon as it is up, an adapter's only when both say that it is back."""
    other = await start_engine()
    give(scripted, V1)
    give(other, V1)
    control.publish({"help": V1}, {V1: adapter(placed(scripted), placed(other))})
    gateway = await start_gateway(scripted, other, control=control)
    await until_resolved(gateway, "help", V1)
    name = f"127.0.0.1:{scripted.port}"

    def takes(model_name: str) -> bool:
        return _takes(gateway, model_name, scripted)

    assert takes(V1)
    scripted.die()
    give(scripted)
    if is_dead:
        await eventually(lambda: not gateway.worker.snapshot.replica_health[name])
    await scripted.listen()
    await eventually(lambda: takes("m") and not takes(V1))
    # Loaded, and listed; but the snapshot that says `ready` is older than the restart.
    give(scripted, V1)
    before = gateway.worker.registry.snapshot.version
    control.publish({"help": V1}, {V1: adapter(placed(scripted, "loaded"), placed(other))})
    await eventually(lambda: gateway.worker.registry.snapshot.version > before)
    assert not takes(V1)
    control.publish({"help": V1}, {V1: adapter(placed(scripted), placed(other))})
    await eventually(lambda: takes(V1))


async def test_base_that_nobody_serves(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """503 and not an answer of some other base."""
    control.publish({"help": V1}, {V1: adapter(placed(scripted), base="another")})
    gateway = await start_gateway(scripted, control=control)
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code) == (503, "no_replica_available")
    assert scripted.requests == []
