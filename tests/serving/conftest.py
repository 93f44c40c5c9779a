"""What the tests of serving share: scripted engines on real sockets."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# By its folder and not by `tests`: that holds a folder `serving`, which would hide the package.
sys.path.append(str(Path(__file__).parents[1] / "engines"))

from scripted_engine import ScriptedEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from scripted_engine import StartEngine


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    """Starts scripted engines and ends them after the test."""
    async with AsyncExitStack() as stack:

        async def start(name: str = "m") -> ScriptedEngine:
            return await stack.enter_async_context(ScriptedEngine(name))

        yield start


@pytest.fixture
async def scripted(start_engine: StartEngine) -> ScriptedEngine:
    """One engine that serves the model `m`."""
    return await start_engine()
