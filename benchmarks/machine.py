"""Where and with what a result was measured.

Reads the machine and the repository; never measures. Every benchmark puts this into its results.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

_REPOSITORY = Path(__file__).resolve().parent.parent
_LIBRARIES = ("uvloop", "httptools", "msgspec", "prometheus-client")
_GIT_S = 10.0


class Provenance(msgspec.Struct, frozen=True):
    """What has to be known to judge or repeat a result."""

    measured_at: str
    """UTC, ISO 8601."""
    command: str
    commit: str
    """Commit of the repository; ends in `+changes` if files differ from it."""
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    hypervisor: bool
    """Whether the machine is a virtual one, where waking a sleeping core costs more."""
    python: str
    libraries: dict[str, str]


def _cpu_lines() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=_GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """Commit of the repository that this file is in, or `unknown`."""
    found = _git("rev-parse", "HEAD")
    if not found:
        return "unknown"
    return f"{found}+changes" if _git("status", "--porcelain") else found


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "missing"


def provenance(module: str) -> Provenance:
    """Describes this machine and this run.

    Args:
        module: Name of the benchmark's module, for the command line.
    """
    cpu = _cpu_lines()
    return Provenance(
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["python", "-m", module, *sys.argv[1:]]),
        commit=commit(),
        cpu=cpu.get("model name", platform.processor()),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        hypervisor="hypervisor" in cpu.get("flags", "").split(),
        python=platform.python_version(),
        libraries={library: _version(library) for library in _LIBRARIES},
    )
