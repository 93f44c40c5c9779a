"""The gateway's settings from `headrace.toml`, the environment and flags, each over the one before.

Owns the merge, the names of the environment's variables and the wording of what is refused. Never
looks for a file by itself: a path is given, or there is none. Called by `serving/cli/gateway.py`,
and by `serving/gateway/reload.py` for every reload.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin

import pydantic

from serving.config import GatewayConfig, Listen, ReplicaConfig, Settings
from serving.errors import ConfigError
from serving.gateway.key_file import parse_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic_core import ErrorDetails

MAX_FILE_BYTES = 1024 * 1024
PREFIX = "HEADRACE_"
_PATH_SUFFIXES = ("_file", "_dir")
_VALUE_ERROR = "Value error, "


class Contents(NamedTuple):
    """The bytes of the files that a configuration is made from, read once for all workers."""

    file: bytes
    keys: bytes | None


@dataclass(frozen=True)
class ConfigSource:
    """Where a gateway's settings come from; immutable, so that every reload means the same.

    Attributes:
        path: The file, or None.
        overrides: What flags and environment say, which beats the file.
    """

    path: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def read(self) -> Contents:
        """Reads the file, and the key file that it or a flag names.

        Raises:
            ConfigError: If one of them cannot be read.
        """
        content = b"" if self.path is None else _read(self.path)
        key_file = self._merged(content).get("api_key_file")
        if key_file is None:
            return Contents(content, None)
        return Contents(content, _read(Path(str(key_file)), "--api-key-file "))

    def resolve(self, contents: Contents) -> GatewayConfig:
        """The settings that these bytes mean.

        Raises:
            ConfigError: If they cannot work; one line that names the file and the key.
        """
        merged = self._merged(contents.file)
        if contents.keys is not None:
            merged["api_keys"] = parse_keys(contents.keys, Path(str(merged["api_key_file"])))
        if not merged.get("replicas"):
            raise ConfigError(
                "--replica: no replica is named: give --replica ENGINE=URL "
                "(vllm=http://127.0.0.1:9001), or [[replicas]] in --config FILE"
            )
        try:
            return GatewayConfig.model_validate(merged)
        except pydantic.ValidationError as error:
            raise ConfigError(self._sentence(error)) from None

    def load(self) -> GatewayConfig:
        """`resolve` of `read`."""
        return self.resolve(self.read())

    def _merged(self, content: bytes) -> dict[str, Any]:
        return _layer(_parse(content, self.path), self.overrides)

    def _sentence(self, error: pydantic.ValidationError) -> str:
        """One line for the first thing that is wrong; a misspelt key is always the first."""
        problems = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        problem = problems[0]
        place = problem["loc"]
        origin = "flags or environment" if _has(self.overrides, place) else str(self.path)
        return f"{origin}: {_explain(problem)}"


def environment_overrides(environ: Mapping[str, str]) -> dict[str, Any]:
    """What the environment says: `HEADRACE_WORKERS`, `HEADRACE_TIMEOUTS_IDLE_S` and so on.

    Every setting has its variable, sections by their name. Lists are separated by commas, tables
    written as `KEY=VALUE` pairs: `HEADRACE_ALIASES=fast=m,slow=n`. Empty ones count as unset.
    """
    return environment_section(GatewayConfig, PREFIX, environ)


def environment_section(
    model: type[Settings], prefix: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The same for other settings, whose variables begin with `prefix`."""
    return _section_of(model, prefix, environ)


def printable(config: GatewayConfig) -> str:
    """The resolved settings as JSON; of secrets only that they are set, of keys their names."""
    shown = config.model_dump(mode="json")
    shown["api_keys"] = [key.name for key in config.api_keys]
    return json.dumps(shown, indent=2) + "\n"


def _read(path: Path, flag: str = "--config ") -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag}{path}: {error.strerror or error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{flag}{path}: it is larger than {MAX_FILE_BYTES} bytes")
    return content


def _parse(content: bytes, path: Path | None) -> dict[str, Any]:
    """The file's tables; paths in it are relative to its folder."""
    if path is None:
        return {}
    try:
        tables = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: it is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: it is not TOML: it is nested too deeply") from None
    _anchor_paths(tables, path.parent)
    return tables


def _anchor_paths(table: dict[str, Any], folder: Path) -> None:
    for key, value in table.items():
        if isinstance(value, str) and key.endswith(_PATH_SUFFIXES):
            table[key] = str(folder / value)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                _anchor_paths(inner, folder)


def _layer(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `above` winning; tables are merged, lists replaced."""
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            merged[key] = _layer(before, value)
        else:
            merged[key] = value
    return merged


def layers(*from_lowest: Mapping[str, Any]) -> dict[str, Any]:
    """Several layers as one, the last winning."""
    merged: dict[str, Any] = {}
    for one in from_lowest:
        merged = _layer(merged, one)
    return merged


# The environment.


def _section_of(model: type[Settings], prefix: str, environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        kind = _without_none(info.annotation)
        variable = f"{prefix}{name.upper()}"
        if isinstance(kind, type) and issubclass(kind, Settings) and kind is not Listen:
            section = _section_of(kind, f"{variable}_", environ)
            if section:
                found[name] = section
        elif text := environ.get(variable):
            found[name] = _value(kind, text, variable)
    return found


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    others = [one for one in get_args(annotation) if one is not NoneType]
    return others[0] if len(others) == 1 and NoneType in get_args(annotation) else annotation


def _value(kind: Any, text: str, variable: str) -> Any:
    origin = get_origin(kind)
    parts = [part.strip() for part in text.split(",")]
    if origin is tuple:
        return parts
    if origin is not dict:
        return text
    pairs = {}
    for part in parts:
        key, separator, value = part.partition("=")
        if not (separator and key and value):
            raise ConfigError(f"{variable}: write KEY=VALUE[,KEY=VALUE …]")
        pairs[key] = value
    return pairs


# What is wrong.


def _has(overrides: Mapping[str, Any], place: tuple[int | str, ...]) -> bool:
    """Whether flags or environment set what is at fault."""
    at: Any = overrides
    for step in place:
        if not isinstance(at, dict):
            return True
        if step not in at:
            return False
        at = at[step]
    return bool(place)


def _explain(problem: ErrorDetails) -> str:
    place = problem["loc"]
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{_dotted(place)}'; {_nearest(place)}"
    if problem["type"] == "missing" and place[-1] == "host":
        return f"{_dotted((*place[:-1], 'url'))}: Field required"
    text = problem["msg"].removeprefix(_VALUE_ERROR)
    return f"{_dotted(place)}: {text}" if place else text


def _dotted(place: Iterable[int | str]) -> str:
    """`replicas[0].url`."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".")


def _nearest(place: tuple[int | str, ...]) -> str:
    known = _known_keys(place[:-1])
    close = get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known keys are: {', '.join(known)}"


def _known_keys(place: tuple[int | str, ...]) -> list[str]:
    model: type[Settings] = GatewayConfig
    for step in place:
        if isinstance(step, int):
            continue
        kind = _without_none(model.model_fields[step].annotation)
        inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
        model = inner
    names = list(model.model_fields)
    if model is ReplicaConfig:
        names = ["kind", "url", "ca_file", "insecure"]
    return names
