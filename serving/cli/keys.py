"""`headrace keys`: API keys of the gateway."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.cli.errors import one_line_errors
from serving.gateway.key_file import create_key, read_key_file

keys = typer.Typer(no_args_is_help=True, help="API keys of the gateway; only hashes are kept.")

_File = Annotated[Path, typer.Option(envvar="HEADRACE_API_KEY_FILE", help="File of key hashes.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@keys.command()
def create(
    file: _File,
    name: Annotated[str, typer.Option()] = "default",
    admin: Annotated[
        bool, typer.Option("--admin", help="It may change the platform, not only ask models.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Make a key: its hash goes to the file, the key is printed once and kept nowhere."""
    with one_line_errors():
        key = create_key(file, name, is_admin=admin)
    sys.stdout.write(json.dumps({"name": name, "key": key}) + "\n" if as_json else f"{key}\n")


@keys.command(name="list")
def list_keys(file: _File, as_json: _Json = False) -> None:
    """List the names of the keys in a file."""
    with one_line_errors():
        names = [key.name for key in read_key_file(file)]
    sys.stdout.write(json.dumps(names) + "\n" if as_json else "".join(f"{n}\n" for n in names))
