"""What the tests of the control plane share: both databases, and a control plane over each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "adapters"))

from adapter_folders import make_base
from control_plane import BASE, ControlPlane, running, settings_of
from postgres_server import Postgres, binaries, running_postgres

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The session's PostgreSQL."""
    folder = binaries()
    if folder is None:
        pytest.skip("PostgreSQL's binaries are not installed (apt-get install postgresql)")
    with running_postgres(folder) as server:
        yield server


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model that the tests' adapters are for."""
    return make_base(tmp_path_factory.mktemp("base") / BASE)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'control.db'}"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def control(database_url: str, tmp_path: Path, base_folder: Path) -> Iterator[ControlPlane]:
    """A control plane over each kind of database."""
    settings = settings_of(tmp_path / "state", base_folder, database_url=database_url)
    with running(settings) as plane:
        yield plane


@pytest.fixture
def small_control(tmp_path: Path, base_folder: Path) -> Iterator[ControlPlane]:
    """A control plane over SQLite, for what does not depend on the database."""
    with running(settings_of(tmp_path / "state", base_folder)) as plane:
        yield plane
