"""Requests for adapters that no replica has ready: they wait, in order and within bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eventually import eventually
from fake_control import adapter, give, placed, until_resolved, version_of
from raw_client import post
from scripted_engine import error_body, json_reply

if TYPE_CHECKING:
    import pytest
    from fake_control import FakeControl
    from raw_client import RawClient
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine

V1, V2 = version_of("support", "1"), version_of("support", "2")
CHAT = {"model": "help", "messages": []}


def _cold(control: FakeControl, *versions: str) -> None:
    control.publish({"help": V1}, {name: adapter() for name in versions or (V1,)})


def _load(control: FakeControl, engine: ScriptedEngine) -> None:
    give(engine, V1, V2)
    control.publish({"help": V1}, {V1: adapter(placed(engine)), V2: adapter(placed(engine))})


async def _waiting(gateway: Gateway, count: int) -> None:
    await eventually(lambda: gateway.metric("headrace_adapter_waiting") == count)


async def _ask(gateway: Gateway, count: int, **fields: object) -> list[RawClient]:
    clients = []
    for number in range(count):
        client = await gateway.connect()
        await client.send(post({**CHAT, "user": f"{number}", **fields}))
        await _waiting(gateway, number + 1)
        clients.append(client)
    return clients


async def test_waits_for_the_load(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """One demand for all of them; with the snapshot that makes it ready they go on in their order."""
    _cold(control)
    gateway = await start_gateway(scripted, control=control)
    clients = await _ask(gateway, 5)
    assert control.demands == [V1]
    assert scripted.requests == []
    assert gateway.metric("headrace_requests_in_flight") == 5
    _load(control, scripted)
    for client in clients:
        answer = await client.response()
        assert (answer.status, answer.json["model"]) == (200, V1)
    assert [seen.json["user"] for seen in scripted.requests] == ["0", "1", "2", "3", "4"]
    assert gateway.metric("headrace_adapter_waits_total", version=V1, outcome="ready") == 5
    assert gateway.metric("headrace_adapter_wait_seconds_count") == 5
    assert gateway.metric("headrace_adapter_requests_total", alias="help", version=V1) == 5
    assert gateway.metric("headrace_requests_total", code="200", model="help") == 5


async def test_alias_moves_while_it_is_waited_for(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """Who waits for an alias is answered by what it means in the end; who named the version waits on."""
    _cold(control, V1, V2)
    gateway = await start_gateway(scripted, control=control)
    (by_alias,) = await _ask(gateway, 1)
    by_version = await gateway.connect()
    await by_version.send(post({**CHAT, "model": V1}))
    await _waiting(gateway, 2)
    give(scripted, V2)
    control.publish({"help": V2}, {V1: adapter(), V2: adapter(placed(scripted))})
    assert (await by_alias.response()).json["model"] == V2
    assert gateway.metric("headrace_adapter_waiting") == 1
    _load(control, scripted)
    assert (await by_version.response()).json["model"] == V1


async def test_deadline(
    scripted: ScriptedEngine,
    control: FakeControl,
    start_gateway: StartGateway,
    quick_sweep: None,
) -> None:
    """503 with its own code and a time to come back; nothing is left of it."""
    _cold(control)
    gateway = await start_gateway(scripted, control=control, adapter_load_s=0.1)
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code) == (503, "adapter_loading")
    assert answer.headers["retry-after"] == "5"
    assert gateway.metric("headrace_adapter_waits_total", outcome="late") == 1
    assert gateway.metric("headrace_adapter_waiting") == 0
    assert gateway.metric("headrace_adapter_errors_total", version=V1) == 1


async def test_bounds(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """Two may wait for a version and three in all; a client that leaves frees its place."""
    _cold(control, V1, V2)
    limits = {"max_waiting_requests": 2, "max_waiting_requests_per_worker": 3}
    gateway = await start_gateway(scripted, control=control, limits=limits)
    first, second = await _ask(gateway, 2)
    full = await gateway.post(CHAT)
    assert (full.status, full.code) == (503, "overloaded")
    third = await gateway.connect()
    await third.send(post({**CHAT, "model": V2}))
    await _waiting(gateway, 3)
    assert (await gateway.post({**CHAT, "model": V2})).status == 503
    assert gateway.metric("headrace_adapter_waits_total", outcome="queue_full") == 2
    first.close()
    await _waiting(gateway, 2)
    assert gateway.metric("headrace_adapter_waits_total", outcome="client_left") == 1
    fourth = await gateway.connect()
    await fourth.send(post(CHAT))
    await _waiting(gateway, 3)
    _load(control, scripted)
    for client in (second, third, fourth):
        assert (await client.response()).status == 200


async def test_no_control_plane_to_load_it(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """Fails fast: nothing that is waited for can come."""
    _cold(control)
    gateway = await start_gateway(scripted, control=control)
    await control.die()
    answer = await gateway.post(CHAT)
    assert (answer.status, answer.code) == (503, "adapter_unavailable")
    assert gateway.metric("headrace_adapter_waits_total", outcome="unavailable") == 1
    assert (await gateway.post({**CHAT, "model": "m"})).status == 200


async def test_refused_demand(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """A control plane that will not load it is not waited for."""
    _cold(control)
    control.demand_status = 409
    gateway = await start_gateway(scripted, control=control)
    assert (await gateway.post(CHAT)).code == "adapter_unavailable"
    assert control.demands == [V1]


async def test_drain(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """What waits when the drain's time is up is answered, not cut off."""
    _cold(control)
    gateway = await start_gateway(scripted, control=control, drain_s=0.2)
    (client,) = await _ask(gateway, 1)
    gateway.worker.stop()
    assert (await client.response()).code == "adapter_loading"
    assert gateway.metric("headrace_adapter_waits_total", outcome="drained") == 1


async def test_missing_everywhere(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """The only replica lost it: the request waits for its return instead of failing."""
    _load(control, scripted)
    gateway = await start_gateway(scripted, control=control)
    await until_resolved(gateway, "help", V1)
    lost = json_reply(error_body("The model does not exist.", "NotFoundError", 404), status=404)
    scripted.scripts.append(lost)
    give(scripted)
    (client,) = await _ask(gateway, 1)
    await eventually(lambda: control.demands == [V1])
    give(scripted, V1)
    control.publish({"help": V1}, {V1: adapter(placed(scripted, "loaded"))})
    control.publish({"help": V1}, {V1: adapter(placed(scripted))})
    assert (await client.response()).json["model"] == V1


async def test_unknown_is_not_waited_for(
    scripted: ScriptedEngine,
    control: FakeControl,
    start_gateway: StartGateway,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A version that is not published is a 404 at once."""
    _cold(control)
    gateway = await start_gateway(scripted, control=control)
    assert (await gateway.post({**CHAT, "model": V2})).code == "model_not_found"
    assert control.demands == []
