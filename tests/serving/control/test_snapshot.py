"""The long poll that gateways follow, and what they report."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
from control_plane import BASE, HEADERS, REPLICAS, adapter, running, settings_of, wait

from serving.control.ledger import PlacementPhase
from serving.routing.published import Placement, decode

if TYPE_CHECKING:
    from pathlib import Path

    from control_plane import ControlPlane

    from serving.routing.published import Published

SNAPSHOT = "/internal/v1/snapshot"


def poll_in_thread(control: ControlPlane, gateway: str, known: Published) -> dict[str, Any]:
    """Starts a long poll; the result has its answer and when it came."""
    result: dict[str, Any] = {}

    def ask() -> None:
        query = {"gateway": gateway, "epoch": known.epoch, "after": known.version, "wait_s": 20}
        answer = httpx.get(f"{control.url}{SNAPSHOT}", params=query, headers=HEADERS, timeout=30)
        result["at_s"] = time.monotonic()
        result["status"] = answer.status_code
        result["published"] = decode(answer.content) if answer.content else None

    result["thread"] = threading.Thread(target=ask)
    result["thread"].start()
    return result


def num_waiters(control: ControlPlane) -> int:
    """Long polls that wait."""
    return control.parts.num_waiters


def test_follows_placements(control: ControlPlane, tmp_path: Path) -> None:
    """What gateways may see of a placement changes the snapshot; what they may not does not."""
    version = control.push("support", adapter(tmp_path))["version"]["version"]
    replica, seen = REPLICAS[0], []
    for phase in (
        PlacementPhase.LOADING,
        PlacementPhase.LOADED,
        PlacementPhase.READY,
        PlacementPhase.DRAINING,
        PlacementPhase.RETRYING,
    ):
        control.place(replica, version, phase)
        wait(lambda: control.parts.publisher.current.version == control.parts.database.published)
        published = control.snapshot()
        assert published is not None
        seen.append((published.version, published.versions[version].placements.get(replica)))
    path = f"/cache/{version}"
    start = seen[0][0]
    assert seen == [
        (start, None),
        (start + 1, Placement("loaded", path)),
        (start + 2, Placement("ready", path)),
        (start + 3, Placement("draining", path)),
        (start + 4, None),
    ]


def test_waits_for_the_next_one(control: ControlPlane) -> None:
    """204 when nothing comes in time; at once what is newer, and what is of another database."""
    known = control.snapshot()
    assert known is not None
    began_s = time.monotonic()
    assert control.snapshot(epoch=known.epoch, after=known.version, wait_s=0.2) is None
    assert time.monotonic() - began_s >= 0.2
    assert control.snapshot(epoch="of another database", after=10**6, wait_s=10) == known
    assert control.snapshot(epoch=known.epoch, after=0, wait_s=10) == known


def test_flip_reaches_every_waiting_gateway_at_once(control: ControlPlane) -> None:
    """Twenty polls wait; a change of an alias answers all of them within a tenth of a second."""
    known = control.snapshot()
    assert known is not None
    polls = [poll_in_thread(control, f"g{number}", known) for number in range(20)]
    wait(lambda: num_waiters(control) == 20)
    control.call("PUT", "/admin/v1/aliases/help", 201, json={"target": BASE})
    changed_s = time.monotonic()
    for poll in polls:
        poll["thread"].join()
        assert poll["status"] == 200
        assert poll["published"].aliases["help"].target == BASE
        assert poll["published"].version == known.version + 1
        # Twenty Python threads on a busy machine: the bound is for the server, not for these.
        assert poll["at_s"] - changed_s < 1.0
    assert num_waiters(control) == 0


def test_number_grows_over_restarts(database_url: str, tmp_path: Path, base_folder: Path) -> None:
    """A restarted control plane publishes what was recorded, under the same epoch and number."""
    settings = settings_of(tmp_path / "state", base_folder, database_url=database_url)
    with running(settings) as control:
        version = control.push("support", adapter(tmp_path), alias="help")["version"]["version"]
        control.ready(version)
        wait(lambda: control.parts.publisher.current.version == control.parts.database.published)
        before = control.snapshot()
    with running(settings) as control:
        after = control.snapshot()
        assert after == before
        assert after is not None
        assert set(after.versions[version].placements) == set(REPLICAS)
        control.call("DELETE", "/admin/v1/aliases/help", 200)
        changed = control.snapshot(epoch=after.epoch, after=after.version, wait_s=10)
        assert changed is not None
        assert changed.version == after.version + 1


def test_database_that_went_back_gets_a_new_epoch(control: ControlPlane) -> None:
    """A gateway that knows a newer number of the same database has the numbers start anew."""
    known = control.snapshot()
    assert known is not None
    renewed = control.snapshot(epoch=known.epoch, after=known.version + 100, wait_s=10)
    assert renewed is not None
    assert renewed.epoch != known.epoch
    events = control.get("/admin/v1/audit", kind="epoch")["data"]
    assert events[0]["before"]["epoch"] == known.epoch


def test_gateway_that_hangs_up_frees_its_place(small_control: ControlPlane) -> None:
    """A poll whose caller has gone is not waited for."""
    known = small_control.snapshot()
    assert known is not None
    query = {"gateway": "g", "epoch": known.epoch, "after": known.version, "wait_s": 30}
    try:
        small_control.client.get(SNAPSHOT, params=query, timeout=0.3)
    except httpx.ReadTimeout:
        wait(lambda: num_waiters(small_control) == 0, 5)
    else:
        raise AssertionError("the poll was answered")


def test_waiters_are_bounded(tmp_path: Path, base_folder: Path) -> None:
    """One more long poll than the bound is answered 503 and counted."""
    limits = {"max_waiters": 1}
    with running(settings_of(tmp_path / "state", base_folder, limits=limits)) as control:
        known = control.snapshot()
        assert known is not None
        poll = poll_in_thread(control, "g1", known)
        wait(lambda: num_waiters(control) == 1)
        answer = control.client.get(SNAPSHOT, params={"gateway": "g2"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "headrace_control_waiters_refused_total 1.0" in control.client.get("/metrics").text
        control.call("PUT", "/admin/v1/aliases/help", 201, json={"target": BASE})
        poll["thread"].join()
        assert poll["status"] == 200


def test_change_waits_for_the_gateways(tmp_path: Path, base_folder: Path) -> None:
    """A change is answered once the live gateways have it, or after the time that they are given."""
    with running(settings_of(tmp_path / "state", base_folder, ack_wait_s=20.0)) as control:
        known = control.snapshot()
        assert known is not None

        def follow() -> None:
            first = poll_in_thread(control, "g", known)
            first["thread"].join()
            second = poll_in_thread(control, "g", first["published"])
            second["thread"].join()
            last = second["published"]
            query = {"gateway": "g", "epoch": last.epoch, "after": last.version}
            httpx.get(f"{control.url}{SNAPSHOT}", params=query, headers=HEADERS, timeout=30)

        gateway = threading.Thread(target=follow)
        gateway.start()
        wait(lambda: num_waiters(control) == 1)
        began_s = time.monotonic()
        control.call("PUT", "/admin/v1/aliases/help", 201, json={"target": BASE})
        assert time.monotonic() - began_s < 10
        acked = control.get("/admin/v1/replicas")["gateways"]
        assert acked[0]["gateway"] == "g"
        assert acked[0]["snapshot_version"] == known.version + 1
        control.call("DELETE", "/admin/v1/aliases/help", 200)
        gateway.join()


def test_reports_reach_the_sink(small_control: ControlPlane, tmp_path: Path) -> None:
    """Traffic and demand are handed on; a version that nobody knows is refused."""
    version = small_control.push("support", adapter(tmp_path))["version"]["version"]
    heard: list[Any] = []

    class Sink:
        def add(self, version: str, requests: int, tokens: int) -> None:
            heard.append((version, requests, tokens))

        def ask(self, version: str) -> None:
            heard.append(version)

    small_control.parts.traffic = Sink()
    body = {"gateway": "g", "versions": {version: {"requests": 3, "tokens": 40}}}
    small_control.call("POST", "/internal/v1/traffic", 204, json=body)
    small_control.call("POST", "/internal/v1/demand", 204, json={"version": version})
    small_control.refused("POST", "/internal/v1/demand", 404, json={"version": "no@0"})
    negative = {"versions": {version: {"requests": -1}}}
    small_control.refused("POST", "/internal/v1/traffic", 422, json=negative)
    assert heard == [(version, 3, 40), version]


def test_placements_and_retry(control: ControlPlane, tmp_path: Path) -> None:
    """Replicas show what they have; a failed version is tried again when asked for."""
    version = control.push("support", adapter(tmp_path))["version"]["version"]
    control.place(
        REPLICAS[0], version, PlacementPhase.FAILED, reason="no room", num_attempts=5, load_s=1.5
    )
    replicas = control.get("/admin/v1/replicas")["data"]
    assert [one["replica"] for one in replicas] == list(REPLICAS)
    assert replicas[0]["versions"][0]["reason"] == "no room"
    assert replicas[1]["versions"] == []
    route = f"/admin/v1/replicas/{REPLICAS[0]}/versions/{version}/retry"
    answer = control.call("POST", route, 200)
    assert (answer["phase"], answer["num_attempts"], answer["retry_at"]) == ("retrying", 0, 0.0)
    (row,) = control.parts.ledger.placements()
    assert row.phase is PlacementPhase.RETRYING
    control.place(REPLICAS[0], version, PlacementPhase.READY)
    assert control.refused("POST", route, 409)["code"] == "conflict"
    placed = control.get(f"/admin/v1/versions/{version}/placements")["data"]
    assert [(one["replica"], one["phase"]) for one in placed] == [(REPLICAS[0], "ready")]
    control.refused("GET", f"/admin/v1/versions/no@{'0' * 12}/placements", 404)


def test_goldens_are_kept_once(control: ControlPlane, tmp_path: Path) -> None:
    """The first proof of a version on an engine kind stays what later ones are compared with."""
    version = control.push("support", adapter(tmp_path))["version"]["version"]
    ledger = control.parts.ledger
    assert ledger.golden(version, "vllm") is None
    ledger.record_golden(version, "vllm", [-0.5, -1.25])
    ledger.record_golden(version, "vllm", [-9.0])
    assert ledger.golden(version, "vllm") == [-0.5, -1.25]
    assert ledger.golden(version, "sglang") is None
