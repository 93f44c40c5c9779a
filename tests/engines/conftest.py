"""Dialect servers for the tests of this folder; others start them as they need."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

sys.path.append(str(Path(__file__).parent))

from sglang_options import SglangOptions
from sglang_server import SglangServer
from tensorrt_llm_options import TensorrtLlmOptions
from tensorrt_llm_server import TensorrtLlmServer

ADAPTERS = {"support": "/adapters/support", "legal": "/adapters/legal"}


@pytest.fixture
async def start_sglang():
    """Starts SGLang servers; launch flags and switches by name."""
    flags = SglangOptions.__dataclass_fields__
    async with AsyncExitStack() as stack:

        async def start(**given):
            given = {"lora_paths": ADAPTERS, "health_s": 0.0, **given}
            options = {name: given.pop(name) for name in list(given) if name in flags}
            server = SglangServer("m", options=SglangOptions(**options), **given)
            return await stack.enter_async_context(server)

        yield start


@pytest.fixture
async def start_tensorrt_llm():
    """Starts TensorRT-LLM servers; options and switches by name."""
    flags = TensorrtLlmOptions.__dataclass_fields__
    async with AsyncExitStack() as stack:

        async def start(**given):
            options = {name: given.pop(name) for name in list(given) if name in flags}
            server = TensorrtLlmServer("m", options=TensorrtLlmOptions(**options), **given)
            return await stack.enter_async_context(server)

        yield start


@pytest.fixture
async def client():
    """A client without limits of its own."""
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(timeout=10.0, limits=limits) as opened:
        yield opened


@pytest.fixture
def chat(client):
    """Posts a chat request to a server."""

    async def post(server, headers=None, **fields):
        body = {"model": "m", "messages": [{"role": "user", "content": "hello you"}], **fields}
        return await client.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)

    return post
