"""Forms with files go through to an engine while they come, in bounded memory."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import openai
import pytest
from eventually import DEADLINE_S, eventually
from raw_client import get
from sglang_options import SglangOptions
from sglang_server import SglangServer
from streaming_server import StreamingServer, Upload, echo_length

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from raw_client import RawClient
    from running_gateway import Gateway, StartGateway

PATH = "/v1/audio/transcriptions"
MIB = 1024 * 1024
BLOCK = bytes(range(256)) * 1024
HEAD_BOUND = 256 * 1024


def field(name: str, value: bytes) -> bytes:
    """A field of a form."""
    return b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (
        name.encode(),
        value,
    )


def file(content: bytes) -> bytes:
    """A file of a form."""
    return (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/x-wav\r\n\r\n%b\r\n" % content
    )


MODEL, FILE, END = field("model", b"m"), file(b"RIFF"), b"--b--\r\n"


def head(length: int | None, **headers: str) -> bytes:
    """Head of a request with a form; None sends chunks."""
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: h\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        f"{framing}\r\n{lines}\r\n"
    ).encode()


def form(*parts: bytes) -> bytes:
    """A whole request with its length."""
    body = b"".join(parts) + END
    return head(len(body)) + body


def chunked(*pieces: bytes) -> bytes:
    """Pieces as chunks, without the last one."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


@pytest.fixture
async def start_engine() -> AsyncIterator[Callable[..., object]]:
    """Starts engines that take forms."""
    async with AsyncExitStack() as stack:

        async def start(**given: object) -> StreamingServer:
            return await stack.enter_async_context(StreamingServer(**given))

        yield start


@pytest.fixture
async def engine(start_engine) -> StreamingServer:
    """One of them."""
    return await start_engine()


@pytest.fixture
async def gateway(engine: StreamingServer, start_gateway: StartGateway) -> Gateway:
    """A gateway in front of it, with an alias."""
    return await start_gateway(
        engine, aliases={"whisper": "m"}, limits={"max_form_head_bytes": HEAD_BOUND}
    )


def keep(bodies: list[bytes]):
    """A handler that keeps whole bodies."""

    async def handler(upload: Upload) -> None:
        bodies.append(await upload.body())
        await upload.answer_json({"text": "hello"})

    return handler


async def pour(client: RawClient, num_bytes: int) -> None:
    """Sends so many bytes of a file, as fast as they are taken."""
    for _ in range(num_bytes // len(BLOCK)):
        client.writer.write(BLOCK)
        await client.writer.drain()


# What arrives.


@pytest.mark.parametrize("name", ["m", "whisper"])
async def test_openai_client(gateway: Gateway, engine: StreamingServer, name: str) -> None:
    """The real client's form arrives with the engine's name of the model, and the text comes back."""
    bodies: list[bytes] = []
    engine.handler = keep(bodies)
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key="x", max_retries=0
    ) as client:
        answer = await client.audio.transcriptions.create(
            model=name, file=("a.wav", b"RIFF" * 1000), language="en"
        )
    assert answer.text == "hello"
    (seen,) = engine.uploads
    boundary = seen.headers["content-type"].partition("boundary=")[2].encode()
    parts = bodies[0].split(b"--" + boundary)
    assert parts[1] == b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    assert parts[3].endswith(b"\r\n\r\n" + b"RIFF" * 1000 + b"\r\n")
    assert "authorization" not in seen.headers
    assert seen.target == PATH
    assert gateway.metric("headrace_requests_total", endpoint=PATH, model=name, code="200") == 1
    sent = len(bodies[0]) - len("m") + len(name)
    assert gateway.metric("headrace_request_bytes_total", endpoint=PATH) == sent


