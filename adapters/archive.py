"""Reads a tar or tar.gz that a stranger sent, block by block as it comes.

Owns what an archive may be and the bounds while reading it: names, kinds of members, size of
headers, compression ratio, the end marker. Never writes a file, never holds more than a few blocks,
never judges content. Called by `intake.py`.
"""

from __future__ import annotations

import tarfile
import zlib
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, NoReturn, Self

from adapters.errors import UploadRefused
from adapters.kept_files import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from adapters.limits import IntakeLimits

BLOCK_BYTES = 1024 * 1024
TAR_BLOCK_BYTES = 512
# tarfile reads ahead by this much.
READ_AHEAD_BYTES = 20 * TAR_BLOCK_BYTES
# Between two files: a header with its PAX or GNU extensions. tarfile reads an extension whole and
# nests a call for each, so that this bounds its memory and its recursion.
HEADER_BYTES = 32 * 1024
TRAILER_BYTES = 1024 * 1024
# Real weights hardly compress; below this much output a ratio says nothing.
RATIO_FREE_BYTES = 16 * 1024 * 1024
MAX_GZIP_RATIO = 100
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"PK": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, IndexError)
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


def members(blocks: Iterable[bytes], limits: IntakeLimits) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the regular files of an archive: name as the archive has it, and content.

    A content is to be read before the next file is asked for; what is left of it is passed over.

    Args:
        blocks: The archive's bytes, in pieces of any size.
        limits: Bounds on the archive, packed and unpacked.

    Raises:
        UploadRefused: If it is no tar, is broken, breaks a limit, or has a member that is neither
            a regular file nor a folder.
    """
    reader = _Reader(_unpacked(blocks, limits))
    with _guarded(), tarfile.open(fileobj=reader, mode="r|", tarinfo=_Header) as tar:  # type: ignore[call-overload]
        num_members = 0
        while (member := _next(tar, reader)) is not None:
            num_members += 1
            if num_members > limits.max_members:
                raise UploadRefused(f"the archive has more than {limits.max_members} members.", 413)
            _check_kind(member)
            if member.isreg():
                reader.allow(member.size + READ_AHEAD_BYTES + TAR_BLOCK_BYTES)
                content = _content(tar, member)
                yield member.name, content
                for _ in content:
                    pass
        _check_end(reader)


class _Header(tarfile.TarInfo):
    """A header that tells its reader when it is the end marker: tarfile takes a cut for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.saw_end_marker = True  # type: ignore[attr-defined]
            raise


class _Reader:
    """The unpacked archive as tarfile reads it, with a bound on what it may take at once."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._held = b""
        self._allowed_bytes = HEADER_BYTES

    def allow(self, num_bytes: int) -> None:
        self._allowed_bytes = num_bytes

    def read(self, num_bytes: int) -> bytes:
        if self._allowed_bytes <= 0:
            raise UploadRefused(
                f"a header of the archive is larger than {HEADER_BYTES // 1024} KiB."
            )
        parts, num_missing = [], num_bytes
        while num_missing > 0:
            if not self._held:
                self._held = next(self._blocks, b"")
                if not self._held:
                    break
            part, self._held = self._held[:num_missing], self._held[num_missing:]
            parts.append(part)
            num_missing -= len(part)
        self._allowed_bytes -= num_bytes - num_missing
        return b"".join(parts)


@contextmanager
def _guarded() -> Iterator[None]:
    """Turn every way in which tarfile and zlib find an archive broken into a refusal."""
    try:
        yield
    except (*_BROKEN, zlib.error) as error:
        _refuse_broken(error)


def _refuse_broken(cause: BaseException | None = None) -> NoReturn:
    raise UploadRefused(
        "the archive is broken or cut off: pack it again (tar -czf adapter.tar.gz -C FOLDER .)."
    ) from cause


def _next(tar: tarfile.TarFile, reader: _Reader) -> tarfile.TarInfo | None:
    reader.allow(HEADER_BYTES)
    member = tar.next()
    if member is None and not getattr(tar, "saw_end_marker", False):
        _refuse_broken()
    if set(tar.pax_headers) - {"comment"}:
        raise UploadRefused(
            "the archive has a header for all its members: pack it without (tar --format=ustar)."
        )
    return member


def _check_kind(member: tarfile.TarInfo) -> None:
    if member.size < 0:
        _refuse_broken()
    if member.issparse():
        raise UploadRefused(
            f"{shown(member.name)} is a sparse file: pack it without --sparse.",
        )
    if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.isdir():
        return
    kind = _KINDS.get(member.type, "neither a file nor a folder")
    raise UploadRefused(
        f"{shown(member.name)} is {kind}: an archive of an adapter has regular files only."
    )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    # Guarded here too: these blocks are read by whoever asked for the members.
    file = tar.extractfile(member)
    if file is None:
        _refuse_broken()
    with _guarded(), file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _check_end(reader: _Reader) -> None:
    # Also reads the packed stream to its end, whose checksum comes last.
    reader.allow(TRAILER_BYTES)
    while rest := reader.read(READ_AHEAD_BYTES):
        if rest.strip(b"\0"):
            raise UploadRefused("the archive has something behind its end: send one archive only.")


def _unpacked(blocks: Iterable[bytes], limits: IntakeLimits) -> Iterator[bytes]:
    source = _bounded((block for block in blocks if block), limits.max_archive_bytes)
    start = b""
    while len(start) < 8 and (block := next(source, b"")):
        start += block
    if not start:
        raise UploadRefused(
            "the upload is empty: send a tar, or a tar.gz, of the adapter's folder."
        )
    for magic, name in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise UploadRefused(f"{name} archives are not taken: send a tar or a tar.gz.", 415)
    source = chain([start], source)
    if start.startswith(_GZIP):
        source = _gunzipped(source)
    return _bounded(source, limits.max_archive_bytes)


def _bounded(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    total_bytes = 0
    for block in blocks:
        total_bytes += len(block)
        if total_bytes > max_bytes:
            raise UploadRefused(f"the archive is larger than {max_bytes} bytes.", 413)
        yield block


def _gunzipped(blocks: Iterable[bytes]) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    num_in, num_out = 0, 0
    for block in blocks:
        num_in += len(block)
        while block and not unpacker.eof:
            out = unpacker.decompress(block, BLOCK_BYTES)
            block = unpacker.unconsumed_tail
            num_out += len(out)
            if num_out > max(RATIO_FREE_BYTES, MAX_GZIP_RATIO * num_in):
                raise UploadRefused(
                    f"the archive unpacks to more than {MAX_GZIP_RATIO} times its size: send the "
                    "plain tar if that is right.",
                    413,
                )
            if out:
                yield out
        if block or unpacker.unused_data.strip(b"\0"):
            raise UploadRefused("the archive has something behind its end: send one archive only.")
    if not unpacker.eof:
        _refuse_broken()
