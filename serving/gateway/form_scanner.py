"""Finds the `model` field of a multipart form while the form goes by (RFC 7578, RFC 2046 section 5.1).

Strict on purpose: an engine's parser must not find another model than we do, so that whatever could
be read in two ways is refused. Holds no more than a part's head, or the field's value. Used by
`form_body.py`.
"""

from __future__ import annotations

import re
from enum import Enum

from serving.errors import BadRequest

MODEL = "model"
_MAX_PART_HEAD_BYTES = 8 * 1024
_MAX_MODEL_BYTES = 1024
_MAX_PARTS = 1000
"""As Starlette's, which the engines use."""

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - a token of the grammar
_QUOTED = r'"[^"\\\x00-\x1f\x7f]*"'
"""Without escapes, which parsers undo in different ways; clients write `%22` (WHATWG HTML, 4.10.21.8)."""
_PARAMETER = re.compile(rf"[ \t]*;[ \t]*({_TOKEN}\*?)=({_TOKEN}|{_QUOTED})[ \t]*")
_HEADER = re.compile(rf"({_TOKEN}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_CHARSET = "utf-8"
_IDENTITY_ENCODINGS = ("7bit", "8bit", "binary")
_KNOWN_PARAMETERS = frozenset({"name", "filename", "filename*"})


class _At(Enum):
    """What comes next."""

    START = 0
    HEAD = 1
    VALUE = 2
    AFTER_BOUNDARY = 3
    END = 4


def boundary_of(content_type: bytes) -> bytes:
    """The boundary that a form's content type names.

    Raises:
        BadRequest: If it is no multipart form, or has no usable boundary.
    """
    text = content_type.decode("latin-1")
    kind, separator, rest = text.partition(";")
    if kind.strip().lower() != "multipart/form-data":
        raise BadRequest("This route takes a form: send multipart/form-data.")
    parameters = _parameters(separator + rest)
    if parameters is None or not parameters.keys() <= {"boundary", "charset"}:
        raise BadRequest("The content type of the form is malformed.")
    if parameters.get("charset", _CHARSET).lower() != _CHARSET:
        # An engine would read the names of fields by it.
        raise BadRequest("The only charset of a form is UTF-8.")
    boundary = parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise BadRequest("The content type of the form has no usable boundary.")
    return boundary.encode()


def _parameters(text: str) -> dict[str, str] | None:
    """`; name=value…` by lower-case name, or None if it is malformed or has a name twice."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        match = _PARAMETER.match(text, at)
        if match is None or match[1].lower() in found:
            return None
        value = match[2]
        if value.startswith('"'):
            value = value[1:-1]
        found[match[1].lower()] = value
        at = match.end()
    return found


class FormScanner:
    """Scans one form.

    Attributes:
        model: Value of the field, once it has come.
        model_span: Where in the body that value stands.
        is_complete: Whether the last boundary has come.
    """

    __slots__ = (
        "_at",
        "_base",
        "_buffer",
        "_delimiter",
        "_in_model",
        "_num_parts",
        "_value_at",
        "is_complete",
        "model",
        "model_span",
    )

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._buffer = b""
        self._base = 0
        self._at = _At.START
        self._in_model = False
        self._num_parts = 0
        self._value_at = 0
        self.model: str | None = None
        self.model_span = (0, 0)
        self.is_complete = False

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes of the body.

        Raises:
            BadRequest: If the form is malformed.
        """
        self._buffer = self._buffer + piece if self._buffer else piece
        steps = {
            _At.START: self._start,
            _At.HEAD: self._head,
            _At.VALUE: self._value,
            _At.AFTER_BOUNDARY: self._after_boundary,
            _At.END: self._end,
        }
        while steps[self._at]():
            pass

    def end(self) -> None:
        """The body has ended.

        Raises:
            BadRequest: If the form has not.
        """
        if not self.is_complete:
            raise BadRequest("The form is cut off: its last boundary is missing.")

    # Each step takes what it can from the buffer, and says whether there may be more.

    def _start(self) -> bool:
        wanted = self._delimiter[2:]
        if not wanted.startswith(self._buffer[: len(wanted)]):
            raise BadRequest("The form does not begin with the boundary of its content type.")
        if len(self._buffer) < len(wanted):
            return False
        self._take(len(wanted))
        self._at = _At.AFTER_BOUNDARY
        return True

    def _after_boundary(self) -> bool:
        if len(self._buffer) < 2:
            return False
        mark = self._buffer[:2]
        self._take(2)
        if mark == b"--":
            self._at = _At.END
            self.is_complete = True
            return True
        self._num_parts += 1
        if mark != b"\r\n":
            raise BadRequest(
                "A boundary of the form is followed by something else than a line end."
            )
        if self._num_parts > _MAX_PARTS:
            raise BadRequest(f"The form has more than {_MAX_PARTS} parts.")
        self._at = _At.HEAD
        return True

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, _MAX_PART_HEAD_BYTES)
        if end < 0:
            if len(self._buffer) >= _MAX_PART_HEAD_BYTES:
                raise BadRequest("The head of a part of the form is too large.")
            return False
        name, is_file = _disposition(self._buffer[:end])
        self._take(end + 4)
        self._in_model = name == MODEL
        if self._in_model and (is_file or self.model is not None):
            raise BadRequest("'model' must be one field of the form, no file.", param="model")
        self._value_at = self._base
        self._at = _At.VALUE
        return True

    def _value(self) -> bool:
        end = self._buffer.find(self._delimiter)
        if self._in_model:
            seen = len(self._buffer) - len(self._delimiter) if end < 0 else end
            if seen > _MAX_MODEL_BYTES:
                raise BadRequest("Invalid value for 'model': it is too long.", param="model")
        if end < 0:
            if not self._in_model:
                # What could be the beginning of a boundary stays.
                self._take(max(len(self._buffer) - len(self._delimiter) + 1, 0))
            return False
        if self._in_model:
            self._read_model(self._buffer[:end])
        self._take(end + len(self._delimiter))
        self._at = _At.AFTER_BOUNDARY
        return True

    def _read_model(self, value: bytes) -> None:
        try:
            self.model = value.decode()
        except UnicodeDecodeError:
            raise BadRequest("Invalid value for 'model': it is not UTF-8.", param="model") from None
        self.model_span = (self._value_at, self._value_at + len(value))

    def _end(self) -> bool:
        if not b"\r\n".startswith(self._buffer):
            raise BadRequest("There is something behind the last boundary of the form.")
        return False

    def _take(self, num_bytes: int) -> None:
        self._base += num_bytes
        self._buffer = self._buffer[num_bytes:]


def _disposition(head: bytes) -> tuple[str, bool]:
    """The name of a part, and whether it is a file, by its head.

    Raises:
        BadRequest: If the head is malformed or can be read in two ways.
    """
    headers: dict[str, str] = {}
    for line in head.decode("latin-1").split("\r\n"):
        match = _HEADER.fullmatch(line)
        if match is None or match[1].lower() in headers:
            raise BadRequest("The head of a part of the form is malformed.")
        headers[match[1].lower()] = match[2]
    encoding = headers.get("content-transfer-encoding", "binary").strip().lower()
    if encoding not in _IDENTITY_ENCODINGS:
        raise BadRequest("The parts of the form must not have a transfer encoding.")
    kind, separator, rest = headers.get("content-disposition", "").partition(";")
    parameters = _parameters(separator + rest)
    if (
        kind.strip().lower() != "form-data"
        or parameters is None
        or "name" not in parameters
        or not parameters.keys() <= _KNOWN_PARAMETERS
    ):
        raise BadRequest("A part of the form has no usable content-disposition with a name.")
    return parameters["name"], len(parameters) > 1
