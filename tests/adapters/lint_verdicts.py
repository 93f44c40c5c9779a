"""What the linter says of each case of `lint_cases.py`: the expected verdicts and remarks."""

from __future__ import annotations

from adapters.compat import Severity

ENGINES = ("vllm", "sglang", "tensorrt-llm")
FAITHFUL, LOADS, REFUSED = "faithful", "loads", "refused"
# Case: what vLLM, SGLang and TensorRT-LLM do, each with the codes that make it so.
TABLE = {
    "plain": (FAITHFUL, FAITHFUL, FAITHFUL),
    "all linear": (FAITHFUL, FAITHFUL, FAITHFUL),
    "all-linear by name": (FAITHFUL, FAITHFUL, FAITHFUL),
    "expression": (FAITHFUL, (REFUSED, "target-modules-expression"), FAITHFUL),
    "no target_modules": (
        (REFUSED, "target-modules-missing"),
        (REFUSED, "target-modules-missing"),
        FAITHFUL,
    ),
    "null target_modules": (FAITHFUL, (REFUSED, "target-modules-missing"), FAITHFUL),
    "q alone": (FAITHFUL, (REFUSED, "q-without-v"), FAITHFUL),
    "k and v": (FAITHFUL, (REFUSED, "kv-without-q"), FAITHFUL),
    "gate alone": (FAITHFUL, FAITHFUL, FAITHFUL),
    "up alone": (FAITHFUL, (REFUSED, "up-without-gate"), FAITHFUL),
    "one layer": (FAITHFUL, FAITHFUL, FAITHFUL),
    "rank 12": (FAITHFUL, FAITHFUL, FAITHFUL),
    "rank 32": tuple((REFUSED, "rank-too-large") for _ in ENGINES),
    "float16": (FAITHFUL, FAITHFUL, FAITHFUL),
    "bfloat16": (FAITHFUL, FAITHFUL, FAITHFUL),
    "float64": tuple((REFUSED, "dtype-unsupported") for _ in ENGINES),
    "int8": tuple((REFUSED, "dtype-unsupported") for _ in ENGINES),
    "rslora": (FAITHFUL, (LOADS, "rslora"), FAITHFUL),
    "rslora of rank 1": (FAITHFUL, FAITHFUL, FAITHFUL),
    "dora": ((REFUSED, "dora"), (REFUSED, "dora"), (LOADS, "dora")),
    "dora undeclared": ((REFUSED, "dora"), (REFUSED, "dora"), (LOADS, "dora")),
    "rank_pattern": (FAITHFUL, (REFUSED, "rank-pattern"), FAITHFUL),
    "rank_pattern too large": (
        (REFUSED, "rank-too-large"),
        (REFUSED, "rank-pattern"),
        (REFUSED, "rank-too-large"),
    ),
    "rank_pattern of nothing": (FAITHFUL, FAITHFUL, FAITHFUL),
    "alpha_pattern": (FAITHFUL, (LOADS, "alpha-pattern"), (LOADS, "alpha-pattern")),
    "alpha_pattern expression": (FAITHFUL, (LOADS, "alpha-pattern"), (LOADS, "alpha-pattern")),
    "alpha 0": tuple((REFUSED, "no-effect") for _ in ENGINES),
    "bias all": ((REFUSED, "bias"), (LOADS, "bias"), (REFUSED, "key-unknown")),
    "lora_bias": ((REFUSED, "lora-bias"), (LOADS, "lora-bias"), (REFUSED, "key-unknown")),
    "lm_head saved": (
        (REFUSED, "modules-to-save"),
        (LOADS, "modules-to-save"),
        (LOADS, "modules-to-save"),
    ),
    "score saved": (
        (REFUSED, "classifier-without-head"),
        (LOADS, "modules-to-save"),
        (REFUSED, "key-unknown"),
    ),
    "norm saved": (
        (REFUSED, "modules-to-save"),
        (REFUSED, "key-unknown"),
        (REFUSED, "key-unknown"),
    ),
    "embedding": (FAITHFUL, FAITHFUL, (LOADS, "embedding-skipped")),
    "embedding of other rows": tuple((REFUSED, "shape-mismatch") for _ in ENGINES),
    "embedding transposed": tuple((REFUSED, "shape-mismatch") for _ in ENGINES),
    "lm_head": (FAITHFUL, FAITHFUL, (LOADS, "embedding-skipped")),
    "embedding copied": (FAITHFUL, FAITHFUL, FAITHFUL),
    "embedding resized": tuple((LOADS, "embedding-resized") for _ in ENGINES),
    "embedding saved": (
        (REFUSED, "key-unknown"),
        (LOADS, "key-dropped"),
        (LOADS, "modules-to-save"),
    ),
    "token rows": (
        (REFUSED, "trained-tokens"),
        (LOADS, "key-dropped"),
        (LOADS, "modules-to-save"),
    ),
    "added tokens": ((LOADS, "added-tokens"), (REFUSED, "added-tokens"), (LOADS, "added-tokens")),
    "added tokens of the base": (FAITHFUL, FAITHFUL, FAITHFUL),
    "new embeddings": (
        (LOADS, "new-embeddings"),
        (LOADS, "weights-beside"),
        (LOADS, "new-embeddings"),
    ),
    **dict.fromkeys(
        ("pissa", "pissa of n", "olora", "corda", "loftq"),
        (
            (REFUSED, "init-changes-base"),
            (LOADS, "init-changes-base"),
            (LOADS, "init-changes-base"),
        ),
    ),
    **dict.fromkeys(("eva", "gaussian", "no init"), (FAITHFUL, FAITHFUL, FAITHFUL)),
    "alora": ((REFUSED, "alora"), (LOADS, "alora"), (LOADS, "alora")),
    "layer_replication": (
        (REFUSED, "layer-replication"),
        (REFUSED, "layer-replication"),
        (LOADS, "layer-replication"),
    ),
    "qalora": tuple((REFUSED, "qalora") for _ in ENGINES),
    "bdlora": ((REFUSED, "bdlora"), (LOADS, "bdlora"), (LOADS, "bdlora")),
    "arrow": tuple((LOADS, "lora-variant") for _ in ENGINES),
    "target_parameters": tuple((REFUSED, "experts-fused") for _ in ENGINES),
    "unknown tensor": (
        (REFUSED, "key-unknown"),
        (LOADS, "key-dropped"),
        (REFUSED, "key-unknown"),
    ),
    "unknown outside layers": (
        (REFUSED, "key-unknown"),
        (LOADS, "key-dropped"),
        (REFUSED, "key-unknown"),
    ),
    **{
        name: tuple((REFUSED, code) for _ in ENGINES)
        for name, code in {
            "module of another model": "module-not-in-base",
            "module in a wrong place": "module-not-in-base",
            "layer too many": "module-not-in-base",
            "wider base": "shape-mismatch",
            "narrower base": "shape-mismatch",
            "other kv heads": "shape-mismatch",
            "r of another": "rank-mismatch",
            "A without B": "pair-incomplete",
            "B without A": "pair-incomplete",
        }.items()
    },
}
# Case: the finding about the adapter that nobody refuses it for.
REMARKS = {
    "one layer": ("coverage-partial", Severity.NOTE),
    "alpha negative": ("alpha-negative", Severity.WARNING),
    "lm_head": ("tied-lm-head", Severity.WARNING),
    "embedding copied": ("embedding-copy", Severity.NOTE),
    "expression": ("target-modules-expression", Severity.NOTE),
    "megatron": ("megatron", Severity.WARNING),
    "layers_to_transform": ("layers-chosen", Severity.NOTE),
    "exclude_modules": ("layers-chosen", Severity.NOTE),
    "fan_in_fan_out": ("fan-in-fan-out", Severity.NOTE),
    "no prefix": ("prefix-missing", Severity.WARNING),
    "other base name": ("base-name-differs", Severity.WARNING),
    "pickle beside": ("pickle-beside", Severity.WARNING),
}
