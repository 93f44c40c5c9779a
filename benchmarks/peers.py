"""The proxies that are compared: how each is installed, started and asked whether it is ready.

One class a proxy. Each is set up for its least cost: one worker, the plainest policy, no log of
requests. Never measures. Called by `benchmarks/gateway_cost.py`.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from benchmarks.pinned import PinnedProcess, StartError, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PEER_NAMES = ("headrace", "sglang-router", "vllm-router", "haproxy")
API_KEY = "sk-headrace-benchmark"
_READY_S = 90.0
_INSTALL_S = 900.0

_HAPROXY_CONFIG = """\
global
    nbthread 1
    maxconn 4000
defaults
    mode http
    option http-keep-alive
    # Without this HAProxy corks small chunks (MSG_MORE), and events wait for the ones after them.
    option http-no-delay
    http-reuse always
    timeout connect 5s
    timeout client 600s
    timeout server 600s
frontend clients
    bind 127.0.0.1:{port}
    monitor-uri /haproxy-ready
    default_backend engines
backend engines
    balance leastconn
{servers}
"""


_VERSION_CODE = """
from importlib.metadata import version
from platform import python_version
print(f"{version('headrace')} on Python {python_version()}")
"""


class PeerError(Exception):
    """A proxy cannot be measured here; the message says what to do."""


class Peer(ABC):
    """One proxy."""

    name: str
    ready_path: str
    env: Mapping[str, str] = {}

    def prepare(self) -> None:  # noqa: B027
        """Installs what is missing.

        Raises:
            PeerError: If that is not possible.
        """

    @abstractmethod
    def version(self) -> str:
        """Version of what will be started."""

    @abstractmethod
    def argv(self, port: int, engines: Sequence[tuple[str, int]], folder: Path) -> list[str]:
        """Command that serves on `port` over `engines`; may write files to `folder`."""

    def start(
        self, engines: Sequence[tuple[str, int]], core: int, folder: Path
    ) -> tuple[PinnedProcess, int]:
        """Starts the proxy on one core and waits until it serves.

        Args:
            engines: Host and port of each engine.
            core: Core that it is pinned to.
            folder: For its log and its files.

        Returns:
            The process and the port that it listens on.

        Raises:
            StartError: If it does not become ready.
        """
        port = free_port()
        command = self.argv(port, engines, folder)
        process = PinnedProcess(command, core, folder / f"{self.name}.log", self.env)
        try:
            process.wait_until_ready(port, self.ready_path, _READY_S)
        except StartError:
            process.stop()
            raise
        return process, port


class Headrace(Peer):
    """Our gateway, with API keys and metrics on."""

    name = "headrace"
    ready_path = "/readyz"

    def __init__(self, python: Path | None) -> None:
        self._python = str(python or sys.executable)

    def version(self) -> str:
        """Version of the installed distribution, and of the Python that runs it."""
        done = subprocess.run(  # noqa: S603
            [self._python, "-c", _VERSION_CODE], capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise PeerError(
                f"{self._python} does not have headrace: make install, or pip install -e ."
            )
        return done.stdout.strip()

    def argv(self, port: int, engines: Sequence[tuple[str, int]], folder: Path) -> list[str]:
        """Command of our gateway; writes the key file."""
        digest = hashlib.sha256(API_KEY.encode()).hexdigest()
        keys = folder / "headrace-keys"
        keys.write_text(f"benchmark sha256:{digest}\n")
        command = [self._python, "-m", "serving.cli.main", "gateway"]
        command += ["--listen", f"127.0.0.1:{port}", "--api-key-file", str(keys)]
        for host, engine_port in engines:
            command += ["--replica", f"vllm=http://{host}:{engine_port}"]
        return command


class PypiRouter(Peer):
    """A router from PyPI in a virtual environment of its own."""

    distribution_version: str
    module: str
    extra_flags: tuple[str, ...] = ()
    quiet_level: str
    """Log level that leaves its line for each request out."""
    ready_path = "/health"
    # Tokio takes a thread for each core it may use; one core, one thread.
    env: Mapping[str, str] = {"TOKIO_WORKER_THREADS": "1"}

    def __init__(self, cache: Path, python: Path | None, *, logs: bool) -> None:
        self._logs = logs
        folder = cache / f"{self.name}-{self.distribution_version}"
        self._folder = None if python else folder
        self._python = python or folder / "bin" / "python"

    def prepare(self) -> None:
        """Makes the environment once; a run that was cut off before is done again."""
        if self._folder is None or (self._folder / "complete").exists():
            return
        venv.create(self._folder, clear=True, with_pip=True)
        requirement = f"{self.name}=={self.distribution_version}"
        command = [str(self._python), "-m", "pip", "install", "--quiet", requirement]
        try:
            subprocess.run(command, check=True, timeout=_INSTALL_S)  # noqa: S603
        except (subprocess.SubprocessError, OSError) as error:
            raise PeerError(
                f"{requirement} could not be installed ({error}). Check pip's index, or name a "
                f"Python that has it with --{self.name.partition('-')[0]}-python."
            ) from error
        (self._folder / "complete").touch()

    def version(self) -> str:
        """Version that the environment has."""
        code = f"from importlib.metadata import version; print(version({self.name!r}))"
        command = [str(self._python), "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # noqa: S603
        if done.returncode:
            raise PeerError(f"{self._python} does not have {self.name}")
        return done.stdout.strip()

    def argv(self, port: int, engines: Sequence[tuple[str, int]], folder: Path) -> list[str]:
        """Command of the router."""
        urls = [f"http://{host}:{engine_port}" for host, engine_port in engines]
        command = [str(self._python), "-m", self.module, "--worker-urls", *urls]
        command += ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        command += ["--worker-startup-check-interval", "1", *self.extra_flags]
        return command if self._logs else [*command, "--log-level", self.quiet_level]


class SglangRouter(PypiRouter):
    """SGLang's router."""

    name = "sglang-router"
    distribution_version = "0.3.2"
    module = "sglang_router.launch_router"
    extra_flags: tuple[str, ...] = ("--shutdown-grace-period-secs", "1")
    quiet_level = "warn"


