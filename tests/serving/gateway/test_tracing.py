"""OpenTelemetry spans, as a real OTLP/HTTP receiver gets them."""

from __future__ import annotations

import logging
import subprocess
import sys
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol, Self

import pytest
from eventually import eventually
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from raw_client import get, post
from running_gateway import NO_CANARY, key_hash, running
from scripted_engine import Act, json_reply

from serving.config import GatewayConfig, Listen, ReplicaConfig, Tracing
from serving.errors import ConfigError
from serving.tracing import check_installed, installed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from running_gateway import Gateway
    from scripted_engine import ScriptedEngine, StartEngine

CHAT = {"model": "m", "messages": []}
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
PARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


class Receiver:
    """Takes traces over HTTP, as a collector does.

    Attributes:
        spans: All spans so far.
        may_answer: Unset to keep exporters waiting.
        status: What it answers with.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.headers: dict[str, str] = {}
        self.resource: dict[str, Any] = {}
        self.may_answer = Event()
        self.may_answer.set()
        self.status = 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.may_answer.wait(10)
                if receiver.status == 200:
                    receiver.take(body, dict(self.headers))
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, body: bytes, headers: dict[str, str]) -> None:
        """Keeps what one export brings."""
        self.headers = headers
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = _attributes(group.resource)
            for scope in group.scope_spans:
                self.spans += scope.spans

    def of_kind(self, kind: int) -> list[Span]:
        """Server or client spans, oldest first."""
        found = [span for span in self.spans if span.kind == kind]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def _attributes(holder: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in holder.attributes}


class StartTraced(Protocol):
    """Starts a gateway that traces to the receiver."""

    async def __call__(self, *engines: ScriptedEngine, **tracing: Any) -> Gateway: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A collector."""
    with Receiver() as one:
        yield one


@pytest.fixture
async def start_traced(receiver: Receiver, tmp_path: Path) -> AsyncIterator[StartTraced]:
    """Gateways whose engines are tried in order."""
    async with AsyncExitStack() as stack:

        async def start(*engines: ScriptedEngine, **tracing: Any) -> Gateway:
            settings = {"endpoint": receiver.endpoint, "export_interval_s": 0.01, **tracing}
            config = GatewayConfig(
                listen=Listen(host="127.0.0.1", port=0),
                replicas=tuple(ReplicaConfig.parse(f"vllm={engine.url}") for engine in engines),
                api_keys=(key_hash("k"),),
                tracing=Tracing(**settings),
                resilience=NO_CANARY,
                aliases={"fast": "m"},
            )
            return await stack.enter_async_context(running(config, tmp_path, *engines))

        yield start


async def _ask(gateway: Gateway, body: object = CHAT, path: str = "", **headers: str) -> int:
    raw = post(body, path or "/v1/chat/completions", x_api_key="k", **headers)
    return (await gateway.ask(raw)).status


async def test_one_request(
    scripted: ScriptedEngine, receiver: Receiver, start_traced: StartTraced
) -> None:
    """A server span under the client's, a client span under that, whose context the engine gets."""
    gateway = await start_traced(scripted, service_name="gw", headers={"x-collector-key": "s3cret"})
    body = {**CHAT, "model": "fast", "stream": True}
    assert await _ask(gateway, body, traceparent=PARENT, tracestate="a=1") == 200
    await eventually(lambda: len(receiver.spans) == 2)
    (server,) = receiver.of_kind(Span.SPAN_KIND_SERVER)
    (client,) = receiver.of_kind(Span.SPAN_KIND_CLIENT)
    assert receiver.headers["x-collector-key"] == "s3cret"
    assert receiver.resource["service.name"] == "gw"
    assert {server.trace_id.hex(), client.trace_id.hex()} == {TRACE_ID}
    assert (server.parent_span_id.hex(), client.parent_span_id) == (PARENT_ID, server.span_id)
    assert server.name == "POST /v1/chat/completions"
    seen = scripted.requests[0].headers
    assert seen["traceparent"] == f"00-{TRACE_ID}-{client.span_id.hex()}-01"
    assert seen["tracestate"] == "a=1"
    attributes = _attributes(server)
    ttft_s = attributes.pop("gen_ai.response.time_to_first_chunk")
    duration_s = (server.end_time_unix_nano - server.start_time_unix_nano) / 1e9
    assert 0 < ttft_s <= duration_s < 5
    assert len(attributes.pop("headrace.inference_id")) == 32
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "fast",
        "gen_ai.response.model": "m",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "headrace.replica": f"127.0.0.1:{scripted.port}",
        "headrace.attempts": 1,
    }
    attributes = _attributes(client)
    assert attributes["server.port"] == scripted.port
    assert attributes["http.response.status_code"] == 200
    assert client.start_time_unix_nano >= server.start_time_unix_nano
    assert client.end_time_unix_nano <= server.end_time_unix_nano


