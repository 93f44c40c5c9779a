"""Makes the helper modules of this folder importable by its tests; one S3 server for the session."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.append(str(Path(__file__).parent))

from s3_server import S3Server, start_s3

from adapters.locations import Location, LocationSettings
from adapters.store import AdapterStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapters.manifest import Manifest

PREFIXES = itertools.count(1)
END_DEADLINE_S = 60.0


@pytest.fixture(scope="session")
def s3(session_daemons: Any, tmp_path_factory: pytest.TempPathFactory, until: Any) -> S3Server:
    """The session's S3 server."""
    return start_s3(session_daemons, tmp_path_factory.mktemp("s3"), until)


@pytest.fixture
def local(tmp_path: Path) -> Location:
    """An empty local folder."""
    return Location(str(tmp_path / "store"))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> AdapterStore:
    """An empty store, in a local folder and in S3."""
    if request.param == "local":
        return AdapterStore(Location(str(tmp_path / "store")))
    server = request.getfixturevalue("s3")
    return AdapterStore(server.location(f"test-{next(PREFIXES)}"))


class Transfer:
    """A process that pushes or fetches, line by line."""

    def __init__(
        self,
        action: str,
        store: AdapterStore,
        folder: Path,
        manifest: Path,
        *rest: str,
        settings: str,
    ) -> None:
        script = Path(__file__).parent / "transfer_process.py"
        argv = [action, store.location.url, settings, str(folder), str(manifest), *rest]
        self.process = subprocess.Popen(
            [sys.executable, str(script), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        """Its next line; empty if it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        """Lets it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.close()

    def close(self) -> int:
        """Waits for its end; its exit code."""
        code = self.process.wait(END_DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        return code


@pytest.fixture
def transfer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Transfer]]:
    """Starts a process that transfers: action, store, folder, manifest, and perhaps "stop"."""
    started: list[Transfer] = []

    def start(
        action: str, store: AdapterStore, folder: Path, manifest: Manifest, *rest: str
    ) -> Transfer:
        path = tmp_path / f"manifest-{len(started)}.json"
        path.write_bytes(manifest.to_bytes())
        settings = LocationSettings()
        if store.location.folder is None:
            settings = request.getfixturevalue("s3").settings()
        fields = settings.model_dump()
        if settings.secret_access_key is not None:
            fields["secret_access_key"] = settings.secret_access_key.get_secret_value()
        started.append(Transfer(action, store, folder, path, *rest, settings=json.dumps(fields)))
        assert started[-1].hear() == "ready"
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()
