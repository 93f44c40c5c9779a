"""What the linter answers with: findings, a verdict for each engine, the report.

Owns the models and what follows from them. Never reads a file. `compat.py` fills them; the registry, the CLI and the
reconciler read them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

EngineName = Literal["vllm", "sglang", "tensorrt-llm"]
ENGINE_TITLES: dict[EngineName, str] = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
}


class Frozen(BaseModel):
    """Base of the models here: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The adapter does not load, or must not."""
    WARNING = "warning"
    """It loads; it may not compute what training computed, or somebody should look."""
    NOTE = "note"


class Finding(Frozen):
    """One thing that the linter saw."""

    code: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    """Stable, for programs."""
    severity: Severity
    message: str
    """What it is, and what to do."""
    engines: tuple[EngineName, ...] = ()
    """Empty: whichever the engine."""


class EngineLimits(Frozen):
    """How a replica was launched, as far as it decides which adapters it takes."""

    kind: EngineName
    version: str | None = None
    max_lora_rank: int = Field(ge=1)
    max_loras: int = Field(ge=0)
    target_modules: tuple[str, ...] | None = None
    """Modules that it was launched with; None: all that the model has. TensorRT-LLM's names count as PEFT's."""
    strict_loading: bool = False
    """SGLang's --lora-strict-loading."""


class Verdict(Frozen):
    """What one engine would do with the adapter."""

    engine: EngineLimits
    loads: bool
    """The engine takes it, and nothing is wrong with the adapter itself."""
    is_faithful: bool
    """It loads and computes what training computed."""
    reasons: tuple[Finding, ...] = Field(min_length=1)

    def is_accepted(self, *, allow_unfaithful: bool = False) -> bool:
        """Return whether the adapter may be loaded there.

        Args:
            allow_unfaithful: Somebody asked for an adapter that computes something else than it was trained to.
        """
        return self.is_faithful or (allow_unfaithful and self.loads)

    @property
    def reason(self) -> str:
        """The weightiest reason, in one sentence."""
        order = list(Severity)
        return min(self.reasons, key=lambda finding: order.index(finding.severity)).message


class LintReport(Frozen):
    """What the linter found out about one adapter."""

    findings: tuple[Finding, ...]
    """About the adapter itself; those of one engine are in its verdict."""
    verdicts: tuple[Verdict, ...]
    """One for each engine that was asked about, in that order."""
    base_model: str | None
    rank: int
    """The largest of its modules."""
    alpha: float
    target_modules: tuple[str, ...]
    """Last parts of the names of the modules that have a LoRA, sorted."""
    num_parameters: int
    size_bytes: int
    """Of its configuration and tensors."""
    dtype: str
    """`float32`, `bfloat16`, `float16`, what else it is, or `mixed`."""

    @property
    def has_errors(self) -> bool:
        """Whether something is wrong with the adapter itself, so that no engine may have it."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)

    def loads_somewhere(self, *, allow_unfaithful: bool = False) -> bool:
        """Return whether some engine may load it; without engines, whether nothing is wrong with the adapter itself."""
        if not self.verdicts:
            return not self.has_errors
        return any(v.is_accepted(allow_unfaithful=allow_unfaithful) for v in self.verdicts)
