"""The command `headrace`: one function a file beside this one."""

from __future__ import annotations

import typer

from serving.cli.adapters import adapters
from serving.cli.bench import bench
from serving.cli.control import control
from serving.cli.doctor import doctor
from serving.cli.gateway import gateway
from serving.cli.keys import keys
from serving.cli.up import up

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="One OpenAI-compatible endpoint over vLLM replicas, with adaptation built in.",
)
app.command()(up)
app.command()(gateway)
app.command()(control)
app.command()(doctor)
app.add_typer(adapters, name="adapters")
app.add_typer(keys, name="keys")
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
