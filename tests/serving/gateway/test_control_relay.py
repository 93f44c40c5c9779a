"""What is not inference goes to the control plane: who may, what passes, and what if it is away."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from pydantic import SecretStr, ValidationError
from raw_client import get, post
from running_gateway import NO_CANARY, Gateway, key_hash, running
from streaming_server import StreamingServer, Upload, echo_length

from serving.config import (
    ControlPlane,
    Cors,
    GatewayConfig,
    Limits,
    Listen,
    ReplicaConfig,
    Timeouts,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from scripted_engine import ScriptedEngine

PATH = "/admin/v1/adapters"
MIB = 1024 * 1024
BLOCK = bytes(range(256)) * 1024
ADMIN = key_hash("hr-admin").model_copy(update={"is_admin": True})
KEYS = (key_hash("hr-user"), ADMIN)
CHAT = {"model": "m", "messages": []}


def request(method: str, target: str = PATH, body: bytes | None = None, **headers: str) -> bytes:
    """A request with any method."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    length = "" if body is None else f"content-length: {len(body)}\r\n"
    return f"{method} {target} HTTP/1.1\r\nhost: h\r\n{length}{lines}\r\n".encode() + (body or b"")


@pytest.fixture
async def control() -> AsyncIterator[StreamingServer]:
    """A control plane."""
    async with StreamingServer() as server:
        yield server


@pytest.fixture
async def start(scripted: ScriptedEngine, control: StreamingServer, tmp_path: Path):
    """Starts gateways with it; the rest are fields of their configuration."""
    async with AsyncExitStack() as stack:

        async def started(**given: object) -> Gateway:
            timeouts = {name: given.pop(name) for name in list(given) if name.endswith("_s")}
            settings: dict[str, object] = {
                "listen": Listen(host="127.0.0.1", port=0),
                "replicas": (ReplicaConfig.parse(f"vllm={scripted.url}"),),
                "control": ControlPlane(url=control.url, token=SecretStr("t0ken")),
                "timeouts": Timeouts(**{"drain_s": 1.0, **timeouts}),
                "resilience": NO_CANARY,
                **given,
            }
            config = GatewayConfig(**settings)
            return await stack.enter_async_context(running(config, tmp_path, scripted))

        yield started


