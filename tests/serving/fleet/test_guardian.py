"""The guardian alone: exit codes, a bounded log, its end with its input."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.fleet.process import GUARDIAN


def guard(log: Path, *argv: str, max_log_bytes: int = 1 << 20) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(GUARDIAN), str(log), str(max_log_bytes), "5", "--", *argv]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(5)", 5),
        ("pass", 0),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)
def test_exit_code_is_the_commands(tmp_path, code, expected):
    """The guardian exits as its command did; signals count from 128."""
    with guard(tmp_path / "a.log", sys.executable, "-c", code) as guardian:
        assert guardian.wait(20.0) == expected


def test_command_that_does_not_exist_is_in_the_log(tmp_path):
    """A command that cannot be started is exit code 127 and a line in the log."""
    with guard(tmp_path / "a.log", "/no/such/command") as guardian:
        assert guardian.wait(20.0) == 127
    assert (tmp_path / "a.log").read_text().startswith("cannot start /no/such/command")


def test_log_takes_at_most_twice_its_bound(tmp_path):
    """A talkative command fills two files of the bound, and the newest lines are in them."""
    code = "for i in range(20_000): print(f'line {i:05}')"
    log = tmp_path / "a.log"
    with guard(log, sys.executable, "-c", code, max_log_bytes=70_000) as guardian:
        assert guardian.wait(20.0) == 0
    assert log.stat().st_size <= 70_000
    assert (tmp_path / "a.log.1").stat().st_size <= 70_000
    assert log.read_text().endswith("line 19999\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1"]


def test_closed_input_ends_the_command(tmp_path):
    """The end of the guardian's input is the supervisor's death: the command gets SIGTERM."""
    with guard(
        tmp_path / "a.log", sys.executable, "-c", "import signal; signal.pause()"
    ) as guardian:
        assert guardian.stdin is not None
        guardian.stdin.close()
        assert guardian.wait(20.0) == 128 + 15


SHARED_MEMORY = """
import signal
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = SharedMemory(create=True, size=4096)
print(memory.name, flush=True)
signal.pause()
"""


def test_shared_memory_of_a_killed_command_is_unlinked(tmp_path):
    """Python's resource tracker outlives the kill long enough to clean up."""
    log = tmp_path / "a.log"
    with guard(log, sys.executable, "-c", SHARED_MEMORY) as guardian:
        end_s = time.monotonic() + 20.0
        while not log.exists() or not log.read_text().endswith("\n"):
            assert time.monotonic() < end_s
        guardian.send_signal(signal.SIGINT)
        assert guardian.wait(20.0) == 137
    name = log.read_text().splitlines()[0]
    assert name.startswith("psm_")
    assert not Path("/dev/shm", name).exists()  # noqa: S108 - where Linux keeps it
