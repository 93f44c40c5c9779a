"""What fingerprints prove: same weights, other weights, the base model's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.golden import (
    GOLDEN_PROMPTS,
    Tolerances,
    are_comparable,
    distance,
    fingerprint,
    judge,
    text_fingerprint,
)

NUM = len(GOLDEN_PROMPTS)
BASE = [{" is": -0.5, " was": -1.5, " has": -2.5, " flows": -3.5, " runs": -4.5}] * NUM


def moved(by: float) -> tuple[float, ...]:
    """The base model's answer with each logprob moved."""
    return fingerprint([{token: value - by for token, value in top.items()} for top in BASE])


def other_token() -> tuple[float, ...]:
    """An answer as sure as the base model's, of other words."""
    return fingerprint([{f"{token}!": value for token, value in top.items()} for top in BASE])


def test_distance_is_the_mean_difference_of_logprobs() -> None:
    """Logprobs that all differ by 0.25 nats are 0.25 apart, either way round."""
    base = fingerprint(BASE)
    assert distance(base, base) == 0.0
    assert distance(base, moved(0.25)) == pytest.approx(0.25)
    assert distance(moved(0.25), base) == pytest.approx(0.25)


def test_other_words_at_the_same_logprobs_are_far_apart() -> None:
    """Who the tokens are counts, not only how probable they are."""
    assert distance(fingerprint(BASE), other_token()) > 1.0


def test_token_at_the_edge_of_the_five_is_no_jump() -> None:
    """Where two tokens of nearly one probability take turns in the last place, little changes."""
    one = {"a": -0.1, "b": -3.0, "c": -4.0, "d": -5.0, "e": -6.0}
    other = {"a": -0.1, "b": -3.0, "c": -4.0, "d": -5.0, "f": -6.0}
    assert distance(fingerprint([one] * NUM), fingerprint([other] * NUM)) < 0.001


@given(st.lists(st.floats(-8.0, -0.01), min_size=5, max_size=5, unique=True), st.floats(0, 0.02))
def test_noise_stays_small(values: list[float], noise: float) -> None:
    """Whatever the distribution, logprobs that are off by no more than the noise are no further."""
    tops = [{f"t{n}": value for n, value in enumerate(values)}] * NUM
    shaken = [{token: value + noise for token, value in top.items()} for top in tops]
    assert distance(fingerprint(tops), fingerprint(shaken)) <= noise + 1e-9


def test_fingerprint_survives_json() -> None:
    """A record is a list of floats in a database; nothing is lost there."""
    record = json.loads(json.dumps(list(other_token())))
    assert distance(record, other_token()) == 0.0


def test_incomplete_answers_are_refused() -> None:
    """Every prompt needs its answer."""
    with pytest.raises(ValueError, match="not a logprob for each"):
        fingerprint(BASE[1:])
    with pytest.raises(ValueError, match="not a logprob for each"):
        fingerprint([*BASE[1:], {}])
    with pytest.raises(ValueError, match="not a text for each"):
        text_fingerprint(["a"])


def test_few_tokens_are_enough() -> None:
    """An engine that gives one logprob gives a fingerprint too."""
    one = fingerprint([{"a": -0.1}] * NUM)
    assert distance(one, fingerprint([{"a": -0.3}] * NUM)) == pytest.approx(0.2)
    assert are_comparable(one, fingerprint(BASE))


def test_first_proof_needs_a_difference_from_the_base() -> None:
    """Without a record, what is as near to the base model as noise proves nothing."""
    base = fingerprint(BASE)
    near = judge(moved(0.01), base, None)
    assert not near.is_proven
    assert "cannot be told from the base" in (near.reason or "")
    assert judge(moved(0.03), base, None).is_proven
    assert judge(base, base, None, has_effect=False).is_proven


def test_proof_needs_the_record() -> None:
    """With a record the answer has to agree with it within the tolerance."""
    base, record = fingerprint(BASE), moved(0.3)
    assert judge(moved(0.33), base, record).is_proven
    wrong = judge(moved(0.6), base, record)
    assert not wrong.is_proven
    assert "Other weights answered" in (wrong.reason or "")
    assert wrong.to_record == pytest.approx(0.3)


def test_nearer_to_the_base_than_to_the_record_is_no_proof() -> None:
    """A weak version whose record lies near the base is still told from the base itself."""
    base, record = fingerprint(BASE), moved(0.07)
    verdict = judge(base, base, record)
    assert not verdict.is_proven
    assert "nearer to the base" in (verdict.reason or "")
    assert judge(moved(0.06), base, record).is_proven


def test_texts_stand_in_for_logprobs() -> None:
    """Without logprobs the share of prompts with another text decides."""
    base = text_fingerprint([f"base {n}" for n in range(NUM)])
    own = text_fingerprint([f"own {n}" for n in range(NUM)])
    flipped = text_fingerprint(["tie", *[f"own {n}" for n in range(1, NUM)]])
    assert distance(own, flipped) == pytest.approx(1 / NUM)
    assert judge(own, base, None).is_proven
    assert judge(flipped, base, own).is_proven
    assert not judge(base, base, None).is_proven
    assert not judge(base, base, own).is_proven


def test_record_of_another_kind_is_left_out() -> None:
    """An engine that has begun to give logprobs is not held to a record of texts."""
    texts = text_fingerprint(["x"] * NUM)
    assert not are_comparable(texts, fingerprint(BASE))
    verdict = judge(moved(0.3), fingerprint(BASE), texts)
    assert (verdict.is_proven, verdict.to_record) == (True, None)
    with pytest.raises(ValueError, match="different kinds"):
        distance(texts, fingerprint(BASE))


def test_tolerances_are_the_callers() -> None:
    """A noisier engine can be given more room."""
    base, record = fingerprint(BASE), moved(0.3)
    assert judge(moved(0.5), base, record, Tolerances(same=0.3)).is_proven


def test_prompts_fit_no_cache_block() -> None:
    """Each prompt is shorter than 16 tokens by any tokenizer that merges words: no more than 60 chars."""
    assert len(set(GOLDEN_PROMPTS)) == NUM
    assert all(len(prompt) <= 60 for prompt in GOLDEN_PROMPTS)
