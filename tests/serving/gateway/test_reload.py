"""New settings without a restart: what is noticed, what takes effect, what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from gateway_process import gateway_process
from raw_client import post
from scripted_engine import STREAM_HEAD, chunk, event, json_reply

from serving.config_file import ConfigSource
from serving.errors import ConfigError
from serving.gateway.reload import FileWatch, Reloader, merged

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from gateway_process import GatewayProcess
    from scripted_engine import ScriptedEngine, StartEngine

CHAT = {"model": "m", "messages": []}
EVENT = event({"choices": [{"index": 0, "delta": {"content": "a"}}]})
DONE = b"data: [DONE]\n\n"
WORKERS = pytest.mark.parametrize("workers", [1, 2])


def _toml(*urls: str, top: str = "", rest: str = "") -> str:
    tables = "".join(f'[[replicas]]\nkind = "vllm"\nurl = "{url}"\n' for url in urls)
    return f"{top}\n{tables}{rest}\n"


def _key_line(key: str) -> str:
    return f"{key} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


# Deciding.


def test_file_watch(tmp_path: Path) -> None:
    """The first look sees a change, as do other bytes, another file of the same name, and none."""
    path = tmp_path / "f"
    path.write_text("a")
    watch = FileWatch()
    assert watch.changed([path])
    assert not watch.changed([path])
    path.write_text("ab")
    assert watch.changed([path])
    other = tmp_path / "g"
    other.write_text("cd")
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)
    assert watch.changed([path])
    path.unlink()
    assert watch.changed([path])
    assert not watch.changed([path])


@pytest.fixture
def make_reloader(tmp_path: Path) -> Callable[[str], tuple[Path, Reloader]]:
    """A reloader of a file with this content."""

    def make(text: str) -> tuple[Path, Reloader]:
        path = tmp_path / "headrace.toml"
        path.write_text(text)
        source = ConfigSource(path, {"workers": 2})
        return path, Reloader(source, source.load(), lambda index: True)

    return make


MakeReloader = "Callable[[str], tuple[Path, Reloader]]"


def test_decisions(make_reloader: MakeReloader, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing to do, a touched file, a change, a request; the log says what changed."""
    caplog.set_level(logging.INFO)
    path, reloader = make_reloader(_toml("http://a:1"))
    assert reloader.poll() is None
    assert reloader.poll() is None
    os.utime(path, ns=(1, 1))
    assert reloader.poll() is None
    assert caplog.text == ""
    path.write_text(_toml("http://b:1", "http://a:1", rest="[limits]\nmax_attempts = 7"))
    reload = reloader.poll()
    assert reload is not None
    assert reload.contents is not None
    assert reload.indexes == (1, 0)
    assert reloader.config.limits.max_attempts == 7
    assert "configuration reloaded, changed: replicas, limits" in caplog.text
    reloader.ask()
    assert reloader.poll() is not None
    assert "changed: nothing" in caplog.text
    assert reloader.poll() is None


def test_refusal(make_reloader: MakeReloader, caplog: pytest.LogCaptureFixture) -> None:
    """One line with the reason; what is in effect stays, and a corrected file is taken."""
    path, reloader = make_reloader(_toml("http://a:1"))
    before = reloader.config
    path.write_text(_toml("http://b:1", top="workrs = 1"))
    reload = reloader.poll()
    assert reload is not None
    assert reload.contents is None
    assert reloader.config is before
    assert caplog.messages == [
        "configuration refused, the one before stays in effect: "
        f"{path}: unknown key 'workrs'; did you mean 'workers'?"
    ]
    assert reloader.poll() is None
    path.unlink()
    assert reloader.poll() is not None
    assert "No such file" in caplog.text
    path.write_text(_toml("http://b:1"))
    reload = reloader.poll()
    assert reload is not None
    assert reload.indexes == (1,)