async def test_a_span_for_each_attempt(
    start_engine: StartEngine, receiver: Receiver, start_traced: StartTraced
) -> None:
    """The failed one is marked, both are children of one span; without a parent a trace begins."""
    engines = [await start_engine(), await start_engine()]
    gateway = await start_traced(*engines)
    for engine in engines:
        engine.scripts.append([Act.RESET])
    engines[0].scripts.append(json_reply({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
    engines[1].scripts.append(json_reply({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
    assert [await _ask(gateway) for _ in range(2)] == [502, 200]
    await eventually(lambda: len(receiver.of_kind(Span.SPAN_KIND_SERVER)) == 2)
    server = receiver.of_kind(Span.SPAN_KIND_SERVER)[0]
    clients = [
        span
        for span in receiver.of_kind(Span.SPAN_KIND_CLIENT)
        if span.parent_span_id == server.span_id
    ]
    assert [_attributes(span)["headrace.attempt"] for span in clients] == [1, 2]
    first = _attributes(clients[0])
    assert (first["error.type"], first["http.response.status_code"]) == ("upstream_error", 502)
    assert clients[0].status.code == Status.STATUS_CODE_ERROR
    assert _attributes(server)["headrace.attempts"] == 2
    assert server.parent_span_id == b""
    contexts = {seen.headers["traceparent"] for engine in engines for seen in engine.requests}
    assert len(contexts) == sum(len(engine.requests) for engine in engines)


async def test_refused_requests(
    scripted: ScriptedEngine, receiver: Receiver, start_traced: StartTraced
) -> None:
    """Spans of their own, by status: the client's fault is no error of the server."""
    gateway = await start_traced(scripted)
    assert await _ask(gateway, {"model": "none"}) == 404
    assert (await gateway.post(CHAT)).status == 401
    scripted.is_healthy = False
    assert (await gateway.ask(get("/healthz"))).status == 200
    await eventually(lambda: len(receiver.spans) == 2)
    found = [_attributes(span) for span in receiver.of_kind(Span.SPAN_KIND_SERVER)]
    assert [(one["http.response.status_code"], one["error.type"]) for one in found] == [
        (404, "model_not_found"),
        (401, "invalid_api_key"),
    ]
    assert {span.status.code for span in receiver.spans} == {Status.STATUS_CODE_UNSET}


async def test_client_that_leaves(
    scripted: ScriptedEngine, receiver: Receiver, start_traced: StartTraced
) -> None:
    """Its span ends with 499."""
    gateway = await start_traced(scripted)
    scripted.scripts.append([Act.HANG])
    client = await gateway.connect()
    await client.send(post(CHAT, x_api_key="k"))
    await eventually(lambda: scripted.counts.running == 1)
    client.close()
    await eventually(lambda: len(receiver.spans) == 2)
    statuses = {_attributes(span)["http.response.status_code"] for span in receiver.spans}
    assert statuses == {499}


async def test_sampling(
    scripted: ScriptedEngine, receiver: Receiver, start_traced: StartTraced
) -> None:
    """The client's flag decides; without one the ratio does. The context goes on all the same."""
    gateway = await start_traced(scripted, sample_ratio=0.0)
    assert await _ask(gateway) == 200
    assert await _ask(gateway, traceparent=f"{PARENT[:-2]}00") == 200
    assert await _ask(gateway, traceparent=PARENT) == 200
    await eventually(lambda: len(receiver.spans) == 2)
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE_ID}
    contexts = [seen.headers["traceparent"] for seen in scripted.requests]
    assert [int(context[-2:], 16) & 1 for context in contexts] == [0, 0, 1]
    assert [context[3:35] == TRACE_ID for context in contexts] == [False, True, True]


@pytest.mark.parametrize(
    "bad", ["", "x", "00-0-0-01", PARENT.replace("4bf9", "zzzz"), "00-" + "0" * 32 + PARENT[35:]]
)
async def test_invalid_context_starts_a_trace(
    scripted: ScriptedEngine, receiver: Receiver, start_traced: StartTraced, bad: str
) -> None:
    """As W3C Trace Context asks; the request is served."""
    gateway = await start_traced(scripted)
    assert await _ask(gateway, traceparent=bad, tracestate="=,=" * 50) == 200
    await eventually(lambda: len(receiver.spans) == 2)
    (server,) = receiver.of_kind(Span.SPAN_KIND_SERVER)
    assert server.parent_span_id == b""
    assert server.trace_id != bytes(16)


async def test_full_queue(
    scripted: ScriptedEngine, receiver: Receiver, start_traced: StartTraced
) -> None:
    """A collector that does not answer delays nothing; what finds no room is counted."""
    receiver.may_answer.clear()
    gateway = await start_traced(scripted, max_queued_spans=4)
    for _ in range(20):
        assert await _ask(gateway) == 200
    dropped = gateway.metric("headrace_trace_spans_lost_total", reason="queue_full")
    # Four are queued, and at most four more are on their way.
    assert 32 <= dropped <= 36
    receiver.may_answer.set()
    await eventually(lambda: len(receiver.spans) == 40 - dropped)


async def test_collector_that_refuses(
    scripted: ScriptedEngine,
    receiver: Receiver,
    start_traced: StartTraced,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Spans that could not be exported are counted."""
    caplog.set_level(logging.CRITICAL)
    receiver.status = 400
    gateway = await start_traced(scripted)
    assert await _ask(gateway) == 200
    await eventually(
        lambda: gateway.metric("headrace_trace_spans_lost_total", reason="export_failed") == 2
    )
    assert await _ask(gateway) == 200


async def test_what_is_queued_at_the_end_is_sent(
    scripted: ScriptedEngine, receiver: Receiver, tmp_path: Path
) -> None:
    """The drain ends with an export."""
    config = GatewayConfig(
        listen=Listen(host="127.0.0.1", port=0),
        replicas=(ReplicaConfig.parse(f"vllm={scripted.url}"),),
        tracing=Tracing(endpoint=receiver.endpoint, export_interval_s=60.0),
        resilience=NO_CANARY,
    )
    async with running(config, tmp_path, scripted) as gateway:
        assert (await gateway.post(CHAT)).status == 200
        assert receiver.spans == []
    assert len(receiver.spans) == 2


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configured without its extra: one line that says what to install."""
    check_installed()
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[tracing\]'"):
        check_installed()

    def raise_error(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(installed, "find_spec", raise_error)
    with pytest.raises(ConfigError):
        check_installed()


def test_the_gateway_does_not_import_opentelemetry() -> None:
    """It costs nothing where it is not configured."""
    code = "import serving.gateway.server, serving.cli.main, sys; print('opentelemetry' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"
