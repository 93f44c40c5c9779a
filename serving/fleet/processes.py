"""All processes of one platform on this machine, and the file that says how they are.

Owns: the tasks that keep the processes up, and `STATE_DIR/processes.json`. Never: decides what
runs. Called by: `serving/fleet/local_platform.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Self

from serving.errors import ConfigError
from serving.fleet.process import ProcessSpec, ProcessStatus, State, SupervisedProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

STATE_FILE = "processes.json"
LOCK_FILE = "up.lock"
LOG_TAIL_BYTES = 16_384


class Processes:
    """Supervised processes by name; leaving the context ends them all.

    Use as an async context manager: its task group owns one task a process.
    """

    def __init__(self, state_dir: Path, on_change: Callable[[ProcessStatus], None]) -> None:
        """Prepare; nothing starts yet.

        Args:
            state_dir: where the state file goes.
            on_change: called in the event loop with each new status.
        """
        self._state_dir = state_dir
        self._on_change = on_change
        self._processes: dict[str, SupervisedProcess] = {}
        self._done: dict[str, asyncio.Event] = {}
        self._news = asyncio.Event()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            process.stop()
        await self._group.__aexit__(kind, error, trace)

    def start(self, spec: ProcessSpec) -> None:
        """Start a process and keep it up."""
        process = SupervisedProcess(spec, self._note)
        self._processes[spec.name] = process
        self._done[spec.name] = asyncio.Event()
        self._group.create_task(self._keep(process))

    async def _keep(self, process: SupervisedProcess) -> None:
        try:
            await process.run()
        finally:
            self._done[process.spec.name].set()

    async def stop(self, names: Iterable[str]) -> None:
        """End some processes, all at the same time, and wait until they are gone.

        Each has its own deadline (its grace and the guardian's margin), so this wait ends too.
        """
        chosen = [name for name in names if name in self._processes]
        for name in chosen:
            self._processes[name].stop()
        for name in chosen:
            await self._done[name].wait()

    def kill(self) -> None:
        """End every process at once, without its grace."""
        for process in self._processes.values():
            process.kill()

    def statuses(self) -> list[ProcessStatus]:
        """Return how each process is now."""
        return [process.status for process in self._processes.values()]

    async def until(self, wanted: Callable[[list[ProcessStatus]], bool]) -> list[ProcessStatus]:
        """Wait until the statuses are as wanted; whoever calls sets the deadline."""
        while not wanted(self.statuses()):
            self._news.clear()
            await self._news.wait()
        return self.statuses()

    def poke(self) -> None:
        """Have `until` look again, because something else that it asks for changed."""
        self._news.set()

    def _note(self, status: ProcessStatus) -> None:
        write_atomically(
            self._state_dir / STATE_FILE,
            json.dumps({each.name: asdict(each) for each in self._with(status)}, indent=1) + "\n",
        )
        self._on_change(status)
        self._news.set()

    def _with(self, status: ProcessStatus) -> list[ProcessStatus]:
        return [status if each.name == status.name else each for each in self.statuses()]


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


@contextlib.contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """Hold a state folder for one platform; the lock dies with its holder.

    Raises:
        ConfigError: if another one has it, or it cannot be written.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / LOCK_FILE).open("a+")
    except OSError as error:
        msg = f"cannot write to {state_dir}: {error.strerror}; set HEADRACE_STATE_DIR"
        raise ConfigError(msg) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            msg = (
                f"another headrace (pid {lock.read().strip() or 'unknown'}) runs with {state_dir}:"
                " end it, or set HEADRACE_STATE_DIR and --listen to start one beside it"
            )
            raise ConfigError(msg) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_down_for_good(status: ProcessStatus) -> bool:
    """Say whether a process will not come up again by itself."""
    return status.state in (State.FAILED, State.STOPPED)


def log_tail(log: Path, max_lines: int) -> list[str]:
    """Return the last lines that a process wrote that are not blank."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - LOG_TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-max_lines:]
