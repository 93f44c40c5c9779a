"""A control plane for tests: the real app under uvicorn on a real socket, and adapters to send."""

from __future__ import annotations

import io
import socket
import tarfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from adapter_folders import make_adapter

from serving.control.ledger import PlacementPhase, PlacementRow
from serving.control.server import make_server
from serving.control.settings import ControlSettings
from serving.routing.published import Published, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from serving.control.context import Control

TOKEN = "token-of-the-tests-0123456789"
BASE = "tiny-llama"
DEADLINE_S = 30.0
HEADERS = {"authorization": f"Bearer {TOKEN}", "x-headrace-principal": "ann"}
REPLICAS = ("127.0.0.1:19001", "127.0.0.1:19002")


@dataclass
class ControlPlane:
    """One that runs; `parts` are its insides, for what the reconciler would do."""

    url: str
    client: httpx.Client
    parts: Control
    stop: Callable[[], None]

    def get(self, path: str, **query: Any) -> Any:
        """The JSON of an answer, which has to be 2xx."""
        return self.call("GET", path, params=query)

    def call(self, method: str, path: str, status: int | None = None, **request: Any) -> Any:
        """The JSON of an answer with this status, or any 2xx."""
        answer = self.client.request(method, path, **request)
        expected = answer.is_success if status is None else answer.status_code == status
        assert expected, f"{answer.status_code}: {answer.text}"
        return answer.json() if answer.content else None

    def refused(self, method: str, path: str, status: int, **request: Any) -> dict[str, Any]:
        """The error of an answer with this status."""
        answer = self.call(method, path, status, **request)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return answer["error"]

    def push(self, name: str, folder: Path, status: int | None = None, **query: Any) -> Any:
        """Registers a folder as a tar."""
        return self.call(
            "POST",
            f"/admin/v1/adapters/{name}/versions",
            status,
            content=tar_of(folder),
            headers={"content-type": "application/x-tar"},
            params=query,
        )

    def snapshot(self, **query: Any) -> Published | None:
        """What a gateway gets; None for a 204."""
        query = {"gateway": "g", **query}
        answer = self.client.get("/internal/v1/snapshot", params=query)
        assert answer.status_code in (200, 204), answer.text
        return decode(answer.content) if answer.status_code == 200 else None

    def place(self, replica: str, version: str, phase: PlacementPhase, **more: Any) -> None:
        """Records what the reconciler would."""
        row = PlacementRow(replica, version, phase, f"/cache/{version}", **more)
        self.parts.ledger.record(row)

    def ready(self, version: str, *replicas: str) -> None:
        """Has a version proven on replicas, all of them if none is named."""
        for replica in replicas or REPLICAS:
            self.place(replica, version, PlacementPhase.READY)


def settings_of(folder: Path, base: Path, **more: Any) -> ControlSettings:
    """Settings with two replicas that do not run."""
    replicas = [f"vllm=http://{name}" for name in REPLICAS]
    given = {
        "token": TOKEN,
        "replicas": replicas,
        "base_models": {BASE: base},
        "ack_wait_s": 0.0,
        "gateway_grace_s": 0.0,
    }
    return ControlSettings(state_dir=folder, **(given | more))


@contextmanager
def running(settings: ControlSettings, *, is_acting: bool = False) -> Iterator[ControlPlane]:
    """Runs a control plane in a thread; only an acting one touches replicas."""
    server = make_server(settings, is_acting=is_acting)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(DEADLINE_S)

        try:
            wait(lambda: server.started or not thread.is_alive())
            with httpx.Client(base_url=url, headers=HEADERS, timeout=DEADLINE_S) as client:
                yield ControlPlane(url, client, server.parts, stop)
        finally:
            stop()
    assert not thread.is_alive()


def wait(ask: Any, deadline_s: float = DEADLINE_S) -> Any:
    """Asks until the answer is true."""
    end_s = time.monotonic() + deadline_s
    while not (got := ask()):
        assert time.monotonic() < end_s, "not in time"
        time.sleep(0.01)
    return got


def tar_of(folder: Path, mode: str = "w") -> bytes:
    """A folder's files as a tar."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    return packed.getvalue()


def adapter(folder: Path, seed: int = 0, **more: Any) -> Path:
    """A small adapter of the tests' base model; another seed is another version."""
    return make_adapter(folder / f"adapter-{seed}-{len(more)}", seed=seed, **more)
