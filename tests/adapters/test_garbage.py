"""Garbage collection: only what nobody names, only after its grace, and never under a push."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uploads import files_of, stage

from adapters.errors import NotInStore
from adapters.garbage import Collected, collect
from adapters.locations import Location
from adapters.node_cache import NodeCache
from adapters.store import AdapterStore

if TYPE_CHECKING:
    from pathlib import Path

    from adapters.intake import Staged
    from adapters.manifest import Manifest

GRACE_S = 100.0
WEIGHTS = "adapter_model.safetensors"
NOTHING = Collected((), (), (), (), ())


@pytest.fixture
def made(tmp_path: Path) -> list[Staged]:
    return [stage(tmp_path / str(seed), seed=seed) for seed in range(3)]


def push(store: AdapterStore, staged: Staged, adapter: str = "support") -> Manifest:
    manifest = staged.manifest.model_copy(update={"adapter": adapter})
    return store.push(staged.folder, manifest)


def run(store: AdapterStore, named: set[str], now_s: float, **options: Any) -> Collected:
    return collect(
        store, options.pop("cache", None), named, grace_s=GRACE_S, now_s=now_s, **options
    )


def names(store: AdapterStore) -> set[str]:
    return {stored.version for stored in store.list()}


def digests(store: AdapterStore) -> set[str]:
    return {found.path.split("/")[1] for found in store.location.objects("versions")}


def test_unnamed_goes_after_its_grace(store: AdapterStore, made: list[Staged]) -> None:
    """The first call marks, a call after the grace removes; what is named stays throughout."""
    kept, gone = push(store, made[0]), push(store, made[1])
    first = run(store, {kept.version}, 1000.0)
    assert first == NOTHING._replace(
        marked=(
            f"unnamed/manifests/support/{gone.digest}",
            f"unnamed/versions/{gone.digest}",
        )
    )
    assert run(store, {kept.version}, 1000.0 + GRACE_S - 1) == NOTHING
    assert names(store) == {kept.version, gone.version}
    removed = run(store, {kept.version}, 1000.0 + GRACE_S)
    assert removed == NOTHING._replace(
        removed_versions=(gone.version,), removed_digests=(gone.digest,)
    )
    assert (names(store), digests(store)) == ({kept.version}, {kept.digest})
    assert list(store.location.objects("unnamed")) == []
    assert run(store, {kept.version}, 9999.0) == NOTHING


def test_dry_run(store: AdapterStore, made: list[Staged]) -> None:
    """A dry run says the same and does nothing."""
    push(store, made[0])
    before = {found.path for found in store.location.objects("")}
    marked = run(store, set(), 1000.0, dry_run=True)
    assert {found.path for found in store.location.objects("")} == before
    assert run(store, set(), 1000.0) == marked
    removed = run(store, set(), 1200.0, dry_run=True)
    assert len(list(store.list())) == 1
    assert run(store, set(), 1200.0) == removed
    assert list(store.location.objects("")) == []


def test_named_again(store: AdapterStore, made: list[Staged]) -> None:
    """A version that is named again, as by a rollback, starts its grace anew when it is dropped."""
    version = push(store, made[0]).version
    run(store, set(), 1000.0)
    run(store, {version}, 1050.0)
    assert list(store.location.objects("unnamed")) == []
    assert run(store, set(), 1200.0).removed_versions == ()
    assert run(store, set(), 1300.0).removed_versions == (version,)


def test_pushed_again(store: AdapterStore, made: list[Staged]) -> None:
    """A push of content that is about to go takes its marks away."""
    manifest = push(store, made[0])
    run(store, set(), 1000.0)
    push(store, made[0])
    assert run(store, set(), 1200.0).removed_versions == ()
    assert names(store) == {manifest.version}


def test_another_name(store: AdapterStore, made: list[Staged]) -> None:
    """Files go with their last name; a push under another name saves them."""
    old = push(store, made[0])
    run(store, set(), 1000.0)
    new = push(store, made[0], "sales")
    collected = run(store, {new.version}, 1200.0)
    assert (collected.removed_versions, collected.removed_digests) == ((old.version,), ())
    assert (names(store), digests(store)) == ({new.version}, {new.digest})


def test_push_that_broke_off(store: AdapterStore, made: list[Staged]) -> None:
    """Files without a manifest are kept for the grace, as a push may be under way."""
    digest = push(store, made[0]).digest
    store.location.delete(f"manifests/support/{digest}.json")
    assert run(store, set(), 1000.0).marked == (f"unnamed/versions/{digest}",)
    assert digests(store) == {digest}
    assert run(store, set(), 1200.0).removed_digests == (digest,)
    assert digests(store) == set()


def test_push_after_the_decision(made: list[Staged], local: Location) -> None:
    """A push between the collector's look and its deed keeps its version."""

    class Late(Location):
        """Its first deletion is preceded by a push."""

        def objects(self, prefix: str) -> Any:
            found = list(super().objects(prefix))
            if prefix == "versions":
                push(AdapterStore(local), made[0])
            return iter(found)

    manifest = push(AdapterStore(local), made[0])
    run(AdapterStore(local), set(), 1000.0)
    collected = run(AdapterStore(Late(local.url)), set(), 1200.0)
    assert (collected.removed_versions, collected.removed_digests) == ((), ())
    assert AdapterStore(local).manifest("support", manifest.digest) == manifest


