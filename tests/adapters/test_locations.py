"""Locations: a local folder and a real S3 server, and how each of their failures is said."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import obstore
import pytest
from obstore.exceptions import GenericError

from adapters.errors import NotInStore, StoreError
from adapters.locations import Location, LocationSettings

if TYPE_CHECKING:
    from pathlib import Path

    from s3_server import S3Server

    from adapters.store import AdapterStore

MIB = 1024 * 1024


@pytest.fixture
def location(store: AdapterStore) -> Location:
    return store.location


@pytest.mark.parametrize(
    "size", [0, 1, MIB, 8 * MIB, 8 * MIB + 1, 16 * MIB, 17 * MIB + 3], ids=lambda n: f"{n}-bytes"
)
def test_sizes_around_the_parts(size: int, location: Location) -> None:
    """What is read is what was written, on either side of the size from which it goes in parts."""
    content = os.urandom(size)
    location.put("a/b.bin", (content[at : at + 100_000] for at in range(0, size, 100_000)), size)
    assert b"".join(location.read("a/b.bin")) == content
    assert location.size_bytes("a/b.bin") == size
    (found,) = location.objects("a")
    assert (found.path, found.size_bytes) == ("a/b.bin", size)
    assert abs(found.modified_s - time.time()) < 60


def test_create_is_for_the_first(location: Location) -> None:
    """The second creator is told so, and changes nothing."""
    assert location.create("a/b", b"first")
    assert not location.create("a/b", b"second")
    assert b"".join(location.read("a/b")) == b"first"


def test_put_replaces_and_delete_removes(location: Location) -> None:
    """An object is replaced whole; deleting twice is no error; nothing is left."""
    location.put("a/b", [b"one"], 3)
    location.put("a/b", [b"two"], 3)
    assert b"".join(location.read("a/b")) == b"two"
    location.delete("a/b")
    location.delete("a/b")
    assert location.size_bytes("a/b") is None
    assert list(location.objects("a")) == []
    with pytest.raises(NotInStore, match="has no such object"):
        b"".join(location.read("a/b"))


@pytest.mark.parametrize("size", [MIB, 20 * MIB])
def test_a_failing_source_writes_nothing(size: int, location: Location) -> None:
    """An exception out of the content comes through, and the object does not appear."""

    def failing() -> object:
        for _ in range(size // MIB):
            yield b"x" * MIB
        raise LookupError("the source failed")

    with pytest.raises(LookupError, match="the source failed"):
        location.put("a/b", failing(), size)  # type: ignore[arg-type]
    assert list(location.objects("a")) == []


def test_urls_of_a_folder(tmp_path: Path) -> None:
    """A path and its file URL are the same place, blanks and all."""
    folder = tmp_path / "with blank"
    Location(str(folder)).put("a", [b"x"], 1)
    same = Location(folder.as_uri())
    assert b"".join(same.read("a")) == b"x"
    assert (same.folder, same.url) == (folder, folder.as_uri())


@pytest.mark.parametrize("url", ["ftp://host/x", "http://host/x", "memory:///"])
def test_other_schemes(url: str) -> None:
    """What is no store is said to be none."""
    with pytest.raises(StoreError, match="is no store: use a folder, s3://, gs:// or az://"):
        Location(url)


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_clouds_open(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Google's and Azure's stores open by URL; nothing is sent."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert Location(f"{scheme}://bucket/prefix").url == f"{scheme}://bucket/prefix"


def test_folder_under_a_file(tmp_path: Path) -> None:
    """A folder that cannot be made is an error of the store."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"failed .*Not a directory") as failed:
        Location(str(tmp_path / "file" / "store"))
    assert failed.value.reason == "failed"


@pytest.mark.parametrize(
    "wrong", [{"secret_access_key": "wrong"}, {"access_key_id": "nobody"}], ids=["secret", "key"]
)
def test_wrong_keys(wrong: dict[str, str], s3: S3Server) -> None:
    """Wrong credentials are named as the cause at once, without the secret."""
    location = s3.location("keys", **wrong)
    for ask in (
        lambda: location.put("a", [b"x"], 1),
        lambda: location.create("a", b"x"),
        lambda: b"".join(location.read("a")),
        lambda: list(location.objects("")),
    ):
        with pytest.raises(StoreError, match="refuses us: check its credentials") as failed:
            ask()
        assert failed.value.reason == "forbidden"
        assert "wrong" not in str(failed.value)


def test_missing_bucket(s3: S3Server) -> None:
    """A bucket that is not there is named by the server's own words."""
    with pytest.raises(StoreError, match="404 Not Found: The specified bucket does not exist"):
        list(s3.location("a", bucket="not-there").objects(""))


def test_nothing_listens() -> None:
    """A store that is down is unreachable, within the deadline."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        check_unreachable(endpoint)


def test_silent_server() -> None:
    """A store that takes connections and says nothing is unreachable, within the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_unreachable(f"http://127.0.0.1:{server.getsockname()[1]}")


def check_unreachable(endpoint: str) -> None:
    settings = LocationSettings(
        endpoint=endpoint,
        region="us-east-1",
        access_key_id="a",
        secret_access_key="b",  # type: ignore[arg-type]
        connect_s=0.5,
        idle_s=0.5,
        retry_s=1.0,
    )
    location, start_s = Location("s3://bucket", settings), time.monotonic()
    with pytest.raises(StoreError, match="s3://bucket cannot be reached") as failed:
        location.put("a", [b"x"], 1)
    assert failed.value.reason == "unreachable"
    with pytest.raises(StoreError, match="cannot be reached"):
        b"".join(location.read("a"))
    assert time.monotonic() - start_s < 15


def test_full_disk(location: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """A location without room says that it is full."""

    def full(*given: object, **options: object) -> None:
        raise GenericError("Generic LocalFileSystem error: No space left on device (os error 28)")

    monkeypatch.setattr(obstore, "put", full)
    with pytest.raises(StoreError, match="is full") as failed:
        location.put("a", [b"x"], 1)
    assert failed.value.reason == "full"


def test_uploads_that_were_killed(tmp_path: Path) -> None:
    """What obstore leaves of a killed upload is no object, and is found once it is old."""
    location = Location(str(tmp_path))
    location.put("a/b", [b"x"], 1)
    (tmp_path / "a" / "c#1").write_bytes(b"half")
    assert [found.path for found in location.objects("a")] == ["a/b"]
    assert location.partial_uploads(time.time() - 60) == []
    assert location.partial_uploads(time.time() + 60) == [tmp_path / "a" / "c#1"]
