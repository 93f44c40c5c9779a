"""What TensorRT-LLM does with an adapter.

Owns its rules, read from `tensorrt_llm/lora_manager.py` (one commit of 2026, tied to no release). Called by `compat.py`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapters.lora_tensors import EMBEDDINGS, ExtraKind
from adapters.rules import common
from adapters.rules.subject import Issue, Subject, distorts, listed, refuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters.lint_report import EngineLimits

# Its names of modules (`get_default_trtllm_modules_to_hf_modules`); qkv_proj is in the newer commits.
MODULES = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_dense": "o_proj",
    "mlp_h_to_4h": "gate_proj",
    "mlp_4h_to_h": "down_proj",
    "mlp_gate": "up_proj",
    "mlp_gate_up": "gate_up_proj",
    "moe_h_to_4h": "w1",
    "moe_4h_to_h": "w2",
    "moe_gate": "w3",
    "moe_router": "gate",
}
_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERT_MODULES = frozenset({"w1", "w2", "w3"})


def issues(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    """Yield what TensorRT-LLM objects to, and what it gets wrong."""
    yield from common.slots(limits)
    yield from _rank(subject, limits)
    yield from _features(subject)
    yield from _modules(subject, limits)
    yield from _extras(subject)
    yield from common.alpha_pattern(subject, "tensorrt-llm")
    yield from common.unchecked_training(subject, "tensorrt-llm")
    yield from common.variants(subject, "tensorrt-llm")
    yield from common.new_rows(subject, "tensorrt-llm")


def _rank(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    rank = max((subject.config.r, *subject.lora.ranks))
    if rank > limits.max_lora_rank:
        yield refuses(
            "rank-too-large",
            f"Rank {rank} exceeds the {limits.max_lora_rank} that TensorRT-LLM was launched with: raise max_lora_rank "
            "of its lora_config.",
            "tensorrt-llm",
        )


def _features(subject: Subject) -> Iterator[Issue]:
    config = subject.config
    with_magnitude = [m.path for m in subject.lora.modules.values() if m.magnitude is not None]
    if any(_EXPERT.search(path) for path in with_magnitude):
        yield refuses("dora", "TensorRT-LLM serves no DoRA of experts.", "tensorrt-llm")
    elif config.use_dora or with_magnitude:
        yield distorts(
            "dora",
            "TensorRT-LLM multiplies by DoRA's magnitudes as they are saved, without the norm that PEFT divides by: "
            "train a plain LoRA.",
            "tensorrt-llm",
        )
    if config.use_qalora:
        yield refuses(
            "qalora", "TensorRT-LLM does not serve QALoRA, whose A are narrower.", "tensorrt-llm"
        )
    if config.layer_replication:
        yield distorts(
            "layer-replication", "TensorRT-LLM does not replicate layers.", "tensorrt-llm"
        )
    if config.target_parameters:
        yield refuses(
            "experts-fused", "TensorRT-LLM takes no LoRA of target_parameters.", "tensorrt-llm"
        )


def _modules(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    names = set(subject.lora.names)
    skipped = sorted(EMBEDDINGS & names)
    if skipped:
        yield distorts(
            "embedding-skipped",
            f"TensorRT-LLM silently leaves out the LoRA of {listed(skipped)}.",
            "tensorrt-llm",
        )
    unknown = sorted(names - EMBEDDINGS - set(MODULES.values()))
    if unknown:
        yield refuses(
            "module-unsupported",
            f"TensorRT-LLM does not know {listed(unknown)}: train other modules.",
            "tensorrt-llm",
        )
    outside = sorted(names & set(MODULES.values()) - _launched(limits.target_modules))
    if outside:
        yield distorts(
            "module-not-launched",
            f"TensorRT-LLM was launched for other modules and silently leaves out {listed(outside)}: "
            "widen lora_target_modules.",
            "tensorrt-llm",
        )
    dense = [
        m.path
        for m in subject.lora.modules.values()
        if _EXPERT.search(m.path) and m.name not in _EXPERT_MODULES
    ]
    if dense:
        yield distorts(
            "expert-modules",
            f"TensorRT-LLM takes {listed(dense)} for a dense layer's.",
            "tensorrt-llm",
        )


def _launched(given: tuple[str, ...] | None) -> set[str]:
    if given is None:
        return set(MODULES.values())
    return {MODULES.get(name, name.rpartition(".")[2]) for name in given}


def _extras(subject: Subject) -> Iterator[Issue]:
    names = [
        name for name, kind in subject.lora.extras.items() if kind is not ExtraKind.BASE_EMBEDDING
    ]
    silent = [name for name in names if any(part in name for part in EMBEDDINGS)]
    if silent:
        yield distorts(
            "modules-to-save",
            f"TensorRT-LLM silently leaves out {listed(silent)}.",
            "tensorrt-llm",
        )
    fatal = [name for name in names if name not in silent]
    if fatal:
        yield refuses(
            "key-unknown",
            f"TensorRT-LLM refuses tensors that are no LoRA: {listed(fatal)}.",
            "tensorrt-llm",
        )
