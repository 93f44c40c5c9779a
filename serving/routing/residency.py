"""Which adapters sit in the GPU slots of which replica, as far as one worker can tell.

A model of the engines' own caches: each keeps the adapters that were used last in as many slots as it
has, and loads any other from CPU memory when a request for it is scheduled. Pure data: no clock, no
I/O. Owned by `worker.py`, which weighs the candidates' loads by it, so that the policy weighs a
load against a queue without knowing of adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.routing.snapshot import Adapter, Replica

DEFAULT_SLOTS = 2
"""Slots to assume of an engine that does not tell. Too few costs a preference, too many a surprise:
vLLM's own default is 1 (`max_loras`), and nobody who serves adapters leaves it there."""

SLOT_MISS_TOKENS = 256
"""Load added where the adapter is registered but in no slot: one default request
(`cost.DEFAULT_COMPLETION_TOKENS`). The copy itself takes a few ms; what costs is that the batch waits
for a slot to be free of running requests (vLLM counts such requests as "deferred"), about as long
as one of them lasts."""

HOST_BYTES_PER_TOKEN = 4 * 1024 * 1024
"""Bytes moved to the GPU in the time of one outstanding token: 12 GB/s from pageable memory over PCIe
4.0 x16, and 3,000 generated tokens a second on such a replica."""

HOST_MISS_TOKENS = 2048
"""Load added where an engine that reads adapters at first use (TensorRT-LLM) has never been asked for
this one by us: seconds from a disk or a network, as in S-LoRA's and Punica's measurements of cold
loads, at the same tokens a second."""

MAX_HOST_VERSIONS = 1024
"""Versions remembered for each replica beyond its slots."""


class _Replica:
    """The slots of one replica, and what it has been asked for at all; both by last use."""

    __slots__ = ("host", "num_slots", "slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: OrderedDict[str, None] = OrderedDict()
        self.host: OrderedDict[str, None] = OrderedDict()

    def use(self, version: str) -> None:
        for kept, bound in ((self.slots, self.num_slots), (self.host, MAX_HOST_VERSIONS)):
            kept[version] = None
            kept.move_to_end(version)
            if len(kept) > bound:
                kept.popitem(last=False)


class Residency:
    """Slots of all replicas."""

    __slots__ = ("_replicas",)

    def __init__(self) -> None:
        self._replicas: dict[int, _Replica] = {}

    def use(self, replica_index: int, version: str, num_slots: int = DEFAULT_SLOTS) -> None:
        """A request for a version goes to a replica.

        Args:
            replica_index: Which replica.
            version: Which version.
            num_slots: Adapters that one batch of its engine can have.
        """
        replica = self._replicas.get(replica_index)
        if replica is None:
            replica = self._replicas[replica_index] = _Replica(num_slots)
        replica.use(version)

    def cost_tokens(
        self, replica_index: int, version: str, size_bytes: int, *, loads_lazily: bool
    ) -> int:
        """What the load of a version would cost a replica.

        Args:
            replica_index: Which replica.
            version: Which version.
            size_bytes: Of it.
            loads_lazily: Whether the engine reads adapters at their first request only.

        Returns:
            In tokens, to add to its outstanding ones; 0 where the version is in a slot.
        """
        replica = self._replicas.get(replica_index)
        if replica is not None and version in replica.slots:
            return 0
        cost = SLOT_MISS_TOKENS + size_bytes // HOST_BYTES_PER_TOKEN
        if loads_lazily and (replica is None or version not in replica.host):
            cost += HOST_MISS_TOKENS
        return cost

    def weighed(
        self, loads: Sequence[float], candidates: Sequence[Replica], adapter: Adapter
    ) -> list[float]:
        """Load to compare each candidate by: what it has to do, the load of the adapter included.

        Args:
            loads: Outstanding tokens of each candidate.
            candidates: In the same order.
            adapter: The version that is asked for.
        """
        version, size_bytes = adapter.version, adapter.size_bytes
        return [
            load
            + self.cost_tokens(
                replica.index,
                version,
                size_bytes,
                loads_lazily=not replica.dialect.lists_adapters,
            )
            for load, replica in zip(loads, candidates, strict=True)
        ]

    def forget(self, replica_index: int) -> None:
        """A replica has left, or has restarted: nothing is in its memory."""
        self._replicas.pop(replica_index, None)
