"""`headrace adapters`: push adapters to a running platform, name them, take them back."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.cli.adapter_push import push_folder, push_source
from serving.cli.adapter_tables import (
    print_adapter,
    print_adapters,
    print_alias,
    print_lint,
    print_registered,
)
from serving.cli.errors import one_line_errors
from serving.cli.platform_client import (
    DEFAULT_URL,
    EXIT_REFUSED,
    ApiKey,
    AsJson,
    PlatformClient,
    Url,
    platform,
)
from serving.errors import ConfigError

API = "/admin/v1"
POLL_S = 0.5
PAGE = 200

adapters = typer.Typer(
    no_args_is_help=True,
    help="LoRA adapters: their versions, and the aliases that clients ask for.",
)

_Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until the alias serves the new version.")
]
_WaitS = Annotated[float, typer.Option(min=0, help="How long to wait, in seconds.")]
_Revision = Annotated[
    int | None, typer.Option(min=0, help="Refuse if the alias has changed since this revision.")
]


@adapters.command()
def push(
    path: Annotated[str, typer.Argument(help="Folder that PEFT saved, or s3://BUCKET/PREFIX.")],
    name: Annotated[str, typer.Option(help="Of the adapter; its versions share it.")],
    alias: Annotated[
        str | None, typer.Option(help="Model name for clients; points at the new version.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, where the platform serves several.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(help="Version that it was trained from, NAME@DIGEST.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Of the adapter.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; repeat it.")] = None,
    scan: Annotated[
        bool, typer.Option("--scan/--no-scan", help="Look for NaN and for tensors without effect.")
    ] = True,
    allow_no_effect: Annotated[
        bool, typer.Option("--allow-no-effect", help="Take one that changes nothing.")
    ] = False,
    allow_unfaithful: Annotated[
        bool,
        typer.Option(
            "--allow-unfaithful", help="Take one that engines compute differently from training."
        ),
    ] = False,
    wait: _Wait = True,
    wait_s: _WaitS = 300.0,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Register a version of an adapter and, with --alias, have an alias answer with it.

    An alias that serves another version already keeps it until the new one is proven on the replicas.
    Exit code 1: refused, with the reason; or the alias did not get there.
    """
    with one_line_errors():
        options: dict[str, Any] = {
            "alias": alias,
            "base": base,
            "parent": parent,
            "owner": owner,
            "labels": _labels(label or []) or None,
            "scan": scan,
            "allow_no_effect": allow_no_effect,
            "allow_unfaithful": allow_unfaithful,
        }
        given = {key: value for key, value in options.items() if value is not None}
        route = f"{API}/adapters/{name}/versions"
        with platform(url, api_key) as client:
            registered = _upload(client, route, path, given)
            if alias is not None and wait:
                registered["alias"] = _settled(client, alias, registered["alias"], wait_s)
    _print(registered, as_json, print_registered)
    _end_unless_serving(registered["alias"], wait=wait)


