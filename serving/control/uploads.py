"""Takes adapters over HTTP: a tar, a form, or the address of files that lie elsewhere.

Owns the way of the bytes from the socket to the intake's thread, and the bounds on time and on
uploads at once. Never judges an adapter. Called by `routes/uploads.py`.

Cancellation: where the caller goes away or the time is up, the pipe is broken, the intake's thread
ends with an error and its folder is gone.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import anyio.to_thread
from anyio import CapacityLimiter
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from adapters.block_pipe import BlockPipe, PipeClosed
from adapters.errors import AdapterError, UploadRefused
from adapters.intake import Claim, Intake
from adapters.locations import SCHEMES, Location
from adapters.manifest import BaseReference, Source
from serving.control.errors import InvalidRequest, TooBusy, TooLarge, WrongMediaType
from serving.control.form_parts import FormParts, boundary_of
from serving.control.shapes.adapters import SourceUpload, UploadOptions
from serving.errors import RequestTimeout, ServingError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from starlette.requests import Request

    from adapters.intake import Staged
    from serving.control.settings import ControlSettings

ARCHIVES = frozenset(
    {"application/x-tar", "application/tar", "application/gzip", "application/x-gzip"}
)
FORM = "multipart/form-data"
JSON = "application/json"
QUIET_S = 60.0
UNNAMED = "unnamed"
Result = TypeVar("Result")
_UPLOAD = Source(kind="upload")


@dataclass(frozen=True)
class Upload:
    """What came in: the files, staged, and what was said of them."""

    staged: Staged
    options: UploadOptions


class Uploads:
    """Takes uploads, a bounded number at a time; belongs to the event loop.

    Attributes:
        num_running: Uploads that are coming in.
    """

    def __init__(self, settings: ControlSettings, intake: Intake) -> None:
        """Know the bounds and where files go.

        Args:
            settings: The bounds, and which local folders may be named.
            intake: The staging folder.
        """
        self._settings = settings
        self._limits = settings.limits
        self._intake = intake
        self.num_running = 0
        self._threads = CapacityLimiter(2 * self._limits.max_uploads)

    async def take(self, request: Request, adapter: str | None, options: UploadOptions) -> Upload:
        """Receive and stage an adapter.

        Args:
            request: Its body is read here.
            adapter: Name of the adapter; None where it is only linted.
            options: What the query says; a form's fields and a JSON body's say more.

        Raises:
            UploadRefused: If what comes is no adapter, is hostile, or too large.
            WrongMediaType: If it comes as something else.
            TooBusy: If too many come at once.
            RequestTimeout: If it takes too long.
            StoreError: If the disk or the source fails.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        claim = Claim(
            adapter=adapter or UNNAMED,
            base=BaseReference(name=options.base or ""),
            source=_UPLOAD,
        )
        with self._slot():
            if media_type in ARCHIVES:
                staged = await self._streamed(
                    request, lambda blocks: self._intake.from_archive(blocks, claim)
                )
                return Upload(staged, options)
            if media_type == FORM:
                return await self._form(request, claim, options)
            if media_type == JSON:
                return await self._source(request, claim)
        raise WrongMediaType(
            f"Send application/x-tar, {FORM} or {JSON} with a source, not '{media_type[:100]}'."
        )

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run what follows an upload in a thread of the uploads' own."""
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self.num_running >= self._limits.max_uploads:
            raise TooBusy("Too many uploads are coming in: send this one again later.")
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    async def _form(self, request: Request, claim: Claim, options: UploadOptions) -> Upload:
        boundary = boundary_of(request.headers["content-type"])
        fields: dict[str, str] = {}

        def take(blocks: Iterable[bytes]) -> Staged:
            form = FormParts(blocks, boundary)
            staged = self._intake.from_parts(form.files(), claim)
            fields.update(form.fields)
            return staged

        staged = await self._streamed(request, take)
        try:
            return Upload(staged, _with_fields(options, fields))
        except ServingError:
            staged.remove()
            raise

    async def _source(self, request: Request, claim: Claim) -> Upload:
        wanted = await _json_body(request, self._limits.max_json_bytes)
        parts = urlsplit(wanted.source)
        claim = claim.model_copy(update={"base": BaseReference(name=wanted.base or "")})
        if parts.scheme == "file":
            folder = self._local_folder(wanted.source)
            claim = claim.model_copy(update={"source": Source(kind="path")})
            take = lambda: self._intake.from_folder(folder, claim)  # noqa: E731
        elif parts.scheme in SCHEMES:
            claim = claim.model_copy(update={"source": Source(kind="url", detail=wanted.source)})
            take = lambda: self._intake.from_location(Location(wanted.source), "", claim)  # noqa: E731
        else:
            raise InvalidRequest("The source has to be file:///FOLDER or s3://…", param="source")
        staged = await anyio.to_thread.run_sync(take, limiter=self._threads)
        return Upload(staged, wanted.options())

    def _local_folder(self, source: str) -> Path:
        parts = urlsplit(source)
        if not self._settings.takes_local_paths:
            raise InvalidRequest("This control plane takes no local paths.", param="source")
        folder = Path(unquote(parts.path)).resolve()
        if parts.netloc not in ("", "localhost") or "\0" in str(folder):
            raise InvalidRequest(
                "Write file:///FOLDER for a folder of its machine.", param="source"
            )
        roots = [root.resolve() for root in self._settings.local_roots]
        if roots and not any(folder.is_relative_to(root) for root in roots):
            raise InvalidRequest("The folder is outside those that may be named.", param="source")
        return folder

    async def _streamed(
        self, request: Request, take: Callable[[Iterable[bytes]], Staged]
    ) -> Staged:
        """Feed the body to the intake in another thread; whoever fails ends the other."""
        pipe = BlockPipe(QUIET_S)
        try:
            async with asyncio.timeout(self._limits.upload_s), asyncio.TaskGroup() as group:
                taking = group.create_task(self._take(pipe, take))
                fault = await self._feed(request.stream(), pipe)
        except TimeoutError:
            raise RequestTimeout("The upload took too long: send it again.") from None
        finally:
            pipe.abort()
        outcome = taking.result()
        # A pipe broken by the feeder is what the intake complains of: the cause comes first.
        if fault is not None:
            if not isinstance(outcome, Exception):
                outcome.remove()
            raise fault
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _take(
        self, pipe: BlockPipe, take: Callable[[Iterable[bytes]], Staged]
    ) -> Staged | AdapterError:
        try:
            return await anyio.to_thread.run_sync(
                take, pipe, limiter=self._threads, abandon_on_cancel=True
            )
        except AdapterError as error:
            return error
        finally:
            pipe.abort()

    async def _feed(self, stream: AsyncIterator[bytes], pipe: BlockPipe) -> Exception | None:
        try:
            async for block in stream:
                if block:
                    await anyio.to_thread.run_sync(
                        pipe.write, block, limiter=self._threads, abandon_on_cancel=True
                    )
            pipe.close()
        except PipeClosed:
            return None
        except ClientDisconnect:
            pipe.abort()
            return UploadRefused("The upload was broken off.")
        except ServingError as error:
            pipe.abort()
            return error
        return None


async def _json_body(request: Request, max_bytes: int) -> SourceUpload:
    body = b""
    async for block in request.stream():
        body += block
        if len(body) > max_bytes:
            raise TooLarge(f"The body is larger than {max_bytes} bytes.")
    try:
        return SourceUpload.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None


def _with_fields(options: UploadOptions, fields: dict[str, str]) -> UploadOptions:
    """The query's options, and over them the form's."""
    given: dict[str, object] = dict(fields)
    if "labels" in fields:
        given["labels"] = parse_labels(fields["labels"].split(","))
    merged = options.model_dump(exclude_unset=True) | given
    try:
        return UploadOptions.model_validate(merged)
    except ValidationError as error:
        raise _invalid(error) from None


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """Read `KEY=VALUE` each.

    Raises:
        InvalidRequest: If one is not of that form.
    """
    labels = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InvalidRequest(f"Label '{text[:80]}': write KEY=VALUE.", param="labels")
        labels[key] = value
    return labels


def _invalid(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return InvalidRequest(
        f"{place}: {problem['msg']}" if place else str(problem["msg"]), param=place or None
    )
