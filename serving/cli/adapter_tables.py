"""How adapters, versions and aliases look on a terminal. Used by `adapters.py`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 1 << 20


def print_registered(registered: Any) -> None:
    """Say what became of a push."""
    version = registered["version"]
    news = "registered" if registered["is_new"] else "was registered before"
    _line(f"{version['version']} {news} (rank {version['rank']}, {_mib(version['size_bytes'])})")
    for kind, reason in version["unloadable"].items():
        _line(f"  {kind} cannot load it: {reason}")
    _print_findings(version["report"])
    if registered["alias"] is not None:
        print_alias(registered["alias"])


def print_alias(alias: Any) -> None:
    """Say where an alias stands."""
    _line(f"{alias['alias']} -> {alias['target']} ({alias['state']})")
    pending = alias["pending"]
    if pending is not None:
        ready = f"{pending['num_ready']} of {pending['num_needed']} replicas ready"
        _line(f"  waits for {pending['target']}: {pending['reason'] or ready}")
    if alias["previous"] is not None:
        _line(f"  before: {alias['previous']}")


def print_lint(verdict: Any) -> None:
    """Say which engines can load an adapter."""
    for each in verdict["report"]["verdicts"]:
        engine = each["engine"]["kind"]
        if not each["loads"]:
            outcome = "cannot load it"
        else:
            outcome = "loads it" if each["is_faithful"] else "loads it, computes it differently"
        _line(f"{engine}: {outcome}")
        for finding in each["reasons"]:
            _line(f"  {finding['severity']} {finding['code']}: {finding['message']}")
    _print_findings(verdict["report"])
    _line("can be served" if verdict["servable"] else "cannot be served by this fleet")


def _print_findings(report: Any) -> None:
    for finding in report["findings"]:
        _line(f"  {finding['severity']} {finding['code']}: {finding['message']}")


def print_adapters(found: Any) -> None:
    """Print adapters, then aliases."""
    table = _table("ADAPTER", "LATEST", "VERSIONS", "OWNER", "LABELS", "UPDATED")
    for each in found["adapters"]:
        labels = ",".join(f"{key}={value}" for key, value in each["labels"].items())
        latest = each["latest"]["version"] if each["latest"] else "-"
        gone = " (deleted)" if each["deleted_at"] else ""
        table.add_row(
            each["name"] + gone,
            latest,
            str(each["num_versions"]),
            each["owner"],
            labels,
            _when(each["updated_at"]),
        )
    _print_table(table)
    if found["aliases"]:
        _line("")
        table = _table("ALIAS", "TARGET", "STATE", "BEFORE", "COPIES")
        for each in found["aliases"]:
            table.add_row(
                each["alias"],
                each["target"],
                each["state"],
                each["previous"] or "-",
                str(each["min_copies"]),
            )
        _print_table(table)


def print_adapter(found: Any) -> None:
    """Print an adapter with its versions, or a version with its placements."""
    if "adapter" in found:
        adapter = found["adapter"]
        _line(f"{adapter['name']}, owner {adapter['owner']}. {adapter['description']}".strip())
        table = _table("VERSION", "BASE", "RANK", "SIZE", "CREATED")
        for each in found["versions"]:
            table.add_row(
                each["version"],
                each["base"],
                str(each["rank"]),
                _mib(each["size_bytes"]),
                _when(each["created_at"]),
            )
        _print_table(table)
        return
    version = found["version"]
    _line(f"{version['version']} of {version['base']}, rank {version['rank']}")
    _line(f"digest {version['digest']}, aliases: {', '.join(version['aliases']) or 'none'}")
    table = _table("REPLICA", "PHASE", "LOAD", "ATTEMPTS", "REASON")
    for each in found["placements"]["data"]:
        load = "-" if each["load_s"] is None else f"{each['load_s']:.2f} s"
        table.add_row(
            each["replica"],
            each["phase"],
            load,
            str(each["num_attempts"]),
            each["reason"] or "",
        )
    _print_table(table)


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    return table


def _print_table(table: Table) -> None:
    console = Console(file=sys.stdout, highlight=False)
    # Into a pipe nothing is cut: others read it.
    console.print(table, width=None if console.is_terminal else 500)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.1f} MiB"


def _when(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")


def _line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
