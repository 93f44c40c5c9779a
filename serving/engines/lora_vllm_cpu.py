"""A vLLM plugin (`vllm.general_plugins`) that keeps adapters off base requests on CPUs.

Owns the repair of two faults of vLLM 0.32's torch kernels for LoRA (`lora/ops/torch_ops/lora_ops.py`,
`lora/punica_wrapper/punica_cpu.py`); does nothing on other platforms. Never imported by Headrace: vLLM
calls `register` in each of its processes.

- A row without an adapter has index -1, which indexes the last slot: once as many adapters have been
  loaded as a batch may mix, base requests decode with the weights of the one in that slot.
- For the logprobs of a prompt the logits have a row a token and the indices one a request: an engine
  with `--enable-lora` ends at a request with `echo` and `logprobs`, or with `prompt_logprobs`.
"""

from __future__ import annotations

import importlib
from typing import Any


def register() -> None:
    """Replace both kernels wherever vLLM has bound them."""
    if not importlib.import_module("vllm.platforms").current_platform.is_cpu():
        return
    ops = importlib.import_module("vllm.lora.ops.torch_ops.lora_ops")
    wrapper = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu")
    shrink, expand = ops.bgmv_shrink, ops.bgmv_expand

    def bgmv_shrink(
        inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0
    ) -> None:
        if indices.shape[0] != inputs.shape[0]:
            output.zero_()
            return
        shrink(inputs, weights, output, indices, scaling)
        output[indices < 0] = 0

    def bgmv_expand(
        inputs: Any, weights: Any, output: Any, indices: Any, add_inputs: bool = True
    ) -> None:
        if indices.shape[0] == inputs.shape[0]:
            expand(inputs, weights, output, indices, add_inputs)

    modules: tuple[Any, ...] = (ops, wrapper)
    for module in modules:
        module.bgmv_shrink, module.bgmv_expand = bgmv_shrink, bgmv_expand
