"""The allow-list: an engine's own routes are never reachable through the gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from raw_client import get
from scripted_engine import GENERATE_PATHS

from serving.gateway.endpoints import RELAYED

if TYPE_CHECKING:
    from running_gateway import Gateway
    from scripted_engine import ScriptedEngine

PRIVATE = [
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/is_sleeping",
    "/load",
    "/version",
    "/ping",
    "/invocations",
    "/server_info",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/update_weights",
    "/adapters",
    "/load_lora_adapter",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/chat/completions/render",
    "/inference/v1/abort_requests",
]
TRICKS = [
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/v1/../sleep",
    "/v1/chat/completions/../../../sleep",
    "/v1/%2e%2e/sleep",
    "/%2e%2e/sleep",
    "/v1%2fchat%2fcompletions",
    "/v1/chat%2Fcompletions",
    "/v1/chat/completions/",
    "/v1/chat/completions;x=1",
    "/V1/chat/completions",
    "/v1\\chat\\completions",
    "http://engine/sleep",
    "http://engine//v1/chat/completions",
]


@pytest.mark.parametrize("path", PRIVATE + TRICKS)
async def test_path_is_not_relayed(gateway: Gateway, scripted: ScriptedEngine, path: str) -> None:
    """Whatever the method, the answer is a 404 of ours and the engine sees nothing."""
    answer = await gateway.post({"model": "m"}, path)
    assert (answer.status, answer.code) == (404, "unknown_url")
    answer = await gateway.ask(get(path))
    assert answer.status == 404
    assert scripted.requests == []
    assert {seen.target for seen in scripted.probes} <= {"/health", "/v1/models", "/openapi.json"}


@pytest.mark.parametrize("target", ["/v1/models/../../sleep", "/v1/models/%2e%2e/%2e%2e/metrics"])
async def test_model_route_asks_no_engine(
    gateway: Gateway, scripted: ScriptedEngine, target: str
) -> None:
    """A model's name is looked up here."""
    answer = await gateway.ask(get(target))
    assert (answer.status, answer.code) == (404, "model_not_found")
    assert scripted.requests == []


async def test_metrics_are_ours(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """/metrics and /healthz are the gateway's own, not the engine's."""
    text = (await gateway.ask(get("/metrics"))).body
    assert b"headrace_requests_in_flight" in text
    assert b"vllm:" not in text
    assert "/metrics" not in {seen.target for seen in scripted.probes}


@pytest.mark.parametrize("path", sorted(path for path in RELAYED if RELAYED[path].kind == "json"))
async def test_relayed_path(gateway: Gateway, scripted: ScriptedEngine, path: str) -> None:
    """A listed path is relayed as it is, without the query, where the engine offers it."""
    answer = await gateway.post({"model": "m"}, f"{path}?x=%2e%2e/sleep")
    if path in GENERATE_PATHS:
        assert (answer.status, scripted.requests[0].target) == (200, path)
    else:
        assert (answer.status, answer.code) == (404, "endpoint_not_offered")
        assert scripted.requests == []


async def test_model_is_optional_for_tokenize(gateway: Gateway, scripted: ScriptedEngine) -> None:
    """With one base model there is no doubt whose tokenizer is meant."""
    assert (await gateway.post({"prompt": "a"}, "/tokenize")).status == 200
    assert scripted.requests[0].json == {"prompt": "a", "model": "m"}
