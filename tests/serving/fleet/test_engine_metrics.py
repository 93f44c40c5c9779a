"""Engine metrics under one vocabulary: what is read of each engine's text, and what is shown when."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector
from scripted_engine import head, json_reply

from serving.config import ReplicaConfig
from serving.engines import dialect_of
from serving.engines.metrics_map import EngineMetric
from serving.fleet import engine_metrics
from serving.fleet.engine_metrics import MAPS, EngineScraper, EngineTable, Target, read
from serving.routing.snapshot import Replica

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from prometheus_client.core import Metric
    from scripted_engine import ScriptedEngine, StartEngine

    from serving.config import EngineKind

VLLM = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 100.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e9
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 250.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 9.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="old",waiting_lora_adapters=""} 1.0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="a,b",waiting_lora_adapters="b,c"} 2.0
vllm:time_to_first_token_seconds_bucket{le="0.1"} 1.0
"""
SGLANG = b"""\
sglang:num_running_reqs{dp_rank="0",model_name="m",tp_rank="0"} 2.0
sglang:num_running_reqs{dp_rank="0",model_name="m",tp_rank="1"} 2.0
sglang:num_running_reqs{dp_rank="1",model_name="m",tp_rank="0"} 5.0
sglang:num_queue_reqs{model_name="m",tp_rank="0"} 1.0
sglang:token_usage{model_name="m",tp_rank="0"} 0.75
sglang:cache_hit_rate{model_name="m",tp_rank="0"} 0.4
sglang:num_retracted_requests_total{model_name="m",tp_rank="0"} 6.0
sglang:lora_pool_slots_used{model_name="m",tp_rank="0"} 3.0
sglang:prompt_tokens_total{is_streaming="true",model_name="m"} 70.0
sglang:prompt_tokens_total{is_streaming="false",model_name="m"} 30.0
sglang:cached_tokens_total{model_name="m"} 40.0
"""
TENSORRT_LLM = b"""\
trtllm_num_requests_running{engine_type="undefined",model_name="undefined"} 1.0
trtllm_num_requests_waiting{engine_type="undefined",model_name="undefined"} 2.0
trtllm_kv_cache_utilization{engine_type="undefined",model_name="undefined"} 0.125
trtllm_kv_cache_hit_rate{engine_type="undefined",model_name="undefined"} NaN
trtllm_prompt_tokens_total{engine_type="undefined",model_name="undefined"} 80.0
trtllm_prompt_cached_tokens_total{engine_type="undefined",model_name="undefined"} 8.0
"""
M = EngineMetric


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (
            "vllm",
            VLLM,
            {
                M.RUNNING: 7.0,
                M.WAITING: 5.0,
                M.KV_USAGE: 0.375,
                M.PREFIX_QUERIES: 1000.0,
                M.PREFIX_HITS: 250.0,
                M.PREEMPTIONS: 2.0,
                M.ADAPTERS_ACTIVE: 3,
            },
        ),
        (
            "sglang",
            SGLANG,
            {
                M.RUNNING: 7.0,
                M.WAITING: 1.0,
                M.KV_USAGE: 0.75,
                M.PREFIX_QUERIES: 100.0,
                M.PREFIX_HITS: 40.0,
                M.PREFIX_HIT_RATIO: 0.4,
                M.PREEMPTIONS: 6.0,
                M.ADAPTERS_ACTIVE: 3.0,
            },
        ),
        (
            "tensorrt-llm",
            TENSORRT_LLM,
            {
                M.RUNNING: 1.0,
                M.WAITING: 2.0,
                M.KV_USAGE: 0.125,
                M.PREFIX_QUERIES: 80.0,
                M.PREFIX_HITS: 8.0,
            },
        ),
        ("tensorrt-llm", b"kv_cache_hit_rate 0.5\n", {M.PREFIX_HIT_RATIO: 0.5}),
        ("vllm", b"", {}),
        ("vllm", b"<html>not metrics</html>", {}),
    ],
)
def test_read(kind: EngineKind, text: bytes, expected: dict[EngineMetric, float]) -> None:
    """Schedulers are added up or averaged, ranks are not counted twice, what is not there is left out."""
    assert read(text, MAPS[kind]) == expected


@pytest.mark.parametrize(
    "text",
    [
        b"vllm:num_requests_running{ 3.0\n",
        b"vllm:num_requests_running x\n",
        b"vllm:num_requests_running \xff\n",
        b'vllm:num_requests_running{engine="0"} 1\n' * 5000,
    ],
)
def test_what_is_not_an_exposition(text: bytes) -> None:
    """A ValueError, whatever it is."""
    with pytest.raises(ValueError):  # noqa: PT011 - any message
        read(text, MAPS["vllm"])