def test_manifest_restored_by_hand(made: list[Staged], local: Location) -> None:
    """Files stay if a manifest names them by the time of the deed, whatever the marks say."""
    manifest = push(AdapterStore(local), made[0], "sales")
    path = f"manifests/sales/{manifest.digest}.json"
    saved = b"".join(local.read(path))
    AdapterStore(local).location.delete(path)

    class Restored(Location):
        """The manifest comes back after the collector's look."""

        def objects(self, prefix: str) -> Any:
            found = list(super().objects(prefix))
            if prefix == "versions":
                local.put(path, [saved], len(saved))
            return iter(found)

    run(AdapterStore(local), set(), 1000.0)
    assert run(AdapterStore(Restored(local.url)), set(), 1200.0).removed_digests == ()
    assert digests(AdapterStore(local)) == {manifest.digest}


def test_collection_during_a_push(made: list[Staged], local: Location) -> None:
    """A push after one that broke off long ago keeps its files from its first byte on."""
    store, staged = AdapterStore(local), made[0]
    push(store, staged)
    local.delete(f"manifests/support/{staged.manifest.digest}.json")
    run(store, set(), 1000.0)
    collected: list[Collected] = []
    store.push(
        staged.folder,
        staged.manifest,
        lambda done, total: collected.append(run(store, set(), 1200.0)),
    )
    assert [each.removed_digests for each in collected] == [()] * len(staged.manifest.files)
    assert names(store) == {staged.manifest.version}


def test_strange_marks(local: Location, made: list[Staged]) -> None:
    """A mark that cannot be read counts as new: nothing goes too early."""
    store = AdapterStore(local)
    digest = push(store, made[0]).digest
    for mark in (f"unnamed/manifests/support/{digest}", f"unnamed/versions/{digest}"):
        local.put(mark, [b"yesterday"], 9)
    assert run(store, set(), 1200.0) == NOTHING


def test_partial_uploads(local: Location, made: list[Staged]) -> None:
    """What killed uploads left in a local folder goes once it is old."""
    store, named = AdapterStore(local), {push(AdapterStore(local), made[0]).version}
    assert local.folder is not None
    partial = local.folder / "versions" / f"{WEIGHTS}#1"
    partial.write_bytes(b"half")
    assert run(store, named, time.time()) == NOTHING
    assert run(store, named, time.time() + 200).removed_partial == (partial.name,)
    assert not partial.exists()


def test_cache(local: Location, made: list[Staged], tmp_path: Path) -> None:
    """From the cache goes what nobody names and nobody has asked for of late."""
    store = AdapterStore(local)
    cache = NodeCache(tmp_path / "cache", max_bytes=10**9, spare_bytes=0)
    manifests = [push(store, staged) for staged in made]
    folders = [cache.fetch(store, manifest) for manifest in manifests]
    now_s = time.time()
    for manifest, age_s in zip(manifests, (500, 500, 10), strict=True):
        os.utime(cache.root / manifest.version / "manifest.json", (now_s - age_s,) * 2)
    every = {manifest.version for manifest in manifests}
    named = {manifests[0].version}
    dry = run(store, named, now_s, cache=cache, dry_run=True)
    assert dry.evicted == (manifests[1].version,)
    assert {cached.version for cached in cache.versions()} == every
    assert run(store, named, now_s, cache=cache).evicted == (manifests[1].version,)
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert files_of(folders[0]) == files_of(made[0].folder)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["push", "drop", "collect"]), st.integers(0, 3)), max_size=14
    )
)
def test_never_what_is_named(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory, made: list[Staged]
) -> None:
    """Over any order of pushes, drops and collections: what is named can be read, whole."""
    store = AdapterStore(Location(str(tmp_path_factory.mktemp("store"))))
    named: dict[str, Manifest] = {}
    now_s = 0.0
    for action, number in steps:
        now_s += 60
        staged, adapter = made[number % 2], ("support", "sales")[number // 2]
        if action == "push":
            manifest = push(store, staged, adapter)
            named[manifest.version] = manifest
        elif action == "drop":
            named.pop(f"{adapter}@{staged.manifest.digest[:12]}", None)
        else:
            run(store, set(named), now_s)
        for manifest in named.values():
            assert store.manifest(manifest.adapter, manifest.digest).digest == manifest.digest
            for entry in manifest.files:
                assert sum(map(len, store.read_file(manifest, entry))) == entry.size_bytes
    run(store, set(named), now_s)
    run(store, set(named), now_s + GRACE_S)
    assert names(store) == set(named)
    assert digests(store) == {manifest.digest for manifest in named.values()}


def test_removed_versions_are_not_found(store: AdapterStore, made: list[Staged]) -> None:
    """What was collected is not in the store."""
    manifest = push(store, made[0])
    run(store, set(), 0.0)
    run(store, set(), GRACE_S)
    with pytest.raises(NotInStore):
        store.manifest("support", manifest.digest)
