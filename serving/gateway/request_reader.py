"""Bytes of a client → requests: HTTP/1.1 parsing, limits, and admission on the head.

First step of a request's way. Owns what is being read; a request that is complete, or refused, goes to
the connection (`client.py`), which answers in order; one whose body is relayed while it comes goes there
as soon as it is known where to. Never writes to the client.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, cast

import httptools

from serving.errors import MalformedHttp, ServingError
from serving.gateway.admission import admit, body_too_large, head_too_large
from serving.gateway.auth import NO_KEYS
from serving.gateway.form_body import FormBody
from serving.gateway.framing import NOT_CHUNKED, check_overhead, transfer_coding
from serving.gateway.request import Request
from serving.gateway.streamed_body import StreamedBody

if TYPE_CHECKING:
    from serving.gateway.client import ClientConnection
    from serving.gateway.worker import Worker

_MAX_DRAINED_BODY_BYTES = 64 * 1024
"""A refused request's body up to this size is read, so that its connection can go on."""
_CONTROL_HELD_BYTES = 64 * 1024
_HOP_HEADERS = frozenset({b"upgrade", b"connection", b"http2-settings"})
_VERSIONS = ("1.1", "1.0")


class RequestReader:
    """Reads the requests of one connection.

    Attributes:
        reading: The request that is being read, if any.
        is_deaf: Whether nothing more is read: what comes is dropped.
        last_data_at: `time.monotonic()` of the last bytes, or of the last answer.
    """

    __slots__ = (
        "_chunk_began_at",
        "_chunked_wire_bytes",
        "_client",
        "_head_bytes",
        "_is_handed_on",
        "_is_upgrade",
        "_parser",
        "_raw_headers",
        "_worker",
        "is_deaf",
        "last_data_at",
        "on_header",
        "reading",
    )

    def __init__(self, worker: Worker, client: ClientConnection) -> None:
        self._worker = worker
        self._client = client
        # httptools calls `on_header(name, value)`: a dict's own setter costs no Python frame.
        self._raw_headers: dict[bytes, bytes] = {}
        # The first of a name stays: a coding before `chunked` cannot hide behind it.
        self.on_header = self._raw_headers.setdefault
        self._parser = httptools.HttpRequestParser(self)
        self.reading: Request | None = None
        self._head_bytes = 0
        self._chunk_began_at = -1
        self._chunked_wire_bytes = NOT_CHUNKED
        self._is_upgrade = False
        self._is_handed_on = False
        self.is_deaf = False
        self.last_data_at = monotonic()

    def feed(self, data: bytes) -> None:
        """Parses the next bytes; requests that become complete go to the connection."""
        if self.is_deaf:
            return
        self.last_data_at = monotonic()
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[cast("int", upgrade.args[0]) :])
        except httptools.HttpParserError as error:
            self.refuse(MalformedHttp(f"The request is not valid HTTP/1.1: {error}."))
        if self._chunked_wire_bytes != NOT_CHUNKED:
            self._check_framing(len(data))
        if self._head_bytes > self._worker.config.limits.max_head_bytes and self._is_in_headers:
            self.refuse(head_too_large(self._worker.config.limits))

    # What httptools calls.

    def on_message_begin(self) -> None:
        """A request line begins; behind one that ended the connection it is none."""
        if self.is_deaf:
            self.reading = None
            return
        self.reading = request = Request()
        request.received_at = self.last_data_at
        self._is_handed_on = False
        self._raw_headers.clear()
        self._chunk_began_at = -1

    def on_url(self, target: bytes) -> None:
        """A piece of the request target."""
        if self.reading is not None:
            self.reading.target += target

    def on_chunk_header(self) -> None:
        """A chunk of a body begins, perhaps the last, which has only trailers."""
        if self.reading is not None:
            self._head_bytes = 0
            self._chunk_began_at = self.reading.body_bytes

    def on_headers_complete(self) -> None:
        """The head is complete: everything that can be refused before the body is."""
        request = self.reading
        if request is None:
            return
        parser = self._parser
        # Trailers come after this and stay in the raw headers, unread.
        request.headers = {name.lower(): value for name, value in self._raw_headers.items()}
        request.method = parser.get_method()
        request.keep_alive = parser.should_keep_alive() and not self._worker.is_draining
        # Only a head with a `connection` header, or one that ends it, can be HTTP/1.0.
        if not request.keep_alive or b"connection" in request.headers:
            version = parser.get_http_version()
            request.is_http10 = version == "1.0"
            if version not in _VERSIONS:
                request.keep_alive = False
                request.refusal = MalformedHttp(f"HTTP/{version} is not supported; use HTTP/1.1.")
        request.inference_id = self._worker.inference_ids.next()
        self._is_upgrade = parser.should_upgrade()
        self._admit(request)
        if self.reading is request:
            self._expect_body(request)
            if request.streamed is not None:
                self._hand_on(request)

    def _admit(self, request: Request) -> None:
        worker = self._worker
        keys = worker.api_keys
        if worker.cors is not None:
            worker.cors.mark(request)
            if worker.cors.is_preflight(request):
                keys = NO_KEYS
        if b"transfer-encoding" in request.headers:
            self._chunked_wire_bytes = 0
            request.headers[b"transfer-encoding"] = transfer_coding(self._raw_headers.items())
        try:
            if request.refusal is None:
                admit(request, self._head_bytes, worker.config, keys)
                if request.endpoint is not None and request.endpoint.kind != "json":
                    request.streamed = self._streamed(request)
        except MalformedHttp as error:
            # Where its body ends is anybody's guess: nothing after it may count as a request.
            request.refusal = error
            self._stop_reading(request)
        except ServingError as error:
            request.refusal = error

    def _streamed(self, request: Request) -> StreamedBody:
        """The body of a request that is relayed while it comes."""
        limits, hold = self._worker.config.limits, self._client.hold_body
        if request.endpoint is not None and request.endpoint.kind == "form":
            return FormBody(request, limits, hold)
        length = int(request.headers.get(b"content-length", b"0"))
        is_chunked = b"transfer-encoding" in request.headers
        return StreamedBody(
            hold, None if is_chunked else length, limits.max_admin_body_bytes, _CONTROL_HELD_BYTES
        )

    def _check_framing(self, received_bytes: int) -> None:
        if self.reading is None:
            return
        self._chunked_wire_bytes += received_bytes
        try:
            check_overhead(self._chunked_wire_bytes, self.reading.body_bytes)
        except MalformedHttp as error:
            self.refuse(error)

    def on_body(self, body: bytes) -> None:
        """A piece of a body; a refused request's is dropped."""
        request = self.reading
        if request is None:
            return
        request.body_bytes += len(body)
        if request.refusal is not None:
            if request.body_bytes > _MAX_DRAINED_BODY_BYTES:
                self._stop_reading(request)
        elif request.streamed is not None:
            self._stream(request, request.streamed, body)
        elif request.body_bytes > self._worker.config.limits.max_body_bytes:
            request.body_parts.clear()
            request.refusal = body_too_large(self._worker.config.limits.max_body_bytes)
        else:
            request.body_parts.append(body)

    def _stream(self, request: Request, streamed: StreamedBody, body: bytes) -> None:
        try:
            if request.body_bytes > streamed.max_bytes:
                raise body_too_large(streamed.max_bytes)
            streamed.feed(body)
        except ServingError as error:
            self._fail(request, streamed, error)
        else:
            self._hand_on(request)

    def _hand_on(self, request: Request) -> None:
        """Lets a request be relayed once it is known where to, while its body comes."""
        if self._is_handed_on or request.refusal is not None or self._is_upgrade:
            return
        if request.streamed is not None and request.streamed.is_decided:
            self._is_handed_on = True
            self._client.request_read(request)

    def _fail(self, request: Request, streamed: StreamedBody, error: ServingError) -> None:
        """Refuses a body in the middle of it, also where it is being relayed already."""
        request.refusal = error
        if self._is_handed_on:
            request.keep_alive = False
            self.reading = None
            self.is_deaf = True
        streamed.fail(error)
        streamed.close()

    def on_message_complete(self) -> None:
        """A request is complete. It is started after the parser has returned."""
        request = self.reading
        if request is None or self._is_upgrade:
            return
        if request.streamed is not None and request.refusal is None:
            try:
                request.streamed.end()
            except ServingError as error:
                self._fail(request, request.streamed, error)
        self.reading = None
        self._head_bytes = 0
        self._chunked_wire_bytes = NOT_CHUNKED
        request.received_at = self.last_data_at
        if not self._is_handed_on:
            self._client.request_read(request)
        if not request.keep_alive:
            self.is_deaf = True

    def _expect_body(self, request: Request) -> None:
        """Asks for the body, reads on, or stops there: a refused client need not send it all."""
        if request.refusal is None:
            # Where nothing is held back, whoever relays the body asks for it.
            if request.expects_continue and not (request.streamed and request.streamed.is_decided):
                self._client.owe_continue()
            return
        length = int(request.headers.get(b"content-length", b"0"))
        expects = request.headers.get(b"expect", b"").lower() == b"100-continue"
        if expects or length > _MAX_DRAINED_BODY_BYTES:
            self._stop_reading(request)

    def _stop_reading(self, request: Request) -> None:
        """Answers a refused request without its body; the connection cannot go on after that."""
        request.keep_alive = False
        self.reading = None
        self.is_deaf = True
        request.received_at = self.last_data_at
        self._client.request_read(request)

    def refuse(self, error: ServingError) -> None:
        """Answers what cannot be parsed, in its turn, and closes."""
        if self.is_deaf:
            return
        request = self.reading or Request()
        if request.streamed is not None and self._is_handed_on:
            self._fail(request, request.streamed, error)
            return
        request.inference_id = request.inference_id or self._worker.inference_ids.next()
        request.refusal = error
        self._stop_reading(request)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Goes on in HTTP/1.1, as RFC 9110 section 7.8 lets a server do with an `Upgrade`.

        The parser stops after such a head. A new one gets the head again, without the offer.
        """
        request = self.reading
        self._is_upgrade = False
        if request is None or request.method == b"CONNECT":
            self.refuse(MalformedHttp("CONNECT is not supported."))
            return
        lines = [b"%b %b HTTP/1.1\r\n" % (request.method, request.target)]
        if not request.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += [
            b"%b: %b\r\n" % item for item in request.headers.items() if item[0] not in _HOP_HEADERS
        ]
        self._parser = httptools.HttpRequestParser(self)
        self.feed(b"".join(lines) + b"\r\n" + rest)

    @property
    def is_in_head(self) -> bool:
        """Whether a request line or headers are being read."""
        return self.reading is not None and not self.reading.method

    @property
    def _is_in_headers(self) -> bool:
        """Whether a head is being read, or the trailers of a chunked body."""
        request = self.reading
        return self.is_in_head or (
            request is not None and request.body_bytes == self._chunk_began_at
        )
