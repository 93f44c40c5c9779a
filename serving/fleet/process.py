"""One supervised process: started, awaited, restarted with growing delays, ended whole.

Owns: the states of a process and its guardian (`serving/fleet/guardian.py`), which keeps its log
and ends it with everything below it. Never: decides what to run, or touches a process that it did
not start. Called by: `serving/fleet/processes.py`, which runs many of these.

    starting --ready--> ready --exit--> waiting --delay--> starting
        |                                  ^
        +--exit or deadline----------------+--too many starts in a row that failed--> failed
    any --stop--> stopping --> stopped
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.engines.launch import LaunchCommand
    from serving.fleet.readiness import Readiness

GUARDIAN = Path(__file__).with_name("guardian.py")
MAX_LOG_BYTES = 16 * 1024 * 1024
READY_POLL_S = 0.25
# What a guardian needs beyond the grace of its command to kill and collect the rest.
GUARDIAN_MARGIN_S = 15.0


class State(StrEnum):
    """Where a process is in its life."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    """Down, to be started again after a delay."""
    FAILED = "failed"
    """Given up: it never became ready in several starts in a row."""
    STOPPING = "stopping"
    STOPPED = "stopped"


class RestartPolicy(Settings):
    """When a process that went down is started again."""

    first_delay_s: float = Field(default=1.0, gt=0.0)
    """Delay after the first failure; it doubles with each further one."""
    max_delay_s: float = Field(default=60.0, gt=0.0)
    stable_after_s: float = Field(default=60.0, gt=0.0)
    """Being ready for so long makes earlier failures count no more."""
    max_failed_starts: int = Field(default=5, ge=1)
    """Starts in a row without becoming ready after which it is given up."""
    max_first_starts: int = Field(default=2, ge=1)
    """The same for a process that has never been ready: its settings are likely wrong."""

    def delay_s(self, num_failures: int) -> float:
        """Return the delay in seconds after so many failures in a row (1 or more)."""
        doublings = min(num_failures - 1, 32)
        return float(min(self.max_delay_s, self.first_delay_s * 2**doublings))


DEFAULT_POLICY = RestartPolicy()


@dataclass(frozen=True)
class ProcessSpec:
    """What to run and how to tell that it runs."""

    name: str
    command: LaunchCommand
    readiness: Readiness
    log: Path
    start_deadline_s: float
    """For one start to become ready, in seconds."""
    grace_s: float
    """From SIGTERM to SIGKILL, in seconds."""
    policy: RestartPolicy = DEFAULT_POLICY


@dataclass(frozen=True)
class ProcessStatus:
    """What is known of a process now."""

    name: str
    state: State
    pid: int | None
    """Its guardian's process id."""
    num_starts: int
    since_s: float
    """Unix time of the last change."""
    reason: str = ""
    log: str = ""


