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


def _model(name: str, version: str) -> Model:
    offered = frozenset({CHAT.path, TOKENIZE.path})
    healthy = dict.fromkeys(offered, (REPLICA,))
    return Model(name, version, {0: version}, 2048, None, healthy, offered)


BASE, ALIAS = _model("m", "m"), _model("fast", "m")
SNAPSHOT = Snapshot(models={"m": BASE, "fast": ALIAS}, default_model=BASE, is_complete=True)


@pytest.mark.parametrize(
    ("body", "model", "cost_tokens", "adds_usage"),
    [
        (b'{"model":"m"}', BASE, 1 + 3 + 256, False),
        (b'{"model":"fast"}', ALIAS, 1 + 4 + 256, False),
        (b'{"model":"m","max_tokens":10}', BASE, 1 + 7 + 10, False),
        (b'{"model":"m","max_tokens":10,"max_completion_tokens":20,"n":3}', BASE, 1 + 15 + 60, False),
        (b'{"model":"m","max_output_tokens":5}', BASE, 1 + 8 + 5, False),
        (b'{"model":"m","max_tokens":99999999999999999999}', BASE, 1 + 11 + 4096, False),
        (b'{"model":"m","stream":true}', BASE, 1 + 6 + 256, True),
        (b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}', BASE, 1 + 16 + 256, False),
    ],
)  # fmt: skip
def test_route(body: bytes, model: Model, cost_tokens: int, adds_usage: bool) -> None:
    """Model, the name that was sent, cost, and whether usage is asked for."""
    route = (CHAT, model, model.name, cost_tokens, adds_usage, None, None)
    assert resolve(CHAT, body, SNAPSHOT) == route


def test_default_model() -> None:
    """Only where `model` is optional and there is one base model."""
    assert resolve(TOKENIZE, b"{}", SNAPSHOT)[1:3] == (BASE, None)
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
