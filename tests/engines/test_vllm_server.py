"""The simulated vLLM has the habits of the real one that hot swap has to live with."""

from __future__ import annotations

import pytest
from vllm_server import VllmServer


@pytest.fixture
async def server():
    """One that keeps two adapters in memory."""
    async with VllmServer(max_cpu_loras=2) as started:
        yield started


@pytest.fixture
def folders(tmp_path):
    """Three adapters."""
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter").write_text(name)
    return tmp_path


@pytest.fixture
def load(server, client, folders):
    """Loads an adapter."""

    async def post(name, path=None):
        body = {"lora_name": name, "lora_path": str(path or folders / name)}
        return await client.post(f"{server.url}/v1/load_lora_adapter", json=body)

    return post


@pytest.fixture
def complete(server, client):
    """Asks for two prompts with logprobs."""

    async def post(model):
        body = {"model": model, "prompt": ["x", "y"], "max_tokens": 1, "logprobs": 2}
        return await client.post(f"{server.url}/v1/completions", json=body)

    return post


async def test_load_list_unload(server, client, load, complete):
    """As vLLM words it; unloading takes the name away."""
    answer = await load("a")
    assert answer.text == "Success: LoRA adapter 'a' added successfully."
    cards = (await client.get(f"{server.url}/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("m", None), ("a", "m")]
    assert (await load("a")).status_code == 400
    assert (await load("z")).status_code == 404
    assert (await complete("a")).json()["choices"] != (await complete("m")).json()["choices"]
    url = f"{server.url}/v1/unload_lora_adapter"
    statuses = [(await client.post(url, json={"lora_name": "a"})).status_code for _ in range(2)]
    assert statuses == [200, 404]
    assert (await complete("a")).status_code == 404


async def test_folder_that_is_gone_ends_the_engine(server, client, load, complete, folders):
    """An adapter that others have pushed out of memory is read again; without its folder it dies."""
    for name in "abc":
        await load(name)
    assert (await complete("a")).status_code == 200
    (folders / "b" / "adapter").unlink()
    (folders / "b").rmdir()
    assert (await complete("b")).status_code == 500
    assert (await client.get(f"{server.url}/health")).status_code == 503
    assert (await complete("m")).status_code == 500


async def test_wrong_weights_can_be_had(server, load, complete):
    """A switch makes adapters say what others would."""
    server.set(wrong_contents="m")
    await load("a")
    tops = [(await complete(name)).json()["choices"] for name in ("a", "m")]
    assert tops[0] == tops[1]