def test_tensorrt_llm_is_never_drained() -> None:
    """Its `/metrics` gives each statistic to one reader only."""
    assert MAPS["tensorrt-llm"].path == "/prometheus/metrics"


class _Shown(Collector):
    def __init__(self, table: EngineTable, *names: str) -> None:
        self._table = table
        self._names = names

    def collect(self) -> Iterable[Metric]:
        return self._table.families(self._names)

    def lines(self) -> set[str]:
        registry = CollectorRegistry()
        registry.register(self)
        text = generate_latest(registry).decode()
        return {line for line in text.splitlines() if not line.startswith("#")}


def _replica(engine: ScriptedEngine, kind: EngineKind = "vllm", index: int = 0) -> Replica:
    config = ReplicaConfig.parse(f"{kind}={engine.url}")
    return Replica(index, config.name, config.host, config.port, dialect_of(kind))


def _plain(text: bytes, status: int = 200) -> list[bytes]:
    return [head(status, f"content-length: {len(text)}", "content-type: text/plain"), text]


async def test_scraped_shared_and_shown(
    start_engine: StartEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three engines, one vocabulary, read by another process's table; each by its own path."""
    monkeypatch.setattr(engine_metrics, "INTERVAL_S", 0.05)
    kinds: list[EngineKind] = ["vllm", "sglang", "tensorrt-llm"]
    engines = [await start_engine() for _ in kinds]
    for engine, text in zip(engines, (VLLM, SGLANG, TENSORRT_LLM), strict=True):
        engine.probe_script = _plain(text)
    replicas = [_replica(engine, kind) for engine, kind in zip(engines, kinds, strict=True)]
    targets = [Target(replica, 2) for replica in replicas]
    writing, reading = EngineTable(tmp_path), EngineTable(tmp_path)
    shown = _Shown(reading, *(replica.name for replica in replicas))
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(EngineScraper(writing, "key", lambda: targets).run())
        await eventually(lambda: all(len(engine.probes) > 1 for engine in engines))
        lines = shown.lines()
        running.cancel()
    labels = [f'engine="{one.dialect.kind}",replica="{one.name}"' for one in replicas]
    expected = {
        f"headrace_engine_requests_running{{{labels[0]}}} 7.0",
        f"headrace_engine_requests_running{{{labels[1]}}} 7.0",
        f"headrace_engine_requests_running{{{labels[2]}}} 1.0",
        f"headrace_engine_prefix_cache_hits_total{{{labels[0]}}} 250.0",
        f"headrace_engine_prefix_cache_hits_total{{{labels[1]}}} 40.0",
        f"headrace_engine_prefix_cache_hits_total{{{labels[2]}}} 8.0",
        f"headrace_engine_preemptions_total{{{labels[0]}}} 2.0",
        f"headrace_engine_adapters_loaded{{{labels[0]}}} 2.0",
        f"headrace_engine_adapters_active{{{labels[0]}}} 3.0",
    }
    swapped = {_swap_labels(line) for line in lines}
    assert expected <= lines | swapped
    assert not any("adapters_loaded" in line and "tensorrt" in line for line in lines)
    assert [engine.probes[0].target for engine in engines] == [
        "/metrics",
        "/metrics",
        "/prometheus/metrics",
    ]
    assert engines[0].probes[0].headers["authorization"] == "Bearer key"
    assert _Shown(reading, "another").lines() == set()


def _swap_labels(line: str) -> str:
    """The same line with its two labels in the other order."""
    name, _, rest = line.partition("{")
    labels, _, value = rest.partition("}")
    return f"{name}{{{','.join(reversed(labels.split(',')))}}}{value}"


async def test_stale_values_vanish(
    scripted: ScriptedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three misses nothing is shown; the next success shows it again."""
    monkeypatch.setattr(engine_metrics, "INTERVAL_S", 0.05)
    scripted.probe_script = _plain(VLLM)
    replica = _replica(scripted)
    table = EngineTable(tmp_path)
    shown = _Shown(table, replica.name)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(EngineScraper(table, None, lambda: [Target(replica, 0)]).run())
        await eventually(lambda: shown.lines() != set())
        for bad in (
            _plain(b"", 404),
            json_reply({"detail": "Not Found"}),
            _plain(b"vllm:num_requests_running x\n"),
            _plain(b"#" * (engine_metrics.MAX_BODY_BYTES + 1)),
        ):
            scripted.probe_script = bad
            await eventually(lambda: shown.lines() == set())
            scripted.probe_script = _plain(VLLM)
            await eventually(lambda: shown.lines() != set())
        scripted.refuse()
        await eventually(lambda: shown.lines() == set())
        running.cancel()
