"""Gateways for the tests of this folder, on uvloop as in production."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import uvloop

from serving.config import GatewayConfig, Limits, Listen, ReplicaConfig, Resilience, Timeouts

sys.path.append(str(Path(__file__).parent))

from fake_control import FakeControl
from running_gateway import NO_CANARY, Gateway, control_plane, key_hash, running

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Callable, Mapping

    from running_gateway import StartGateway
    from scripted_engine import ScriptedEngine


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The data plane runs on uvloop: so do its tests."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def start_gateway(tmp_path: Path) -> AsyncIterator[StartGateway]:
    """Starts gateways and ends them after the test."""
    async with AsyncExitStack() as stack:

        async def start(
            *engines: ScriptedEngine,
            keys: tuple[str, ...] = (),
            aliases: dict[str, str] | None = None,
            limits: dict[str, int] | None = None,
            resilience: Resilience = NO_CANARY,
            kind: str = "vllm",
            control: FakeControl | None = None,
            state_dir: Path | None = None,
            **timeouts: float,
        ) -> Gateway:
            config = GatewayConfig(
                listen=Listen(host="127.0.0.1", port=0),
                replicas=tuple(ReplicaConfig.parse(f"{kind}={engine.url}") for engine in engines),
                aliases=aliases or {},
                api_keys=tuple(key_hash(key) for key in keys),
                timeouts=Timeouts(**{"drain_s": 1.0, **timeouts}),
                limits=Limits(**(limits or {})),
                resilience=resilience,
                control=None if control is None else control_plane(control),
                state_dir=state_dir,
            )
            return await stack.enter_async_context(running(config, tmp_path, *engines))

        yield start


@pytest.fixture
async def control() -> AsyncIterator[FakeControl]:
    """A control plane with nothing published."""
    async with FakeControl() as started:
        yield started


@pytest.fixture
async def gateway(scripted: ScriptedEngine, start_gateway: StartGateway) -> Gateway:
    """A worker in front of one engine."""
    return await start_gateway(scripted)


@pytest.fixture
def quick_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are looked at every 10 ms, so that tests of them need not wait long."""
    monkeypatch.setattr("serving.gateway.worker._SWEEP_S", 0.01)
