"""The moves of an alias: to a target at once, to one that is proven first, and what is recorded of them.

Owns the order of an alias's states. Never checks who may, or whether a target exists (`aliases.py`
does). Every function works in a transaction of the caller's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from serving.control import audit
from serving.control.alias_states import is_version, num_needed, num_ready
from serving.control.audit import Caller
from serving.control.database import publish
from serving.control.tables import Alias, AliasChange

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

SYSTEM = "headrace"


def flip(session: Session, name: str, target: str | None) -> None:
    """Point an alias at its pending target; nothing happens if it does not wait for it any more.

    Args:
        session: Of the transaction.
        name: Of the alias.
        target: The version that has been proven; None is whichever the alias waits for.
    """
    alias = session.get(Alias, name)
    if alias is None or alias.pending is None or not _is_waiting(alias, target):
        return
    before, caller = shown(alias), Caller(alias.pending_by or SYSTEM)
    touch(alias)
    _arrive(session, alias, alias.pending, "flip", caller)
    audit.record(session, caller, "flip", "alias", name, before=before, after=shown(alias))
    publish(session)


def fail(session: Session, name: str, target: str | None, reason: str) -> None:
    """Give a pending flip up; the alias keeps its target and shows the reason.

    Args:
        session: Of the transaction.
        name: Of the alias.
        target: The version that has failed; None is whichever the alias waits for.
        reason: One sentence.
    """
    alias = session.get(Alias, name)
    if alias is None or not _is_waiting(alias, target):
        return
    before, caller = shown(alias), Caller(alias.pending_by or SYSTEM)
    touch(alias)
    alias.pending_reason = reason
    record_change(session, alias, "fail", alias.target, alias.pending, caller)
    audit.record(session, caller, "fail", "alias", name, before=before, after=shown(alias))


def _is_waiting(alias: Alias, target: str | None) -> bool:
    if alias.pending is None or alias.pending_reason is not None:
        return False
    return target is None or target == alias.pending


def aim(session: Session, alias: Alias, target: str, action: str, caller: Caller) -> None:
    """Go to a target: at once if it can serve, else once it is proven."""
    if target == alias.target:
        clear_pending(alias)
    elif not is_version(target) or num_ready(session, target) >= num_needed(session, alias):
        _arrive(session, alias, target, action, caller)
    elif target != alias.pending or alias.pending_reason is not None:
        alias.pending = target
        alias.pending_reason = None
        alias.pending_since_s = alias.updated_at_s
        alias.pending_by = caller.principal
        record_change(session, alias, "request", alias.target, target, caller)


def _arrive(session: Session, alias: Alias, target: str, action: str, caller: Caller) -> None:
    record_change(session, alias, action, alias.target, target, caller)
    alias.previous, alias.target = alias.target, target
    clear_pending(alias)


def clear_pending(alias: Alias) -> None:
    """Have an alias wait for nothing."""
    alias.pending = alias.pending_reason = alias.pending_since_s = alias.pending_by = None


def touch(alias: Alias) -> None:
    """Count a change of an alias."""
    alias.revision += 1
    alias.updated_at_s = time.time()


def record_change(
    session: Session,
    alias: Alias,
    action: str,
    before: str | None,
    after: str | None,
    caller: Caller,
) -> None:
    """Append to an alias's history.

    Args:
        session: Of the transaction that makes the change.
        alias: As it is after the change.
        action: `create`, `flip`, `rollback`, `request`, `cancel`, `fail` or `delete`.
        before: Target before, None for none.
        after: Target after, None for none.
        caller: Who makes it.
    """
    session.add(
        AliasChange(
            alias=alias.name,
            revision=alias.revision,
            action=action,
            before=before,
            after=after,
            principal=caller.principal,
            at_s=time.time(),
        )
    )


def shown(alias: Alias) -> dict[str, object]:
    """What the audit keeps of an alias."""
    return {
        "target": alias.target,
        "previous": alias.previous,
        "pending": alias.pending,
        "pending_reason": alias.pending_reason,
        "min_copies": alias.min_copies,
        "owner": alias.owner,
        "description": alias.description,
        "revision": alias.revision,
    }
