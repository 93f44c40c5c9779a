"""What vLLM 0.32 does with an adapter.

Owns its rules, read from `vllm/lora/` (peft_helper.py, lora_model.py, model_manager.py, utils.py) and
`vllm/config/lora.py`. Called by `compat.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.lora_tensors import EMBEDDINGS, ExtraKind
from adapters.rules import common
from adapters.rules.subject import Issue, Subject, distorts, listed, notes, refuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters.lint_report import EngineLimits

KNOWN_VERSION = "0.32"
# --max-lora-rank takes these (`config/lora.py`, MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
CLASSIFIERS = frozenset({"classifier", "score"})
# Models with `embedding_modules`, and those whose experts are one tensor (`is_3d_moe_weight`).
WITH_EMBEDDING_LORA = frozenset({"llama", "qwen3", "phi3", "mixtral", "qwen3_moe"})
WITHOUT_EMBEDDING_LORA = frozenset({"mistral", "qwen2", "qwen2_moe", "gemma2", "gemma3_text"})
WITH_FUSED_EXPERTS = frozenset({"gpt_oss", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_omni_moe"})
PACKED = {
    "qkv_proj": frozenset({"q_proj", "k_proj", "v_proj"}),
    "gate_up_proj": frozenset({"gate_proj", "up_proj"}),
}


def issues(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    """Yield what vLLM objects to, and what it gets wrong."""
    yield from common.slots(limits)
    yield from common.version(limits, KNOWN_VERSION)
    yield from _rank(subject, limits)
    yield from _features(subject)
    yield from _keys(subject)
    yield from _modules_to_save(subject)
    yield from _modules(subject, limits)
    yield from _patterns(subject, limits)
    yield from common.variants(subject, "vllm")
    yield from common.new_rows(subject, "vllm")


def _rank(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    # Fused expert tensors have r times the experts for a rank.
    of_tensors = () if subject.config.target_parameters else subject.lora.ranks
    rank = max((subject.config.r, *subject.config.rank_pattern.values(), *of_tensors))
    if limits.max_lora_rank not in RANKS:
        yield refuses(
            "max-rank-unlisted",
            f"vLLM takes no --max-lora-rank {limits.max_lora_rank}: use one of "
            f"{', '.join(map(str, RANKS))}.",
            "vllm",
        )
    if rank > limits.max_lora_rank:
        enough = next((r for r in RANKS if r >= rank), None)
        hint = f"launch it with --max-lora-rank {enough}" if enough else "vLLM takes 512 at most"
        yield refuses(
            "rank-too-large",
            f"Rank {rank} exceeds the {limits.max_lora_rank} that vLLM was launched with: {hint}.",
            "vllm",
        )
    elif rank not in RANKS and limits.max_lora_rank in RANKS:
        yield notes(
            "rank-unlisted",
            f"Rank {rank} takes a slot of rank {next(r for r in RANKS if r >= rank)} in vLLM.",
            "vllm",
        )


def _features(subject: Subject) -> Iterator[Issue]:
    config = subject.config
    has_magnitude = any(m.magnitude is not None for m in subject.lora.modules.values())
    refused = {
        "dora": (config.use_dora or has_magnitude, "DoRA"),
        "lora-bias": (config.lora_bias, "a bias in the LoRA (lora_bias)"),
        "bias": (config.bias != "none", f"trained biases (bias={config.bias[:40]!r})"),
        "alora": (bool(config.alora_invocation_tokens), "activated LoRA (aLoRA)"),
        "layer-replication": (bool(config.layer_replication), "layer_replication"),
        "bdlora": (bool(config.use_bdlora), "block-diagonal LoRA"),
        "qalora": (config.use_qalora, "QALoRA"),
    }
    for code, (is_used, what) in refused.items():
        if is_used:
            yield refuses(code, f"vLLM does not serve {what}: train a plain LoRA.", "vllm")
    if not common.has_plain_init(subject):
        yield refuses(
            "init-changes-base",
            f"vLLM refuses init_lora_weights={str(config.init_lora_weights)[:40]!r}, which changed the base model: "
            "convert it with path_initial_model_for_weight_conversion.",
            "vllm",
        )
    if not config.has_target_modules:
        yield refuses(
            "target-modules-missing", "vLLM wants target_modules in adapter_config.json.", "vllm"
        )


def _keys(subject: Subject) -> Iterator[Issue]:
    kept = [
        name
        for name, kind in subject.lora.extras.items()
        if kind is not ExtraKind.BASE_EMBEDDING and not _is_classifier(name)
    ]
    if not kept:
        return
    tokens = [name for name in kept if subject.lora.extras[name] is ExtraKind.TOKEN_DELTA]
    code, what = ("trained-tokens", "trained token rows") if tokens else ("key-unknown", "tensors")
    yield refuses(code, f"vLLM refuses {what} that are no LoRA: {listed(tokens or kept)}.", "vllm")


def _is_classifier(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and parts[-2] in CLASSIFIERS and parts[-1] in {"weight", "bias"}


def _modules_to_save(subject: Subject) -> Iterator[Issue]:
    saved = subject.config.modules_to_save or []
    others = [name for name in saved if name not in CLASSIFIERS]
    heads = {name.split(".")[-2] for name in subject.lora.extras if _is_classifier(name)}
    if others:
        yield refuses(
            "modules-to-save",
            f"vLLM loads no whole {listed(others)} (modules_to_save): put a LoRA on it or leave it; "
            "TRL adds lm_head by itself when a chat template adds tokens.",
            "vllm",
        )
    elif heads - set(saved):
        yield refuses(
            "key-unknown", f"The whole {listed(heads)} is not in modules_to_save.", "vllm"
        )
    elif len(heads) > 1 or (heads and not _is_classifier_base(subject)):
        yield refuses(
            "classifier-without-head",
            f"The base model is no cross-encoder with one head for the whole {listed(heads)}.",
            "vllm",
        )


def _is_classifier_base(subject: Subject) -> bool:
    if subject.base is None:
        return True
    architectures = subject.base.config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def _modules(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    names = subject.lora.names
    embeddings = sorted(EMBEDDINGS.intersection(names))
    if embeddings and subject.model_type in WITHOUT_EMBEDDING_LORA:
        yield refuses(
            "module-unsupported",
            f"vLLM's {subject.model_type} takes no LoRA on {listed(embeddings)}.",
            "vllm",
        )
    fused = [m.path for m in subject.lora.modules.values() if m.path.endswith(_FUSED)]
    if fused and subject.base is not None and subject.model_type not in WITH_FUSED_EXPERTS:
        yield refuses(
            "experts-fused",
            f"vLLM's {subject.model_type} takes a LoRA per expert, not {listed(fused)}.",
            "vllm",
        )
    outside = [name for name in names if not _is_launched(name, limits.target_modules)]
    if outside:
        yield distorts(
            "module-not-launched",
            f"vLLM was launched for other modules and silently leaves out {listed(outside)}: "
            "widen --lora-target-modules.",
            "vllm",
        )


_FUSED = (".experts", ".experts.base_layer")


def _is_launched(name: str, launched: tuple[str, ...] | None) -> bool:
    if launched is None:
        return True
    suffixes = {module.rpartition(".")[2] for module in launched}
    if name in suffixes:
        return True
    # The unit that vLLM wraps is the packed module: one of its parts brings in all.
    siblings: frozenset[str] = next(
        (parts | {whole} for whole, parts in PACKED.items() if name in parts), frozenset()
    )
    return bool(siblings & suffixes)


def _patterns(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    config = subject.config
    if not (config.rank_pattern or config.alpha_pattern) or limits.version is None:
        return
    number = limits.version.removeprefix("v").split(".")[:2]
    if all(part.isdigit() for part in number) and tuple(map(int, number)) < (0, 32):
        yield distorts(
            "pattern-old-version",
            f"rank_pattern and alpha_pattern are known to hold from vLLM 0.32; it runs {limits.version[:40]}.",
            "vllm",
        )