async def test_openai_client_streams(gateway: Gateway, engine: StreamingServer) -> None:
    """A transcription that is a stream of events comes back event by event."""
    events = [
        b'data: {"type":"transcript.text.delta","delta":"he"}\n\n',
        b'data: {"type":"transcript.text.delta","delta":"y"}\n\n',
        b'data: {"type":"transcript.text.done","text":"hey"}\n\n',
        b"data: [DONE]\n\n",
    ]

    async def stream(upload: Upload) -> None:
        await upload.body()
        await upload.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for event in events:
            await upload.send(chunked(event))
        await upload.send(b"0\r\n\r\n")

    engine.handler = stream
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key="x", max_retries=0
    ) as client:
        answer = await client.audio.transcriptions.create(
            model="m", file=("a.wav", b"RIFF"), stream=True
        )
        seen = [event.type async for event in answer]
    assert seen == ["transcript.text.delta", "transcript.text.delta", "transcript.text.done"]


async def test_both_framings(gateway: Gateway, engine: StreamingServer) -> None:
    """A sized form stays sized, by its new length; one in chunks stays in chunks."""
    bodies: list[bytes] = []
    engine.handler = keep(bodies)
    named = field("model", b"whisper")
    assert (await gateway.ask(form(named, FILE))).status == 200
    pieces = [named[:20], named[20:], FILE, END]
    assert (await gateway.ask(head(None) + chunked(*pieces) + b"0\r\n\r\n")).status == 200
    wanted = MODEL + FILE + END
    assert bodies == [wanted, wanted]
    first, second = (upload.headers for upload in engine.uploads)
    assert (first["content-length"], "transfer-encoding" in first) == (str(len(wanted)), False)
    assert (second["transfer-encoding"], "content-length" in second) == ("chunked", False)


async def test_connection_goes_on(gateway: Gateway, engine: StreamingServer) -> None:
    """Forms, and what is pipelined behind them, are answered in order on both sides' connections."""
    client = await gateway.connect()
    await client.send(form(MODEL, FILE) + form(FILE, MODEL) + get("/healthz"))
    texts = [(await client.response()).json["text"] for _ in range(2)]
    assert texts == [f"{len(MODEL + FILE + END)} bytes"] * 2
    assert (await client.response()).json == {"status": "ok"}
    assert len({upload.connection for upload in engine.uploads}) == 1


async def test_small_file_before_the_model(gateway: Gateway, engine: StreamingServer) -> None:
    """Within the bound it does not matter which comes first."""
    bodies: list[bytes] = []
    engine.handler = keep(bodies)
    content = b"x" * 100_000
    answer = await gateway.ask(form(file(content), field("model", b"whisper")))
    assert answer.status == 200
    assert bodies == [file(content) + MODEL + END]


# A large file before the model.


async def test_large_file_before_the_model(gateway: Gateway, engine: StreamingServer) -> None:
    """Beyond the bound it goes to the only base model; a field that names it is welcome."""
    content = BLOCK * 4
    answer = await gateway.ask(form(file(content), MODEL))
    assert answer.json["text"] == f"{len(file(content) + MODEL + END)} bytes"


@pytest.mark.parametrize("late", [b"other", b"whisper"])
async def test_late_model_is_another(
    gateway: Gateway, engine: StreamingServer, late: bytes
) -> None:
    """A name that cannot be put right any more is refused, and the engine's connection closed."""
    answer = await gateway.ask(form(file(BLOCK * 20), field("model", late)))
    assert (answer.status, answer.json["error"]["param"]) == (400, "model")
    assert "before the file" in answer.json["error"]["message"]
    await eventually(lambda: not engine.num_open)


async def test_large_file_and_two_models(start_engine, start_gateway: StartGateway) -> None:
    """With more than one base model there is nothing to assume."""
    engine = await start_engine(models=("m", "n"))
    gateway = await start_gateway(engine, limits={"max_form_head_bytes": HEAD_BOUND})
    client = await gateway.connect()
    await client.send(head(100 * MIB) + file(BLOCK * 2))
    answer = await client.response()
    assert (answer.status, answer.json["error"]["param"]) == (400, "model")
    assert "before the file" in answer.json["error"]["message"]
    assert answer.headers["connection"] == "close"
    assert engine.uploads == []


