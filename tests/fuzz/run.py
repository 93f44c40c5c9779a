"""Runs the fuzz targets under atheris: `python tests/fuzz/run.py --seconds 180`.

Needs atheris in the environment (`pip install atheris`), which nothing else does. One process a
target; it begins with the corpus kept here. Exits with 1 on a finding and says where the input is.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
TARGETS = ("fuzz_request", "fuzz_response", "fuzz_events")
MAX_INPUT_BYTES = 4096
_STARTUP_S = 120


def fuzz(target: str, flags: list[str]) -> None:
    """Becomes the fuzzing process of one target; does not return."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["serving"]):
        module = importlib.import_module(target)
    atheris.Setup([target, *flags], module.check)
    atheris.Fuzz()


def run_target(target: str, seconds: int, work: Path) -> bool:
    """Fuzzes one target in a process of its own.

    Args:
        target: Name of its module.
        seconds: How long.
        work: For new inputs and findings.

    Returns:
        Whether nothing was found.
    """
    found = work / target
    found.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "run.py"), "--target", target]
    command += [str(found), str(CORPUS / target), f"-artifact_prefix={work}/{target}-"]
    command += [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", "-timeout=10"]
    # More than this would be held by no well-behaved input of that length.
    command += ["-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(command, env=environment, timeout=seconds + _STARTUP_S, check=False)
    return done.returncode == 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=180, help="for each target")
    parser.add_argument("--only", choices=TARGETS, action="append", help="run these targets only")
    parser.add_argument("--work", type=Path, help="folder for new inputs; else one that is deleted")
    parser.add_argument("--target", choices=TARGETS, help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args()
    if options.target:
        fuzz(options.target, flags)
        return
    if flags:
        parser.error(f"unknown arguments: {' '.join(flags)}")
    work = options.work or Path(tempfile.mkdtemp(prefix="headrace-fuzz-"))
    wrong = [
        target
        for target in options.only or TARGETS
        if not run_target(target, options.seconds, work)
    ]
    if wrong:
        raise SystemExit(f"findings in {', '.join(wrong)}; the inputs are in {work}")


if __name__ == "__main__":
    main()
