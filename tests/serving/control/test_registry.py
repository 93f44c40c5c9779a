"""Registering, finding, describing and deleting adapters, over HTTP on both databases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from control_plane import BASE, adapter, tar_of

from adapters.manifest import Manifest
from serving.control.tables import Adapter

if TYPE_CHECKING:
    from pathlib import Path

    from control_plane import ControlPlane


def test_registers_a_tar(control: ControlPlane, tmp_path: Path) -> None:
    """A tar becomes a version with its digest, its manifest and a verdict for the fleet's engine."""
    answer = control.push("support", adapter(tmp_path), 201, label="team=a", owner="bob")
    version = answer["version"]
    assert answer["is_new"]
    assert answer["alias"] is None
    assert version["version"] == f"support@{version['digest'][:12]}"
    assert version["lora_id"] == 1
    assert version["base"] == BASE
    assert version["rank"] == 8
    assert version["unloadable"] == {}
    assert version["created_by"] == "ann"
    manifest = Manifest.model_validate(version["manifest"])
    assert manifest.source.kind == "upload"
    assert [entry.path for entry in manifest.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    shown = control.get("/admin/v1/adapters/support")
    assert shown["owner"] == "bob"
    assert shown["labels"] == {"team": "a"}
    assert shown["latest"]["version"] == version["version"]
    assert shown["num_versions"] == 1
    published = control.snapshot()
    assert published is not None
    assert published.versions[version["version"]].lora_id == 1


def test_same_content_is_the_same_version(control: ControlPlane, tmp_path: Path) -> None:
    """Gzip or not, whoever pushes: 200 and the version that is there."""
    folder = adapter(tmp_path)
    first = control.push("support", folder, 201)
    again = control.call(
        "POST",
        "/admin/v1/adapters/support/versions",
        200,
        content=tar_of(folder, "w:gz"),
        headers={"content-type": "application/gzip", "x-headrace-principal": "eve"},
    )
    assert not again["is_new"]
    assert again["version"] == first["version"]


def test_registers_a_form(control: ControlPlane, tmp_path: Path) -> None:
    """Files of a form are taken, and its fields are options."""
    folder = adapter(tmp_path)
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    answer = control.call(
        "POST",
        "/admin/v1/adapters/support/versions",
        201,
        files=files,
        data={"alias": "help", "labels": "team=a,tier=1"},
    )
    assert answer["alias"]["target"] == answer["version"]["version"]
    assert control.get("/admin/v1/adapters/support")["labels"] == {"team": "a", "tier": "1"}


def test_registers_a_local_folder(control: ControlPlane, tmp_path: Path) -> None:
    """A folder of the machine is taken by its URL; its path is not kept."""
    folder = adapter(tmp_path)
    answer = control.call(
        "POST",
        "/admin/v1/adapters/support/versions",
        201,
        json={"source": folder.as_uri(), "labels": {"team": "a"}},
    )
    assert answer["version"]["manifest"]["source"] == {"kind": "path", "detail": ""}


def test_unloadable_adapter_is_refused(control: ControlPlane, tmp_path: Path) -> None:
    """What no engine of the fleet serves is refused with its reason, and nothing is kept."""
    folder = adapter(tmp_path, rank=24)
    error = control.refused(
        "POST",
        "/admin/v1/adapters/support/versions",
        422,
        content=tar_of(folder),
        headers={"content-type": "application/x-tar"},
    )
    assert error["code"] == "no_engine_can_load"
    assert "vllm: " in error["message"]
    assert "Rank 24" in error["message"]
    assert control.get("/admin/v1/adapters")["data"] == []
    assert files_under(control.parts.settings.state_dir) == []


def test_lint_keeps_nothing(control: ControlPlane, tmp_path: Path) -> None:
    """The linter answers for good and bad adapters, and the registry stays empty."""
    headers = {"content-type": "application/x-tar"}
    good, bad = adapter(tmp_path), adapter(tmp_path, rank=24)
    route = "/admin/v1/adapters/lint"
    answer = control.call("POST", route, 200, content=tar_of(good), headers=headers)
    assert answer["servable"]
    assert answer["base"] == BASE
    answer = control.call("POST", route, 200, content=tar_of(bad), headers=headers)
    assert not answer["servable"]
    assert control.get("/admin/v1/adapters")["data"] == []
    assert files_under(control.parts.settings.state_dir) == []


def test_parent_has_to_be_known(control: ControlPlane, tmp_path: Path) -> None:
    """A parent that is registered is kept in the manifest; another is refused."""
    parent = control.push("support", adapter(tmp_path))["version"]["version"]
    child = control.push("support", adapter(tmp_path, 1), parent=parent)["version"]
    assert child["manifest"]["parent"] == parent
    request = {"params": {"parent": f"other@{'0' * 12}"}, "content": tar_of(adapter(tmp_path, 2))}
    headers = {"content-type": "application/x-tar"}
    error = control.refused(
        "POST", "/admin/v1/adapters/support/versions", 422, headers=headers, **request
    )
    assert error["param"] == "parent"


def test_searches(control: ControlPlane, tmp_path: Path) -> None:
    """By part of a name or owner in any case, by label with and without a value, by base."""
    folder = adapter(tmp_path)
    control.push("Support-de", folder, owner="bob", label=["lang=de", "tier=1"])
    control.push("support-fr", folder, owner="Bobby", label=["lang=fr"])
    control.push("legal_100", folder, owner="zoe")

    def found(**query: object) -> list[str]:
        return [one["name"] for one in control.get("/admin/v1/adapters", **query)["data"]]

    assert sorted(found()) == ["Support-de", "legal_100", "support-fr"]
    assert sorted(found(query="SUPPORT")) == ["Support-de", "support-fr"]
    assert sorted(found(query="bob")) == ["Support-de", "support-fr"]
    assert found(query="%") == []
    assert found(query="l_1") == ["legal_100"]
    assert found(owner="bob") == ["Support-de"]
    assert found(label="lang=fr") == ["support-fr"]
    assert sorted(found(label="lang")) == ["Support-de", "support-fr"]
    assert found(label=["lang", "tier=1"]) == ["Support-de"]
    assert len(found(base=BASE)) == 3
    assert found(base="other") == []


def test_pages_through_a_thousand(control: ControlPlane) -> None:
    """Every adapter comes once, in pages of the asked length, in the same order on each database."""
    names = [f"adapter-{number:04}" for number in range(1000)]
    with control.parts.database.write() as session:
        session.add_all(
            Adapter(
                name=name,
                owner="ann",
                description="",
                revision=1,
                created_at_s=0.0,
                updated_at_s=0.0,
            )
            for name in names
        )
    seen, cursor = [], None
    while True:
        query = {"limit": 150} | ({} if cursor is None else {"cursor": cursor})
        page = control.get("/admin/v1/adapters", **query)
        seen += [one["name"] for one in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        assert len(page["data"]) == 150
    assert seen == names
    assert control.refused("GET", "/admin/v1/adapters?limit=201", 422)["param"] == "limit"
    for bad in ("x", "MQ==", "IlwwIg==", "InhcdTAwMDAi"):
        assert control.refused("GET", f"/admin/v1/adapters?cursor={bad}", 400)["param"] == "cursor"


def test_patch_checks_the_revision(control: ControlPlane, tmp_path: Path) -> None:
    """A change names the revision in the body (409) or in If-Match (412), or overwrites."""
    control.push("support", adapter(tmp_path), label="team=a")
    route = "/admin/v1/adapters/support"
    answer = control.client.patch(route, json={"description": "d", "revision": 1})
    assert answer.headers["etag"] == '"2"'
    assert answer.json()["labels"] == {"team": "a"}
    error = control.refused("PATCH", route, 409, json={"owner": "x", "revision": 1})
    assert error["code"] == "stale_revision"
    control.refused("PATCH", route, 412, json={"owner": "x"}, headers={"if-match": '"1"'})
    labels = {"labels": {"tier": "1"}}
    changed = control.call("PATCH", route, 200, json=labels, headers={"if-match": '"1", "2"'})
    assert changed["labels"] == {"tier": "1"}
    assert changed["revision"] == 3
    assert control.refused("PATCH", route, 422, json={"colour": "red"})["param"] == "colour"


def test_deleted_version_comes_back(control: ControlPlane, tmp_path: Path) -> None:
    """A deleted version is unknown and unpublished until the same content is pushed again."""
    folder = adapter(tmp_path)
    version = control.push("support", folder)["version"]
    route = f"/admin/v1/adapters/support/versions/{version['digest']}"
    assert control.call("DELETE", route, 200) == {"id": version["version"], "deleted": True}
    assert control.refused("GET", route, 404)["code"] == "version_not_found"
    published = control.snapshot()
    assert published is not None
    assert published.versions == {}
    listed = control.get("/admin/v1/adapters/support/versions", include_deleted=True)["data"]
    assert [one["version"] for one in listed] == [version["version"]]
    back = control.push("support", folder, 201)["version"]
    assert back["lora_id"] == version["lora_id"]
    assert back["deleted_at"] is None


def test_deleted_adapter_comes_back(control: ControlPlane, tmp_path: Path) -> None:
    """Deleting an adapter deletes its versions; a push brings the name and that version back."""
    old, new = adapter(tmp_path), adapter(tmp_path, 1)
    control.push("support", old)
    control.push("support", new)
    control.call("DELETE", "/admin/v1/adapters/support", 200)
    control.refused("GET", "/admin/v1/adapters/support", 404)
    assert control.get("/admin/v1/adapters")["data"] == []
    control.push("support", new, 201)
    assert control.get("/admin/v1/adapters/support")["num_versions"] == 1


def test_version_in_use_is_kept(control: ControlPlane, tmp_path: Path) -> None:
    """Target, rollback target and pending target of an alias cannot be deleted; the answer says whose."""
    first = control.push("support", adapter(tmp_path), alias="help")["version"]
    second = control.push("support", adapter(tmp_path, 1))["version"]
    third = control.push("support", adapter(tmp_path, 2))["version"]
    control.ready(second["version"])
    control.call("PUT", "/admin/v1/aliases/help", 200, json={"target": second["version"]})
    control.call("PUT", "/admin/v1/aliases/help", 202, json={"target": third["version"]})
    for version in (first, second, third):
        route = f"/admin/v1/adapters/support/versions/{version['digest']}"
        error = control.refused("DELETE", route, 409)
        assert error["code"] == "in_use"
        assert "help" in error["message"]
    assert control.refused("DELETE", "/admin/v1/adapters/support", 409)["code"] == "in_use"


def test_audit_tells_who_did_what(control: ControlPlane, tmp_path: Path) -> None:
    """Every change is an event with its principal and request, the newest first."""
    version = control.push("support", adapter(tmp_path), alias="help")["version"]["version"]
    control.call("DELETE", "/admin/v1/aliases/help", 200, headers={"x-request-id": "r-1"})
    events = control.get("/admin/v1/audit")["data"]
    told = [(one["principal"], one["action"], one["kind"], one["subject"]) for one in events]
    assert told == [
        ("ann", "delete", "alias", "help"),
        ("ann", "create", "alias", "help"),
        ("ann", "register", "version", version),
        ("ann", "create", "adapter", "support"),
    ]
    assert events[0]["request_id"] == "r-1"
    assert events[1]["after"]["target"] == version
    of_alias = control.get("/admin/v1/audit", kind="alias", action="create")["data"]
    assert [one["subject"] for one in of_alias] == ["help"]


def files_under(folder: Path) -> list[str]:
    """Every file of store and staging."""
    folders = [folder / "store", folder / "staging"]
    return [str(path) for root in folders for path in root.rglob("*") if path.is_file()]
