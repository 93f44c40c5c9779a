"""`python -m benchmarks.engine_sim`, which `headrace bench engine` starts."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import pydantic
import typer
import uvloop

from benchmarks.engine_sim.kv_events import KvEventsUnavailable
from benchmarks.engine_sim.options import SimOptions
from benchmarks.engine_sim.server import serve

EXIT_BAD_SETTING = 2
_DEFAULTS = SimOptions()


def engine(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = _DEFAULTS.port,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _DEFAULTS.host,
    model: Annotated[str, typer.Option(help="Name of the base model.")] = _DEFAULTS.model,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A LoRA adapter, NAME or NAME=PATH; repeat it.")
    ] = None,
    prefill_tokens_per_s: Annotated[
        float, typer.Option(help="Prompt tokens computed a second; 0: no time at all.")
    ] = _DEFAULTS.prefill_tokens_per_s,
    decode_tokens_per_s: Annotated[
        float, typer.Option(help="Tokens a second of a request alone; 0: no time at all.")
    ] = _DEFAULTS.decode_tokens_per_s,
    batch_slowdown: Annotated[
        float, typer.Option(help="Share by which each further request lengthens a decode step.")
    ] = _DEFAULTS.batch_slowdown,
    max_num_seqs: Annotated[
        int, typer.Option(help="Requests in one batch.")
    ] = _DEFAULTS.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step.")
    ] = _DEFAULTS.max_num_batched_tokens,
    max_num_queued_reqs: Annotated[
        int | None, typer.Option(help="Unfinished requests before 503; no limit by default.")
    ] = None,
    max_model_len: Annotated[
        int, typer.Option(help="Context length in tokens.")
    ] = _DEFAULTS.max_model_len,
    kv_cache_tokens: Annotated[
        int, typer.Option(help="Capacity of the KV cache in tokens.")
    ] = _DEFAULTS.kv_cache_tokens,
    block_size: Annotated[int, typer.Option(help="Tokens of one KV block.")] = _DEFAULTS.block_size,
    max_loras: Annotated[int, typer.Option(help="Adapters in one batch.")] = _DEFAULTS.max_loras,
    answer_tokens: Annotated[
        int, typer.Option(help="Length of answers that the request does not bound sooner.")
    ] = _DEFAULTS.answer_tokens,
    kv_events: Annotated[
        str | None, typer.Option(help="Endpoint for KV events, tcp://*:5557; needs pyzmq.")
    ] = None,
    kv_events_replay: Annotated[
        str | None, typer.Option(help="Endpoint that replays them, tcp://*:5558.")
    ] = None,
    check_lora_paths: Annotated[
        bool, typer.Option(help="Refuse to load adapters from paths that do not exist.")
    ] = _DEFAULTS.check_lora_paths,
    seed: Annotated[int, typer.Option(help="Of what it says.")] = _DEFAULTS.seed,
) -> None:
    """Run a simulated vLLM: its API, metrics, prefix cache and KV events, without a model.

    Ready when GET /health answers 200.
    """
    given: dict[str, Any] = dict(locals())
    paths = dict(_parse_adapter(one) for one in given.pop("adapter") or [])
    try:
        uvloop.run(serve(SimOptions(adapters=paths, **given), _say_ready))
    except pydantic.ValidationError as error:
        _refuse("; ".join(_problem(one) for one in error.errors()))
    except KvEventsUnavailable as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"cannot listen on {host}:{port}: {error.strerror}")


def _parse_adapter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path or f"/adapters/{name}"


def _problem(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    told = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {told}" if place else told


def _refuse(message: str) -> None:
    sys.stderr.write(f"headrace: {message}\n")
    raise typer.Exit(EXIT_BAD_SETTING) from None


def _say_ready(url: str) -> None:
    sys.stdout.write(f"headrace bench engine: serving on {url}\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point."""
    # Plain help: a table would cut the options' names short.
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)
    app.command()(engine)
    app(prog_name="headrace bench engine")


if __name__ == "__main__":
    main()
