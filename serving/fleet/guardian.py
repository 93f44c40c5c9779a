"""Runs one command and ends it whole: the small parent that every supervised process has.

Owns: the command's life (its session, its log with a bounded size, its end with everything that
it started). Never: decides when to start or restart anything, and never signals a process that is
not its own descendant. Called by: `serving/fleet/process.py`, as
`python guardian.py LOG MAX_LOG_BYTES GRACE_S -- COMMAND...`.

It ends the command when it gets SIGTERM (after a grace) or SIGINT (at once), when the command's main process exits (what
that left running goes too), and when its standard input closes, which is how it learns that its
supervisor died, SIGKILL included. As a subreaper it inherits every orphan below it, so nothing
escapes by starting a session of its own; if it is killed itself, the kernel kills the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CHUNK_BYTES = 65_536
# After the main process is gone its helpers get SIGTERM and this long, then SIGKILL.
LEFTOVER_GRACE_S = 2.0
# A supervisor that died leaves nobody to wait for a long drain.
ORPHAN_GRACE_S = 5.0
KILL_DEADLINE_S = 10.0
# Python's resource tracker unlinks the shared memory of processes that were killed, then exits by
# itself: it goes last, or hundreds of MiB would stay behind in /dev/shm.
TRACKER = "multiprocessing.resource_tracker"
TRACKER_GRACE_S = 3.0


class BoundedLog:
    """A log file that is turned over once, so that two of its sizes are the most it takes."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._turn_over()

    def _turn_over(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.replace(self._path.with_suffix(".log.1"))
        self._file = self._path.open("wb", buffering=0)
        self._size_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append; a full disk loses the log, never the engine."""
        with contextlib.suppress(OSError):
            if self._size_bytes + len(chunk) > self._max_bytes:
                self._file.close()
                self._turn_over()
            self._size_bytes += self._file.write(chunk)


class Guardian:
    """One command, from its start to the end of its last descendant."""

    def __init__(self, log: BoundedLog, grace_s: float) -> None:
        self._log = log
        self._grace_s = grace_s
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        os.set_blocking(self._wake_read, False)
        self._end_s: float | None = None

    def run(self, argv: list[str]) -> int:
        """Run the command until it and all that it started are gone.

        Returns:
            Its exit code; 128 + N if signal N ended it.
        """
        signal.set_wakeup_fd(self._wake_write)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        _set_process_option(PR_SET_CHILD_SUBREAPER, 1)
        try:
            child = subprocess.Popen(  # noqa: S603 - what the supervisor was told to run
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # This process has one thread, so code between fork and exec is safe.
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            self._log.write(f"cannot start {argv[0]}: {error}\n".encode())
            return 127
        self._watch(child)
        self._end_leftovers()
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        output = child.stdout.fileno() if child.stdout else -1
        os.set_blocking(output, False)
        with selectors.DefaultSelector() as selector:
            for descriptor in (output, self._wake_read, sys.stdin.fileno()):
                selector.register(descriptor, selectors.EVENT_READ)
            while child.poll() is None:
                for key, _ in selector.select(self._timeout_s()):
                    if self._is_at_end(key.fd, child, output):
                        selector.unregister(key.fd)
                if self._end_s is not None and time.monotonic() >= self._end_s:
                    _signal_all(signal.SIGKILL, spare=TRACKER)
        self._drain(output)

    def _timeout_s(self) -> float:
        if self._end_s is None:
            return 60.0
        return min(1.0, max(0.01, self._end_s - time.monotonic()))

    def _is_at_end(self, descriptor: int, child: subprocess.Popen[bytes], output: int) -> bool:
        """Handle what a descriptor has; say whether it has no more."""
        chunk = _read(descriptor)
        if descriptor == output:
            self._log.write(chunk or b"")
        elif descriptor == self._wake_read:
            asked = set(chunk or b"")
            if signal.SIGINT in asked:
                self._begin_end(child, 0.0)
            elif signal.SIGTERM in asked or signal.SIGHUP in asked:
                self._begin_end(child, self._grace_s)
            _reap_orphans(child.pid)
            return False
        elif chunk == b"":
            self._begin_end(child, min(self._grace_s, ORPHAN_GRACE_S))
        return chunk == b""

    def _begin_end(self, child: subprocess.Popen[bytes], grace_s: float) -> None:
        # Only the main process is asked: engines take their own helpers down in order.
        end_s = time.monotonic() + grace_s
        if self._end_s is None:
            child.terminate()
        self._end_s = end_s if self._end_s is None else min(end_s, self._end_s)

    def _drain(self, output: int) -> None:
        while chunk := _read(output):
            self._log.write(chunk)

    def _end_leftovers(self) -> None:
        """End what the main process left; without a child left, a subreaper has no descendant."""
        is_late = self._end_s is not None and time.monotonic() >= self._end_s
        _signal_all(signal.SIGKILL if is_late else signal.SIGTERM, spare=TRACKER)
        kill_s = time.monotonic() + LEFTOVER_GRACE_S
        while _has_children() and time.monotonic() < kill_s + KILL_DEADLINE_S:
            if time.monotonic() >= kill_s:
                is_last = time.monotonic() >= kill_s + TRACKER_GRACE_S
                _signal_all(signal.SIGKILL, spare="" if is_last else TRACKER)
            select.select([self._wake_read], [], [], 0.05)
            _read(self._wake_read)


def _signal_all(number: signal.Signals, spare: str = "") -> None:
    """Signal every descendant, except those whose command line holds some text."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not spare or spare not in " ".join(process.cmdline()):
                process.send_signal(number)


def _has_children() -> bool:
    """Collect the children that ended; say whether any is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _reap_orphans(main_pid: int) -> None:
    """Collect the orphans that ended; the main process is left to its own handle."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.pid != main_pid and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


def _read(descriptor: int) -> bytes | None:
    """Read what there is: `b""` at the end, None if there is nothing yet."""
    try:
        return os.read(descriptor, CHUNK_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _die_with_parent() -> None:
    _set_process_option(PR_SET_PDEATHSIG, signal.SIGKILL)


def _set_process_option(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def main(arguments: list[str]) -> int:
    """Run `LOG MAX_LOG_BYTES GRACE_S -- COMMAND...`; return the command's exit code."""
    log, max_log_bytes, grace_s, separator, *argv = arguments
    if separator != "--" or not argv:
        sys.stderr.write("usage: guardian.py LOG MAX_LOG_BYTES GRACE_S -- COMMAND...\n")
        return 2
    return Guardian(BoundedLog(Path(log), int(max_log_bytes)), float(grace_s)).run(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
