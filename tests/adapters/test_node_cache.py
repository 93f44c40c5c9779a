"""The node's cache: one download, atomic, verified, bounded; crashes and damage."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from uploads import files_of, large_tensors, stage

from adapters.errors import CorruptObject, NotInStore, StoreError
from adapters.file_lock import locked, try_lock
from adapters.node_cache import NodeCache
from adapters.store import AdapterStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from adapters.intake import Staged
    from adapters.locations import Location
    from adapters.manifest import Manifest

WEIGHTS = "adapter_model.safetensors"
GB = 10**9


@pytest.fixture
def large(tmp_path: Path) -> Staged:
    return stage(tmp_path / "large", tensors=large_tensors(20), target_modules=("q_proj",))


@pytest.fixture
def pushed(local: Location, tmp_path: Path) -> tuple[AdapterStore, Staged]:
    store, staged = AdapterStore(local), stage(tmp_path)
    store.push(staged.folder, staged.manifest)
    return store, staged


def push_some(store: AdapterStore, tmp_path: Path, num: int) -> list[Manifest]:
    manifests = []
    for seed in range(num):
        with stage(tmp_path / str(seed), seed=seed) as staged:
            manifests.append(store.push(staged.folder, staged.manifest))
    return manifests


def make_cache(tmp_path: Path, max_bytes: int = GB, **options: Any) -> NodeCache:
    return NodeCache(tmp_path / "cache", max_bytes=max_bytes, **{"spare_bytes": 0, **options})


def age(cache: NodeCache, version: str, age_s: float) -> None:
    then_s = time.time() - age_s
    os.utime(cache.root / version / "manifest.json", (then_s, then_s))


def held(cache: NodeCache) -> set[str]:
    return {cached.version for cached in cache.versions()}


def test_fetch(store: AdapterStore, large: Staged, tmp_path: Path) -> None:
    """A version is downloaded once, to a read-only folder whose path has its name and digest."""
    store.push(large.folder, large.manifest)
    cache, heard = make_cache(tmp_path), []
    folder = cache.fetch(
        store, large.manifest, progress=lambda done, total: heard.append((done, total))
    )
    total_bytes = large.manifest.size_bytes
    assert files_of(folder) == files_of(large.folder)
    assert folder == tmp_path / "cache" / large.manifest.version / "1"
    assert heard == sorted(heard)
    assert heard[-1] == (total_bytes, total_bytes)
    assert len(heard) > 10
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    assert folder.stat().st_mode & 0o777 == 0o555
    (cached,) = cache.versions()
    assert (cached.version, cached.size_bytes) == (large.manifest.version, total_bytes)
    store.delete("support", large.manifest.digest)
    again: list[tuple[int, int]] = []
    same = cache.fetch(
        store, large.manifest, progress=lambda done, total: again.append((done, total))
    )
    assert (same, again) == (folder, [(total_bytes, total_bytes)])


def test_missing_version(local: Location, tmp_path: Path) -> None:
    """A version that the store lacks leaves nothing in the cache."""
    cache = make_cache(tmp_path)
    with pytest.raises(NotInStore), stage(tmp_path) as staged:
        cache.fetch(AdapterStore(local), staged.manifest)
    assert held(cache) == set()
    assert list(cache.root.glob("[!.]*")) == []


def test_damaged_store(store: AdapterStore, large: Staged, tmp_path: Path) -> None:
    """What is damaged in the store does not reach the cache."""
    store.push(large.folder, large.manifest)
    path = f"versions/{large.manifest.digest}/{WEIGHTS}"
    content = bytearray(b"".join(store.location.read(path)))
    content[-1] ^= 1
    store.location.put(path, [bytes(content)], len(content))
    cache = make_cache(tmp_path)
    with pytest.raises(CorruptObject):
        cache.fetch(store, large.manifest)
    assert list(cache.root.glob("[!.]*")) == []
    store.push(large.folder, large.manifest)
    assert files_of(cache.fetch(store, large.manifest)) == files_of(large.folder)


@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing"])
@pytest.mark.parametrize("is_new_process", [False, True])
def test_damaged_copy(
    damage: str, is_new_process: bool, pushed: tuple[AdapterStore, Staged], tmp_path: Path
) -> None:
    """A damaged copy is never written to: another is made beside it, and both go together."""
    store, staged = pushed
    cache = make_cache(tmp_path)
    first = cache.fetch(store, staged.manifest)
    weights = first / WEIGHTS
    content = weights.read_bytes()
    first.chmod(0o755)
    weights.chmod(0o644)
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(content[:-1] if damage == "shorter" else content[:-1] + b"\xff")
    damaged = files_of(first)
    if is_new_process:
        cache = make_cache(tmp_path)
    second = cache.fetch(store, staged.manifest)
    assert second == first.parent / "2"
    assert files_of(second) == files_of(staged.folder)
    assert files_of(first) == damaged
    assert cache.fetch(store, staged.manifest) == second
    assert cache.remove(staged.manifest.version)
    assert not first.parent.exists()


def test_lost_cache_manifest(pushed: tuple[AdapterStore, Staged], tmp_path: Path) -> None:
    """A copy whose manifest is gone is proven by its content, and used."""
    store, staged = pushed
    cache = make_cache(tmp_path)
    folder = cache.fetch(store, staged.manifest)
    (folder.parent / "manifest.json").unlink()
    assert make_cache(tmp_path).fetch(store, staged.manifest) == folder


def test_digests_that_begin_alike(pushed: tuple[AdapterStore, Staged], tmp_path: Path) -> None:
    """Two versions with the same short digest are not mixed up."""
    store, staged = pushed
    cache = make_cache(tmp_path)
    cache.fetch(store, staged.manifest)
    alike = staged.manifest.model_copy(update={"digest": staged.manifest.digest[:12] + "0" * 52})
    with pytest.raises(StoreError, match="whose digest begins alike"):
        cache.fetch(store, alike)


def test_eviction(local: Location, tmp_path: Path) -> None:
    """Least recently asked for goes first, never what somebody names or has just asked for."""
    store = AdapterStore(local)
    a, b, c, d = push_some(store, tmp_path, 4)
    cache = make_cache(tmp_path, max_bytes=3 * a.size_bytes + 10)
    for manifest in (a, b, c):
        cache.fetch(store, manifest)
    with pytest.raises(StoreError, match=f"no room for {d.version}: .* in use") as failed:
        cache.fetch(store, d)
    assert failed.value.reason == "full"
    for manifest, age_s in ((a, 3000), (b, 2000), (c, 1000)):
        age(cache, manifest.version, age_s)
    assert [cached.version for cached in cache.versions()] == [a.version, b.version, c.version]
    cache.fetch(store, d, in_use={a.version})
    assert held(cache) == {a.version, c.version, d.version}
    cache.fetch(store, c)
    with pytest.raises(StoreError, match="no room"):
        cache.fetch(store, b, in_use={a.version})
    assert held(cache) == {a.version, c.version, d.version}


def test_larger_than_the_cache(pushed: tuple[AdapterStore, Staged], tmp_path: Path) -> None:
    """A version that could never fit is refused, and evicts nothing that is in use."""
    store, staged = pushed
    with pytest.raises(StoreError, match="no room"):
        make_cache(tmp_path, max_bytes=100).fetch(store, staged.manifest)
    with pytest.raises(StoreError, match="to keep free") as failed:
        make_cache(tmp_path, spare_bytes=2**60).fetch(store, staged.manifest)
    assert failed.value.reason == "full"
    assert held(make_cache(tmp_path)) == set()


def test_remove(pushed: tuple[AdapterStore, Staged], tmp_path: Path) -> None:
    """Removing says whether there was something, and leaves no lock file; a fetch brings it back."""
    store, staged = pushed
    cache, version = make_cache(tmp_path), staged.manifest.version
    assert not cache.remove(version)
    folder = cache.fetch(store, staged.manifest)
    with locked(cache.root / ".locks" / version, 1.0):
        assert not cache.remove(version)
    assert cache.remove(version)
    assert not folder.exists()
    assert [path.name for path in (cache.root / ".locks").iterdir()] == [".space"]
    assert cache.fetch(store, staged.manifest) == folder


def test_waiting_has_an_end(pushed: tuple[AdapterStore, Staged], tmp_path: Path) -> None:
    """A process that holds the version for too long is an error, not a hang."""
    store, staged = pushed
    cache = make_cache(tmp_path, wait_s=0.1)
    (cache.root / ".locks").mkdir(parents=True)
    with (
        locked(cache.root / ".locks" / staged.manifest.version, 1.0),
        pytest.raises(StoreError, match="another process has held"),
    ):
        cache.fetch(store, staged.manifest)


def test_lock_of_a_removed_file(tmp_path: Path) -> None:
    """A lock whose file was removed is nobody's: the next one locks the new file."""
    first = try_lock(tmp_path / "lock")
    assert first is not None
    assert try_lock(tmp_path / "lock") is None
    first.release(remove_file=True)
    second = try_lock(tmp_path / "lock")
    assert second is not None
    assert try_lock(tmp_path / "lock") is None
    second.release()


