"""A simulated vLLM that is faster than any proxy, for measuring proxies.

Answers what a gateway asks of an engine (health, models, routes, metrics) and chat and text
completions, streamed or whole, with vLLM's own bytes. A stream has one event an interval: at times
of its own (`staggered`) or, as in a real engine, together with all other streams in one step
(`steps`). It never checks the prompt and never samples: the answer has
`max_tokens` tokens. Started as a process of its own by `benchmarks/gateway_cost.py` and by tests:
`python -m benchmarks.fast_engine --port 9001`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import time
from typing import TYPE_CHECKING, Literal

import httptools
import msgspec
import uvloop

from benchmarks import vllm_wire
from benchmarks.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.vllm_wire import Endpoint

Pacing = Literal["staggered", "steps"]

_JSON = b"application/json"
_TEXT = b"text/plain; version=0.0.4; charset=utf-8"
_ENDPOINTS: dict[bytes, Endpoint] = {
    b"/v1/chat/completions": "chat",
    b"/v1/completions": "completion",
}
_ID_PREFIX: dict[Endpoint, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}
# About four characters of English a token.
_BODY_BYTES_PER_TOKEN = 4
# A run of it as long as the request id stands for the id in a prepared answer.
_ID_FILLER = "#"


class StreamOptions(msgspec.Struct):
    """Options of a streamed request."""

    include_usage: bool = False


class EngineRequest(msgspec.Struct):
    """What the engine reads of a request body."""

    model: str | None = None
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None
    pacing: Pacing = "staggered"
    """Not of vLLM, which accepts and ignores unknown fields: how a stream keeps time."""


_decode_request = msgspec.json.Decoder(EngineRequest).decode


class FastEngine:
    """State that all connections of one engine share."""

    def __init__(self, schedule: Schedule, model: str, interval_s: float) -> None:
        self.model = model
        self.interval_s = interval_s
        self.num_running = 0
        self._schedule = schedule
        self._step: list[Callable[[], None]] = []
        self._ids = itertools.count()
        self._fixed = {
            b"/health": (b"text/plain; charset=utf-8", b""),
            b"/ping": (b"text/plain; charset=utf-8", b""),
            b"/version": (_JSON, b'{"version":"0.32.0"}'),
            b"/v1/models": (_JSON, vllm_wire.models(model)),
            b"/openapi.json": (_JSON, vllm_wire.openapi()),
        }
        self._answers_second = 0
        self._answers: dict[tuple[Endpoint, int, int, int], tuple[bytes, bytes]] = {}

    def pace(self, pacing: Pacing, last_s: float, emit: Callable[[], None]) -> float:
        """Arranges for the next event of a stream.

        Args:
            pacing: Whether the stream keeps its own time or moves with the engine's steps.
            last_s: When the stream's last event was due, by `time.monotonic()`.
            emit: Sends the event.

        Returns:
            When it is due. A late engine slips: no stream ever has two events at once.
        """
        now_s = time.monotonic()
        if pacing == "steps":
            if not self._step:
                self._schedule.at(now_s + self.interval_s, self._run_step)
            self._step.append(emit)
            return now_s
        due_s = max(last_s + self.interval_s, now_s + self.interval_s / 2)
        self._schedule.at(due_s, emit)
        return due_s

    def _run_step(self) -> None:
        step, self._step = self._step, []
        for emit in step:
            emit()

    def page(self, path: bytes) -> bytes | None:
        """Whole response of a fixed page, or None where there is none."""
        if path == b"/metrics":
            return vllm_wire.sized(200, _TEXT, vllm_wire.metrics(self.model, self.num_running))
        found = self._fixed.get(path)
        return None if found is None else vllm_wire.sized(200, *found)

    def request_id(self, endpoint: Endpoint, given: str | None) -> str:
        """Id of an answer: the client's `x-request-id` where it sent one, as vLLM does."""
        return _ID_PREFIX[endpoint] + (given or f"{next(self._ids):032x}")

    def answer(
        self, endpoint: Endpoint, request_id: str, body_bytes: int, num_tokens: int
    ) -> bytes:
        """Whole response of a non-streaming request."""
        # Date and creation time change once a second; building an answer costs more than all else.
        second = int(time.monotonic())
        if second != self._answers_second:
            self._answers_second = second
            self._answers.clear()
        key = (endpoint, len(request_id), body_bytes, num_tokens)
        answer = self._answers.get(key)
        if answer is None:
            placeholder = _ID_FILLER * len(request_id)
            num_prompt_tokens = body_bytes // _BODY_BYTES_PER_TOKEN
            body = vllm_wire.answer(
                endpoint, placeholder, self.model, num_prompt_tokens, num_tokens
            )
            before, _, after = vllm_wire.sized(200, _JSON, body).partition(placeholder.encode())
            answer = self._answers[key] = (before, after)
        return request_id.encode().join(answer)


