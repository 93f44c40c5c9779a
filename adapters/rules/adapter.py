"""What is wrong with an adapter whichever engine serves it.

Owns the rules on ranks, shapes, types and what training did. Never asks about an engine. Called by `compat.py`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from adapters.lora_tensors import ExtraKind, LoraModule
from adapters.rules.subject import Issue, Subject, listed, notes, refuses, warns

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# A factor of a well-trained LoRA is 0.5 to 4; float16 sums overflow at 65,504.
LARGE_SCALE = 64.0


def issues(subject: Subject) -> Iterator[Issue]:
    """Yield what is wrong with the adapter itself."""
    yield from _pairs(subject)
    yield from _ranks(subject)
    yield from _dtypes(subject)
    yield from _scale(subject)
    yield from _training(subject)
    yield from _files(subject)
    if subject.base is None:
        yield notes("base-unknown", "No base model was given: modules and shapes are unchecked.")
    else:
        yield from _base(subject)


def _pairs(subject: Subject) -> Iterator[Issue]:
    modules = subject.lora.modules.values()
    alone = [m.path for m in modules if (m.a is None) != (m.b is None)]
    if alone:
        yield refuses(
            "pair-incomplete",
            f"{listed(alone)} has only one of A and B: save the adapter again.",
        )
    bare = [m.path for m in modules if m.a is None and m.b is None]
    if bare:
        yield refuses("magnitude-alone", f"{listed(bare)} has a DoRA magnitude without A and B.")
    if subject.lora.unprefixed:
        yield warns(
            "prefix-missing",
            f"{listed(subject.lora.unprefixed)} lacks PEFT's prefix 'base_model.model.': PEFT itself "
            "will not load it.",
        )


def _ranks(subject: Subject) -> Iterator[Issue]:
    wrong, flat, odd = [], [], []
    for module in subject.lora.modules.values():
        entries = [entry for entry in (module.a, module.b) if entry is not None]
        if any(len(entry.shape) != 2 or 0 in entry.shape for entry in entries):
            flat.append(module.path)
        elif module.a and module.b and module.a.shape[0] != module.b.shape[1]:
            odd.append(module.path)
        elif entries and subject.scales.rank_of(module.path) not in {None, module.rank}:
            wrong.append(module.path)
    if flat:
        yield refuses("shape-not-matrix", f"A or B of {listed(flat)} is no matrix.")
    if odd:
        yield refuses("rank-unequal", f"A and B of {listed(odd)} have different ranks.")
    # The ranks of fused expert tensors are r times the experts.
    if wrong and not subject.config.target_parameters:
        yield refuses(
            "rank-mismatch",
            f"The tensors of {listed(wrong)} have another rank than {_said_rank(subject)}: "
            "adapter_config.json is of another adapter.",
        )


def _said_rank(subject: Subject) -> str:
    patterned = " and rank_pattern say" if subject.config.rank_pattern else " says"
    return f"r={subject.config.r}{patterned}"


def _dtypes(subject: Subject) -> Iterator[Issue]:
    types = {entry.dtype for entry in subject.header.tensors.values()}
    refused = sorted(types - SERVED_DTYPES.keys())
    if refused:
        yield refuses(
            "dtype-unsupported",
            f"The tensors are of type {', '.join(refused)}: save them as float32, bfloat16 or float16.",
        )
    elif len(types) > 1:
        yield notes("dtype-mixed", "The tensors are of several types; engines cast them to one.")


def _scale(subject: Subject) -> Iterator[Issue]:
    config = subject.config
    if config.lora_alpha == 0 and not any(config.alpha_pattern.values()):
        yield refuses("no-effect", "lora_alpha is 0, so the adapter does nothing: train it again.")
    elif config.lora_alpha < 0:
        yield warns("alpha-negative", "lora_alpha is negative: the adapter is subtracted.")
    if abs(config.lora_alpha) / config.r > LARGE_SCALE:
        yield warns(
            "scale-large",
            f"lora_alpha / r is {config.lora_alpha / config.r:g}, which overflows easily: "
            "check adapter_config.json.",
        )
    if not subject.scales.is_known:
        yield notes(
            "pattern-unchecked",
            "A key of rank_pattern or alpha_pattern is an expression that is not run here: "
            "ranks are not compared with it.",
        )


def _training(subject: Subject) -> Iterator[Issue]:
    config = subject.config
    if config.fan_in_fan_out:
        yield notes("fan-in-fan-out", "fan_in_fan_out has no bearing on the saved tensors.")
    if config.layers_to_transform is not None or config.exclude_modules:
        yield notes(
            "layers-chosen",
            "layers_to_transform or exclude_modules is set: which modules have a LoRA is read off the tensors.",
        )
    if config.megatron_config:
        yield warns(
            "megatron",
            "The adapter was trained on Megatron's layers, whose modules may be ordered otherwise: "
            "compare its answers with training's.",
        )
    if isinstance(config.target_modules, str):
        yield notes(
            "target-modules-expression",
            "target_modules is an expression, not a list: the modules are read off the tensors.",
        )


def _files(subject: Subject) -> Iterator[Issue]:
    if subject.pickles:
        yield warns(
            "pickle-beside",
            f"{listed(subject.pickles)} is a pickle and is not read: remove it.",
        )


def _base(subject: Subject) -> Iterator[Issue]:
    base = subject.base
    if base is None:
        return
    trained_on = (subject.config.base_model_name_or_path or "").rstrip("/").rpartition("/")[2]
    if trained_on and trained_on.lower() != base.name.rstrip("/").rpartition("/")[2].lower():
        yield warns(
            "base-name-differs",
            f"The adapter names '{trained_on[:100]}' as its base model, not '{base.name}': "
            "make sure that they are the same weights.",
        )
    if base.has_tied_embeddings and "lm_head" in subject.lora.names:
        yield warns(
            "tied-lm-head",
            "The base model's lm_head is its embedding: the LoRA of lm_head changes the output alone, "
            "and cannot be merged.",
        )
    if base.shapes is None:
        yield notes(
            "architecture-unknown",
            f"The architecture '{subject.model_type}' is not known here: shapes are unchecked.",
        )
    elif not subject.config.target_parameters:
        yield from _shapes(subject)


def _shapes(subject: Subject) -> Iterator[Issue]:
    shapes = subject.base.shapes if subject.base is not None else None
    if shapes is None:
        return
    missing, unfit, wide = [], [], []
    for module in subject.lora.modules.values():
        size = shapes.size_of(module.path)
        if size is None:
            missing.append(module.path)
        elif not _fits(module, size):
            unfit.append(f"{module.path} ({_said_shapes(module)}, base {size[0]} to {size[1]})")
        elif module.rank is not None and module.rank > min(size):
            wide.append(module.path)
    # Replicated layers are further layers, and pooled inputs narrower ones: by design of the training.
    if missing and not subject.config.layer_replication:
        yield refuses("module-not-in-base", f"The base model has no linear {listed(missing)}.")
    if unfit and not subject.config.use_qalora:
        yield refuses(
            "shape-mismatch",
            f"Shapes do not fit the base model: {listed(unfit)}; it was trained on another one.",
        )
    if wide:
        yield warns("rank-exceeds-module", f"The rank exceeds the size of {listed(wide)}.")
    yield from _coverage(subject)


def _fits(module: LoraModule, size: tuple[int, int]) -> bool:
    fits_a = module.a is None or len(module.a.shape) != 2 or module.a.shape[1] == size[0]
    fits_b = module.b is None or len(module.b.shape) != 2 or module.b.shape[0] == size[1]
    return fits_a and fits_b


def _said_shapes(module: LoraModule) -> str:
    a = "-" if module.a is None else list(module.a.shape)
    b = "-" if module.b is None else list(module.b.shape)
    turned = module.is_embedding and module.a and module.b and len(module.a.shape) == 2
    hint = ", transposed?" if turned and module.a and module.a.shape[0] > module.a.shape[1] else ""
    return f"A {a}, B {b}{hint}"


def _coverage(subject: Subject) -> Iterator[Issue]:
    shapes = subject.base.shapes if subject.base is not None else None
    if shapes is None:
        return
    covered = Counter(module.name for module in subject.lora.modules.values())
    partly = [name for name, count in covered.items() if count < shapes.num_modules(name)]
    if partly:
        yield notes("coverage-partial", f"Not every {listed(sorted(partly))} has a LoRA.")
    copies = subject.lora.extras_of(ExtraKind.BASE_EMBEDDING)
    rows = {subject.header.tensors[name].shape[:1] for name in copies}
    if copies and rows == {(shapes.vocab_rows,)}:
        yield notes("embedding-copy", f"{listed(copies)} is the base model's, and is not read.")
