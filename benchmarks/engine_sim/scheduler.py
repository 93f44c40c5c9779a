"""Continuous batching as vLLM does it, in whatever time its caller says.

Owns who runs, who waits and what each step computes; the KV cache is `block_pool.py`, the duration of
a step `latency.py`. No clock, no I/O: `step(now_s)` is called when something was added and when
`next_s` has come, and tells what has been sampled until then. Results depend on the times that
sequences were added at, not on how late `step` is called. The engine (`engine.py`) drives it with real
time, tests with virtual.

Source of the rules: vllm/v1/core/sched/scheduler.py. Running requests go first, then those that wait,
first come first served; prompts are computed in chunks; a request that finds no block makes the
latest one give up its own, to be computed again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.engine_sim.block_pool import BlockPool
    from benchmarks.engine_sim.latency import Latency
    from benchmarks.engine_sim.sequence import Sequence

_MAX_STEPS_AT_ONCE = 64
_MAX_LAG_S = 0.1
"""How late a caller may be before the missed time is lost instead of caught up with."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one step.

    Attributes:
        max_num_seqs: Requests in it.
        max_num_batched_tokens: Tokens that it computes.
        max_loras: Adapters in it.
        block_size: Tokens of one KV block.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_loras: int = 8
    block_size: int = 16


@dataclass(slots=True)
class Stored:
    """Blocks that became part of the cache: those of one sequence, one after the other."""

    sequence: Sequence
    first_index: int
    hashes: list[bytes]


@dataclass(slots=True)
class StepDone:
    """One step of the engine.

    Attributes:
        begun_s: When it began.
        at_s: When it ended.
        sampled: Sequences that got a token, and which of theirs it is, counted from 1; finished ones
            have left the batch.
        num_tokens: Tokens that were computed.
        num_preempted: Sequences that lost their blocks for it.
        stored: Blocks added to the cache.
        removed: Hashes of blocks that had to make room.
        num_queried_tokens: Tokens of newly admitted prompts, looked up in the cache.
        num_hit_tokens: Of those, found.
    """

    begun_s: float = 0.0
    at_s: float = 0.0
    sampled: list[tuple[Sequence, int]] = field(default_factory=list)
    num_tokens: int = 0
    num_preempted: int = 0
    stored: list[Stored] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0


