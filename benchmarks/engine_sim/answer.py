"""One request that the simulated engine answers, from its admission to its last byte.

Owns what is written for it; the sequences belong to the scheduler. Used by `engine.py`, which tells
it of every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from benchmarks.engine_sim.speech import text_of
from benchmarks.engine_sim.tokens import decode
from benchmarks.engine_sim.wire import END, Clock, StreamWire, whole
from benchmarks.vllm_wire import usage

if TYPE_CHECKING:
    from benchmarks.engine_sim.request import Endpoint, GenerateRequest
    from benchmarks.engine_sim.sequence import Sequence

_TEXTS: dict[int, bytes] = {}
_MAX_TEXTS = 10_000


class Client(Protocol):
    """Who the answer is for."""

    def write(self, piece: bytes) -> None:
        """Sends bytes, or nothing once the client has gone."""

    def finish(self) -> None:
        """The answer is complete."""


class Answer:
    """One answer.

    Attributes:
        sequences: One a choice.
        adapter: Name of the adapter that answers, None for the base model.
        lora_id: The adapter's number.
        session_id: As the client sent it.
        n: Choices of each prompt.
        max_tokens: Bound that the client set.
    """

    __slots__ = (
        "_client",
        "_clock",
        "_counts",
        "_endpoint",
        "_has_begun",
        "_is_continuous",
        "_num_open",
        "_pieces",
        "_wants_usage",
        "_wire",
        "adapter",
        "base",
        "is_streaming",
        "lora_id",
        "max_tokens",
        "n",
        "num_prompt_tokens",
        "sequences",
        "session_id",
    )

    def __init__(
        self,
        client: Client,
        clock: Clock,
        endpoint: Endpoint,
        request: GenerateRequest,
        base: dict[str, object],
    ) -> None:
        """Begins an answer.

        Args:
            client: Who it is for.
            clock: Writes heads.
            endpoint: Which API.
            request: What was asked.
            base: id, object, created and model of its bodies.
        """
        options = request.stream_options
        self._client = client
        self._clock = clock
        self._endpoint = endpoint
        self.base = base
        self.is_streaming = bool(request.stream)
        self._wants_usage = options is not None and bool(options.include_usage)
        # Works only together with `include_usage`, as in vLLM.
        self._is_continuous = self._wants_usage and bool(
            options is not None and options.continuous_usage_stats
        )
        self._wire = StreamWire(endpoint, base) if self.is_streaming else None
        self._pieces: list[bytes] = []
        self._has_begun = False
        self._num_open = 0
        self.adapter: str | None = None
        self.lora_id: int | None = None
        self.session_id = request.session_id
        self.n = request.n or 1
        self.max_tokens = request.bound()
        self.num_prompt_tokens = 0
        self.sequences: list[Sequence] = []

    def begin(self, sequences: list[Sequence], num_prompt_tokens: int) -> None:
        """Its sequences are known."""
        self.sequences = sequences
        self.num_prompt_tokens = num_prompt_tokens
        self._num_open = len(sequences)

    def token(self, sequence: Sequence, number: int) -> None:
        """A sequence's token of this number, counted from 1; nothing is sent before `flush`."""
        is_last = number == len(sequence.output)
        if is_last:
            self._num_open -= 1
        wire = self._wire
        if wire is None:
            return
        pieces = self._pieces
        if not self._has_begun:
            self._has_begun = True
            pieces.append(self._clock.stream_head())
            if self._endpoint == "chat":
                pieces += [wire.role(index) for index in range(len(self.sequences))]
        sequences = self.sequences
        index = 0 if len(sequences) == 1 else sequences.index(sequence)
        text = _json_text(sequence.output[number - 1])
        reason = sequence.finish_reason if is_last else None
        counts = usage(len(sequence.prompt), number) if self._is_continuous else None
        pieces.append(wire.token(index, text, reason, counts))

    def flush(self) -> None:
        """Sends what the engine's last steps have brought."""
        if self._wire is None:
            if not self._num_open:
                self._client.write(self._clock.sized(200, self._body()))
                self._client.finish()
            return
        pieces = self._pieces
        if not self._num_open:
            if self._wants_usage:
                pieces.append(self._wire.usage(usage(self.num_prompt_tokens, self._num_tokens())))
            pieces.append(END)
        self._client.write(b"".join(pieces))
        pieces.clear()
        if not self._num_open:
            self._client.finish()

    def _num_tokens(self) -> int:
        return sum(one.num_output for one in self.sequences)

    def _body(self) -> bytes:
        choices = [(decode(one.output), str(one.finish_reason)) for one in self.sequences]
        num_tokens = self._num_tokens()
        return whole(self._endpoint, self.base, choices, self.num_prompt_tokens, num_tokens)


def _json_text(token: int) -> bytes:
    """A token's text, as in a JSON string; there are few different ones."""
    found = _TEXTS.get(token)
    if found is None:
        found = text_of(token).replace("\\", "\\\\").replace('"', '\\"').encode()
        if len(_TEXTS) < _MAX_TEXTS:
            _TEXTS[token] = found
    return found
