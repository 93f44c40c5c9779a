"""The store, in a local folder and in S3: order, verification, concurrency, crashes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from uploads import claim, files_of, large_tensors, stage

from adapters.errors import CorruptObject, InvalidAdapter, InvalidName, NotInStore, StoreError
from adapters.intake import Intake
from adapters.store import AdapterStore, StoredVersion, manifest_path
from adapters.version import parse_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from adapters.intake import Staged
    from adapters.locations import Location
    from adapters.manifest import Manifest

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def staged(tmp_path: Path) -> Staged:
    return stage(tmp_path)


@pytest.fixture
def large(tmp_path: Path) -> Staged:
    return stage(tmp_path / "large", tensors=large_tensors(20), target_modules=("q_proj",))


def weights_path(manifest: Manifest) -> str:
    return f"versions/{manifest.digest}/{WEIGHTS}"


def content_of(location: Location) -> dict[str, bytes]:
    return {found.path: b"".join(location.read(found.path)) for found in location.objects("")}


def overwrite(location: Location, path: str, content: bytes) -> None:
    location.put(path, [content], len(content))


def flip(location: Location, path: str, at: int) -> None:
    content = bytearray(b"".join(location.read(path)))
    content[at] ^= 1
    overwrite(location, path, bytes(content))


def downloaded(store: AdapterStore, manifest: Manifest, tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    store.download(manifest, folder)
    return files_of(folder)


def test_push_find_download(store: AdapterStore, large: Staged, tmp_path: Path) -> None:
    """What is pushed is found by its name, and comes back the same, in parts too."""
    heard: list[tuple[int, int]] = []
    pushed = store.push(
        large.folder, large.manifest, lambda done, total: heard.append((done, total))
    )
    assert pushed == large.manifest
    assert heard[-1] == (large.manifest.size_bytes, large.manifest.size_bytes)
    assert len(heard) > 10
    assert store.find(parse_version(pushed.version)) == pushed
    assert list(store.list()) == [StoredVersion("support", pushed.digest)]
    assert downloaded(store, pushed, tmp_path) == files_of(large.folder)
    assert {found.path for found in store.location.objects("")} == {
        weights_path(pushed),
        f"versions/{pushed.digest}/adapter_config.json",
        f"manifests/support/{pushed.digest}.json",
    }


def test_push_twice(store: AdapterStore, staged: Staged) -> None:
    """The first manifest stays, whatever a second push says."""
    store.push(staged.folder, staged.manifest)
    before = content_of(store.location)
    later = staged.manifest.model_copy(update={"created_at": "2030-01-01T00:00:00Z"})
    assert store.push(staged.folder, later) == staged.manifest
    assert content_of(store.location) == before


def test_two_names_share_files(store: AdapterStore, staged: Staged, tmp_path: Path) -> None:
    """One content under two names is stored once, and stays until both names are gone."""
    other = staged.manifest.model_copy(update={"adapter": "sales"})
    store.push(staged.folder, staged.manifest)
    store.push(staged.folder, other)
    assert len(list(store.location.objects("versions"))) == 2
    assert list(store.list("sales")) == [StoredVersion("sales", other.digest)]
    store.delete("support", other.digest)
    store.delete("support", other.digest)
    with pytest.raises(NotInStore):
        store.manifest("support", other.digest)
    assert downloaded(store, store.manifest("sales", other.digest), tmp_path) == files_of(
        staged.folder
    )
    store.delete("sales", other.digest)
    assert content_of(store.location) == {}


def test_short_digests(store: AdapterStore, staged: Staged) -> None:
    """An unknown version is not found; a short digest that fits two asks for the whole."""
    store.push(staged.folder, staged.manifest)
    with pytest.raises(NotInStore, match="support@000000000000 is not in"):
        store.find(parse_version("support@000000000000"))
    with pytest.raises(NotInStore):
        store.find(parse_version(f"other@{staged.manifest.digest}"))
    alike = staged.manifest.digest[:12] + "0" * 52
    overwrite(store.location, manifest_path("support", alike), b"{}")
    with pytest.raises(StoreError, match=f"could be .*{alike}.*give the whole digest"):
        store.find(parse_version(staged.manifest.version))


@pytest.mark.parametrize("at", [0, 100, -1])
def test_flipped_bit_in_the_weights(
    at: int, store: AdapterStore, large: Staged, tmp_path: Path
) -> None:
    """One changed bit is found out on download; pushing again heals it."""
    store.push(large.folder, large.manifest)
    flip(store.location, weights_path(large.manifest), at)
    with pytest.raises(
        CorruptObject, match=f"is not what was pushed: push {large.manifest.version}"
    ):
        downloaded(store, large.manifest, tmp_path / "a")
    store.push(large.folder, large.manifest)
    (tmp_path / "b").mkdir()
    assert downloaded(store, large.manifest, tmp_path / "b") == files_of(large.folder)


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c + b"x", lambda c: b""])
def test_wrong_size(
    change: Callable[[bytes], bytes], store: AdapterStore, staged: Staged, tmp_path: Path
) -> None:
    """A file that is shorter or longer than it was is damaged."""
    store.push(staged.folder, staged.manifest)
    path = weights_path(staged.manifest)
    overwrite(store.location, path, change(b"".join(store.location.read(path))))
    with pytest.raises(CorruptObject):
        downloaded(store, staged.manifest, tmp_path)


def test_missing_file(store: AdapterStore, staged: Staged, tmp_path: Path) -> None:
    """A file that somebody deleted is missing, not damaged."""
    store.push(staged.folder, staged.manifest)
    store.location.delete(weights_path(staged.manifest))
    with pytest.raises(NotInStore):
        downloaded(store, staged.manifest, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        (b'"alpha": 16.0', b'"alpha": 17.0', "was changed"),
        (b'"rank": 8', b'"rank": 9', "was changed"),
        (b'"adapter": "support"', b'"adapter": "suppert"', "was changed"),
        (b'"format"', b'"farmat"', "is not a manifest"),
        (b"{", b"[", "is not a manifest"),
        (b'"sha256_hex"', b'"sha256_hxx"', "is not a manifest|was changed"),
        (
            b'"path": "adapter_config.json"',
            b'"path": "../adapter_config.json"',
            "is not a manifest",
        ),
    ],
)
def test_changed_manifest(
    old: bytes, new: bytes, fragment: str, local: Location, staged: Staged
) -> None:
    """A changed manifest is not believed; pushing again writes it anew."""
    store, digest = AdapterStore(local), staged.manifest.digest
    store.push(staged.folder, staged.manifest)
    path = manifest_path("support", digest)
    content = b"".join(local.read(path))
    assert old in content
    overwrite(local, path, content.replace(old, new))
    with pytest.raises(CorruptObject, match=fragment):
        store.manifest("support", digest)
    store.push(staged.folder, staged.manifest)
    assert store.manifest("support", digest) == staged.manifest


def test_manifest_in_the_wrong_place(local: Location, staged: Staged) -> None:
    """A manifest counts under its own name only, and only up to a size."""
    store, digest = AdapterStore(local), staged.manifest.digest
    store.push(staged.folder, staged.manifest)
    content = b"".join(local.read(manifest_path("support", digest)))
    overwrite(local, manifest_path("sales", digest), content)
    with pytest.raises(CorruptObject, match="is the manifest of support@"):
        store.manifest("sales", digest)
    overwrite(local, manifest_path("sales", digest), b" " * (5 * 1024 * 1024))
    with pytest.raises(CorruptObject, match="larger than a manifest can be"):
        store.manifest("sales", digest)


@pytest.mark.parametrize("name", ["support", "large"])
def test_folder_that_changed(name: str, store: AdapterStore, staged: Staged, large: Staged) -> None:
    """Files that are no longer those of the manifest are not published."""
    it = staged if name == "support" else large
    weights = it.folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidAdapter, match="is not the file that the manifest names"):
        store.push(it.folder, it.manifest)
    weights.unlink()
    with pytest.raises(InvalidAdapter, match="cannot be read: No such file"):
        store.push(it.folder, it.manifest)
    assert list(store.list()) == []
    assert weights_path(it.manifest) not in content_of(store.location)


def test_impossible_manifests(local: Location, staged: Staged) -> None:
    """A manifest with a false digest or name is not stored."""
    store = AdapterStore(local)
    with pytest.raises(InvalidAdapter, match="names other files"):
        store.push(staged.folder, staged.manifest.model_copy(update={"digest": "0" * 64}))
    with pytest.raises(InvalidName):
        store.push(staged.folder, staged.manifest.model_copy(update={"adapter": "../x"}))
    assert content_of(local) == {}


def test_push_broken_off_by_its_caller(store: AdapterStore, large: Staged) -> None:
    """An exception out of the progress callback ends the push; no version is listed."""

    def cancel(done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes // 2:
            raise TimeoutError("cancelled")

    with pytest.raises(TimeoutError, match="cancelled"):
        store.push(large.folder, large.manifest, cancel)
    assert list(store.list()) == []
    assert store.push(large.folder, large.manifest) == large.manifest


def test_files_deleted_during_a_push(store: AdapterStore, staged: Staged, tmp_path: Path) -> None:
    """A push that a collector crosses writes its files again before it says that it is done."""

    class Crossed(AdapterStore):
        def _put_manifest(self, manifest: Manifest) -> Manifest:
            self.delete_files(manifest.digest)
            return super()._put_manifest(manifest)

    Crossed(store.location).push(staged.folder, staged.manifest)
    assert downloaded(store, staged.manifest, tmp_path) == files_of(staged.folder)


def test_concurrent_pushes(
    store: AdapterStore, large: Staged, transfer: Callable[..., Any], tmp_path: Path
) -> None:
    """Two processes that push the same content both succeed, and what is there is whole."""
    both = [transfer("push", store, large.folder, large.manifest) for _ in range(2)]
    for process in both:
        process.go_on()
    assert [process.close() for process in both] == [0, 0]
    assert store.find(parse_version(large.manifest.version)) == large.manifest
    assert downloaded(store, large.manifest, tmp_path) == files_of(large.folder)
    assert len(list(store.list())) == 1


def test_concurrent_threads(local: Location, tmp_path: Path) -> None:
    """Several threads may push to one store, the same content and others."""
    store = AdapterStore(local)
    made = [stage(tmp_path / str(seed), seed=seed % 3) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        pushed = list(pool.map(lambda each: store.push(each.folder, each.manifest), made))
    assert {stored.digest for stored in store.list()} == {each.digest for each in pushed}
    assert len(list(store.list())) == 3


def test_killed_push(
    store: AdapterStore, large: Staged, transfer: Callable[..., Any], tmp_path: Path
) -> None:
    """A push that is killed in the middle leaves no version; the next one succeeds."""
    process = transfer("push", store, large.folder, large.manifest, "stop")
    process.go_on()
    assert process.hear() == "halfway"
    process.kill()
    assert list(store.list()) == []
    with pytest.raises(NotInStore):
        store.find(parse_version(large.manifest.version))
    store.push(large.folder, large.manifest)
    assert downloaded(store, large.manifest, tmp_path) == files_of(large.folder)


def test_server_dies_and_comes_back(large: Staged, local: Location, tmp_path: Path) -> None:
    """A location that vanishes is an error of the store; nothing of ours is left half done."""
    store = AdapterStore(local)
    assert local.folder is not None
    moved = tmp_path / "unmounted"
    store.push(large.folder, large.manifest)
    local.folder.rename(moved)
    with pytest.raises(NotInStore):
        downloaded(store, large.manifest, tmp_path / "a")
    assert list(store.list()) == []
    moved.rename(local.folder)
    assert downloaded(store, large.manifest, tmp_path) == files_of(large.folder)


def test_intake_from_the_store_itself(store: AdapterStore, staged: Staged, tmp_path: Path) -> None:
    """A version's folder in the store is an adapter's folder: it can be taken in by its URL."""
    store.push(staged.folder, staged.manifest)
    prefix = f"versions/{staged.manifest.digest}"
    with Intake(tmp_path / "again").from_location(store.location, prefix, claim("copy")) as again:
        assert again.manifest.digest == staged.manifest.digest
