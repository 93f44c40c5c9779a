"""Turns SmolLM2's GGUF file into a folder that transformers and vLLM load.

Owns: the conversion (weights to bfloat16, tokenizer, chat template, a check that the result still
knows what the model knew). Never: downloads, locks or renames; never runs inside a serving process.
Called by: `serving/fleet/default_model.py`, as `python -m serving.fleet.smollm2_conversion GGUF OUT`.

It prints one JSON object a line, `{"stage": "...", "done": 0.4}`, and imports torch and
transformers only when it runs.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = Path(__file__).with_name("smollm2_chat_template.jinja")
CONTEXT_TOKENS = 8192
# What the untouched model continues with; scrambled weights do not.
PROBE, PROBE_NEXT = "The capital of France is", " Paris"


class ConversionError(Exception):
    """The GGUF file did not give the model that it should hold."""


def convert(gguf: Path, out: Path) -> None:
    """Convert a GGUF file to safetensors, tokenizer and configuration.

    Args:
        gguf: SmolLM2-Instruct in GGUF.
        out: an existing, empty folder.

    Raises:
        ConversionError: if the converted model fails its check.
    """
    report("loading libraries", 0.0)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    report("converting the tokenizer", 0.2)
    tokenizer = load_tokenizer(gguf, transformers)
    report("converting the weights", 0.45)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)
    report("checking the model", 0.85)
    check_knowledge(model, tokenizer, torch)
    report("saving", 0.9)
    # What the model's authors recommend; engines take these as the defaults of sampling.
    model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.9)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    report("saving", 1.0)


def load_tokenizer(gguf: Path, transformers: Any) -> Any:
    """Load the tokenizer and mend what GGUF does not carry.

    The original splits every digit off before byte-level BPE; llama.cpp keeps that in code
    (`LLAMA_VOCAB_PRE_TYPE_SMOLLM`), so the file lacks it and runs of blanks before a number would
    be cut differently.
    """
    tokenizers: Any = importlib.import_module("tokenizers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    pre = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS
    tokenizer.chat_template = CHAT_TEMPLATE.read_text().strip()
    return tokenizer


def check_knowledge(model: Any, tokenizer: Any, torch: Any) -> None:
    """Check that the model still continues a sentence as the original does.

    Raises:
        ConversionError: if it does not.
    """
    with torch.no_grad():
        logits = model(**tokenizer(PROBE, return_tensors="pt")).logits[0, -1]
    likely = [tokenizer.decode([int(token)]) for token in logits.topk(5).indices]
    if PROBE_NEXT not in likely:
        msg = f"the converted model continues {PROBE!r} with {likely}, not with {PROBE_NEXT!r}"
        raise ConversionError(msg)


def report(stage: str, done: float) -> None:
    """Print how far the conversion is.

    Args:
        stage: what is being done.
        done: fraction from 0 to 1.
    """
    sys.stdout.write(json.dumps({"stage": stage, "done": done}) + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Convert `GGUF OUT`; return the exit code."""
    gguf, out = arguments
    try:
        convert(Path(gguf), Path(out))
    except (ConversionError, ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
