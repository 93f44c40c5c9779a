"""The header of a safetensors file: what is read, and each way to break the format."""

from __future__ import annotations

import json

import numpy as np
import pytest
from adapter_folders import lora_tensors, make_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from adapters.errors import InvalidAdapter
from adapters.safetensors_header import DTYPE_BITS, read_header


def file_of(path, header, data=b""):
    """Write a file with a header of some text or fields."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=4, shape=(2,), dtype="F16"):
    """Return one tensor's fields."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_the_header_is_what_was_saved(tmp_path):
    """Names, types, shapes and offsets lead to the saved numbers."""
    tensors = lora_tensors(dtype=np.float16)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.size_bytes == path.stat().st_size
    raw = path.read_bytes()
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert (found.dtype, found.shape) == ("F16", tensor.shape)
        assert raw[header.data_at + found.begin : header.data_at + found.end] == tensor.tobytes()


BROKEN = {
    "empty": b"",
    "seven bytes": b"\1\0\0\0\0\0\0",
    "longer than the file": b"\xff\0\0\0\0\0\0\0{}",
    "absurd length": b"\xff" * 8 + b"{}",
}
HEADERS = {
    "no json": (b"[1", b"", "not valid JSON"),
    "no object": (b"[]", b"", "JSON object"),
    "no text": (b"\xff\xfe", b"", "not valid JSON"),
    "deep": (b'{"a":' * 100_000, b"", "not valid JSON"),
    "twice": (b'{"a":{},"a":{}}', b"", "appears twice"),
    "nan": (b'{"a":NaN}', b"", "no JSON number"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "strings"),
    "metadata a list": ({"__metadata__": []}, b"", "strings"),
    "no shape": ({"a": {"dtype": "F16", "data_offsets": [0, 4]}}, b"abcd", "needs dtype"),
    "a key more": ({"a": {**entry(), "x": 1}}, b"abcd", "no more"),
    "unknown type": ({"a": entry(dtype="F17")}, b"abcd", "unknown dtype"),
    "type a list": ({"a": entry(dtype=[])}, b"abcd", "unknown dtype"),
    "negative size": ({"a": entry(shape=(-2,))}, b"abcd", "impossible shape"),
    "size true": ({"a": entry(shape=(True, 2))}, b"abcd", "impossible shape"),
    "fraction": ({"a": entry(shape=(2.0,))}, b"abcd", "impossible shape"),
    "long name": ({"a" * 1001: entry()}, b"abcd", "exceeds 1000 characters"),
    "nine dimensions": ({"a": entry(shape=(1,) * 9)}, b"abcd", "impossible shape"),
    "huge size": ({"a": entry(shape=(2**60, 2**60))}, b"abcd", "impossible shape"),
    "backwards": ({"a": entry(4, 0)}, b"abcd", "impossible offsets"),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, b"abcd", "offsets"),
    "too long for its shape": ({"a": entry(0, 6)}, b"abcdef", "as long as its shape"),
    "hole": ({"a": entry(), "b": entry(6, 10)}, b"0123456789", "hole"),
    "hole at the start": ({"a": entry(4, 8)}, b"01234567", "hole"),
    "overlap": ({"a": entry(), "b": entry(2, 6)}, b"012345", "overlaps"),
    "same bytes": ({"a": entry(), "b": entry()}, b"0123", "overlaps"),
    "out of range": ({"a": entry()}, b"01", "truncated or has a tail"),
    "tail": ({"a": entry()}, b"012345", "truncated or has a tail"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_none(tmp_path, name):
    """Too short for its own length: no safetensors file."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(InvalidAdapter, match="truncated or is no safetensors"):
        read_header(path)


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_break_the_format(tmp_path, name):
    """Each breach has its sentence."""
    header, tail, reason = HEADERS[name]
    path = file_of(tmp_path / "x.safetensors", header, tail)
    with pytest.raises(InvalidAdapter, match=reason):
        read_header(path)


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    """The length alone refuses it."""
    path = file_of(tmp_path / "x.safetensors", b"{}" + b" " * 100)
    with pytest.raises(InvalidAdapter, match="102 bytes; 64 are allowed"):
        read_header(path, max_header_bytes=64)


def test_a_missing_file_is_an_invalid_adapter(tmp_path):
    """So is a folder in its place."""
    with pytest.raises(InvalidAdapter, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(InvalidAdapter):
        read_header(tmp_path)


def test_zero_sized_tensors_share_a_place(tmp_path):
    """They neither overlap nor leave holes."""
    header = {"a": entry(0, 0, (0,)), "b": entry(), "c": entry(4, 4, (0, 3))}
    assert len(read_header(file_of(tmp_path / "x", header, b"abcd")).tensors) == 3


def mutations(draw, raw):
    """Change some bytes of a file."""
    at = draw(st.lists(st.integers(0, min(len(raw), 900) - 1), min_size=1, max_size=6))
    changed = bytearray(raw)
    for place in at:
        changed[place] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(0, len(raw)))] if draw(st.booleans()) else changed)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_files_never_surprise(tmp_path_factory, data):
    """Whatever bytes change: a header that the reference reads too, or InvalidAdapter."""
    folder = tmp_path_factory.mktemp("damaged")
    good = make_adapter(folder, num_layers=1, target_modules=("q_proj",), rank=1)
    path = good / "adapter_model.safetensors"
    path.write_bytes(mutations(data.draw, path.read_bytes()))
    try:
        header = read_header(path)
    except InvalidAdapter:
        return
    try:
        with safe_open(path, "np") as reference:
            assert set(reference.keys()) == set(header.tensors)
    except SafetensorError as error:
        pytest.fail(f"we read what the reference refuses: {error}")


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from([*DTYPE_BITS, "", None]),
                    "shape": st.lists(st.integers(-1, 2**70), max_size=3),
                    "data_offsets": st.lists(st.integers(-1, 2**70), min_size=1, max_size=3),
                }
            ),
        ),
        max_size=4,
    )
)
@settings(max_examples=300, deadline=None)
def test_made_up_headers_never_surprise(tmp_path_factory, fields):
    """Any fields at all: read, or InvalidAdapter."""
    path = file_of(tmp_path_factory.mktemp("made") / "x.safetensors", fields, b"abcd")
    try:
        read_header(path)
    except InvalidAdapter:
        return
