"""Pointing aliases: at once, after the proof, and back; over HTTP on both databases."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from control_plane import BASE, REPLICAS, adapter, running, settings_of, wait

from serving.control.ledger import PendingFlip, PlacementPhase

if TYPE_CHECKING:
    from pathlib import Path

    from control_plane import ControlPlane

HELP = "/admin/v1/aliases/help"


@pytest.fixture
def versions(control: ControlPlane, tmp_path: Path) -> list[str]:
    """Three versions of one adapter."""
    pushed = [control.push("support", adapter(tmp_path, seed)) for seed in range(3)]
    return [one["version"]["version"] for one in pushed]


def put(control: ControlPlane, status: int, **body: Any) -> Any:
    """PUT of the alias `help`."""
    return control.call("PUT", HELP, status, json=body)


def published_target(control: ControlPlane) -> str | None:
    """Where gateways send the alias."""
    published = control.snapshot()
    assert published is not None
    alias = published.aliases.get("help")
    return None if alias is None else alias.target


def test_new_alias_is_published_at_once(control: ControlPlane, versions: list[str]) -> None:
    """A new alias points at a version that nobody has loaded: its requests wait for the load."""
    answer = put(control, 201, target=versions[0])
    assert answer["state"] == "serving"
    assert answer["pending"] is None
    assert answer["owner"] == "ann"
    assert published_target(control) == versions[0]


def test_existing_alias_waits_for_the_proof(control: ControlPlane, versions: list[str]) -> None:
    """The alias keeps its target until the reconciler flips it, then changes in one snapshot."""
    first, second, _ = versions
    put(control, 201, target=first)
    answer = put(control, 202, target=second)
    assert answer["state"] == "pending"
    assert answer["target"] == first
    assert answer["pending"]["target"] == second
    assert answer["pending"]["num_needed"] == 1
    assert published_target(control) == first
    assert control.parts.ledger.pending_flips() == [PendingFlip("help", second, 1)]
    before = control.snapshot()
    assert before is not None
    control.parts.ledger.flip("help")
    after = control.snapshot(epoch=before.epoch, after=before.version, wait_s=10)
    assert after is not None
    assert after.version == before.version + 1
    assert after.aliases["help"].target == second
    shown = control.get(HELP)
    assert shown["state"] == "serving"
    assert shown["previous"] == first
    assert control.parts.ledger.pending_flips() == []


def test_proven_version_and_base_flip_at_once(control: ControlPlane, versions: list[str]) -> None:
    """A version that is ready where it has to be, and a base model, are taken without waiting."""
    first, second, _ = versions
    put(control, 201, target=first)
    control.ready(second, REPLICAS[0])
    assert put(control, 200, target=second)["target"] == second
    assert put(control, 200, target=BASE)["target"] == BASE
    assert published_target(control) == BASE


def test_flip_needs_as_many_replicas_as_before(control: ControlPlane, versions: list[str]) -> None:
    """Where the present version is ready on two replicas, the next has to be too."""
    first, second, _ = versions
    put(control, 201, target=first)
    control.ready(first)
    control.ready(second, REPLICAS[0])
    pending = put(control, 202, target=second)["pending"]
    assert (pending["num_ready"], pending["num_needed"]) == (1, 2)
    assert pending["replicas"] == {REPLICAS[0]: "ready"}
    # A replica that is gone does not hold the flip up for ever.
    control.parts.ledger.forget(REPLICAS[1], first)
    assert control.parts.ledger.pending_flips() == [PendingFlip("help", second, 1)]


def test_min_copies_are_wanted_and_kept(control: ControlPlane, versions: list[str]) -> None:
    """`min_copies` reaches the reconciler for the target and the pending one, and stays when left out."""
    first, second, third = versions
    put(control, 201, target=first, min_copies=2)
    put(control, 202, target=second)
    copies = {one.version: one.min_copies for one in control.parts.ledger.wanted()}
    assert copies == {first: 2, second: 2, third: 0}
    aliased = {one.version: one.is_aliased for one in control.parts.ledger.wanted()}
    assert aliased == {first: True, second: False, third: False}
    error = control.refused("PUT", HELP, 422, json={"target": first, "min_copies": 3})
    assert error["param"] == "min_copies"


def test_failed_flip_shows_its_reason(control: ControlPlane, versions: list[str]) -> None:
    """After a failed proof the alias keeps its target; another PUT tries again."""
    first, second, _ = versions
    put(control, 201, target=first)
    put(control, 202, target=second)
    reason = "the probe answered as the base model does"
    control.place(REPLICAS[0], second, PlacementPhase.FAILED, reason=reason)
    control.parts.ledger.fail_flip("help", reason)
    shown = control.get(HELP)
    assert shown["state"] == "failed"
    assert shown["target"] == first
    assert shown["pending"]["reason"] == reason
    assert shown["pending"]["replicas"] == {REPLICAS[0]: f"failed: {reason}"}
    control.parts.ledger.flip("help")
    assert published_target(control) == first
    assert put(control, 202, target=second)["pending"]["reason"] is None
    actions = [one["action"] for one in control.get(f"{HELP}/history")["data"]]
    assert actions == ["request", "fail", "request", "create"]


def test_outcome_of_another_target_is_not_taken(control: ControlPlane, versions: list[str]) -> None:
    """A proof, or a failure, of what was read counts for nothing once something else is wanted."""
    first, second, third = versions
    ledger = control.parts.ledger
    put(control, 201, target=first)
    put(control, 202, target=second)
    assert ledger.pending_flips() == [PendingFlip("help", second, 1)]
    put(control, 202, target=third)
    ledger.flip("help")
    ledger.fail_flip("help", f"{second} is broken")
    shown = control.get(HELP)
    assert (shown["target"], shown["state"]) == (first, "pending")
    assert shown["pending"]["target"] == third


def test_wait_returns_with_the_outcome(control: ControlPlane, versions: list[str]) -> None:
    """`wait_s` answers 200 as soon as the flip has happened, long before the time is up."""
    first, second, _ = versions
    put(control, 201, target=first)
    ledger = control.parts.ledger

    def prove() -> None:
        wait(ledger.pending_flips)
        ledger.flip("help")

    prover = threading.Thread(target=prove)
    prover.start()
    answer = control.call("PUT", f"{HELP}?wait_s=25", 200, json={"target": second})
    prover.join()
    assert answer["target"] == second
    assert answer["state"] == "serving"
    assert control.call("PUT", f"{HELP}?wait_s=0.05", 202, json={"target": first})["pending"]
    assert control.refused("PUT", f"{HELP}?wait_s=61", 422, json={"target": first})


def test_rollback_goes_back_and_forth(control: ControlPlane, versions: list[str]) -> None:
    """A rollback is a flip to the target before; the second undoes the first; a third is the first."""
    first, second, _ = versions
    control.ready(first)
    control.ready(second)
    put(control, 201, target=first)
    error = control.refused("POST", f"{HELP}/rollback", 409)
    assert error["code"] == "no_previous_target"
    put(control, 200, target=second)
    for target in (first, second, first):
        answer = control.call("POST", f"{HELP}/rollback", 200)
        assert answer["target"] == target
        assert published_target(control) == target


def test_rollback_waits_for_the_proof_too(control: ControlPlane, versions: list[str]) -> None:
    """The target before may have been unloaded: then it is loaded and proven first."""
    first, second, _ = versions
    put(control, 201, target=first)
    control.ready(second)
    put(control, 200, target=second)
    answer = control.call("POST", f"{HELP}/rollback", 202)
    assert answer["pending"]["target"] == first
    assert answer["target"] == second


def test_rollback_of_a_waiting_flip_gives_it_up(control: ControlPlane, versions: list[str]) -> None:
    """The last change is undone, and that is the flip that has not happened."""
    first, second, _ = versions
    put(control, 201, target=first)
    put(control, 202, target=second)
    answer = control.call("POST", f"{HELP}/rollback", 200)
    assert (answer["target"], answer["state"]) == (first, "serving")
    assert control.parts.ledger.pending_flips() == []


def test_revisions_guard_changes(control: ControlPlane, versions: list[str]) -> None:
    """Stale revisions are refused; revision 0 and If-None-Match want a new alias."""
    first = versions[0]
    put(control, 201, target=first, revision=0)
    assert control.refused("PUT", HELP, 409, json={"target": first, "revision": 0})
    request = {"json": {"target": BASE}}
    control.refused("PUT", HELP, 412, headers={"if-none-match": "*"}, **request)
    control.refused("PUT", HELP, 412, headers={"if-match": '"7"'}, **request)
    answer = control.client.put(HELP, headers={"if-match": '"1"'}, **request)
    assert answer.status_code == 200
    assert answer.headers["etag"] == '"2"'
    control.refused("POST", f"{HELP}/rollback", 409, json={"revision": 1})
    control.refused("DELETE", HELP, 412, headers={"if-match": '"1"'})
    control.call("DELETE", HELP, 200, headers={"if-match": '"2"'})
    # A name's revisions never repeat: what somebody knew of the old alias is stale.
    assert put(control, 201, target=first)["revision"] == 4


def test_bad_targets(control: ControlPlane, versions: list[str]) -> None:
    """Unknown versions, unknown bases and names that break the grammar are told apart."""
    unknown = {"target": f"support@{'0' * 12}"}
    assert control.refused("PUT", HELP, 404, json=unknown)["code"] == "version_not_found"
    error = control.refused("PUT", HELP, 422, json={"target": "gpt-9"})
    assert error["code"] == "unknown_base_model"
    error = control.refused("PUT", HELP, 400, json={"target": "support@zz"})
    assert error["code"] == "invalid_name"
    taken = control.refused("PUT", f"/admin/v1/aliases/{BASE}", 409, json={"target": versions[0]})
    assert taken["code"] == "name_taken"
    name = control.refused("PUT", "/admin/v1/aliases/a@b", 400, json={"target": BASE})
    assert name["code"] == "invalid_name"
    assert control.refused("GET", HELP, 404)["code"] == "alias_not_found"


def test_lists_aliases_by_what_they_refer_to(control: ControlPlane, versions: list[str]) -> None:
    """The filter finds targets, pending targets and rollback targets."""
    first, second, _ = versions
    control.call("PUT", "/admin/v1/aliases/a", 201, json={"target": first})
    control.call("PUT", "/admin/v1/aliases/b", 201, json={"target": second})
    control.call("PUT", "/admin/v1/aliases/b", 202, json={"target": first})

    def found(**query: str) -> list[str]:
        return [one["alias"] for one in control.get("/admin/v1/aliases", **query)["data"]]

    assert found() == ["a", "b"]
    assert found(target=first) == ["a", "b"]
    assert found(target=second) == ["b"]


def test_two_processes_flip_one_alias(
    control: ControlPlane, versions: list[str], tmp_path: Path, base_folder: Path
) -> None:
    """Of two changes from the same revision, made at once in two control planes, one is taken."""
    first, second, third = versions
    put(control, 201, target=first)
    control.ready(second)
    control.ready(third)
    url = control.parts.settings.database_url
    with running(settings_of(tmp_path / "other", base_folder, database_url=url)) as other:
        for _ in range(10):
            revision = control.get(HELP)["revision"]
            answers: list[int] = []
            barrier = threading.Barrier(2)

            def change(plane: ControlPlane, target: str) -> None:
                body = {"target": target, "revision": revision}  # noqa: B023
                barrier.wait()  # noqa: B023
                answers.append(plane.client.put(HELP, json=body).status_code)  # noqa: B023

            racers = [
                threading.Thread(target=change, args=args)
                for args in ((control, second), (other, third))
            ]
            for racer in racers:
                racer.start()
            for racer in racers:
                racer.join()
            assert sorted(answers) == [200, 409]
        # What one publishes the other sees.
        target = control.get(HELP)["target"]
        publisher = other.parts.publisher
        wait(lambda: publisher.current.published.aliases["help"].target == target)
