"""A form for an engine, relayed while it comes: which model it names, and that name as the engine has it.

Owns the prefix in which the `model` field is looked for. A client may send the file before the
field: the form is held up to `limits.max_form_head_bytes` for it, and beyond that goes to the only
base model there is, if there is one. Fed by `request_reader.py`, sent by `form_exchange.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.errors import BadRequest
from serving.gateway.form_scanner import FormScanner, boundary_of
from serving.gateway.resolve import Route, find_model
from serving.gateway.streamed_body import StreamedBody
from serving.routing.cost import DEFAULT_COMPLETION_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.config import Limits
    from serving.gateway.endpoints import Endpoint
    from serving.gateway.request import Request
    from serving.routing.snapshot import Model, Snapshot

_BYTES_PER_AUDIO_TOKEN = 640
"""16-bit samples at 16 kHz, and Whisper's 50 encoder positions a second (Radford et al., 2022);
compressed audio is cheaper by the same factor at every replica."""


class FormBody(StreamedBody):
    """One form.

    Attributes:
        model: Value of its `model` field, once that has come.
    """

    __slots__ = ("_assumed", "_max_head_bytes", "_scanner")

    def __init__(
        self, request: Request, limits: Limits, hold_client: Callable[[bool], None]
    ) -> None:
        """Begins before the first byte.

        Raises:
            BadRequest: If its content type names no form.
        """
        length = request.headers.get(b"content-length", b"0")
        is_chunked = b"transfer-encoding" in request.headers
        super().__init__(
            hold_client,
            None if is_chunked else int(length),
            limits.max_upload_bytes,
            limits.max_form_head_bytes,
        )
        self._scanner = FormScanner(boundary_of(request.headers.get(b"content-type", b"")))
        self._max_head_bytes = limits.max_form_head_bytes
        self._assumed: str | None = None

    @property
    def model(self) -> str | None:
        """Value of the `model` field, once it has come."""
        return self._scanner.model

    @property
    def is_decided(self) -> bool:
        """Whether the model is known, or is not waited for any longer."""
        return (
            self.model is not None or self.is_complete or self.num_held_bytes > self._max_head_bytes
        )

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes from the client.

        Raises:
            BadRequest: If the form is malformed, or names another model than the one it went to.
        """
        self._scanner.feed(piece)
        if self._assumed is not None and self.model not in (None, self._assumed):
            raise _comes_too_late()
        super().feed(piece)

    def end(self) -> None:
        """All of it has come.

        Raises:
            BadRequest: If it is cut off or has no model.
        """
        self._scanner.end()
        if self.model is None:
            raise BadRequest("You must provide a 'model' parameter.", param="model")
        super().end()

    def assume(self, model: Model) -> None:
        """It goes to this model; a field that comes later has to name it, since it is not rewritten."""
        self._assumed = model.version

    def opening(self, engine_name: str) -> tuple[bytes, bytes]:
        """What is held, as an engine shall get it.

        Args:
            engine_name: What the engine calls the model.

        Returns:
            The header line that frames the body, and its beginning.
        """
        first = self.held()
        if self.model is not None:
            start, end = self._scanner.model_span
            first = first[:start] + engine_name.encode() + first[end:]
        if self.length_bytes is None:
            return b"transfer-encoding: chunked\r\n", self.framed(first)
        length = self.length_bytes + len(first) - self.num_held_bytes
        return b"content-length: %d\r\n" % length, first


def resolve_form(endpoint: Endpoint, form: FormBody, snapshot: Snapshot) -> Route:
    """Finds the model of a form.

    Args:
        endpoint: The route that it came in on.
        form: What has come of it.
        snapshot: The fleet at this moment.

    Raises:
        BadRequest: If it names no model where one cannot be assumed.
        UnknownModel: If no replica serves the model.
        NotOffered: If its engine does not offer the endpoint.
        NoReplica: If the model may be served by a replica that has not been reached yet.
    """
    if form.model is not None:
        model = find_model(endpoint, form.model, snapshot)
    else:
        model = _only_base(endpoint, snapshot)
        form.assume(model)
    num_bytes = form.num_held_bytes if form.length_bytes is None else form.length_bytes
    cost_tokens = 1 + num_bytes // _BYTES_PER_AUDIO_TOKEN + DEFAULT_COMPLETION_TOKENS
    return Route(endpoint, model, form.model, cost_tokens, adds_usage=False)


def _only_base(endpoint: Endpoint, snapshot: Snapshot) -> Model:
    bases = [
        model
        for model in snapshot.models.values()
        if model.parent is None and model.name == model.version and endpoint.path in model.offered
    ]
    if len(bases) != 1:
        raise _comes_too_late()
    return bases[0]


def _comes_too_late() -> BadRequest:
    return BadRequest(
        "The file is too large to look for 'model' behind it: put the field 'model' before the file.",
        param="model",
    )
