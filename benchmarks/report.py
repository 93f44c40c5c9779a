"""What the rounds of the gateway benchmark come to: medians, ratios to the goals, tables.

Pure functions of the measurements; never runs anything. Called by `benchmarks/gateway_cost.py`.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Literal

import msgspec

from benchmarks.load import LoadResult  # noqa: TC001 - msgspec reads it at run time

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Phase = Literal["requests", "steps", "staggered", "streams", "latency"]
CONTROL = "direct"
OURS = "headrace"
REFERENCE = "haproxy"
ROUTERS = ("sglang-router", "vllm-router")

_US_PER_S = 1e6


class Round(msgspec.Struct, frozen=True):
    """All that one proxy (or the direct control) did in one round."""

    proxy: str
    number: int
    phases: dict[Phase, LoadResult]


class Spread(msgspec.Struct, frozen=True):
    """Median of the rounds, with the least and the greatest."""

    median: float
    least: float
    greatest: float


class Metric(msgspec.Struct, frozen=True):
    """One column: what it is called and how it is printed."""

    title: str
    digits: int


METRICS: dict[str, Metric] = {
    "request_us": Metric("CPU per request (µs)", 1),
    "event_us": Metric("CPU per streamed event (µs)", 1),
    "lone_event_us": Metric("CPU per event, lone arrivals (µs)", 1),
    "stream_us": Metric("CPU per stream beside its events (µs)", 0),
    "added_p50_ms": Metric("added p50 (ms)", 2),
    "added_p99_ms": Metric("added p99 (ms)", 2),
    "requests_per_s": Metric("requests/s", 0),
    "core_share": Metric("core in use", 2),
}


class Goal(msgspec.Struct, frozen=True):
    """One number of the design that is checked here."""

    title: str
    limit: float
    value: float

    @property
    def is_met(self) -> bool:
        """Whether the measured value is within the limit."""
        return self.value <= self.limit


def _per_event_us(phase: LoadResult) -> float:
    return phase.cpu_s / max(1, phase.num_events) * _US_PER_S


def round_metrics(
    measured: Round, control: Round | None, tokens_per_stream: int
) -> dict[str, float]:
    """The columns of one proxy in one round.

    Args:
        measured: The proxy's round.
        control: The same round without a proxy, for added latency.
        tokens_per_stream: Length of a stream in the `streams` phase. Each token is one write of
            the engine; the role event and `[DONE]` share a write with a token.
    """
    metrics: dict[str, float] = {}
    phases = measured.phases
    if requests := phases.get("requests"):
        metrics["request_us"] = requests.cpu_s / max(1, requests.num_requests) * _US_PER_S
        metrics["requests_per_s"] = requests.num_requests / requests.window_s
        metrics["core_share"] = requests.cpu_s / requests.window_s
    if steps := phases.get("steps"):
        metrics["event_us"] = _per_event_us(steps)
        if streams := phases.get("streams"):
            whole_us = streams.cpu_s / max(1, streams.num_requests) * _US_PER_S
            metrics["stream_us"] = whole_us - tokens_per_stream * metrics["event_us"]
    if staggered := phases.get("staggered"):
        metrics["lone_event_us"] = _per_event_us(staggered)
    latency = phases.get("latency")
    if latency and control and latency.latency_ms:
        direct = control.phases["latency"].latency_ms
        for quantile in ("p50", "p99"):
            added = latency.latency_ms[quantile] - direct[quantile]
            metrics[f"added_{quantile}_ms"] = added
    return metrics


def summarise(rounds: Sequence[Round], tokens_per_stream: int) -> dict[str, dict[str, Spread]]:
    """Median, least and greatest of every column, by proxy."""
    controls = {one.number: one for one in rounds if one.proxy == CONTROL}
    samples: dict[str, dict[str, list[float]]] = {}
    for one in rounds:
        if one.proxy == CONTROL:
            continue
        metrics = round_metrics(one, controls.get(one.number), tokens_per_stream)
        for name, value in metrics.items():
            samples.setdefault(one.proxy, {}).setdefault(name, []).append(value)
    return {
        proxy: {
            name: Spread(statistics.median(values), min(values), max(values))
            for name, values in columns.items()
        }
        for proxy, columns in samples.items()
    }


def goals(summary: Mapping[str, Mapping[str, Spread]]) -> list[Goal]:
    """The design's numbers that these measurements can judge."""
    ours = summary.get(OURS, {})
    found: list[Goal] = []

    def against(title: str, metric: str, limit: float, others: Sequence[str]) -> None:
        known = [summary[name][metric].median for name in others if metric in summary.get(name, {})]
        if metric in ours and len(known) == len(others):
            found.append(Goal(title, limit, ours[metric].median / min(known)))

    against("CPU per request / better router", "request_us", 0.4, ROUTERS)
    against("CPU per event / better router", "event_us", 0.75, ROUTERS)
    against("CPU per event / HAProxy", "event_us", 1.3, [REFERENCE])
    against("CPU per lone event / better router", "lone_event_us", 0.75, ROUTERS)
    against("CPU per lone event / HAProxy", "lone_event_us", 1.3, [REFERENCE])
    for quantile, limit in (("p50", 0.3), ("p99", 2.0)):
        if spread := ours.get(f"added_{quantile}_ms"):
            found.append(Goal(f"added {quantile} (ms)", limit, spread.median))
    return found


def _cell(spread: Spread | None, digits: int, show_range: bool) -> str:
    if spread is None:
        return ""
    text = f"{spread.median:,.{digits}f}"
    if show_range and spread.least != spread.greatest:
        text += f" ({spread.least:,.{digits}f}\N{EN DASH}{spread.greatest:,.{digits}f})"
    return text


def cost_rows(
    summary: Mapping[str, Mapping[str, Spread]], versions: Mapping[str, str], show_range: bool
) -> list[list[str]]:
    """Header and one row a proxy."""
    used = [name for name in METRICS if any(name in columns for columns in summary.values())]
    rows = [["proxy", *(METRICS[name].title for name in used)]]
    for proxy, columns in summary.items():
        cells = [_cell(columns.get(name), METRICS[name].digits, show_range) for name in used]
        rows.append([f"{proxy} {versions[proxy]}", *cells])
    return rows


def goal_rows(found: Sequence[Goal]) -> list[list[str]]:
    """Header and one row a goal."""
    rows = [["goal", "at most", "measured", ""]]
    for goal in found:
        verdict = "met" if goal.is_met else "missed"
        rows.append([goal.title, f"{goal.limit:g}", f"{goal.value:.2f}", verdict])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a header and rows; numbers are aligned to the right."""
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    header, *body = rows
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join([line(header), line(rule), *map(line, body)])
