"""New settings without a restart: noticed, validated, and given to the workers.

Owns when a reload is due, what of it takes effect, and what is said about it. Never touches a
connection: `worker.py` applies what is decided here. The process that owns the port decides, for all
workers, on the same bytes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from serving.config import GatewayConfig
from serving.errors import ConfigError
from serving.fleet.replica_indexes import ReplicaIndexes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from serving.config_file import ConfigSource, Contents

log = logging.getLogger(__name__)

POLL_S = 1.0
RELOADABLE = (
    "replicas",
    "aliases",
    "api_key_file",
    "api_keys",
    "timeouts",
    "limits",
    "resilience",
    "cors",
)
"""Fields of `GatewayConfig` that take effect without a restart."""

Signature = tuple[tuple[int, int, int] | None, ...]


class FileWatch:
    """Notices that files are other ones than before, by time, size and inode."""

    def __init__(self) -> None:
        """Everything counts as changed at the first look: it may have changed since it was read."""
        self._before: Signature | None = None

    def changed(self, paths: Iterable[Path]) -> bool:
        """Whether one has changed since the last look."""
        now = tuple(_signature(path) for path in paths)
        before, self._before = self._before, now
        return now != before


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Reload(NamedTuple):
    """What the workers are told.

    Attributes:
        contents: The bytes to take settings from, or None if they were refused.
        indexes: Of the replicas in them.
    """

    contents: Contents | None
    indexes: tuple[int, ...] = ()


class Reloader:
    """Watches the files of a source and decides about reloads.

    Attributes:
        config: What is in effect, the real port included.
        indexes: Of its replicas.
    """

    def __init__(
        self, source: ConfigSource, config: GatewayConfig, is_idle: Callable[[int], bool]
    ) -> None:
        """Reads nothing yet.

        Args:
            source: Where settings come from.
            config: What they are now.
            is_idle: Whether no request is charged to a replica index.
        """
        self.config = config
        self.indexes = tuple(range(len(config.replicas)))
        self._source = source
        self._is_idle = is_idle
        self._is_asked = False
        self._watch = FileWatch()
        self._numbers = ReplicaIndexes(config.replicas)

    def ask(self) -> None:
        """SIGHUP: the next `poll` reloads, changed or not."""
        self._is_asked = True

    def poll(self) -> Reload | None:
        """Looks at the files once; what to tell the workers, if anything."""
        is_asked, self._is_asked = self._is_asked, False
        is_changed = self._watch.changed(self._paths())
        if not (is_asked or is_changed):
            return None
        try:
            return self._reload(is_asked=is_asked)
        except ConfigError as error:
            log.error("configuration refused, the one before stays in effect: %s", error)
            return Reload(None)

    def _paths(self) -> list[Path]:
        paths = (self._source.path, self.config.api_key_file)
        return [path for path in paths if path is not None]

    def _reload(self, *, is_asked: bool) -> Reload | None:
        contents = self._source.read()
        wanted = self._source.resolve(contents)
        config = merged(self.config, wanted)
        _say_what_needs_a_restart(self.config, wanted)
        if config == self.config and not is_asked:
            return None
        self.indexes = self._numbers.assign(config.replicas, self._is_idle)
        changed = [
            name for name in RELOADABLE if getattr(config, name) != getattr(self.config, name)
        ]
        self.config = config
        log.info("configuration reloaded, changed: %s", ", ".join(changed) or "nothing")
        return Reload(contents, self.indexes)


def merged(current: GatewayConfig, wanted: GatewayConfig) -> GatewayConfig:
    """What is in effect after a reload: all that can change from `wanted`, the rest as it was.

    Raises:
        ConfigError: If the two do not go together, for example no keys on a public address.
    """
    fields = {name: getattr(current, name) for name in GatewayConfig.model_fields}
    fields.update({name: getattr(wanted, name) for name in RELOADABLE})
    return GatewayConfig(**fields)


def _say_what_needs_a_restart(current: GatewayConfig, wanted: GatewayConfig) -> None:
    before, after = current, wanted
    if after.listen.port == 0:
        after = after.model_copy(update={"listen": before.listen})
    kept = [
        name
        for name in GatewayConfig.model_fields
        if name not in RELOADABLE and getattr(before, name) != getattr(after, name)
    ]
    if kept:
        log.warning("takes effect after a restart only: %s", ", ".join(kept))
