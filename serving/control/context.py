"""What routes need, handed to them by FastAPI.

Owns the parts of one control plane and the dependencies that find them. Made by `app.py`.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import anyio.to_thread
from fastapi import Depends, Header, Request

from serving.control.acks import GatewayAcks
from serving.control.aliases import Aliases
from serving.control.audit import Caller
from serving.control.database import Database
from serving.control.engine_view import EngineView
from serving.control.errors import TooBusy
from serving.control.leadership import Leadership
from serving.control.metrics import ControlMetrics
from serving.control.placements import DatabaseLedger
from serving.control.publisher import Publisher
from serving.control.registration import Registration
from serving.control.registry import Registry
from serving.control.revisions import Expected
from serving.control.settings import ControlSettings
from serving.control.traffic import TrafficSink
from serving.control.uploads import Uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PUBLISH_S = 2.0
Result = TypeVar("Result")


@dataclass
class Control:
    """The parts of one running control plane."""

    settings: ControlSettings
    database: Database
    publisher: Publisher
    acks: GatewayAcks
    registry: Registry
    aliases: Aliases
    registration: Registration
    uploads: Uploads
    ledger: DatabaseLedger
    engines: EngineView
    traffic: TrafficSink
    metrics: ControlMetrics
    leadership: Leadership
    wake: Callable[[], None]
    """Has the reconciler look at once."""
    num_waiters: int = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a request that waits for something to happen.

        Raises:
            TooBusy: If too many do.
        """
        if self.num_waiters >= self.settings.limits.max_waiters:
            self.metrics.refused_waiters.inc()
            raise TooBusy("Too many requests wait: ask again, or with a shorter wait_s.")
        self.num_waiters += 1
        self.metrics.waiters.set(self.num_waiters)
        try:
            yield
        finally:
            self.num_waiters -= 1
            self.metrics.waiters.set(self.num_waiters)

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run what blocks on the database in a worker thread."""
        return await anyio.to_thread.run_sync(work)

    async def settle(self) -> None:
        """Wait until what this process committed last is published and the live gateways have it.

        A client that was answered finds its change at the gateways; one that is slow does not hold
        the answer up for longer than the settings allow.
        """
        self.wake()
        await self.publisher.reached(self.database.published, PUBLISH_S)
        await self.acks.wait(self.database.published, self.settings.ack_wait_s)


def _control(request: Request) -> Control:
    control: Control = request.app.state.control
    return control


def _caller(request: Request) -> Caller:
    return Caller(request.state.principal, request.state.request_id)


def _expected(
    if_match: Annotated[str | None, Header(max_length=400)] = None,
    if_none_match: Annotated[str | None, Header(max_length=400)] = None,
) -> Expected:
    return Expected(if_match=if_match, if_none_match=if_none_match)


TheControl = Annotated[Control, Depends(_control)]
TheCaller = Annotated[Caller, Depends(_caller)]
TheExpected = Annotated[Expected, Depends(_expected)]