class SupervisedProcess:
    """One process of `ProcessSpec`, kept up until it is stopped."""

    def __init__(self, spec: ProcessSpec, on_change: Callable[[ProcessStatus], None]) -> None:
        self.spec = spec
        self._on_change = on_change
        self._stop_asked = False
        self._wake = asyncio.Event()
        self._num_starts = 0
        self._num_failures = 0
        self._num_failed_starts = 0
        self._was_ready = False
        self._guardian: asyncio.subprocess.Process | None = None
        self.status = self._status(State.STOPPED, "not started")

    def stop(self) -> None:
        """Ask it to end; `run` returns when it is gone."""
        self._stop_asked = True
        self._wake.set()

    def kill(self) -> None:
        """End it at once, with all that it started."""
        self.stop()
        self._signal(signal.SIGINT)

    async def run(self) -> None:
        """Keep the process up until `stop` is called or it is given up.

        Cancellation: ends the process whole, then goes on.
        Resources: one guardian process and one pipe, both gone on return.
        """
        while not self._stop_asked:
            reason, ready_for_s = await self._run_once()
            if self._is_stopping():
                break
            self._count(ready_for_s)
            if self._is_given_up():
                self._set(State.FAILED, reason)
                return
            await self._wait_before_restart(reason)
        self._set(State.STOPPED, "")

    def _count(self, ready_for_s: float | None) -> None:
        if ready_for_s is None:
            self._num_failed_starts += 1
        else:
            self._num_failed_starts = 0
            self._was_ready = True
            if ready_for_s >= self.spec.policy.stable_after_s:
                self._num_failures = 0
        self._num_failures += 1

    def _is_given_up(self) -> bool:
        policy = self.spec.policy
        allowed = policy.max_failed_starts if self._was_ready else policy.max_first_starts
        return self._num_failed_starts >= allowed

    def _is_stopping(self) -> bool:
        return self._stop_asked

    async def _wait_before_restart(self, reason: str) -> None:
        delay_s = self.spec.policy.delay_s(self._num_failures)
        self._set(State.WAITING, f"{reason}; starting again in {delay_s:.0f} s")
        await self._sleep(delay_s)

    async def _run_once(self) -> tuple[str, float | None]:
        """Start it and follow it to its end.

        Returns:
            Why it ended, and for how many seconds it had been ready (None: never).
        """
        self._num_starts += 1
        self._wake.clear()
        if self._stop_asked:
            return "stopped", None
        guardian = await self._spawn()
        self._set(State.STARTING, "")
        ready_s: float | None = None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch(guardian))
            try:
                reason = await self._until_ready(guardian)
                if not reason:
                    ready_s = time.monotonic()
                    self._set(State.READY, "")
                    reason = await self._until_gone(guardian)
                ready_for_s = None if ready_s is None else time.monotonic() - ready_s
            finally:
                await self._end(guardian)
        return reason, ready_for_s

    async def _spawn(self) -> asyncio.subprocess.Process:
        spec = self.spec
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, str(GUARDIAN), str(spec.log), str(MAX_LOG_BYTES)]
        argv += [str(spec.grace_s), "--", *spec.command.argv]
        self._guardian = await asyncio.create_subprocess_exec(
            *argv,
            # The guardian takes the closing of this pipe as our death.
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=dict(spec.command.env),
            start_new_session=True,
        )
        return self._guardian

    async def _watch(self, guardian: asyncio.subprocess.Process) -> None:
        await guardian.wait()
        self._wake.set()

    async def _until_ready(self, guardian: asyncio.subprocess.Process) -> str:
        """Wait until the process is ready; return what kept it from that, empty for nothing."""
        end_s = time.monotonic() + self.spec.start_deadline_s
        while guardian.returncode is None and not self._stop_asked:
            # An answer counts only from a process that is still there: another could have its port.
            if await self.spec.readiness.is_ready() and guardian.returncode is None:
                return ""
            if time.monotonic() > end_s:
                return f"not ready within {self.spec.start_deadline_s:.0f} s"
            await self._sleep(READY_POLL_S)
        return "stopped" if self._stop_asked else self._describe_exit(guardian)

    async def _until_gone(self, guardian: asyncio.subprocess.Process) -> str:
        while guardian.returncode is None and not self._stop_asked:
            # No deadline: this is the process serving.
            await self._wake.wait()
            self._wake.clear()
        return "stopped" if self._stop_asked else self._describe_exit(guardian)

    async def _end(self, guardian: asyncio.subprocess.Process) -> None:
        """End the process whole, with a deadline, and close its pipe."""
        if guardian.returncode is None:
            self._set(State.STOPPING, "")
            steps = (
                (signal.SIGTERM, self.spec.grace_s + GUARDIAN_MARGIN_S),
                (signal.SIGINT, GUARDIAN_MARGIN_S),
                (signal.SIGKILL, GUARDIAN_MARGIN_S),
            )
            for number, deadline_s in steps:
                self._signal(number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(deadline_s):
                        await guardian.wait()
                    break
        if guardian.stdin is not None:
            guardian.stdin.close()
        self._guardian = None

    def _signal(self, number: signal.Signals) -> None:
        if self._guardian is not None and self._guardian.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._guardian.send_signal(number)

    async def _sleep(self, seconds: float) -> None:
        """Sleep until a time, the process's end or `stop`, whichever is first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _describe_exit(self, guardian: asyncio.subprocess.Process) -> str:
        code = guardian.returncode or 0
        if code < 0 or code > 128:
            number = -code if code < 0 else code - 128
            return f"ended by signal {number}"
        return f"exited with code {code}"

    def _set(self, state: State, reason: str) -> None:
        self.status = self._status(state, reason)
        self._on_change(self.status)

    def _status(self, state: State, reason: str) -> ProcessStatus:
        return ProcessStatus(
            name=self.spec.name,
            state=state,
            pid=self._guardian.pid if self._guardian else None,
            num_starts=self._num_starts,
            since_s=time.time(),
            reason=reason,
            log=str(self.spec.log),
        )
