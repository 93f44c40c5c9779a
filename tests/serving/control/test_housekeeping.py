"""What is removed from the store, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from control_plane import REPLICAS, adapter

from adapters.intake import Intake
from adapters.locations import Location
from adapters.store import AdapterStore
from serving.control.housekeeping import Housekeeping
from serving.control.ledger import PlacementPhase
from serving.control.reconcile import Reconciler

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from control_plane import ControlPlane

GRACE_S = 24 * 3600.0


def test_removes_what_nobody_names(control: ControlPlane, tmp_path: Path) -> None:
    """Files whose row is gone, as after a crash between store and database; nothing that is in use."""
    versions = {}
    for seed, name in enumerate(("kept", "placed", "read", "lost")):
        versions[name] = control.push(name, adapter(tmp_path, seed))["version"]
        if name != "kept":
            route = f"/admin/v1/adapters/{name}/versions/{versions[name]['digest']}"
            control.call("DELETE", route, 200)
    control.place(REPLICAS[0], versions["placed"]["version"], PlacementPhase.DRAINING)
    settings = control.parts.settings
    store = AdapterStore(Location(settings.store))
    intake = Intake(settings.state_dir / "staging", settings.limits.intake)
    reconciler = Reconciler.__new__(Reconciler)  # `clean` is told what it has in use
    keeping = Housekeeping(settings, control.parts.database, store, None, intake, reconciler)
    in_use: Collection[str] = {versions["read"]["version"]}
    first = keeping.clean(in_use, 1000.0)
    assert first.removed_versions == ()
    # Within the time of grace nothing goes: an upload may not have its row yet.
    assert keeping.clean(in_use, 1000.0 + GRACE_S / 2).removed_versions == ()
    done = keeping.clean(in_use, 1001.0 + GRACE_S)
    assert done.removed_versions == (versions["lost"]["version"],)
    assert done.removed_digests == (versions["lost"]["digest"],)
    left = {stored.adapter for stored in store.list()}
    assert left == {"kept", "placed", "read"}
    control.push("lost", adapter(tmp_path, 3), 201)
