"""Every input that fuzzing has kept, through its target, without the fuzzer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))

INPUTS = sorted(path for path in (HERE / "corpus").glob("*/*") if path.is_file())
MAX_CORPUS_BYTES = 200 * 1024


@pytest.mark.parametrize(
    "path", INPUTS, ids=[f"{path.parent.name}/{path.name[:24]}" for path in INPUTS]
)
def test_input_breaks_nothing(path: Path) -> None:
    """An input that was of interest to the fuzzer keeps all that its target promises."""
    importlib.import_module(path.parent.name).check(path.read_bytes())


def test_corpus_is_there_and_small() -> None:
    """Each target has a dozen inputs at least, and all of them together stay small."""
    folders = {path.parent.name for path in INPUTS}

    assert folders == {"fuzz_request", "fuzz_response", "fuzz_events"}
    assert all(sum(p.parent.name == name for p in INPUTS) >= 12 for name in folders)
    assert sum(path.stat().st_size for path in INPUTS) < MAX_CORPUS_BYTES
