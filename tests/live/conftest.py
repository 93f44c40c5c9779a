"""Clients of the session's gateway, as its users have them.

Used by: the tests beside this file.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import anthropic
import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CLIENT_DEADLINE_S = 120.0
SEED = 7


@pytest.fixture(scope="session")
def client(gateway: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's client; it never tries twice, so that no failure is hidden."""
    with openai.OpenAI(
        base_url=f"{gateway.url}/v1",
        api_key=gateway.api_key,
        max_retries=0,
        timeout=CLIENT_DEADLINE_S,
    ) as client:
        yield client


@pytest.fixture
async def async_client(gateway: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The asynchronous one."""
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1",
        api_key=gateway.api_key,
        max_retries=0,
        timeout=CLIENT_DEADLINE_S,
    ) as client:
        yield client


@pytest.fixture(scope="session")
def claude(gateway: Any) -> Iterator[anthropic.Anthropic]:
    """Anthropic's client; it sends its key as `x-api-key`."""
    with anthropic.Anthropic(
        base_url=gateway.url, api_key=gateway.api_key, max_retries=0, timeout=CLIENT_DEADLINE_S
    ) as client:
        yield client


@pytest.fixture
def greedy() -> dict[str, Any]:
    """Arguments of OpenAI's client that make two equal requests have equal answers.

    The salt keeps the second from reusing the first one's prefix: a cached prefix takes another
    way through the kernels, and its rounding may flip a close decision.
    """
    return {"temperature": 0, "seed": SEED, "extra_body": {"cache_salt": uuid.uuid4().hex}}


@pytest.fixture
def question() -> list[dict[str, str]]:
    """A conversation that the model answers in a few words."""
    return [{"role": "user", "content": "What is the capital of France?"}]