def test_unwritable_root(pushed: tuple[AdapterStore, Staged], tmp_path: Path) -> None:
    """A root that cannot be made is an error of the store."""
    (tmp_path / "cache").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        make_cache(tmp_path).fetch(pushed[0], pushed[1].manifest)


def test_many_threads(local: Location, tmp_path: Path) -> None:
    """Threads that want the same versions at once get them all, each downloaded once."""
    store = AdapterStore(local)
    manifests = push_some(store, tmp_path, 3)
    cache, downloads = make_cache(tmp_path), []

    def fetch(manifest: Manifest) -> Path:
        heard: list[int] = []
        folder = cache.fetch(store, manifest, progress=lambda done, total: heard.append(done))
        downloads.extend([manifest.version] * (len(heard) > 1))
        return folder

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(fetch, manifests * 8))
    assert len(set(folders)) == 3
    assert sorted(downloads) == sorted(manifest.version for manifest in manifests)


def test_two_processes_one_download(
    store: AdapterStore, large: Staged, transfer: Callable[..., Any], tmp_path: Path
) -> None:
    """While one process downloads, another that wants the same version waits for it."""
    store.push(large.folder, large.manifest)
    first = transfer("fetch", store, tmp_path / "cache", large.manifest, "stop")
    second = transfer("fetch", store, tmp_path / "cache", large.manifest)
    first.go_on()
    assert first.hear() == "halfway"
    second.go_on()
    first.go_on()
    assert int(first.hear()) > 10
    assert second.hear() == "1"
    assert [first.close(), second.close()] == [0, 0]
    assert files_of(tmp_path / "cache" / large.manifest.version / "1") == files_of(large.folder)


