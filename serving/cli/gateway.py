"""`headrace gateway`: the data plane alone, over replicas that run already."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.errors import one_line_errors
from serving.config import Limits, Listen, ReplicaConfig, Timeouts
from serving.config_file import ConfigSource, environment_overrides, layers, printable
from serving.errors import ConfigError
from serving.gateway.server import check_startable, run
from serving.log_format import log_to_stderr

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEFAULTS = Timeouts()
_SECONDS = {field: f"Seconds (default {value:g})." for field, value in _DEFAULTS}


def gateway(
    replica: Annotated[
        list[str] | None,
        typer.Option(help="A running engine, ENGINE=URL (vllm=http://127.0.0.1:9001); repeat it."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            envvar="HEADRACE_LISTEN", help="HOST:PORT to serve on (default 127.0.0.1:8000)."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            envvar="HEADRACE_WORKERS", min=1, max=256, help="Processes on the port (default 1)."
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Public model name, NAME=MODEL that replicas serve; repeat it."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="HEADRACE_API_KEY_FILE", help="Hashes of API keys; see headrace keys create."
        ),
    ] = None,
    insecure_no_auth: Annotated[
        bool,
        typer.Option(
            "--insecure-no-auth", help="Serve without API keys on an address that others can reach."
        ),
    ] = False,
    connect_timeout_s: Annotated[
        float | None, typer.Option(min=0.01, help=_SECONDS["connect_s"])
    ] = None,
    first_byte_timeout_s: Annotated[
        float | None, typer.Option(min=0.01, help=_SECONDS["first_byte_s"])
    ] = None,
    idle_timeout_s: Annotated[float | None, typer.Option(min=0.01, help=_SECONDS["idle_s"])] = None,
    total_timeout_s: Annotated[
        float | None, typer.Option(min=0.01, help=_SECONDS["total_s"])
    ] = None,
    drain_timeout_s: Annotated[
        float | None, typer.Option(min=0.01, help=_SECONDS["drain_s"])
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            min=1024, help=f"Larger ones are refused (default {Limits().max_body_bytes})."
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="http://HOST:PORT of headrace control; its token is in HEADRACE_CONTROL_TOKEN."
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Where the control plane's last snapshot is kept, to start without it."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="HEADRACE_CONFIG", help="headrace.toml; flags and environment beat it."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Print the resolved settings as JSON and end."),
    ] = False,
) -> None:
    """Serve one OpenAI-compatible endpoint over engines that run already.

    Needs no file and no database: models are learnt from the replicas. Everything can be set in a
    file too, with --config, and by a variable HEADRACE_… of its own. Engines that want an API key
    get the one in HEADRACE_REPLICA_API_KEY. Ready when GET /healthz answers 200.
    """
    log_to_stderr()
    with one_line_errors():
        flags: dict[str, Any] = {
            "listen": Listen.parse(listen) if listen else None,
            "workers": workers,
            "replicas": [ReplicaConfig.parse(text) for text in replica or []] or None,
            "aliases": _parse_aliases(alias or []) or None,
            "api_key_file": api_key_file,
            "insecure_no_auth": insecure_no_auth or None,
            "timeouts": _given(
                {
                    "connect_s": connect_timeout_s,
                    "first_byte_s": first_byte_timeout_s,
                    "idle_s": idle_timeout_s,
                    "total_s": total_timeout_s,
                    "drain_s": drain_timeout_s,
                }
            ),
            "limits": _given({"max_body_bytes": max_body_bytes}),
            "control": _given({"url": control}) or None,
            "state_dir": state_dir,
        }
        overrides = layers(environment_overrides(os.environ), _given(flags))
        source = ConfigSource(config, overrides)
        resolved = source.load()
        if check:
            check_startable(resolved)
            sys.stdout.write(printable(resolved))
        else:
            run(resolved, on_ready=_say_ready, source=source)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were set."""
    return {name: value for name, value in flags.items() if value is not None}


def _say_ready(url: str) -> None:
    sys.stdout.write(f"headrace gateway: serving on {url}\n")
    sys.stdout.flush()


def _parse_aliases(texts: list[str]) -> dict[str, str]:
    aliases = {}
    for text in texts:
        name, separator, target = text.partition("=")
        if not (separator and name and target):
            raise ConfigError(f"--alias {text}: write NAME=MODEL")
        aliases[name] = target
    return aliases
