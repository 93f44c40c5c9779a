"""The installer's decisions, and real environments where they are cheap to make."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "install.py"


@pytest.fixture
def install(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("install")


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with one extra, a lock and nothing to install."""
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "engine-cpu.txt").write_text("# lock\ntorch-x==9\ntorch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\n[project.optional-dependencies]\nengine-cpu = []\n'
        '[dependency-groups]\ndev = ["pytest==9.2.0"]\n'
    )
    return tmp_path


def report(version: str, *needs: str) -> dict:
    metadata = {"name": "torch", "version": version, "requires_dist": list(needs)}
    return {"install": [{"metadata": metadata}]}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (report("2.13.0+cpu", "filelock"), True),
        (report("2.13.0", "filelock", "sympy>=1.13"), True),
        (report("2.13.0", "filelock", "nvidia-cublas==13.1; platform_system == 'Linux'"), False),
        (report("2.13.0", "cuda-bindings<14"), False),
        (report("2.13.0+cu130", "filelock"), False),
        ({"install": []}, False),
    ],
)
def test_cuda_builds_of_torch_are_told_apart(install, found, expected):
    """A build that needs NVIDIA's libraries, or says so in its version, is not for CPUs."""
    assert install.is_cpu_torch(found) is expected


def test_torch_comes_from_pytorch_only_where_pip_has_no_cpu_build(install, project, monkeypatch):
    """The extra index is used when, and only when, the user's own indexes lead to CUDA."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "pip", lambda venv, title, *arguments: calls.append(arguments))
    lock = project / "locks" / "engine-cpu.txt"
    monkeypatch.setattr(install, "pip_finds_cpu_torch", lambda venv, version: True)
    install.install_cpu_torch(project / ".venv", lock)
    assert calls == []
    monkeypatch.setattr(install, "pip_finds_cpu_torch", lambda venv, version: False)
    install.install_cpu_torch(project / ".venv", lock)
    assert calls == [
        ("install", "-c", str(lock), "torch==2.13.0", "--index-url", install.TORCH_CPU_INDEX)
    ]


def test_locked_version_is_of_the_very_package(install, project):
    """`torch` is not `torch-x`; a package that no lock names says what to do."""
    lock = project / "locks" / "engine-cpu.txt"
    assert install.locked_version(lock, "torch") == "2.13.0"
    with pytest.raises(install.InstallError, match="does not lock vllm: run `make lock`"):
        install.locked_version(lock, "vllm")


def test_what_is_installed(install, project):
    """An engine comes with the dev group; the slim gateway with neither."""
    assert install.requirements(project, "engine-cpu") == [
        "-e",
        f"{project}[engine-cpu,control]",
        "pytest==9.2.0",
    ]
    assert install.requirements(project, None) == ["-e", str(project)]


def test_host_with_a_gpu_gets_the_gpu_engine(install, tmp_path, monkeypatch):
    """The NVIDIA driver decides, unless the user does."""
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    assert install.choose_extra("auto") == "vllm"
    assert install.choose_extra("cpu") == "engine-cpu"
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    assert install.choose_extra("auto") == "engine-cpu"
    assert install.choose_extra("gpu") == "vllm"
    assert install.choose_extra("none") is None


@pytest.mark.parametrize(("listing", "code", "expected"), [("GPU 0: A", 0, True), ("no", 9, False)])
def test_gpu_is_found_by_driver_or_tool(install, tmp_path, monkeypatch, listing, code, expected):
    """A loaded driver is enough; without one (WSL) nvidia-smi is asked."""
    driver = tmp_path / "version"
    driver.touch()
    assert install.has_nvidia_gpu(driver)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{listing}'\nexit {code}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert install.has_nvidia_gpu(tmp_path / "missing") is expected


@pytest.mark.parametrize("name", ["pyproject.toml", "locks/engine-cpu.txt"])
def test_stamp_follows_every_file_that_decides(install, project, name):
    """Another dependency or another lock is another environment; so is another extra."""
    before = install.stamp_of(project, "engine-cpu")
    assert install.stamp_of(project, "engine-cpu") == before
    assert install.stamp_of(project, None) != before
    path = project / name
    path.write_text(path.read_text() + "# changed\n")
    assert install.stamp_of(project, "engine-cpu") != before


def test_interrupted_environment_is_made_anew(install, tmp_path, capsys):
    """An environment whose install was cut off is not trusted."""
    venv = tmp_path / "venv"
    install.prepare_venv(venv)
    (venv / "half-copied").touch()
    assert (venv / install.MARKER_NAME).exists()
    install.prepare_venv(venv)
    assert not (venv / "half-copied").exists()
    assert "was cut off: starting it anew" in capsys.readouterr().out


def test_finished_environment_is_updated_in_place(install, tmp_path):
    """A complete environment keeps what it has when the project changes."""
    venv = tmp_path / "venv"
    install.prepare_venv(venv)
    (venv / install.MARKER_NAME).unlink()
    (venv / install.STAMP_NAME).write_text("old")
    (venv / "kept").touch()
    install.prepare_venv(venv)
    assert (venv / "kept").exists()
    assert not (venv / install.STAMP_NAME).exists()
    assert not install.is_current(venv, "old")


@pytest.mark.parametrize(
    ("stderr", "advice"),
    [
        ("RuntimeError: operator torchvision::nms does not exist", "pip uninstall -y torchvision"),
        ("ImportError: libcudart.so.13: cannot open", "install.py --engine cpu"),
        ("ValueError: odd", "run `make install` again"),
    ],
)
def test_engine_that_does_not_start_is_explained(install, tmp_path, stderr, advice):
    """Each known failure has its own way out, in one line."""
    line = install.engine_advice(f"Traceback\n{stderr}\n", tmp_path, "engine-cpu")
    assert advice in line
    assert stderr in line
    assert "\n" not in line


def test_failed_pip_is_one_line_and_the_log_has_the_rest(install, tmp_path):
    """What pip said last is in the error, with the way to all of it."""
    venv = tmp_path / "venv"
    install.prepare_venv(venv)
    with pytest.raises(install.InstallError, match=r"pip failed: .*no-such-requirement") as caught:
        install.pip(venv, "installing", "install", "--no-index", "no-such-requirement-xyz")
    assert "\n" not in str(caught.value)
    assert "no-such-requirement-xyz" in (venv / install.LOG_NAME).read_text()


def test_second_install_is_a_quick_no_op(install):
    """In an installed clone the script does nothing and says so."""
    stamp = install.stamp_of(ROOT, install.choose_extra("auto"))
    if not install.is_current(ROOT / ".venv", stamp):
        pytest.skip("the clone's own environment is not up to date: `make install`")
    answer = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.startswith(".venv is up to date")


@pytest.mark.parametrize("name", ["engine-cpu", "vllm"])
def test_locks_hold_exact_versions_and_no_address(name):
    """A lock names versions only: which index they come from is the user's business."""
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert len(packages) > 100
    assert all(line.count("==") == 1 for line in packages)
    assert not any(sign in line for line in packages for sign in ("/", "@", "+", " "))
    assert packages == sorted(packages)


@pytest.mark.parametrize("name", ["engine-cpu", "vllm"])
def test_lock_agrees_with_the_pinned_dependencies(name):
    """Every `==` of pyproject.toml is in the locks as it is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    wanted += project["project"]["optional-dependencies"][name]
    locked = set((ROOT / "locks" / f"{name}.txt").read_text().splitlines())
    missing = [each for each in wanted if "==" in each and each not in locked]
    assert missing == []


def test_lock_lines_leave_local_labels_out():
    """`2.13.0+cpu` is locked as `2.13.0`: one lock for whichever build an index has."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import lock;"
        "print(lock.lines_of(json.loads(sys.argv[2])))"
    )
    resolved = report("2.13.0+cpu")
    resolved["install"].append({"metadata": {"name": "A_b", "version": "1"}})
    answer = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "deploy"), json.dumps(resolved)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert answer.stdout == "['a-b==1', 'torch==2.13.0']\n"