async def pour(client, num_bytes: int) -> None:
    """Sends so many bytes as fast as they are taken."""
    for _ in range(num_bytes // len(BLOCK)):
        client.writer.write(BLOCK)
        await client.writer.drain()


# What passes.


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_method(start, control: StreamingServer, method: str) -> None:
    """Each method arrives with its path, query and body, and its answer comes back."""

    async def answer(upload: Upload) -> None:
        assert await upload.body() == b"{}"
        await upload.answer(201, b"[1]", "content-type: application/json", "etag: x")

    control.handler = answer
    gateway = await start()
    client = await gateway.connect()
    for _ in range(2):
        await client.send(request(method, f"{PATH}/a@b?x=%2F&y=1", b"{}", x_request_id="mine"))
        response = await client.response(is_head=method == "HEAD")
        assert (response.status, response.body) == (201, b"" if method == "HEAD" else b"[1]")
        assert response.headers["content-length"] == "3"
        assert response.headers["etag"] == "x"
        assert response.headers["x-request-id"] == "mine"
    assert [(one.method, one.target) for one in control.uploads] == [
        (method, f"{PATH}/a@b?x=%2F&y=1")
    ] * 2
    assert gateway.metric("headrace_requests_total", endpoint="/admin/v1") == 2
    assert gateway.metric("headrace_request_bytes_total", endpoint="/admin/v1") == 4


async def test_headers(start, control: StreamingServer) -> None:
    """The control plane knows the gateway by its token; who the client is, the gateway says."""
    gateway = await start(api_keys=KEYS)
    await gateway.ask(
        request(
            "GET",
            authorization="Bearer hr-admin",
            x_headrace_principal="root",
            X_HEADRACE_other="1",
            x_forwarded_host="evil",
            x_forwarded_proto="https",
            forwarded="host=evil",
            x_request_id="mine",
            connection="keep-alive, x-secret",
            x_secret="1",
            te="trailers",
            accept="text/plain",
        ).replace(b"X-HEADRACE-other", b"X_HeadRace_Principal")
    )
    headers = control.uploads[0].headers
    assert headers == {
        "host": f"127.0.0.1:{control.port}",
        "authorization": "Bearer t0ken",
        "x-headrace-principal": "hr-admin",
        "x-forwarded-proto": "http",
        "x-forwarded-host": "h",
        "x-request-id": "mine",
        "accept": "text/plain",
    }


async def test_keys_stay_here(start, control: StreamingServer) -> None:
    """Nor is a key that comes by Anthropic's header shown to the control plane."""
    gateway = await start(api_keys=KEYS)
    await gateway.ask(request("GET", x_api_key="hr-admin"))
    assert b"hr-admin" not in control.uploads[0].head.replace(b"principal: hr-admin", b"")


async def test_errors_pass_as_they_are(start, control: StreamingServer) -> None:
    """Its errors have the right shape already."""
    body = b'{"error": {"message": "no", "type": "invalid_request_error", "code": "c"}}'
    control.handler = lambda upload: upload.answer(409, body, "content-type: application/json")
    gateway = await start()
    response = await gateway.ask(get(PATH))
    assert (response.status, response.body) == (409, body)
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("status", [204, 304])
async def test_no_body(start, control: StreamingServer, status: int) -> None:
    """A status without a body has none here either, and the connection goes on."""
    head = f"HTTP/1.1 {status} Status\r\n\r\n".encode()
    control.handler = lambda upload: upload.send(head)
    gateway = await start()
    client = await gateway.connect()
    for _ in range(2):
        await client.send(get(PATH))
        response = await client.head()
        assert response.status == status
        assert "transfer-encoding" not in response.headers


async def test_chunks_and_close(start, control: StreamingServer) -> None:
    """A body without a length comes in chunks; to HTTP/1.0 it ends with the connection."""

    async def answer(upload: Upload) -> None:
        await upload.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        await upload.send(b"1\r\nb\r\n0\r\n\r\n")

    async def close(upload: Upload) -> None:
        await upload.send(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nab")
        upload.writer.close()

    gateway = await start()
    for handler in (answer, close):
        control.handler = handler
        response = await gateway.ask(get(PATH))
        assert (response.body, response.headers["transfer-encoding"]) == (b"ab", "chunked")
        old = get(PATH).replace(b"HTTP/1.1", b"HTTP/1.0")
        response = await gateway.ask(old)
        assert (response.body, response.headers["connection"]) == (b"ab", "close")
        assert "transfer-encoding" not in response.headers


async def test_chunked_upload(start, control: StreamingServer) -> None:
    """A body in chunks goes on in chunks."""
    bodies: list[bytes] = []

    async def keep(upload: Upload) -> None:
        bodies.append(await upload.body())
        await upload.answer(204, b"")

    control.handler = keep
    gateway = await start()
    client = await gateway.connect()
    await client.send(request("PUT", transfer_encoding="chunked"), b"3\r\nabc\r\n")
    await eventually(lambda: len(control.uploads) == 1)
    await client.send(b"2\r\nde\r\n0\r\n\r\n")
    assert (await client.head()).status == 204
    assert bodies == [b"abcde"]


async def test_continue(start, control: StreamingServer) -> None:
    """The 100 is sent when the control plane is there to take the body."""
    gateway = await start()
    client = await gateway.connect()
    await client.send(request("POST", expect="100-continue", content_length="5"))
    assert (await client.head()).status == 100
    await client.send(b"hello")
    assert (await client.response()).json == {"text": "5 bytes"}
    assert "expect" not in control.uploads[0].headers


async def test_large_upload_in_bounded_memory(start, control: StreamingServer) -> None:
    """An upload beyond the limit of forms waits for a slow control plane and is not held."""
    total = 200 * MIB
    may_read = asyncio.Event()
    num_read = 0

    async def slowly(upload: Upload) -> None:
        nonlocal num_read
        await may_read.wait()
        while num_read < total:
            num_read += len(await upload.reader.read(total - num_read))
        await upload.answer_json({"read": num_read})

    control.handler = slowly
    gateway = await start(limits=Limits(max_upload_bytes=1024))
    client = await gateway.connect()
    client.writer.transport.set_write_buffer_limits(high=MIB)
    await client.send(request("POST", content_length=str(total)))
    await eventually(lambda: len(control.uploads) == 1)
    gc.collect()
    tracemalloc.start()
    async with asyncio.TaskGroup() as tasks:
        pouring = tasks.create_task(pour(client, total))
        (connection,) = gateway.worker.connections
        await eventually(lambda: connection._is_reading_paused)
        (exchange,) = gateway.worker.exchanges
        queued = exchange._upstream.transport.get_write_buffer_size()
        assert exchange._body.num_held_bytes + queued < 2 * MIB
        may_read.set()
        await pouring
    assert (await client.response()).json == {"read": total}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * MIB


async def test_slow_download(start, control: StreamingServer) -> None:
    """A client that does not read holds the control plane up, and gets every byte in the end."""
    total = 64 * MIB
    num_sent = 0

    async def answer(upload: Upload) -> None:
        nonlocal num_sent
        await upload.send(f"HTTP/1.1 200 OK\r\ncontent-length: {total}\r\n\r\n".encode())
        while num_sent < total:
            await upload.send(BLOCK)
            num_sent += len(BLOCK)

    control.handler = answer
    gateway = await start()
    client = await gateway.connect(receive_buffer_bytes=8192)
    await client.send(get(PATH))
    (connection,) = gateway.worker.connections
    await eventually(lambda: connection.is_write_paused)
    assert connection._transport.get_write_buffer_size() < 2 * MIB
    assert num_sent < total
    assert len((await client.response()).body) == total


async def test_pipelined(start, control: StreamingServer) -> None:
    """Admin requests and others are answered in the order in which they came."""
    gateway = await start()
    client = await gateway.connect()
    await client.send(request("POST", body=b"abc") + post(CHAT) + get(PATH) + get("/healthz"))
    assert (await client.response()).json == {"text": "3 bytes"}
    assert "choices" in (await client.response()).json
    assert (await client.response()).json == {"text": "0 bytes"}
    assert (await client.response()).json == {"status": "ok"}


# Who may.


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        (None, 401, "invalid_api_key"),
        ("hr-nobody", 401, "invalid_api_key"),
        ("hr-user", 403, "permission_denied"),
        ("hr-admin", 200, None),
    ],
)
async def test_key(
    start, control: StreamingServer, key: str | None, status: int, code: str | None
) -> None:
    """With keys, the admin ones alone come to the control plane."""
    gateway = await start(api_keys=KEYS)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = await gateway.ask(request("POST", body=b"x", **headers))
    assert response.status == status
    assert code is None or response.code == code
    assert len(control.uploads) == (status == 200)


