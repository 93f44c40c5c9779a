"""What SGLang 0.5.23 does with an adapter.

Owns its rules, read from `sglang/srt/lora/` (lora_config.py, lora_manager.py, lora.py, mem_pool.py, utils.py). Some of
what it does not check at loading fails at the first request instead, in its memory pool: that counts as refused. Called
by `compat.py`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from adapters.lora_tensors import EMBEDDINGS, ExtraKind, layer_of
from adapters.rules import common
from adapters.rules.subject import Issue, Subject, distorts, listed, refuses

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters.lint_report import EngineLimits

KNOWN_VERSION = "0.5.23"
ALL = frozenset({"all", "all-linear"})
_STACKED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj_with_mqa"),
}
# What its memory pool can hold, of the models whose layout we know.
KNOWN_MODULES = EMBEDDINGS | {
    *("qkv_proj", "o_proj", "out_proj", "gate_up_proj", "down_proj", "in_proj", "in_proj_qkvz"),
    *("fused_qkv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "fc1_latent_proj", "fc2_latent_proj"),
}


def issues(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    """Yield what SGLang objects to, and what it gets wrong."""
    yield from common.slots(limits)
    yield from common.version(limits, KNOWN_VERSION)
    yield from _rank(subject, limits)
    yield from _features(subject)
    yield from _scales(subject)
    yield from _targets(subject, limits)
    yield from _stacks(subject)
    yield from _extras(subject, limits)
    yield from common.unchecked_training(subject, "sglang")
    yield from common.variants(subject, "sglang")
    if subject.new_tokens:
        yield refuses(
            "added-tokens",
            f"SGLang serves no adapter that adds tokens ({listed(subject.new_tokens)}).",
            "sglang",
        )
    if subject.other_weights:
        yield distorts(
            "weights-beside",
            f"SGLang reads every *.safetensors of the folder, {listed(subject.other_weights)} too: "
            "remove it.",
            "sglang",
        )


def _rank(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    rank = subject.config.r
    if rank > limits.max_lora_rank:
        yield refuses(
            "rank-too-large",
            f"Rank {rank} exceeds the {limits.max_lora_rank} that SGLang was launched with: "
            f"launch it with --max-lora-rank {rank}.",
            "sglang",
        )
    if subject.lora.ranks not in {(), (rank,)} and not subject.config.target_parameters:
        yield refuses(
            "rank-pattern",
            f"SGLang ignores rank_pattern and expects rank {rank} everywhere: train with one rank.",
            "sglang",
        )


def _features(subject: Subject) -> Iterator[Issue]:
    config = subject.config
    has_magnitude = any(m.magnitude is not None for m in subject.lora.modules.values())
    refused = {
        "dora": (config.use_dora or has_magnitude, "DoRA"),
        "layer-replication": (bool(config.layer_replication), "layer_replication"),
        "qalora": (config.use_qalora, "QALoRA, whose A are narrower"),
        "experts-fused": (bool(config.target_parameters), "a LoRA of target_parameters"),
    }
    for code, (is_used, what) in refused.items():
        if is_used:
            yield refuses(code, f"SGLang does not serve {what}: train a plain LoRA.", "sglang")
    if config.lora_bias or config.bias != "none":
        yield distorts(
            "lora-bias" if config.lora_bias else "bias",
            "SGLang silently leaves out the biases that were trained: train with bias none.",
            "sglang",
        )
    if config.modules_to_save:
        yield distorts(
            "modules-to-save",
            f"SGLang silently leaves out the whole {listed(config.modules_to_save)} (modules_to_save).",
            "sglang",
        )


def _scales(subject: Subject) -> Iterator[Issue]:
    config = subject.config
    if config.use_rslora and config.r != 1:
        yield distorts(
            "rslora",
            "SGLang scales by alpha/r, this adapter (rsLoRA) was trained with alpha/sqrt(r): train without use_rslora, "
            "or set lora_alpha to alpha*sqrt(r) and use_rslora to false.",
            "sglang",
        )
    yield from common.alpha_pattern(subject, "sglang")


def _targets(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    given = subject.config.target_modules
    if given is None:
        yield refuses("target-modules-missing", "SGLang wants a list of target_modules.", "sglang")
        return
    if isinstance(given, str) and given not in ALL:
        yield refuses(
            "target-modules-expression",
            "SGLang takes no expression as target_modules: list the modules.",
            "sglang",
        )
        return
    names = set(subject.lora.names) | (set() if isinstance(given, str) else _last_parts(given))
    launched = limits.target_modules
    allowed = KNOWN_MODULES if launched is None or ALL & set(launched) else _stacked(launched)
    outside = sorted(name for name in names if _STACKED.get(name, name) not in allowed)
    if outside:
        what = "can serve" if launched is None else "was launched for"
        yield refuses(
            "module-not-launched",
            f"SGLang {what} other modules than {listed(outside)}: launch it with --lora-target-modules "
            "that name them.",
            "sglang",
        )
    declared = EMBEDDINGS if isinstance(given, str) else _last_parts(given)
    unnamed = EMBEDDINGS & set(subject.lora.names) - declared
    if unnamed:
        yield distorts(
            "embedding-undeclared",
            f"SGLang silently leaves out {listed(sorted(unnamed))}, which target_modules does not name.",
            "sglang",
        )


def _last_parts(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _stacked(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(_STACKED.get(n, n) for n in (name.rpartition(".")[2] for name in names))


def _stacks(subject: Subject) -> Iterator[Issue]:
    """Its stacking of q, k, v and of gate, up wants some of them beside others, in each layer."""
    by_block: dict[str, set[str]] = defaultdict(set)
    for module in subject.lora.modules.values():
        by_block[module.path.rpartition(".")[0]].add(module.name)
    without_v, without_q, without_gate = [], [], []
    for block, names in by_block.items():
        attention = names & {"q_proj", "k_proj", "v_proj"}
        if "q_proj" in attention and "v_proj" not in attention:
            without_v.append(block)
        elif attention and "q_proj" not in attention:
            without_q.append(block)
        if "up_proj" in names and "gate_proj" not in names:
            without_gate.append(block)
    for code, blocks, rule in (
        ("q-without-v", without_v, "a LoRA of v_proj beside that of q_proj"),
        ("kv-without-q", without_q, "a LoRA of q_proj beside those of k_proj and v_proj"),
        ("up-without-gate", without_gate, "a LoRA of gate_proj beside that of up_proj"),
    ):
        if blocks:
            yield refuses(
                code, f"SGLang wants {rule}, which {listed(blocks)} lacks: train both.", "sglang"
            )


def _extras(subject: Subject, limits: EngineLimits) -> Iterator[Issue]:
    fatal, dropped = [], []
    launched = limits.target_modules
    targets = KNOWN_MODULES if launched is None else _stacked(launched)
    known = targets | {part for part, whole in _STACKED.items() if whole in targets}
    for name, kind in subject.lora.extras.items():
        if kind is ExtraKind.BASE_EMBEDDING:
            continue
        in_layer = layer_of(name) is not None
        is_fatal = in_layer and not any(target in name for target in known)
        if is_fatal or (not in_layer and "put_embeddings" in name):
            fatal.append(name)
        else:
            dropped.append(name)
    if fatal:
        yield refuses(
            "key-unknown",
            f"SGLang fails on tensors that are of none of its modules: {listed(fatal)}"
            + (", at loading." if limits.strict_loading else ", at the first request."),
            "sglang",
        )
    if dropped:
        yield distorts(
            "key-dropped",
            f"SGLang silently leaves out tensors that are no LoRA: {listed(dropped)}.",
            "sglang",
        )
    of_others = {"added-tokens", "new-embeddings"}
    for issue in common.new_rows(subject, "sglang"):
        if issue.finding.code not in of_others:
            yield issue
