"""Writes `locks/NAME.txt`: the exact versions that `deploy/install.py` installs (`make lock`).

Owns: the lock files. Never: installs anything into the project's environment, or writes an index's
address into a lock. Called by: `make lock`, when a dependency in pyproject.toml changes.

A lock is a pip constraints file. Local version labels (`+cpu`) are left out, so that one lock
holds for whichever build of a version an index has.
"""

from __future__ import annotations

import json
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from install import ROOT, check_python
from pip_runner import PIP_DEADLINE_S, InstallError, run_quietly, say

if TYPE_CHECKING:
    from collections.abc import Sequence

# What each lock resolves together. The engines for GPUs exclude one another and the CPU engine.
LOCKED_EXTRAS: dict[str, tuple[str, ...]] = {
    "engine-cpu": ("engine-cpu", "control", "train", "ray"),
    "vllm": ("vllm", "control"),
}
HEADER = "# Written by `make lock` from pyproject.toml: do not edit.\n"


def requirements(project: dict[str, Any], extras: Sequence[str]) -> list[str]:
    """Return the project's direct requirements with some extras and the dev group."""
    table = project["project"]
    found: list[str] = list(table["dependencies"])
    for extra in extras:
        found += table["optional-dependencies"][extra]
    return found + list(project["dependency-groups"]["dev"])


def lines_of(report: dict[str, Any]) -> list[str]:
    """Return `name==version` for each package of pip's report, sorted, without local labels."""
    pairs = (
        (item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"])
        for item in report["install"]
    )
    return sorted(f"{name}=={version.partition('+')[0]}" for name, version in pairs)


def resolve(venv: Path, wanted: Sequence[str]) -> list[str]:
    """Resolve requirements in an empty environment.

    Raises:
        InstallError: if pip cannot.
    """
    report = venv / "report.json"
    argv = [str(venv / "bin" / "python"), "-m", "pip", "install", "--dry-run", "--quiet"]
    argv += ["--ignore-installed", "--report", str(report), *wanted]
    answer = run_quietly(argv, deadline_s=PIP_DEADLINE_S)
    if answer.returncode != 0:
        errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR:")]
        msg = f"pip cannot resolve the requirements: {errors[-1] if errors else answer.stderr}"
        raise InstallError(msg)
    return lines_of(json.loads(report.read_text()))


def main() -> int:
    """Write every lock; return the process's exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    try:
        check_python()
        with tempfile.TemporaryDirectory() as folder:
            venv = Path(folder) / "venv"
            made = run_quietly([sys.executable, "-m", "venv", str(venv)], deadline_s=300.0)
            if made.returncode != 0:
                msg = f"cannot make a virtual environment: {made.stderr.strip()}"
                raise InstallError(msg)
            for name, extras in LOCKED_EXTRAS.items():
                lines = resolve(venv, requirements(project, extras))
                path = ROOT / "locks" / f"{name}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(HEADER + "\n".join(lines) + "\n")
                say(f"locks/{name}.txt: {len(lines)} packages")
    except InstallError as error:
        sys.stderr.write(f"lock: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
