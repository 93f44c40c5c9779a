"""Archives that no honest client sends, each with the status and the words that refuse it."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from adapter_folders import make_adapter
from uploads import END, files_of, header, member, pax, tar_of, zeros_gzip

from adapters.limits import IntakeLimits

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = IntakeLimits(
    max_archive_bytes=64 * 1024 * 1024,
    max_total_bytes=32 * 1024 * 1024,
    max_weights_bytes=24 * 1024 * 1024,
    max_text_bytes=1024 * 1024,
    max_members=16,
)


@cache
def good() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        return files_of(make_adapter(Path(folder) / "a"))


@cache
def good_with(**changes: object) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        return files_of(make_adapter(Path(folder) / "a", **changes))  # type: ignore[arg-type]


def plus(*members: bytes) -> bytes:
    """A good archive with more members behind."""
    return tar_of(good()).removesuffix(END) + b"".join(members) + END


def without(name: str) -> bytes:
    return tar_of({key: value for key, value in good().items() if key != name})


def config(text: bytes) -> bytes:
    return tar_of({**good(), "adapter_config.json": text})


def weights(content: bytes) -> bytes:
    return tar_of({**good(), "adapter_model.safetensors": content})


def linked(kind: bytes, target: str) -> bytes:
    return plus(member("tokenizer.json", b"", kind, linkname=target))


def zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in good().items():
            archive.writestr(name, content)
    return packed.getvalue()


def gnu_long_name(num_bytes: int) -> bytes:
    name = b"a" * num_bytes
    long = header("././@LongLink", num_bytes, tarfile.GNUTYPE_LONGNAME, format=tarfile.GNU_FORMAT)
    return long + name + b"\0" * (-num_bytes % 512)


def no_lora() -> bytes:
    return tar_of(good_with_plain_weight())


@cache
def good_with_plain_weight() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        plain = {"model.embed_tokens.weight": np.zeros((4, 4), np.float32)}
        return files_of(make_adapter(Path(folder) / "a", tensors=plain))


def broken_checksum() -> bytes:
    content = bytearray(tar_of(good()))
    content[150] ^= 0x01
    return bytes(content)


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0x40
    return bytes(changed)


def negative_size() -> bytes:
    raw = bytearray(header("tokenizer.json", 0))
    raw[124:136] = b"\xff" * 11 + b"\x00"
    total = 256 + sum(raw[:148]) + sum(raw[156:])
    raw[148:156] = f"{total:06o}\0 ".encode()
    return plus(bytes(raw))


CASES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    # names
    "absolute path": (lambda: plus(member("/etc/passwd", b"x")), 400, "is absolute"),
    "parent folder": (lambda: plus(member("../tokenizer.json", b"x")), 400, "leaves its folder"),
    "parent inside": (lambda: plus(member("a/../../x.json", b"x")), 400, "leaves its folder"),
    "two dots alone": (lambda: plus(member("..", b"x")), 400, "leaves its folder"),
    "backslash": (lambda: plus(member("..\\tokenizer.json", b"x")), 400, "has characters"),
    "drive letter": (lambda: plus(member("C:tokenizer.json", b"x")), 400, "has characters"),
    "NUL in a PAX path": (
        lambda: plus(pax({"path": "tokenizer.json\0.bin"}), member("t", b"x")),
        400,
        "has characters",
    ),
    "newline": (lambda: plus(member("a\nb.json", b"x")), 400, "has characters"),
    "not ASCII": (lambda: plus(member("tokenizer\u202e.json", b"x")), 400, "has characters"),
    "not UTF-8": (
        lambda: plus(member("tokenizer\udcff.json", b"x", format=tarfile.GNU_FORMAT)),
        400,
        "has characters",
    ),
    "empty part": (lambda: plus(member("a//tokenizer.json", b"x")), 400, "leaves its folder"),
    "too deep": (lambda: plus(member("a/b/tokenizer.json", b"x")), 400, "lies too deep"),
    "two folders": (lambda: plus(member("a/tokenizer.json", b"x")), 400, "in another folder"),
    "long name": (lambda: plus(member("a" * 101 + ".json", b"x")), 400, "is too long"),
    "PAX path out": (
        lambda: plus(pax({"path": "../../x.json"}), member("tokenizer.json", b"x")),
        400,
        "leaves its folder",
    ),
    # twice
    "duplicate": (lambda: plus(member("adapter_config.json", b"{}")), 400, "comes twice"),
    "case collision": (lambda: plus(member("Adapter_Config.json", b"{}")), 400, "other capitals"),
    # kinds
    "symbolic link": (lambda: linked(tarfile.SYMTYPE, "/etc/passwd"), 400, "is a symbolic link"),
    "link inside": (
        lambda: linked(tarfile.SYMTYPE, "adapter_config.json"),
        400,
        "is a symbolic link",
    ),
    "hard link": (lambda: linked(tarfile.LNKTYPE, "adapter_config.json"), 400, "is a hard link"),
    "character device": (lambda: linked(tarfile.CHRTYPE, ""), 400, "is a device"),
    "block device": (lambda: linked(tarfile.BLKTYPE, ""), 400, "is a device"),
    "pipe": (lambda: linked(tarfile.FIFOTYPE, ""), 400, "is a pipe"),
    "unknown kind": (lambda: linked(b"Z", ""), 400, "neither a file nor a folder"),
    "GNU sparse": (
        lambda: plus(
            member("tokenizer.json", b"", tarfile.GNUTYPE_SPARSE, format=tarfile.GNU_FORMAT)
        ),
        400,
        "is a sparse file",
    ),
    "PAX sparse": (
        lambda: plus(
            pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999999999"}),
            member("tokenizer.json", b"x"),
        ),
        400,
        "is a sparse file",
    ),
    # files
    "pickled weights": (
        lambda: tar_of({**good(), "adapter_model.bin": b"\x80\x04."}),
        415,
        "convert the weights to adapter_model.safetensors",
    ),
    "pickle in capitals": (lambda: plus(member("x.PKL", b"\x80")), 415, "is a pickle"),
    "checkpoint": (lambda: plus(member("model.ckpt", b"x")), 415, "is a pickle"),
    "script": (lambda: plus(member("setup.py", b"x")), 415, "is not a file of an adapter"),
    "other weights": (
        lambda: plus(member("model-00001-of-00002.safetensors", b"x")),
        415,
        "is not a file of an adapter",
    ),
    # formats
    "nothing": (lambda: b"", 400, "the upload is empty"),
    "zip": (zipped, 415, "zip archives are not taken"),
    "xz": (lambda: b"\xfd7zXZ\0" + b"x" * 99, 415, "xz archives are not taken"),
    "bzip2": (lambda: b"BZh9" + b"x" * 99, 415, "bzip2 archives are not taken"),
    "zstandard": (lambda: b"\x28\xb5\x2f\xfd" + b"x" * 99, 415, "zstandard archives"),
    "text": (lambda: b"hello " * 500, 400, "broken or cut off"),
    "broken gzip": (lambda: b"\x1f\x8b\x08" + b"x" * 999, 400, "broken or cut off"),
    "gzip of text": (lambda: gzip.compress(b"hello " * 500), 400, "broken or cut off"),
    "header's checksum": (broken_checksum, 400, "broken or cut off"),
    "gzip's checksum": (
        lambda: flipped(gzip.compress(tar_of(good())), -6),
        400,
        "broken or cut off",
    ),
    # cut off and added to
    "cut in a header": (lambda: tar_of(good())[:300], 400, "broken or cut off"),
    "cut in a file": (lambda: tar_of(good())[:9000], 400, "broken or cut off"),
    "cut between files": (lambda: tar_of(good()).removesuffix(END), 400, "broken or cut off"),
    "cut gzip": (lambda: gzip.compress(tar_of(good()))[:-9], 400, "broken or cut off"),
    "second archive": (lambda: tar_of(good()) + tar_of(good()), 400, "behind its end"),
    "second gzip": (
        lambda: gzip.compress(tar_of(good())) + gzip.compress(b"x"),
        400,
        "behind its end",
    ),
    "bytes behind gzip": (lambda: gzip.compress(tar_of(good())) + b"x", 400, "behind its end"),
    # bounds
    "gzip bomb": (lambda: zeros_gzip(40), 413, "more than 100 times its size"),
    "long zeros behind": (
        lambda: tar_of(good()) + b"\0" * (2 * 1024 * 1024),
        400,
        "larger than 32 KiB",
    ),
    "large archive": (
        lambda: tar_of({**good(), "README.md": b"x" * (65 * 1024 * 1024)}),
        413,
        "the archive is larger than 67108864 bytes",
    ),
    "large unpacked": (
        lambda: gzip.compress(tar_of({**good(), "README.md": bytes(range(256)) * 65 * 4096}), 0),
        413,
        "the archive is larger than 67108864 bytes",
    ),
    "large text": (
        lambda: plus(member("tokenizer.json", b"x" * (1024 * 1024 + 1))),
        413,
        "tokenizer.json is larger than 1048576 bytes",
    ),
    "large weights": (
        lambda: weights(b"x" * (24 * 1024 * 1024 + 1)),
        413,
        "adapter_model.safetensors is larger than 25165824 bytes",
    ),
    "many files": (
        lambda: plus(*(member(f"rng_state_{i}.pth", b"x") for i in range(17))),
        413,
        "more than 16",
    ),
    "many folders": (
        lambda: plus(*(member(f"d{i}", b"", tarfile.DIRTYPE) for i in range(17))),
        413,
        "more than 16 members",
    ),
    # headers
    "huge PAX header": (
        lambda: plus(pax({"comment": "x" * 1024 * 1024}), member("tokenizer.json", b"x")),
        400,
        "header of the archive is larger",
    ),
    "PAX header that claims to be huge": (
        lambda: header("pax", 2**32, tarfile.XHDTYPE) + b"x" * 1024 * 1024,
        400,
        "header of the archive is larger",
    ),
    "chain of PAX headers": (
        lambda: plus(*[pax({"comment": "x"})] * 5000, member("tokenizer.json", b"x")),
        400,
        "header of the archive is larger",
    ),
    "huge GNU name": (lambda: plus(gnu_long_name(10**6)), 400, "header of the archive is larger"),
    "global header": (
        lambda: pax({"path": "x.json"}, tarfile.XGLTYPE) + tar_of(good()),
        400,
        "a header for all its members",
    ),
    "negative size": (negative_size, 400, "broken or cut off"),
    "size beyond the archive": (
        lambda: plus(header("tokenizer.json", 2**40)),
        400,
        "broken or cut off",
    ),
    "PAX size beyond the archive": (
        lambda: plus(pax({"size": str(2**40)}), member("tokenizer.json", b"x")),
        400,
        "broken or cut off",
    ),
    "PAX size negative": (
        lambda: plus(pax({"size": "-512"}), member("tokenizer.json", b"x")),
        400,
        "broken or cut off",
    ),
    # no adapter
    "no configuration": (
        lambda: without("adapter_config.json"),
        422,
        "the upload has no adapter_config.json",
    ),
    "no weights": (
        lambda: without("adapter_model.safetensors"),
        422,
        "the upload has no adapter_model.safetensors",
    ),
    "no files": (lambda: END, 422, "no adapter_config.json and no adapter_model.safetensors"),
    "configuration no JSON": (lambda: config(b"{"), 422, "is not valid JSON"),
    "deep JSON": (lambda: config(b"[" * 200_000), 422, "is not valid JSON"),
    "configuration a list": (lambda: config(b"[]"), 422, "has to be a JSON object"),
    "another method": (lambda: config(b'{"peft_type": "IA3"}'), 422, "peft_type is IA3"),
    "weights no safetensors": (
        lambda: weights(b"\x80\x04pickle, renamed"),
        422,
        "is no safetensors",
    ),
    "weights empty": (lambda: weights(b""), 422, "is truncated"),
    "header longer than the file": (
        lambda: weights((2**40).to_bytes(8, "little") + b"{}"),
        422,
        "is truncated",
    ),
    "cut weights": (
        lambda: weights(good()["adapter_model.safetensors"][:-4]),
        422,
        "it is truncated or has a tail",
    ),
    "no LoRA in it": (no_lora, 422, "LoRA"),
}
