"""The numbers of a safetensors file, read as bits."""

from __future__ import annotations

import numpy as np
import pytest
from adapter_folders import to_bfloat16, write_safetensors

from adapters import tensor_scan
from adapters.safetensors_header import read_header
from adapters.tensor_scan import TensorValues, scan_values

FINITE = TensorValues(is_finite=True, is_zero=False)
ZERO = TensorValues(is_finite=True, is_zero=True)
BROKEN = TensorValues(is_finite=False, is_zero=False)
VALUES = {
    "ordinary": ([1.5, -2.0, 0.0], FINITE),
    "smallest": ([0.0, 6e-8, 0.0], FINITE),
    "largest": ([65504.0, -65504.0, 0.0], FINITE),
    "zeros of both signs": ([0.0, -0.0, 0.0], ZERO),
    "nan": ([1.0, 0.0, np.nan], BROKEN),
    "infinity": ([0.0, 0.0, np.inf], BROKEN),
    "minus infinity": ([-np.inf, 0.0, 0.0], BROKEN),
}


def scanned(path, tensors):
    """Write tensors and scan them."""
    write_safetensors(path, tensors)
    return scan_values(path, read_header(path))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", VALUES)
def test_what_the_numbers_are(tmp_path, dtype, name):
    """Finite, zero or neither, in each type that engines serve."""
    numbers, expected = VALUES[name]
    wide = np.array(numbers, np.float32)
    given = {
        "F32": ("F32", wide),
        "F16": ("F16", wide.astype(np.float16)),
        "BF16": to_bfloat16({"t": wide})["t"],
    }[dtype]
    assert scanned(tmp_path / "x", {"t": given}) == {"t": expected}


def test_each_tensor_is_read_at_its_own_place(tmp_path, monkeypatch):
    """Odd offsets and pieces smaller than a tensor change nothing."""
    monkeypatch.setattr(tensor_scan, "PIECE_ELEMENTS", 3)
    late_nan = np.zeros(10, np.float32)
    late_nan[9] = np.nan
    late = np.zeros(10, np.float16)
    late[7] = 1
    given = {
        "odd": ("U8", np.ones(3, np.uint8)),
        "late": ("F16", late),
        "zero": ("F16", np.zeros((4, 2), np.float16)),
        "nan": ("F32", late_nan),
        "none": ("F32", np.zeros((0, 4), np.float32)),
    }
    expected = {"late": FINITE, "zero": ZERO, "nan": BROKEN, "none": ZERO}
    assert scanned(tmp_path / "x", given) == expected
