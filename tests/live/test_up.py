"""`headrace up`: the whole platform by its one command, from its start to its end."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import openai
import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

UP_DEADLINE_S = 400.0
END_DEADLINE_S = 60.0
CURL_DEADLINE_S = 60.0
ENGINE_MODULE = "vllm.entrypoints"
MODEL = "smollm2-135m-instruct"


class Platform:
    """A running `headrace up`, started as a user does; not under a guardian, which would tidy up."""

    def __init__(self, folder, server):
        self.server = server
        self.log = folder / "up.log"
        self.state_dir = folder / "state"
        argv = [sys.executable, "-m", "serving.cli.main", "up", "--listen", server.name]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HEADRACE_STATE_DIR": str(self.state_dir)},
                start_new_session=True,
            )
        self.seen = {}

    def printed(self):
        return self.log.read_text()

    def note_processes(self):
        """Remembers every process below; returns the command lines of those that run."""
        lines = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    lines.append(" ".join(process.cmdline()))
                    self.seen[process.pid] = process
        return lines

    def left(self):
        """Command lines of the processes that are still there."""
        left = []
        for process in self.seen.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(" ".join(process.cmdline()))
        return left

    def end(self):
        """Whatever the test did not end."""
        self.note_processes()
        for process in (self.process, *self.seen.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(END_DEADLINE_S)


@pytest.fixture
def platform(tmp_path, daemons):
    started = Platform(tmp_path, daemons.server())
    yield started
    started.end()


def test_up_serves_and_ends_whole(platform, until):
    """It comes up ready, its printed command works, a client is served, SIGTERM leaves nothing."""

    def is_ready():
        code = platform.process.poll()
        assert code is None, f"up ended with {code}:\n{platform.printed()}"
        return platform.server.get("/readyz")[0] == 200

    until(is_ready, UP_DEADLINE_S, "headrace up is ready")
    # Ready means that a first request is answered.
    with openai.OpenAI(
        base_url=f"{platform.server.url}/v1", api_key="none", max_retries=0
    ) as client:
        answer = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=2)
        assert answer.usage.completion_tokens == 2

    until(lambda: "Logs:" in platform.printed(), END_DEADLINE_S, "the address is printed")
    assert f"{platform.server.url}/v1" in platform.printed()
    answer = json.loads(run_printed_curl(platform.printed()))
    assert "Paris" in answer["choices"][0]["message"]["content"]

    lines = platform.note_processes()
    assert any(ENGINE_MODULE in line for line in lines)
    assert any("gateway --listen" in line for line in lines)
    assert len(list((platform.state_dir / "logs").glob("*.log"))) == 3

    platform.process.send_signal(signal.SIGTERM)
    assert platform.process.wait(END_DEADLINE_S) == 0
    assert platform.left() == []
    assert platform.server.get("/healthz")[0] == 0


def run_printed_curl(printed):
    """Runs the command that `headrace up` tells its user to try."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = re.search(r"^ *curl (?:.*\\\n)*.*$", printed, re.MULTILINE)
    assert command is not None, printed
    ran = subprocess.run(
        ["/bin/sh", "-c", command.group().replace("curl", "curl -sS --fail-with-body", 1)],
        capture_output=True,
        text=True,
        timeout=CURL_DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr + ran.stdout
    return ran.stdout


def test_up_that_is_killed_while_it_starts(platform, until):
    """SIGKILL of the command leaves no engine behind either."""
    until(
        lambda: any(ENGINE_MODULE in line for line in platform.note_processes()),
        END_DEADLINE_S,
        "an engine is starting",
    )
    platform.process.kill()
    platform.process.wait(END_DEADLINE_S)
    until(lambda: platform.left() == [], END_DEADLINE_S, "its processes are gone")
