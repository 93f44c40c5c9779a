"""The digest of a version: fixed values, so that a change of its definition is seen."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from adapter_folders import make_adapter
from hypothesis import given
from hypothesis import strategies as st
from uploads import claim

from adapters.digest import digest_of, entry_of
from adapters.intake import Intake
from adapters.manifest import FileEntry

if TYPE_CHECKING:
    from pathlib import Path

EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
ABC_SHA256 = hashlib.sha256(b"abc").hexdigest()


def entry(path: str, sha256_hex: str = EMPTY_SHA256, size_bytes: int = 0) -> FileEntry:
    return FileEntry(path=path, size_bytes=size_bytes, sha256_hex=sha256_hex)


@pytest.mark.parametrize(
    ("files", "digest"),
    [
        (
            [entry("adapter_config.json"), entry("adapter_model.safetensors")],
            "b08da4bc50b85d9d69ca3e27d64a78cc8800dd44b2caa9a1b362f018c7f2fdfc",
        ),
        (
            [entry("adapter_config.json", ABC_SHA256, 3), entry("adapter_model.safetensors")],
            "e9902e6f41903b4dd51cac774b33effcadf19cdf014ce2b256f62986d0094525",
        ),
        (
            [entry("b"), entry("a"), entry("B")],
            "8a162b286be85b4505965ade5d15b32b80ce475f4220ddd09c527f5798ea795f",
        ),
    ],
)
def test_vectors(files: list[FileEntry], digest: str) -> None:
    """Known files have the digests that they always had."""
    assert digest_of(files) == digest


def test_definition() -> None:
    """The digest is that of the text which the documentation gives."""
    text = f"headrace.adapter.files/1\n{ABC_SHA256} 3 a.json\n{EMPTY_SHA256} 0 b.json\n"
    files = [entry("b.json"), entry("a.json", ABC_SHA256, 3)]
    assert digest_of(files) == hashlib.sha256(text.encode()).hexdigest()


@given(
    st.lists(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True), unique=True, min_size=1
    )
)
def test_order_does_not_count(names: list[str]) -> None:
    """The order in which files come changes nothing."""
    files = [entry(name) for name in names]
    assert digest_of(reversed(files)) == digest_of(files) == digest_of(sorted(files, key=str))


@pytest.mark.parametrize(
    "changed",
    [
        entry("a.json", ABC_SHA256, 4),
        entry("a.json", EMPTY_SHA256, 3),
        entry("A.json", ABC_SHA256, 3),
    ],
)
def test_each_part_counts(changed: FileEntry) -> None:
    """Another size, content or name is another version."""
    assert digest_of([changed]) != digest_of([entry("a.json", ABC_SHA256, 3)])


def test_entry_of_a_file(tmp_path: Path) -> None:
    """A file's entry has its name, size and SHA-256."""
    (tmp_path / "a.json").write_bytes(b"abc")
    assert entry_of(tmp_path / "a.json") == entry("a.json", ABC_SHA256, 3)


def test_what_is_passed_over_does_not_count(tmp_path: Path) -> None:
    """A README and Trainer's leftovers change no digest, a tokenizer does."""
    folder, intake = make_adapter(tmp_path / "a"), Intake(tmp_path / "staging")
    with intake.from_folder(folder, claim()) as staged:
        digest = staged.manifest.digest
    (folder / "README.md").write_text("hello")
    (folder / "training_args.bin").write_bytes(b"\x80\x04pickle")
    (folder / "checkpoint-10").mkdir()
    with intake.from_folder(folder, claim("another-name")) as staged:
        assert staged.manifest.digest == digest
    (folder / "tokenizer.json").write_text("{}")
    with intake.from_folder(folder, claim()) as staged:
        assert staged.manifest.digest != digest
