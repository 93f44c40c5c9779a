"""The examples of docs/adapter-store.md, executed as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adapter-store.md").read_text()
DEADLINE_S = 60.0


def example(name: str) -> str:
    """Text of the code block after `<!-- example: NAME -->`."""
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None, f"the page has no example {name}"
    return found[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder, made without any code of ours."""
    made = tmp_path / "my-adapter"
    made.mkdir()
    (made / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}'
    )
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{path}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{path}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    save_file(tensors, made / "adapter_model.safetensors")
    return made


def run(argv: list[str], cwd: Path) -> str:
    done = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    return done.stdout


def test_the_shell_and_the_platform_agree(folder: Path, tmp_path: Path) -> None:
    """The digest of the shell's example is that of the version that the other example publishes."""
    digest = run(["bash", "-c", example("digest")], folder).split()[0]
    version, path = run([sys.executable, "-c", example("publish")], tmp_path).split()
    assert version == f"support@{digest[:12]}"
    assert (tmp_path / "store" / "versions" / digest / "adapter_config.json").is_file()
    assert Path(path) == tmp_path / "cache" / version / "1"
    assert {file.name for file in Path(path).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
