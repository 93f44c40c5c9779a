"""How each engine is asked for a published version, and how it says that it does not have it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from serving.engines import dialect_of
from serving.engines.base import EngineAdapter
from serving.errors import NotOffered

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import EngineKind
    from serving.engines.base import EngineCall

V = "support@0123456789ab"
ADAPTER = EngineAdapter(V, 41, "/adapters/support")


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("vllm", {"model": V}),
        ("sglang", {"model": f"m:{V}"}),
        (
            "tensorrt-llm",
            {
                "model": "m",
                "lora_request": {
                    "lora_name": V,
                    "lora_int_id": 41,
                    "lora_path": "/adapters/support",
                },
            },
        ),
    ],
)
def test_body(make_call: Callable[..., EngineCall], kind: EngineKind, sent: dict[str, Any]) -> None:
    """The alias becomes what selects the version there; nothing else of the body changes."""
    dialect = dialect_of(kind)
    call = make_call(name=V, engine_name=dialect.engine_name(V, "m"), sent_name="help")
    body = dialect.engine_body(
        b'{"model":"help","messages":[],"seed":1}', call._replace(adapter=ADAPTER)
    )
    decoded = json.loads(body)
    decoded.pop("rid", None)
    assert decoded == {"messages": [], "seed": 1, **sent}


def test_version_named_directly_passes_untouched(make_call: Callable[..., EngineCall]) -> None:
    """vLLM calls a version as clients do: there is nothing to rewrite, neither way."""
    vllm = dialect_of("vllm")
    call = make_call(name=V)._replace(adapter=ADAPTER)
    body = json.dumps({"model": V, "messages": []}).encode()
    assert vllm.engine_body(body, call) is body
    assert vllm.rewriter(call) is None


def test_route_without_a_field_for_adapters(make_call: Callable[..., EngineCall]) -> None:
    """TensorRT-LLM would answer from the base: refused."""
    call = make_call(path="/v1/responses", name=V)._replace(adapter=ADAPTER)
    with pytest.raises(NotOffered, match="with an adapter"):
        dialect_of("tensorrt-llm").engine_body(b'{"model":"help","input":"a"}', call)


@pytest.mark.parametrize(
    ("kind", "status", "body", "is_missing"),
    [
        ("vllm", 404, {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError"}}, True),
        ("vllm", 404, {"detail": "Not Found"}, False),
        ("vllm", 400, {"error": {"message": "bad", "type": "BadRequestError"}}, False),
        ("sglang", 400, {"message": "The following requested LoRA adapters are not loaded: x\n"}, True),
        ("sglang", 400, {"message": "LoRA adapter 'x' was requested, but LoRA is not enabled."}, True),
        ("sglang", 400, {"message": "Input length exceeds the context length"}, False),
        ("sglang", 503, {"message": "The request queue is full."}, False),
        ("tensorrt-llm", 400, {"message": "Failed to load LoRA adapter"}, True),
        ("tensorrt-llm", 400, {"error": "lora_path: /adapters/x does not exist"}, True),
        ("tensorrt-llm", 400, {"message": "max_seq_len"}, False),
    ],
)  # fmt: skip
def test_missing(kind: EngineKind, status: int, body: dict[str, Any], is_missing: bool) -> None:
    """Only what says that the adapter is not there; refusals of the request stay refusals."""
    assert dialect_of(kind).lacks_adapter(status, json.dumps(body).encode()) is is_missing


def test_which_engines_list_their_adapters() -> None:
    """TensorRT-LLM lists none: there the snapshot alone says what may be asked for."""
    listing = {kind: dialect_of(kind).lists_adapters for kind in ("vllm", "sglang", "tensorrt-llm")}
    assert listing == {"vllm": True, "sglang": True, "tensorrt-llm": False}
