"""The plugin for vLLM on CPUs, over vLLM's own kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from vllm.lora.ops.torch_ops import lora_ops
from serving.engines.lora_vllm_cpu import register

x, slots = torch.ones(3, 4), torch.stack([torch.full((1, 2, 4), 1.0), torch.full((1, 2, 4), 5.0)])
indices = torch.tensor([0, -1, 1])
before, after, uneven = torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3, 2)
lora_ops.bgmv_shrink(x, slots, before, indices, 1.0)
register()
lora_ops.bgmv_shrink(x, slots, after, indices, 1.0)
lora_ops.bgmv_shrink(x, slots, uneven, indices[:2], 1.0)
print(before[:, 0].tolist(), after[:, 0].tolist(), uneven.sum().item())
"""


@pytest.mark.engine
def test_row_without_adapter_gets_none() -> None:
    """vLLM takes the last slot for it; with the plugin it gets nothing, nor do rows of a prompt."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True
    )
    last = run.stdout.strip().splitlines()[-1]
    assert last == "[4.0, 20.0, 20.0] [4.0, 0.0, 20.0] 0.0"
