"""Hot swap of real adapters on a real vLLM: loaded, proven by their logprobs, replaced under load, gone."""

from __future__ import annotations

import asyncio
import json
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from adapter_folders import lora_tensors, make_adapter
from eventually import eventually
from reconcile_world import World, manifest_of

from adapters.golden import DEFAULT_TOLERANCES, distance
from serving.config import cache_dir
from serving.control.ledger import WantedVersion

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

READY_S = 180.0
PLUGIN = "headrace_lora_cpu"
SCALE = 15.0
"""Of B, above what `lora_tensors` gives it: enough to change what the model says."""


def real_version(folder: Path, engine, name: str, lora_id: int) -> WantedVersion:
    """A LoRA of the default model, with values of its own."""
    config = json.loads((cache_dir() / "models" / engine.model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shape = {
        "num_layers": config["num_hidden_layers"],
        "hidden": hidden,
        "kv": config["num_key_value_heads"] * config.get("head_dim", hidden // heads),
        "intermediate": config["intermediate_size"],
    }
    tensors = lora_tensors(rank=8, seed=lora_id, **shape)
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key] = (tensors[key] * SCALE).astype(np.float32)
    manifest = manifest_of(name, name.encode(), engine.model)
    make_adapter(folder / manifest.version, rank=8, tensors=tensors, **shape)
    return WantedVersion(manifest.version, manifest, lora_id, 1, True, {})


async def keep_asking(url: str, model: str, statuses: list[int]) -> None:
    """Asks for a few tokens again and again."""
    async with httpx.AsyncClient(timeout=120.0) as client:
        while True:
            body = {"model": model, "prompt": "Tell me of mills.", "max_tokens": 8}
            answer = await client.post(f"{url}/v1/completions", json=body)
            statuses.append(answer.status_code)


async def told(url: str, model: str) -> str:
    """What a model says, greedily."""
    body = {
        "model": model,
        "prompt": "The capital of France is",
        "max_tokens": 12,
        "temperature": 0,
    }
    async with httpx.AsyncClient(timeout=120.0) as client:
        answer = await client.post(f"{url}/v1/completions", json=body)
    text: str = answer.json()["choices"][0]["text"]
    return text


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not entry_points(group="vllm.general_plugins", name=PLUGIN),
    reason="the distribution's vLLM plugin is not installed: install it again",
)
async def test_base_is_itself_beside_adapters(engine, tmp_path):
    """With as many adapters loaded as a batch may mix, base requests are answered by the base."""
    world = World(tmp_path, [("vllm", engine)], base=engine.model)
    versions = [real_version(tmp_path, engine, f"beside{n}", n) for n in (3, 4)]
    before = await told(engine.url, engine.model)
    async with world.gateway, world.running(probe_s=120.0) as reconciler:
        world.ledger.want(*versions)
        reconciler.wake()
        for one in versions:
            await eventually(lambda one=one: world.ledger.phases(one.version) == ["ready"], READY_S)
        apart = [await told(engine.url, one.version) for one in versions]
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(keep_asking(engine.url, versions[0].version, []))
            beside = await told(engine.url, engine.model)
            asking.cancel()
        world.ledger.want()
        reconciler.wake()
        await eventually(lambda: not world.ledger.rows, READY_S)
    assert beside == before
    assert before not in apart


@pytest.mark.timeout(600)
async def test_real_adapters_are_proven_and_replaced(engine, tmp_path):
    """Each is ready by its own logprobs, under load too; what is not wanted is gone from the list."""
    world = World(tmp_path, [("vllm", engine)], base=engine.model)
    one, two = (real_version(tmp_path, engine, f"real{n}", n) for n in (1, 2))
    (name,) = world.names
    statuses: list[int] = []
    async with world.gateway, world.running(probe_s=120.0) as reconciler:
        world.ledger.want(one)
        reconciler.wake()
        await eventually(lambda: world.ledger.phases(one.version) == ["ready"], READY_S)
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(keep_asking(engine.url, one.version, statuses))
            await eventually(lambda: len(statuses) > 0, READY_S)
            world.ledger.want(one, two)
            reconciler.wake()
            await eventually(lambda: world.ledger.phases(two.version) == ["ready"], READY_S)
            await eventually(lambda: len(statuses) > 1, READY_S)
            asking.cancel()
        world.ledger.want()
        reconciler.wake()
        await eventually(lambda: not world.ledger.rows, READY_S)
    assert world.ledger.history(name, two.version) == [
        "loading",
        "loaded",
        "ready",
        "draining",
        "forgotten",
    ]
    assert set(statuses) == {200}
    records = [world.ledger.goldens[each.version, "vllm"] for each in (one, two)]
    assert distance(*records) > DEFAULT_TOLERANCES.same
    status, body = engine.get("/v1/models")
    assert status == 200
    assert not [card["id"] for card in json.loads(body)["data"] if "@" in card["id"]]