async def test_admin_key_asks_models(start) -> None:
    """An admin key can do what others can."""
    gateway = await start(api_keys=KEYS)
    assert (await gateway.post(CHAT, authorization="Bearer hr-admin")).status == 200


async def test_no_keys_on_loopback(start, control: StreamingServer) -> None:
    """Without keys whoever is on this machine may."""
    gateway = await start()
    assert (await gateway.ask(get(PATH))).status == 200
    assert control.uploads[0].headers["x-headrace-principal"] == "local"


async def test_no_keys_beyond_loopback(start, control: StreamingServer) -> None:
    """Serving models to everybody does not mean that everybody may change them."""
    gateway = await start(listen=Listen(host="192.0.2.1", port=0), insecure_no_auth=True)
    response = await gateway.ask(get(PATH))
    assert (response.status, response.code) == (403, "permission_denied")
    assert "headrace keys create --admin" in response.json["error"]["message"]
    assert (await gateway.post(CHAT)).status == 200
    assert control.uploads == []


async def test_web_pages(start, control: StreamingServer) -> None:
    """Without keys, a page in this machine's browser may only if its origin was named."""
    gateway = await start(cors=Cors(allowed_origins=("https://ours.example",)))
    response = await gateway.ask(request("POST", body=b"x", origin="https://evil.example"))
    assert (response.status, response.code) == (403, "permission_denied")
    response = await gateway.ask(request("POST", body=b"x", origin="https://ours.example"))
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == "https://ours.example"
    assert len(control.uploads) == 1


