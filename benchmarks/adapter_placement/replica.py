"""One simulated replica: its loader, its adapters in host memory and on the GPU, its batch.

Owns what happens inside; decides neither who comes here nor who has to go. Driven by `fleet.py` in virtual
time. The rules are vLLM's (`engine_sim`, which plays every step): running requests go first, waiting
ones in order, skipping those whose adapter finds no GPU slot. Runs of steps without a new prompt are
taken in one, so that a request costs a handful of events.

Loads come one after the other, as vLLM's engine does them; those with requests waiting for them go
first. A version that is unregistered serves the requests that it has to their end.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from typing import TYPE_CHECKING

from benchmarks.adapter_placement import model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.adapter_placement.workload import Arrival

_LATENCY = model.LATENCY


class Request:
    """One request on its way.

    Attributes:
        arrival: What it asks for.
        missed: Whether it had to wait for a load.
        load_wait_s: For how long.
        ttft_s: Until its first token; NaN before.
    """

    __slots__ = ("arrival", "load_wait_s", "missed", "ttft_s")

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.missed = False
        self.load_wait_s = 0.0
        self.ttft_s = math.nan

    @property
    def estimated_tokens(self) -> int:
        """What a router takes it for."""
        return self.arrival.prompt_tokens + model.EXPECTED_OUTPUT_TOKENS


class Replica:
    """A replica.

    Attributes:
        used_s: Registered versions, ready or loading → when they were last asked for.
        ready: Those that can serve.
        pending: Those to be loaded or loading → the requests that wait for them.
        in_flight: Version → requests that have it and are not done.
        load_tokens: Estimated tokens of what is not done.
        served_tokens: Of all finished requests.
        num_activations: Copies from host memory into a GPU slot.
        step_s: When the current run of steps ends; infinite while there is nothing to do.
        loaded_s: When the current load ends; infinite without one.
    """

    def __init__(self, versions: Sequence[model.Version]) -> None:
        self._versions = versions
        self.used_s: dict[int, float] = {}
        self.ready: set[int] = set()
        self.pending: dict[int, list[Request]] = {}
        self.in_flight: dict[int, int] = {}
        self.load_tokens = 0.0
        self.served_tokens = 0
        self.num_activations = 0
        self.step_s = math.inf
        self.loaded_s = math.inf
        self._loading: int | None = None
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._running: list[tuple[int, int, Request]] = []
        self._ticket = itertools.count()
        self._num_steps = 0
        self._begun_s = 0.0
        self._run_step_s = 0.0
        self._run_length = 0
        self._slots: dict[int, None] = {}
        self._batch: dict[int, int] = {}
        self._batch_share = 0.0

    # Registration.

    @property
    def is_full(self) -> bool:
        """Whether a load needs a victim."""
        return len(self.used_s) >= model.MAX_REGISTERED

    def least_recently_used(self) -> int | None:
        """The ready version to go by LRU, idle ones first; None while all are being loaded."""
        candidates = (
            (version in self.in_flight, self.used_s[version], version) for version in self.ready
        )
        least = min(candidates, default=None)
        return None if least is None else least[2]

    def register(self, version: int, now_s: float) -> None:
        """Asks for a load."""
        self.used_s[version] = now_s
        self.pending[version] = []
        if self._loading is None:
            self._start_load(now_s)

    def unregister(self, version: int) -> None:
        """Forgets a version that is ready."""
        del self.used_s[version]
        self.ready.remove(version)
        if version not in self._batch:
            self._slots.pop(version, None)

    def finish_load(self, now_s: float) -> None:
        """The current load is done: whoever waited for it may run."""
        version = self._loading
        if version is None:
            return
        self.ready.add(version)
        for request in self.pending.pop(version):
            request.load_wait_s = now_s - request.arrival.at_s
            self._enqueue(request, now_s)
        self._loading, self.loaded_s = None, math.inf
        if self.pending:
            self._start_load(now_s)

    def _start_load(self, now_s: float) -> None:
        asked = (version for version, requests in self.pending.items() if requests)
        version = next(asked, None)
        if version is None:
            version = next(iter(self.pending))
        self._loading = version
        self.loaded_s = now_s + self._versions[version].load_s

    # Requests.

    def accept(self, request: Request, now_s: float) -> None:
        """Takes a request whose version is registered."""
        version = request.arrival.version
        self.used_s[version] = now_s
        self.in_flight[version] = self.in_flight.get(version, 0) + 1
        self.load_tokens += request.estimated_tokens
        if version in self.ready:
            self._enqueue(request, now_s)
        else:
            request.missed = True
            self.pending[version].append(request)

    def _enqueue(self, request: Request, now_s: float) -> None:
        self._waiting.append(request)
        if self.step_s == math.inf:
            self._begin(now_s)
        elif not self._prefilling and self._run_length > 1:
            # The new prompt joins at the next step: the run of decode steps ends there.
            done = max(1, math.ceil((now_s - self._begun_s) / self._run_step_s))
            if done < self._run_length:
                self._run_length = done
                self.step_s = self._begun_s + done * self._run_step_s

    # Steps.

    def finish_step(self, now_s: float) -> None:
        """The current run of steps is done: hands out tokens and begins the next."""
        self._num_steps += self._run_length
        for request in self._prefilling:
            request.ttft_s = now_s - request.arrival.at_s
            # The first token came with the prompt.
            last_step = self._num_steps + request.arrival.output_tokens - 1
            heapq.heappush(self._running, (last_step, next(self._ticket), request))
        self._prefilling = []
        while self._running and self._running[0][0] <= self._num_steps:
            self._leave(heapq.heappop(self._running)[2])
        self._begin(now_s)

    def _leave(self, request: Request) -> None:
        version = request.arrival.version
        self.load_tokens -= request.estimated_tokens
        self.served_tokens += request.arrival.prompt_tokens + request.arrival.output_tokens
        if self.in_flight[version] == 1:
            del self.in_flight[version]
        else:
            self.in_flight[version] -= 1
        if self._batch[version] == 1:
            del self._batch[version]
            self._batch_share -= self._versions[version].batch_share
            if version not in self.used_s:
                self._slots.pop(version, None)
        else:
            self._batch[version] -= 1

    def _begin(self, now_s: float) -> None:
        extra_s, num_prefill = self._admit() if self._waiting else (0.0, 0)
        num_decoding = len(self._running)
        if not num_prefill and not num_decoding:
            self.step_s = math.inf
            return
        step_s = extra_s + _LATENCY.step_s(num_prefill, num_decoding)
        step_s += self._batch_share / _LATENCY.decode_tokens_per_s
        self._begun_s, self._run_step_s = now_s, step_s
        self._run_length = 1 if num_prefill else max(1, self._running[0][0] - self._num_steps)
        self.step_s = now_s + self._run_length * step_s

    def _admit(self) -> tuple[float, int]:
        """Takes waiting requests in; seconds spent on filling GPU slots, and prompt tokens."""
        extra_s, num_prefill = 0.0, 0
        skipped: list[Request] = []
        while self._waiting and len(self._running) + len(self._prefilling) < model.MAX_NUM_SEQS:
            request = self._waiting[0]
            arrival = request.arrival
            if num_prefill + arrival.prompt_tokens > model.MAX_BATCHED_TOKENS:
                break
            self._waiting.popleft()
            if arrival.version not in self._batch:
                activate_s = self._occupy(arrival.version)
                if activate_s is None:
                    skipped.append(request)
                    continue
                extra_s += activate_s
                self._batch_share += self._versions[arrival.version].batch_share
            self._batch[arrival.version] = self._batch.get(arrival.version, 0) + 1
            num_prefill += arrival.prompt_tokens
            self._prefilling.append(request)
        self._waiting.extendleft(reversed(skipped))
        return extra_s, num_prefill

    def _occupy(self, version: int) -> float | None:
        """Brings a version into a GPU slot; seconds that takes, None while all slots are busy."""
        if version in self._slots:
            # The order of slots is that of use.
            self._slots[version] = self._slots.pop(version)
            return 0.0
        if len(self._slots) >= model.GPU_SLOTS:
            idle = next((slot for slot in self._slots if slot not in self._batch), None)
            if idle is None:
                return None
            del self._slots[idle]
        self._slots[version] = None
        self.num_activations += 1
        return self._versions[version].activate_s
