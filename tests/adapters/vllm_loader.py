"""Loads adapters with vLLM's own code for a real Llama of its, without an engine, and says what came of each.

Run as a program of its own: `python vllm_loader.py FOLDER < groups.json`. It reads `[{"base", "max_lora_rank",
"target_modules", "adapters": [{"folder", "scales": {module: factor}}]}]` and writes, for each group, the list of
`{"error": TEXT | null, "deviation": NUMBER}`: the largest difference between B A as vLLM holds it and `factor` B A of the
adapter's file, relative to the latter.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SLICES = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}
PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
PACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def start_workers_lora(group: dict[str, Any]):
    """Build a Llama and the LoRA part of vLLM's worker on it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model

    config = EngineArgs(
        model=group["base"],
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=group["max_lora_rank"],
        lora_target_modules=group["target_modules"],
        max_model_len=128,
        skip_tokenizer_init=True,
    ).create_engine_config()
    with set_current_vllm_config(config):
        start_group_of_one()
        model = initialize_model(vllm_config=config)
        worker = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        worker.create_lora_manager(model, config)
    return worker


def start_group_of_one() -> None:
    """Start torch.distributed for this process alone."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    if not torch.distributed.is_initialized():
        meeting = Path(sys.argv[1]) / "meeting"
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel(1, 1)


def load(worker, adapter: dict[str, Any]) -> dict[str, Any]:
    """Load one adapter, compare what vLLM holds, and take it out again."""
    from vllm.lora.request import LoRARequest

    try:
        worker.add_adapter(LoRARequest("adapter", 1, adapter["folder"]))
        return {"error": None, "deviation": deviation(worker._adapter_manager.modules, adapter)}
    except Exception as error:  # noqa: BLE001 -- what it raises is the answer
        return {"error": f"{type(error).__name__}: {error}", "deviation": 0.0}
    finally:
        worker.remove_all_adapters()


def deviation(modules: dict[str, Any], adapter: dict[str, Any]) -> float:
    """Return how far vLLM's product of B and A is from the trained one, over all linear modules."""
    tensors = load_file(Path(adapter["folder"]) / "adapter_model.safetensors")
    worst = 0.0
    for path, factor in adapter["scales"].items():
        a = tensors[f"base_model.model.{path}.lora_A.weight"].float()
        b = tensors[f"base_model.model.{path}.lora_B.weight"].float()
        trained = factor * b @ a
        block, _, name = path.rpartition(".")
        layer = modules.get(f"{block}.{PACKED.get(name, name)}")
        if layer is None:
            return 1.0
        index = SLICES.get(name, 0)
        held = layer.lora_b_stacked[index][0, 0] @ layer.lora_a_stacked[index][0, 0]
        if held.shape != trained.shape:
            return 1.0
        worst = max(worst, float((held - trained).norm() / trained.norm().clamp_min(1e-30)))
    return worst


def main() -> None:
    """Answer every group of standard input on standard output's last line."""
    logging.disable(logging.CRITICAL)
    answers = []
    for group in json.load(sys.stdin):
        worker = start_workers_lora(group)
        answers.append([load(worker, adapter) for adapter in group["adapters"]])
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
