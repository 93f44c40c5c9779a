"""Finding `model` in a form: strictly, and however the bytes were split."""

from __future__ import annotations

import pytest

from serving.errors import BadRequest
from serving.gateway.form_scanner import FormScanner, boundary_of

DISPOSITION = 'Content-Disposition: form-data; name="model"'


def part(value: bytes, *lines: str) -> bytes:
    """One part with its boundary before it."""
    return b"--b\r\n" + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n%b\r\n" % value


FILE = part(b"RIFF\r\n--\r\n-b\r\n--c", 'Content-Disposition: form-data; name="file"; filename="a"')
MODEL = part(b"m", DISPOSITION)
END = b"--b--\r\n"


def scan(body: bytes, size: int | None = None) -> FormScanner:
    """Scans a body in pieces of `size` bytes."""
    scanner = FormScanner(b"b")
    for at in range(0, len(body), size or len(body)):
        scanner.feed(body[at : at + (size or len(body))])
    return scanner


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("body", [MODEL + FILE + END, FILE + MODEL + END, MODEL + END.strip()])
def test_model_is_found(body: bytes, size: int | None) -> None:
    """Whatever stands before it, and however it comes in."""
    scanner = scan(body, size)
    scanner.end()
    start, end = scanner.model_span
    assert (scanner.model, body[start:end]) == ("m", b"m")


@pytest.mark.parametrize(
    ("lines", "value", "model"),
    [
        (('content-disposition:form-data;name="model"',), b"a b", "a b"),
        (("Content-Disposition: Form-Data ; NAME=model",), b"", ""),
        ((DISPOSITION, "Content-Type: text/plain; charset=utf-8"), "ä".encode(), "ä"),
        ((DISPOSITION, "Content-Transfer-Encoding: 8bit"), b"x\r\n--", "x\r\n--"),
        (('Content-Disposition: form-data; name="Model"',), b"x", None),
        (('Content-Disposition: form-data; name="model[]"',), b"x", None),
        (('Content-Disposition: form-data; name="x"; filename="name=model"',), b"x", None),
    ],
)
def test_spellings(lines: tuple[str, ...], value: bytes, model: str | None) -> None:
    """What an engine's parser takes for the field is the field, and nothing else."""
    assert scan(part(value, *lines) + END).model == model


def test_model_is_known_before_the_file_has_come() -> None:
    """Its value is known with the boundary after it; nothing of the file is waited for."""
    scanner = FormScanner(b"b")
    scanner.feed(MODEL[:-1])
    assert scanner.model is None
    scanner.feed(b"\n--b")
    assert scanner.model == "m"


@pytest.mark.parametrize(
    "body",
    [
        b"x" + MODEL + END,
        b"\r\n" + MODEL + END,
        b"--c\r\n",
        b"--b \r\n" + MODEL,
        b"--bb\r\n",
        b"--b\n" + MODEL[5:],
        MODEL + MODEL + END,
        MODEL + END + b"x",
        MODEL + END + b"\r\n",
        part(b"m", DISPOSITION + '; filename="x"'),
        part(b"m", DISPOSITION + "; filename*=utf-8''x"),
        part(b"m", DISPOSITION + '; name="x"'),
        part(b"m", DISPOSITION, DISPOSITION.replace("model", "x")),
        part(b"m", "Content-Disposition: form-data; name*=utf-8''model"),
        part(b"m", "Content-Disposition: form-data; name*0=mo; name*1=del"),
        part(b"m", 'Content-Disposition: form-data; name="mo\\del"'),
        part(b"m", 'Content-Disposition: form-data; filename="\\\\"; name="; name=model; x="'),
        part(b"m", 'Content-Disposition: attachment; name="model"'),
        part(b"m", 'Content-Disposition: form-data; filename="x"'),
        part(b"m", DISPOSITION + ";"),
        part(b"m", "Content-Disposition: form-data;", ' name="model"'),
        part(b"m", 'Content-Disposition : form-data; name="model"'),
        part(b"bQ==", DISPOSITION, "Content-Transfer-Encoding: base64"),
        part(b"m", 'Content-Disposition: form-data; name="model"\n'),
        part(b"m") + MODEL,
        part(b"\xff", DISPOSITION) + END,
        part(b"m" * 2000, DISPOSITION),
        part(b"m", f"x: {'y' * 9000}"),
        part(b"", 'Content-Disposition: form-data; name="x"') * 1001,
    ],
)
@pytest.mark.parametrize("size", [None, 1])
def test_doubtful_form_is_refused(body: bytes, size: int | None) -> None:
    """What two parsers could read in two ways is a 400."""
    with pytest.raises(BadRequest):
        scan(body, size)


@pytest.mark.parametrize("body", [b"--b", MODEL, MODEL + b"--b", MODEL + b"--b-"])
def test_form_that_is_cut_off(body: bytes) -> None:
    """Without its last boundary a form is not whole."""
    scanner = scan(body)
    with pytest.raises(BadRequest, match="cut off"):
        scanner.end()


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'Multipart/Form-Data;BOUNDARY="a b:c"', b"a b:c"),
        (b"multipart/form-data; charset=UTF-8; boundary=----x", b"----x"),
    ],
)
def test_boundary(content_type: bytes, boundary: bytes) -> None:
    """Quoted or not, among other parameters or alone."""
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"application/json",
        b"application/x-www-form-urlencoded",
        b"multipart/mixed; boundary=x",
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary=""',
        b'multipart/form-data; boundary="x "',
        b"multipart/form-data; boundary=x; boundary=y",
        b"multipart/form-data; boundary=x;",
        b'multipart/form-data; boundary="a\\"b"',
        b"multipart/form-data; boundary=" + b"x" * 71,
        b"multipart/form-data; boundary=x; charset=utf-7",
        b"multipart/form-data; boundary=x; boundary*=utf-8''y",
    ],
)
def test_content_type_is_refused(content_type: bytes) -> None:
    """A form whose boundary, or whose fields' names, could be read in two ways."""
    with pytest.raises(BadRequest):
        boundary_of(content_type)
