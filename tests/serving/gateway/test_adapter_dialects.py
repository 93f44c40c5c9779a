"""Published versions over SGLang's and TensorRT-LLM's contracts: the same for clients, losses included."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from eventually import eventually
from fake_control import adapter, placed, until_resolved, version_of
from raw_client import get, post
from running_gateway import NO_CANARY, control_plane, running
from sglang_options import SglangOptions
from sglang_server import SglangServer
from tensorrt_llm_options import TensorrtLlmOptions
from tensorrt_llm_server import TensorrtLlmServer

from serving.config import GatewayConfig, Listen, ReplicaConfig, Timeouts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fake_control import FakeControl
    from running_gateway import Gateway

    Engine = SglangServer | TensorrtLlmServer

V1, V2 = version_of("support", "1"), version_of("support", "2")
PATHS = {V1: "/adapters/one", V2: "/adapters/two"}
CHAT: dict[str, Any] = {"model": "help", "messages": [{"role": "user", "content": "hello"}]}
KINDS = pytest.mark.parametrize("kind", ["sglang", "tensorrt-llm"])


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Ends everything after the test, gateways before their engines."""
    async with AsyncExitStack() as held:
        yield held


async def _start(
    stack: AsyncExitStack, kind: str, control: FakeControl, folder: Path, *engines: Engine
) -> Gateway:
    config = GatewayConfig(
        listen=Listen(host="127.0.0.1", port=0),
        replicas=tuple(ReplicaConfig.parse(f"{kind}={engine.url}") for engine in engines),
        timeouts=Timeouts(drain_s=1.0),
        resilience=NO_CANARY,
        control=control_plane(control),
    )
    return await stack.enter_async_context(running(config, folder, *engines))  # type: ignore[arg-type]


async def _engine(stack: AsyncExitStack, kind: str, *versions: str) -> Engine:
    engine: Engine
    if kind == "sglang":
        options = SglangOptions(lora_paths={name: PATHS[name] for name in versions})
        engine = SglangServer("m", 0, options, health_s=0.0)
    else:
        paths = frozenset(PATHS[name] for name in versions)
        engine = TensorrtLlmServer("m", 0, TensorrtLlmOptions(lora_paths=paths))
    return await stack.enter_async_context(engine)


def _on(engine: Engine, version: str, state: str = "ready") -> dict[str, Any]:
    return placed(engine, state, PATHS[version])  # type: ignore[arg-type]


def _said(kind: str, answer: dict[str, Any], version: str) -> bool:
    """Whether the weights of this version have answered: they say their name and their folder."""
    text = answer["choices"][0]["message"]["content"]
    return text.startswith(f"{version} from {PATHS[version]}")


@KINDS
async def test_versions_answer(
    stack: AsyncExitStack, control: FakeControl, tmp_path: Path, kind: str
) -> None:
    """Bodies and streams come from the version's weights, under its public name; the base's from its own."""
    engine = await _engine(stack, kind, V1, V2)
    versions = {
        V1: adapter(_on(engine, V1), lora_id=11),
        V2: adapter(_on(engine, V2), lora_id=12),
    }
    control.publish({"help": V1}, versions)
    gateway = await _start(stack, kind, control, tmp_path, engine)
    await until_resolved(gateway, "help", V1)
    answer = (await gateway.post(CHAT)).json
    assert answer["model"] == V1
    assert _said(kind, answer, V1)
    control.publish({"help": V2}, versions)
    await until_resolved(gateway, "help", V2)
    answer = (await gateway.post(CHAT)).json
    assert answer["model"] == V2
    assert _said(kind, answer, V2)
    stream = await gateway.post({**CHAT, "stream": True})
    assert stream.status == 200
    assert stream.body.count(f'"model":"{V2}"'.encode()) == stream.body.count(b'"choices"')
    base = (await gateway.post({**CHAT, "model": "m"})).json
    assert base["model"] == "m"
    assert base["choices"][0]["message"]["content"].startswith("m ")
    listed = [card["id"] for card in (await gateway.ask(get("/v1/models"))).json["data"]]
    assert listed == ["m", "help"]


@KINDS
async def test_missing_adapter_is_found_elsewhere(
    stack: AsyncExitStack, control: FakeControl, tmp_path: Path, kind: str
) -> None:
    """An engine without it is found out by one request, which another replica answers."""
    without, having = await _engine(stack, kind), await _engine(stack, kind, V1)
    if isinstance(without, SglangServer):
        # Listed when it was asked, gone when it is used, and so never to be loaded by itself.
        without.loras.load(V1, PATHS[V1], is_pinned=False)
    control.publish({"help": V1}, {V1: adapter(_on(without, V1), _on(having, V1))})
    gateway = await _start(stack, kind, control, tmp_path, without, having)
    await until_resolved(gateway, "help", V1)
    if isinstance(without, SglangServer):
        without.loras.loaded.clear()
        without.loras.ever_loaded.clear()
    gateway.worker.residency.use(0, V1)  # the one without it is preferred
    for _ in range(6):
        answer = await gateway.post(CHAT)
        assert answer.status == 200
        assert _said(kind, answer.json, V1)
    assert gateway.metric("headrace_retries_total") == 1
    model = gateway.worker.snapshot.find(V1)
    assert model is not None
    ports = [replica.port for replica in model.healthy["/v1/chat/completions"]]
    assert ports == [having.port]


async def test_engine_that_names_no_adapter_on_a_route(
    stack: AsyncExitStack, control: FakeControl, tmp_path: Path
) -> None:
    """TensorRT-LLM's Responses API has no field for one: refused, and not answered by the base."""
    engine = await _engine(stack, "tensorrt-llm", V1)
    control.publish({"help": V1}, {V1: adapter(_on(engine, V1))})
    gateway = await _start(stack, "tensorrt-llm", control, tmp_path, engine)
    await until_resolved(gateway, "help", V1)
    answer = await gateway.ask(post({"model": "help", "input": "hi"}, "/v1/responses"))
    assert (answer.status, answer.code) == (404, "endpoint_not_offered")
    refused = await gateway.post({**CHAT, "lora_request": {"lora_path": "/etc"}})
    assert (refused.status, refused.json["error"]["param"]) == (400, "lora_request")


async def test_restart_of_an_engine_that_lists_none(
    stack: AsyncExitStack, control: FakeControl, tmp_path: Path
) -> None:
    """After it was down, its adapters wait for a newer snapshot."""
    engine = await _engine(stack, "tensorrt-llm", V1)
    control.publish({"help": V1}, {V1: adapter(_on(engine, V1))})
    gateway = await _start(stack, "tensorrt-llm", control, tmp_path, engine)
    await until_resolved(gateway, "help", V1)
    engine.die()
    await eventually(lambda: not gateway.worker.snapshot.is_ready)
    await engine.listen()
    await eventually(lambda: gateway.worker.snapshot.is_ready)
    model = gateway.worker.snapshot.find(V1)
    assert model is not None
    assert not any(model.healthy.values())
    control.publish({"help": V1}, {V1: adapter(_on(engine, V1))})
    await until_resolved(gateway, "help", V1)
    assert (await gateway.post(CHAT)).status == 200
