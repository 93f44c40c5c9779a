"""The database's identity, changed when its numbers have gone back.

Owns what happens after a backup was restored: gateways know newer numbers than the database, and would
take its snapshots for old ones. Called by the long poll, by thread.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING

from serving.control import audit
from serving.control.audit import Caller
from serving.control.database import publish, state

if TYPE_CHECKING:
    from serving.control.database import Database

logger = logging.getLogger(__name__)


def renew_if_behind(database: Database, epoch: str, version: int) -> None:
    """Give the database a new epoch if a gateway has a newer snapshot of the present one.

    Args:
        database: Whose numbers may have gone back.
        epoch: The gateway's.
        version: The gateway's snapshot.

    Raises:
        DatabaseUnavailable: If the database does not answer.
    """
    with database.write() as session:
        row = state(session)
        if row.epoch != epoch or row.snapshot_version >= version:
            return
        before = {"epoch": row.epoch, "snapshot_version": row.snapshot_version}
        row.epoch = secrets.token_hex(16)
        audit.record(session, Caller("headrace"), "renew", "epoch", row.epoch, before=before)
        publish(session)
    logger.warning("database went back in time: new epoch", extra=before)
