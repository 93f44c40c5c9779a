"""A child process pinned to one core, with a log file, ended with all its children.

Owns starting, waiting until it answers, and stopping; never knows what it runs. Used for the
engines, the proxies and the load generator alike.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

_POLL_S = 0.05
_STOP_S = 10.0
# Below Linux's usual range for outgoing connections, which could take a port first.
_PORTS = (18_000, 30_000)
_LOG_TAIL_CHARS = 2000


class StartError(Exception):
    """A process ended or stayed silent when it should have become ready."""


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on.

    Raises:
        StartError: If none is found.
    """
    for _ in range(200):
        port = random.randint(*_PORTS)  # noqa: S311
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise StartError(f"no free port between {_PORTS[0]} and {_PORTS[1]}")


def answers(port: int, path: str, timeout_s: float = 2.0) -> bool:
    """Whether `GET path` on the loopback interface is answered with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def popen_on_core(
    argv: Sequence[str],
    core: int,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a process whose threads and children run on one core only.

    Args:
        argv: Command.
        core: Index of the core.
        stdout: File descriptor or a constant of `subprocess`.
        stderr: The same.
        env: Variables to add to this process's own.
    """
    before = os.sched_getaffinity(0)
    # Affinity is inherited: set here, no thread of the child can begin elsewhere.
    os.sched_setaffinity(0, {core})
    try:
        return subprocess.Popen(  # noqa: S603
            argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(env or {})},
        )
    finally:
        os.sched_setaffinity(0, before)


class PinnedProcess:
    """A server on one core. A context manager: leaving it ends the whole process tree."""

    def __init__(
        self, argv: Sequence[str], core: int, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self._argv = list(argv)
        self._log = log
        with log.open("wb") as file:
            self._process = popen_on_core(argv, core, file.fileno(), subprocess.STDOUT, env)

    @property
    def pid(self) -> int:
        """Id of the process that was started; it may have children."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_until_ready(self, port: int, path: str, deadline_s: float) -> None:
        """Waits until `GET path` is answered with 200.

        Args:
            port: Port of the loopback interface.
            path: Path to ask for.
            deadline_s: Longest wait, in seconds.

        Raises:
            StartError: With the end of the log, if that does not happen in time.
        """
        end_s = time.monotonic() + deadline_s
        while not answers(port, path):
            code = self._process.poll()
            if code is not None:
                raise StartError(self._complaint(f"ended with code {code}"))
            if time.monotonic() > end_s:
                raise StartError(self._complaint(f"not ready after {deadline_s:.0f} s"))
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Ends the process and its children: SIGTERM, then SIGKILL."""
        if self._process.poll() is not None:
            return
        tree = psutil.Process(self.pid).children(recursive=True)
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_S)
        _, alive = psutil.wait_procs(tree, timeout=1.0)
        for child in alive:
            child.kill()
        psutil.wait_procs(alive, timeout=_STOP_S)

    def _complaint(self, what: str) -> str:
        tail = self._log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]
        return f"{' '.join(self._argv)}: {what}. Its log ({self._log}) ends:\n{tail}"
