"""The simulator's tokenizer loses nothing and keeps prefixes."""

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.engine_sim.speech import WORDS, Speech
from benchmarks.engine_sim.tokens import decode, encode, encode_chat

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(TEXT)
def test_round_trip(text):
    """A text comes back whole."""
    assert decode(encode(text)) == text


@given(st.lists(TEXT, min_size=1, max_size=4), TEXT)
def test_conversation_keeps_its_beginning(contents, answer):
    """A conversation that goes on begins with the tokens that it had."""
    turns = [("user", content) for content in contents]
    before = encode_chat(turns)
    after = encode_chat([*turns, ("assistant", answer), ("user", "and then?")])
    assert after[: len(before)] == before


def test_words_are_one_token():
    """What the engine says has as many tokens as it counts, and is found again as a prompt."""
    said = Speech(1).tokens("support-v2", [1, 2, 3], 0, 20)
    assert encode(decode(said)) == said
    assert decode(said).startswith("support-v2")
    assert all(len(encode(word)) == 1 for word in WORDS)


def test_speech_depends_on_all_it_should():
    """Same seed, adapter, prompt and choice say the same; another of any says something else."""
    one = Speech(1).tokens("a", [1, 2], 0, 30)
    assert Speech(1).tokens("a", [1, 2], 0, 30) == one
    others = [
        Speech(2).tokens("a", [1, 2], 0, 30),
        Speech(1).tokens("b", [1, 2], 0, 30),
        Speech(1).tokens("a", [1, 3], 0, 30),
        Speech(1).tokens("a", [1, 2], 1, 30),
    ]
    assert one not in others
