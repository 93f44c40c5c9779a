"""What the numbers of an adapter say: whether it is broken, or does nothing.

Owns the rules on values. Called by `compat.py` where a scan was asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.rules.subject import Issue, Subject, listed, refuses, warns
from adapters.tensor_scan import TensorValues, scan_values

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def issues(subject: Subject) -> Iterator[Issue]:
    """Yield what is wrong with the values."""
    values = scan_values(subject.weights, subject.header)
    broken = [name for name, seen in values.items() if not seen.is_finite]
    if broken:
        yield refuses("not-finite", f"{listed(broken)} holds NaN or infinity: training diverged.")
    zero_a = _zero_modules(values, "A")
    zero_b = _zero_modules(values, "B")
    idle = zero_a | zero_b
    if len(idle) == len(subject.lora.modules):
        yield refuses(
            "no-effect",
            "A or B of every module is zero, so the adapter does nothing: it was saved before training.",
        )
        return
    if zero_b:
        yield warns("b-zero", f"B of {listed(sorted(zero_b))} is zero: that LoRA does nothing.")
    if zero_a:
        yield warns("a-zero", f"A of {listed(sorted(zero_a))} is zero: that LoRA does nothing.")


def _zero_modules(values: Mapping[str, TensorValues], part: str) -> set[str]:
    ends = (f".lora_{part}.weight", f".lora_embedding_{part}")
    return {
        name.removesuffix(ends[0]).removesuffix(ends[1])
        for name, seen in values.items()
        if seen.is_zero and name.endswith(ends)
    }
