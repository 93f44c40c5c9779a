"""A request in its engine's terms: head and body as bytes. Called by `exchange.py` for each attempt.

Of the client's headers only its trace context passes; API keys stay here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.engines.base import EngineAdapter, EngineCall
from serving.gateway.response_id import response_id

if TYPE_CHECKING:
    from serving.gateway.form_body import FormBody
    from serving.gateway.request import Request
    from serving.gateway.resolve import Route
    from serving.routing.snapshot import Adapter, Replica

_TRACE_HEADERS = (b"traceparent", b"tracestate")


def engine_call(request: Request, route: Route, replica: Replica) -> EngineCall:
    """What the dialect has to know of a request on its way to a replica."""
    path, model = route.endpoint.path, route.model
    return EngineCall(
        path=path,
        response_id=response_id(path, request.inference_id, replica.index),
        public_name=model.version,
        engine_name=model.engine_names.get(replica.index, model.version),
        sent_name=route.sent_name,
        add_usage=route.adds_usage,
        adapter=None if model.adapter is None else _on(replica, model.adapter),
    )


def _on(replica: Replica, adapter: Adapter) -> EngineAdapter:
    path = adapter.paths.get(replica.index, "")
    return EngineAdapter(adapter.version, adapter.lora_id, path)


def client_trace_lines(request: Request) -> bytes:
    """The client's own trace context, as header lines."""
    lines = b""
    for name in _TRACE_HEADERS:
        value = request.headers.get(name)
        if value is not None:
            lines += b"%b: %b\r\n" % (name, value)
    return lines


class EngineRequests:
    """Builds requests for the replicas of one worker; keeps the parts of heads that do not change."""

    def __init__(self, replica_api_key: str | None) -> None:
        """Keeps the key that engines started with `--api-key` want, or None."""
        self._bearer = f"authorization: Bearer {replica_api_key}\r\n" if replica_api_key else ""
        self._prefixes: dict[tuple[int, str], bytes] = {}

    def build(
        self, request: Request, route: Route, call: EngineCall, replica: Replica, trace: bytes
    ) -> bytes:
        """Head and body for one attempt.

        Args:
            request: As the client sent it.
            route: Where it goes.
            call: What the dialect has to know.
            replica: The chosen one.
            trace: Header lines of the trace context.

        Raises:
            BadRequest: If the engine cannot do what the body asks for.
        """
        if route.stored_target is None:
            prefix = self._prefix(replica, route.endpoint.path)
            body = replica.dialect.engine_body(request.body(), call)
        else:
            prefix = self._head(replica, request.method.decode(), route.stored_target)
            body = b""
        return b"%b%b\r\n%bcontent-length: %d\r\n\r\n%b" % (
            prefix,
            request.inference_id,
            trace,
            len(body),
            body,
        )

    def _prefix(self, replica: Replica, path: str) -> bytes:
        prefix = self._prefixes.get((replica.index, path))
        if prefix is None:
            prefix = self._head(replica, "POST", path)
            self._prefixes[replica.index, path] = prefix
        return prefix

    def build_form(
        self, request: Request, body: FormBody, call: EngineCall, replica: Replica, trace: bytes
    ) -> bytes:
        """Head of one attempt, with what is held of a form whose rest follows.

        Args:
            request: As the client sent it.
            body: Its form.
            call: What the dialect has to know.
            replica: The chosen one.
            trace: Header lines of the trace context.
        """
        content_type = request.headers[b"content-type"]
        framing, first = body.opening(call.engine_name)
        head = self._head(replica, "POST", call.path, content_type)
        return b"%b%b\r\n%b%b\r\n%b" % (head, request.inference_id, trace, framing, first)

    def _head(
        self, replica: Replica, method: str, target: str, content_type: bytes = b"application/json"
    ) -> bytes:
        """Up to the value of the header that carries our request id."""
        host = f"[{replica.host}]" if ":" in replica.host else replica.host
        lines = f"{method} {target} HTTP/1.1\r\nhost: {host}:{replica.port}\r\n{self._bearer}"
        return b"%bcontent-type: %b\r\n%b: " % (
            lines.encode(),
            content_type,
            replica.dialect.request_id_header(),
        )

    def forget(self, replica: Replica) -> None:
        """A replica has left the fleet: its index will not name it again."""
        for key in [key for key in self._prefixes if key[0] == replica.index]:
            del self._prefixes[key]
