"""The exact command lines and environments of vLLM."""

import pytest
from pydantic import ValidationError

from serving.engines.launch import CpuPlacement, EngineOptions, GpuPlacement, vllm_command

COMMON = {"model": "/models/m", "served_name": "m", "port": 9001}


def test_command_on_cpus():
    """A CPU replica gets its cores, its cache and LoRA, and never asks a hub for a local model."""
    placement = CpuPlacement(cpu_ids=(2, 3), kv_cache_gib=3)
    options = EngineOptions(**COMMON, placement=placement, tool_call_parser="hermes")
    command = vllm_command(options, {"PATH": "/bin"}, python="python")
    assert " ".join(command.argv) == (
        "python -m vllm.entrypoints.openai.api_server --model /models/m --served-model-name m"
        " --host 127.0.0.1 --port 9001 --shutdown-timeout 10 --disable-uvicorn-access-log"
        " --enable-prompt-tokens-details --max-model-len auto --enable-auto-tool-choice"
        " --tool-call-parser hermes --enable-lora --max-loras 2 --max-cpu-loras 16"
        " --max-lora-rank 16 --dtype bfloat16 --enforce-eager --block-size 32"
    )
    assert command.env == {
        "PATH": "/bin",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": "2,3",
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_threads_without_cores_are_left_to_the_kernel():
    """A number of threads is given to OpenMP, and vLLM binds nothing."""
    options = EngineOptions(**COMMON, placement=CpuPlacement(num_threads=2), max_loras=0)
    env = vllm_command(options, {"OMP_NUM_THREADS": "64"}).env
    assert (env["VLLM_CPU_OMP_THREADS_BIND"], env["OMP_NUM_THREADS"]) == ("nobind", "2")


def test_command_on_gpus():
    """A GPU replica sees only its GPUs and splits the model over them."""
    placement = GpuPlacement(gpu_ids=("4", "5"), memory_utilization=0.8)
    options = EngineOptions(
        **COMMON, placement=placement, is_local=False, max_loras=0, max_model_len_tokens=4096
    )
    command = vllm_command(options, {"CUDA_VISIBLE_DEVICES": "4,5,6"}, python="python")
    assert " ".join(command.argv[-6:]) == (
        "--max-model-len 4096 --gpu-memory-utilization 0.8 --tensor-parallel-size 2"
    )
    assert command.env == {"CUDA_VISIBLE_DEVICES": "4,5", "VLLM_NO_USAGE_STATS": "1"}


@pytest.mark.parametrize(
    "variable", ["VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_CPU_OMP_THREADS_BIND"]
)
def test_variables_that_would_open_or_lock_the_engine_are_dropped(variable):
    """Neither admin routes nor a key that the gateway does not send come in from outside."""
    options = EngineOptions(**COMMON, placement=CpuPlacement())
    assert variable not in vllm_command(options, {variable: "1"}).env


def test_extra_arguments_come_last():
    """What the user gives to the engine wins over what we give."""
    options = EngineOptions(
        **COMMON, placement=CpuPlacement(), extra_arguments=("--dtype", "float32")
    )
    assert vllm_command(options, {}).argv[-2:] == ("--dtype", "float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"port": 0},
        {"max_lora_rank": 17},
        {"unknown": 1},
        {"placement": {"kind": "tpu"}},
        {"placement": {"kind": "cpu", "cpu_ids": [0], "num_threads": 1}},
    ],
)
def test_options_that_cannot_work_are_refused(changes):
    """Contradictions are errors, never silently ignored."""
    with pytest.raises(ValidationError):
        EngineOptions(**(COMMON | {"placement": {"kind": "cpu"}} | changes))
