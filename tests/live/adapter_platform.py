"""A whole platform with two real engines and adapters that each answer with one word.

Owns: its start, its commands, the killing of its parts. Used by: the adapter tests beside this file.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from serving.config import cache_dir
from serving.fleet import default_model

WORDS = ("red", "blue", "green", "river", "music", "seven", "winter")
"""Each is one token after a space in the default model's vocabulary."""
UP_DEADLINE_S = 500.0
COMMAND_DEADLINE_S = 330.0
HEADRACE = (sys.executable, "-W", "error", "-m", "serving.cli.main")
MODEL = default_model.NAME


def make_word_adapters(folder):
    """Folder → word of each adapter, made once."""
    program = Path(__file__).with_name("token_adapters.py")
    model = default_model.ensure(cache_dir(), lambda stage, done: None)
    subprocess.run(
        [sys.executable, str(program), str(model), str(folder), *WORDS],
        check=True,
        timeout=COMMAND_DEADLINE_S,
        capture_output=True,
    )
    return {word: folder / word for word in WORDS}


def said_word(text):
    """The word that an answer consists of; None if it is anything else."""
    words = set(re.findall(r"\w+", text))
    (word,) = words if len(words) == 1 else (None,)
    return word if word in WORDS else None


class AdapterPlatform:
    """`headrace up` with two replicas under a guardian.

    Attributes:
        server: Where it serves.
        state_dir: Of this platform; survives its end.
        daemon: The running command.
    """

    def __init__(self, daemons, folder):
        self._daemons = daemons
        self._env = {**os.environ, "HEADRACE_STATE_DIR": str(folder / "state")}
        self.state_dir = folder / "state"
        self.server = daemons.server()
        self.daemon = None
        self._num_starts = 0

    def start(self):
        """Starts it; `wait` waits."""
        self._num_starts += 1
        argv = [*HEADRACE, "up", "--listen", self.server.name, "--replicas", "2"]
        argv += ["--max-loras", "4", "--max-model-len", "2048"]
        self.daemon = self._daemons.start(f"up-{self._num_starts}", argv, self._env)
        return self

    def wait(self):
        """Waits until a first request would be answered by two replicas."""

        def is_ready():
            status, body = self.server.get("/readyz")
            return status == 200 and all(json.loads(body)["replicas"].values())

        self.daemon.wait_ready(is_ready, UP_DEADLINE_S)
        return self

    def run(self, *argv):
        """Runs `headrace adapters …` against it; the answer of `--json`."""
        command = [*HEADRACE, "adapters", *argv, "--url", self.server.url, "--json"]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, env=self._env
        )
        assert ran.returncode == 0, f"{argv}: {ran.stderr}{ran.stdout}"
        return json.loads(ran.stdout)

    def push(self, folder, name, alias=None):
        """Pushes a folder; the version's name."""
        more = ["--alias", alias] if alias else []
        return self.run("push", str(folder), "--name", name, *more)["version"]["version"]

    def main_process(self, name):
        """The process of one part, for example `vllm-0` or `control`."""
        statuses = json.loads((self.state_dir / "processes.json").read_text())
        (main,) = psutil.Process(statuses[name]["pid"]).children()
        return main

    def kill(self, name):
        """SIGKILL for one part with everything below it."""
        os.killpg(self.main_process(name).pid, signal.SIGKILL)

    def num_starts(self, name):
        """How often a part was started."""
        statuses = json.loads((self.state_dir / "processes.json").read_text())
        return statuses[name]["num_starts"] if statuses[name]["state"] == "ready" else 0
