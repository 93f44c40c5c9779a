"""`headrace keys`."""

from __future__ import annotations

import hashlib
import json
import stat
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from serving.cli.main import app

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result


def _keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_create_and_list(tmp_path: Path) -> None:
    """The key is printed once, its hash alone is on disk, its name is listed."""
    path = tmp_path / "keys"
    created = _keys("create", "--file", str(path), "--name", "alice")
    key = created.stdout.removesuffix("\n")
    assert (created.exit_code, created.stderr) == (0, "")
    assert path.read_text() == f"alice sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert _keys("list", "--file", str(path)).stdout == "alice\n"


def test_create_admin(tmp_path: Path) -> None:
    """`--admin` makes a key that may change the platform."""
    path = tmp_path / "keys"
    assert _keys("create", "--file", str(path), "--admin").exit_code == 0
    assert path.read_text().endswith(" admin\n")


def test_json(tmp_path: Path) -> None:
    """Both commands speak JSON."""
    path = tmp_path / "keys"
    created = json.loads(_keys("create", "--file", str(path), "--json").stdout)
    assert created["name"] == "default"
    assert created["key"].startswith("hr-")
    assert json.loads(_keys("list", "--file", str(path), "--json").stdout) == ["default"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("create", "--name", "a b"), "--name a b: use 1 to 64"),
        (("create", "--name", "taken"), "--name taken: the file has a key of this name"),
        (("list",), "line 2: write NAME sha256:HEX"),
    ],
)
def test_one_line_errors(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    """One line, exit code 2, the file as it was."""
    path = tmp_path / "keys"
    text = f"taken sha256:{'0' * 64}\n" + ("spoiled\n" if arguments == ("list",) else "")
    path.write_text(text)
    result = _keys(*arguments, "--file", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert path.read_text() == text


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    """Is named."""
    result = _keys("create", "--file", str(tmp_path / "no" / "keys"))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "No such file or directory" in result.stderr
