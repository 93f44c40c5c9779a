"""`headrace bench`: what it takes to measure a gateway, and to try one without a GPU.

The benchmarks know `serving` and not the other way around: each command becomes a process of its own
module, and its options are that module's.
"""

from __future__ import annotations

import os
import sys

import typer

bench = typer.Typer(no_args_is_help=True, help="Simulated engines and measurements.")

_PASS_ALL = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    # `--help` too is answered by the module.
    "help_option_names": [],
}


@bench.callback()
def _group() -> None:
    """Keeps `engine` a command of its own while it is the only one."""


@bench.command(context_settings=_PASS_ALL, add_help_option=False)
def engine(context: typer.Context) -> None:
    """Run a simulated vLLM: its API, metrics, prefix cache and KV events; `--help` has its options."""
    _become("benchmarks.engine_sim", context.args)


def _become(module: str, arguments: list[str]) -> None:
    """Runs a module in this process's place."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606
