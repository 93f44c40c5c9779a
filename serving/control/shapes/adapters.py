"""Bodies of the adapter routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field

from adapters.compat import LintReport
from adapters.manifest import Manifest
from serving.control.shapes.aliases import AliasAnswer
from serving.control.shapes.common import Shape

MAX_LABELS = 64
MAX_DESCRIPTION_CHARS = 4000


def _checked_labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > MAX_LABELS:
        raise ValueError(f"give at most {MAX_LABELS} labels")
    for key, value in labels.items():
        if not 0 < len(key) <= 64 or len(value) > 256 or "\0" in key + value:
            raise ValueError(f"label '{key[:80]}': keys have 1 to 64 characters, values up to 256")
    return labels


Labels = Annotated[dict[str, str], AfterValidator(_checked_labels)]


class VersionAnswer(Shape):
    """One immutable version."""

    version: str
    """`name@digest12`: what clients may send as `model`."""
    adapter: str
    digest: str
    lora_id: int
    """Unique number of the version, for engines that key their caches by one."""
    base: str
    """Public name of its base model."""
    rank: int
    size_bytes: int
    manifest: Manifest
    report: LintReport
    """What the linter said when it was registered, a verdict for each engine of the fleet."""
    unloadable: dict[str, str]
    """Engine kind → why it cannot load there."""
    aliases: list[str]
    """Aliases that point at it, wait for it, or would roll back to it."""
    created_by: str
    created_at: float
    """Unix time."""
    deleted_at: float | None


class RegisteredVersion(Shape):
    """What became of a registration."""

    version: VersionAnswer
    alias: AliasAnswer | None
    """The alias that was asked for."""
    is_new: bool
    """False if the same content was registered before."""


class LintAnswer(Shape):
    """What the linter says of an upload; nothing was kept of it."""

    servable: bool
    """Whether a registration would be taken."""
    digest: str
    version: str
    base: str | None
    report: LintReport


class VersionSummary(Shape):
    """One version in a list."""

    version: str
    digest: str
    base: str
    rank: int
    size_bytes: int
    created_at: float
    """Unix time."""
    deleted_at: float | None


class AdapterAnswer(Shape):
    """One adapter: a name with its versions."""

    name: str
    owner: str
    description: str
    labels: dict[str, str]
    num_versions: int
    """Those that are not deleted."""
    latest: VersionSummary | None
    """The newest of them."""
    revision: int
    """Changes with every change; also the `ETag`."""
    created_at: float
    """Unix time."""
    updated_at: float
    """Unix time."""
    deleted_at: float | None


class PatchAdapter(Shape):
    """What changes of an adapter; what is left out stays."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"labels": {"team": "support"}, "revision": 3}]}
    )

    owner: str | None = Field(default=None, min_length=1, max_length=200)
    description: str | None = Field(default=None, max_length=MAX_DESCRIPTION_CHARS)
    labels: Labels | None = None
    """All of them: those that are not named go."""
    revision: int | None = Field(default=None, ge=1)
    """The adapter's revision as the caller knows it."""


class UploadOptions(Shape):
    """What is said of an upload beside its files."""

    alias: str | None = Field(default=None, max_length=96)
    """Points there once registered, as `PUT /aliases/{alias}` would."""
    parent: str | None = Field(default=None, max_length=109)
    """Version that it was trained from."""
    owner: str | None = Field(default=None, min_length=1, max_length=200)
    """Of the adapter; a new one is its creator's."""
    labels: Labels = Field(default_factory=dict)
    """Added to those of the adapter."""
    base: str | None = Field(default=None, max_length=256)
    """Public name of the base model; needed where several are served."""
    scan: bool = True
    """Look for NaN and for tensors that do nothing; reads all of them."""
    allow_no_effect: bool = False
    """Take an adapter that changes nothing, for example as a control."""
    allow_unfaithful: bool = False
    """Take one that engines load but compute differently from its training."""


class SourceUpload(UploadOptions):
    """A registration from where the files lie already."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"source": "s3://models/adapters/support", "alias": "support"}]
        }
    )

    source: str = Field(min_length=1, max_length=2000)
    """`file:///FOLDER` on the control plane's machine, or `s3://BUCKET/PREFIX`."""

    def options(self) -> UploadOptions:
        """Everything but the source."""
        given: dict[str, Any] = self.model_dump(exclude={"source"})
        return UploadOptions(**given)
