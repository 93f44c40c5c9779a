"""What the rules look at, and what they say.

Owns the reading of an adapter's folder into one value. Never judges. Called by `compat.py`; every rule takes the
subject and gives issues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from adapters.errors import InvalidAdapter
from adapters.lint_report import ENGINE_TITLES, EngineName, Finding, Severity
from adapters.lora_tensors import LoraTensors, sort_tensors
from adapters.module_patterns import TrainedScales
from adapters.peft_config import CONFIG_FILE, PeftConfig, read_peft_config
from adapters.safetensors_header import SafetensorsHeader, read_header
from adapters.strict_json import read_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from adapters.base_model import BaseModel

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
MAX_LISTED = 3
MAX_NAME_CHARS = 160


class Issue(NamedTuple):
    """A finding, and whether it makes the engine compute something else than training did."""

    finding: Finding
    distorts: bool = False


def refuses(code: str, message: str, engine: EngineName | None = None) -> Issue:
    """It does not load."""
    return _issue(code, Severity.ERROR, message, engine)


def distorts(code: str, message: str, engine: EngineName | None = None) -> Issue:
    """It loads, and computes something else than training did."""
    return _issue(code, Severity.WARNING, message, engine)._replace(distorts=True)


def warns(code: str, message: str, engine: EngineName | None = None) -> Issue:
    """Somebody should look."""
    return _issue(code, Severity.WARNING, message, engine)


def notes(code: str, message: str, engine: EngineName | None = None) -> Issue:
    """Good to know."""
    return _issue(code, Severity.NOTE, message, engine)


def _issue(code: str, severity: Severity, message: str, engine: EngineName | None) -> Issue:
    engines = () if engine is None else (engine,)
    return Issue(Finding(code=code, severity=severity, message=message, engines=engines))


def title(engine: EngineName) -> str:
    """Return how people write an engine's name."""
    return ENGINE_TITLES[engine]


def listed(names: Iterable[str]) -> str:
    """Return some names for a message: the first few, shortened."""
    every = list(names)
    shown = ", ".join(f"'{name[:MAX_NAME_CHARS]}'" for name in every[:MAX_LISTED])
    more = len(every) - MAX_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


@dataclass(frozen=True)
class Subject:
    """One adapter, read but not judged, and the base model that it is for."""

    folder: Path
    config: PeftConfig
    header: SafetensorsHeader
    lora: LoraTensors
    scales: TrainedScales
    base: BaseModel | None
    new_tokens: tuple[str, ...]
    """Tokens of added_tokens.json that the base model has no row for."""
    other_weights: tuple[str, ...]
    """Further *.safetensors files."""
    pickles: tuple[str, ...]
    config_bytes: int

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS_FILE

    @property
    def model_type(self) -> str | None:
        """Of the base model, as transformers calls it."""
        return None if self.base is None else str(self.base.config.get("model_type"))


def read_subject(folder: Path, base: BaseModel | None) -> Subject:
    """Read an adapter's folder.

    Raises:
        InvalidAdapter: If it is none.
    """
    names = _names(folder)
    if CONFIG_FILE not in names or WEIGHTS_FILE not in names:
        raise InvalidAdapter(_what_is_missing(folder, names))
    config = read_peft_config(folder)
    header = read_header(folder / WEIGHTS_FILE)
    lora = sort_tensors(header.tensors)
    if not lora.modules:
        raise InvalidAdapter(f"{WEIGHTS_FILE} holds no LoRA tensors, such as *.lora_A.weight.")
    return Subject(
        folder=folder,
        config=config,
        header=header,
        lora=lora,
        scales=TrainedScales(config),
        base=base,
        new_tokens=_new_tokens(folder, base) if "added_tokens.json" in names else (),
        other_weights=tuple(
            name for name in names if name.endswith(".safetensors") and name != WEIGHTS_FILE
        ),
        pickles=tuple(name for name in names if (folder / name).suffix in PICKLES),
        config_bytes=(folder / CONFIG_FILE).stat().st_size,
    )


def _names(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(path.name for path in folder.iterdir()))
    except OSError as error:
        raise InvalidAdapter(
            f"The folder '{folder.name}' cannot be read: {error.strerror or error}."
        ) from error


def _what_is_missing(folder: Path, names: tuple[str, ...]) -> str:
    inside = [name for name in names if (folder / name / CONFIG_FILE).is_file()]
    if inside:
        return (
            f"The adapter lies in the subfolder {listed(inside)}, where PEFT saves adapters that are "
            "not named 'default' and no engine looks: give that folder."
        )
    if WEIGHTS_FILE not in names and any((folder / name).suffix in PICKLES for name in names):
        return (
            "The tensors are pickled, which can run code: save them with safe_serialization=True, "
            f"as {WEIGHTS_FILE}."
        )
    missing = CONFIG_FILE if CONFIG_FILE not in names else WEIGHTS_FILE
    return f"The folder has no {missing}."


def _new_tokens(folder: Path, base: BaseModel | None) -> tuple[str, ...]:
    added: Mapping[str, object] = read_object(folder / "added_tokens.json")
    if not all(type(row) is int for row in added.values()):
        raise InvalidAdapter("added_tokens.json has to map tokens to whole numbers.")
    rows = base.vocab_rows if base is not None else None
    if rows is None:
        return ()
    return tuple(token for token, row in added.items() if isinstance(row, int) and row >= rows)
