"""Hostile uploads: each refused with a clear 4xx, with nothing left in staging or store."""

from __future__ import annotations

import gzip
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pytest
from adapter_folders import lora_tensors
from hostile_archives import CASES, LIMITS, good, good_with, plus
from hypothesis import given, settings
from hypothesis import strategies as st
from uploads import blocks, claim, files_of, member, pax, tar_of

from adapters.errors import UploadRefused
from adapters.intake import Intake
from adapters.store import AdapterStore

if TYPE_CHECKING:
    from adapters.locations import Location

STATUSES = {200, 400, 413, 415, 422}


@pytest.fixture
def intake(tmp_path: Path) -> Intake:
    return Intake(tmp_path / "staging", LIMITS)


def left_in(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "staging").iterdir())


def status_of(staging: Path, archive: bytes) -> int:
    try:
        Intake(staging, LIMITS).from_archive([archive], claim()).remove()
    except UploadRefused as refused:
        return refused.status
    return 200


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path, intake: Intake, local: Location) -> None:
    """It is refused for the reason it has; staging is empty and the store as it was before."""
    make, status, fragment = CASES[name]
    store = AdapterStore(local)
    with intake.from_archive(blocks(tar_of(good())), claim()) as staged:
        store.push(staged.folder, staged.manifest)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(UploadRefused) as refused,
        intake.from_archive(blocks(make()), claim()) as bad,
    ):
        store.push(bad.folder, bad.manifest)
    message = str(refused.value)
    assert (refused.value.status, fragment in message) == (status, True), message
    assert message.endswith(".")
    assert len(message) < 400
    assert sorted(tmp_path.rglob("*")) == before
    assert left_in(tmp_path) == []


def test_the_table_is_about_something(intake: Intake) -> None:
    """The archive that each case spoils is taken."""
    with intake.from_archive(blocks(plus(member("README.md", b"x"))), claim()) as staged:
        assert files_of(staged.folder) == good()


@pytest.mark.parametrize("size", [1, 7, 511, 65536])
def test_blocks_of_any_size(size: int, intake: Intake) -> None:
    """It does not matter how the bytes are cut into blocks."""
    archive = gzip.compress(tar_of(good()))
    with intake.from_archive(blocks(archive, size), claim()) as staged:
        assert files_of(staged.folder) == good()


@settings(max_examples=300, deadline=None)
@given(name=st.text(min_size=1, max_size=130) | st.from_regex(r"[./\\a-z]{1,20}", fullmatch=True))
def test_no_name_leaves_the_staging_folder(name: str) -> None:
    """Whatever a member is called, nothing is written outside, and nothing stays after a refusal."""
    with TemporaryDirectory() as root:
        folder = Path(root) / "a" / "b"
        try:
            archive = plus(member(name, b"x"))
        except (ValueError, UnicodeError):
            return
        status = status_of(folder, archive)
        assert status in STATUSES
        assert [path for path in Path(root).rglob("*") if path not in (folder, folder.parent)] == []
        assert status != 200 or ".." not in name.split("/")


@settings(max_examples=400, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=6),
    is_gzip=st.booleans(),
)
def test_damaged_archives(changes: list[tuple[int, int]], is_gzip: bool) -> None:
    """Any bytes changed: the archive is taken or refused with a 4xx, never anything else."""
    content = tar_of(good())
    content = bytearray(gzip.compress(content, 1) if is_gzip else content)
    for at, value in changes:
        content[at % len(content)] = value
    with TemporaryDirectory() as root:
        assert status_of(Path(root), bytes(content)) in STATUSES
        assert list(Path(root).iterdir()) == []


@settings(max_examples=100, deadline=None)
@given(
    records=st.dictionaries(
        st.sampled_from(
            [
                "path",
                "size",
                "linkpath",
                "mtime",
                "GNU.sparse.major",
                "GNU.sparse.name",
                "GNU.sparse.realsize",
                "hdrcharset",
            ]
        ),
        st.text(max_size=12),
        max_size=4,
    )
)
def test_any_pax_records(records: dict[str, str]) -> None:
    """Whatever a PAX header says: taken or refused with a 4xx."""
    try:
        archive = plus(pax(records), member("README.md", b"x"))
    except UnicodeError:
        return
    with TemporaryDirectory() as root:
        assert status_of(Path(root), archive) in STATUSES
        assert list(Path(root).iterdir()) == []


def test_lora_tensors_are_what_the_manifest_says(intake: Intake) -> None:
    """Rank, alpha, modules, type and numbers come from the files."""
    tensors = lora_tensors(rank=4, target_modules=("q_proj", "o_proj"), dtype=np.float16)
    files = good_with(rank=4, alpha=12.0, target_modules=("q_proj", "o_proj"), dtype=np.float16)
    with intake.from_archive([tar_of(files)], claim(parent="support@0123456789ab")) as staged:
        made = staged.manifest
    assert (made.rank, made.alpha, made.dtype) == (4, 12.0, "float16")
    assert made.target_modules == ("o_proj", "q_proj")
    assert made.num_parameters == sum(tensor.size for tensor in tensors.values())
    assert made.size_bytes == sum(len(content) for content in files.values())
    assert (made.base.name, made.parent) == ("tiny-llama", "support@0123456789ab")
    assert made.version == f"support@{made.digest[:12]}"
