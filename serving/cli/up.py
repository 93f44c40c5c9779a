"""`headrace up`: the whole platform on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.errors import one_line_errors
from serving.cli.start_view import StartView
from serving.config import Listen, cache_dir, state_dir
from serving.fleet import default_model
from serving.fleet.local_platform import LocalPlatform, StartError
from serving.fleet.up_config import UpConfig

if TYPE_CHECKING:
    from types import FrameType

EXIT_NOT_UP = 1


def up(
    listen: Annotated[
        str, typer.Option(envvar="HEADRACE_LISTEN", help="HOST:PORT to serve on.")
    ] = "127.0.0.1:8000",
    model: Annotated[
        str,
        typer.Option(
            envvar="HEADRACE_MODEL",
            help="The default model's name, a local folder, or a Hugging Face id (ORG/NAME).",
        ),
    ] = default_model.NAME,
    engine: Annotated[
        str, typer.Option(help="vllm, or with an NVIDIA GPU sglang or tensorrt-llm.")
    ] = "vllm",
    replicas: Annotated[int, typer.Option(min=1, max=64, help="Engine processes.")] = 1,
    workers: Annotated[
        int, typer.Option(envvar="HEADRACE_WORKERS", min=1, max=256, help="Gateway processes.")
    ] = 1,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="HEADRACE_API_KEY_FILE", help="Hashes of API keys; see headrace keys create."
        ),
    ] = None,
    insecure_no_auth: Annotated[
        bool, typer.Option(help="Serve without API keys on an address that others can reach.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="HEADRACE_CONFIG", help="headrace.toml for the gateway; flags here beat it."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt with its answer, in tokens.")
    ] = None,
    max_loras: Annotated[
        int, typer.Option(min=0, help="Adapters that one batch may mix; 0 starts without LoRA.")
    ] = 2,
    max_cpu_loras: Annotated[
        int, typer.Option(min=1, help="Adapters that a replica keeps in memory.")
    ] = 16,
    max_lora_rank: Annotated[
        int, typer.Option(help="Largest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320, 512.")
    ] = 16,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="HEADRACE_CONTROL_DATABASE_URL",
            help="postgresql://… for the control plane (default: SQLite in the state folder).",
        ),
    ] = None,
    adapter_store: Annotated[
        str | None,
        typer.Option(
            envvar="HEADRACE_CONTROL_STORE_URL",
            help="Where adapters are kept, s3://BUCKET/PREFIX (default: the state folder).",
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="vLLM's parser for the model's tool calls.")
    ] = None,
    kv_cache_gib: Annotated[
        int | None, typer.Option(min=1, help="KV cache of each replica on CPUs, in GiB.")
    ] = None,
    gpus_per_replica: Annotated[
        int, typer.Option(min=1, help="GPUs of each replica (tensor parallelism).")
    ] = 1,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.05, max=1.0, help="Share of a GPU's memory that a replica takes.")
    ] = 0.9,
    engine_args: Annotated[
        str, typer.Option(help="More arguments for the engine, as one string.")
    ] = "",
    start_timeout_s: Annotated[
        float, typer.Option(min=1.0, help="Seconds for a replica to become ready.")
    ] = 900.0,
) -> None:
    """Start engines, control plane and gateway on this machine and serve until Ctrl-C.

    State and logs are kept under HEADRACE_STATE_DIR, the converted default model under
    HEADRACE_CACHE_DIR.
    """
    with one_line_errors():
        up_config = UpConfig(
            listen=Listen.parse(listen),
            model=model,
            engine=engine,
            num_replicas=replicas,
            num_workers=workers,
            api_key_file=api_key_file,
            insecure_no_auth=insecure_no_auth,
            gateway_config=config.absolute() if config else None,
            max_model_len_tokens=max_model_len,
            max_loras=max_loras,
            max_cpu_loras=max_cpu_loras,
            max_lora_rank=max_lora_rank,
            database_url=database_url,
            adapter_store=adapter_store,
            tool_call_parser=tool_call_parser,
            kv_cache_gib=kv_cache_gib,
            gpus_per_replica=gpus_per_replica,
            gpu_memory_utilization=gpu_memory_utilization,
            engine_arguments=tuple(shlex.split(engine_args)),
            start_timeout_s=start_timeout_s,
            state_dir=state_dir().absolute(),
            cache_dir=cache_dir().absolute(),
        )
        serve(up_config)


def serve(config: UpConfig) -> None:
    """Run the platform; Ctrl-C, SIGTERM and a closed terminal end it in order.

    Raises:
        typer.Exit: if a process does not come up.
    """
    view = StartView(config)
    platform = LocalPlatform(config, dict(os.environ), view)

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        if not platform.stop():
            # Nothing runs yet: leave whatever the model's preparation is at.
            raise KeyboardInterrupt

    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, end)
    try:
        platform.run()
    except KeyboardInterrupt:
        view.close()
    except StartError as error:
        view.failed(error.status)
        raise typer.Exit(EXIT_NOT_UP) from None
    finally:
        view.close()
