"""Requests of the control plane that prove an adapter version on one replica, on the clients' own way.

A probe names its replica in a header and carries the control plane's token. It is parsed, rewritten,
relayed and answered as any request is, but it goes to that replica alone, also where clients are not
routed yet; it is counted under the endpoint `probe`; and its failures are the prober's to judge:
they open no breaker and are not repeated. Without the token the header means nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING

from serving.config import ApiKeyHash
from serving.errors import NoReplica
from serving.gateway import metrics
from serving.gateway.auth import ApiKeys
from serving.gateway.exchange import Exchange, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from serving.config import ControlPlane
    from serving.errors import ServingError
    from serving.gateway.client import ClientConnection
    from serving.gateway.request import Request
    from serving.gateway.resolve import Route
    from serving.gateway.worker import Worker
    from serving.routing.snapshot import Replica

PROBE_HEADER = b"x-headrace-probe-replica"
PROBE_ENDPOINT = "probe"
_BEARER = b"bearer "


class ProbeKeys(ApiKeys):
    """The clients' keys, and the control plane's token on probes alone."""

    __slots__ = ("_prober", "_token")

    def __init__(self, keys: Iterable[ApiKeyHash], control: ControlPlane) -> None:
        """Keeps the token to compare with.

        Args:
            keys: Of clients; none lets everybody in.
            control: Whose token counts.
        """
        super().__init__(keys)
        self._token = control.token.get_secret_value().encode()
        digest = hashlib.sha256(self._token).hexdigest()
        self._prober = ApiKeyHash(name="control plane", sha256_hex=digest)

    def check(self, headers: Mapping[bytes, bytes]) -> ApiKeyHash | None:
        """Authenticates a request head, as `ApiKeys.check`."""
        if PROBE_HEADER in headers and self.is_probe(headers):
            return self._prober
        return super().check(headers)

    def is_probe(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether the header comes with the token."""
        sent = headers.get(b"authorization", b"")
        return sent[:7].lower() == _BEARER and hmac.compare_digest(sent[7:].strip(), self._token)


class ProbeExchange(Exchange):
    """A probe and its one replica."""

    __slots__ = ()

    def start(self) -> None:
        """Makes the only attempt; it leaves no trace."""
        self._attempt(None)

    def _attempt(self, cause: ServingError | None) -> None:
        worker, route = self.worker, self._route
        name = self.request.headers[PROBE_HEADER].decode("latin-1")
        replica = worker.registry.named(name)
        if replica is None or replica.index not in route.model.engine_names:
            self._count_under("")
            self._answer_error(NoReplica(f"'{name[:200]}' is no replica of '{route.model.name}'."))
            return
        self._num_attempts += 1
        self._replica = replica
        worker.ledger.charge(replica.index, route.cost_tokens)
        self._count_under(replica.name)
        if (adapter := route.model.adapter) is not None:
            # What it proves the engine has read: clients' requests need not shun it for the load.
            slots = replica.dialect.adapter_slots
            worker.residency.use(replica.index, adapter.version, slots)
        connection = worker.pool.take(replica)
        if connection is None:
            self._phase = Phase.CONNECTING
            worker.pool.connect(replica, self)
        else:
            self._send(connection)

    def _candidates(self) -> tuple[Replica, ...]:
        """There is no other."""
        return ()

    def _count_under(self, replica_name: str) -> None:
        labels = (PROBE_ENDPOINT, self._route.model.label, replica_name)
        self.series = self.worker.metrics.of(labels)
        self.series.add(metrics.IN_FLIGHT, 1)

    def _count_adapter(self, status: int, prompt_tokens: int, completion_tokens: int) -> None:
        """It is no traffic."""

    def _fail(self, error: ServingError) -> None:
        self._answer_error(error)

    def _retry(self, error: ServingError) -> None:
        self._answer_error(error)

    def upstream_failed(self, error: ServingError) -> None:
        """The prober judges what it means."""
        self._answer_error(error)

    def report_broken(self) -> None:
        """The prober judges what it means."""


def exchange_of(
    worker: Worker, client: ClientConnection, request: Request, route: Route
) -> Exchange:
    """The exchange of a request that names a replica: pinned with the token, any other without."""
    keys = worker.api_keys
    is_probe = isinstance(keys, ProbeKeys) and keys.is_probe(request.headers)
    kind = ProbeExchange if is_probe else Exchange
    return kind(worker, client, request, route)
