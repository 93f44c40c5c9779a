"""A process of its own that pushes or fetches a version; a test kills it, or runs two at once.

    transfer_process.py push|fetch URL SETTINGS FOLDER MANIFEST [stop]

FOLDER holds the files of a push and is the cache of a fetch. Prints "ready", reads a line, transfers;
with `stop` it prints "halfway" in the middle and waits for another line. At the end it prints how often
it heard of progress.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adapters.locations import Location, LocationSettings
from adapters.manifest import Manifest
from adapters.node_cache import NodeCache
from adapters.store import AdapterStore


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(action: str, url: str, settings: str, folder: str, manifest_path: str, *rest: str) -> None:
    store = AdapterStore(Location(url, LocationSettings.model_validate_json(settings)))
    manifest = Manifest.model_validate_json(Path(manifest_path).read_bytes())
    num_calls = 0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if (
            "stop" in rest
            and total_bytes // 2 <= done_bytes < total_bytes
            and "halfway" not in said
        ):
            said.append("halfway")
            say("halfway")
            sys.stdin.readline()

    said: list[str] = []
    say("ready")
    sys.stdin.readline()
    if action == "push":
        store.push(Path(folder), manifest, progress)
    else:
        NodeCache(Path(folder), max_bytes=10**9, spare_bytes=0).fetch(
            store, manifest, progress=progress
        )
    say(str(num_calls))


if __name__ == "__main__":
    main(*sys.argv[1:])
