"""Workers as processes of their own: started, watched, restarted, ended.

Used by `server.py` for a gateway of more than one worker. A worker ends when its parent is gone,
however that died.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import socket
import struct
import time
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, NamedTuple

import uvloop

from serving.gateway.follower_thread import FollowerThread
from serving.gateway.metrics import NUM_COLUMNS
from serving.gateway.reload import POLL_S, Reloader
from serving.gateway.shared_table import SharedTable
from serving.gateway.worker import Worker
from serving.log_format import log_to_stderr
from serving.routing.published import decode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from serving.config import GatewayConfig
    from serving.config_file import ConfigSource
    from serving.gateway.reload import Reload

log = logging.getLogger(__name__)

_MIN_OPEN_FILES = 65_536
_RESTART_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
_HEALTHY_S = 60.0
"""A worker that lived this long is restarted without delay."""
_KILL_AFTER_S = 5.0
_SEND_S = 2
_WAKE_BYTES = 64
APPLIED = b"applied"
"""What a worker says once it goes by a snapshot."""
_SPAWN = multiprocessing.get_context("spawn")


def bind_shared(family: int, address: object) -> socket.socket:
    """A socket on an address that the other workers bind too; the kernel spreads connections.

    Raises:
        OSError: If the address cannot be bound.
    """
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(address)  # type: ignore[arg-type]  # an address as getaddrinfo gave it
    bound.setblocking(False)
    return bound


def raise_open_files() -> None:
    """10,000 streams need 20,000 descriptors; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else min(_MIN_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Start(NamedTuple):
    """What a worker is started with."""

    config: GatewayConfig
    metrics_dir: Path
    source: ConfigSource | None
    replica_indexes: tuple[int, ...]
    published: bytes | None = None


class _Process:
    """One worker's place: the process in it now, and when the next one may start.

    Attributes:
        start_with: What the next process gets.
        is_ready: Whether the first process in this place was ready once.
        owes_applied: Whether it has yet to say that it goes by the snapshot that it was given.
    """

    def __init__(self, start_with: _Start, index: int) -> None:
        self.start_with = start_with
        self._index = index
        self._failures = 0
        self._started_at = 0.0
        self._start_at = 0.0
        self.is_ready = False
        self.owes_applied = False
        self.start()

    def start(self) -> None:
        """Starts a process; it says `ready` through a pipe, and gets reloads and snapshots by it."""
        self.pipe, theirs = multiprocessing.Pipe()
        _bound_sends(self.pipe)
        self._process = _SPAWN.Process(target=_main, args=(self.start_with, self._index, theirs))
        self._process.start()
        theirs.close()
        self._started_at = time.monotonic()
        self._started_with = self.start_with.published
        self._takes_snapshots = False
        self.is_running = True

    def on_pipe(self) -> None:
        """The worker is ready, goes by a snapshot, or its end of the pipe closed because it died."""
        try:
            said = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self._died()
            return
        if said == APPLIED:
            self.owes_applied = False
            return
        self.is_ready = self._takes_snapshots = True
        newest = self.start_with.published
        if newest is not None and newest is not self._started_with:
            self.tell(newest)

    def give_snapshot(self, body: bytes) -> None:
        """Passes a snapshot on, to this process and to later ones.

        One that is still starting gets it when it is ready: nobody would read its pipe before.
        """
        self.start_with = self.start_with._replace(published=body)
        if self.is_running and self._takes_snapshots:
            self.owes_applied = True
            self.tell(body)

    def _died(self) -> None:
        self._process.join()
        self.pipe.close()
        self.is_running = False
        self.owes_applied = False
        lived_s = time.monotonic() - self._started_at
        delay_s = _RESTART_DELAYS_S[min(self._failures, len(_RESTART_DELAYS_S) - 1)]
        self._failures = 0 if lived_s > _HEALTHY_S else self._failures + 1
        self._start_at = time.monotonic() + delay_s
        log.error(
            "worker died",
            extra={"worker": self._index, "exit_code": self._process.exitcode, "delay_s": delay_s},
        )

    def tell(self, news: Reload | bytes) -> None:
        """Passes news on; a worker that does not take them is replaced by one that has them."""
        if not self.is_running:
            return
        try:
            self.pipe.send(news)
        except OSError:
            log.exception("worker takes no news, it is ended", extra={"worker": self._index})
            self._process.kill()

    def restart_if_due(self) -> None:
        """Puts a new process in the place of a dead one, after its delay."""
        if not self.is_running and time.monotonic() >= self._start_at:
            self.start()

    def terminate(self) -> None:
        """Asks for the drain."""
        if self.is_running:
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Waits until `deadline` (`time.monotonic()`), then kills."""
        if not self.is_running:
            return
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


class WorkerProcesses:
    """All workers of a gateway."""

    def __init__(
        self, config: GatewayConfig, metrics_dir: Path, source: ConfigSource | None = None
    ) -> None:
        self._config = config
        self._metrics_dir = metrics_dir
        self._source = source
        self._is_stopping = False
        self._reloader = None if source is None else Reloader(source, config, self._is_idle)
        self._next_poll_at = time.monotonic()
        self._follower: FollowerThread | None = None
        # What the first workers are started with is in effect in them.
        self._is_handing_on = True

    def run(self, on_ready: Callable[[], None]) -> None:
        """Runs the workers until SIGTERM or SIGINT, then lets them drain.

        Args:
            on_ready: Called once, when all of them accept connections.
        """
        woken, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        if self._reloader is not None:
            signal.signal(signal.SIGHUP, self._ask_reload)
        if self._config.control is not None:
            self._follower = FollowerThread(self._config, self._metrics_dir, waker)
        first = _Start(
            self._config,
            self._metrics_dir,
            self._source,
            tuple(range(len(self._config.replicas))),
            None if self._follower is None else self._follower.start(),
        )
        workers = [_Process(first, index) for index in range(self._config.workers)]
        was_ready = False
        while not self._is_stopping:
            running = {worker.pipe: worker for worker in workers if worker.is_running}
            for ready in wait([*running, woken], timeout=0.5):
                if isinstance(ready, Connection):
                    running[ready].on_pipe()
                else:
                    woken.recv(_WAKE_BYTES)
            self._hand_on(workers)
            self._reload(workers)
            for worker in workers:
                worker.restart_if_due()
            if not was_ready and all(worker.is_ready for worker in workers):
                was_ready = True
                on_ready()
        self._end(workers)
        if self._follower is not None:
            self._follower.stop()
        signal.set_wakeup_fd(-1)

    def _hand_on(self, workers: list[_Process]) -> None:
        """A new snapshot goes to all workers at once; it is in effect when the last one says so."""
        if self._follower is None:
            return
        body = self._follower.take()
        if body is not None:
            self._is_handing_on = True
            for worker in workers:
                worker.give_snapshot(body)
        if self._is_handing_on and not any(worker.owes_applied for worker in workers):
            self._is_handing_on = False
            self._follower.applied()

    def _stop(self, *_: object) -> None:
        self._is_stopping = True

    def _ask_reload(self, *_: object) -> None:
        if self._reloader is not None:
            self._reloader.ask()
            self._next_poll_at = 0.0

    def _reload(self, workers: list[_Process]) -> None:
        """Looks at the files once a second; a change goes to all workers, and to later ones."""
        reloader, now = self._reloader, time.monotonic()
        if reloader is None or now < self._next_poll_at:
            return
        self._next_poll_at = now + POLL_S
        reload = reloader.poll()
        if reload is None:
            return
        for worker in workers:
            worker.start_with = worker.start_with._replace(
                config=reloader.config, replica_indexes=reloader.indexes
            )
            worker.tell(reload)

    def _is_idle(self, replica_index: int) -> bool:
        tables = [
            SharedTable(self._metrics_dir / f"worker-{number}.f64", NUM_COLUMNS)
            for number in range(self._config.workers)
        ]
        is_idle = not any(table.outstanding_tokens[replica_index] for table in tables)
        for table in tables:
            table.close()
        return is_idle

    def _end(self, workers: list[_Process]) -> None:
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + self._config.timeouts.drain_s + _KILL_AFTER_S
        for worker in workers:
            worker.end(deadline)


def _bound_sends(pipe: Connection) -> None:
    """A worker that is stuck must not stop the process that would replace it."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))


def _main(start_with: _Start, index: int, parent: Connection) -> None:
    """A worker process."""
    log_to_stderr()
    config, source = start_with.config, start_with.source
    # Reloads are the parent's business, also where a terminal tells the whole group.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise_open_files()
    address = (config.listen.host, config.listen.port)
    family, _, _, _, resolved = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    listening = bind_shared(family, resolved)

    async def serve() -> None:
        worker = Worker(config, index, start_with.metrics_dir, start_with.replica_indexes)
        worker.stop_on_signals()
        loop = asyncio.get_running_loop()
        if start_with.published is not None:
            worker.take_published(decode(start_with.published))

        def on_parent() -> None:
            try:
                news = parent.recv()
            except (EOFError, OSError):
                loop.remove_reader(parent.fileno())
                worker.stop()
                return
            if isinstance(news, bytes):
                worker.take_published(decode(news))
                parent.send_bytes(APPLIED)
            elif source is not None:
                worker.apply(source, news)

        # The parent writes reloads and snapshots only; an end of the pipe means that it is gone.
        loop.add_reader(parent.fileno(), on_parent)
        await worker.serve(listening, lambda: parent.send_bytes(b"ready"))

    uvloop.run(serve())
