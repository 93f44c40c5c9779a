"""One request as its client sent it, and the few fields of its body that routing needs.

Owns reading, never judging: `client.py` fills a `Request`, `exchange.py` acts on it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from serving.errors import BadRequest

if TYPE_CHECKING:
    from serving.errors import ServingError
    from serving.gateway.endpoints import Endpoint, ErrorShape
    from serving.gateway.streamed_body import StreamedBody

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_MAX_BOUND = 1 << 31
LOCAL_PRINCIPAL = "local"
"""Who a request comes from where no keys are set."""
_FIELD_OF_PATH = re.compile(r"`\$\.([^`]+)`")


class StreamOptions(msgspec.Struct):
    """The part of `stream_options` that decides whether the client sees a usage chunk."""

    include_usage: bool | None = None


class BodyFields(msgspec.Struct):
    """What the gateway reads of a JSON body; all other fields pass unread.

    `max_tokens`, `max_completion_tokens` (chat) and `max_output_tokens` (responses) bound the
    completion; `n` multiplies it. `previous_response_id` names a response, and by it the replica
    that keeps it.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | float | None = None
    max_completion_tokens: int | float | None = None
    max_output_tokens: int | float | None = None
    n: int | float | None = None
    previous_response_id: str | None = None

    @property
    def max_generated_tokens(self) -> int | None:
        """The request's own bound on its completion, under whichever name."""
        for bound in (self.max_completion_tokens, self.max_tokens, self.max_output_tokens):
            if bound is not None:
                return int(min(bound, _MAX_BOUND))
        return None

    @property
    def num_choices(self) -> int:
        """Completions of the one prompt."""
        return 1 if self.n is None else int(min(self.n, _MAX_BOUND))


_decode_fields = msgspec.json.Decoder(BodyFields).decode


def read_body_fields(body: bytes) -> BodyFields:
    """Decodes what routing needs of a JSON body.

    Args:
        body: The complete request body.

    Raises:
        BadRequest: If it is not a JSON object, or one of the fields has the wrong type.
    """
    try:
        return _decode_fields(body)
    except msgspec.ValidationError as error:
        text = str(error)
        field = _FIELD_OF_PATH.search(text)
        if field is None:
            raise BadRequest(f"The request body must be a JSON object: {text}.") from None
        name = field.group(1)
        raise BadRequest(
            f"Invalid value for '{name}': {text.split(' - ')[0]}.", param=name
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        detail = "" if body else " (it is empty)"
        raise BadRequest(f"The request body is not valid JSON{detail}: {error}.") from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply.") from None


class Request:
    """Head and body of one request.

    Attributes:
        method: For example `b"POST"`.
        target: Request target as sent, path and query.
        path: Path without the query.
        headers: Lower-case name → value; of repeated names the first.
        body_parts: The body as it came in.
        body_bytes: Sum of their lengths.
        keep_alive: Whether the connection may serve another request after this one.
        is_http10: HTTP/1.0 clients get no chunked bodies.
        endpoint: The relayed route, or None for a local one.
        inference_id: Ours, unique, in the response's `id`.
        request_id: The client's `x-request-id`, or the inference id.
        received_at: `time.monotonic()` of the complete request.
        refusal: Why the gateway answers it with an error, whatever the body says.
        extra_head: Header lines, each with its end, that every response to it carries.
        streamed: Its body, where that is relayed while it comes; `body_parts` stays empty.
        principal: Name of the key it came with, for the control plane.
    """

    __slots__ = (
        "body_bytes",
        "body_parts",
        "endpoint",
        "extra_head",
        "headers",
        "inference_id",
        "is_http10",
        "keep_alive",
        "method",
        "path",
        "principal",
        "received_at",
        "refusal",
        "streamed",
        "target",
    )

    def __init__(self) -> None:
        self.method = b""
        self.target = b""
        self.path = ""
        self.headers: dict[bytes, bytes] = {}
        self.body_parts: list[bytes] = []
        self.body_bytes = 0
        self.keep_alive = True
        self.is_http10 = False
        self.endpoint: Endpoint | None = None
        self.inference_id = b""
        self.received_at = 0.0
        self.refusal: ServingError | None = None
        self.extra_head = b""
        self.streamed: StreamedBody | None = None
        self.principal = LOCAL_PRINCIPAL

    @property
    def request_id(self) -> bytes:
        """The client's `x-request-id` where it is printable and short, else the inference id."""
        sent = self.headers.get(b"x-request-id")
        if sent is not None and _REQUEST_ID.fullmatch(sent):
            return sent
        return self.inference_id

    @property
    def error_shape(self) -> ErrorShape:
        """Whose error body this client expects."""
        return "openai" if self.endpoint is None else self.endpoint.error_shape

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for a 100 before it sends its body."""
        expected = self.headers.get(b"expect", b"")
        return expected.lower() == b"100-continue" and not self.is_http10

    @property
    def is_head(self) -> bool:
        """Whether the answer must have no body."""
        return self.method == b"HEAD"

    @property
    def model_id(self) -> str:
        """The `{id}` of `/v1/models/{id}`, percent-decoded."""
        return unquote(self.path.removeprefix("/v1/models/"))

    def body(self) -> bytes:
        """The whole body; joins the parts once."""
        parts = self.body_parts
        if len(parts) == 1:
            return parts[0]
        joined = b"".join(parts)
        self.body_parts = [joined]
        return joined
