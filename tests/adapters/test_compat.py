"""The linter: one row a case, what each engine does with it, and why."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from adapter_folders import ALL_LINEAR, lora_tensors, make_adapter, make_base
from lint_cases import CASES, change_config, make_case
from lint_verdicts import ENGINES, FAITHFUL, LOADS, REFUSED, REMARKS, TABLE

from adapters.base_model import read_base_model
from adapters.compat import EngineLimits, Severity, lint
from adapters.errors import InvalidAdapter

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapter-compatibility.md"


def limits(kind, **launched):
    """Return how a replica was launched: for rank 16 on every module unless told otherwise."""
    return EngineLimits(kind=kind, **{"max_lora_rank": 16, "max_loras": 4, **launched})


def outcome(verdict):
    """Return what a verdict comes to."""
    if verdict.is_faithful:
        return FAITHFUL
    return LOADS if verdict.loads else REFUSED


def codes(findings):
    """Return the codes of findings."""
    return {finding.code for finding in findings}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny Llama."""
    return read_base_model(make_base(tmp_path_factory.mktemp("base")), "tiny-llama")


@pytest.fixture
def lint_case(tmp_path, base):
    """Lints a case for replicas of the three engines."""

    def run(name, *engines):
        folder = make_case(tmp_path / "adapter", name)
        return lint(folder, base, engines or [limits(kind) for kind in ENGINES])

    return run


@pytest.mark.parametrize("name", TABLE)
def test_what_each_engine_does_and_why(lint_case, name):
    """Each engine's verdict is the table's, for the table's reason."""
    report = lint_case(name)
    for verdict, expected in zip(report.verdicts, TABLE[name], strict=True):
        wanted, code = (expected, "fits") if isinstance(expected, str) else expected
        kind = verdict.engine.kind
        assert (kind, outcome(verdict)) == (kind, wanted), verdict.reasons
        assert code in codes(verdict.reasons), kind


@pytest.mark.parametrize("name", REMARKS)
def test_what_is_said_of_the_adapter_itself(lint_case, name):
    """A remark has its severity, and refuses nothing."""
    code, severity = REMARKS[name]
    report = lint_case(name)
    assert {f.code: f.severity for f in report.findings}[code] is severity
    assert not report.has_errors
    assert report.loads_somewhere()


def test_every_case_is_in_a_table():
    """No case is written and then forgotten."""
    elsewhere = {"rank 1", "named adapter", "A without B, scale 1"}
    assert set(CASES) - set(TABLE) - set(REMARKS) == elsewhere


def test_every_code_is_documented(tmp_path, base):
    """Whatever code a case gives stands in the documentation's tables."""
    documented = set(re.findall(r"`([a-z0-9-]+)`", DOCUMENT.read_text()))
    given = set()
    for number, name in enumerate(CASES):
        folder = make_case(tmp_path / str(number), name)
        report = lint(folder, base, [limits(kind) for kind in ENGINES])
        given |= codes(report.findings).union(*(codes(v.reasons) for v in report.verdicts))
    assert len(given) > 40
    assert given - documented == set()


def test_the_report_says_what_the_adapter_is(tmp_path, base):
    """Rank, alpha, modules, numbers and sizes are those of the files."""
    folder = make_adapter(tmp_path, target_modules=ALL_LINEAR, dtype=np.float16)
    report = lint(folder, base, [])
    num_attention = 8 * (64 + 64 + 2 * (64 + 32) + 64 + 64)
    num_mlp = 8 * 3 * (64 + 128)
    assert (report.rank, report.alpha, report.dtype) == (8, 16.0, "float16")
    assert report.target_modules == tuple(sorted(ALL_LINEAR))
    assert report.num_parameters == 2 * (num_attention + num_mlp)
    assert report.size_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert report.base_model == "tiny-llama"
    assert report.verdicts == ()
    assert report.loads_somewhere()


def test_an_unfaithful_adapter_is_refused_unless_allowed(lint_case):
    """rsLoRA on SGLang alone: refused, but for somebody who wants it so."""
    report = lint_case("rslora", limits("sglang"))
    assert not report.loads_somewhere()
    assert report.loads_somewhere(allow_unfaithful=True)
    assert "alpha/sqrt(r)" in report.verdicts[0].reason


