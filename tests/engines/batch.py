"""Which of a dialect server's generations run, and which wait for a place.

Owns the two lists and their order; knows no HTTP. Used by the dialect servers of this folder.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

UNBOUNDED = 1 << 30


@dataclass(eq=False)
class Generation:
    """One request that the engine generates for.

    Attributes:
        weights: Name of the weights that answer: the base model's, or an adapter's.
        tokens: What it says, token by token.
        finish_reason: How it ends when nothing interferes.
        num_choices: How many times it says it (`n`).
        priority: As the client sent it.
        contents: What its weights are made of (`adapter_weights.py`).
        prompts: Of a text completion that has several: each is a choice of its own.
        num_logprobs: How many of the most probable tokens are told with it.
        num_sent: Tokens generated so far.
        is_aborted: Whether somebody asked the engine to end it now.
        eviction: Why it was thrown out of the queue, if it was.
        may_run: Set when it has its place in the batch.
    """

    response_id: str
    weights: str
    tokens: tuple[str, ...]
    finish_reason: str
    num_prompt_tokens: int
    is_streaming: bool
    num_choices: int = 1
    priority: float = 0
    contents: str = ""
    prompts: tuple[str, ...] = ()
    num_logprobs: int = 0
    num_sent: int = 0
    is_aborted: bool = False
    eviction: str | None = None
    may_run: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def text(self) -> str:
        """What it has said so far."""
        return "".join(self.tokens[: self.num_sent])

    @property
    def usage(self) -> dict[str, int]:
        """Token counts so far."""
        completion = self.num_sent * self.num_choices
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "total_tokens": self.num_prompt_tokens + completion,
            "completion_tokens": completion,
        }


@dataclass
class Batch:
    """Running and waiting generations.

    Attributes:
        order: Sort key of the queue; the least is served first, arrival breaks ties.
        is_paused: While true nobody gets a place.
    """

    max_running: int = UNBOUNDED
    order: Callable[[Generation], float] = lambda generation: 0
    running: list[Generation] = field(default_factory=list)
    waiting: list[Generation] = field(default_factory=list)
    is_paused: bool = False

    @property
    def is_full(self) -> bool:
        """Whether a newcomer has to wait."""
        return self.is_paused or len(self.running) >= self.max_running

    @property
    def everybody(self) -> list[Generation]:
        """All that the engine holds."""
        return [*self.running, *self.waiting]

    def enter(self, generation: Generation) -> None:
        """Takes a generation in; `may_run` says when it has its place."""
        self.waiting.append(generation)
        self.fill()

    def leave(self, generation: Generation) -> None:
        """Its place, or its place in the queue, is free."""
        if generation in self.running:
            self.running.remove(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)
        self.fill()

    def evict(self, generation: Generation, reason: str) -> None:
        """Throws one out of the queue."""
        self.waiting.remove(generation)
        generation.eviction = reason
        generation.may_run.set()

    def abort(self, generation: Generation) -> None:
        """Ends one gracefully, with what it has said so far."""
        generation.is_aborted = True
        generation.may_run.set()

    def fill(self) -> None:
        """Gives free places to those who are first."""
        self.waiting.sort(key=self.order)
        while self.waiting and not self.is_full:
            first = self.waiting.pop(0)
            self.running.append(first)
            first.may_run.set()
