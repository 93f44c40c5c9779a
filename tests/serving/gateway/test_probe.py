"""The control plane's probes: on the clients' way, to one replica, beside the clients' accounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from fake_control import TOKEN, adapter, give, placed, until_resolved, version_of
from scripted_engine import Act, error_body, json_reply

from serving.config import Resilience

if TYPE_CHECKING:
    from fake_control import FakeControl
    from raw_client import Response
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine, StartEngine

V1, V2 = version_of("support", "1"), version_of("support", "2")
CHAT = {"model": V1, "messages": []}


async def _probe(
    gateway: Gateway, engine: ScriptedEngine, token: str = TOKEN, **fields: object
) -> Response:
    return await gateway.post(
        {**CHAT, **fields},
        x_headrace_probe_replica=f"127.0.0.1:{engine.port}",
        authorization=f"Bearer {token}",
    )


@pytest.mark.parametrize("keys", [(), ("client-key",)], ids=["open", "with keys"])
async def test_pinned_before_clients_are_routed(
    start_engine: StartEngine,
    control: FakeControl,
    start_gateway: StartGateway,
    keys: tuple[str, ...],
) -> None:
    """Each probe reaches the replica that it names, of a version and of the base, whatever the state."""
    engines = [await start_engine() for _ in range(3)]
    for engine in engines:
        give(engine, V1)
    where = (placed(engines[0]), placed(engines[1], "loaded"))
    control.publish({"help": V1}, {V1: adapter(*where)})
    gateway = await start_gateway(*engines, control=control, keys=keys)
    await until_resolved(gateway, "help", V1)
    for engine in (*engines, *engines):
        answer = await _probe(gateway, engine)
        assert (answer.status, answer.json["model"]) == (200, V1)
        assert (await _probe(gateway, engine, model="m")).json["model"] == "m"
    assert [len(engine.requests) for engine in engines] == [4, 4, 4]
    assert "x-headrace-probe-replica" not in engines[0].requests[0].headers
    assert gateway.metric("headrace_requests_total", endpoint="probe", code="200") == 12
    assert gateway.metric("headrace_requests_total") == 12
    assert gateway.metric("headrace_adapter_requests_total") == 0


async def test_header_without_the_token(
    scripted: ScriptedEngine,
    start_engine: StartEngine,
    control: FakeControl,
    start_gateway: StartGateway,
) -> None:
    """It means nothing: the request goes where any other would, and with keys it needs one."""
    other = await start_engine()
    give(scripted, V1)
    give(other, V1)
    control.publish({}, {V1: adapter(placed(scripted))})
    gateway = await start_gateway(scripted, other, control=control)
    await until_resolved(gateway, V1, V1)
    for token in ("x", TOKEN + "x", ""):
        assert (await _probe(gateway, other, token)).status == 200
    assert (len(scripted.requests), len(other.requests)) == (3, 0)
    assert gateway.metric("headrace_requests_total", endpoint="probe") == 0


async def test_token_opens_nothing_else(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """With client keys the token alone, and the header with a wrong one, are refused."""
    gateway = await start_gateway(scripted, control=control, keys=("client-key",))
    body = {**CHAT, "model": "m"}
    alone = await gateway.post(body, authorization=f"Bearer {TOKEN}")
    assert alone.status == 401
    assert (await _probe(gateway, scripted, "wrong", model="m")).status == 401
    assert (await _probe(gateway, scripted, model="m")).status == 200


async def test_failures_are_the_probers(
    scripted: ScriptedEngine,
    start_engine: StartEngine,
    control: FakeControl,
    start_gateway: StartGateway,
) -> None:
    """No second replica is tried, no breaker counts, and the version stays where clients find it."""
    other = await start_engine()
    give(scripted, V1)
    give(other, V1)
    control.publish({}, {V1: adapter(placed(scripted), placed(other))})
    resilience = Resilience(canary=False, breaker_failures=1)
    gateway = await start_gateway(scripted, other, control=control, resilience=resilience)
    await until_resolved(gateway, V1, V1)
    scripted.scripts.append([Act.RESET])
    scripted.scripts.append(json_reply({"error": "boom"}, status=500))
    missing = error_body("The model does not exist.", "NotFoundError", 404)
    scripted.scripts.append(json_reply(missing, status=404))
    assert (await _probe(gateway, scripted)).code == "upstream_error"
    assert (await _probe(gateway, scripted)).code == "upstream_error"
    assert (await _probe(gateway, scripted)).code == "adapter_missing"
    assert (len(scripted.requests), len(other.requests)) == (3, 0)
    model = gateway.worker.snapshot.find(V1)
    assert model is not None
    assert len(model.healthy["/v1/chat/completions"]) == 2
    assert gateway.metric("headrace_retries_total") == 0


async def test_unknown_replica_and_unpublished_version(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """503 of a replica that is not ours, 404 of a version that is not published."""
    give(scripted, V1)
    control.publish({}, {V1: adapter(placed(scripted, "loaded"))})
    gateway = await start_gateway(scripted, control=control)
    await eventually(lambda: gateway.worker.snapshot.find(V1) is not None)
    answer = await gateway.post(
        CHAT, x_headrace_probe_replica="h:1", authorization=f"Bearer {TOKEN}"
    )
    assert (answer.status, answer.code) == (503, "no_replica_available")
    assert (await _probe(gateway, scripted, model=V2)).code == "model_not_found"
    assert scripted.requests == []


async def test_replica_that_is_down(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """A probe of it says so at once."""
    give(scripted, V1)
    control.publish({}, {V1: adapter(placed(scripted))})
    gateway = await start_gateway(scripted, control=control)
    await until_resolved(gateway, V1, V1)
    scripted.die()
    answer = await _probe(gateway, scripted)
    assert (answer.status, answer.code) == (503, "no_replica_available")
