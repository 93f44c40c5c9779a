"""From a body to the model that answers it and what it will cost."""

from __future__ import annotations

import pytest

from serving.engines import dialect_of
from serving.errors import BadRequest, NoReplica, NotOffered, UnknownModel
from serving.gateway.endpoints import RELAYED
from serving.gateway.resolve import resolve
from serving.routing.snapshot import Model, Replica, Snapshot

CHAT, TOKENIZE = RELAYED["/v1/chat/completions"], RELAYED["/tokenize"]
REPLICA = Replica(0, "r", "h", 1, dialect_of("vllm"))


def _model(name: str, engine_name: str) -> Model:
    offered = frozenset({CHAT.path, TOKENIZE.path})
    return Model(name, engine_name, 2048, None, dict.fromkeys(offered, (REPLICA,)), offered)


BASE, ALIAS = _model("m", "m"), _model("fast", "m")
SNAPSHOT = Snapshot(models={"m": BASE, "fast": ALIAS}, default_model=BASE, is_complete=True)


@pytest.mark.parametrize(
    ("body", "model", "engine_name", "cost_tokens", "adds_usage"),
    [
        (b'{"model":"m"}', BASE, None, 1 + 3 + 256, False),
        (b'{"model":"fast"}', ALIAS, "m", 1 + 4 + 256, False),
        (b'{"model":"m","max_tokens":10}', BASE, None, 1 + 7 + 10, False),
        (b'{"model":"m","max_tokens":10,"max_completion_tokens":20,"n":3}', BASE, None, 1 + 15 + 60, False),
        (b'{"model":"m","max_output_tokens":5}', BASE, None, 1 + 8 + 5, False),
        (b'{"model":"m","max_tokens":99999999999999999999}', BASE, None, 1 + 11 + 4096, False),
        (b'{"model":"m","stream":true}', BASE, None, 1 + 6 + 256, True),
        (b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}', BASE, None, 1 + 16 + 256, False),
    ],
)  # fmt: skip
def test_route(
    body: bytes, model: Model, engine_name: str | None, cost_tokens: int, adds_usage: bool
) -> None:
    """Model, name for the engine, cost, and whether usage is asked for."""
    assert resolve(CHAT, body, SNAPSHOT) == (CHAT, model, engine_name, cost_tokens, adds_usage)


def test_default_model() -> None:
    """Only where `model` is optional and there is one base model."""
    assert resolve(TOKENIZE, b"{}", SNAPSHOT)[1:3] == (BASE, "m")
    with pytest.raises(BadRequest):
        resolve(CHAT, b"{}", SNAPSHOT)
    with pytest.raises(BadRequest):
        resolve(TOKENIZE, b"{}", Snapshot(models={"m": BASE}, is_complete=True))


def test_unknown_model() -> None:
    """404 once the fleet is known; while it is not, the model may still turn up: 503."""
    with pytest.raises(UnknownModel) as raised:
        resolve(CHAT, b'{"model":"%b"}' % (b"x" * 500), SNAPSHOT)
    assert len(raised.value.message) < 300
    with pytest.raises(NoReplica):
        resolve(CHAT, b'{"model":"x"}', Snapshot(models={"m": BASE}))


def test_not_offered() -> None:
    """The model is there, the route is ours, but its engine has none such."""
    with pytest.raises(NotOffered, match="does not offer /v1/embeddings"):
        resolve(RELAYED["/v1/embeddings"], b'{"model":"m"}', SNAPSHOT)
