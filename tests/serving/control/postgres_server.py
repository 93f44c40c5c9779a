"""A real PostgreSQL for the tests, on a port of its own, by a user that is not root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from serving.fleet.ports import PortReservation

if TYPE_CHECKING:
    from collections.abc import Iterator

DEBIAN = "/usr/lib/postgresql"
USERS = ("postgres", "nobody")
DEADLINE_S = 60


def binaries() -> Path | None:
    """The folder with `initdb` and `pg_ctl`, or None."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path(DEBIAN).glob("*/bin"), reverse=True)
    for folder in folders:
        if all((folder / name).exists() for name in ("initdb", "pg_ctl", "postgres")):
            return folder
    return None


@dataclass
class Postgres:
    """One server; its databases are the tests' own."""

    bin: Path
    folder: Path
    port: int
    _names = count(1)

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{next(self._names)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str) -> str:
        """The URL of a database."""
        return f"postgresql://headrace@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-D", "data", "-o", options, "-w", "-l", "log", "start")

    def stop(self) -> None:
        """Ends it at once, as a crash would."""
        self._run("pg_ctl", "-D", "data", "-m", "immediate", "-w", "stop")

    def create(self) -> None:
        """Makes its files."""
        self._run("initdb", "-D", "data", "-A", "trust", "-U", "headrace", "-N")

    def _run(self, name: str, *arguments: str) -> None:
        user = [] if os.geteuid() else ["setpriv", f"--reuid={_user()}", "--clear-groups"]
        subprocess.run(
            [*user, str(self.bin / name), *arguments],
            cwd=self.folder,
            check=True,
            timeout=DEADLINE_S,
            stdout=subprocess.DEVNULL,
            stderr=sys.stderr,
        )


@contextmanager
def running_postgres(bin_folder: Path) -> Iterator[Postgres]:
    """A server that ends with the block, in a folder that its user can reach."""
    with PortReservation() as reserved:
        folder = Path(tempfile.mkdtemp(prefix="headrace-pg-"))
        if not os.geteuid():
            shutil.chown(folder, _user())
        server = Postgres(bin_folder, folder, reserved.port)
        try:
            server.create()
            server.start()
            yield server
            server.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _user() -> str:
    for user in USERS:
        if f"\n{user}:" in "\n" + Path("/etc/passwd").read_text():
            return user
    raise LookupError("there is no user for PostgreSQL")
