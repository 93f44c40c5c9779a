"""Responses that a replica keeps: retrieve, delete and cancel go to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from raw_client import get, post
from scripted_engine import error_body, json_reply

from serving.engines.base import RESPONSES
from serving.gateway.response_id import replica_index_of, response_id

if TYPE_CHECKING:
    from running_gateway import Gateway, StartGateway
    from scripted_engine import ScriptedEngine, StartEngine

ID = b"01a20e0736ce7c528c83dbd61bc6f738"
STORED = f"resp_{ID.decode()}"


@pytest.mark.parametrize("index", [0, 1, 16, 1023])
def test_id_names_the_replica(index: int) -> None:
    """What we call a response tells who keeps it."""
    assert replica_index_of(response_id("/v1/responses", ID, index)) == index


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_other_ids_name_nobody(path: str) -> None:
    """Only responses are kept."""
    assert replica_index_of(response_id(path, ID, 1)) is None


@pytest.mark.parametrize("stored_id", ["resp_1", f"{STORED}001", f"{STORED}fff", f"{STORED}000x"])
async def test_response_of_nobody(
    gateway: Gateway, scripted: ScriptedEngine, stored_id: str
) -> None:
    """An id that is not ours, or whose replica is not there, is a 404; no engine is asked."""
    for request in (
        get(f"/v1/responses/{stored_id}"),
        post(b"", f"/v1/responses/{stored_id}/cancel"),
    ):
        answer = await gateway.ask(request)
        assert (answer.status, answer.code) == (404, "response_not_found")
    assert scripted.requests == []
    assert all("/v1/responses" not in seen.target for seen in scripted.probes)


@pytest.mark.parametrize(
    ("method", "suffix"),
    [("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel")],
)
async def test_its_replica_is_asked(
    start_engine: StartEngine, start_gateway: StartGateway, method: str, suffix: str
) -> None:
    """The same one, however often."""
    engines = [await start_engine(), await start_engine()]
    gateway = await start_gateway(*engines)
    target = f"/v1/responses/{STORED}001{suffix}"
    for engine in engines:
        engine.always = [
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
        ]
    for _ in range(3):
        line = f"{method} {target} HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n"
        await gateway.ask(line.encode())
    asked = [
        [
            (seen.method, seen.target)
            for seen in (*engine.requests, *engine.probes)
            if "/v1/responses" in seen.target
        ]
        for engine in engines
    ]
    assert asked == [[], [(method, target)] * 3]


@pytest.mark.parametrize("busy", [0, 1])
async def test_next_response_goes_where_the_last_is_kept(
    start_engine: StartEngine, start_gateway: StartGateway, busy: int
) -> None:
    """However loaded that replica is; an id that is not ours goes by load."""
    engines = [await start_engine(), await start_engine()]
    gateway = await start_gateway(*engines)
    gateway.worker.ledger.charge(busy, 1000)
    for previous in (f"{STORED}001", f"{STORED}001", "resp_theirs"):
        body = {"model": "m", "input": "a", "previous_response_id": previous}
        assert (await gateway.post(body, "/v1/responses")).status == 200
    gateway.worker.ledger.settle(busy, 1000)
    assert [len(engine.requests) for engine in engines] == [busy, 3 - busy]


async def test_keeper_that_has_left(start_engine: StartEngine, start_gateway: StartGateway) -> None:
    """Another engine says that it does not know the response."""
    engines = [await start_engine(), await start_engine()]
    gateway = await start_gateway(*engines)
    engines[1].die()
    message = f"Response with id '{STORED}001' not found."
    engines[0].always = json_reply(error_body(message, "invalid_request_error", 404), status=404)
    body = {"model": "m", "input": "a", "previous_response_id": f"{STORED}001"}
    await eventually(lambda: len(gateway.worker.snapshot.models["m"].healthy[RESPONSES]) == 1)
    answer = await gateway.post(body, "/v1/responses")
    assert (answer.status, answer.code) == (404, "response_not_found")


async def test_keeper_that_is_full(start_engine: StartEngine, start_gateway: StartGateway) -> None:
    """Another could only say that it does not know the response."""
    engines = [await start_engine(), await start_engine()]
    gateway = await start_gateway(*engines)
    engines[1].always = json_reply(error_body("queue", "Service Unavailable", 503), status=503)
    body = {"model": "m", "input": "a", "previous_response_id": f"{STORED}001"}
    answer = await gateway.post(body, "/v1/responses")
    assert (answer.status, answer.code) == (503, "overloaded")
    assert engines[0].requests == []


async def test_engine_does_not_keep_it_any_more(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """A 404 of the response; the model is well."""
    message = f"Response with id '{STORED}000' not found."
    scripted.always = json_reply(error_body(message, "invalid_request_error", 404), status=404)
    answer = await gateway.ask(post(b"", f"/v1/responses/{STORED}000/cancel"))
    assert (answer.status, answer.code) == (404, "response_not_found")