def test_a_fleet_with_one_engine_that_serves_it_takes_it(lint_case):
    """The same adapter beside a vLLM is accepted."""
    assert lint_case("rslora", limits("sglang"), limits("vllm")).loads_somewhere()


def test_a_refusal_names_the_rank_to_launch_with(lint_case):
    """The reason of a rank says which launch flag would do."""
    report = lint_case("rank 12", limits("vllm", max_lora_rank=8))
    assert report.verdicts[0].reason == (
        "Rank 12 exceeds the 8 that vLLM was launched with: launch it with --max-lora-rank 16."
    )


def test_a_rank_that_vllm_cannot_be_launched_with(lint_case):
    """vLLM has a list of ranks, the others do not."""
    given = [limits(kind, max_lora_rank=24) for kind in ENGINES]
    assert [v.loads for v in lint_case("plain", *given).verdicts] == [False, True, True]


def test_a_rank_beyond_any_that_vllm_takes(tmp_path):
    """513 is nobody's in vLLM, and the sentence says so."""
    report = lint(make_adapter(tmp_path, rank=513), None, [limits("vllm", max_lora_rank=512)])
    assert "vLLM takes 512 at most" in report.verdicts[0].reason


def test_modules_that_a_replica_was_not_launched_for(lint_case):
    """vLLM and TensorRT-LLM leave them out in silence, SGLang refuses."""
    given = [limits(kind, target_modules=("q_proj", "k_proj", "v_proj")) for kind in ENGINES]
    verdicts = lint_case("all linear", *given).verdicts
    assert [outcome(v) for v in verdicts] == [LOADS, REFUSED, LOADS]
    assert all("module-not-launched" in codes(v.reasons) for v in verdicts)


def test_tensorrt_llm_names_of_launched_modules(lint_case):
    """TensorRT-LLM's own names are understood."""
    own = limits("tensorrt-llm", target_modules=("attn_q", "attn_v"))
    assert lint_case("plain", own).verdicts[0].is_faithful


def test_one_part_of_a_packed_module_brings_in_all_in_vllm(lint_case):
    """vLLM launched for k_proj wraps qkv_proj, so q_proj and v_proj work too."""
    verdict = lint_case("plain", limits("vllm", target_modules=("k_proj",))).verdicts[0]
    assert verdict.is_faithful


def test_strict_loading_fails_earlier(lint_case):
    """SGLang's flag changes when a stray tensor fails, and the reason says it."""
    lenient = lint_case("norm saved", limits("sglang")).verdicts[0]
    strict = lint_case("norm saved", limits("sglang", strict_loading=True)).verdicts[0]
    assert any("at the first request" in finding.message for finding in lenient.reasons)
    assert any("at loading" in finding.message for finding in strict.reasons)


def test_an_engine_of_another_version_is_noted(lint_case):
    """Rules are of one version; patterns are not known to hold before it."""
    old, new = limits("vllm", version="0.19.1"), limits("vllm", version="0.32.4")
    first, second = lint_case("alpha_pattern", old, new).verdicts
    assert codes(first.reasons) == {"rules-of-other-version", "pattern-old-version"}
    assert (outcome(first), outcome(second)) == (LOADS, FAITHFUL)


def test_a_replica_without_slots(lint_case):
    """A replica launched for no adapter takes none."""
    assert "no-slots" in codes(lint_case("plain", limits("vllm", max_loras=0)).verdicts[0].reasons)


def test_without_a_base_model_shapes_are_not_judged(tmp_path):
    """The report says that it did not look."""
    report = lint(make_case(tmp_path, "wider base"), None, [limits("vllm")])
    assert codes(report.findings) == {"base-unknown"}
    assert report.verdicts[0].is_faithful


def test_an_architecture_that_is_not_known(tmp_path):
    """Shapes are not judged by guesswork."""
    base = read_base_model(make_base(tmp_path / "base", model_type="mamba"), "tiny-llama")
    report = lint(make_case(tmp_path / "adapter", "wider base"), base, [limits("vllm")])
    assert codes(report.findings) == {"architecture-unknown"}


