"""Command lines of SGLang and TensorRT-LLM, which cannot run here: what they are told."""

from __future__ import annotations

import itertools
import json

import pytest

from serving.engines.launch import CpuPlacement, EngineOptions, GpuPlacement
from serving.engines.launch_gpu import sglang_command, tensorrt_llm_command, tensorrt_llm_config
from serving.errors import ConfigError

GPUS = GpuPlacement(gpu_ids=("2", "3"), memory_utilization=0.8)


def options(**changes: object) -> EngineOptions:
    """Options of a local model on two GPUs."""
    fields = {"model": "folder", "served_name": "m", "placement": GPUS, "port": 9001, **changes}
    return EngineOptions.model_validate(fields)


def flags(argv: tuple[str, ...]) -> dict[str, str]:
    """Each flag with the word after it."""
    return {word: after for word, after in itertools.pairwise(argv) if word[:2] == "--"}


def test_sglang() -> None:
    """Metrics on, tensor parallel over its GPUs, LoRA with rank and modules named."""
    command = sglang_command(
        options(max_model_len_tokens=4096, tool_call_parser="qwen25"), {"A": "b"}
    )
    given = flags(command.argv)
    assert "--enable-metrics" in command.argv
    assert given["--model-path"] == "folder"
    assert given["--served-model-name"] == "m"
    assert given["--tp-size"] == "2"
    assert given["--mem-fraction-static"] == "0.8"
    assert given["--context-length"] == "4096"
    assert given["--tool-call-parser"] == "qwen25"
    assert given["--max-loras-per-batch"] == "3"
    assert given["--lora-target-modules"] == "all"
    assert command.env == {"A": "b", "CUDA_VISIBLE_DEVICES": "2,3", "HF_HUB_OFFLINE": "1"}


def test_sglang_without_lora() -> None:
    """No flag of LoRA's; a hub model may be fetched; the user's own arguments come last."""
    command = sglang_command(
        options(max_loras=0, is_local=False, extra_arguments=("--log-level", "debug")), {}
    )
    assert not [word for word in command.argv if "lora" in word]
    assert command.argv[-2:] == ("--log-level", "debug")
    assert "HF_HUB_OFFLINE" not in command.env


def test_tensorrt_llm() -> None:
    """Its settings without a flag are in a file: metrics, and room for adapters."""
    chosen = options(max_loras=4, max_cpu_loras=2, max_lora_rank=32, max_model_len_tokens=2048)
    given = flags(tensorrt_llm_command(chosen, {}, "settings.yaml").argv)
    assert given["--config"] == "settings.yaml"
    assert given["--served_model_name"] == "m"
    assert given["--tp_size"] == "2"
    assert given["--max_seq_len"] == "2048"
    assert json.loads(tensorrt_llm_config(chosen)) == {
        "return_perf_metrics": True,
        "lora_config": {"max_lora_rank": 32, "max_loras": 4, "max_cpu_loras": 4},
    }
    assert json.loads(tensorrt_llm_config(options(max_loras=0))) == {"return_perf_metrics": True}


def test_need_a_gpu() -> None:
    """One line that says what to do instead."""
    on_cpu = options(placement=CpuPlacement())
    with pytest.raises(ConfigError, match="on CPUs use --engine vllm"):
        sglang_command(on_cpu, {})
    with pytest.raises(ConfigError, match="on CPUs use --engine vllm"):
        tensorrt_llm_command(on_cpu, {}, "x")
