"""A server with TensorRT-LLM's contract, its bad habits included; it generates no real text.

The contract is section 3 of the engines' reference: true of some 2026 commit of
tensorrt_llm/serve/openai_server.py. Each habit is one place, marked `Habit:`, here or in the files
`tensorrt_llm_*.py` beside this one. Used by the tests of the gateway, and as a process:
`python tests/engines/tensorrt_llm_server.py --port 9201`.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adapter_weights import contents_of, prompts_of
from base_server import DONE, EngineServer, Failure, page, serve
from batch import UNBOUNDED, Generation
from responses_wire import CREATED, delta_event, response_of, typed_event
from scripted_engine import Act, event
from speech import count_tokens, prompt_of, say
from tensorrt_llm_options import CachedLora, TensorrtLlmOptions, TensorrtLlmSwitches
from tensorrt_llm_schema import SchemaError, checked
from tensorrt_llm_stats import TOKENS_PER_BLOCK, TensorrtLlmStats
from tensorrt_llm_wire import answer, new_id, piece

if TYPE_CHECKING:
    from collections.abc import Iterator

    from base_server import Reply
    from scripted_engine import Seen, Step
    from tensorrt_llm_wire import Kind

_OPENAPI_PATHS = (
    "/health",
    "/health_generate",
    "/version",
    "/v1/models",
    "/metrics",
    "/perf_metrics",
    "/server_info",
    "/kv_cache_events",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/_internal/tokenize",
)


class TensorrtLlmServer(EngineServer):
    """TensorRT-LLM.

    Attributes:
        options: How it was started.
        state: Its switches.
        lora_cache: Habit: the cache's key is `lora_int_id` alone, so that an id with a new path is
            answered by the old weights.
        stats: Its accounts.
    """

    def __init__(
        self,
        model: str = "m",
        port: int = 0,
        options: TensorrtLlmOptions | None = None,
        **switches: Any,
    ) -> None:
        self.state = TensorrtLlmSwitches(**switches)
        super().__init__(model, port, self.state)
        self.options = options or TensorrtLlmOptions()
        self.lora_cache: dict[int, CachedLora] = {}
        self.stats = TensorrtLlmStats(self.options.event_buffer_max_size)
        self.stored_responses: dict[str, dict[str, Any]] = {}
        self.batch.max_running = self.options.max_batch_size
        self.routes = {
            ("POST", "/v1/chat/completions"): self.disturbed(
                lambda seen: self._generate(seen, "chat")
            ),
            ("POST", "/v1/completions"): self.disturbed(
                lambda seen: self._generate(seen, "completion")
            ),
            ("POST", "/v1/responses"): self.disturbed(self._respond),
            ("GET", "/v1/responses/{id}"): self._retrieve,
            ("DELETE", "/v1/responses/{id}"): self._delete,
            ("POST", "/_internal/tokenize"): self._tokenize,
            ("GET", "/health"): lambda seen: page(200 if self.state.is_healthy else 503, b""),
            ("GET", "/health_generate"): lambda seen: page(
                200 if self.state.is_healthy else 500, b""
            ),
            ("GET", "/version"): lambda seen: page(200, {"version": "1.2.0"}),
            ("GET", "/openapi.json"): lambda seen: page(
                200, {"openapi": "3.1.0", "paths": {path: {} for path in _OPENAPI_PATHS}}
            ),
            ("GET", "/v1/models"): self._models,
            ("GET", "/server_info"): lambda seen: page(
                200, {"kv_cache_hash_algo": "v1_block_key", "tokens_per_block": TOKENS_PER_BLOCK}
            ),
            # Habit: this name is not Prometheus, and reading it takes away what was read.
            ("GET", "/metrics"): lambda seen: page(200, self.stats.drain_iterations()),
            ("GET", "/perf_metrics"): lambda seen: page(200, []),
            ("POST", "/kv_cache_events"): lambda seen: page(200, self.stats.drain_events()),
            # Habit: these need another kind of server, and assert instead of saying so.
            ("POST", "/release_memory"): lambda seen: page(500, "Internal Server Error"),
            ("POST", "/resume_memory"): lambda seen: page(500, "Internal Server Error"),
            ("POST", "/update_weights"): lambda seen: page(500, "Internal Server Error"),
        }
        if self.options.return_perf_metrics:
            self.routes["GET", "/prometheus/metrics"] = lambda seen: page(
                200, self.stats.exposition(), "text/plain; version=0.0.4; charset=utf-8"
            )

    def refusal(self, seen: Seen) -> Reply | None:
        """It has no API keys."""
        return None

    def error_reply(self, status: int, message: str) -> Reply:
        """Errors are flat; what does not fit the schema has a string instead (`_schema_reply`)."""
        self.stats.fail(status)
        kind = "BadRequestError" if status == 400 else "InternalServerError"
        error = {"object": "error", "message": message, "type": kind, "param": None, "code": status}
        return page(status, error)

    def _schema_reply(self, error: SchemaError) -> Reply:
        self.stats.fail(400)
        return page(400, {"error": str(error)})

    # What a request becomes.

    def _weights(self, body: dict[str, Any]) -> tuple[CachedLora, int]:
        """The weights that answer, and their id; the base model's have no path.

        Habit: `model` is not looked at. Adapters come with the request; none is ever listed.
        """
        asked = body.get("lora_request")
        if not asked or not self.options.has_lora:
            return CachedLora(self.model, "", self.model), 0
        lora_id, path = int(asked["lora_int_id"]), str(asked.get("lora_path", ""))
        paths = self.options.lora_paths
        if paths is not None and path not in paths:
            # Checked when the request is parsed (`LoRARequest.__post_init__`).
            raise SchemaError(f"lora_path: {path} does not exist")
        if lora_id not in self.lora_cache:
            if self.state.lora_load_fails:
                raise Failure("Failed to load LoRA adapter")
            while len(self.lora_cache) >= self.options.max_cpu_loras:
                self.lora_cache.pop(next(iter(self.lora_cache)))
        cached = self.lora_cache.pop(lora_id, None)
        if cached is None:
            cached = CachedLora(str(asked["lora_name"]), path, contents_of(path))
        self.lora_cache[lora_id] = cached
        return cached, lora_id

    def _admit(self, body: dict[str, Any], response_id: str) -> tuple[Generation, int]:
        cached, lora_id = self._weights(body)
        logprobs = body.get("logprobs") if self.state.gives_logprobs else None
        prompt = prompt_of(body)
        num_prompt_tokens = count_tokens(prompt)
        room = self.options.max_seq_len - num_prompt_tokens
        if room <= 0:
            raise Failure(
                f"The sum of prompt length ({num_prompt_tokens}) should not exceed max_seq_len "
                f"({self.options.max_seq_len})"
            )
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        # Habit: what does not fit is clamped, silently.
        limit = min(limit or body.get("max_output_tokens") or room, room)
        generation = Generation(
            response_id=response_id,
            weights=cached.name,
            tokens=say(
                cached.name, cached.path or None, prompt, min(limit, self.switches.num_tokens)
            ),
            finish_reason="length" if limit <= self.switches.num_tokens else "stop",
            num_prompt_tokens=num_prompt_tokens,
            is_streaming=bool(body.get("stream")),
            num_choices=body.get("n") or 1,
            contents=cached.contents,
            prompts=prompts_of(body),
            num_logprobs=logprobs if isinstance(logprobs, int) else 0,
        )
        return generation, lora_id

    @contextmanager
    def _using(self, generation: Generation, lora_id: int, body: dict[str, Any]) -> Iterator[None]:
        with self.holding(generation):
            yield
            if generation in self.batch.running:
                self.stats.complete(generation, self.batch, lora_id, prompt_of(body))

    def _finished(self, generation: Generation) -> Iterator[Step]:
        yield generation.may_run
        for step in self.tokens(generation):
            if not isinstance(step, str):
                yield step

    # Chat and text completions.

    def _generate(self, seen: Seen, kind: Kind) -> Reply:
        try:
            body = checked(seen, kind)
            # Habit: it takes no request id from anybody.
            generation, lora_id = self._admit(body, new_id(kind))
            with self._using(generation, lora_id, body):
                if generation.is_streaming:
                    yield from self._broken_off(self._events(generation, body, kind))
                else:
                    yield from self._finished(generation)
                    yield from self.whole(200, answer(generation, body["model"], kind))
        except SchemaError as error:
            yield from self._schema_reply(error)
        except Failure as error:
            # Habit: whatever goes wrong is the client's fault, an internal error too.
            yield from self.error_reply(400, str(error))

    def _broken_off(self, events: Iterator[Step]) -> Reply:
        """Habit: a stream that fails just ends: no error, no `[DONE]`, no last chunk."""
        try:
            yield from self.stream(events)
        except Failure:
            self.stats.fail(500)
            yield Act.FIN

    def _events(self, generation: Generation, body: dict[str, Any], kind: Kind) -> Iterator[Step]:
        options = body.get("stream_options")
        # Habit: `stream_options` alone, even empty, asks for usage.
        wants_usage = options is not None and options.get("include_usage", True)
        default = self.options.continuous_usage_default
        is_continuous = wants_usage and options.get("continuous_usage_stats", default)

        def chunk_of(choices: list[dict[str, Any]], *, with_usage: bool) -> dict[str, Any]:
            return {
                # Habit: every chunk has an id of its own.
                "id": new_id(kind),
                "object": "chat.completion.chunk" if kind == "chat" else "text_completion",
                "created": CREATED,
                "model": body["model"],
                "choices": choices,
                "usage": generation.usage if with_usage else None,
            }

        yield generation.may_run
        if kind == "chat":
            for index in range(generation.num_choices):
                first = piece(kind, index, "", None, role="assistant")
                told = event(chunk_of([first], with_usage=is_continuous))
                # Habit: a space before the empty line.
                yield told.removesuffix(b"\n\n") + b" \n\n"
        for step in self.tokens(generation):
            if not isinstance(step, str):
                yield step
                continue
            is_last = generation.num_sent == len(generation.tokens)
            reason = generation.finish_reason if is_last else None
            for index in range(generation.num_choices):
                told = piece(kind, index, step, reason)
                yield event(chunk_of([told], with_usage=is_continuous))
        if wants_usage:
            yield event(chunk_of([], with_usage=True))
        yield DONE

    # The Responses API.

    def _respond(self, seen: Seen) -> Reply:
        try:
            body = checked(seen, "responses")
            before = body.get("previous_response_id")
            if before is not None and before not in self.stored_responses:
                yield from self.error_reply(404, f"Response with id '{before}' not found.")
                return
            # Here alone it takes an id, and calls the response by it (`ResponsesRequest`).
            given = body.get("request_id") or f"resp_{uuid.uuid4().hex}"
            generation, lora_id = self._admit(body, given)
            model = body["model"]
            with self._using(generation, lora_id, body):
                if generation.is_streaming:
                    yield from self._broken_off(self._response_events(generation, model))
                else:
                    yield from self._finished(generation)
                    yield from self.whole(200, response_of(generation, model))
                self.stored_responses[generation.response_id] = response_of(generation, model)
        except SchemaError as error:
            yield from self._schema_reply(error)
        except Failure as error:
            yield from self.error_reply(400, str(error))

    def _response_events(self, generation: Generation, model: str) -> Iterator[Step]:
        yield generation.may_run
        begun = response_of(generation, model, "in_progress")
        yield typed_event("response.created", 0, response=begun)
        for step in self.tokens(generation):
            if isinstance(step, str):
                yield delta_event(generation, generation.num_sent, step)
            else:
                yield step
        done = response_of(generation, model)
        yield typed_event("response.completed", generation.num_sent + 1, response=done)

    def _retrieve(self, seen: Seen) -> Reply:
        response_id = seen.target.rpartition("/")[2]
        found = self.stored_responses.get(response_id)
        if found is None:
            return self.error_reply(404, f"Response with id '{response_id}' not found.")
        return page(200, found)

    def _delete(self, seen: Seen) -> Reply:
        response_id = seen.target.rpartition("/")[2]
        if self.stored_responses.pop(response_id, None) is None:
            return self.error_reply(404, f"Response with id '{response_id}' not found.")
        return page(200, {"id": response_id, "object": "response", "deleted": True})

    # The rest.

    def _models(self, seen: Seen) -> Reply:
        card = {"id": self.model, "object": "model", "created": CREATED}
        return page(200, {"object": "list", "data": [{**card, "owned_by": "tensorrt_llm"}]})

    def _tokenize(self, seen: Seen) -> Reply:
        count = count_tokens(prompt_of(seen.json))
        return page(200, {"count": count, "tokens": list(range(count))})


def main() -> None:
    """Runs one as a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--max-batch-size", type=int, default=UNBOUNDED)
    parser.add_argument("--return-perf-metrics", action="store_true")
    parser.add_argument("--event-buffer-max-size", type=int, default=0)
    parser.add_argument("--num-tokens", type=int, default=5)
    parser.add_argument("--token-interval-s", type=float, default=0.0)
    given = parser.parse_args()
    options = TensorrtLlmOptions(
        max_batch_size=given.max_batch_size,
        return_perf_metrics=given.return_perf_metrics,
        event_buffer_max_size=given.event_buffer_max_size,
    )
    server = TensorrtLlmServer(
        given.model,
        given.port,
        options,
        num_tokens=given.num_tokens,
        token_interval_s=given.token_interval_s,
    )
    asyncio.run(serve(server))


if __name__ == "__main__":
    main()
