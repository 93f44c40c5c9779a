"""From a checked folder to a registered version: judged, stored, recorded.

Owns the order: the linter first, then the store, then the database in one transaction with the
alias. A crash between store and database leaves files that nobody names; the garbage collection
takes them. Never receives bytes (`uploads.py` does). Blocks; called by thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select

from adapters.manifest import BaseReference
from adapters.version import alias_name, parse_version
from serving.control import audit
from serving.control.adapter_answers import version_answer
from serving.control.aliases import names_referring_to
from serving.control.database import publish
from serving.control.errors import Conflict, Unprocessable
from serving.control.judgement import check_servable, judge, kept
from serving.control.registry import set_labels, shown, touch
from serving.control.revisions import Expected
from serving.control.shapes.adapters import LintAnswer, RegisteredVersion
from serving.control.shapes.aliases import PutAlias
from serving.control.tables import Adapter, Version

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from adapters.base_model import BaseModel
    from adapters.compat import LintReport
    from adapters.intake import Staged
    from adapters.manifest import Manifest
    from adapters.store import AdapterStore
    from serving.control.aliases import Aliases
    from serving.control.audit import Caller
    from serving.control.database import Database
    from serving.control.engine_view import EngineView
    from serving.control.shapes.adapters import UploadOptions
    from serving.control.shapes.aliases import AliasAnswer


@dataclass(frozen=True)
class _Judged:
    """What is about to be recorded."""

    manifest: Manifest
    report: LintReport
    options: UploadOptions


class Registration:
    """Registers what was staged."""

    def __init__(
        self, database: Database, store: AdapterStore, aliases: Aliases, engines: EngineView
    ) -> None:
        """Know where things go.

        Args:
            database: The state.
            store: The files.
            aliases: To point one at the new version.
            engines: What has to be able to load it.
        """
        self._database = database
        self._store = store
        self._aliases = aliases
        self._engines = engines

    def lint(self, staged: Staged, options: UploadOptions) -> LintAnswer:
        """Judge an upload; nothing is kept.

        Raises:
            Unprocessable: If the base model is not one that the fleet serves.
        """
        base_name, base = self._base(staged, options)
        report = self._judged(staged, options, base)
        return LintAnswer(
            servable=report.loads_somewhere(allow_unfaithful=options.allow_unfaithful),
            digest=staged.manifest.digest,
            version=staged.manifest.version,
            base=base_name,
            report=report,
        )

    def register(self, staged: Staged, options: UploadOptions, caller: Caller) -> RegisteredVersion:
        """Store and record a version, and point the alias at it.

        Raises:
            Unprocessable: If no engine can load it, or an option cannot be followed.
            Conflict: If its short digest, or its base model, is taken by what is registered already.
            StoreError: If the store does not take it.
        """
        self._check_options(options)
        base_name, base = self._base(staged, options)
        report = self._judged(staged, options, base)
        check_servable(report, allow_unfaithful=options.allow_unfaithful)
        reference = BaseReference(name=base_name, digest=None if base is None else base.digest)
        wanted = staged.manifest.model_copy(
            update={"base": reference, "parent": options.parent or staged.manifest.parent}
        )
        manifest = self._store.push(staged.folder, wanted)
        if manifest.base.name != base_name and options.base is not None:
            raise Conflict(f"{manifest.version} is registered for '{manifest.base.name}'.")
        with self._database.write() as session:
            return self._record(session, _Judged(manifest, report, options), caller)

    def _check_options(self, options: UploadOptions) -> None:
        """Before anything is stored."""
        if options.alias is not None:
            alias_name(options.alias)
            if options.alias in self._engines.base_names():
                raise Conflict(f"'{options.alias}' is the name of a base model.", code="name_taken")
        if options.parent is not None:
            parent = str(parse_version(options.parent))
            with self._database.read() as session:
                known = session.scalar(select(Version.lora_id).where(Version.name == parent))
            if known is None:
                raise Unprocessable(f"The parent {parent} is not registered.", param="parent")

    def _base(self, staged: Staged, options: UploadOptions) -> tuple[str, BaseModel | None]:
        """Which base model it is for: what was said, else the only one, else what PEFT wrote down."""
        bases = self._engines.bases()
        name = options.base
        names = self._engines.base_names()
        if name is None and len(names) == 1:
            (name,) = names
        if name is None:
            name = staged.manifest.base.name
        if name in bases:
            return name, bases[name]
        if not name or not self._engines.is_base(name):
            raise Unprocessable(
                f"Say with 'base' which model it is for: {', '.join(sorted(names)) or 'any name'}.",
                param="base",
                code="unknown_base_model",
            )
        return name, None

    def _judged(self, staged: Staged, options: UploadOptions, base: BaseModel | None) -> LintReport:
        return judge(
            staged.folder,
            base,
            self._engines.limits(),
            scan=options.scan,
            allow_no_effect=options.allow_no_effect,
        )

    def _record(self, session: Session, judged: _Judged, caller: Caller) -> RegisteredVersion:
        manifest, options = judged.manifest, judged.options
        adapter = _adapter(session, manifest.adapter, options, caller)
        row, is_new = _version(session, adapter, judged, caller)
        alias: AliasAnswer | None = None
        session.flush()
        if options.alias is not None:
            wanted = PutAlias(target=row.name)
            alias, _ = self._aliases.put_within(session, options.alias, wanted, Expected(), caller)
        if is_new:
            publish(session)
        names = names_referring_to(session, row.name)
        answer = version_answer(row, adapter.name, names)
        return RegisteredVersion(version=answer, alias=alias, is_new=is_new)


def _adapter(session: Session, name: str, options: UploadOptions, caller: Caller) -> Adapter:
    """The adapter, made or brought back if need be, with what was said of it."""
    now_s = time.time()
    adapter = session.scalars(select(Adapter).where(Adapter.name == name)).one_or_none()
    if adapter is None:
        adapter = Adapter(
            name=name,
            owner=options.owner or caller.principal,
            description="",
            revision=1,
            created_at_s=now_s,
            updated_at_s=now_s,
            labels=[],
        )
        session.add(adapter)
        set_labels(adapter, options.labels)
        audit.record(session, caller, "create", "adapter", name, after=shown(adapter))
        return adapter
    before = shown(adapter)
    is_back = adapter.deleted_at_s is not None
    adapter.deleted_at_s = None
    adapter.owner = options.owner or adapter.owner
    if options.labels:
        present = {label.key: label.value for label in adapter.labels}
        set_labels(adapter, present | options.labels)
    if is_back or shown(adapter) != before:
        touch(adapter)
        action = "undelete" if is_back else "patch"
        audit.record(session, caller, action, "adapter", name, before=before, after=shown(adapter))
    return adapter


def _version(
    session: Session, adapter: Adapter, judged: _Judged, caller: Caller
) -> tuple[Version, bool]:
    """The version's row, and whether it was not there, or deleted, before."""
    manifest = judged.manifest
    row = session.scalars(select(Version).where(Version.name == manifest.version)).one_or_none()
    if row is not None and row.digest != manifest.digest:
        raise Conflict(
            f"{manifest.version} is another version whose digest begins alike: change the adapter "
            "by a byte, or register it under another name.",
            code="digest_collision",
        )
    report = kept(
        judged.report,
        allow_unfaithful=judged.options.allow_unfaithful,
        allow_no_effect=judged.options.allow_no_effect,
    )
    if row is None:
        row = Version(
            adapter=adapter,
            name=manifest.version,
            digest=manifest.digest,
            base=manifest.base.name,
            rank=manifest.rank,
            size_bytes=manifest.size_bytes,
            manifest=manifest.to_bytes().decode(),
            report=report,
            created_by=caller.principal,
            created_at_s=time.time(),
        )
        session.add(row)
        audit.record(session, caller, "register", "version", row.name, after=_recorded(manifest))
        return row, True
    row.report = report
    if row.deleted_at_s is None:
        return row, False
    row.deleted_at_s = None
    audit.record(session, caller, "undelete", "version", row.name)
    return row, True


def _recorded(manifest: Manifest) -> dict[str, object]:
    return {
        "digest": manifest.digest,
        "base": manifest.base.model_dump(),
        "source": manifest.source.model_dump(),
        "parent": manifest.parent,
        "size_bytes": manifest.size_bytes,
    }
