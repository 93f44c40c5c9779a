"""Sends an adapter to the platform, with a progress bar on a terminal. Used by `adapters.py`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from serving.cli.adapter_tar import AdapterTar

if TYPE_CHECKING:
    from pathlib import Path

    from serving.cli.platform_client import PlatformClient


def push_folder(client: PlatformClient, route: str, folder: Path, options: dict[str, Any]) -> Any:
    """Send a folder as a tar archive and return the platform's answer.

    Args:
        client: Of the platform.
        route: That takes uploads.
        folder: That PEFT saved.
        options: What is said of the upload.

    Raises:
        ConfigError: If it is not an adapter's folder.
        Refused: If the platform refuses it.
    """
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        archive = AdapterTar(folder, lambda num_bytes: bar.advance(task, num_bytes))
        task = bar.add_task(f"sending {folder.name}", total=archive.size_bytes)
        headers = {
            "content-type": "application/x-tar",
            "content-length": str(archive.size_bytes),
        }
        return client.call(
            "POST", route, content=iter(archive), headers=headers, params=_as_query(options)
        )


def push_source(client: PlatformClient, route: str, source: str, options: dict[str, Any]) -> Any:
    """Have the platform fetch an adapter from an object URL; return its answer.

    Raises:
        Refused: If the platform refuses it.
    """
    return client.call("POST", route, json={"source": source, **options})


def _as_query(options: dict[str, Any]) -> list[tuple[str, str]]:
    query: list[tuple[str, str]] = []
    for name, value in options.items():
        if name == "labels":
            query += [("label", f"{key}={text}") for key, text in value.items()]
        else:
            query.append((name, str(value).lower() if isinstance(value, bool) else str(value)))
    return query
