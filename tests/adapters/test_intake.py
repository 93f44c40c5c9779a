"""Intake: folders, parts, streams and object stores become a checked folder and a manifest."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from adapter_folders import make_adapter
from uploads import blocks, claim, files_of, large_tensors, python_tar, tar_of

from adapters.block_pipe import MAX_BLOCKS, BlockPipe, PipeClosed
from adapters.errors import InvalidName, StoreError, UploadRefused
from adapters.intake import Intake
from adapters.manifest import Signature, Source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from adapters.store import AdapterStore

ANSWER_DEADLINE_S = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "made")


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return tmp_path / "staging"


@pytest.fixture
def intake(staging: Path) -> Intake:
    return Intake(staging)


def test_every_way_gives_the_same_version(
    folder: Path, intake: Intake, store: AdapterStore
) -> None:
    """A folder, its archives, its parts and its objects are one digest."""
    for name, content in files_of(folder).items():
        store.location.put(f"incoming/a/{name}", [content], len(content))
    store.location.put("incoming/a/checkpoint-1/optimizer.pt", [b"x"], 1)
    ways = [
        intake.from_folder(folder, claim()),
        intake.from_archive(blocks(python_tar(folder)), claim()),
        intake.from_archive(blocks(python_tar(folder, "w", inside="my-adapter")), claim()),
        intake.from_archive([tar_of(files_of(folder))], claim()),
        intake.from_parts(((n, [c]) for n, c in files_of(folder).items()), claim()),
        intake.from_location(store.location, "incoming/a", claim()),
    ]
    assert len({staged.manifest.digest for staged in ways}) == 1
    assert [files_of(staged.folder) for staged in ways] == [files_of(folder)] * len(ways)
    assert len({staged.folder for staged in ways}) == len(ways)
    for staged in ways:
        staged.remove()


def test_claim_is_kept(folder: Path, intake: Intake) -> None:
    """What the sender says is in the manifest as he said it."""
    signature = Signature(key_id="k1", algorithm="ed25519", value_base64="AA==")
    source = Source(kind="run", detail="run-7")
    with intake.from_folder(folder, claim(source=source, signatures=(signature,))) as staged:
        assert (staged.manifest.source, staged.manifest.signatures) == (source, (signature,))


def test_staging_is_empty_afterwards(folder: Path, intake: Intake, staging: Path) -> None:
    """The folder goes with the `with` block, and with an object that nobody keeps."""
    with intake.from_folder(folder, claim()) as staged:
        assert staged.folder.parent == staging
        assert staged.folder.is_dir()
    assert list(staging.iterdir()) == []
    intake.from_folder(folder, claim())
    gc.collect()
    assert list(staging.iterdir()) == []


def test_bad_name_takes_nothing(folder: Path, intake: Intake, staging: Path) -> None:
    """An adapter's name is checked before a byte is read."""
    with pytest.raises(InvalidName, match="cannot name an adapter"):
        intake.from_folder(folder, claim("a@b"))
    assert not staging.exists()


def test_an_error_of_the_sender_leaves_nothing(intake: Intake, staging: Path, folder: Path) -> None:
    """Whatever the stream raises comes through, and the folder is removed."""

    def broken() -> Iterator[bytes]:
        yield python_tar(folder, "w")[:3000]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        intake.from_archive(broken(), claim())
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize("target", ["outside", "inside", "nowhere"])
def test_links_in_a_folder(target: str, folder: Path, intake: Intake, tmp_path: Path) -> None:
    """A symbolic link is refused; where the caller follows links, its file is taken."""
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / "tokenizer.json").symlink_to(
        {"outside": secret, "inside": folder / "adapter_config.json", "nowhere": tmp_path / "x"}[
            target
        ]
    )
    with pytest.raises(UploadRefused, match=r"'tokenizer.json' is a symbolic link"):
        intake.from_folder(folder, claim())
    if target == "nowhere":
        with pytest.raises(UploadRefused, match="cannot be read: No such file"):
            intake.from_folder(folder, claim(), follow_links=True)
    else:
        with intake.from_folder(folder, claim(), follow_links=True) as staged:
            assert "tokenizer.json" in files_of(staged.folder)


