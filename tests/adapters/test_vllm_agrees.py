"""The linter's verdict for vLLM against vLLM's own code: it loads every case into a real Llama of vLLM's.

One process imports vLLM, once for the file; nothing here needs an engine.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_folders import make_base
from lint_cases import CASES, make_case

from adapters.base_model import read_base_model
from adapters.compat import EngineLimits, lint
from adapters.lora_tensors import sort_tensors
from adapters.safetensors_header import read_header

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

LOADER = Path(__file__).with_name("vllm_loader.py")
TOLERANCE = 1e-3
# What vLLM takes in silence though the adapter is broken or is another model's: the linter refuses it, with this.
STRICTER = {
    "float64": "dtype-unsupported",
    "int8": "dtype-unsupported",
    "alpha 0": "no-effect",
    "module in a wrong place": "module-not-in-base",
    "layer too many": "module-not-in-base",
    "narrower base": "shape-mismatch",
    "r of another": "rank-mismatch",
    "A without B, scale 1": "pair-incomplete",
    "B without A": "pair-incomplete",
}
# Its product of B and A is right: what is wrong lies outside of the linear modules.
WRONG_ELSEWHERE = {"embedding resized", "added tokens", "new embeddings", "arrow"}
LAUNCHED = {
    "plain": ["qkv_proj", "o_proj"],
    "all linear": ["q_proj", "o_proj", "down_proj"],
    "gate alone": ["gate_up_proj"],
    "k and v": ["q_proj"],
}


def trained_scales(folder: Path) -> dict[str, float]:
    """Return what training multiplied each linear module's B A by, from PEFT's own formula."""
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = sort_tensors(read_header(folder / "adapter_model.safetensors").tensors).modules
    scales = {}
    for path, module in modules.items():
        if ".layers." not in path or module.a is None or module.b is None:
            continue
        rank = by_pattern(config["rank_pattern"], path, config["r"])
        alpha = by_pattern(config["alpha_pattern"], path, config["lora_alpha"])
        scales[path] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return scales


def by_pattern(pattern, path, default):
    """PEFT's `get_pattern_key`, without our limits."""
    keys = (key for key in pattern if re.match(rf"(.*\.)?({key})$", path))
    return pattern.get(next(keys, None), default)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The base model and the adapters of all cases."""
    root = tmp_path_factory.mktemp("cases")
    make_base(root / "base")
    for name in CASES:
        make_case(root / name, name)
    return root


@pytest.fixture(scope="module")
def answers(folders) -> dict[tuple[str, bool], dict]:
    """What vLLM did with each case, by the case's name and whether vLLM was launched for some modules only."""

    def group(names, target_modules=None):
        adapters = [
            {
                "folder": str(folders / n),
                "scales": {} if n == "no prefix" else trained_scales(folders / n),
            }
            for n in names
        ]
        base = str(folders / "base")
        return {
            "base": base,
            "max_lora_rank": 16,
            "target_modules": target_modules,
            "adapters": adapters,
        }

    groups = [group(CASES), *(group([name], modules) for name, modules in LAUNCHED.items())]
    keys = [*((name, False) for name in CASES), *((name, True) for name in LAUNCHED)]
    ran = subprocess.run(
        [sys.executable, str(LOADER), str(folders)],
        input=json.dumps(groups),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    flat = [answer for each in json.loads(ran.stdout.splitlines()[-1]) for answer in each]
    return dict(zip(keys, flat, strict=True))


def verdict_of(folders, name, target_modules=None):
    """Return the linter's verdict for such a vLLM."""
    base = read_base_model(folders / "base", "tiny-llama")
    modules = None if target_modules is None else tuple(target_modules)
    limits = EngineLimits(
        kind="vllm", version="0.32.0", max_lora_rank=16, max_loras=1, target_modules=modules
    )
    return lint(folders / name, base, [limits]).verdicts[0]


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRICTER])
def test_the_verdict_is_what_vllm_does(folders, answers, name):
    """An adapter loads exactly where vLLM takes it, and is faithful where vLLM holds the trained product."""
    verdict, answer = verdict_of(folders, name), answers[name, False]
    assert verdict.loads == (answer["error"] is None), (verdict.reason, answer["error"])
    if verdict.loads and name not in WRONG_ELSEWHERE:
        assert verdict.is_faithful == (answer["deviation"] < TOLERANCE), answer


@pytest.mark.parametrize("name", STRICTER)
def test_what_vllm_takes_in_silence_is_refused(folders, answers, name):
    """The linter says what is wrong with an adapter that vLLM loads without a word."""
    verdict, answer = verdict_of(folders, name), answers[name, False]
    assert answer["error"] is None
    assert not verdict.loads
    assert STRICTER[name] in {finding.code for finding in verdict.reasons}


@pytest.mark.parametrize("name", LAUNCHED)
def test_modules_that_vllm_was_not_launched_for(folders, answers, name):
    """vLLM loads the adapter and leaves modules out exactly where the linter says so."""
    verdict, answer = verdict_of(folders, name, LAUNCHED[name]), answers[name, True]
    assert answer["error"] is None
    assert verdict.loads
    assert verdict.is_faithful == (answer["deviation"] < TOLERANCE), answer