# Bounded memory.


async def test_memory_is_bounded(engine: StreamingServer, start_gateway: StartGateway) -> None:
    """200 MiB go through an engine that reads slowly, with a few of them held at most."""
    total = 200 * MIB
    num_read = 0
    may_read = asyncio.Event()

    async def slowly(upload: Upload) -> None:
        nonlocal num_read
        await may_read.wait()
        length = int(upload.headers["content-length"])
        while num_read < length:
            num_read += len(await upload.reader.read(length - num_read))
        await upload.answer_json({"text": "done"})

    engine.handler = slowly
    gateway = await start_gateway(engine)
    client = await gateway.connect()
    client.writer.transport.set_write_buffer_limits(high=MIB)
    opening = MODEL + file(b"")[:-2]
    await client.send(head(len(opening) + total + 2 + len(END)) + opening)
    await eventually(lambda: len(engine.uploads) == 1)
    gc.collect()
    tracemalloc.start()
    async with asyncio.TaskGroup() as tasks:
        pouring = tasks.create_task(pour(client, total))
        (connection,) = gateway.worker.connections
        await eventually(lambda: connection._is_reading_paused)
        (exchange,) = gateway.worker.exchanges
        body = exchange.request.streamed
        upstream = exchange._upstream
        queued = upstream.transport.get_write_buffer_size()
        assert body.num_held_bytes + queued < 2 * MIB
        assert not pouring.done()
        may_read.set()
        await pouring
    await client.send(b"\r\n" + END)
    answer = await client.response()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.json["text"] == "done"
    assert num_read == len(opening) + total + 2 + len(END)
    # Both sides of the test are in this process: their buffers count too.
    assert peak < 16 * MIB
    assert gateway.metric("headrace_request_bytes_total", endpoint=PATH) == num_read


async def test_client_that_is_held_up_leaves(gateway: Gateway, engine: StreamingServer) -> None:
    """It is noticed when the engine has taken what the client sent, and the engine's slot is freed."""
    may_read = asyncio.Event()

    async def wait(upload: Upload) -> None:
        await may_read.wait()
        await echo_length(upload)

    engine.handler = wait
    client = await gateway.connect()
    await client.send(head(500 * MIB) + MODEL + file(b"")[:-2])
    async with asyncio.TaskGroup() as tasks:
        pouring = tasks.create_task(pour(client, 100 * MIB))
        (connection,) = gateway.worker.connections
        await eventually(lambda: connection._is_reading_paused)
        pouring.cancel()
    client.close()
    may_read.set()
    await eventually(lambda: not engine.num_open)
    assert gateway.metric("headrace_client_aborts_total", endpoint=PATH) == 1


async def test_client_leaves_in_the_middle(gateway: Gateway, engine: StreamingServer) -> None:
    """The engine's connection is closed at once."""
    client = await gateway.connect()
    await client.send(head(MIB) + MODEL + FILE)
    await eventually(lambda: len(engine.uploads) == 1)
    assert engine.num_open >= 1
    client.close()
    await eventually(lambda: not engine.num_open)
    assert gateway.metric("headrace_client_aborts_total", endpoint=PATH) == 1


async def test_form_waits_behind_an_answer(gateway: Gateway, engine: StreamingServer) -> None:
    """A form that is sent ahead is held within its bound until the answer before it has ended."""
    may_answer = asyncio.Event()

    async def wait(upload: Upload) -> None:
        await may_answer.wait()
        await echo_length(upload)

    engine.handler = wait
    client = await gateway.connect()
    content = BLOCK * 40
    second = form(MODEL, file(content))
    await client.send(form(MODEL, FILE) + second)
    (connection,) = gateway.worker.connections
    await eventually(lambda: connection._is_reading_paused)
    assert connection._pending[0].streamed.num_held_bytes < 2 * HEAD_BOUND + MIB
    may_answer.set()
    assert (await client.response()).json["text"] == f"{len(MODEL + FILE + END)} bytes"
    assert (await client.response()).json["text"] == f"{len(MODEL + file(content) + END)} bytes"