def test_a_link_to_a_folder(folder: Path, intake: Intake, tmp_path: Path) -> None:
    """A link to a folder is no file either."""
    (folder / "tokenizer.json").symlink_to(tmp_path)
    with pytest.raises(UploadRefused, match="not a regular file"):
        intake.from_folder(folder, claim(), follow_links=True)


def test_a_pipe_and_a_socket_in_a_folder(folder: Path, intake: Intake) -> None:
    """What is no file is found out without waiting for it."""
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(UploadRefused, match="not a regular file"):
        intake.from_folder(folder, claim())
    (folder / "tokenizer.json").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "vocab.json"))
        with pytest.raises(UploadRefused, match="cannot be read"):
            intake.from_folder(folder, claim())


def test_a_folder_that_is_none(tmp_path: Path, intake: Intake) -> None:
    """A missing folder, and an empty prefix, are said to be so."""
    with pytest.raises(UploadRefused, match="'x' is not a folder"):
        intake.from_folder(tmp_path / "x", claim())


def test_an_empty_prefix(intake: Intake, store: AdapterStore) -> None:
    """An object URL with nothing behind it is refused."""
    with pytest.raises(UploadRefused, match="there is nothing under") as refused:
        intake.from_location(store.location, "incoming/none", claim())
    assert refused.value.status == 422


def test_duplicate_parts(folder: Path, intake: Intake, staging: Path) -> None:
    """Two parts of a form with the same name are refused."""
    parts = [*files_of(folder).items(), ("adapter_config.json", b"{}")]
    with pytest.raises(UploadRefused, match="comes twice"):
        intake.from_parts(((name, [content]) for name, content in parts), claim())
    assert list(staging.iterdir()) == []


def test_leftovers_of_killed_processes(intake: Intake, staging: Path) -> None:
    """Folders of dead uploads go once they are old."""
    (staging / "upload-dead").mkdir(parents=True)
    (staging / "upload-dead" / "tokenizer.json").write_text("{}")
    assert intake.remove_leftovers(60.0, time.time()) == 0
    assert intake.remove_leftovers(60.0, time.time() + 61) == 1
    assert list(staging.iterdir()) == []


def test_unwritable_staging(tmp_path: Path, folder: Path) -> None:
    """A staging folder that cannot be made is an error of ours, not of the sender."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="does not take the upload"):
        Intake(tmp_path / "file" / "staging").from_folder(folder, claim())


def test_stream_through_a_pipe(intake: Intake, tmp_path: Path) -> None:
    """A writer in one thread, intake in another: memory is a few blocks, the result the same."""
    folder = make_adapter(tmp_path / "large", tensors=large_tensors(20), target_modules=("q_proj",))
    pipe, archive = BlockPipe(ANSWER_DEADLINE_S), python_tar(folder, "w")
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(intake.from_archive, pipe, claim())
        for block in blocks(archive, 65536):
            pipe.write(block)
        pipe.close()
        with taken.result(ANSWER_DEADLINE_S) as staged:
            assert files_of(staged.folder) == files_of(folder)


@pytest.mark.parametrize("action", ["abort", "quiet"])
def test_broken_off_stream(action: str, intake: Intake, staging: Path, folder: Path) -> None:
    """A client that goes away, or says nothing for too long, leaves nothing."""
    pipe = BlockPipe(ANSWER_DEADLINE_S if action == "abort" else 0.1)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(intake.from_archive, pipe, claim())
        pipe.write(python_tar(folder, "w")[:3000])
        if action == "abort":
            pipe.abort()
        with pytest.raises(UploadRefused, match=r"broken off|stood still"):
            taken.result(ANSWER_DEADLINE_S)
    assert list(staging.iterdir()) == []


def test_pipe_tells_the_writer() -> None:
    """A writer whose reader has gone, or does not read, gets an error and does not wait forever."""
    pipe = BlockPipe(0.05)
    for _ in range(MAX_BLOCKS):
        pipe.write(b"x")
    with pytest.raises(PipeClosed, match="nobody reads"):
        pipe.write(b"x")
    waiting, pipe = threading.Event(), BlockPipe(ANSWER_DEADLINE_S)

    def write() -> None:
        for _ in range(20):
            waiting.set()
            pipe.write(b"x")

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write)
        assert waiting.wait(ANSWER_DEADLINE_S)
        pipe.abort()
        with pytest.raises(PipeClosed, match="broken off"):
            written.result(ANSWER_DEADLINE_S)