class Stream:
    """One streamed answer on its way: an event an interval, until done or abandoned."""

    def __init__(
        self,
        engine: FastEngine,
        connection: EngineConnection,
        wire: vllm_wire.StreamWire,
        pacing: Pacing,
    ) -> None:
        self._engine = engine
        self._connection = connection
        self._wire = wire
        self._pacing = pacing
        self._num_sent = 0
        self._num_tokens = 0
        self._counts: dict[str, int | None] | None = None
        self._due_s = 0.0

    def start(self, num_tokens: int, counts: dict[str, int | None] | None) -> None:
        """Sends the head now and the first event an interval later."""
        self._num_tokens = num_tokens
        self._counts = counts
        self._engine.num_running += 1
        self._connection.write(vllm_wire.stream_head())
        self._due_s = self._engine.pace(self._pacing, time.monotonic(), self._emit)

    def _emit(self) -> None:
        if self._connection.is_lost:
            return
        self._num_sent += 1
        first = self._wire.first() if self._num_sent == 1 else b""
        if self._num_sent >= self._num_tokens:
            self._engine.num_running -= 1
            self._connection.write(first + self._wire.last(self._counts))
            self._connection.finish()
            return
        tokens = self._wire.tokens
        self._connection.write(first + tokens[self._num_sent % len(tokens)])
        self._due_s = self._engine.pace(self._pacing, self._due_s, self._emit)


class EngineConnection(asyncio.Protocol):
    """One HTTP/1.1 connection. A request sent behind an unfinished stream closes it."""

    def __init__(self, engine: FastEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._body: list[bytes] = []
        self._request_id: str | None = None
        self._is_streaming = False
        self._keep_alive = True
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop; a stream is given up at once."""
        self.is_lost = True
        self._transport = None
        if self._is_streaming:
            self._engine.num_running -= 1

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.MsgspecError):
            body = vllm_wire.error(400, "Bad Request", "The request could not be read.")
            self.write(vllm_wire.sized(400, _JSON, body))
            self._close()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._url = b""
        self._body.clear()
        self._request_id = None

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if len(name) == 12 and name.lower() == b"x-request-id":
            self._request_id = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._is_streaming:
            self._close()
            return
        self._keep_alive = self._parser.should_keep_alive()
        path = self._url.partition(b"?")[0]
        endpoint = _ENDPOINTS.get(path)
        if endpoint is None:
            page = self._engine.page(path)
            self.write(page or vllm_wire.sized(404, _JSON, b'{"detail":"Not Found"}'))
            self.finish()
            return
        self._generate(endpoint, b"".join(self._body))

    def write(self, response: bytes) -> None:
        """Sends bytes, or nothing once the client has gone."""
        if self._transport is not None:
            self._transport.write(response)

    def finish(self) -> None:
        """Ends a response: the connection is kept if the client wants to keep it."""
        self._is_streaming = False
        if not self._keep_alive:
            self._close()

    def _generate(self, endpoint: Endpoint, body: bytes) -> None:
        engine = self._engine
        request = _decode_request(body)
        if request.model not in (None, engine.model):
            message = f"The model `{request.model}` does not exist."
            body = vllm_wire.error(404, "NotFoundError", message, "model")
            self.write(vllm_wire.sized(404, _JSON, body))
            self.finish()
            return
        num_tokens = max(1, request.max_completion_tokens or request.max_tokens or 16)
        request_id = engine.request_id(endpoint, self._request_id)
        if not request.stream:
            self.write(engine.answer(endpoint, request_id, len(body), num_tokens))
            self.finish()
            return
        self._is_streaming = True
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        counts = vllm_wire.usage(len(body) // _BODY_BYTES_PER_TOKEN, num_tokens)
        wire = vllm_wire.StreamWire(endpoint, request_id, engine.model)
        stream = Stream(engine, self, wire, request.pacing)
        stream.start(num_tokens, counts if wants_usage else None)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def serve(host: str, port: int, model: str, interval_s: float) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        model: The one model name that is served.
        interval_s: Time between two events of a stream, in seconds.

    Resources:
        Closes the socket and the schedule on the way out; streams are cut off.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    schedule = Schedule(loop)
    engine = FastEngine(schedule, model, interval_s)
    server = await loop.create_server(lambda: EngineConnection(engine), host, port, backlog=4096)
    await stop.wait()
    server.close()
    schedule.close()


def main() -> None:
    """Command line of one simulated engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="bench-model")
    parser.add_argument("--interval-ms", type=float, default=20.0)
    options = parser.parse_args()
    uvloop.run(serve(options.host, options.port, options.model, options.interval_ms / 1000))


if __name__ == "__main__":
    main()
