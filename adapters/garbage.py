"""Removes versions that nobody names, from the store and from a node's cache.

Owns the order and the grace: a thing that nobody names is marked in the store first, and removed by a
later call, `grace_s` after its mark, if it is still unnamed. So a version that was retired today is kept
as long as one whose upload broke off today. Never knows why something is named. Called by the control
plane, one caller at a time.

A push takes the marks of its version away before and after it writes, and then looks whether all its
files are there: with a grace longer than a push, neither removes what the other needs.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from adapters.errors import NotInStore
from adapters.store import UNNAMED, VERSIONS, StoredVersion, manifest_path, marks_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from adapters.node_cache import NodeCache
    from adapters.store import AdapterStore


class Collected(NamedTuple):
    """What a collection did, or would do."""

    marked: tuple[str, ...]
    """Paths in the store that are unnamed since now."""
    removed_versions: tuple[str, ...]
    """`name@digest12` of manifests that went."""
    removed_digests: tuple[str, ...]
    """Digests whose files went."""
    removed_partial: tuple[str, ...]
    """Uploads that broke off, of a local folder; an S3 bucket needs a lifecycle rule for its own."""
    evicted: tuple[str, ...]
    """`name@digest12` of what went from the cache."""


def collect(
    store: AdapterStore,
    cache: NodeCache | None,
    named: Collection[str],
    *,
    grace_s: float,
    now_s: float,
    dry_run: bool = False,
) -> Collected:
    """Remove from store and cache what nobody names.

    Args:
        store: The store.
        cache: The cache of this node, None where there is none.
        named: Every `name@digest12` that a registry row, a snapshot or a replica names.
        grace_s: How long a thing has to have been unnamed; longer than a push takes.
        now_s: Seconds since 1970.
        dry_run: Say what would be done, and do nothing.

    Raises:
        StoreError: If the location does not let us; what was done until then stays done.
    """
    sweep = _Sweep(store, frozenset(named), grace_s, now_s)
    sweep.look()
    partial = store.location.partial_uploads(now_s - grace_s)
    evicted = cache.collect(named, grace_s, now_s) if cache else []
    if not dry_run:
        sweep.write_marks()
        sweep.remove()
        for path in partial:
            path.unlink(missing_ok=True)
        evicted = [version for version in evicted if cache is not None and cache.remove(version)]
    return Collected(
        marked=tuple(sorted(sweep.new_marks)),
        removed_versions=tuple(sorted(stored.version for stored in sweep.due_manifests)),
        removed_digests=tuple(sorted(sweep.due_digests)),
        removed_partial=tuple(sorted(path.name for path in partial)),
        evicted=tuple(evicted),
    )


class _Sweep:
    """One pass over the store."""

    def __init__(
        self, store: AdapterStore, named: frozenset[str], grace_s: float, now_s: float
    ) -> None:
        self._store = store
        self._named = named
        self._marked_before_s = now_s - grace_s
        self._now_s = now_s
        self._marks: dict[str, float] = {}
        self._unnamed: set[str] = set()
        self.new_marks: set[str] = set()
        self.due_manifests: list[StoredVersion] = []
        self.due_digests: list[str] = []

    def look(self) -> None:
        location = self._store.location
        self._marks = {
            found.path: self._marked_s(found.path) for found in location.objects(UNNAMED)
        }
        names = defaultdict(list)
        for stored in self._store.list():
            names[stored.digest].append(stored)
        present = {found.path.split("/")[1] for found in location.objects(VERSIONS)}
        for digest in sorted(present | names.keys()):
            self._look_at(digest, names[digest], has_files=digest in present)

    def _look_at(self, digest: str, names: list[StoredVersion], *, has_files: bool) -> None:
        unnamed = [stored for stored in names if stored.version not in self._named]
        due = [s for s in unnamed if self._is_due(marks_of(s.adapter, digest)[0])]
        self.due_manifests += due
        if has_files and len(unnamed) == len(names):
            files_due = self._is_due(marks_of("", digest)[1])
            if files_due and len(due) == len(names):
                self.due_digests.append(digest)

    def _is_due(self, mark: str) -> bool:
        self._unnamed.add(mark)
        if mark not in self._marks:
            self.new_marks.add(mark)
            return False
        return self._marks[mark] <= self._marked_before_s

    def _marked_s(self, mark: str) -> float:
        try:
            return float(b"".join(self._store.location.read(mark)))
        # Taken away by a push meanwhile, or not ours: unnamed since now.
        except (NotInStore, ValueError):
            return self._now_s

    def write_marks(self) -> None:
        for mark in self.new_marks:
            self._store.location.create(mark, repr(self._now_s).encode())
        for mark in self._marks.keys() - self._unnamed:
            self._store.location.delete(mark)

    def remove(self) -> None:
        location = self._store.location
        self.due_manifests = [
            stored
            for stored in self.due_manifests
            if self._is_still_marked(marks_of(stored.adapter, stored.digest)[0])
        ]
        for stored in self.due_manifests:
            location.delete(manifest_path(stored.adapter, stored.digest))
        listed = {stored.digest for stored in self._store.list()} if self.due_digests else set()
        self.due_digests = [
            digest
            for digest in self.due_digests
            if digest not in listed and self._removed_files(digest)
        ]
        self._forget_marks(
            [
                *(marks_of(stored.adapter, stored.digest)[0] for stored in self.due_manifests),
                *(marks_of("", digest)[1] for digest in self.due_digests),
            ]
        )

    def _removed_files(self, digest: str) -> bool:
        is_marked = self._is_still_marked(marks_of("", digest)[1])
        if is_marked:
            self._store.delete_files(digest)
        return is_marked

    def _is_still_marked(self, mark: str) -> bool:
        return self._store.location.size_bytes(mark) is not None

    def _forget_marks(self, marks: Iterable[str]) -> None:
        for mark in marks:
            self._store.location.delete(mark)
