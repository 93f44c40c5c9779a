"""What adapters cost on real engines: a push until it answers, batches of many adapters, alias flips.

Starts `headrace up` with the default model in a folder of its own, pushes random adapters of rank 8 on
`q_proj` and `v_proj`, and measures

* **push to ready**: from the push's begin until the version is proven and its alias answers;
* **batches**: generated tokens a second of closed-loop clients that all use the base model, all one
  adapter, or each another one (as many as one batch holds, and twice as many);
* **flips**: from the change of an alias between two loaded versions, under that load, until the control
  plane answers, which it does once every gateway worker has the new snapshot; requests that failed, and
  answers of a version that was not the alias's when they were asked for.

Run as `python -m benchmarks.adapter_engine --output FILE`; takes about five minutes on two cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import msgspec
import typer

from adapters.linear_shapes import linear_shapes
from benchmarks import machine, report
from benchmarks.load import quantiles_ms
from serving.config import cache_dir
from serving.fleet import default_model
from serving.fleet.ports import LOOPBACK, PortReservation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RANK = 8
TARGETS = ("q_proj", "v_proj")
SCALE = 0.02
NUM_CLIENTS = 8
MAX_TOKENS = 32
WINDOW_S = 20.0
UP_S = 400.0
ANSWER_S = 120.0
NUM_FLIPS = 50
MAX_LORAS = 4
SWING = "swing"
_MS = 1e3


class Batch(msgspec.Struct, frozen=True):
    """One kind of load.

    Attributes:
        name: What the clients asked for.
        tokens_per_s: Generated, over the window.
        num_requests: That ended in it.
    """

    name: str
    tokens_per_s: float
    num_requests: int


class Flips(msgspec.Struct, frozen=True):
    """An alias flipped under load.

    Attributes:
        flip_ms: Quantiles of the time until all gateways had it.
        num_failed: Requests that failed meanwhile.
        num_wrong: Answers of a version that was not the alias's, before or after the flip beside them.
        num_answers: All of them.
    """

    flip_ms: dict[str, float]
    num_failed: int
    num_wrong: int
    num_answers: int


class Results(msgspec.Struct, frozen=True):
    """What `--output` writes."""

    provenance: machine.Provenance
    replicas: int
    push_to_ready_s: list[float]
    batches: list[Batch]
    flips: Flips


def make_adapter(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """Write a random adapter for a model's linear layers; every seed gives another one."""
    import numpy as np
    from safetensors.numpy import save_file

    shapes = linear_shapes(config)
    if shapes is None:
        raise ValueError("the shapes of this model are unknown")
    random = np.random.default_rng(seed)
    tensors = {}
    for layer, target in product(range(shapes.num_layers), TARGETS):
        path = f"model.layers.{layer}.self_attn.{target}"
        size = shapes.size_of(path)
        if size is None:
            raise ValueError(f"the model has no {path}")
        a = random.normal(0.0, 1 / size[0] ** 0.5, (RANK, size[0])).astype(np.float32)
        b = random.normal(0.0, SCALE, (size[1], RANK)).astype(np.float32)
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@contextmanager
def platform(state_dir: Path, replicas: int) -> Iterator[str]:
    """Run `headrace up`; its address."""
    with PortReservation() as reserved:
        listen = f"{LOOPBACK}:{reserved.port}"
        argv = [sys.executable, "-m", "serving.cli.main", "up", "--listen", listen]
        argv += ["--replicas", str(replicas), "--max-loras", str(MAX_LORAS)]
        argv += ["--max-model-len", "2048"]
        env = {**os.environ, "HEADRACE_STATE_DIR": str(state_dir)}
        running = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL)  # noqa: S603
        try:
            url = f"http://{listen}"
            _wait_ready(url, running, replicas)
            yield url
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(ANSWER_S)


def _wait_ready(url: str, running: subprocess.Popen[bytes], replicas: int) -> None:
    end_s = time.monotonic() + UP_S
    while time.monotonic() < end_s and running.poll() is None:
        try:
            answer = httpx.get(f"{url}/readyz")
            if answer.status_code == 200 and sum(answer.json()["replicas"].values()) == replicas:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    typer.echo(f"error: headrace up did not get ready within {UP_S:g} s", err=True)
    raise typer.Exit(1)


def push(url: str, folder: Path, name: str, alias: str | None) -> tuple[str, float]:
    """Push an adapter by the command that users have, and ask it once; its version, and the seconds."""
    begun_s = time.monotonic()
    argv = [sys.executable, "-m", "serving.cli.main", "adapters", "push", str(folder)]
    argv += ["--name", name, "--url", url, "--json"]
    argv += [] if alias is None else ["--alias", alias]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_S, check=True)  # noqa: S603
    version: str = json.loads(done.stdout)["version"]["version"]
    body = {"model": alias or version, "prompt": "1", "max_tokens": 1}
    httpx.post(f"{url}/v1/completions", json=body, timeout=ANSWER_S).raise_for_status()
    return version, time.monotonic() - begun_s


class Clients:
    """Closed-loop clients of completions.

    Attributes:
        answers: `(model asked for, model answered or None, tokens, begun, ended)`; times monotonic.
    """

    def __init__(self, url: str, models: Sequence[str]) -> None:
        self._url = url
        self._models = models
        self._is_over = False
        self.answers: list[tuple[str, str | None, int, float, float]] = []

    async def run(self, client: httpx.AsyncClient, number: int) -> None:
        """Ask one request after the other until `stop`."""
        turn = number
        while not self._is_over:
            await self.ask(client, self._models[number % len(self._models)], turn)
            turn += NUM_CLIENTS

    async def ask(self, client: httpx.AsyncClient, model: str, turn: int) -> None:
        """Ask one request."""
        body = {
            "model": model,
            "prompt": f"Item {turn} of the list is",
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
        }
        begun = time.monotonic()
        answered, tokens = None, 0
        try:
            answer = await client.post(f"{self._url}/v1/completions", json=body)
            answer.raise_for_status()
            answered, tokens = answer.json()["model"], answer.json()["usage"]["completion_tokens"]
        except httpx.HTTPError as error:
            typer.echo(f"a request failed: {error}", err=True)
        self.answers.append((model, answered, tokens, begun, time.monotonic()))

    def stop(self) -> None:
        """No further requests."""
        self._is_over = True


