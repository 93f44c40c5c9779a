"""Answers that the gateway itself writes: heads, JSON bodies and errors, as bytes.

Knows HTTP/1.1 and the two error shapes; never decides which answer is due.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec

from serving.errors import MethodNotAllowed

if TYPE_CHECKING:
    from serving.errors import ServingError
    from serving.gateway.endpoints import ErrorShape
    from serving.gateway.request import Request

STATUS_LINES: dict[int, bytes] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = b"application/json"

# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def status_line(status: int) -> bytes:
    """`HTTP/1.1 200 OK`, with the line's end."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status


def head(request: Request, status: int, content_type: bytes, framing: bytes, date: bytes) -> bytes:
    """Head of a response to `request`, empty line included.

    Args:
        request: Whose ids the head carries; its `keep_alive` decides about `connection`.
        status: HTTP status.
        content_type: Value of that header.
        framing: Header lines that frame the body, each with its end; empty for close-delimited.
        date: The `date` line, with its end.
    """
    inference_id = request.inference_id
    connection = connection_line(request)
    if request.error_shape == "anthropic":
        # The name that Anthropic's clients look for.
        connection += b"request-id: %b\r\n" % request.request_id
    return (
        b"%bcontent-type: %b\r\n%b%bx-request-id: %b\r\nx-headrace-inference-id: %b\r\n%b%b\r\n"
        % (
            STATUS_LINES.get(status) or status_line(status),
            content_type,
            framing,
            date,
            request.request_id,
            inference_id,
            connection,
            request.extra_head,
        )
    )


def connection_line(request: Request) -> bytes:
    """The header line that says whether the connection goes on; empty where that goes without saying."""
    if request.keep_alive:
        return b"connection: keep-alive\r\n" if request.is_http10 else b""
    return b"connection: close\r\n"


def no_content(request: Request, lines: bytes, date: bytes) -> bytes:
    """A 204 with these header lines, each with its end."""
    return b"%b%b%b%b%bx-request-id: %b\r\n\r\n" % (
        status_line(204),
        lines,
        request.extra_head,
        connection_line(request),
        date,
        request.request_id,
    )


def answer(
    request: Request,
    status: int,
    body: bytes,
    date: bytes,
    content_type: bytes = JSON,
    extra: bytes = b"",
) -> bytes:
    """A whole response; a HEAD request gets the head alone, with the length of the body."""
    framing = b"content-length: %d\r\n%b" % (len(body), extra)
    first = head(request, status, content_type, framing, date)
    return first if request.is_head else first + body


def error_answer(request: Request, error: ServingError, date: bytes) -> bytes:
    """The response for an error, in the shape that the route's clients know."""
    extra = b""
    if error.retry_after_s is not None:
        extra = b"retry-after: %d\r\n" % error.retry_after_s
    if isinstance(error, MethodNotAllowed):
        extra += b"allow: %b\r\n" % error.allow.encode()
    body = error_body(error, request.error_shape, request.request_id.decode())
    return answer(request, error.status, body, date, extra=extra)


def error_body(error: ServingError, shape: ErrorShape, request_id: str) -> bytes:
    """The JSON of an error.

    Source: OpenAI API reference, "Error codes"; Anthropic API reference, "Errors".
    """
    if shape == "anthropic":
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        nested = {"type": kind, "message": error.message}
        return msgspec.json.encode({"type": "error", "error": nested, "request_id": request_id})
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def error_event(error: ServingError, shape: ErrorShape, request_id: str) -> bytes:
    """The one server-sent event that ends a stream which broke after its first byte."""
    body = error_body(error, shape, request_id)
    if shape == "anthropic":
        return b"event: error\ndata: %b\n\n" % body
    return b"data: %b\n\n" % body
