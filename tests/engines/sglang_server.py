"""A server with SGLang's contract (0.5.23), its bad habits included; it generates no real text.

The contract is section 2 of the engines' reference; sources are named under `sglang/srt/`. Each habit
is one place, marked `Habit:`, here or in the files `sglang_*.py` beside this one. Used by the tests of
the gateway, and as a process:
`python tests/engines/sglang_server.py --port 9101 --adapter support=/adapters/support`.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from base_server import DONE, EngineServer, Failure, page, serve
from scripted_engine import event
from sglang_admission import SglangAdmission
from sglang_control import SglangControl
from sglang_loads import SglangTotals
from sglang_loras import SglangLoras
from sglang_options import SglangOptions, SglangSwitches
from sglang_responses import SglangResponses
from sglang_wire import Refused, StreamWire, answer, flat_error, streamed_error
from speech import count_tokens, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from base_server import Reply
    from batch import Generation
    from scripted_engine import Seen, Step
    from sglang_wire import Kind

_OPEN_PREFIXES = ("/health", "/ready", "/metrics")


class SglangServer(EngineServer):
    """SGLang.

    Attributes:
        options: Its launch flags.
        state: Its switches.
        loras: Its adapters.
        totals: Its counters.
        admission: What becomes of a request before it generates.
        stored_responses: What `GET /v1/responses/{id}` finds.
    """

    def __init__(
        self,
        model: str = "m",
        port: int = 0,
        options: SglangOptions | None = None,
        **switches: Any,
    ) -> None:
        self.state = SglangSwitches(**switches)
        super().__init__(model, port, self.state)
        self.options = options or SglangOptions()
        self.loras = SglangLoras(
            self.options.lora_paths or {},
            is_enabled=self.options.enable_lora,
            max_per_batch=self.options.max_loras_per_batch,
            max_loaded=self.options.max_loaded_loras,
            checks_paths=self.options.checks_lora_paths,
        )
        self.totals = SglangTotals()
        self.stored_responses: dict[str, dict[str, Any]] = {}
        self.admission = SglangAdmission(model, self.options, self.state, self.loras, self.batch)
        self.batch.max_running = self.options.max_running_requests
        self.batch.order = self.admission.order
        control = SglangControl(self)
        self._admin_paths = control.admin_paths
        self.routes = {
            ("POST", "/v1/chat/completions"): self.disturbed(
                lambda seen: self._generate(seen, "chat")
            ),
            ("POST", "/v1/completions"): self.disturbed(
                lambda seen: self._generate(seen, "completion")
            ),
            ("POST", "/generate"): self.disturbed(self._native),
            ("POST", "/v1/embeddings"): self._embed,
            ("POST", "/v1/audio/transcriptions"): self.disturbed(
                lambda seen: page(200, {"text": f"{len(seen.body)} bytes"})
            ),
            **SglangResponses(self).routes(),
            **control.routes(),
        }

    # Who may ask.

    def refusal(self, seen: Seen) -> Reply | None:
        """Keys guard all but health, readiness and metrics; admin routes take only the admin key."""
        options = self.options
        if seen.target.startswith(_OPEN_PREFIXES):
            return None
        wanted = options.api_key
        if options.admin_api_key is not None and seen.target.startswith(self._admin_paths):
            wanted = options.admin_api_key
        if wanted is None or seen.headers.get("authorization") == f"Bearer {wanted}":
            return None
        return page(401, {"error": "Unauthorized"})

    def error_reply(self, status: int, message: str) -> Reply:
        """In the words of `create_error_response`."""
        kind = {400: "Bad Request", 503: "503"}.get(status, "InternalServerError")
        return page(status, flat_error(status, kind, message))

    # Running one generation.

    @contextmanager
    def using(self, generation: Generation) -> Iterator[None]:
        """Holds a generation and its adapter, and counts it when it ends."""
        lora = self.loras.loaded.get(generation.weights)
        if lora is not None:
            lora.take()
        try:
            with self.holding(generation):
                yield
        finally:
            if lora is not None:
                lora.give_back()
            totals = self.totals
            totals.num_requests += 1
            totals.num_aborted += generation.is_aborted
            totals.prompt_tokens[generation.is_streaming] += generation.num_prompt_tokens
            totals.generation_tokens += generation.usage["completion_tokens"]

    def placed(self, generation: Generation) -> Iterator[Step]:
        """Waits for a place. Before it, a stream has no head: SGLang awaits the first output."""
        yield generation.may_run
        if generation.eviction is not None:
            raise Refused(503, "503", generation.eviction)

    def finished(self, generation: Generation) -> Iterator[Step]:
        """The waits until a generation has said everything."""
        for step in self.tokens(generation):
            if not isinstance(step, str):
                yield step

    # Chat and text completions.

    def _generate(self, seen: Seen, kind: Kind) -> Reply:
        is_streaming = False
        try:
            body = self.admission.body(seen)
            is_streaming = bool(body.get("stream"))
            if body.get("stream_options") and not is_streaming:
                raise Refused(400, "Bad Request", "stream_options is only allowed with stream")
            generation = self.admission.admit(body)
            self.admission.make_room(generation)
            with self.using(generation):
                yield from self.placed(generation)
                if is_streaming:
                    yield from self.stream(self._events(generation, body, kind))
                    return
                yield from self.finished(generation)
                model = body.get("model", self.model)
                yield from self.whole(200, answer(generation, model, kind))
        except Failure:
            yield from self.error_reply(500, "Internal server error")
        except Refused as refused:
            yield from self._refuse(refused, is_streaming=is_streaming)

    def _refuse(self, refused: Refused, *, is_streaming: bool) -> Reply:
        if is_streaming and refused.status == 503:
            # Habit: a full queue is a 200 with an error in its first event (serving_chat.py).
            error = streamed_error(503, "SERVICE_UNAVAILABLE", refused.message)
            return self.stream(iter([error, DONE]))
        status = refused.status
        return page(status, flat_error(status, refused.kind, refused.message, refused.param))

    def _events(self, generation: Generation, body: dict[str, Any], kind: Kind) -> Iterator[Step]:
        options = body.get("stream_options") or {}
        by_default = self.options.stream_response_default_include_usage
        is_continuous = bool(options.get("continuous_usage_stats"))
        model = body.get("model", self.model)
        wire = StreamWire(generation, model, kind, is_continuous=is_continuous)
        if kind == "chat":
            yield from wire.pieces({"role": "assistant", "content": ""})
        try:
            for step in self.tokens(generation):
                if isinstance(step, str):
                    yield from wire.pieces({"content": step})
                else:
                    yield step
        except Failure:
            yield streamed_error(500, "InternalServerError", "Internal server error")
            yield DONE
            return
        # Habit: what was aborted gracefully looks like a success, by its status.
        yield from wire.pieces({}, "abort" if generation.is_aborted else generation.finish_reason)
        if self.state.sends_sglext_ids:
            # Habit: an event with a name of its own among the nameless ones.
            extra = wire.extra(sglext={"output_ids": [list(range(generation.num_sent))]})
            yield b"event: sglext_ids\n" + extra
        if options.get("include_usage", by_default):
            yield wire.extra(usage=generation.usage)
        yield DONE

    # SGLang's own.

    def _native(self, seen: Seen) -> Reply:
        """`POST /generate`: errors are `{"error": {"message"}}`, streams repeat the text so far."""
        try:
            body = self.admission.body(seen)
            params = body.get("sampling_params") or {}
            generation = self.admission.admit({"max_tokens": params.get("max_new_tokens"), **body})
            self.admission.make_room(generation)
            with self.using(generation):
                yield from self.placed(generation)
                if generation.is_streaming:
                    yield from self.stream(self._native_events(generation))
                else:
                    yield from self.finished(generation)
                    yield from self.whole(200, self._native_answer(generation))
        except Failure:
            yield from page(500, {"error": {"message": "Internal server error"}})
        except Refused as refused:
            yield from page(refused.status, {"error": {"message": refused.message}})

    def _native_events(self, generation: Generation) -> Iterator[Step]:
        for step in self.tokens(generation):
            yield event(self._native_answer(generation)) if isinstance(step, str) else step
        yield DONE

    def _native_answer(self, generation: Generation) -> dict[str, Any]:
        reason = "abort" if generation.is_aborted else generation.finish_reason
        usage = generation.usage
        meta = {
            "id": generation.response_id,
            "finish_reason": {"type": reason},
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "cached_tokens": 0,
        }
        return {"text": generation.text, "meta_info": meta}

    def _embed(self, seen: Seen) -> Reply:
        try:
            body = self.admission.body(seen)
        except Refused as refused:
            return self._refuse(refused, is_streaming=False)
        given = body.get("input")
        inputs = given if isinstance(given, list) else [given]
        num_tokens = sum(count_tokens(prompt_of({"input": one})) for one in inputs)
        vectors = [
            {"object": "embedding", "index": index, "embedding": [float(len(str(one))), 0.5]}
            for index, one in enumerate(inputs)
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        model = body.get("model", self.model)
        return page(200, {"object": "list", "data": vectors, "model": model, "usage": usage})


def main() -> None:
    """Runs one as a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--adapter", action="append", default=[], help="NAME=PATH; repeat it")
    parser.add_argument("--enable-metrics", action="store_true")
    parser.add_argument("--max-running-requests", type=int, default=None)
    parser.add_argument("--max-queued-requests", type=int, default=None)
    parser.add_argument("--num-tokens", type=int, default=5)
    parser.add_argument("--token-interval-s", type=float, default=0.0)
    given = parser.parse_args()
    options = SglangOptions(
        lora_paths=dict(one.split("=", 1) for one in given.adapter),
        enable_metrics=given.enable_metrics,
        max_queued_requests=given.max_queued_requests,
    )
    if given.max_running_requests is not None:
        options.max_running_requests = given.max_running_requests
    server = SglangServer(
        given.model,
        given.port,
        options,
        num_tokens=given.num_tokens,
        token_interval_s=given.token_interval_s,
    )
    asyncio.run(serve(server))


if __name__ == "__main__":
    main()
