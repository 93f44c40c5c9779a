"""How much each adapter version is asked for: request and token rates that forget exponentially.

Owns the decayed counters. Never reads a clock, never does I/O: times are the caller's. Fed by whoever
sees requests settle, read by whoever calls `placement.plan`.

A sum S of what came in is kept per version and halves every `half_life_s`. Under a steady rate λ its
expectation is λ · half_life / ln 2, so the rate is S · ln 2 / half_life: the exponentially weighted
estimate of a Poisson rate, with the mean age of an observation half_life / ln 2. Until a few half-lives
have passed all rates read low by the same factor, which leaves their order as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_HALF_LIFE_S = 300.0
"""Five minutes. Between 2 and 20 minutes misses differ by less than 2 % on the popularities of
`benchmarks/adapters.py`; shorter ones follow a drift sooner and so move less ahead of requests."""
DEFAULT_MAX_VERSIONS = 4096


@dataclass(frozen=True, slots=True)
class Rate:
    """What one version is asked for now.

    Attributes:
        requests_per_s: Decayed rate of requests.
        tokens_per_s: Decayed rate of prompt and completion tokens.
        idle_s: Seconds since the last request.
    """

    requests_per_s: float
    tokens_per_s: float
    idle_s: float


@dataclass(slots=True)
class _Sums:
    requests: float
    tokens: float
    at_s: float
    last_used_s: float


class Demand:
    """Decayed rates of a bounded number of versions.

    Attributes:
        num_forgotten: Versions that were dropped because there were more than `max_versions`.
    """

    def __init__(
        self,
        half_life_s: float = DEFAULT_HALF_LIFE_S,
        max_versions: int = DEFAULT_MAX_VERSIONS,
    ) -> None:
        """Starts empty.

        Args:
            half_life_s: Seconds after which a request counts half.
            max_versions: Beyond this many the least asked-for version is dropped.

        Raises:
            ValueError: If either is not above zero.
        """
        if not half_life_s > 0 or max_versions < 1:
            raise ValueError("half_life_s and max_versions must be above zero.")
        self.num_forgotten = 0
        self._half_life_s = half_life_s
        self._max_versions = max_versions
        self._sums: dict[str, _Sums] = {}

    def __len__(self) -> int:
        """Number of versions that are known."""
        return len(self._sums)

    def add(self, version: str, requests: float, tokens: float, now_s: float) -> None:
        """Counts what was asked of a version.

        Args:
            version: `name@digest12`.
            requests: How many, 0 to add tokens of a request that was counted before.
            tokens: Prompt and completion tokens.
            now_s: On the caller's clock; times that run backwards count as no time passed.
        """
        sums = self._sums.get(version)
        if sums is None:
            if len(self._sums) >= self._max_versions:
                self._forget_least(now_s)
            sums = self._sums[version] = _Sums(0.0, 0.0, now_s, now_s)
        kept = self._kept(sums, now_s)
        sums.requests = sums.requests * kept + requests
        sums.tokens = sums.tokens * kept + tokens
        sums.at_s = max(sums.at_s, now_s)
        if requests > 0:
            sums.last_used_s = max(sums.last_used_s, now_s)

    def forget(self, version: str) -> None:
        """Drops a version that no longer exists."""
        self._sums.pop(version, None)

    def rate(self, version: str, now_s: float) -> Rate:
        """What one version is asked for; zero and idle for ever where it is not known."""
        sums = self._sums.get(version)
        if sums is None:
            return Rate(0.0, 0.0, math.inf)
        scale = self._kept(sums, now_s) * math.log(2) / self._half_life_s
        idle_s = max(0.0, now_s - sums.last_used_s)
        return Rate(sums.requests * scale, sums.tokens * scale, idle_s)

    def rates(self, now_s: float) -> Mapping[str, Rate]:
        """What every known version is asked for."""
        return {version: self.rate(version, now_s) for version in self._sums}

    def _kept(self, sums: _Sums, now_s: float) -> float:
        return math.exp2(-max(0.0, now_s - sums.at_s) / self._half_life_s)

    def _forget_least(self, now_s: float) -> None:
        least = min(
            self._sums,
            key=lambda version: (
                self._sums[version].requests * self._kept(self._sums[version], now_s),
                version,
            ),
        )
        del self._sums[least]
        self.num_forgotten += 1
