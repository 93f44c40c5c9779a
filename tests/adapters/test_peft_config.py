"""adapter_config.json from strangers: any JSON and any bytes are read or refused, never anything else."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from adapter_folders import adapter_config, make_adapter, make_base
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.base_model import read_base_model
from adapters.compat import EngineLimits, lint
from adapters.errors import InvalidAdapter
from adapters.module_patterns import ModulePattern
from adapters.strict_json import MAX_JSON_BYTES

LIMITS = [
    EngineLimits(kind=kind, max_lora_rank=16, max_loras=2)
    for kind in ("vllm", "sglang", "tensorrt-llm")
]
FIELDS = sorted(adapter_config())
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from(["all", "LORA", "pissa", "(((", "q_proj", "lm_head", "\x00", "a" * 500])
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A plain adapter and its base model."""
    root = tmp_path_factory.mktemp("config")
    base = read_base_model(make_base(root / "base"), "tiny-llama")
    return make_adapter(root / "adapter"), base


def lint_with(adapter, raw):
    """Lint the adapter with some bytes for a configuration; None where it is refused as no adapter."""
    folder, base = adapter
    (folder / "adapter_config.json").write_bytes(raw)
    try:
        return lint(folder, base, LIMITS)
    except InvalidAdapter as error:
        if not 0 < len(str(error)) < 2000:
            pytest.fail(f"an error of {len(str(error))} characters")
        return None


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
@settings(max_examples=500, deadline=None)
def test_any_values_are_read_or_refused(adapter, changes):
    """A plain adapter with any values in any fields: a report with three verdicts, or InvalidAdapter."""
    report = lint_with(adapter, json.dumps({**adapter_config(), **changes}).encode())
    if report is not None:
        assert [verdict.engine for verdict in report.verdicts] == LIMITS
        assert all(verdict.reasons for verdict in report.verdicts)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused(adapter, raw):
    """Bytes that are no adapter's configuration are InvalidAdapter."""
    assert lint_with(adapter, raw) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b'{"r":' * 100_000,
        b'{"r":' + b"9" * 10_000 + b"}",
        b'{"r": NaN}',
        b'{"r": 1, "r": 2}',
        b"\xef\xbb\xbf{}",
        b" " * (MAX_JSON_BYTES + 1),
        b"",
    ],
    ids=["deep list", "deep object", "long number", "nan", "twice", "bom", "large", "empty"],
)
def test_hostile_json_is_refused(adapter, raw):
    """Depth, size, doubled keys and impossible numbers."""
    assert lint_with(adapter, raw) is None


@pytest.mark.parametrize("key", ["(a+)+$", "(.*)*x", "(a|a)*b", ".*.*.*.*.*c", "([a-z]+)+!"])
def test_expressions_that_would_take_long_are_not_run(adapter, key):
    """A pattern of a stranger costs no time; what it says is unknown."""
    began_s = time.perf_counter()
    report = lint_with(adapter, json.dumps(adapter_config(rank_pattern={key: 4})).encode())
    assert time.perf_counter() - began_s < 2.0
    assert "pattern-unchecked" in {finding.code for finding in report.findings}


def test_a_hostile_crowd_of_modules_takes_no_time(adapter, tmp_path):
    """Thousands of modules, each with a name of its own, under patterns: judged within seconds."""
    names = [f"base_model.model.{'a.' * 50}{index}" for index in range(5000)]
    tensors = {
        f"{name}.lora_{p}.weight": np.ones((1, 1), np.float16) for name in names for p in "AB"
    }
    patterns = {f"{'a.' * index}*x{index}": 1 for index in range(4)}
    folder = make_adapter(tmp_path, rank=1, tensors=tensors, rank_pattern=patterns)
    began_s = time.perf_counter()
    report = lint(folder, adapter[1], LIMITS, scan_values=True)
    assert time.perf_counter() - began_s < 20.0
    assert "module-not-in-base" in {finding.code for finding in report.findings}


def test_the_first_key_that_matches_counts():
    """As PEFT's get_pattern_key has it: suffixes at a dot, in the order given."""
    pattern = ModulePattern(
        {"layers.0.self_attn.q_proj": 1, "q_proj": 2, r"layers\.1\..*_proj": 3, "^lm_head": 4}
    )
    named = {
        "model.layers.0.self_attn.q_proj": 1,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.self_attn.v_proj": 3,
        "model.layers.2.self_attn.xq_proj": None,
        "lm_head": 4,
        "model.lm_head": None,
    }
    assert {module: pattern.value_of(module) for module in named} == named
    assert pattern.is_known