@adapters.command()
def lint(
    path: Annotated[str, typer.Argument(help="Folder that PEFT saved, or s3://BUCKET/PREFIX.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, where the platform serves several.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Say which engines of the fleet can load an adapter, and why not; registers nothing.

    Exit code 1 if no engine can.
    """
    with one_line_errors(), platform(url, api_key) as client:
        options = {"base": base} if base else {}
        verdict = _upload(client, f"{API}/adapters/lint", path, options)
    _print(verdict, as_json, print_lint)
    if not verdict["servable"]:
        raise typer.Exit(EXIT_REFUSED)


@adapters.command(name="alias")
def set_alias(
    alias: Annotated[str, typer.Argument(help="Model name for clients.")],
    target: Annotated[str, typer.Argument(help="NAME@DIGEST, or a base model's name.")],
    min_copies: Annotated[
        int | None,
        typer.Option(min=0, help="Replicas that always have it; 0 loads it when asked for."),
    ] = None,
    revision: _Revision = None,
    wait: _Wait = True,
    wait_s: _WaitS = 300.0,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at a version or at a base model.

    Exit code 1 if the version cannot be proven; the alias then stays where it was.
    """
    body = {"target": target, "min_copies": min_copies, "revision": revision}
    given = {key: value for key, value in body.items() if value is not None}
    with one_line_errors(), platform(url, api_key) as client:
        answer = client.call("PUT", f"{API}/aliases/{alias}", json=given)
        if wait:
            answer = _settled(client, alias, answer, wait_s)
    _print(answer, as_json, print_alias)
    _end_unless_serving(answer, wait=wait)


@adapters.command()
def rollback(
    alias: Annotated[str, typer.Argument(help="Model name for clients.")],
    revision: _Revision = None,
    wait: _Wait = True,
    wait_s: _WaitS = 300.0,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Point an alias at what it pointed at before."""
    body = {} if revision is None else {"revision": revision}
    with one_line_errors(), platform(url, api_key) as client:
        answer = client.call("POST", f"{API}/aliases/{alias}/rollback", json=body)
        if wait:
            answer = _settled(client, alias, answer, wait_s)
    _print(answer, as_json, print_alias)
    _end_unless_serving(answer, wait=wait)


@adapters.command(name="list")
def list_adapters(
    query: Annotated[str | None, typer.Option(help="Part of a name or an owner.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; repeat it.")] = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Deleted ones too.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List adapters, and the aliases with what they point at."""
    with one_line_errors(), platform(url, api_key) as client:
        params: dict[str, Any] = {"label": label or [], "include_deleted": deleted}
        if query:
            params["query"] = query
        found = {
            "adapters": _pages(client, f"{API}/adapters", params),
            "aliases": _pages(client, f"{API}/aliases", {}),
        }
    _print(found, as_json, print_adapters)


@adapters.command()
def show(
    name: Annotated[str, typer.Argument(help="An adapter, or a version NAME@DIGEST.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show an adapter with its versions, or a version with where it is loaded."""
    with one_line_errors(), platform(url, api_key) as client:
        adapter, at, digest = name.partition("@")
        route = f"{API}/adapters/{adapter}"
        if at:
            found = {
                "version": client.call("GET", f"{route}/versions/{digest}"),
                "placements": client.call("GET", f"{API}/versions/{name}/placements"),
            }
        else:
            found = {
                "adapter": client.call("GET", route),
                "versions": _pages(client, f"{route}/versions", {}),
            }
    _print(found, as_json, print_adapter)


@adapters.command()
def delete(
    name: Annotated[
        str, typer.Argument(help="An adapter, a version NAME@DIGEST, or with --alias an alias.")
    ],
    is_alias: Annotated[bool, typer.Option("--alias", help="NAME is an alias.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Delete an alias, or a version or adapter that no alias needs; its files go later."""
    adapter, at, digest = name.partition("@")
    route = f"aliases/{name}" if is_alias else f"adapters/{adapter}"
    route += f"/versions/{digest}" if at and not is_alias else ""
    with one_line_errors(), platform(url, api_key) as client:
        answer = client.call("DELETE", f"{API}/{route}")
    _print(answer or {"id": name, "deleted": True}, as_json, lambda _: _say(f"{name} is deleted"))


def _upload(client: PlatformClient, route: str, path: str, options: dict[str, Any]) -> Any:
    if "://" in path:
        return push_source(client, route, path, options)
    return push_folder(client, route, Path(path), options)


def _settled(client: PlatformClient, alias: str, answer: Any, wait_s: float) -> Any:
    """The alias once it is not pending any more, or as it is after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while answer["state"] == "pending" and time.monotonic() < deadline:
        time.sleep(POLL_S)
        answer = client.call("GET", f"{API}/aliases/{alias}")
    return answer


def _end_unless_serving(alias: Any, *, wait: bool) -> None:
    if alias is None or alias["state"] == "serving" or not wait:
        return
    pending = alias["pending"]
    state = "could not be served" if alias["state"] == "failed" else "is not served yet"
    where = "; ".join(f"{replica}: {stand}" for replica, stand in pending["replicas"].items())
    reason = pending["reason"] or where or "no replica has it"
    sys.stderr.write(
        f"headrace: {pending['target']} {state}: {reason}; {alias['alias']} stays on "
        f"{alias['target']}\n"
    )
    raise typer.Exit(EXIT_REFUSED)


def _pages(client: PlatformClient, route: str, params: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    cursor: str | None = None
    while True:
        more = {} if cursor is None else {"cursor": cursor}
        page = client.call("GET", route, params={**params, "limit": PAGE, **more})
        found += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def _labels(texts: list[str]) -> dict[str, str]:
    labels = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--label {text}: write KEY=VALUE")
        labels[key] = value
    return labels


def _print(answer: Any, as_json: bool, show_text: Any) -> None:
    if as_json:
        _say(json.dumps(answer, indent=2))
    else:
        show_text(answer)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