# Refusals.


@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [
        (form(FILE), 400, "You must provide a 'model' parameter."),
        (form(field("model", b"nope"), FILE), 404, "'nope' does not exist"),
        (head(5) + b"hello", 400, "does not begin with the boundary"),
        (head(len(MODEL)) + MODEL, 400, "cut off"),
        (head(0), 400, "cut off"),
        (form(MODEL, MODEL), 400, "one field of the form"),
        (
            f"POST {PATH} HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{{}}".encode(),
            400,
            "multipart/form-data",
        ),
    ],
)
async def test_refused(
    gateway: Gateway, engine: StreamingServer, raw: bytes, status: int, says: str
) -> None:
    """Each is an error in OpenAI's shape, and a whole one is never seen by an engine."""
    answer = await gateway.ask(raw)
    assert answer.status == status
    assert says in answer.json["error"]["message"]


async def test_second_model_behind_the_file(gateway: Gateway, engine: StreamingServer) -> None:
    """An engine would take the last one: it is refused, and what has been sent is broken off."""
    answer = await gateway.ask(form(MODEL, file(BLOCK * 8), field("model", b"other")))
    assert (answer.status, answer.json["error"]["param"]) == (400, "model")
    await eventually(lambda: not engine.num_open)


async def test_not_offered(start_engine, start_gateway: StartGateway) -> None:
    """An engine without the route is not asked."""
    engine = await start_engine(paths=("/v1/audio/translations",))
    gateway = await start_gateway(engine)
    answer = await gateway.ask(form(MODEL, FILE))
    assert (answer.status, answer.code) == (404, "endpoint_not_offered")


async def test_too_large_by_its_length(
    engine: StreamingServer, start_gateway: StartGateway
) -> None:
    """A length over the bound is refused on the head; forms may be larger than JSON may."""
    gateway = await start_gateway(
        engine, limits={"max_upload_bytes": 65_536, "max_body_bytes": 1024}
    )
    client = await gateway.connect()
    await client.send(head(65_537))
    answer = await client.response()
    assert (answer.status, answer.code) == (413, "request_too_large")
    assert "65536 bytes" in answer.json["error"]["message"]
    assert (await gateway.ask(form(MODEL, file(b"x" * 60_000)))).status == 200


async def test_too_large_in_chunks(engine: StreamingServer, start_gateway: StartGateway) -> None:
    """Chunks are counted; the engine that got the first ones is left."""
    gateway = await start_gateway(engine, limits={"max_upload_bytes": 100_000})
    client = await gateway.connect()
    await client.send(head(None) + chunked(MODEL + file(b"")[:-2], b"x" * 90_000))
    await eventually(lambda: len(engine.uploads) == 1)
    await client.send(chunked(b"x" * 20_000))
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert await client.rest() == b""
    await eventually(lambda: not engine.num_open)


async def test_framing_breaks_in_the_middle(gateway: Gateway, engine: StreamingServer) -> None:
    """A chunk that is none ends the request with a 400, also after it has been relayed in part."""
    client = await gateway.connect()
    await client.send(head(None) + chunked(MODEL + FILE))
    await eventually(lambda: len(engine.uploads) == 1)
    await client.send(b"zz\r\n")
    answer = await client.response()
    assert (answer.status, answer.code) == (400, "malformed_http")
    assert await client.rest() == b""
    await eventually(lambda: not engine.num_open)


