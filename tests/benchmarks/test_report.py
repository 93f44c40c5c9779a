"""The report of the gateway benchmark computes what it says it does."""

import pytest

from benchmarks.load import LoadResult
from benchmarks.report import Round, cost_rows, goals, markdown, summarise


def result(cpu_s, requests=0, events=0, p50_ms=0.0):
    """One measured window of two seconds."""
    quantiles = {"p50": p50_ms, "p90": p50_ms, "p99": 2 * p50_ms, "max": p50_ms}
    return LoadResult(2.0, requests, events, cpu_s, 0.0, quantiles, {})


def one_round(proxy, number, request_us, event_us, p50_ms):
    """A round with given costs."""
    phases = {
        "requests": result(request_us * 1e-6 * 1000, requests=1000),
        "steps": result(event_us * 1e-6 * 1000, events=1000),
        "streams": result((100 + 10 * event_us) * 1e-6 * 50, requests=50),
        "latency": result(0.0, p50_ms=p50_ms),
    }
    return Round(proxy, number, phases)


ROUNDS = [
    Round("direct", 0, {"latency": result(0.0, p50_ms=0.2)}),
    Round("direct", 1, {"latency": result(0.0, p50_ms=0.3)}),
    *(one_round("headrace", number, 30.0, 12.0, 0.4) for number in range(2)),
    *(one_round("haproxy", number, 20.0, 10.0, 0.4) for number in range(2)),
    *(one_round("vllm-router", number, 80.0 + 20 * number, 20.0, 0.9) for number in range(2)),
    *(one_round("sglang-router", number, 120.0, 18.0, 0.9) for number in range(2)),
]


def test_summary_is_median_over_rounds():
    """Costs are per request and per event; added latency is against the same round's control."""
    summary = summarise(ROUNDS, tokens_per_stream=10)
    request = summary["vllm-router"]["request_us"]
    assert (request.median, request.least, request.greatest) == pytest.approx((90, 80, 100))
    assert summary["headrace"]["event_us"].median == pytest.approx(12)
    assert summary["headrace"]["stream_us"].median == pytest.approx(100)
    assert summary["headrace"]["requests_per_s"].median == 500
    assert summary["headrace"]["added_p50_ms"].median == pytest.approx(0.15)
    assert "direct" not in summary


def test_goals_compare_with_the_best_peer():
    """Requests are judged against the cheaper router, events also against HAProxy."""
    found = {goal.title: goal for goal in goals(summarise(ROUNDS, 10))}
    assert found["CPU per request / better router"].value == pytest.approx(30 / 90)
    assert found["CPU per event / better router"].value == pytest.approx(12 / 18)
    assert found["CPU per event / HAProxy"].value == pytest.approx(1.2)
    assert found["CPU per event / HAProxy"].is_met
    assert "CPU per lone event / HAProxy" not in found


def test_goals_need_both_routers():
    """With one router left out nothing is said of the better one."""
    some = [one for one in ROUNDS if one.proxy != "sglang-router"]
    titles = [goal.title for goal in goals(summarise(some, 10))]
    assert "CPU per request / better router" not in titles
    assert "CPU per event / HAProxy" in titles


def test_markdown_table():
    """A header, a rule and a row a proxy, with the range of the rounds if wanted."""
    summary = {"vllm-router": summarise(ROUNDS, 10)["vllm-router"]}
    rows = cost_rows(summary, {"vllm-router": "1.0"}, show_range=True)
    header, rule, row = markdown(rows).splitlines()
    assert header.startswith("| proxy | CPU per request (µs) |")
    assert rule.startswith("| --- | ---: |")
    assert row.startswith("| vllm-router 1.0 | 90.0 (80.0\N{EN DASH}100.0) |")
