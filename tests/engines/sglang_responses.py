"""SGLang's Responses API and Anthropic's, which differ from its other routes in their errors.

Used by `sglang_server.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from base_server import Failure, page
from messages_wire import message_error, message_events, message_of
from responses_wire import delta_event, response_of, typed_event
from sglang_wire import Refused, streamed_error
from speech import count_tokens, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from base_server import Handler, Reply
    from batch import Generation
    from scripted_engine import Seen, Step
    from sglang_server import SglangServer


class SglangResponses:
    """Handlers of one server."""

    def __init__(self, server: SglangServer) -> None:
        self._server = server

    def routes(self) -> dict[tuple[str, str], Handler]:
        """(method, path) → handler."""
        disturbed = self._server.disturbed
        return {
            ("POST", "/v1/responses"): disturbed(self._respond),
            ("GET", "/v1/responses/{id}"): self._retrieve,
            ("POST", "/v1/responses/{id}/cancel"): self._cancel,
            ("POST", "/v1/messages"): disturbed(self._messages),
            ("POST", "/v1/messages/count_tokens"): self._count_tokens,
        }

    # The Responses API: nested errors, and the one place where the model's name is checked.

    def _respond(self, seen: Seen) -> Reply:
        try:
            body = self._server.admission.body(seen)
            name = str(body.get("model", self._server.model))
            if name.partition(":")[0] != self._server.model:
                message = f"The model '{name}' does not exist."
                raise Refused(404, "invalid_request_error", message, "model")
            generation = self._server.admission.admit(body, id_field="request_id")
            self._server.admission.make_room(generation)
            if body.get("background"):
                queued = response_of(generation, name, "queued")
                self._server.stored_responses[generation.response_id] = queued
                self._server.spawn(self._work_on(generation, name))
                yield from self._server.whole(200, queued)
                return
            with self._server.using(generation):
                yield from self._server.placed(generation)
                if generation.is_streaming:
                    yield from self._server.stream(self._response_events(generation, name))
                else:
                    yield from self._server.finished(generation)
                    yield from self._server.whole(200, response_of(generation, name))
                self._server.stored_responses[generation.response_id] = response_of(
                    generation, name
                )
        except Failure:
            yield from self._nested(500, "InternalServerError", "Internal server error")
        except Refused as refused:
            yield from self._nested(refused.status, refused.kind, refused.message, refused.param)

    def _work_on(self, generation: Generation, model: str) -> Reply:
        """A response in the background; what comes of it can be retrieved."""
        with self._server.using(generation):
            yield from self._server.placed(generation)
            yield from self._server.finished(generation)
            if not generation.is_aborted:
                self._server.stored_responses[generation.response_id] = response_of(
                    generation, model
                )

    def _cancel(self, seen: Seen) -> Reply:
        response_id = seen.target.split("/")[-2]
        found = self._server.stored_responses.get(response_id)
        if found is None:
            message = f"Response with id '{response_id}' not found."
            return self._nested(404, "invalid_request_error", message)
        if found["status"] == "completed":
            message = "Cannot cancel a completed response."
            return self._nested(400, "invalid_request_error", message)
        for generation in self._server.batch.everybody:
            if generation.response_id == response_id:
                self._server.batch.abort(generation)
        self._server.stored_responses[response_id] = {**found, "status": "cancelled"}
        return page(200, self._server.stored_responses[response_id])

    # Anthropic's API, errors in its shape.

    def _messages(self, seen: Seen) -> Reply:
        is_streaming = False
        try:
            body = self._server.admission.body(seen)
            is_streaming = bool(body.get("stream"))
            generation = self._server.admission.admit(body)
            self._server.admission.make_room(generation)
            with self._server.using(generation):
                yield from self._server.placed(generation)
                model = body.get("model", self._server.model)
                if is_streaming:
                    steps = self._server.tokens(generation)
                    yield from self._server.stream(message_events(generation, model, steps))
                else:
                    yield from self._server.finished(generation)
                    yield from self._server.whole(200, message_of(generation, model))
        except Failure as error:
            yield from page(500, message_error(500, str(error)))
        except Refused as refused:
            yield from page(refused.status, message_error(refused.status, refused.message))

    def _count_tokens(self, seen: Seen) -> Reply:
        return page(200, {"input_tokens": count_tokens(prompt_of(seen.json))})

    def _nested(self, status: int, kind: str, message: str, param: str | None = None) -> Reply:
        error = {"message": message, "type": kind, "param": param, "code": status}
        return page(status, {"error": error})

    def _response_events(self, generation: Generation, model: str) -> Iterator[Step]:
        begun = response_of(generation, model, "in_progress")
        yield typed_event("response.created", 0, response=begun)
        try:
            for step in self._server.tokens(generation):
                if isinstance(step, str):
                    yield delta_event(generation, generation.num_sent, step)
                else:
                    yield step
        except Failure:
            yield streamed_error(500, "InternalServerError", "Internal server error")
            return
        done = response_of(generation, model)
        yield typed_event("response.completed", generation.num_sent + 1, response=done)

    def _retrieve(self, seen: Seen) -> Reply:
        response_id = seen.target.rpartition("/")[2].partition("?")[0]
        found = self._server.stored_responses.get(response_id)
        if found is None:
            message = f"Response with id '{response_id}' not found."
            return self._nested(404, "invalid_request_error", message)
        return page(200, found)