@pytest.mark.parametrize("sent", [b"", MODEL + FILE])
async def test_silent_client(
    engine: StreamingServer, start_gateway: StartGateway, quick_sweep: None, sent: bytes
) -> None:
    """A body that does not go on is a 408, whether it is relayed already or not."""
    gateway = await start_gateway(engine, client_body_s=0.2)
    client = await gateway.connect()
    await client.send(head(MIB) + sent)
    answer = await client.response()
    assert (answer.status, answer.code) == (408, "request_timeout")
    await eventually(lambda: not engine.num_open)


async def test_trickling_client(
    engine: StreamingServer, start_gateway: StartGateway, quick_sweep: None
) -> None:
    """The whole body has a deadline too."""
    gateway = await start_gateway(engine, client_body_total_s=0.3)
    client = await gateway.connect()
    await client.send(head(MIB) + MODEL + file(b"")[:-2])
    (connection,) = gateway.worker.connections

    async def trickle() -> None:
        while not connection._reader.is_deaf:
            await client.send(b"x")

    async with asyncio.timeout(DEADLINE_S):
        await trickle()
    assert (await client.response()).status == 408


# 100-continue.


async def test_continue(gateway: Gateway, engine: StreamingServer) -> None:
    """A client that waits for its 100 gets it once, before anything is relayed."""
    client = await gateway.connect()
    body = MODEL + FILE + END
    await client.send(head(len(body), expect="100-continue"))
    assert (await client.head()).status == 100
    assert engine.uploads == []
    await client.send(body)
    assert (await client.response()).json["text"] == f"{len(body)} bytes"


# Failures of engines.


async def test_engine_that_is_down(start_engine, start_gateway: StartGateway) -> None:
    """A refused connection is tried elsewhere: everything is still held."""
    engines = [await start_engine(), await start_engine()]
    gateway = await start_gateway(*engines)
    await engines[0].__aexit__()
    for _ in range(3):
        assert (await gateway.ask(form(MODEL, FILE))).status == 200
    assert len(engines[1].uploads) == 3


async def test_engine_dies_while_all_is_held(start_engine, start_gateway: StartGateway) -> None:
    """A connection that breaks before anything beyond the held prefix was sent is replaced."""
    bodies: list[bytes] = []

    async def die_once(upload: Upload) -> None:
        if len(engines[0].uploads) + len(engines[1].uploads) == 1:
            await upload.reader.readexactly(10)
            upload.reset()
        else:
            await keep(bodies)(upload)

    engines = [await start_engine(handler=die_once), await start_engine(handler=die_once)]
    gateway = await start_gateway(*engines, aliases={"whisper": "m"})
    client = await gateway.connect()
    named = field("model", b"whisper")
    await client.send(head(len(named + FILE + END)) + named + FILE[:10])
    await eventually(lambda: len(engines[0].uploads) + len(engines[1].uploads) == 2)
    await client.send(FILE[10:] + END)
    assert (await client.response()).status == 200
    assert bodies == [MODEL + FILE + END]
    assert gateway.metric("headrace_retries_total", endpoint=PATH) == 1


async def test_stale_connection(gateway: Gateway, engine: StreamingServer) -> None:
    """An idle connection that the engine has just closed costs nothing."""

    async def answer_and_close(upload: Upload) -> None:
        await echo_length(upload)
        upload.writer.close()

    engine.handler = answer_and_close
    for _ in range(3):
        assert (await gateway.ask(form(MODEL, FILE))).status == 200


async def test_engine_dies_in_the_middle(start_engine, start_gateway: StartGateway) -> None:
    """What went beyond the held prefix cannot be sent twice: one clear 502."""

    async def die(upload: Upload) -> None:
        await upload.reader.readexactly(MIB)
        upload.reset()

    engines = [await start_engine(handler=die), await start_engine(handler=die)]
    gateway = await start_gateway(*engines)
    client = await gateway.connect()
    await client.send(head(100 * MIB) + MODEL + file(b"")[:-2])
    await pour(client, 2 * MIB)
    answer = await client.response()
    assert (answer.status, answer.code) == (502, "upstream_error")
    assert answer.headers["connection"] == "close"
    assert "in the middle of the upload" in answer.json["error"]["message"]
    assert len(engines[0].uploads) + len(engines[1].uploads) == 1


