"""Top-level fields of a JSON body, changed without touching the values of the others."""

from __future__ import annotations

import msgspec

from serving.errors import BadRequest

Fields = dict[str, msgspec.Raw]

_decode = msgspec.json.Decoder(Fields).decode
_encode = msgspec.json.Encoder().encode
_INCLUDE_USAGE = msgspec.Raw(b'{"include_usage":true}')
_TRUE = msgspec.Raw(b"true")


def decode_fields(body: bytes) -> Fields:
    """Field name → its bytes; also checks what the gateway's own reading skips.

    Raises:
        BadRequest: If the body is not a JSON object.
    """
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}.") from None


def encode_fields(fields: Fields) -> bytes:
    """The body again."""
    return _encode(fields)


def raw(value: object) -> msgspec.Raw:
    """A value to put into a field."""
    return msgspec.Raw(_encode(value))


def ask_for_usage(fields: Fields) -> None:
    """Sets `stream_options.include_usage` and keeps whatever else the client had set there."""
    options = fields.get("stream_options")
    if options is None or bytes(options) == b"null":
        fields["stream_options"] = _INCLUDE_USAGE
        return
    set_options = decode_fields(bytes(options))
    set_options["include_usage"] = _TRUE
    fields["stream_options"] = msgspec.Raw(_encode(set_options))
