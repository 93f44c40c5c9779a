"""One line a log record: time, level, event, then its key/values. Called by commands and worker processes."""

from __future__ import annotations

import logging

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """`2026-11-24 13:41:12,085 WARNING replica is down replica=127.0.0.1:9001`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with what `extra` carried at its end."""
        line = super().format(record)
        extra = [
            f"{name}={_shown(value)}"
            for name, value in vars(record).items()
            if name not in _STANDARD
        ]
        return " ".join([line, *extra])


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(character.isspace() for character in text) else text


def log_to_stderr() -> None:
    """Sends what this process logs, from level INFO on, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(KeyValueFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