async def test_engine_answers_early(gateway: Gateway, engine: StreamingServer) -> None:
    """A refusal in the middle of the upload is relayed, and both connections are closed."""

    async def refuse(upload: Upload) -> None:
        await upload.reader.readexactly(1000)
        await upload.answer_json({"error": {"message": "too long", "code": 400}}, 400)
        await upload.until_left()

    engine.handler = refuse
    client = await gateway.connect()
    await client.send(head(100 * MIB) + MODEL + file(b"x" * 2000))
    answer = await client.response()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.json["error"]["message"] == "too long"
    assert await client.rest() == b""
    client.close()
    await eventually(lambda: not gateway.worker.connections)
    assert gateway.worker.pool._idle == {} or not any(gateway.worker.pool._idle.values())


async def test_engine_streams_before_the_end(gateway: Gateway, engine: StreamingServer) -> None:
    """Both bodies flow at once; nothing that follows on the connection is taken for a request."""

    async def both(upload: Upload) -> None:
        await upload.reader.readexactly(100)
        await upload.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n" + chunked(b'data: {"delta":"a"}\n\n')
        )
        length = int(upload.headers["content-length"])
        await upload.reader.readexactly(length - 100)
        await upload.send(chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    engine.handler = both
    client = await gateway.connect()
    body = MODEL + FILE + END
    await client.send(head(len(body)) + body[:-20])
    answer = await client.head()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.chunk() == b'data: {"delta":"a"}\n\n'
    await client.send(body[-20:] + get("/healthz"))
    assert await client.chunk() == b"data: [DONE]\n\n"
    assert await client.chunk() == b""
    assert await client.rest() == b""


async def test_engine_takes_nothing(
    engine: StreamingServer, start_gateway: StartGateway, quick_sweep: None
) -> None:
    """An engine that stops reading has a deadline; the client is not blamed for the silence."""
    engine.handler = lambda upload: asyncio.Event().wait()
    gateway = await start_gateway(engine, idle_s=0.3, client_body_s=0.1)
    client = await gateway.connect()
    await client.send(head(500 * MIB) + MODEL + file(b"")[:-2])
    async with asyncio.TaskGroup() as tasks:
        pouring = tasks.create_task(pour(client, 100 * MIB))
        answer = await client.response()
        pouring.cancel()
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    assert "took nothing" in answer.json["error"]["message"]


async def test_engine_does_not_answer(
    engine: StreamingServer, start_gateway: StartGateway, quick_sweep: None
) -> None:
    """The deadline of the first byte counts from the end of the body."""

    async def read_only(upload: Upload) -> None:
        await upload.body()
        await upload.until_left()

    engine.handler = read_only
    gateway = await start_gateway(engine, first_byte_s=0.2)
    client = await gateway.connect()
    body = MODEL + FILE + END
    await client.send(head(len(body)) + body[:-1])
    await eventually(lambda: len(engine.uploads) == 1)
    (exchange,) = gateway.worker.exchanges
    exchange._sent_at -= 10.0
    exchange.check_deadlines(exchange._sent_at + 11.0)
    assert gateway.worker.exchanges == {exchange}
    await client.send(body[-1:])
    assert (await client.response()).status == 504


async def test_sglang(start_gateway: StartGateway) -> None:
    """SGLang's server takes the form as it is."""
    async with SglangServer("m", options=SglangOptions(), health_s=0.0) as server:
        gateway = await start_gateway(server, kind="sglang")
        answer = await gateway.ask(form(MODEL, FILE))
        assert answer.json == {"text": f"{len(MODEL + FILE + END)} bytes"}
        seen = [one for one in server.requests if one.target == PATH]
        assert [one.body for one in seen] == [MODEL + FILE + END]