def test_what_needs_a_restart(
    make_reloader: MakeReloader, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named, and the rest takes effect."""
    path, reloader = make_reloader(_toml("http://a:1"))
    path.write_text(
        _toml("http://a:1", top="listen='127.0.0.1:1'\ninsecure_no_auth=true\naliases={x='m'}")
    )
    assert reloader.poll() is not None
    assert "takes effect after a restart only: listen, insecure_no_auth" in caplog.text
    assert reloader.config.aliases == {"x": "m"}
    assert reloader.config.listen.port == 8000


def test_keys_cannot_vanish_from_a_public_address(
    make_reloader: MakeReloader, tmp_path: Path
) -> None:
    """A file that is valid by itself is refused where it would open what is served now."""
    (tmp_path / "keys").write_text(_key_line("k"))
    path, reloader = make_reloader(
        _toml("http://a:1", top="listen='0.0.0.0:1'\napi_key_file='keys'")
    )
    current = reloader.config
    path.write_text(_toml("http://a:1", top="listen='127.0.0.1:1'"))
    with pytest.raises(ConfigError, match="no API keys are set"):
        merged(current, ConfigSource(path).load())
    reload = reloader.poll()
    assert reload is not None
    assert reload.contents is None
    assert reloader.config is current


# Taking effect.


@asynccontextmanager
async def _serving(folder: Path, config: Path, workers: int) -> AsyncIterator[GatewayProcess]:
    flags = ("--config", str(config), "--workers", str(workers))
    async with gateway_process(folder, flags=flags) as gateway:
        yield gateway


async def _reloads(gateway: GatewayProcess, result: str) -> float:
    return await gateway.metric("headrace_config_reloads_total", result=result)


async def _until_true(holds: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(500):
        if await holds():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it never came true")


async def _until(gateway: GatewayProcess, result: str, count: int) -> None:
    async def is_reached() -> bool:
        return await _reloads(gateway, result) == count

    await _until_true(is_reached)


@WORKERS
async def test_fleet_is_replaced(start_engine: StartEngine, tmp_path: Path, workers: int) -> None:
    """New requests go to the new fleet; a stream on a removed replica ends whole; no one is cut off."""
    old, new = await start_engine(), await start_engine()
    gate = asyncio.Event()
    old.scripts.append([STREAM_HEAD, chunk(EVENT), gate, chunk(EVENT + DONE), b"0\r\n\r\n"])
    config = tmp_path / "headrace.toml"
    config.write_text(_toml(old.url))
    async with _serving(tmp_path, config, workers) as gateway:
        streaming, kept = await gateway.connect(), await gateway.connect()
        await streaming.send(post({**CHAT, "stream": True}))
        assert (await streaming.head()).status == 200
        assert await streaming.chunk() == EVENT
        await kept.send(post(CHAT))
        assert (await kept.response()).status == 200
        config.write_text(_toml(new.url, rest='[aliases]\nfast = "m"'))
        await _until(gateway, "ok", 1)

        async def moved() -> bool:
            # Enough that every worker has been asked, on whichever connections the kernel gives it.
            asked = [await gateway.ask(post({**CHAT, "model": "fast"})) for _ in range(24)]
            return all(answer.status == 200 for answer in asked)

        await _until_true(moved)
        served_by_old = len(old.requests)
        for _ in range(20):
            assert (await gateway.ask(post(CHAT))).status == 200
        await kept.send(post(CHAT))
        assert (await kept.response()).status == 200
        assert len(old.requests) == served_by_old
        assert len(new.requests) >= 24
        gate.set()
        assert await streaming.chunk() == EVENT + DONE
        assert await streaming.chunk() == b""
        health = (await gateway.ask(_get_metrics())).body.decode()
        assert f'headrace_replica_healthy{{replica="127.0.0.1:{new.port}"}} 1.0' in health
        assert f'headrace_replica_healthy{{replica="127.0.0.1:{old.port}"}}' not in health
        await eventually(lambda: old.counts.running == 0)


def _get_metrics() -> bytes:
    return b"GET /metrics HTTP/1.1\r\nhost: h\r\n\r\n"


@WORKERS
async def test_keys_limits_and_refusal(
    scripted: ScriptedEngine, tmp_path: Path, workers: int
) -> None:
    """Keys by their own file, limits by the config, on SIGHUP at once; a bad file changes nothing."""
    config, keys = tmp_path / "headrace.toml", tmp_path / "keys"
    keys.write_text(_key_line("old"))
    config.write_text(_toml(scripted.url, top="api_key_file = 'keys'"))
    async with _serving(tmp_path, config, workers) as gateway:

        async def all_are(status: int, key: str, body: object = CHAT) -> bool:
            asked = [await gateway.ask(post(body, x_api_key=key)) for _ in range(8)]
            return {answer.status for answer in asked} == {status}

        assert await all_are(200, "old")
        keys.write_text(_key_line("new"))
        await _until(gateway, "ok", 1)
        await _until_true(lambda: all_are(401, "old"))
        assert await all_are(200, "new")

        config.write_text(_toml(scripted.url, top="api_key_file = 'keys'\naliases = 3"))
        gateway.process.send_signal(signal.SIGHUP)
        await _until(gateway, "refused", 1)
        assert await all_are(200, "new")

        config.write_text(
            _toml(
                scripted.url,
                top="api_key_file = 'keys'",
                rest="[limits]\nmax_body_bytes = 1024\n[cors]\nallowed_origins = ['*']",
            )
        )
        gateway.process.send_signal(signal.SIGHUP)
        await _until(gateway, "ok", 2)
        await _until_true(lambda: all_are(413, "new", {**CHAT, "x": "y" * 2000}))
        answer = await gateway.ask(post(CHAT, x_api_key="new", origin="https://a.example"))
        assert answer.headers["access-control-allow-origin"] == "*"
        assert await _reloads(gateway, "refused") == 1
        gateway.terminate()
        assert await gateway.end() == 0


async def test_a_restarted_worker_has_the_newest_settings(
    start_engine: StartEngine, tmp_path: Path
) -> None:
    """It serves the same fleet under the same indexes as the workers beside it."""
    old, new = await start_engine(), await start_engine()
    config = tmp_path / "headrace.toml"
    config.write_text(_toml(old.url))
    async with _serving(tmp_path, config, 2) as gateway:
        config.write_text(_toml(new.url))
        await _until(gateway, "ok", 1)
        first, _ = gateway.workers()
        first.kill()
        await eventually(lambda: first not in gateway.workers() and len(gateway.workers()) == 2)
        old.die()
        async with asyncio.timeout(20):
            good = 0
            while good < 20:
                try:
                    answer = await gateway.ask(post(CHAT))
                    good = good + 1 if answer.status == 200 else 0
                except (ConnectionError, asyncio.IncompleteReadError):
                    good = 0
        assert len(new.requests) >= 20


@WORKERS
async def test_resilience(start_engine: StartEngine, tmp_path: Path, workers: int) -> None:
    """New thresholds hold without a restart: no more retries, and a breaker that opens at once."""
    engines = [await start_engine(), await start_engine()]
    config = tmp_path / "headrace.toml"
    urls = [engine.url for engine in engines]
    config.write_text(_toml(*urls))
    async with _serving(tmp_path, config, workers) as gateway:
        for engine in engines:
            engine.always = json_reply({"error": "boom"}, status=500)
        assert (await gateway.ask(post(CHAT))).status == 502
        assert await gateway.metric("headrace_retries_total") == 1
        rest = "[resilience]\nretry_ratio = 0.0\nmin_retries_per_s = 0.0\nbreaker_failures = 1\n"
        config.write_text(
            _toml(*urls, rest=f"{rest}min_routable_ratio = 0.0\nbreaker_open_s = 60.0")
        )
        await _until(gateway, "ok", 1)

        async def is_unroutable() -> bool:
            asked = [await gateway.ask(post(CHAT)) for _ in range(8)]
            return {answer.status for answer in asked} == {503}

        await _until_true(is_unroutable)
        served = sum(len(engine.requests) for engine in engines)
        assert (await gateway.ask(post(CHAT))).code == "no_replica_available"
        assert sum(len(engine.requests) for engine in engines) == served
