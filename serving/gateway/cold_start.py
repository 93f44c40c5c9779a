"""Requests for adapter versions that no replica has ready: they wait, in order, for the load.

Owns the bounded queues and their deadlines. Never chooses a replica: a request whose version has become
ready goes back to its exchange. One for each worker; called by `exchange.py` and by the worker's sweep.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from serving.errors import AdapterLoading, AdapterUnavailable, Overloaded

if TYPE_CHECKING:
    from serving.errors import ServingError
    from serving.gateway.adapter_metrics import AdapterMetrics, Outcome
    from serving.gateway.exchange import Exchange
    from serving.gateway.exchange_accounts import ExchangeAccounts
    from serving.gateway.load_requests import LoadRequests
    from serving.gateway.worker import Worker
    from serving.routing.snapshot import Model

_BATCH = 32
"""Requests that go on without a pause: more at once would delay the tokens of others."""


class _Place(NamedTuple):
    exchange: Exchange
    model: Model
    since: float


class ColdStarts:
    """The queues of one worker.

    Attributes:
        load_requests: Asks for loads; None where there is no control plane.
        metrics: Counts waits; None there too.
    """

    def __init__(self, worker: Worker, metrics: AdapterMetrics | None) -> None:
        self._worker = worker
        self.metrics = metrics
        self.load_requests: LoadRequests | None = None
        self._queues: dict[str, dict[ExchangeAccounts, _Place]] = {}
        self._versions: dict[ExchangeAccounts, str] = {}

    def enter(self, exchange: Exchange, model: Model) -> ServingError | None:
        """Has a request wait for its version.

        Args:
            exchange: Gets `choose_again` later, once.
            model: What it is for.

        Returns:
            None if it waits, else why it cannot.
        """
        version, limits = model.version, self._worker.config.limits
        if self.load_requests is None or self.metrics is None:
            return AdapterUnavailable(f"No replica has '{model.name}' loaded.")
        queue = self._queues.setdefault(version, {})
        if (
            len(queue) >= limits.max_waiting_requests
            or len(self._versions) >= limits.max_waiting_requests_per_worker
        ):
            self.metrics.count(model, "queue_full")
            return Overloaded(f"Too many requests wait for '{model.name}' to be loaded.")
        queue[exchange] = _Place(exchange, model, monotonic())
        self._versions[exchange] = version
        self.metrics.wait_begins(model)
        self.load_requests.ask(version)
        return None

    def leave(self, exchange: ExchangeAccounts) -> None:
        """A request waits no more: its client left, or its own deadline passed."""
        if exchange in self._versions:
            self._take_out(exchange, "client_left")

    def _take_out(self, exchange: ExchangeAccounts, outcome: Outcome) -> None:
        version = self._versions.pop(exchange)
        queue = self._queues[version]
        place = queue.pop(exchange)
        if not queue:
            del self._queues[version]
        if self.metrics is not None:
            self.metrics.wait_ends(place.model, outcome, monotonic() - place.since)

    def snapshot_changed(self) -> None:
        """Lets those go on whose version is ready now, or is no longer what their alias means."""
        if not self._queues:
            return
        snapshot = self._worker.snapshot
        for version, queue in list(self._queues.items()):
            model = snapshot.find(version)
            if model is None or any(model.healthy.values()):
                self._go_on([place.exchange for place in queue.values()])
                continue
            names = {place.model.name for place in queue.values()}
            moved = {
                name
                for name in names
                if (now := snapshot.find(name)) is None or now.version != version
            }
            if moved:
                self._go_on([p.exchange for p in queue.values() if p.model.name in moved])

    def _go_on(self, exchanges: list[Exchange]) -> None:
        """In the order in which they came."""
        waiting = iter(exchanges)
        for exchange in islice(waiting, _BATCH):
            # One before it may have made this one leave.
            if exchange in self._versions:
                self._take_out(exchange, "ready")
                exchange.choose_again()
        if rest := list(waiting):
            asyncio.get_running_loop().call_soon(self._go_on, rest)

    def check_deadlines(self, now: float) -> None:
        """Answers those that have waited for too long; the worker's sweep calls it."""
        allowed_s = self._worker.config.timeouts.adapter_load_s
        for queue in list(self._queues.values()):
            for place in [p for p in queue.values() if now - p.since > allowed_s]:
                error = AdapterLoading(
                    f"'{place.model.name}' was not loaded within {allowed_s:g} s."
                )
                self._refuse(place, "late", error)

    def fail(self, version: str) -> None:
        """The load of a version cannot be asked for: nobody need wait for it."""
        for place in list(self._queues.get(version, {}).values()):
            name = place.model.name
            self._refuse(
                place,
                "unavailable",
                AdapterUnavailable(
                    f"No replica has '{name}' loaded, and the control plane cannot load it now."
                ),
            )

    def give_up(self) -> None:
        """The drain is over."""
        for place in [place for queue in self._queues.values() for place in queue.values()]:
            self._refuse(
                place, "drained", AdapterLoading("The gateway shuts down: ask again elsewhere.")
            )

    def _refuse(self, place: _Place, outcome: Outcome, error: ServingError) -> None:
        if place.exchange in self._versions:
            self._take_out(place.exchange, outcome)
            place.exchange.choose_again(error)
