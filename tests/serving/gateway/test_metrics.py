"""The exposition: what is counted, under which labels, summed over workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families
from running_gateway import sample_sum

from serving.gateway import metrics
from serving.gateway.metrics import Metrics, exposition
from serving.gateway.shared_table import SharedTable

if TYPE_CHECKING:
    from pathlib import Path

CHAT = ("/v1/chat/completions", "m", "127.0.0.1:1")
REFUSED = ("/v1/chat/completions", "", "")
LABELS = {"endpoint": CHAT[0], "model": CHAT[1], "replica": CHAT[2]}


def _two_workers(folder: Path) -> list[list[SharedTable]]:
    """The tables as each of two processes maps them."""
    paths = [folder / f"worker-{n}.f64" for n in range(2)]
    return [[SharedTable(path, metrics.NUM_COLUMNS) for path in paths] for _ in range(2)]


def test_sum_over_workers(tmp_path: Path) -> None:
    """Either worker answers for both; labels are whole though some of them are empty."""
    views = _two_workers(tmp_path)
    for worker in range(2):
        own = Metrics(views[worker][worker])
        own.of(CHAT).finish(200, 0.2)
        own.of(CHAT).add(metrics.IN_FLIGHT, 1)
        own.of(CHAT).add(metrics.PROMPT_TOKENS, 10)
        own.of(REFUSED).finish(401, 0.0)
        own.of(("other", "", "")).finish(404, 0.0)
        own.worker.add(metrics.CONNECTIONS, 3)
    for tables in views:
        text = exposition(tables, {"127.0.0.1:1": True, "127.0.0.1:2": False}).decode()
        assert sample_sum(text, "headrace_requests_total", code="200", **LABELS) == 2
        assert sample_sum(text, "headrace_requests_total", code="401", model="", replica="") == 2
        assert sample_sum(text, "headrace_requests_total", code="404", endpoint="other") == 2
        assert sample_sum(text, "headrace_requests_total") == 6
        assert sample_sum(text, "headrace_errors_total", endpoint=REFUSED[0], model="") == 2
        assert sample_sum(text, "headrace_errors_total", **LABELS) == 0
        assert sample_sum(text, "headrace_requests_in_flight") == 2
        assert sample_sum(text, "headrace_prompt_tokens_total", **LABELS) == 20
        assert sample_sum(text, "headrace_client_connections") == 6
        assert sample_sum(text, "headrace_replica_healthy", replica="127.0.0.1:1") == 1
        assert sample_sum(text, "headrace_replica_healthy", replica="127.0.0.1:2") == 0


def test_every_sample_has_all_its_labels(tmp_path: Path) -> None:
    """No label is lost and no series stands twice, in the eyes of the other worker too."""
    views = _two_workers(tmp_path)
    own = Metrics(views[0][0])
    for labels in (CHAT, REFUSED, ("other", "", "")):
        own.of(labels).finish(404, 0.1)
        own.of(labels).observe_itl(0.1)
    names = {
        "headrace_requests_total": {"endpoint", "model", "replica", "code"},
        "headrace_errors_total": {"endpoint", "model", "replica"},
        "headrace_request_duration_seconds_count": {"endpoint", "model", "replica"},
    }
    seen: list[tuple[str, frozenset[tuple[str, str]]]] = []
    for family in text_string_to_metric_families(exposition(views[1], {}).decode()):
        assert family.documentation
        for sample in family.samples:
            assert set(sample.labels) == names.get(sample.name, set(sample.labels))
            seen.append((sample.name, frozenset(sample.labels.items())))
    assert len(seen) == len(set(seen))
    assert {name for name, _ in seen} >= set(names)


def test_counters_survive_their_worker(tmp_path: Path) -> None:
    """A restarted worker goes on counting where the dead one was; gauges begin at zero."""
    for restarts in range(1, 4):
        views = _two_workers(tmp_path)
        own = Metrics(views[0][0])
        for labels in (CHAT, REFUSED):
            own.of(labels).finish(200, 0.1)
            own.of(labels).add(metrics.IN_FLIGHT, 1)
        own.worker.add(metrics.CONNECTIONS, 1)
        for tables in views:
            text = exposition(tables, {}).decode()
            assert sample_sum(text, "headrace_requests_total") == 2 * restarts
            assert sample_sum(text, "headrace_requests_in_flight") == 2
            assert sample_sum(text, "headrace_client_connections") == 1


def test_histograms(tmp_path: Path) -> None:
    """Buckets are cumulative, bounds are upper bounds, sums are sums."""
    (tables, _) = _two_workers(tmp_path)
    series = Metrics(tables[0]).of(CHAT)
    for seconds in (0.001, 0.0011, 100.0):
        series.observe_ttft(seconds)
    text = exposition(tables, {}).decode()
    name = "headrace_time_to_first_token_seconds"
    bucket = {
        bound: sample_sum(text, f"{name}_bucket", le=bound)
        for bound in ("0.001", "0.005", "80.0", "+Inf")
    }
    assert bucket == {"0.001": 1, "0.005": 2, "80.0": 2, "+Inf": 3}
    assert sample_sum(text, f"{name}_count") == 3
    assert abs(sample_sum(text, f"{name}_sum") - 100.0021) < 1e-9


def test_unknown_status_is_counted(tmp_path: Path) -> None:
    """A status that has no column of its own counts under `other`."""
    (tables, _) = _two_workers(tmp_path)
    Metrics(tables[0]).of(CHAT).finish(418, 0.1)
    text = exposition(tables, {}).decode()
    assert sample_sum(text, "headrace_requests_total", code="other") == 1
    assert sample_sum(text, "headrace_errors_total") == 1


def test_what_the_control_plane_answers_has_columns(tmp_path: Path) -> None:
    """Each status under its own code, and only those from 400 on are errors."""
    (tables, _) = _two_workers(tmp_path)
    well, errors = (200, 201, 202, 204), (401, 403, 404, 409, 412, 413, 415, 422)
    for status in (*well, *errors):
        Metrics(tables[0]).of(("/admin/v1", "", "")).finish(status, 0.1)
    text = exposition(tables, {}).decode()
    for status in (*well, *errors):
        assert sample_sum(text, "headrace_requests_total", code=str(status)) == 1
    assert sample_sum(text, "headrace_requests_total") == len(well) + len(errors)
    assert sample_sum(text, "headrace_errors_total") == len(errors)
