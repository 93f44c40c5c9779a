"""Counters, gauges and histograms in Prometheus' text format, as cheap as they can be.

`prometheus_client` costs a lock an observation; the simulator makes some twenty a request.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Histogram:
    """Observations by bucket.

    Attributes:
        count: Observations.
        total: Their sum.
    """

    __slots__ = ("_bounds", "_counts", "count", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Starts empty.

        Args:
            bounds: Upper bounds of the buckets, ascending; the last, infinite one is implied.
        """
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Adds one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.count += 1
        self.total += value

    def text(self, name: str, labels: str) -> str:
        """Its samples.

        Args:
            name: Of the family.
            labels: Already in the text format, without braces.
        """
        lines, so_far = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            so_far += count
            le = "+Inf" if bound == float("inf") else str(float(bound))
            lines.append(f'{name}_bucket{{{labels},le="{le}"}} {float(so_far)}\n')
        lines.append(f"{name}_count{{{labels}}} {float(self.count)}\n")
        lines.append(f"{name}_sum{{{labels}}} {self.total}\n")
        return "".join(lines)


def header(name: str, kind: str, text: str) -> str:
    """The two comment lines of a family."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def samples(name: str, labels: str, values: Mapping[str, float]) -> str:
    """Samples of one family.

    Args:
        name: Of the family.
        labels: That all have.
        values: Further labels, ending in a comma or empty → value.
    """
    return "".join(f"{name}{{{more}{labels}}} {float(value)}\n" for more, value in values.items())


def escaped(value: str) -> str:
    """A label's value, as the text format wants it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
