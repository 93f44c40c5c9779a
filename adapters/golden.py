"""Whether the weights that answered are those of a version: golden prompts and what they prove.

Owns the prompts, the fingerprint of an answer, the distance between two fingerprints and the verdict.
Never sends a request. Called by the control plane's probe.

A fingerprint holds the five most probable next tokens of each golden prompt with their logprobs, and
nothing of the prompt itself: prompt logprobs (`echo`) end vLLM 0.32 on CPUs with `--enable-lora`
(`punica_cpu.add_lora_logits` has one index a request and gets one row a prompt token).

Where an engine gives no logprobs, the greedy text of each prompt stands for them.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Below 16 tokens each: vLLM caches whole blocks only, so that none of them is ever answered from its
# prefix cache. Of many kinds, since an adapter may change one kind of text only.
GOLDEN_PROMPTS: tuple[str, ...] = (
    "The mill wheel turns because the river",
    "Question: What is 17 + 25? Answer:",
    "def add(a, b):\n    return",
    "Dear customer, thank you for",
    "SELECT name FROM users WHERE",
    "Il était une fois, dans un petit",
    "The capital of France is",
    '{"id": 1, "name": "',
    "user: hello\nassistant:",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time there was a",
    "In 1969 the first human",
)
NUM_TOP_TOKENS = 5
"""What OpenAI's completions allow at most."""
NUM_TEXT_TOKENS = 16
TEXTS_ONLY = 0.0

Fingerprint = tuple[float, ...]
"""`(k, key, logprob, key, logprob, …)` with k pairs a prompt, a key being the CRC-32 of a token's text;
with k = 0 one CRC-32 a prompt, of its whole greedy text. Floats hold a CRC exactly."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """What counts as the same weights and what as others.

    Attributes:
        same: Mean distance to the version's record up to which they are the same, in nats.
        other: Mean distance to the base model from which they are others, in nats.
        same_texts: Share of prompts whose greedy text may differ from the record's.
        other_texts: Share of prompts whose greedy text has to differ from the base model's.
    """

    same: float = 0.08
    other: float = 0.02
    same_texts: float = 0.34
    other_texts: float = 0.08


DEFAULT_TOLERANCES = Tolerances()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a probe has shown.

    Attributes:
        is_proven: Whether the version's weights answered.
        reason: Why not, in one sentence.
        to_base: Distance to the base model, where both were there.
        to_record: Distance to the version's record, where there is one.
    """

    is_proven: bool
    reason: str | None
    to_base: float | None
    to_record: float | None


def fingerprint(tops: Sequence[Mapping[str, float]]) -> Fingerprint:
    """Return the fingerprint of an answer.

    Args:
        tops: For each golden prompt, the most probable next tokens: text → logprob, in nats.

    Raises:
        ValueError: If a prompt is missing or has no token.
    """
    if len(tops) != len(GOLDEN_PROMPTS) or not all(tops):
        raise ValueError("The answer to the golden prompts has not a logprob for each of them.")
    pairs = chain.from_iterable(_pairs(top) for top in tops)
    return (float(NUM_TOP_TOKENS), *chain.from_iterable(pairs))


def text_fingerprint(texts: Sequence[str]) -> Fingerprint:
    """Return the fingerprint of greedy texts, for an engine without logprobs.

    Raises:
        ValueError: If a prompt is missing.
    """
    if len(texts) != len(GOLDEN_PROMPTS):
        raise ValueError("The answer to the golden prompts has not a text for each of them.")
    return (TEXTS_ONLY, *(_key(text) for text in texts))


def are_comparable(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of one kind: an engine's update may change what it gives."""
    return len(one) == len(other) and one[0] == other[0]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return how far apart two fingerprints are.

    For logprobs: the mean over the prompts of the mean |difference| of logprobs in nats, each token
    weighted by its mean probability. A token that one side has not among its first five has there the
    probability of the fifth at most, and that is taken. For texts: the share that differs.

    Raises:
        ValueError: If they are not comparable.
    """
    if not are_comparable(one, other):
        raise ValueError("These fingerprints are of different kinds.")
    if one[0] == TEXTS_ONLY:
        return sum(a != b for a, b in zip(one[1:], other[1:], strict=True)) / len(GOLDEN_PROMPTS)
    both = zip(_tops(one), _tops(other), strict=True)
    return sum(_apart(a, b) for a, b in both) / len(GOLDEN_PROMPTS)


def judge(
    got: Sequence[float],
    base: Sequence[float] | None,
    record: Sequence[float] | None,
    tolerances: Tolerances = DEFAULT_TOLERANCES,
    *,
    has_effect: bool = True,
) -> Judgement:
    """Decide whether a version answered.

    Without a record the answers have to differ from the base model's, which makes them the record; with
    one they have to agree with it, and to be no nearer to the base model.

    Args:
        got: Fingerprint of the answer in the version's name.
        base: Of the base model on the same replica; None leaves it out.
        record: Of the version's first proof on this kind of engine, or None.
        tolerances: What counts as the same.
        has_effect: False for a version that is known to answer as the base does.
    """
    is_text = got[0] == TEXTS_ONLY
    same = tolerances.same_texts if is_text else tolerances.same
    other = tolerances.other_texts if is_text else tolerances.other
    to_base = _distance_if(got, base)
    to_record = _distance_if(got, record)
    reason = None
    if to_record is not None:
        if to_record > same:
            reason = (
                f"Other weights answered: {to_record:.3f} from the version's record, where {same:g} "
                "is the most."
            )
        elif has_effect and to_base is not None and to_record > to_base:
            reason = (
                f"The answers are nearer to the base model's ({to_base:.3f}) than to the version's "
                f"record ({to_record:.3f})."
            )
    elif has_effect and to_base is not None and to_base < other:
        reason = (
            f"The answers cannot be told from the base model's: {to_base:.3f} apart, where "
            f"{other:g} is the least. If it is meant to do so little, push it with --allow-no-effect."
        )
    return Judgement(reason is None, reason, to_base, to_record)


def _distance_if(got: Sequence[float], other: Sequence[float] | None) -> float | None:
    if other is None or not are_comparable(got, other):
        return None
    return distance(got, other)


def _key(text: str) -> float:
    return float(zlib.crc32(text.encode("utf-8", "surrogatepass")))


def _pairs(top: Mapping[str, float]) -> list[tuple[float, float]]:
    """The first five; fewer are filled up with what no token has."""
    keyed: dict[float, float] = {}
    for text, logprob in top.items():
        key = _key(text)
        keyed[key] = max(logprob, keyed.get(key, -math.inf))
    best = sorted(keyed.items(), key=lambda pair: (-pair[1], pair[0]))[:NUM_TOP_TOKENS]
    return best + [(-1.0, best[-1][1])] * (NUM_TOP_TOKENS - len(best))


def _tops(fingerprint_: Sequence[float]) -> Iterator[dict[float, float]]:
    numbers = iter(fingerprint_[1:])
    while prompt := list(islice(numbers, 2 * int(fingerprint_[0]))):
        yield dict(zip(prompt[::2], prompt[1::2], strict=True))


def _apart(one: Mapping[float, float], other: Mapping[float, float]) -> float:
    least_one, least_other = min(one.values()), min(other.values())
    total = weights = 0.0
    for key in (one.keys() | other.keys()) - {-1.0}:
        here = one.get(key, min(least_one, other.get(key, 0.0)))
        there = other.get(key, min(least_other, one.get(key, 0.0)))
        weight = (math.exp(here) + math.exp(there)) / 2
        total += weight * abs(here - there)
        weights += weight
    return total / weights
