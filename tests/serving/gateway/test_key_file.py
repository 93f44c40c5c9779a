"""The file of API key hashes."""

from __future__ import annotations

import hashlib
import stat
from typing import TYPE_CHECKING

import pytest

from serving.errors import ConfigError
from serving.gateway.auth import ApiKeys
from serving.gateway.key_file import create_key, read_key_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HASH = hashlib.sha256(b"hr-x").hexdigest()


def test_created_key_works(tmp_path: Path) -> None:
    """A key that was made is known by the file; the file holds its hash alone and is private."""
    path = tmp_path / "keys"
    keys = {name: create_key(path, name) for name in ("one", "two")}
    text = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    known = ApiKeys(read_key_file(path))
    for name, key in keys.items():
        assert len(key) >= 43
        assert key not in text
        found = known.check({b"authorization": f"Bearer {key}".encode()})
        assert found is not None
        assert (found.name, found.is_admin) == (name, False)
    assert keys["one"] != keys["two"]


def test_key_is_appended_to_a_line_of_its_own(tmp_path: Path) -> None:
    """A file that an editor left without a last line's end is not spoiled."""
    path = tmp_path / "keys"
    path.write_text(f"one sha256:{HASH}")
    create_key(path, "two")
    assert [key.name for key in read_key_file(path)] == ["one", "two"]


def test_admin_key(tmp_path: Path) -> None:
    """A key that may change the platform says so on its line, and no other key does."""
    path = tmp_path / "keys"
    create_key(path, "one")
    create_key(path, "two", is_admin=True)
    assert path.read_text().splitlines()[1].endswith(" admin")
    assert [(key.name, key.is_admin) for key in read_key_file(path)] == [
        ("one", False),
        ("two", True),
    ]


def test_comments_and_empty_lines(tmp_path: Path) -> None:
    """Are passed over."""
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n  one\t sha256:{HASH}  \n   \n")
    (key,) = read_key_file(path)
    assert (key.name, key.sha256_hex) == ("one", HASH)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it holds no key"),
        ("# nothing\n", "it holds no key"),
        ("hr-5ecret-key\n", "line 1: write NAME sha256:HEX"),
        (f"one sha256:{HASH}\ntwo {HASH}\n", "line 2: "),
        (f"one sha256:{HASH[:-1]}\n", "line 1: "),
        (f"one sha256:{HASH.upper()}\n", "line 1: "),
        (f"one two sha256:{HASH}\n", "line 1: "),
        (f"one sha256:{HASH} root\n", "line 1: "),
        (f"one sha256:{HASH}admin\n", "line 1: "),
    ],
)
def test_bad_file(tmp_path: Path, text: str, says: str) -> None:
    """One line that names the place, and never what stands there: it may be a key."""
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_key_file(path)
    assert says in str(raised.value)
    assert "hr-5ecret-key" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "make",
    [lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff\xfe"), lambda path: None],
)
def test_unreadable_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A folder, bytes that are no text, nothing at all."""
    path = tmp_path / "keys"
    make(path)
    with pytest.raises(ConfigError, match="--api-key-file"):
        read_key_file(path)


@pytest.mark.parametrize("name", ["", "a b", "a\n", "x" * 65, "é!"])
def test_bad_name(tmp_path: Path, name: str) -> None:
    """A name that would break the line is refused, and no file is made."""
    path = tmp_path / "keys"
    with pytest.raises(ConfigError, match="--name"):
        create_key(path, name)
    assert not path.exists()


def test_taken_name(tmp_path: Path) -> None:
    """Names tell keys apart."""
    path = tmp_path / "keys"
    create_key(path, "one")
    with pytest.raises(ConfigError, match="has a key of this name"):
        create_key(path, "one")
