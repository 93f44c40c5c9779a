"""What the doctor finds on hosts that lack something."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving.config import Listen
from serving.fleet import doctor
from serving.fleet.doctor import Finding, Level, Surroundings, examine
from serving.fleet.processes import only_one


@pytest.fixture
def surroundings(tmp_path, monkeypatch) -> Surroundings:
    monkeypatch.setattr(
        doctor, "_engine_start", lambda env: Finding("vllm start", Level.OK, "fine")
    )
    return Surroundings(
        listen=Listen(host="127.0.0.1", port=1),
        state_dir=tmp_path / "state",
        cache_dir=tmp_path / "cache",
        env=dict(os.environ),
    )


def find(surroundings: Surroundings, subject: str) -> Finding:
    return next(each for each in examine(surroundings) if each.subject == subject)


def test_every_finding_that_is_not_ok_says_what_to_do(surroundings):
    """No red or yellow line leaves the reader alone."""
    findings = list(examine(surroundings))
    assert [each for each in findings if each.level is not Level.OK and not each.advice] == []
    assert find(surroundings, "default model").level is Level.NOTE


def test_taken_port_is_red_unless_a_headrace_of_this_folder_runs(surroundings):
    """Somebody else's listener is in the way; our own is what should be there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = Surroundings(
            Listen(host="127.0.0.1", port=port),
            surroundings.state_dir,
            surroundings.cache_dir,
            surroundings.env,
        )
        assert find(taken, f"port {port}").level is Level.BAD
        with only_one(taken.state_dir):
            assert find(taken, f"port {port}").level is Level.NOTE


def test_torchvision_beside_a_cpu_torch_is_the_trap(surroundings, monkeypatch):
    """The known crash is named before it happens, with the command that ends it."""
    monkeypatch.setattr(doctor, "vllm_device", lambda: "cpu")
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0")
    trap = find(surroundings, "torchvision trap")
    assert trap.level is Level.BAD
    assert "pip uninstall -y torchvision torchaudio torchcodec" in trap.advice


@pytest.mark.parametrize(
    ("device", "has_gpu", "level"),
    [
        (None, False, Level.BAD),
        ("gpu", False, Level.BAD),
        ("cpu", True, Level.NOTE),
        ("cpu", False, Level.OK),
        ("gpu", True, Level.OK),
    ],
)
def test_engine_has_to_fit_the_host(device, has_gpu, level):
    """A GPU build without a GPU cannot start; a CPU build beside one wastes it."""
    assert doctor._vllm(device, has_gpu).level is level


def test_full_disk_is_red(surroundings, monkeypatch):
    """Too little room for the default model is said with the variable that moves it."""
    monkeypatch.setattr(doctor.default_model, "NEEDED_DISK_BYTES", 1 << 60)
    cache = find(surroundings, "cache folder")
    assert cache.level is Level.BAD
    assert "HEADRACE_CACHE_DIR" in cache.advice


def test_command_prints_json_and_its_exit_code_means_something(tmp_path):
    """`--json` is one array; a port that is taken is exit code 1."""
    code = "import typer; from serving.cli.doctor import doctor; typer.run(doctor)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = subprocess.run(
            [sys.executable, "-c", code, "--json", "--listen", f"127.0.0.1:{port}"],
            env={**os.environ, "HEADRACE_STATE_DIR": str(tmp_path)},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert answer.returncode == 1
    red = [each["subject"] for each in json.loads(answer.stdout) if each["level"] == "bad"]
    assert f"port {port}" in red