async def test_preflight_stays_here(start, control: StreamingServer) -> None:
    """A preflight has no key, so that it must not go to the control plane."""
    gateway = await start(api_keys=KEYS, cors=Cors(allowed_origins=("*",)))
    response = await gateway.ask(
        request("OPTIONS", origin="https://x.example", access_control_request_method="POST")
    )
    assert (response.status, response.headers["access-control-allow-origin"]) == (204, "*")
    assert "PATCH" in response.headers["allow"]
    assert control.uploads == []


# What does not pass.


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/admin/v1/../internal/x", 400),
        ("/admin/v1/..", 400),
        ("/admin/v1/./x", 400),
        ("/admin/v1/%2e%2e/internal/x", 400),
        ("/admin/v1/..%2f..%2finternal", 400),
        ("/admin/v1/a%2Fb", 400),
        ("/admin/v1/a%5cb", 400),
        ("/admin/v1/a\\b", 400),
        ("/admin/v1/%252e%252e/x", 400),
        ("/admin/v1/a%00", 400),
        ("/admin/v1/a#b", 400),
        ("http://h/admin/v1/../internal", 400),
        ("/internal/x", 404),
        ("/internal/", 404),
        ("/admin", 404),
        ("/admin/v1", 404),
        ("/admin/v2/x", 404),
        ("/admin/v10/x", 404),
        ("/%61dmin/v1/x", 404),
        ("//admin/v1/x", 404),
        ("/v1/../admin/v1/x", 404),
        ("http://h//admin/v1/x", 404),
    ],
)
async def test_path_is_refused(start, control: StreamingServer, path: str, status: int) -> None:
    """Paths that could mean another one, and all that is not in the table."""
    gateway = await start()
    assert (await gateway.ask(get(path))).status == status
    assert control.uploads == []


async def test_absolute_target(start, control: StreamingServer) -> None:
    """A target in absolute form goes on as a path."""
    gateway = await start()
    assert (await gateway.ask(get(f"http://h{PATH}?a=b"))).status == 200
    assert control.uploads[0].target == f"{PATH}?a=b"


async def test_method_is_refused(start, control: StreamingServer) -> None:
    """Others than the known methods are not relayed."""
    gateway = await start()
    response = await gateway.ask(request("TRACE"))
    assert (response.status, response.code) == (405, "method_not_supported")
    assert control.uploads == []


async def test_too_large(start, control: StreamingServer) -> None:
    """The gateway has a bound of its own, on lengths and on chunks."""
    gateway = await start(limits=Limits(max_admin_body_bytes=2048))
    assert (await gateway.ask(request("POST", content_length="100000"))).status == 413
    client = await gateway.connect()
    await client.send(request("POST", transfer_encoding="chunked") + b"800\r\n" + b"x" * 2048)
    await eventually(lambda: len(control.uploads) == 1)
    await client.send(b"\r\n1\r\nx\r\n")
    response = await client.response()
    assert (response.status, response.headers["connection"]) == (413, "close")
    await eventually(lambda: not control.num_open)


# A control plane that is not there.


async def test_not_configured(start) -> None:
    """The routes say that there is none."""
    gateway = await start(control=None)
    response = await gateway.ask(get(PATH))
    assert (response.status, response.code) == (404, "no_control_plane")


async def test_not_reachable(start, control: StreamingServer) -> None:
    """A clear 503, also to an upload that has not begun; inference goes on."""
    gateway = await start()
    await control.__aexit__()
    response = await gateway.ask(get(PATH))
    assert (response.status, response.code) == (503, "control_plane_unavailable")
    assert response.headers["retry-after"] == "2"
    client = await gateway.connect()
    await client.send(request("POST", expect="100-continue", content_length="100000"))
    response = await client.response()
    assert (response.status, response.headers["connection"]) == (503, "close")
    assert (await gateway.post(CHAT)).status == 200


async def test_stale_connection(start, control: StreamingServer) -> None:
    """A GET that meets a connection which is being closed is sent once more."""
    gateway = await start()
    assert (await gateway.ask(get(PATH))).status == 200
    first = control.uploads[0].connection

    async def reset_old(upload: Upload) -> None:
        if upload.connection == first:
            upload.reset()
        else:
            await echo_length(upload)

    control.handler = reset_old
    assert (await gateway.ask(get(PATH))).status == 200
    assert [upload.connection == first for upload in control.uploads] == [True, True, False]


