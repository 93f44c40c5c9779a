"""What holds for every route: the token, the shape of errors, bounds, the OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from control_plane import HEADERS, TOKEN, running, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from control_plane import ControlPlane

METHODS = {"get", "put", "post", "patch", "delete"}


def routes(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each operation of the OpenAPI document with its name."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method in METHODS:
                yield f"{method.upper()} {path}", operation


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é"],
)
def test_nothing_without_the_token(small_control: ControlPlane, authorization: str | None) -> None:
    """Every route but `/healthz` is 401 without it, those that do not exist included."""
    headers = {} if authorization is None else {b"authorization": authorization.encode()}
    with httpx.Client(base_url=small_control.url) as client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200
        document = small_control.get("/admin/v1/openapi.json")
        paths = [name.split() for name, _ in routes(document)]
        paths += [["GET", "/metrics"], ["GET", "/internal/v1/snapshot"], ["GET", "/nope"]]
        for method, path in paths:
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_token"
            assert answer.headers["x-request-id"]


def test_errors_have_one_shape(small_control: ControlPlane) -> None:
    """Also those that FastAPI finds: unknown routes, methods, values, bodies that are not JSON."""
    refused = small_control.refused
    assert refused("GET", "/admin/v1/nope", 404)["code"] == "unknown_url"
    assert refused("GET", "/internal/v1", 404)["code"] == "unknown_url"
    assert refused("POST", "/admin/v1/aliases", 405)["code"] == "method_not_supported"
    assert refused("GET", "/admin/v1/adapters?limit=x", 422)["param"] == "limit"
    assert refused("PUT", "/admin/v1/aliases/a", 422, json={})["param"] == "target"
    broken = {"content": b"{", "headers": {"content-type": "application/json"}}
    assert refused("PUT", "/admin/v1/aliases/a", 400, **broken)["code"] == "invalid_json"
    assert refused("GET", "/admin/v1/adapters/%00", 404)


def test_request_id_comes_back(small_control: ControlPlane) -> None:
    """The caller's if it is a good one, else a new one."""
    get = small_control.client.get
    assert get("/healthz", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert made.startswith("req_")


def test_bodies_are_bounded(tmp_path: Path, base_folder: Path) -> None:
    """Larger ones are 413, whether their length is declared or not."""
    limits = {"max_json_bytes": 2048, "max_upload_bytes": 4096}
    headers = {"content-type": "application/x-tar"}
    with running(settings_of(tmp_path / "state", base_folder, limits=limits)) as control:
        for route, size in (("/admin/v1/aliases/a", 2049), ("/admin/v1/adapters/a/versions", 4097)):
            method = "PUT" if "aliases" in route else "POST"
            body = b" " * size
            declared = control.refused(method, route, 413, content=body, headers=headers)
            assert declared["code"] == "request_too_large"
            chunked = control.refused(
                method,
                route,
                413,
                content=iter([body]),
                headers={"content-type": "application/json"},
            )
            assert chunked["code"] == "request_too_large"


def test_openapi_document_is_complete(small_control: ControlPlane) -> None:
    """Every route has a summary, a description, a typed answer and typed errors with an example."""
    document = small_control.get("/admin/v1/openapi.json")
    names = [name for name, _ in routes(document)]
    assert len(names) == 19
    assert not any("/internal" in name for name in names)
    for name, operation in routes(document):
        assert operation["summary"], name
        assert operation["description"], name
        answers = operation["responses"]
        assert {"400", "401", "422", "503"} <= answers.keys(), name
        for status, answer in answers.items():
            content = answer["content"]["application/json"]
            reference = content["schema"].get("$ref", "")
            assert reference, (name, status)
            if not status.startswith("2"):
                assert reference.endswith("/ErrorAnswer"), (name, status)
                assert content["example"]["error"]["code"], (name, status)
        if operation.get("parameters"):
            assert all("schema" in each for each in operation["parameters"]), name
        if name.startswith(("PUT", "PATCH", "POST")) and not name.endswith("/retry"):
            assert operation["requestBody"]["content"], name


def test_metrics_count_by_route(small_control: ControlPlane) -> None:
    """Labels are routes' patterns, never what callers put into paths."""
    small_control.refused("GET", "/admin/v1/adapters/secret-name", 404)
    small_control.refused("GET", "/nope/secret-path", 404)
    text = small_control.client.get("/metrics").text
    counted = 'headrace_control_requests_total{code="404",method="GET",route='
    assert f'{counted}"/admin/v1/adapters/{{name}}"}} 1.0' in text
    assert f'{counted}"none"}} 1.0' in text
    assert "secret" not in text
    assert "headrace_control_database_up 1.0" in text


def test_principal_is_printable_and_bounded(small_control: ControlPlane) -> None:
    """Whatever the header holds, the audit gets at most 200 printable characters."""
    request = {"json": {"target": "tiny-llama"}}
    for header in (b"x" * 500, b"a\xffb", b""):
        name = f"/admin/v1/aliases/a{len(header)}"
        headers = {**HEADERS, "x-headrace-principal": header}
        assert small_control.client.put(name, headers=headers, **request).status_code == 201
    seen = [one["principal"] for one in small_control.get("/admin/v1/audit")["data"]]
    assert seen == ["operator", "a?b", "x" * 200]
