"""TLS by configuration: towards clients, towards replicas, and the change of a certificate."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from certificates import Authority
from eventually import eventually
from raw_client import RawClient, get, post
from running_gateway import NO_CANARY, running
from scripted_engine import STREAM_HEAD, ScriptedEngine, chunk, event, json_reply

from serving.config import GatewayConfig, Listen, ReplicaConfig, Tls
from serving.errors import ConfigError
from serving.fleet.readiness import PathReady
from serving.gateway import listener
from serving.gateway.tls import replica_context, server_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from running_gateway import Gateway

CHAT = {"model": "m", "messages": []}


def _config(engine: ScriptedEngine | None, tls: Tls | None, **replica: Any) -> GatewayConfig:
    url = "http://127.0.0.1:1" if engine is None else engine.url
    table = {"kind": "vllm", "url": url, **replica}
    return GatewayConfig(
        listen=Listen(host="127.0.0.1", port=0),
        replicas=(ReplicaConfig.model_validate(table),),
        tls=tls,
        resilience=NO_CANARY,
    )


def _client_context(authority: Authority, **options: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    for name, value in options.items():
        setattr(context, name, value)
    return context


@asynccontextmanager
async def _connected(gateway: Gateway, context: ssl.SSLContext) -> AsyncIterator[RawClient]:
    client = RawClient(*await asyncio.open_connection("127.0.0.1", gateway.port, ssl=context))
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that clients and gateway know."""
    return Authority(tmp_path)


@pytest.fixture
def tls(authority: Authority) -> Tls:
    """A certificate for the gateway."""
    issued = authority.issue("server")
    return Tls(cert_file=issued.cert_file, key_file=issued.key_file)


async def test_requests_over_tls(
    scripted: ScriptedEngine, authority: Authority, tls: Tls, tmp_path: Path
) -> None:
    """Bodies and streams, one connection, HTTP/1.1 by ALPN."""
    async with running(_config(scripted, tls), tmp_path, scripted) as gateway:
        context = _client_context(authority)
        context.set_alpn_protocols(["h2", "http/1.1"])
        async with _connected(gateway, context) as client:
            agreed = client.writer.get_extra_info("ssl_object").selected_alpn_protocol()
            assert agreed == "http/1.1"
            await client.send(post(CHAT), post({**CHAT, "stream": True}), get("/healthz"))
            assert (await client.response()).json["choices"]
            assert (await client.response()).body.endswith(b"data: [DONE]\n\n")
            assert (await client.response()).status == 200
        ready = PathReady("127.0.0.1", gateway.port, "/readyz", is_tls=True)
        assert await ready.is_ready()
        assert not await PathReady("127.0.0.1", gateway.port, "/readyz").is_ready()


async def test_client_that_leaves_over_tls(
    scripted: ScriptedEngine, authority: Authority, tls: Tls, tmp_path: Path
) -> None:
    """Its replica's slot is freed, as without TLS."""
    step = chunk(event({"choices": [{"index": 0, "delta": {"content": "a"}}]}))
    scripted.scripts.append([STREAM_HEAD, step, asyncio.Event()])
    async with running(_config(scripted, tls), tmp_path, scripted) as gateway:
        async with _connected(gateway, _client_context(authority)) as client:
            await client.send(post({**CHAT, "stream": True}))
            assert (await client.head()).status == 200
        await eventually(lambda: scripted.counts.aborts == 1)


async def test_old_versions_and_plain_text(
    scripted: ScriptedEngine, authority: Authority, tls: Tls, tmp_path: Path
) -> None:
    """TLS 1.2 is the oldest; bytes that are no handshake close the connection."""
    async with running(_config(scripted, tls), tmp_path, scripted) as gateway:
        old = _client_context(authority)
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.minimum_version = ssl.TLSVersion.TLSv1_1
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with _connected(gateway, old):
                pass
        new = _client_context(authority, maximum_version=ssl.TLSVersion.TLSv1_2)
        async with _connected(gateway, new) as client:
            assert client.writer.get_extra_info("ssl_object").version() == "TLSv1.2"
        plain = await gateway.connect()
        await plain.send(get("/healthz"))
        assert b"HTTP/1.1" not in await plain.rest()


