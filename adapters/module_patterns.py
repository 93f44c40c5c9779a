r"""Which rank and alpha training gave each module: `rank_pattern` and `alpha_pattern` of PEFT.

Owns the matching: a key is a regular expression for the end of a module's name, at a dot (PEFT's `get_pattern_key`); the
first that matches counts. Keys come from strangers, so one that could take long to match is never run: then what the
pattern says of any module is unknown. Used by the linter.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapters.peft_config import PeftConfig

MAX_EXPRESSIONS = 4
MAX_KEY_CHARS = 300
MAX_MODULE_CHARS = 120
_PLAIN = re.compile(r"\^?[\w.\\]+\$?")
_QUANTIFIER = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


class ModulePattern:
    """Values by module name."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._plain: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], float]] = []
        self.is_known = True
        """False: a key is none that we run, and nothing is known of any module."""
        for index, (key, value) in enumerate(values.items()):
            self._add(index, key, value)

    def value_of(self, module: str) -> float | None:
        """Return the value for a module, None if no key matches."""
        found = []
        parts = module.split(".")
        for start in range(len(parts)):
            entry = self._plain.get(".".join(parts[start:]))
            found += [entry] if entry else []
        entry = self._plain.get(f"^{module}")
        found += [entry] if entry else []
        for index, expression, value in self._expressions:
            if expression.fullmatch(module[:MAX_MODULE_CHARS]):
                found.append((index, value))
        return min(found)[1] if found else None

    def _add(self, index: int, key: str, value: float) -> None:
        if _PLAIN.fullmatch(key) and "\\" not in key.replace("\\.", ""):
            self._plain.setdefault(key.removesuffix("$").replace("\\.", "."), (index, value))
        elif self._is_quick(key) and len(self._expressions) < MAX_EXPRESSIONS:
            try:
                expression = re.compile(rf"(.*\.)?({key})")
            # Unbalanced, a number too large, nested too deeply: `re` has an error for each.
            except (re.error, OverflowError, RecursionError):
                self.is_known = False
            else:
                self._expressions.append((index, expression, value))
        else:
            self.is_known = False

    @staticmethod
    def _is_quick(key: str) -> bool:
        # One repetition, of no group, beside the one that we put before it: quadratic at worst, in
        # MAX_MODULE_CHARS. A repeated group of alternatives takes exponential time by itself.
        if len(key) > MAX_KEY_CHARS or _REPEATED_GROUP.search(key):
            return False
        return len(_QUANTIFIER.findall(key)) <= 1


class TrainedScales:
    """The rank and alpha of each module as training had them; None where a pattern is not known."""

    def __init__(self, config: PeftConfig) -> None:
        self._config = config
        self._ranks = ModulePattern(config.rank_pattern)
        self._alphas = ModulePattern(config.alpha_pattern)
        self.is_known = self._ranks.is_known and self._alphas.is_known

    def rank_of(self, module: str) -> int | None:
        """Return the rank of a module."""
        if not self._ranks.is_known:
            return None
        return int(self._ranks.value_of(module) or self._config.r)

    def alpha_of(self, module: str) -> float | None:
        """Return the alpha of a module."""
        if not self._alphas.is_known:
            return None
        value = self._alphas.value_of(module)
        return self._config.lora_alpha if value is None else value
