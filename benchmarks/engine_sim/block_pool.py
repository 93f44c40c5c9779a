"""The KV cache: blocks that requests hold, and blocks kept for the next that begins alike.

Owns capacity, reference counts and the order of eviction (least recently used first), and notes what
was stored and removed. Knows no time and no requests. Used by `scheduler.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Holding:
    """The blocks of one request, first to last; None for one that is not in the cache under a hash."""

    hashes: list[bytes | None] = field(default_factory=list)


class BlockPool:
    """Blocks of one engine.

    Attributes:
        num_blocks: Capacity.
        removed: Hashes evicted since somebody last took the list.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.removed: list[bytes] = []
        self._users: dict[bytes, int] = {}
        # Least recently used first.
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._num_private = 0

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return len(self._users) + self._num_private

    @property
    def num_cached(self) -> int:
        """Blocks that the next request could find."""
        return len(self._users) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the capacity that requests hold."""
        return self.num_used / self.num_blocks

    def count_hits(self, hashes: list[bytes]) -> int:
        """How many of a request's first blocks are there."""
        users, idle = self._users, self._idle
        for number, one in enumerate(hashes):
            if one not in users and one not in idle:
                return number
        return len(hashes)

    def room_beside(self, hits: list[bytes]) -> int:
        """Blocks that could be allocated once these are held."""
        newly_held = sum(one in self._idle for one in hits)
        return self.num_blocks - self.num_used - newly_held

    def hold(self, holding: Holding, hits: list[bytes]) -> None:
        """Blocks that were found become this request's too."""
        for one in hits:
            self._users[one] = self._users.get(one, 0) + 1
            self._idle.pop(one, None)
        holding.hashes += hits

    def allocate(self, holding: Holding, num_blocks: int) -> bool:
        """Gives a request empty blocks, evicting what nobody holds; False if there are too few."""
        if num_blocks > self.num_blocks - self.num_used:
            return False
        num_empty = self.num_blocks - self.num_used - len(self._idle)
        for _ in range(num_blocks - num_empty):
            evicted, _ = self._idle.popitem(last=False)
            self.removed.append(evicted)
        self._num_private += num_blocks
        holding.hashes += [None] * num_blocks
        return True

    def store(self, holding: Holding, index: int, block: bytes) -> bool:
        """A request's block is full and computed; False if the cache has one like it already."""
        if block in self._users or block in self._idle:
            return False
        self._users[block] = 1
        self._num_private -= 1
        holding.hashes[index] = block
        return True

    def release(self, holding: Holding) -> None:
        """A request gives all its blocks back; its last ones will be evicted first."""
        users = self._users
        for one in reversed(holding.hashes):
            if one is None:
                self._num_private -= 1
                continue
            left = users[one] - 1
            if left:
                users[one] = left
            else:
                del users[one]
                self._idle[one] = None
        holding.hashes = []

    def take_removed(self) -> list[bytes]:
        """What was evicted since the last call."""
        removed, self.removed = self.removed, []
        return removed
