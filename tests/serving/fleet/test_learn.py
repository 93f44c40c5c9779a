"""What a replica serves, asked of the replica."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from scripted_engine import GENERATE_PATHS, Act, head, json_reply

from serving.engines import dialect_of
from serving.fleet.learn import Served, ServedModel, generates, is_healthy, learn, learn_models
from serving.routing.snapshot import Replica

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scripted_engine import ScriptedEngine, Step

TIMEOUT_S = 5.0


def _replica(engine: ScriptedEngine, host: str = "127.0.0.1") -> Replica:
    return Replica(0, "r", host, engine.port, dialect_of("vllm"))


async def _learn(engine: ScriptedEngine) -> Served | None:
    return await learn(_replica(engine), timeout_s=TIMEOUT_S, api_key=None)


async def _healthy(engine: ScriptedEngine, timeout_s: float = TIMEOUT_S) -> bool:
    return await is_healthy(_replica(engine), timeout_s=timeout_s, api_key=None)


async def test_models_and_routes(scripted: ScriptedEngine) -> None:
    """Models with parents and lengths, in the engine's order, and the routes it names."""
    scripted.models.append({"id": "lora", "parent": "m", "max_model_len": None})
    scripted.paths = ("/v1/embeddings", "/health", "/sleep")
    assert await _learn(scripted) == Served(
        (ServedModel("m", None, 2048), ServedModel("lora", "m", None)),
        frozenset({"/v1/embeddings", "/health", "/sleep"}),
    )


async def test_routes_without_a_document(scripted: ScriptedEngine) -> None:
    """An engine without OpenAPI document is taken to offer what vLLM can."""
    scripted.paths = None
    served = await _learn(scripted)
    assert served is not None
    assert served.offered == frozenset(GENERATE_PATHS)


async def test_key_is_sent(scripted: ScriptedEngine) -> None:
    """Probes carry the replica's key."""
    await is_healthy(_replica(scripted), timeout_s=TIMEOUT_S, api_key="k")
    await learn(_replica(scripted), timeout_s=TIMEOUT_S, api_key="k")
    assert [seen.headers["authorization"] for seen in scripted.probes] == ["Bearer k"] * 3


async def test_health(scripted: ScriptedEngine) -> None:
    """200 is healthy, 503 is not, nor is silence or a refused connection."""
    assert await _healthy(scripted) is True
    scripted.is_healthy = False
    assert await _healthy(scripted) is False
    scripted.is_healthy = True
    scripted.is_reading = False
    assert await _healthy(scripted, timeout_s=0.1) is False
    scripted.die()
    assert await _healthy(scripted) is False


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "nobody.invalid"])
async def test_impossible_host(scripted: ScriptedEngine, host: str) -> None:
    """A name that cannot be looked up is a replica that is down."""
    replica = _replica(scripted, host)
    assert await is_healthy(replica, timeout_s=TIMEOUT_S, api_key=None) is False
    assert await learn(replica, timeout_s=TIMEOUT_S, api_key=None) is None


@pytest.mark.parametrize(
    "script",
    [
        [Act.RESET],
        [Act.FIN],
        [b"garbage\r\n\r\n"],
        [head(101, "upgrade: x", "connection: upgrade")],
        [head(200, "content-length: 10"), b"{", Act.FIN],
        json_reply({}, status=500),
        json_reply(b""),
        json_reply(b"\xff\xfe"),
        json_reply(b'{"data":"\xff"}'),
        json_reply([]),
        json_reply({"data": None}),
        json_reply({"data": [1]}),
        json_reply({"data": [{"name": "m"}]}),
        json_reply(b"x" * (9 * 1024 * 1024)),
    ],
)
async def test_bad_answers(scripted: ScriptedEngine, script: Sequence[Step]) -> None:
    """Whatever is on that port instead of an engine, it serves nothing and breaks nothing."""
    scripted.probe_script = script
    assert await _learn(scripted) is None


async def test_probes_leave_no_connection(scripted: ScriptedEngine) -> None:
    """Each probe closes what it opened."""
    await _learn(scripted)
    await _healthy(scripted)
    await eventually(lambda: scripted.counts.open_connections == 0)
    assert scripted.counts.connections == 3


COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
BASE = ServedModel("m", None, 2048)


async def _generates(
    engine: ScriptedEngine, *models: ServedModel, offered: str = COMPLETIONS
) -> bool:
    served = Served(models or (BASE,), frozenset({offered}))
    return await generates(_replica(engine), served, timeout_s=TIMEOUT_S, api_key="k")


async def test_canary(scripted: ScriptedEngine) -> None:
    """One token of the base model, on the cheapest endpoint, with the replica's key."""
    adapter = ServedModel("lora", "m", None)
    assert await _generates(scripted, adapter, BASE) is True
    assert await _generates(scripted, offered=EMBEDDINGS) is True
    completion, embedding = scripted.requests
    assert (completion.target, completion.json) == (
        COMPLETIONS,
        {"model": "m", "prompt": "1", "max_tokens": 1},
    )
    assert (embedding.target, embedding.json) == (EMBEDDINGS, {"model": "m", "input": "1"})
    assert completion.headers["authorization"] == "Bearer k"


async def test_nothing_to_generate_with(scripted: ScriptedEngine) -> None:
    """Without a base model, or a cheap endpoint, the replica is taken at its word."""
    assert await _generates(scripted, ServedModel("lora", "m", None)) is True
    assert await _generates(scripted, offered="/v1/chat/completions") is True
    assert scripted.requests == []


@pytest.mark.parametrize(
    ("script", "does"),
    [
        (json_reply({}, status=400), True),
        (json_reply({}, status=503), True),
        (json_reply({}, status=500), False),
        (json_reply({}, status=502), False),
        ([Act.RESET], False),
        ([b"garbage\r\n\r\n"], False),
    ],
    ids=["refused", "full", "500", "502", "reset", "not HTTP"],
)
async def test_answers_to_the_canary(
    scripted: ScriptedEngine, script: Sequence[Step], does: bool
) -> None:
    """An answer is one of an engine that works, a failure is not."""
    scripted.always = script
    assert await _generates(scripted) is does


async def test_late_canary(scripted: ScriptedEngine) -> None:
    """Being late is told apart from failing: it may be the load."""
    scripted.always = [Act.HANG]
    served = Served((BASE,), frozenset({COMPLETIONS}))
    with pytest.raises(TimeoutError):
        await generates(_replica(scripted), served, timeout_s=0.05, api_key=None)


async def test_versions_are_told_from_other_adapters(scripted: ScriptedEngine) -> None:
    """What is called like a version and has a parent; asked again, the routes stay."""
    version = "support@0123456789ab"
    for name, parent in ((version, "m"), ("lora", "m"), ("m@0123456789ab", None)):
        scripted.models.append({"id": name, "parent": parent})
    served = await _learn(scripted)
    assert served is not None
    assert served.versions == {version}
    assert [model.name for model in served.own] == ["m", "lora", "m@0123456789ab"]
    scripted.models = scripted.models[:1]
    again = await learn_models(_replica(scripted), served, timeout_s=TIMEOUT_S, api_key=None)
    assert again == Served((ServedModel("m", None, 2048),), served.offered)
    assert again.versions == frozenset()
