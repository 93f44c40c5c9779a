"""A multipart form as it comes in: its files, one after the other, and its fields.

Owns the bounds on its fields; those on headers are the parser's. Never holds more than a block of a file. Read by `uploads.py`, in
the thread of the intake.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.errors import UploadRefused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 65_536
MAX_FIELDS = 64
MAX_BOUNDARY_CHARS = 256
_Event = tuple[Literal["header", "begin", "content", "end"], bytes]


def boundary_of(content_type: str) -> bytes:
    """Return the boundary that a form's content type names.

    Raises:
        UploadRefused: If it names none.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= MAX_BOUNDARY_CHARS:
        raise UploadRefused("The form's content type names no boundary.")
    return boundary


class FormParts:
    """One form.

    Attributes:
        fields: Parts without a file name; complete once all files have been read.
    """

    def __init__(self, blocks: Iterable[bytes], boundary: bytes) -> None:
        """Read nothing yet.

        Args:
            blocks: The body as it comes.
            boundary: Of the form.
        """
        self.fields: dict[str, str] = {}
        self._blocks = iter(blocks)
        self._events: deque[_Event] = deque()
        self._name, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._is_complete = False
        self._parser = MultipartParser(boundary, self._callbacks())

    def files(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield each file's name as it was sent, and its content.

        Raises:
            UploadRefused: If the form is broken, or breaks a bound.
        """
        while (event := self._next()) is not None:
            if event[0] != "begin":
                continue
            _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
            name = _text(options.get(b"name", b""))
            if b"filename" in options:
                content = self._content()
                yield _text(options[b"filename"]), content
                for _ in content:
                    pass
            else:
                self._take_field(name)
        if not self._is_complete:
            raise UploadRefused("The form is cut off: send it again.")

    def _take_field(self, name: str) -> None:
        value = b""
        for block in self._content():
            value += block
            if len(value) > MAX_FIELD_BYTES:
                raise UploadRefused(f"The field '{name[:80]}' of the form is too long.", 413)
        if name in self.fields or len(self.fields) >= MAX_FIELDS:
            raise UploadRefused(f"The field '{name[:80]}' comes twice, or there are too many.")
        self.fields[name] = _text(value)

    def _content(self) -> Iterator[bytes]:
        while (event := self._next()) is not None and event[0] != "end":
            yield event[1]

    def _next(self) -> _Event | None:
        while not self._events:
            block = next(self._blocks, None)
            if block is None:
                return None
            try:
                self._parser.write(block)
            except FormParserError as error:
                raise UploadRefused("The form is broken: send it again.") from error
        event = self._events.popleft()
        if event[0] == "header":
            self._take_header(event[1])
            return self._next()
        return event

    def _take_header(self, line: bytes) -> None:
        name, _, value = line.partition(b"\0")
        if not name:
            self._headers = {}
        self._headers[name.lower()] = value

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": lambda: self._events.append(("begin", b"")),
            "on_part_data": self._on_part_data,
            "on_part_end": lambda: self._events.append(("end", b"")),
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._events.append(("header", b"\0"))

    def _on_header_field(self, block: bytes, start: int, end: int) -> None:
        self._name += block[start:end]

    def _on_header_value(self, block: bytes, start: int, end: int) -> None:
        self._value += block[start:end]

    def _on_header_end(self) -> None:
        self._events.append(("header", self._name + b"\0" + self._value))
        self._name = self._value = b""

    def _on_part_data(self, block: bytes, start: int, end: int) -> None:
        self._events.append(("content", bytes(block[start:end])))

    def _on_end(self) -> None:
        self._is_complete = True


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UploadRefused("A name or a field of the form is not UTF-8.") from None