def test_killed_fetch(
    store: AdapterStore, large: Staged, transfer: Callable[..., Any], tmp_path: Path
) -> None:
    """A fetch that is killed in the middle leaves no copy and no lock; the next one succeeds."""
    store.push(large.folder, large.manifest)
    process = transfer("fetch", store, tmp_path / "cache", large.manifest, "stop")
    process.go_on()
    assert process.hear() == "halfway"
    folder = tmp_path / "cache" / large.manifest.version
    (incoming,) = folder.iterdir()
    assert incoming.name.startswith(f".incoming-{large.manifest.size_bytes}-")
    (cached,) = make_cache(tmp_path).versions()
    assert cached.size_bytes == large.manifest.size_bytes
    process.kill()
    copy = make_cache(tmp_path, wait_s=5.0).fetch(store, large.manifest)
    assert copy == folder / "1"
    assert files_of(copy) == files_of(large.folder)
    assert {path.name for path in folder.iterdir()} == {"1", "manifest.json"}


def test_room_that_a_killed_fetch_had_reserved(
    local: Location, large: Staged, transfer: Callable[..., Any], tmp_path: Path
) -> None:
    """The reservation of a dead process is given up when another version needs the room."""
    store = AdapterStore(local)
    store.push(large.folder, large.manifest)
    (small,) = push_some(store, tmp_path, 1)
    process = transfer("fetch", store, tmp_path / "cache", large.manifest, "stop")
    process.go_on()
    assert process.hear() == "halfway"
    cache = make_cache(tmp_path, max_bytes=large.manifest.size_bytes, idle_s=0.0)
    with pytest.raises(StoreError, match="no room"):
        cache.fetch(store, small)
    process.kill()
    cache.fetch(store, small)
    assert held(cache) == {small.version}
