"""Gateways before dialect servers, in the test's own event loop."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

sys.path.append(str(Path(__file__).parents[1] / "engines"))
sys.path.append(str(Path(__file__).parents[1] / "serving/gateway"))

from running_gateway import NO_CANARY, running
from scripted_engine import ScriptedEngine
from sglang_options import SglangOptions
from sglang_server import SglangServer
from tensorrt_llm_server import TensorrtLlmServer

from serving.config import GatewayConfig, Limits, Listen, ReplicaConfig, Timeouts

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Mapping

ADAPTERS = {"support": "/adapters/support", "sup": "/adapters/sup"}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The data plane runs on uvloop: so do its tests."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Ends everything after the test, gateways before their engines."""
    async with AsyncExitStack() as held:
        yield held


@pytest.fixture
def start_vllm(stack):
    """Starts scripted vLLMs."""

    async def start():
        return await stack.enter_async_context(ScriptedEngine("m"))

    return start


@pytest.fixture
def start_sglang(stack):
    """Starts SGLang servers with two adapters; launch flags by name, the rest are switches."""

    async def start(**given: Any):
        flags = SglangOptions.__dataclass_fields__
        options = {name: given.pop(name) for name in list(given) if name in flags}
        server = SglangServer("m", 0, SglangOptions(**{"lora_paths": ADAPTERS, **options}), **given)
        return await stack.enter_async_context(server)

    return start


@pytest.fixture
def start_tensorrt_llm(stack):
    """Starts TensorRT-LLM servers; switches by name."""

    async def start(**switches: Any):
        return await stack.enter_async_context(TensorrtLlmServer("m", 0, **switches))

    return start


@pytest.fixture
def start_gateway(stack, tmp_path):
    """Starts a gateway before replicas; the engine's kind is told by its server."""
    kinds = {SglangServer: "sglang", TensorrtLlmServer: "tensorrt-llm", ScriptedEngine: "vllm"}

    async def start(*engines, resilience=NO_CANARY, **timeouts):
        config = GatewayConfig(
            listen=Listen(host="127.0.0.1", port=0),
            replicas=tuple(
                ReplicaConfig.parse(f"{kinds[type(engine)]}={engine.url}") for engine in engines
            ),
            timeouts=Timeouts(**{"drain_s": 1.0, **timeouts}),
            limits=Limits(),
            resilience=resilience,
        )
        return await stack.enter_async_context(running(config, tmp_path, *engines))

    return start
