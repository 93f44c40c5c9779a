"""`headrace doctor`: what is installed, what can start here, and what to do about the rest."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from serving.cli.errors import one_line_errors
from serving.config import Listen, cache_dir, state_dir
from serving.fleet.doctor import Finding, Level, Surroundings, examine

EXIT_BAD = 1
COLOURS = {Level.OK: "green", Level.NOTE: "yellow", Level.BAD: "red"}


def doctor(
    listen: Annotated[
        str, typer.Option(envvar="HEADRACE_LISTEN", help="HOST:PORT that is to be free.")
    ] = "127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what keeps Headrace from running on this host, and what to do about it.

    Exits with 1 if something that is needed does not work.
    """
    with one_line_errors():
        surroundings = Surroundings(
            listen=Listen.parse(listen),
            state_dir=state_dir().absolute(),
            cache_dir=cache_dir().absolute(),
            env=dict(os.environ),
        )
    findings: list[Finding] = []
    console = Console(highlight=False)
    for finding in examine(surroundings):
        findings.append(finding)
        if not as_json:
            _print(console, finding)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    if any(finding.level is Level.BAD for finding in findings):
        raise typer.Exit(EXIT_BAD)


def _print(console: Console, finding: Finding) -> None:
    line = Text.assemble(
        (f"{finding.level:<5}", COLOURS[finding.level]), f"{finding.subject:<18}{finding.found}"
    )
    console.print(line, soft_wrap=True)
    if finding.advice and finding.level is not Level.OK:
        console.print(Text(f"     {'':<18}→ {finding.advice}", style="dim"), soft_wrap=True)