async def test_client_certificates(
    scripted: ScriptedEngine, authority: Authority, tls: Tls, tmp_path: Path
) -> None:
    """With a client authority, only those with a certificate by it are served."""
    other = tmp_path / "other"
    other.mkdir()
    clients = Authority(other, "clients")
    config = _config(scripted, tls.model_copy(update={"client_ca_file": clients.ca_file}))
    async with running(config, tmp_path, scripted) as gateway:
        known, unknown = _client_context(authority), _client_context(authority)
        issued = clients.issue("alice")
        known.load_cert_chain(issued.cert_file, issued.key_file)
        stranger = authority.issue("mallory")
        unknown.load_cert_chain(stranger.cert_file, stranger.key_file)
        async with _connected(gateway, known) as client:
            await client.send(get("/healthz"))
            assert (await client.response()).status == 200
        for refused in (unknown, _client_context(authority)):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await _ask_over(gateway, refused)


async def test_certificate_is_reloaded(
    scripted: ScriptedEngine,
    authority: Authority,
    tls: Tls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """New connections get the new one, open ones go on, none is refused; a bad one changes nothing."""
    monkeypatch.setattr(listener, "POLL_S", 0.01)
    async with (
        running(_config(scripted, tls), tmp_path, scripted) as gateway,
        _connected(gateway, _client_context(authority)) as first,
    ):
        before = _serial(first)
        tls.key_file.write_text("no key")
        await eventually(lambda: "certificate refused" in caplog.text)
        async with _connected(gateway, _client_context(authority)) as second:
            assert _serial(second) == before
        authority.issue("server")
        serials = {before}
        async with asyncio.timeout(10):
            while serials == {before}:
                async with _connected(gateway, _client_context(authority)) as client:
                    serials.add(_serial(client))
        await first.send(get("/healthz"))
        assert (await first.response()).status == 200


async def _ask_over(gateway: Gateway, context: ssl.SSLContext) -> None:
    async with _connected(gateway, context) as client:
        await client.send(get("/healthz"))
        await client.response()


def _serial(client: RawClient) -> str:
    serial: str = client.writer.get_extra_info("peercert")["serialNumber"]
    return serial


@pytest.fixture
async def tls_engine(tls: Tls) -> AsyncIterator[ScriptedEngine]:
    """An engine that serves over TLS."""

    engine = ScriptedEngine()
    engine.tls = server_context(tls)
    async with engine:
        yield engine


async def test_replica_over_tls(
    tls_engine: ScriptedEngine, authority: Authority, tmp_path: Path
) -> None:
    """Probes and requests go over TLS, verified by the replica's own authority."""
    config = _config(tls_engine, None, ca_file=str(authority.ca_file))
    async with running(config, tmp_path, tls_engine) as gateway:
        assert gateway.worker.snapshot.is_ready
        tls_engine.scripts.append(json_reply({"answer": "a" * 300_000}))
        assert len((await gateway.post(CHAT)).json["answer"]) == 300_000
        assert (await gateway.post({**CHAT, "stream": True})).body.endswith(b"[DONE]\n\n")
        assert tls_engine.requests[0].connection == tls_engine.requests[1].connection


async def test_replica_that_cannot_be_verified(tls_engine: ScriptedEngine, tmp_path: Path) -> None:
    """The system does not know its authority: it is not used, unless told not to look."""
    async with running(_config(tls_engine, None), tmp_path, tls_engine) as gateway:
        assert not gateway.worker.snapshot.is_ready
        assert tls_engine.probes == []
    config = _config(tls_engine, None, insecure=True)
    async with running(config, tmp_path, tls_engine) as gateway:
        assert (await gateway.post(CHAT)).status == 200


def test_files_that_cannot_be_used(authority: Authority, tls: Tls, tmp_path: Path) -> None:
    """One line that names the file."""
    other = authority.issue("other")
    for bad, says in (
        ({"cert_file": tmp_path / "none"}, "tls: .*/none: No such file or directory"),
        ({"key_file": other.key_file}, "are not a certificate and its key"),
        ({"client_ca_file": tls.key_file}, "tls.client_ca_file: .* holds no certificates"),
    ):
        with pytest.raises(ConfigError, match=says):
            server_context(tls.model_copy(update=bad))
    replica = ReplicaConfig(kind="vllm", host="h", port=1, is_tls=True, ca_file=tls.key_file)
    with pytest.raises(ConfigError, match=r"replica h:1: ca_file: .* holds no certificates"):
        replica_context(replica)
