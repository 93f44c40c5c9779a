"""`headrace control` as a process: its settings, its end, and being killed in the middle of things."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from control_plane import BASE, HEADERS, TOKEN, adapter, tar_of, wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

COMMAND = (sys.executable, "-W", "error", "-m", "serving.cli.main", "control")
START_S = 60.0
ROUTE = "/admin/v1/adapters/support/versions"


class Process:
    """One `headrace control`."""

    def __init__(self, folder: Path, base: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        log = (folder / "control.log").open("ab")
        argv = [*COMMAND, "--listen", f"127.0.0.1:{port}", "--state-dir", str(folder)]
        self.process = subprocess.Popen(
            [*argv, "--base-model", f"{BASE}={base}"],
            env={**os.environ, "HEADRACE_CONTROL_TOKEN": TOKEN},
            stdout=log,
            stderr=log,
        )
        log.close()
        wait(self.is_up, START_S)

    def is_up(self) -> bool:
        """Whether it answers."""
        assert self.process.poll() is None
        try:
            return httpx.get(f"{self.url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def end(self, how: signal.Signals) -> int:
        """Ends it; its exit code."""
        self.process.send_signal(how)
        return self.process.wait(30)

    def get(self, path: str, **query: Any) -> Any:
        """The JSON of an answer."""
        answer = httpx.get(f"{self.url}{path}", params=query, headers=HEADERS, timeout=30)
        return answer.raise_for_status().json()


@pytest.fixture
def start(tmp_path: Path, base_folder: Path, daemons: Any) -> Iterator[Callable[[], Process]]:
    """Starts it, again and again over the same state; kills what still runs."""
    port, begun = daemons.port(), []

    def begin() -> Process:
        begun.append(Process(tmp_path, base_folder, port))
        return begun[-1]

    yield begin
    for one in begun:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def refusal(*arguments: str, **environment: str) -> str:
    """What it says when it does not start."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    return done.stderr.strip().splitlines()[-1]


def test_needs_a_token_that_others_cannot_read(tmp_path: Path) -> None:
    """No token, a short one, and a file that others can read are each refused in one line."""
    assert "HEADRACE_CONTROL_TOKEN" in refusal()
    assert "token" in refusal(HEADRACE_CONTROL_TOKEN="short")
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    assert "chmod 600" in refusal("--token-file", str(file))
    file.chmod(0o600)
    known = ("--token-file", str(file), "--state-dir", str(tmp_path))
    assert "--insecure-listen" in refusal(*known, "--listen", "0.0.0.0:0")
    assert "sqlite:///" in refusal(*known, "--database-url", "mysql://x/y")
    assert "--base-model m=" in refusal(*known, "--base-model", f"m={tmp_path}")


def test_ends_in_order_at_once(start: Callable[[], Process]) -> None:
    """SIGTERM ends it with code 0 although a gateway waits for a snapshot."""
    control = start()
    known = control.get("/internal/v1/snapshot", gateway="g")
    query = f"gateway=g&wait_s=50&epoch={known['epoch']}&after={known['version']}"
    head = (
        f"GET /internal/v1/snapshot?{query} HTTP/1.1\r\nhost: x\r\n"
        f"authorization: Bearer {TOKEN}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", control.port), timeout=20) as gateway:
        gateway.sendall(head.encode())
        wait(lambda: "headrace_control_waiters 1.0" in metrics_of(control))
        began_s = time.monotonic()
        assert control.end(signal.SIGTERM) == 0
        assert time.monotonic() - began_s < 8
        assert gateway.recv(4096).startswith(b"HTTP/1.1 204 ")


def test_killed_in_the_middle_of_an_upload(
    start: Callable[[], Process], tmp_path: Path, base_folder: Path
) -> None:
    """Nothing is registered; the folder that is left is removed, and the same push succeeds."""
    control = start()
    (tmp_path / "source").mkdir()
    body = tar_of(adapter(tmp_path / "source"))
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
        f"content-type: application/x-tar\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    staging = tmp_path / "staging"
    with socket.create_connection(("127.0.0.1", control.port)) as client:
        client.sendall(head.encode() + body[: len(body) // 2])
        wait(lambda: any(staging.glob("upload-*")))
        control.end(signal.SIGKILL)
    (left,) = staging.glob("upload-*")
    os.utime(left, (0, 0))
    control = start()
    assert not any(staging.iterdir())
    assert control.get("/admin/v1/adapters")["data"] == []
    headers = {**HEADERS, "content-type": "application/x-tar"}
    answer = httpx.post(f"{control.url}{ROUTE}", content=body, headers=headers, timeout=30)
    assert answer.status_code == 201


def test_restarts_with_what_it_knew(start: Callable[[], Process], tmp_path: Path) -> None:
    """Killed without a word after an answer: version, alias and audit are there again."""
    control = start()
    (tmp_path / "source").mkdir()
    headers = {**HEADERS, "content-type": "application/x-tar"}
    body = tar_of(adapter(tmp_path / "source"))
    route = f"{control.url}{ROUTE}?alias=help"
    answer = httpx.post(route, content=body, headers=headers, timeout=30)
    assert answer.status_code == 201
    before = control.get("/internal/v1/snapshot", gateway="g")
    control.end(signal.SIGKILL)
    control = start()
    assert control.get("/internal/v1/snapshot", gateway="g") == before
    version = answer.json()["version"]["version"]
    assert control.get("/admin/v1/aliases/help")["target"] == version
    assert len(control.get("/admin/v1/audit")["data"]) == 3


def metrics_of(control: Process) -> str:
    """Its metrics."""
    return httpx.get(f"{control.url}/metrics", headers=HEADERS, timeout=30).text
