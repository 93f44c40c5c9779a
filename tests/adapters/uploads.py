"""Uploads for tests: archives of an adapter, and such as no honest client makes."""

from __future__ import annotations

import gzip
import io
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
from adapter_folders import make_adapter

from adapters.intake import Claim, Intake
from adapters.manifest import BaseReference, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from adapters.intake import Staged

END = b"\0" * 1024


def claim(adapter: str = "support", **changes: Any) -> Claim:
    """What the sender of a test's upload says."""
    fields = {
        "adapter": adapter,
        "base": BaseReference(name="tiny-llama"),
        "source": Source(kind="upload"),
    }
    return Claim(**{**fields, **changes})


def stage(tmp_path: Path, *, adapter: str = "support", **changes: Any) -> Staged:
    """An adapter's folder, taken in; the same arguments give the same content."""
    folder = make_adapter(tmp_path / "made", **changes)
    return Intake(tmp_path / "staging").from_folder(folder, claim(adapter))


def large_tensors(num_mib: int) -> dict[str, np.ndarray]:
    """A LoRA's tensors of about that size, for transfers in parts."""
    random = np.random.default_rng(7)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{path}.lora_A.weight": random.normal(size=(8, 64)).astype(np.float32),
        f"{path}.lora_B.weight": random.integers(
            0, 1000, size=(num_mib * 1024 * 1024 // 32, 8)
        ).astype(np.float32),
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Names and contents of a folder's files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """One member's header."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    form = fields.pop("format", tarfile.PAX_FORMAT)
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry.tobuf(format=form, errors="surrogateescape")


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """One member: header, content, padding."""
    return header(name, len(content), kind, **fields) + content + padding(len(content))


def padding(num_bytes: int) -> bytes:
    """What fills the last block of a content."""
    return b"\0" * (-num_bytes % 512)


def pax(records: Mapping[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A PAX header with any records, however wrong."""
    lines = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(f"{length}") + len(rest) != length:
            length += 1
        lines += f"{length}".encode() + rest
    return (
        header("pax", len(lines), kind, format=tarfile.USTAR_FORMAT) + lines + padding(len(lines))
    )


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A plain tar of files."""
    return b"".join(member(name, content) for name, content in files.items()) + END


def python_tar(folder: Path, mode: str = "w:gz", *, inside: str = "") -> bytes:
    """An archive as Python's tarfile makes it of a folder."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=inside or ".")
    return packed.getvalue()


def zeros_gzip(num_mib: int) -> bytes:
    """A gzip of a tar whose one file is all zeros."""
    packed = io.BytesIO()
    with gzip.open(packed, "wb", compresslevel=9) as file:
        file.write(header("adapter_model.safetensors", num_mib * 1024 * 1024))
        for _ in range(num_mib):
            file.write(b"\0" * 1024 * 1024)
        file.write(END)
    return packed.getvalue()


def blocks(content: bytes, size: int = 4096) -> Iterator[bytes]:
    """The content as a socket gives it."""
    for at in range(0, len(content), size):
        yield content[at : at + size]