class Scheduler:
    """The batch and the queue of one engine.

    Attributes:
        running: In the order of admission.
        waiting: In the order of arrival, preempted ones first.
        next_s: When `step` has something to say; None while there is nothing to do.
    """

    def __init__(self, limits: BatchLimits, latency: Latency, pool: BlockPool) -> None:
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_deferred = 0
        self.next_s: float | None = None
        self._limits = limits
        self._latency = latency
        self._pool = pool
        self._work: list[tuple[Sequence, int]] = []
        self._step = StepDone()

    def add(self, sequence: Sequence) -> None:
        """Takes a sequence in; `step` has to be called for its `arrived_s`."""
        self.waiting.append(sequence)
        if self.next_s is None:
            self.next_s = sequence.arrived_s

    def abort(self, sequence: Sequence) -> None:
        """Ends a sequence now: its blocks are free, its token in the current step is lost."""
        sequence.is_aborted = True
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._pool.release(sequence.holding)

    def step(self, now_s: float) -> list[StepDone]:
        """Does all steps that have ended until now, up to a bound, and begins the next.

        Args:
            now_s: Never less than in an earlier call, seconds.

        Returns:
            The steps that ended, oldest first.
        """
        done = []
        for _ in range(_MAX_STEPS_AT_ONCE):
            if self.next_s is None or self.next_s > now_s:
                break
            ended_s = max(self.next_s, now_s - _MAX_LAG_S)
            if self._work:
                done.append(self._end(ended_s))
            self._begin(ended_s)
        return done

    # Beginning a step.

    def _begin(self, start_s: float) -> None:
        """Chooses what the step that starts now computes."""
        if not self.running and self.waiting:
            start_s = max(start_s, self.waiting[0].arrived_s)
        self._step = StepDone(begun_s=start_s)
        budget = self._schedule_running(self._limits.max_num_batched_tokens)
        if not self._step.num_preempted:
            self._admit(start_s, budget)
        if not self._work:
            self.next_s = None
            return
        num_prefill = num_decoding = 0
        for sequence, num_tokens in self._work:
            if sequence.num_output and num_tokens == 1 and self._is_decoding(sequence):
                num_decoding += 1
            else:
                num_prefill += num_tokens
        self._step.num_tokens = num_prefill + num_decoding
        self.next_s = start_s + self._latency.step_s(num_prefill, num_decoding)

    @staticmethod
    def _is_decoding(sequence: Sequence) -> bool:
        return sequence.num_computed == sequence.num_known - 1

    def _schedule_running(self, budget: int) -> int:
        """Work for those in the batch, first admitted first; what is left of the budget."""
        position = 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            num_tokens = min(sequence.num_known - sequence.num_computed, budget)
            if not self._has_blocks(sequence, num_tokens):
                # Whoever was admitted last makes room, perhaps this one itself.
                self._preempt(self.running[-1])
                continue
            self._work.append((sequence, num_tokens))
            budget -= num_tokens
            position += 1
        return budget

    def _has_blocks(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes sure that the next tokens of a sequence have blocks to go to."""
        block_size = self._limits.block_size
        held = len(sequence.holding.hashes)
        missing = -(-(sequence.num_computed + num_tokens) // block_size) - held
        return missing <= 0 or self._pool.allocate(sequence.holding, missing)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._pool.release(sequence.holding)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self._step.num_preempted += 1
        self.waiting.appendleft(sequence)

    def _admit(self, start_s: float, budget: int) -> None:
        """Takes waiting sequences into the batch while there is room in every respect."""
        limits = self._limits
        skipped: list[Sequence] = []
        adapters = {one.key.adapter for one in self.running if one.key.adapter is not None}
        while self.waiting and budget > 0 and len(self.running) < limits.max_num_seqs:
            sequence = self.waiting[0]
            if sequence.arrived_s > start_s:
                break
            adapter = sequence.key.adapter
            if (
                adapter is not None
                and adapter not in adapters
                and len(adapters) >= limits.max_loras
            ):
                skipped.append(self.waiting.popleft())
                continue
            if not self._find_blocks(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            if adapter is not None:
                adapters.add(adapter)
            if sequence.scheduled_s < 0:
                sequence.scheduled_s = start_s
            num_tokens = min(sequence.num_known - sequence.num_computed, budget)
            self._work.append((sequence, num_tokens))
            budget -= num_tokens
        self.num_deferred = len(skipped)
        self.waiting.extendleft(reversed(skipped))

    def _find_blocks(self, sequence: Sequence) -> bool:
        """Holds what the cache has of a sequence, and blocks for the rest of what is known of it."""
        pool, block_size = self._pool, self._limits.block_size
        num_known = sequence.num_known
        # At least one token has to be computed: there is nothing to sample from otherwise.
        hashes = sequence.hash_until((num_known - 1) // block_size, block_size)
        hits = hashes[: pool.count_hits(hashes)]
        missing = -(-num_known // block_size) - len(hits)
        if missing > pool.room_beside(hits):
            return False
        pool.hold(sequence.holding, hits)
        pool.allocate(sequence.holding, missing)
        sequence.num_computed = len(hits) * block_size
        if sequence.num_preemptions == 0:
            sequence.num_cached = sequence.num_computed
            self._step.num_queried_tokens += num_known
            self._step.num_hit_tokens += sequence.num_cached
        return True

    # Ending a step.

    def _end(self, at_s: float) -> StepDone:
        """The step is over: what it computed is in the cache, and tokens are sampled."""
        step, self._step = self._step, StepDone()
        work, self._work = self._work, []
        step.at_s = at_s
        has_finished = False
        for sequence, num_tokens in work:
            if sequence.is_aborted:
                continue
            sequence.num_computed += num_tokens
            self._store(sequence, num_tokens, step)
            if sequence.num_computed < sequence.num_known:
                continue
            sequence.num_output += 1
            if sequence.first_token_s < 0:
                sequence.first_token_s = at_s
            step.sampled.append((sequence, sequence.num_output))
            if sequence.is_finished:
                has_finished = True
                self._pool.release(sequence.holding)
        if has_finished:
            self.running = [one for one in self.running if not one.is_finished]
        if self._pool.removed:
            step.removed = self._pool.take_removed()
        return step

    def _store(self, sequence: Sequence, num_tokens: int, step: StepDone) -> None:
        """Puts the blocks that have become full into the cache."""
        block_size = self._limits.block_size
        num_full = sequence.num_computed // block_size
        first = (sequence.num_computed - num_tokens) // block_size
        if num_full == first:
            return
        hashes = sequence.hash_until(num_full, block_size)
        stored: list[bytes] = []
        for index in range(first, num_full):
            if self._pool.store(sequence.holding, index, hashes[index]):
                stored.append(hashes[index])
            elif stored:
                step.stored.append(Stored(sequence, index - len(stored), stored))
                stored = []
        if stored:
            step.stored.append(Stored(sequence, num_full - len(stored), stored))
