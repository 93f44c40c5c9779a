"""Whether the fleet can serve an adapter: the linter asked, and its answer kept with the version.

Owns what is refused at registration, and the form in which the report is stored. Never reads a file
itself (`adapters/compat.py` does).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapters.compat import LintReport, Severity, lint
from serving.control.errors import Unprocessable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from adapters.base_model import BaseModel
    from adapters.compat import EngineLimits, Verdict

NO_EFFECT = "no-effect"


def judge(
    folder: Path,
    base: BaseModel | None,
    engines: Sequence[EngineLimits],
    *,
    scan: bool,
    allow_no_effect: bool,
) -> LintReport:
    """Ask the linter.

    Args:
        folder: Of the adapter.
        base: What it is for; None leaves shapes unchecked.
        engines: Of the fleet.
        scan: Whether the tensors are looked at.
        allow_no_effect: Whether an adapter that changes nothing is taken, for example as a control.

    Raises:
        InvalidAdapter: If there is no adapter in the folder.
    """
    report = lint(folder, base, engines, scan_values=scan)
    errors = {one.code for one in report.findings if one.severity is Severity.ERROR}
    if allow_no_effect and errors == {NO_EFFECT}:
        return lint(folder, base, engines)
    return report


def check_servable(report: LintReport, *, allow_unfaithful: bool) -> None:
    """Refuse what no engine of the fleet can load.

    Raises:
        Unprocessable: With each engine's reason.
    """
    if report.loads_somewhere(allow_unfaithful=allow_unfaithful):
        return
    if report.has_errors:
        reasons = [one.message for one in report.findings if one.severity is Severity.ERROR]
        raise Unprocessable(f"Not registered: {' '.join(reasons)}", code="invalid_adapter")
    told = "; ".join(f"{v.engine.kind}: {v.reason}" for v in report.verdicts)
    raise Unprocessable(
        f"Not registered, as no engine of the fleet serves it. {told}", code="no_engine_can_load"
    )


def kept(report: LintReport, *, allow_unfaithful: bool, allow_no_effect: bool) -> dict[str, Any]:
    """Return what is stored with a version."""
    return {
        "allow_unfaithful": allow_unfaithful,
        "allow_no_effect": allow_no_effect,
        "lint": report.model_dump(mode="json"),
    }


def may_do_nothing(stored: dict[str, Any]) -> bool:
    """Whether a version was taken although it may answer as its base model does."""
    return stored["allow_no_effect"] is True


def lint_report(stored: dict[str, Any]) -> LintReport:
    """Return the linter's report out of what is stored."""
    return LintReport.model_validate(stored["lint"])


def unloadable(stored: dict[str, Any]) -> dict[str, str]:
    """Return engine kind → why the linter says that a version cannot load there.

    A kind that several replicas have with different limits counts as able if one of them is.
    """
    report = lint_report(stored)
    is_allowed = stored["allow_unfaithful"] is True
    refused: dict[str, Verdict] = {}
    accepted = set()
    for verdict in report.verdicts:
        if verdict.is_accepted(allow_unfaithful=is_allowed):
            accepted.add(verdict.engine.kind)
        else:
            refused[verdict.engine.kind] = verdict
    return {kind: verdict.reason for kind, verdict in refused.items() if kind not in accepted}
