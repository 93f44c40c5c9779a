"""Rules that several engines share, each asked with the engine's name.

Owns them. Never decides which engine they hold for: the engines' files do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.lora_tensors import ExtraKind
from adapters.rules.subject import Issue, Subject, distorts, listed, notes, refuses, title

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapters.lint_report import EngineLimits, EngineName

# These set the first values of A and B only, so that what is saved is a plain LoRA (vLLM 0.32, `lora/peft_helper.py`).
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})


def slots(limits: EngineLimits) -> Iterator[Issue]:
    """A replica without room for one adapter takes none."""
    if limits.max_loras < 1:
        yield refuses(
            "no-slots",
            f"{title(limits.kind)} was launched without room for adapters.",
            limits.kind,
        )


def version(limits: EngineLimits, known: str) -> Iterator[Issue]:
    """Our rules are those of one version."""
    if limits.version is not None and not _is_release(limits.version, known):
        yield notes(
            "rules-of-other-version",
            f"The rules are those of {title(limits.kind)} {known}; the replica runs "
            f"{limits.version[:40]}.",
            limits.kind,
        )


def _is_release(given: str, known: str) -> bool:
    return given.removeprefix("v").split(".")[: known.count(".") + 1] == known.split(".")


def variants(subject: Subject, engine: EngineName) -> Iterator[Issue]:
    """Kinds of LoRA that no engine tells from a plain one."""
    config = subject.config
    fields = {
        "arrow_config": config.arrow_config,
        "kasa_config": config.kasa_config,
        "monteclora_config": config.monteclora_config,
    }
    used = [name for name, given in fields.items() if given]
    if used:
        yield distorts(
            "lora-variant",
            f"{title(engine)} serves it as a plain LoRA, which it is not ({', '.join(used)}).",
            engine,
        )


def unchecked_training(subject: Subject, engine: EngineName) -> Iterator[Issue]:
    """What SGLang and TensorRT-LLM never look at, and vLLM refuses."""
    config = subject.config
    if not has_plain_init(subject):
        yield distorts(
            "init-changes-base",
            f"init_lora_weights={str(config.init_lora_weights)[:40]} changed the base model's weights in training, "
            f"which {title(engine)} does not know: convert it with path_initial_model_for_weight_conversion.",
            engine,
        )
    if config.alora_invocation_tokens:
        yield distorts(
            "alora",
            f"{title(engine)} applies an activated LoRA (aLoRA) to every token.",
            engine,
        )
    if config.use_bdlora:
        yield distorts("bdlora", f"{title(engine)} does not know block-diagonal LoRA.", engine)


def has_plain_init(subject: Subject) -> bool:
    """Whether training began from the base model's own weights."""
    init = subject.config.init_lora_weights
    return not isinstance(init, str) or init.lower() in PLAIN_INITS


def new_rows(subject: Subject, engine: EngineName) -> Iterator[Issue]:
    """Tokens that the base model has no rows for; the engine does not look."""
    if subject.new_tokens:
        yield distorts(
            "added-tokens",
            f"The adapter was trained with tokens that the base model lacks ({listed(subject.new_tokens)}): "
            f"{title(engine)} has no rows for them.",
            engine,
        )
    if "new_embeddings.safetensors" in subject.other_weights:
        yield distorts(
            "new-embeddings",
            f"{title(engine)} does not read new_embeddings.safetensors.",
            engine,
        )
    resized = _resized(subject)
    if resized:
        yield distorts(
            "embedding-resized",
            f"{listed(resized)} has other rows than the base model's; {title(engine)} ignores it.",
            engine,
        )


def _resized(subject: Subject) -> list[str]:
    rows = subject.base.vocab_rows if subject.base is not None else None
    copies = subject.lora.extras_of(ExtraKind.BASE_EMBEDDING)
    return [name for name in copies if subject.header.tensors[name].shape[:1] != (rows,)]


def alpha_pattern(subject: Subject, engine: EngineName) -> Iterator[Issue]:
    """The engine takes lora_alpha for every module."""
    config = subject.config
    if not config.alpha_pattern:
        return
    alphas = {subject.scales.alpha_of(path) for path in subject.lora.modules}
    if alphas != {config.lora_alpha}:
        yield distorts(
            "alpha-pattern",
            f"{title(engine)} ignores alpha_pattern: fold the factors into B and train with one alpha.",
            engine,
        )
