"""Uploads that are refused or broken off: the answer, and that nothing is left behind."""

from __future__ import annotations

import gzip
import io
import socket
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from control_plane import TOKEN, adapter, running, settings_of, tar_of, wait

if TYPE_CHECKING:
    from pathlib import Path

    from control_plane import ControlPlane

ROUTE = "/admin/v1/adapters/support/versions"
TAR = {"content-type": "application/x-tar"}


def tar_with(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"x") -> bytes:
    """A tar with one member."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        member.size = len(content) if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def form_of(*parts: bytes, boundary: bytes = b"B") -> dict[str, Any]:
    """A multipart request of parts, each with its headers."""
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    return {
        "content": body + b"--" + boundary + b"--\r\n",
        "headers": {"content-type": "multipart/form-data; boundary=B"},
    }


def file_part(name: str) -> bytes:
    """A form's part that is a file."""
    return f'Content-Disposition: form-data; name="f"; filename="{name}"\r\n\r\nx'.encode()


HOSTILE: dict[str, tuple[int, dict[str, Any]]] = {
    "empty": (400, {"content": b"", "headers": TAR}),
    "not a tar": (400, {"content": b"hello" * 500, "headers": TAR}),
    "zip": (415, {"content": b"PK\x03\x04" + b"0" * 600, "headers": TAR}),
    "traversal": (400, {"content": tar_with("../../etc/x"), "headers": TAR}),
    "absolute": (400, {"content": tar_with("/etc/x"), "headers": TAR}),
    "symlink": (400, {"content": tar_with("a", tarfile.SYMTYPE), "headers": TAR}),
    "device": (400, {"content": tar_with("a", tarfile.CHRTYPE), "headers": TAR}),
    "pickle": (415, {"content": tar_with("adapter_model.bin"), "headers": TAR}),
    "no weights": (422, {"content": tar_with("adapter_config.json"), "headers": TAR}),
    "bomb": (413, {"content": gzip.compress(tar_with("README.md", content=bytes(64 << 20)))}),
    "no type": (415, {"content": b"x", "headers": {"content-type": "text/plain"}}),
    "form without boundary": (
        400,
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ),
    "broken form": (400, {**form_of(file_part("a")), "content": b"nothing of the sort"}),
    "cut form": (400, {**form_of(), "content": b"--B\r\n" + file_part("README.md")}),
    "form traversal": (400, form_of(file_part("../adapter_config.json"))),
    "form pickle": (415, form_of(file_part("adapter_model.bin"))),
    "form header": (400, form_of(b"X: " + b"x" * 9000 + b"\r\n\r\nx")),
    "form field": (
        413,
        form_of(b'Content-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 70_000),
    ),
    "no json": (400, {"content": b"{", "headers": {"content-type": "application/json"}}),
    "no source": (400, {"json": {}}),
    "unknown option": (400, {"json": {"source": "s3://b/p", "colour": "red"}}),
    "unknown scheme": (400, {"json": {"source": "http://127.0.0.1/x"}}),
    "other host": (400, {"json": {"source": "file://elsewhere/x"}}),
    "no folder": (400, {"json": {"source": "file:///nowhere/at/all"}}),
}


def left_behind(control: ControlPlane) -> list[Path]:
    """What lies in store and staging."""
    folder = control.parts.settings.state_dir
    roots = (folder / "store", folder / "staging")
    return [path for root in roots for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_upload_leaves_nothing(hostile_control: ControlPlane, case: str) -> None:
    """Each is refused with a clear 4xx in OpenAI's shape."""
    status, request = HOSTILE[case]
    if case == "bomb":
        request = {**request, "headers": {"content-type": "application/gzip"}}
    error = hostile_control.refused("POST", ROUTE, status, **request)
    assert error["message"]
    assert str(hostile_control.parts.settings.state_dir) not in error["message"]
    assert left_behind(hostile_control) == []
    assert hostile_control.get("/admin/v1/adapters")["data"] == []
    assert hostile_control.refused("POST", "/admin/v1/adapters/lint", status, **request)


@pytest.fixture(scope="module")
def hostile_control(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Any:
    """One control plane for all of them: it has to outlive each."""
    with running(settings_of(tmp_path_factory.mktemp("hostile"), base_folder)) as control:
        yield control


def test_upload_that_stops_leaves_nothing(small_control: ControlPlane, tmp_path: Path) -> None:
    """A client that hangs up in the middle: its folder goes, and the slot is free again."""
    body = tar_of(adapter(tmp_path))
    host, port = small_control.url.removeprefix("http://").split(":")
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {TOKEN}\r\n"
        f"content-type: application/x-tar\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    uploads = small_control.parts.uploads
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + body[: len(body) // 2])
        wait(lambda: left_behind(small_control))
    wait(lambda: uploads.num_running == 0)
    wait(lambda: not left_behind(small_control))
    small_control.push("support", adapter(tmp_path), 201)


def test_uploads_are_bounded(tmp_path: Path, base_folder: Path) -> None:
    """One more than the bound at a time is answered 503."""
    limits = {"max_uploads": 1}
    with running(settings_of(tmp_path / "state", base_folder, limits=limits)) as control:
        host, port = control.url.removeprefix("http://").split(":")
        head = (
            f"POST {ROUTE} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {TOKEN}\r\n"
            "content-type: application/x-tar\r\ncontent-length: 5000\r\n\r\nxx"
        )
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode())
            wait(lambda: control.parts.uploads.num_running == 1)
            request = {"content": tar_of(adapter(tmp_path)), "headers": TAR}
            assert control.refused("POST", ROUTE, 503, **request)["code"] == "overloaded"
        wait(lambda: control.parts.uploads.num_running == 0)
        control.push("support", adapter(tmp_path), 201)


def test_slow_upload_times_out(tmp_path: Path, base_folder: Path) -> None:
    """An upload that takes longer than it may is answered 408."""
    limits = {"upload_s": 0.3}
    with running(settings_of(tmp_path / "state", base_folder, limits=limits)) as control:
        host, port = control.url.removeprefix("http://").split(":")
        head = (
            f"POST {ROUTE} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {TOKEN}\r\n"
            "content-type: application/x-tar\r\ncontent-length: 5000\r\n\r\nxx"
        )
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(head.encode())
            assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
        wait(lambda: not left_behind(control))


def test_local_paths_are_confined(tmp_path: Path, base_folder: Path) -> None:
    """Only folders under the named roots are taken, whatever links lead out of them; or none at all."""
    root, outside = tmp_path / "root", adapter(tmp_path)
    root.mkdir()
    (root / "link").symlink_to(outside)
    inside = adapter(root, 1)
    with running(settings_of(tmp_path / "a", base_folder, local_roots=[root])) as control:
        for path in (outside, root / "link", root / ".." / outside.name):
            error = control.refused("POST", ROUTE, 400, json={"source": f"file://{path}"})
            assert error["param"] == "source"
        control.call("POST", ROUTE, 201, json={"source": inside.as_uri()})
    with running(settings_of(tmp_path / "b", base_folder, allow_local_paths=False)) as control:
        control.refused("POST", ROUTE, 400, json={"source": inside.as_uri()})
