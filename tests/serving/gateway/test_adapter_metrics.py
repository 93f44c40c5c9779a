"""What is counted of adapter versions, and how its table stays bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.gateway import adapter_metrics
from serving.gateway.adapter_metrics import AdapterMetrics, Totals, open_tables, totals
from serving.gateway.traffic_report import TrafficReport
from serving.routing.snapshot import Model

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def _model(name: str, version: str) -> Model:
    return Model(name, version, {}, None, "m", {}, frozenset())


def test_totals_are_of_all_workers_and_names(tmp_path: Path) -> None:
    """A version's traffic, whichever worker and alias it came by."""
    tables = open_tables(tmp_path, 2)
    first, second = (AdapterMetrics(table, set) for table in tables)
    first.settle(_model("help", "a@1"), 200, 10, 5)
    second.settle(_model("a@1", "a@1"), 503, 0, 0)
    second.settle(_model("other", "b@2"), 200, 1, 1)
    assert totals(tables) == {"a@1": Totals(2.0, 15.0), "b@2": Totals(1.0, 2.0)}
    for table in tables:
        table.close()


def test_rows_of_the_unpublished_are_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full table takes a new version in the place of one that is gone, never of one that is served."""
    monkeypatch.setattr(adapter_metrics, "MAX_ROWS", 4)
    tables = open_tables(tmp_path, 1)
    published = {"a@1", "b@1", "c@1"}
    counted = AdapterMetrics(tables[0], lambda: published)
    for version in ("a@1", "b@1", "c@1"):
        counted.settle(_model("x", version), 200, 1, 1)
    counted.settle(_model("x", "d@1"), 200, 1, 1)
    assert set(totals(tables)) == {"a@1", "b@1", "c@1"}
    assert tables[0].overflows == 1
    published -= {"b@1"}
    published |= {"e@1"}
    counted.settle(_model("x", "e@1"), 200, 2, 2)
    counted.settle(_model("x", "a@1"), 200, 1, 1)
    assert totals(tables) == {
        "a@1": Totals(2.0, 4.0),
        "c@1": Totals(1.0, 2.0),
        "e@1": Totals(1.0, 4.0),
    }
    tables[0].close()


def test_report_survives_a_row_that_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences are never negative, and what was not taken is reported again."""
    monkeypatch.setattr(adapter_metrics, "MAX_ROWS", 2)
    tables = open_tables(tmp_path, 1)
    published: set[str] = set()
    counted = AdapterMetrics(tables[0], lambda: published)
    report = TrafficReport("g", tables)
    assert report.body() is None
    for _ in range(3):
        counted.settle(_model("x", "a@1"), 200, 1, 1)
    wanted = b'{"gateway":"g","versions":{"a@1":{"requests":3,"tokens":6}}}'
    assert report.body() == wanted
    assert report.body() == wanted
    report.taken()
    assert report.body() is None
    counted.settle(_model("x", "b@1"), 200, 1, 1)
    counted.settle(_model("x", "a@1"), 200, 1, 0)
    assert report.body() == b'{"gateway":"g","versions":{"a@1":{"requests":1,"tokens":1}}}'
    tables[0].close()
