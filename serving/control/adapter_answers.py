"""Rows of adapters and versions as the API shows them. Never queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapters.manifest import Manifest
from serving.control.judgement import lint_report, unloadable
from serving.control.shapes.adapters import AdapterAnswer, VersionAnswer, VersionSummary

if TYPE_CHECKING:
    from serving.control.tables import Adapter, Version


def adapter_answer(row: Adapter, num_versions: int, latest: Version | None) -> AdapterAnswer:
    """Return an adapter."""
    return AdapterAnswer(
        name=row.name,
        owner=row.owner,
        description=row.description,
        labels={label.key: label.value for label in row.labels},
        num_versions=num_versions,
        latest=None if latest is None else version_summary(latest),
        revision=row.revision,
        created_at=row.created_at_s,
        updated_at=row.updated_at_s,
        deleted_at=row.deleted_at_s,
    )


def version_summary(row: Version) -> VersionSummary:
    """Return a version in a list."""
    return VersionSummary(
        version=row.name,
        digest=row.digest,
        base=row.base,
        rank=row.rank,
        size_bytes=row.size_bytes,
        created_at=row.created_at_s,
        deleted_at=row.deleted_at_s,
    )


def version_answer(row: Version, adapter: str, aliases: list[str]) -> VersionAnswer:
    """Return a version with everything that is known of it."""
    return VersionAnswer(
        version=row.name,
        adapter=adapter,
        digest=row.digest,
        lora_id=row.lora_id,
        base=row.base,
        rank=row.rank,
        size_bytes=row.size_bytes,
        manifest=Manifest.model_validate_json(row.manifest),
        report=lint_report(row.report),
        unloadable=unloadable(row.report),
        aliases=aliases,
        created_by=row.created_by,
        created_at=row.created_at_s,
        deleted_at=row.deleted_at_s,
    )