@pytest.mark.parametrize(("model_type", "loads"), [("llama", True), ("qwen2", False)])
def test_embeddings_are_a_matter_of_the_model_in_vllm(tmp_path, model_type, loads):
    """vLLM takes a LoRA of the embedding for some models only."""
    base = read_base_model(make_base(tmp_path / "base", model_type=model_type), "tiny-llama")
    report = lint(make_case(tmp_path / "adapter", "embedding"), base, [limits("vllm")])
    assert report.verdicts[0].loads is loads


def test_a_whole_head_of_a_classifier(tmp_path):
    """The one kind of modules_to_save that vLLM takes."""
    folder = make_base(tmp_path / "base", architectures=["LlamaForSequenceClassification"])
    base = read_base_model(folder, "tiny-llama")
    report = lint(make_case(tmp_path / "adapter", "score saved"), base, [limits("vllm")])
    assert report.verdicts[0].is_faithful


def test_an_adapter_in_a_subfolder_is_named(tmp_path):
    """PEFT saves adapters that are not 'default' one folder down; the error says which."""
    make_adapter(tmp_path / "outer" / "support")
    with pytest.raises(InvalidAdapter, match="subfolder 'support'"):
        lint(tmp_path / "outer", None, [])


def test_a_pickled_adapter_is_refused(tmp_path):
    """A pickle is not opened, whatever it holds."""
    folder = make_adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(InvalidAdapter, match="pickled, which can run code"):
        lint(folder, None, [])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"r": -8}, "r: Input should be greater than or equal to 1"),
        ({"r": 10**9}, "r: Input should be less than"),
        ({"r": "8"}, "r: Input should be a valid integer"),
        ({"r": True}, "r: Input should be a valid integer"),
        ({"lora_alpha": 1e308}, "lora_alpha: Input should be less than"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 1e308}}, "alpha_pattern"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"use_dora": "no"}, "use_dora"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ],
)
def test_impossible_configurations(tmp_path, fields, reason):
    """A field of an impossible type or value is named."""
    folder = make_adapter(tmp_path)
    change_config(folder, fields)
    with pytest.raises(InvalidAdapter, match=reason):
        lint(folder, None, [])


def test_a_named_adapters_raw_state(tmp_path):
    """A state dict with the adapter's name in its keys holds no LoRA that anybody reads."""
    tensors = {n.replace(".weight", ".default.weight"): t for n, t in lora_tensors().items()}
    with pytest.raises(InvalidAdapter, match="no LoRA tensors"):
        lint(make_adapter(tmp_path, tensors=tensors), None, [])


def test_values_are_looked_at_only_when_asked(tmp_path, base):
    """NaN is an error of the adapter, found by the scan alone."""
    tensors = lora_tensors()
    next(iter(tensors.values()))[3, 5] = np.nan
    folder = make_adapter(tmp_path, tensors=tensors)
    assert lint(folder, base, [limits("vllm")]).verdicts[0].is_faithful
    report = lint(folder, base, [limits("vllm")], scan_values=True)
    assert codes(report.findings) == {"not-finite"}
    assert not report.verdicts[0].loads


def test_an_untrained_adapter_does_nothing(tmp_path, base):
    """B of zeros everywhere is how PEFT begins: refused; somewhere: a warning."""
    tensors = {n: t * ("lora_A" in n) for n, t in lora_tensors().items()}
    every = lint(make_adapter(tmp_path / "every", tensors=tensors), base, [], scan_values=True)
    assert {f.code: f.severity for f in every.findings} == {"no-effect": Severity.ERROR}
    one = {n: t * (n != next(iter(tensors))) for n, t in lora_tensors().items()}
    some = lint(make_adapter(tmp_path / "some", tensors=one), base, [], scan_values=True)
    assert {f.code: f.severity for f in some.findings} == {"a-zero": Severity.WARNING}
    halves = {n: t * ("layers.0" not in n or "lora_A" in n) for n, t in lora_tensors().items()}
    half = lint(make_adapter(tmp_path / "half", tensors=halves), base, [], scan_values=True)
    assert codes(half.findings) == {"b-zero"}
