"""`headrace control`: the control plane alone, beside gateways and replicas that run already."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.cli.errors import one_line_errors
from serving.config_file import environment_section, layers
from serving.errors import ConfigError
from serving.log_format import log_to_stderr

PREFIX = "HEADRACE_CONTROL_"
TOKEN_VARIABLE = f"{PREFIX}TOKEN"
_MISSING = "headrace control needs its packages: pip install 'headrace[control]'"


def control(
    listen: Annotated[
        str | None,
        typer.Option(
            envvar="HEADRACE_CONTROL_LISTEN", help="HOST:PORT to serve on (default 127.0.0.1:8100)."
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="HEADRACE_CONTROL_DATABASE_URL",
            help="sqlite:///FILE or postgresql://… (default: control.db in the state folder).",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="HEADRACE_CONTROL_STORE_URL",
            help="Where adapter files are kept: file:///… or s3://… (default: in the state folder).",
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(envvar="HEADRACE_STATE_DIR", help="Folder for what it keeps."),
    ] = None,
    replica: Annotated[
        list[str] | None,
        typer.Option(help="A running engine, ENGINE=URL (vllm=http://127.0.0.1:9001); repeat it."),
    ] = None,
    gateway: Annotated[
        str | None,
        typer.Option(
            envvar="HEADRACE_CONTROL_GATEWAY_URL",
            help="URL through which adapters are probed (default http://127.0.0.1:8000).",
        ),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a base model, for the linter; repeat it."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="HEADRACE_CONTROL_TOKEN_FILE",
            help=f"File (mode 0600) with the token that callers present; or set {TOKEN_VARIABLE}.",
        ),
    ] = None,
    local_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that file:// sources must lie in; repeat it (default: any)."),
    ] = None,
    no_local_paths: Annotated[
        bool, typer.Option("--no-local-paths", help="Take no file:// sources.")
    ] = False,
    max_lora_rank: Annotated[
        int | None, typer.Option(min=1, help="What the replicas were started with (default 16).")
    ] = None,
    max_loras: Annotated[
        int | None, typer.Option(min=1, help="Adapters in one batch of the replicas (default 2).")
    ] = None,
    max_cpu_loras: Annotated[
        int | None,
        typer.Option(
            min=1, help="Adapters that one of the replicas may know at once (default 16)."
        ),
    ] = None,
    insecure_listen: Annotated[
        bool,
        typer.Option(
            "--insecure-listen",
            help="Listen beyond loopback, where the token passes in plain text.",
        ),
    ] = False,
) -> None:
    """Serve the registry of adapters and aliases, and keep the replicas as it says.

    Gateways follow it and serve on without it. Every call needs the token. Every setting has its
    variable HEADRACE_CONTROL_… too; flags beat them.
    """
    log_to_stderr()
    for name in ("alembic.runtime.plugins", "httpx", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with one_line_errors():
        try:
            from serving.control.server import run
            from serving.control.settings import ControlSettings
        except ModuleNotFoundError as error:
            raise ConfigError(f"{_MISSING} ({error.name} is not installed)") from None
        given: dict[str, Any] = {
            "listen": listen,
            "database_url": database_url,
            "store_url": store,
            "state_dir": state_dir,
            "replicas": replica,
            "gateway_url": gateway,
            "replica_api_key": os.environ.get("HEADRACE_REPLICA_API_KEY"),
            "base_models": _parse_bases(base_model or []) or None,
            "token": _token(token_file),
            "allow_local_paths": False if no_local_paths else None,
            "local_roots": local_root,
            "max_lora_rank": max_lora_rank,
            "max_loras": max_loras,
            "max_cpu_loras": max_cpu_loras,
            "insecure_listen": insecure_listen or None,
        }
        known = {name: value for name, value in given.items() if value is not None}
        variables = environment_section(ControlSettings, PREFIX, os.environ)
        run(ControlSettings(**layers(variables, known)), _say_ready)


def _say_ready(url: str) -> None:
    sys.stdout.write(f"headrace control: serving on {url}\n")
    sys.stdout.flush()


def _token(token_file: Path | None) -> str:
    from serving.control.settings import read_token

    if token_file is not None:
        return read_token(token_file)
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ConfigError(f"--token-file: give a file with the token, or set {TOKEN_VARIABLE}")
    return token


def _parse_bases(texts: list[str]) -> dict[str, Path]:
    bases = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not (separator and name and folder):
            raise ConfigError(f"--base-model {text}: write NAME=FOLDER")
        bases[name] = Path(folder)
    return bases
