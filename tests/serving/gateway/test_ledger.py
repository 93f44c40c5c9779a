"""Outstanding tokens: charged, settled, and seen by all workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.engines import dialect_of
from serving.gateway.ledger import Ledger
from serving.gateway.shared_table import SharedTable
from serving.routing.snapshot import Replica

if TYPE_CHECKING:
    from pathlib import Path

REPLICAS = [Replica(index, f"r{index}", "h", 1, dialect_of("vllm")) for index in range(3)]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(
    charges=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 10**6))),
)
def test_all_workers_see_all_charges(tmp_path: Path, charges: list[tuple[int, int, int]]) -> None:
    """Each worker's view is the sum of all charges; settled in any order it is exactly zero."""
    tables = [SharedTable(tmp_path / str(number), 1) for number in range(2)]
    ledgers = [Ledger(tables[0], [tables[1]]), Ledger(tables[1], [tables[0]])]
    expected = [0.0, 0.0, 0.0]
    for worker, replica, cost in charges:
        ledgers[worker].charge(replica, cost)
        expected[replica] += cost
    assert ledgers[0].outstanding_tokens(REPLICAS) == expected
    assert ledgers[1].outstanding_tokens(REPLICAS[::-1]) == expected[::-1]
    for worker, replica, cost in sorted(charges, key=lambda charge: charge[2]):
        ledgers[worker].settle(replica, cost)
    assert ledgers[0].outstanding_tokens(REPLICAS) == [0.0, 0.0, 0.0]
    for table in tables:
        table.close()


def test_a_dead_workers_charges_are_void(tmp_path: Path) -> None:
    """What a killed worker had charged is gone when its successor starts."""
    table, successor = SharedTable(tmp_path / "t", 1), SharedTable(tmp_path / "t", 1)
    Ledger(table).charge(1, 500)
    assert Ledger(successor, []).outstanding_tokens(REPLICAS) == [0.0, 0.0, 0.0]
    assert table.outstanding_tokens[1] == 0
    table.close()
    successor.close()