async def measure_batch(url: str, name: str, models: Sequence[str]) -> Batch:
    """Load the platform for one window; the first second does not count."""
    clients = Clients(url, models)
    async with httpx.AsyncClient(timeout=ANSWER_S) as client, asyncio.TaskGroup() as tasks:
        for number in range(NUM_CLIENTS):
            tasks.create_task(clients.run(client, number))
        await asyncio.sleep(1.0)
        from_s = time.monotonic()
        await asyncio.sleep(WINDOW_S)
        to_s = time.monotonic()
        clients.stop()
    ended = [answer for answer in clients.answers if from_s <= answer[4] < to_s]
    return Batch(name, sum(answer[2] for answer in ended) / (to_s - from_s), len(ended))


async def measure_flips(url: str, versions: Sequence[str], others: Sequence[str]) -> Flips:
    """Flip `SWING` between two versions while clients use it and other aliases."""
    clients = Clients(url, [SWING, *others])
    targets = [(0.0, 0.0, versions[0])]
    async with httpx.AsyncClient(timeout=ANSWER_S) as client, asyncio.TaskGroup() as tasks:
        for number in range(NUM_CLIENTS):
            tasks.create_task(clients.run(client, number))
        for turn in range(NUM_FLIPS):
            target = versions[(turn + 1) % 2]
            begun = time.monotonic()
            answer = await client.put(
                f"{url}/admin/v1/aliases/{SWING}", json={"target": target}, params={"wait_s": 60}
            )
            answer.raise_for_status()
            targets.append((begun, time.monotonic(), target))
            await asyncio.sleep(0.2)
        clients.stop()
    times_s = [done - begun for begun, done, _ in targets[1:]]
    swung = [answer for answer in clients.answers if answer[0] == SWING]
    return Flips(
        flip_ms=quantiles_ms(times_s),
        num_failed=sum(answer[1] is None for answer in clients.answers),
        num_wrong=sum(answer[1] not in _allowed(targets, answer[3], answer[4]) for answer in swung),
        num_answers=len(clients.answers),
    )


def _allowed(
    targets: Sequence[tuple[float, float, str]], begun: float, ended: float
) -> set[str | None]:
    """What the alias meant when the request was asked for, and what it came to mean meanwhile."""
    before = [target for _, done, target in targets if done <= begun]
    during = [target for started, done, target in targets if done > begun and started < ended]
    return {None, before[-1], *during}


def measure(url: str, folder: Path, num_adapters: int) -> tuple[list[float], list[Batch], Flips]:
    """Everything, on one platform."""
    model = default_model.ensure(cache_dir(), lambda stage, done: None)
    config = json.loads((model / "config.json").read_text())
    aliases = [f"adapter-{number}" for number in range(num_adapters)]
    ready_s = []
    for number, alias in enumerate(aliases):
        made = make_adapter(folder / alias, config, number)
        ready_s.append(push(url, made, alias, alias)[1])
    swings = []
    for number in range(2):
        made = make_adapter(folder / f"{SWING}-{number}", config, num_adapters + number)
        swings.append(push(url, made, SWING, SWING)[0])
    httpx.post(f"{url}/admin/v1/aliases/{SWING}/rollback", timeout=ANSWER_S).raise_for_status()
    loads = {
        "base model": [default_model.NAME],
        "one adapter": aliases[:1],
        f"{MAX_LORAS} adapters": aliases[:MAX_LORAS],
        f"{num_adapters} adapters": aliases,
    }
    batches = [asyncio.run(measure_batch(url, name, models)) for name, models in loads.items()]
    return ready_s, batches, asyncio.run(measure_flips(url, swings, aliases[:3]))


def run(
    replicas: Annotated[int, typer.Option(min=1, help="Engine processes.")] = 2,
    adapters: Annotated[int, typer.Option(min=MAX_LORAS, help="Different ones.")] = 2 * MAX_LORAS,
    output: Annotated[Path | None, typer.Option(help="Write all results as JSON.")] = None,
) -> None:
    """Measure adapters on real engines."""
    with (
        tempfile.TemporaryDirectory() as folder,
        platform(Path(folder) / "state", replicas) as url,
    ):
        ready_s, batches, flips = measure(url, Path(folder) / "adapters", adapters)
    rows = [["clients use", "tokens/s", "requests"]]
    rows += [[each.name, f"{each.tokens_per_s:.0f}", str(each.num_requests)] for each in batches]
    typer.echo(report.markdown(rows))
    typer.echo(
        f"\npush to ready: median {statistics.median(ready_s):.2f} s, greatest {max(ready_s):.2f} s\n"
        f"flips: {', '.join(f'{name} {value:.1f} ms' for name, value in flips.flip_ms.items())}; "
        f"{flips.num_answers} answers, {flips.num_failed} failed, {flips.num_wrong} wrong"
    )
    if output:
        results = Results(
            machine.provenance("benchmarks.adapter_engine"), replicas, ready_s, batches, flips
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")


if __name__ == "__main__":
    typer.run(run)