async def test_lost_get_is_not_repeated_for_ever(start, control: StreamingServer) -> None:
    """One that kills a new connection is not sent again."""

    async def reset(upload: Upload) -> None:
        upload.reset()

    control.handler = reset
    gateway = await start()
    response = await gateway.ask(get(PATH))
    assert (response.status, response.code) == (503, "control_plane_unavailable")
    assert len(control.uploads) == 1


async def test_changes_are_sent_once(start, control: StreamingServer) -> None:
    """What changes something goes on a new connection, and never twice."""
    gateway = await start()
    assert (await gateway.ask(get(PATH))).status == 200

    async def reset(upload: Upload) -> None:
        upload.reset()

    control.handler = reset
    response = await gateway.ask(request("POST", body=b"x"))
    assert (response.status, response.code) == (503, "control_plane_unavailable")
    assert [upload.method for upload in control.uploads] == ["GET", "POST"]
    assert control.uploads[0].connection != control.uploads[1].connection


async def test_breaks_in_the_middle(start, control: StreamingServer) -> None:
    """A body that stays incomplete cannot be taken for whole."""

    async def half(upload: Upload) -> None:
        await upload.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        upload.reset()

    control.handler = half
    gateway = await start()
    client = await gateway.connect()
    await client.send(get(PATH))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await client.response()


async def test_no_http(start, control: StreamingServer) -> None:
    """What is not HTTP is a 503 too."""
    control.handler = lambda upload: upload.send(b"hello\r\n\r\n")
    gateway = await start()
    response = await gateway.ask(get(PATH))
    assert (response.status, response.code) == (503, "control_plane_unavailable")


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"])
async def test_deadline(start, control: StreamingServer, quick_sweep: None, part: bytes) -> None:
    """It has to begin and to go on in time."""

    async def stop(upload: Upload) -> None:
        await upload.send(part)
        await upload.until_left()

    control.handler = stop
    gateway = await start(first_byte_s=0.1, idle_s=0.1)
    client = await gateway.connect()
    await client.send(get(PATH))
    if part:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await client.response()
    else:
        assert (await client.response()).status == 504
    await eventually(lambda: not control.num_open)


async def test_slow_upload_that_goes_on(start, control: StreamingServer, quick_sweep: None) -> None:
    """An upload may take longer than a form may, as long as it goes on."""
    gateway = await start(client_body_total_s=0.05, client_body_s=5.0)
    client = await gateway.connect()
    await client.send(request("POST", content_length="4"), b"ab")
    (connection,) = gateway.worker.connections
    began_at = connection._reader.reading.received_at
    loop = asyncio.get_running_loop()
    await eventually(lambda: loop.time() - began_at > 0.2)
    await client.send(b"cd")
    assert (await client.response()).json == {"text": "4 bytes"}


async def test_upload_that_stops(start, control: StreamingServer, quick_sweep: None) -> None:
    """One that does not go on is a 408."""
    gateway = await start(client_body_s=0.1)
    client = await gateway.connect()
    await client.send(request("POST", content_length="4"), b"ab")
    assert (await client.response()).status == 408
    await eventually(lambda: not control.num_open)


async def test_client_leaves_a_long_poll(start, control: StreamingServer) -> None:
    """The control plane's connection is closed at once."""
    control.handler = lambda upload: upload.until_left()
    gateway = await start()
    client = await gateway.connect()
    await client.send(get(PATH))
    await eventually(lambda: len(control.uploads) == 1)
    assert control.num_open == 1
    client.close()
    await eventually(lambda: not control.num_open)
    assert gateway.metric("headrace_client_aborts_total", endpoint="/admin/v1") == 1


# Settings.


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:9", "http://[::1]:9", "http://10.1.2.3:9", "http://control:9/",
     "http://control.apps.svc:9"],
)  # fmt: skip
def test_private_address(url: str) -> None:
    """Loopback, private networks, and names that no public DNS has."""
    assert ControlPlane(url=url, token=SecretStr("t")).port == 9


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1:9", "http://8.8.8.8:9", "http://example.com", "http://127.0.0.1:9/x", "x"],
)
def test_public_address(url: str) -> None:
    """The token must not go over a public network in plain text."""
    with pytest.raises(ValidationError):
        ControlPlane(url=url, token=SecretStr("t"))
