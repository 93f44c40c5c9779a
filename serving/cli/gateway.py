"""`headrace gateway`: the data plane alone, over replicas that run already."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr

from serving.cli.errors import one_line_errors
from serving.config import GatewayConfig, Limits, Listen, ReplicaConfig, Timeouts
from serving.errors import ConfigError
from serving.gateway.key_file import read_key_file
from serving.gateway.server import run

_DEFAULTS = Timeouts()


def gateway(
    replica: Annotated[
        list[str],
        typer.Option(help="A running engine, ENGINE=URL (vllm=http://127.0.0.1:9001); repeat it."),
    ],
    listen: Annotated[
        str, typer.Option(envvar="HEADRACE_LISTEN", help="HOST:PORT to serve on.")
    ] = "127.0.0.1:8000",
    workers: Annotated[
        int, typer.Option(envvar="HEADRACE_WORKERS", min=1, max=256, help="Processes on the port.")
    ] = 1,
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
    connect_timeout_s: Annotated[float, typer.Option(min=0.01)] = _DEFAULTS.connect_s,
    first_byte_timeout_s: Annotated[float, typer.Option(min=0.01)] = _DEFAULTS.first_byte_s,
    idle_timeout_s: Annotated[float, typer.Option(min=0.01)] = _DEFAULTS.idle_s,
    total_timeout_s: Annotated[float, typer.Option(min=0.01)] = _DEFAULTS.total_s,
    drain_timeout_s: Annotated[float, typer.Option(min=0.01)] = _DEFAULTS.drain_s,
    max_body_bytes: Annotated[int, typer.Option(min=1024)] = Limits().max_body_bytes,
) -> None:
    """Serve one OpenAI-compatible endpoint over engines that run already.

    Needs no file and no database: models are learnt from the replicas. Engines that want an API
    key get the one in HEADRACE_REPLICA_API_KEY. Ready when GET /healthz answers 200.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with one_line_errors():
        replica_key = os.environ.get("HEADRACE_REPLICA_API_KEY")
        config = GatewayConfig(
            listen=Listen.parse(listen),
            replicas=tuple(ReplicaConfig.parse(text) for text in replica),
            aliases=_parse_aliases(alias or []),
            workers=workers,
            api_keys=read_key_file(api_key_file) if api_key_file else (),
            replica_api_key=SecretStr(replica_key) if replica_key else None,
            insecure_no_auth=insecure_no_auth,
            timeouts=_DEFAULTS.model_copy(
                update={
                    "connect_s": connect_timeout_s,
                    "first_byte_s": first_byte_timeout_s,
                    "idle_s": idle_timeout_s,
                    "total_s": total_timeout_s,
                    "drain_s": drain_timeout_s,
                }
            ),
            limits=Limits(max_body_bytes=max_body_bytes),
        )
        run(config, on_ready=_say_ready)


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
