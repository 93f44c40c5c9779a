"""What adapter_config.json of a PEFT LoRA says, its types checked.

Owns the fields that the rules read; a field that is not known is kept by name only. Never looks at tensors. Called by
the linter. Source of the fields: PEFT 0.21, `peft/tuners/lora/config.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator

from adapters.errors import InvalidAdapter
from adapters.strict_json import read_object

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 2**16
MAX_ALPHA = 1e6
MAX_PATTERNS = 10_000


class PeftConfig(BaseModel):
    """The fields of adapter_config.json that decide what an engine does with the adapter."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    peft_type: str
    r: int = Field(ge=1, le=MAX_RANK)
    lora_alpha: float = Field(ge=-MAX_ALPHA, le=MAX_ALPHA)
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    has_target_modules: bool = False
    """Whether the key is there at all; vLLM and SGLang ask for it."""
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: StrictBool = False
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    use_qalora: StrictBool = False
    lora_bias: StrictBool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict, max_length=MAX_PATTERNS)
    alpha_pattern: dict[str, float] = Field(default_factory=dict, max_length=MAX_PATTERNS)
    init_lora_weights: StrictBool | str | None = True
    alora_invocation_tokens: list[int] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    layer_replication: list[list[int]] | None = None
    megatron_config: dict[str, Any] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _absent_is_empty(cls, given: Any) -> Any:
        return {} if given is None else given

    @field_validator("rank_pattern")
    @classmethod
    def _ranks(cls, given: dict[str, int]) -> dict[str, int]:
        if any(not 1 <= rank <= MAX_RANK for rank in given.values()):
            raise ValueError(f"ranks lie between 1 and {MAX_RANK}")
        return given

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas(cls, given: dict[str, float]) -> dict[str, float]:
        if any(not abs(alpha) <= MAX_ALPHA for alpha in given.values()):
            raise ValueError(f"alphas lie within {MAX_ALPHA:g}")
        return given


def read_peft_config(folder: Path) -> PeftConfig:
    """Read adapter_config.json of a folder.

    Raises:
        InvalidAdapter: If it is missing, no LoRA's, or a field has an impossible type or value.
    """
    fields = read_object(folder / CONFIG_FILE)
    kind = fields.get("peft_type")
    if isinstance(kind, str) and kind.upper() != "LORA":
        raise InvalidAdapter(f"peft_type is {kind[:40]}: engines serve LORA adapters only.")
    fields.pop("has_target_modules", None)
    try:
        return PeftConfig(has_target_modules="target_modules" in fields, **fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:60] for part in first["loc"])
        raise InvalidAdapter(f"{CONFIG_FILE}: {where[:200]}: {first['msg'][:200]}.") from error
