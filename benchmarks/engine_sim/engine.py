"""The simulated engine in real time: drives the scheduler, tells answers of their tokens, counts.

Owns the adapters, the metrics and the KV-event publisher. Called by `routes.py` for requests and by the
schedule when a step has ended.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from benchmarks.engine_sim.adapters import Adapters
from benchmarks.engine_sim.block_hash import NO_KEY, CacheKey
from benchmarks.engine_sim.block_pool import BlockPool
from benchmarks.engine_sim.errors import QueueFull, UnknownModel
from benchmarks.engine_sim.kv_events import events_of
from benchmarks.engine_sim.latency import Latency
from benchmarks.engine_sim.metrics import SimMetrics
from benchmarks.engine_sim.request import answer_length
from benchmarks.engine_sim.scheduler import BatchLimits, Scheduler
from benchmarks.engine_sim.sequence import Sequence
from benchmarks.engine_sim.speech import Speech

if TYPE_CHECKING:
    import asyncio

    from benchmarks.engine_sim.answer import Answer
    from benchmarks.engine_sim.kv_events import KvEventPublisher
    from benchmarks.engine_sim.options import SimOptions
    from benchmarks.engine_sim.request import GenerateRequest
    from benchmarks.schedule import Schedule


class Engine:
    """One engine.

    Attributes:
        options: How it was started.
        adapters: What it can answer with.
        metrics: What has happened.
        scheduler: Who runs and who waits.
        publisher: Of KV events, or None.
    """

    def __init__(
        self,
        options: SimOptions,
        loop: asyncio.AbstractEventLoop,
        schedule: Schedule,
        publisher: KvEventPublisher | None,
    ) -> None:
        """Starts idle.

        Args:
            options: How it is started.
            loop: Where it runs.
            schedule: Calls it when a step has ended.
            publisher: Of KV events, or None.
        """
        self.options = options
        self.adapters = Adapters(
            options.model, options.adapters, checks_paths=options.check_lora_paths
        )
        self.metrics = SimMetrics(options)
        self.publisher = publisher
        self._pool = BlockPool(options.num_blocks)
        limits = BatchLimits(
            options.max_num_seqs,
            options.max_num_batched_tokens,
            options.max_loras,
            options.block_size,
        )
        latency = Latency(
            options.prefill_tokens_per_s, options.decode_tokens_per_s, options.batch_slowdown
        )
        self.scheduler = Scheduler(limits, latency, self._pool)
        self._speech = Speech(options.seed)
        self._loop = loop
        self._schedule = schedule
        self._is_armed = False
        self._active: Counter[str] = Counter()

    # Requests.

    def submit(self, answer: Answer, request: GenerateRequest) -> None:
        """Takes a request in; its answer is told of every token from then on.

        Raises:
            SimError: If it cannot be answered.
        """
        key = self._select(answer, request)
        prompts = request.prompts()
        sequences: list[Sequence] = []
        now_s = time.monotonic()
        for prompt in prompts:
            num_tokens, reason = answer_length(request, len(prompt), self.options)
            for choice in range(answer.n):
                output = self._speech.tokens(answer.adapter, prompt, choice, num_tokens)
                sequences.append(Sequence(prompt, output, now_s, key, reason, answer))
        self._check_queue(len(sequences))
        answer.begin(sequences, sum(len(prompt) for prompt in prompts))
        if answer.adapter is not None:
            self._active[answer.adapter] += len(sequences)
            self._note_adapters()
        for sequence in sequences:
            self.scheduler.add(sequence)
        self._arm()

    def abort(self, answer: Answer) -> None:
        """The client has left: whatever is not finished ends."""
        for sequence in answer.sequences:
            if not sequence.is_finished and not sequence.is_aborted:
                self.scheduler.abort(sequence)
                self.metrics.finished["abort"] += 1
                self._leave(answer)

    def _select(self, answer: Answer, request: GenerateRequest) -> CacheKey:
        """Finds the weights: the model's name, or an adapter's, or nothing for the base model."""
        name, options = request.model, self.options
        if not name or name == options.model:
            return CacheKey(None, request.cache_salt) if request.cache_salt else NO_KEY
        path = self.adapters.paths.get(name)
        if path is None:
            raise UnknownModel(name, options.model)
        answer.adapter = name
        answer.lora_id = self.adapters.id_of(name)
        return CacheKey((name, path), request.cache_salt or None)

    def _check_queue(self, num_sequences: int) -> None:
        limit, scheduler = self.options.max_num_queued_reqs, self.scheduler
        if limit is None:
            return
        if len(scheduler.running) + len(scheduler.waiting) + num_sequences > limit:
            self.metrics.rejected += 1
            raise QueueFull

    # Steps.

    def _arm(self) -> None:
        """Sees to it that the engine is called when there is something to do."""
        next_s = self.scheduler.next_s
        if self._is_armed or next_s is None:
            return
        self._is_armed = True
        if next_s <= time.monotonic():
            self._loop.call_soon(self._run)
        else:
            self._schedule.at(next_s, self._run)

    def _run(self) -> None:
        """Some steps have ended."""
        self._is_armed = False
        touched: dict[Answer, None] = {}
        for step in self.scheduler.step(time.monotonic()):
            self.metrics.step(step)
            for sequence, number in step.sampled:
                self.metrics.token(sequence, number, step.at_s)
                answer: Answer = sequence.owner
                answer.token(sequence, number)
                touched[answer] = None
                if number == len(sequence.output):
                    self.metrics.finish(sequence, answer.n, answer.max_tokens)
                    self._leave(answer)
            if self.publisher is not None and (step.stored or step.removed):
                self.publisher.publish(events_of(step, self.options.block_size))
        for answer in touched:
            answer.flush()
        self._arm()

    def _leave(self, answer: Answer) -> None:
        """One of an answer's sequences has ended."""
        adapter = answer.adapter
        if adapter is None:
            return
        self._active[adapter] -= 1
        if not self._active[adapter]:
            del self._active[adapter]
            self._note_adapters()

    def _note_adapters(self) -> None:
        self.metrics.note_adapters(sorted(self._active))

    # What it says of itself.

    def exposition(self) -> bytes:
        """The body of `GET /metrics`."""
        self._note_adapters()
        scheduler = self.scheduler
        return self.metrics.text(
            len(scheduler.running),
            len(scheduler.waiting),
            scheduler.num_deferred,
            self._pool.usage,
        )
