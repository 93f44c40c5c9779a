"""Runs pip and other commands for the installer, with progress a user can read.

Owns: a step's line on the terminal, pip's log, the deadline and the one-line error. Never: decides
what is installed. Called by: `deploy/install.py` and `deploy/lock.py`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import Self

PIP_DEADLINE_S = 3600.0
LOG_NAME = "headrace-install.log"


class InstallError(Exception):
    """What went wrong and what to do about it, in one line."""


def run_quietly(
    argv: Sequence[str], deadline_s: float, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with its output captured; a deadline missed is an exit code."""
    try:
        return subprocess.run(  # noqa: S603 - argv from here, no shell
            list(argv), capture_output=True, text=True, timeout=deadline_s, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(list(argv), 124, "", f"no answer within {deadline_s} s")
    except OSError as error:
        return subprocess.CompletedProcess(list(argv), 127, "", str(error))


class Step:
    """One line of progress: what is being done, what pip is at, how long it took."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started_s = time.monotonic()
        self.live = sys.stdout.isatty()

    def __enter__(self) -> Self:
        self._write(f"  {self.title} ...", end="" if self.live else "\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        took_s = time.monotonic() - self.started_s
        outcome = f"done in {took_s:.0f} s" if kind is None else "failed"
        self._write(f"{self._start()}  {self.title}: {outcome}")

    def note(self, detail: str) -> None:
        """Show on a terminal what the step is at."""
        if self.live:
            self._write(f"{self._start()}  {self.title} ... {detail[:60]}", end="")

    def _start(self) -> str:
        return "\r\x1b[2K" if self.live else ""

    def _write(self, text: str, end: str = "\n") -> None:
        sys.stdout.write(text + end)
        sys.stdout.flush()


def pip(venv: Path, title: str, *arguments: str) -> None:
    """Run the environment's pip with progress; its whole output goes to the environment's log.

    Raises:
        InstallError: if pip fails, with its own last error line.
    """
    argv = [str(venv / "bin" / "python"), "-m", "pip", "--no-input", *arguments]
    argv += ["--disable-pip-version-check", "--progress-bar", "off"][
        : 3 if "install" in argv else 1
    ]
    last_error = ""
    with Step(title) as step, (venv / LOG_NAME).open("a") as log:
        log.write(f"$ pip {' '.join(arguments)}\n")
        process = subprocess.Popen(  # noqa: S603 - argv from here, no shell
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        with process, ending(process):
            for line in process.stdout or ():
                log.write(line)
                if line.startswith(
                    ("Collecting ", "Downloading ", "Installing ", "  Downloading ")
                ):
                    step.note(line.strip())
                if line.startswith("ERROR:"):
                    last_error = line.removeprefix("ERROR:").strip()
                if time.monotonic() - step.started_s > PIP_DEADLINE_S:
                    last_error = f"no end within {PIP_DEADLINE_S:.0f} s"
                    break
        if process.returncode != 0:
            msg = (
                f"pip failed: {last_error or f'exit code {process.returncode}'}"
                f" (whole output: {venv / LOG_NAME}); check the network or the index, then run"
                " `make install` again"
            )
            raise InstallError(msg)


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process that is still running when its reader leaves early."""
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        if process.stdout is not None and not process.stdout.closed and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
            process.kill()


def say(line: str) -> None:
    """Print one line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
