"""The linter: which engines can load an adapter, and whether they compute what training did.

Owns the putting together of the rules' issues into a report. Reads adapter_config.json and the header of the tensors'
file, no tensor unless it is asked to; never imports torch. Used by the registry, which refuses what no engine can load,
by the reconciler and by `headrace adapters lint`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.lint_report import (
    EngineLimits,
    EngineName,
    Finding,
    LintReport,
    Severity,
    Verdict,
)
from adapters.rules import adapter, sglang, tensorrt_llm, values, vllm
from adapters.rules.subject import Issue, Subject, notes, read_subject, title

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from adapters.base_model import BaseModel

__all__ = [
    "EngineLimits",
    "EngineName",
    "Finding",
    "LintReport",
    "Severity",
    "Verdict",
    "lint",
]

_ENGINES: dict[EngineName, Callable[[Subject, EngineLimits], Iterator[Issue]]] = {
    "vllm": vllm.issues,
    "sglang": sglang.issues,
    "tensorrt-llm": tensorrt_llm.issues,
}


def lint(
    folder: Path,
    base: BaseModel | None,
    engines: Sequence[EngineLimits],
    *,
    scan_values: bool = False,
) -> LintReport:
    """Judge one adapter.

    Args:
        folder: As PEFT saves it.
        base: The base model that it is for; None leaves modules and shapes unchecked, which a note says.
        engines: How the replicas were launched that may get it.
        scan_values: Look at the tensors too: NaN, infinity, zeros. Reads the whole file.

    Returns:
        The report, with one verdict for each of `engines`.

    Raises:
        InvalidAdapter: If the folder holds no LoRA adapter, or a broken one.
    """
    subject = read_subject(folder, base)
    own = list(adapter.issues(subject))
    if scan_values:
        own += values.issues(subject)
    return LintReport(
        findings=_findings(own),
        verdicts=tuple(_verdict(subject, own, limits) for limits in engines),
        base_model=None if base is None else base.name,
        rank=max(subject.lora.ranks, default=subject.config.r),
        alpha=subject.config.lora_alpha,
        target_modules=subject.lora.names,
        num_parameters=sum(entry.num_elements for entry in subject.header.tensors.values()),
        size_bytes=subject.header.size_bytes + subject.config_bytes,
        dtype=_dtype(subject),
    )


def _verdict(subject: Subject, own: Sequence[Issue], limits: EngineLimits) -> Verdict:
    broken = [issue for issue in own if issue.finding.severity is Severity.ERROR]
    of_engine = list(_ENGINES[limits.kind](subject, limits))
    every = [*broken, *of_engine]
    loads = all(issue.finding.severity is not Severity.ERROR for issue in every)
    is_faithful = loads and not any(issue.distorts for issue in every)
    if is_faithful:
        every.append(_fits(subject, limits))
    return Verdict(engine=limits, loads=loads, is_faithful=is_faithful, reasons=_findings(every))


def _fits(subject: Subject, limits: EngineLimits) -> Issue:
    rank = max(subject.lora.ranks, default=subject.config.r)
    modules = ", ".join(name[:60] for name in subject.lora.names[:8])
    return notes(
        "fits",
        f"{title(limits.kind)} serves it: rank {rank} of at most {limits.max_lora_rank} on {modules}.",
        limits.kind,
    )


def _findings(issues: Iterable[Issue]) -> tuple[Finding, ...]:
    return tuple(issue.finding for issue in issues)


def _dtype(subject: Subject) -> str:
    types = {entry.dtype for entry in subject.header.tensors.values()}
    if len(types) > 1:
        return "mixed"
    only = next(iter(types))
    return adapter.SERVED_DTYPES.get(only, only)
