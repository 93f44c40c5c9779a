"""Counters in shared memory: what one writes, all read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.gateway.shared_table import MAX_ROWS, SharedTable

if TYPE_CHECKING:
    from pathlib import Path

_keys = st.text(alphabet="abc/\x1f", min_size=1, max_size=6)


def _sums(tables: list[SharedTable]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for table in tables:
        for key, columns in table.rows():
            sums[key] = sums.get(key, 0.0) + columns[0]
    return {key: value for key, value in sums.items() if value}


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 2), _keys, st.integers(1, 9), st.booleans()), max_size=40
    )
)
def test_sum_over_workers(tmp_path: Path, steps: list[tuple[int, str, int, bool]]) -> None:
    """Any order of increments and restarts of three workers adds up, in the eyes of each."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    workers = [[SharedTable(folder / str(n), 3) for n in range(3)] for _ in range(3)]
    expected: dict[str, float] = {}
    for worker, key, amount, restarts in steps:
        if restarts:
            for table in workers[worker]:
                table.close()
            workers[worker] = [SharedTable(folder / str(n), 3) for n in range(3)]
        own = workers[worker][worker]
        own.values[own.base_of(key)] += amount
        expected[key] = expected.get(key, 0.0) + amount
        assert _sums(workers[(worker + 1) % 3]) == expected
    for tables in workers:
        assert _sums(tables) == expected
        for table in tables:
            table.close()


def test_full_table_counts_under_the_empty_key(tmp_path: Path) -> None:
    """The number of rows is bounded whatever the keys; nothing is lost."""
    table, other = SharedTable(tmp_path / "t", 1), SharedTable(tmp_path / "t", 1)
    for number in range(MAX_ROWS + 10):
        table.values[table.base_of(f"key-{number}")] += 1
    table.values[table.base_of("k" * 600)] += 1
    for reader in (table, other):
        rows = {key: columns[0] for key, columns in reader.rows()}
        assert len(rows) == MAX_ROWS
        assert sum(rows.values()) == MAX_ROWS + 11
        assert rows[""] == 12
    assert table.overflows == 12
    table.close()
    other.close()


def test_reused_row(tmp_path: Path) -> None:
    """It counts from zero under its new key, in the eyes of those who knew the old one too."""
    table, other = SharedTable(tmp_path / "t", 2, 3), SharedTable(tmp_path / "t", 2, 3)
    for key in ("old", "kept"):
        table.values[table.base_of(key) + 1] += 5
    assert table.is_full
    assert {key: list(columns) for key, columns in other.rows()} == {
        "old": [0.0, 5.0],
        "kept": [0.0, 5.0],
    }
    table.reuse("old", "new")
    table.values[table.base_of("new")] += 2
    for reader in (table, other, SharedTable(tmp_path / "t", 2, 3)):
        assert {key: list(columns) for key, columns in reader.rows()} == {
            "new": [2.0, 0.0],
            "kept": [0.0, 5.0],
        }
        reader.close()
