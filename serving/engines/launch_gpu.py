"""The command lines of the engines that run on NVIDIA GPUs only: SGLang and TensorRT-LLM.

Pure, as `launch.py`, whose options they share. Neither can be started on a machine without a GPU, so
what these flags do has been read in the engines' sources and not tried.

Sources: SGLang 0.5.23, `sglang/srt/arg_groups`; TensorRT-LLM, `tensorrt_llm/commands/serve.py` and
`docs/source/features/lora.md`.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from serving.engines.launch import GpuPlacement, LaunchCommand
from serving.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.engines.launch import EngineOptions

_SGLANG_MODULE = "sglang.launch_server"


def sglang_command(
    options: EngineOptions, base_env: Mapping[str, str], python: str = sys.executable
) -> LaunchCommand:
    """The command that starts one SGLang.

    Metrics are off by default there, and LoRA wants rank and target modules named when no adapter is
    given at the start.

    Args:
        options: What to serve, where.
        base_env: The environment to start from.
        python: Interpreter that has SGLang.

    Raises:
        ConfigError: If the placement has no GPU.
    """
    placement = _gpus(options, "sglang")
    argv = [python, "-m", _SGLANG_MODULE, "--model-path", options.model]
    argv += ["--served-model-name", options.served_name]
    argv += ["--host", options.host, "--port", str(options.port), "--enable-metrics"]
    argv += ["--tp-size", str(len(placement.gpu_ids))]
    argv += ["--mem-fraction-static", str(placement.memory_utilization)]
    if options.max_model_len_tokens is not None:
        argv += ["--context-length", str(options.max_model_len_tokens)]
    if options.tool_call_parser is not None:
        argv += ["--tool-call-parser", options.tool_call_parser]
    if options.max_loras:
        # The base counts as one of a batch's adapters.
        argv += ["--enable-lora", "--max-loras-per-batch", str(options.max_loras + 1)]
        argv += ["--max-loaded-loras", str(max(options.max_cpu_loras, options.max_loras + 1))]
        argv += ["--max-lora-rank", str(options.max_lora_rank), "--lora-target-modules", "all"]
    return LaunchCommand((*argv, *options.extra_arguments), _environment(options, base_env))


def tensorrt_llm_command(
    options: EngineOptions, base_env: Mapping[str, str], config_path: str
) -> LaunchCommand:
    """The command that starts one TensorRT-LLM.

    Args:
        options: What to serve, where.
        base_env: The environment to start from.
        config_path: Where `tensorrt_llm_config` of the same options is written.

    Raises:
        ConfigError: If the placement has no GPU.
    """
    placement = _gpus(options, "tensorrt-llm")
    argv = ["trtllm-serve", options.model, "--served_model_name", options.served_name]
    argv += ["--host", options.host, "--port", str(options.port)]
    argv += ["--tp_size", str(len(placement.gpu_ids)), "--config", config_path]
    argv += ["--kv_cache_free_gpu_memory_fraction", str(placement.memory_utilization)]
    if options.max_model_len_tokens is not None:
        argv += ["--max_seq_len", str(options.max_model_len_tokens)]
    if options.tool_call_parser is not None:
        argv += ["--tool_parser", options.tool_call_parser]
    return LaunchCommand((*argv, *options.extra_arguments), _environment(options, base_env))


def tensorrt_llm_config(options: EngineOptions) -> str:
    """The file of settings that have no flag: YAML, of which JSON is a part.

    Prometheus metrics exist only with `return_perf_metrics`; adapters are named by each request, and
    need room at the start.
    """
    settings: dict[str, object] = {"return_perf_metrics": True}
    if options.max_loras:
        settings["lora_config"] = {
            "max_lora_rank": options.max_lora_rank,
            "max_loras": options.max_loras,
            "max_cpu_loras": max(options.max_cpu_loras, options.max_loras),
        }
    return json.dumps(settings, indent=1) + "\n"


def _gpus(options: EngineOptions, engine: str) -> GpuPlacement:
    if not isinstance(options.placement, GpuPlacement):
        raise ConfigError(f"--engine {engine}: it needs an NVIDIA GPU; on CPUs use --engine vllm")
    return options.placement


def _environment(options: EngineOptions, base_env: Mapping[str, str]) -> dict[str, str]:
    env = dict(base_env)
    env["CUDA_VISIBLE_DEVICES"] = ",".join(_gpus(options, "").gpu_ids)
    if options.is_local:
        env["HF_HUB_OFFLINE"] = "1"
    return env