class VllmRouter(PypiRouter):
    """vLLM's router."""

    name = "vllm-router"
    distribution_version = "0.1.17"
    module = "vllm_router.launch_router"
    quiet_level = "warning"


class Haproxy(Peer):
    """HAProxy: what relaying costs in C with nothing of an LLM gateway."""

    name = "haproxy"
    ready_path = "/haproxy-ready"

    def __init__(self) -> None:
        # Debian puts it where only root's path looks.
        self._path = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")

    def prepare(self) -> None:
        """Checks that it is installed."""
        if self._path is None:
            raise PeerError(
                "haproxy is missing: apt-get install haproxy, or leave it out of --only"
            )

    def version(self) -> str:
        """Version that it prints."""
        command = [str(self._path), "-v"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)  # noqa: S603
        return done.stdout.split()[2]

    def argv(self, port: int, engines: Sequence[tuple[str, int]], folder: Path) -> list[str]:
        """Command of HAProxy; writes its configuration."""
        servers = "\n".join(
            f"    server engine{index} {host}:{engine_port}"
            for index, (host, engine_port) in enumerate(engines)
        )
        config = folder / "haproxy.cfg"
        config.write_text(_HAPROXY_CONFIG.format(port=port, servers=servers))
        return [str(self._path), "-db", "-f", str(config)]


def build_peer(
    name: str, cache: Path, pythons: Mapping[str, Path], *, router_logs: bool = False
) -> Peer:
    """The proxy of that name.

    Args:
        name: One of `PEER_NAMES`.
        cache: Folder for environments that are made.
        pythons: Interpreters that already have a router, by its name.
        router_logs: Whether the routers log each request, as they do unless told otherwise.

    Raises:
        PeerError: If there is no such proxy.
    """
    if name == "headrace":
        return Headrace(pythons.get(name))
    if name == "sglang-router":
        return SglangRouter(cache, pythons.get(name), logs=router_logs)
    if name == "vllm-router":
        return VllmRouter(cache, pythons.get(name), logs=router_logs)
    if name == "haproxy":
        return Haproxy()
    raise PeerError(f"{name}: not a proxy of this benchmark ({', '.join(PEER_NAMES)})")
