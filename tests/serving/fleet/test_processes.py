"""Supervision of real processes: a stand-in engine that crashes, dawdles and resists."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from serving.engines.launch import LaunchCommand
from serving.errors import ConfigError
from serving.fleet.http_client import get
from serving.fleet.ports import PortReservation
from serving.fleet.process import ProcessSpec, ProcessStatus, RestartPolicy, State
from serving.fleet.processes import STATE_FILE, Processes, log_tail, only_one
from serving.fleet.readiness import EngineReady

STANDIN = Path(__file__).with_name("standin_engine.py")
DEADLINE_S = 30.0
QUICK = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05, max_failed_starts=3)


@pytest.fixture
def port() -> Iterator[int]:
    with PortReservation() as reservation:
        yield reservation.port


@pytest.fixture
def make_spec(port: int, tmp_path: Path) -> Callable[..., ProcessSpec]:
    def make(*arguments: str, **changes: object) -> ProcessSpec:
        argv = (sys.executable, str(STANDIN), "--port", str(port), *arguments)
        settings = {
            "name": "vllm-0",
            "command": LaunchCommand(argv=argv, env=dict(os.environ)),
            "readiness": EngineReady("127.0.0.1", port, "m"),
            "log": tmp_path / "logs" / "vllm-0.log",
            "start_deadline_s": DEADLINE_S,
            "grace_s": 5.0,
            "policy": QUICK,
        }
        return ProcessSpec(**(settings | changes))

    return make


@asynccontextmanager
async def running(spec: ProcessSpec, state_dir: Path) -> AsyncIterator[Processes]:
    async with Processes(state_dir, lambda _: None) as processes, asyncio.timeout(DEADLINE_S):
        processes.start(spec)
        yield processes


async def until_state(processes: Processes, state: State, num_starts: int = 1) -> ProcessStatus:
    def is_there(statuses: list[ProcessStatus]) -> bool:
        return statuses[0].state is state and statuses[0].num_starts >= num_starts

    return (await processes.until(is_there))[0]


def until_gone(pids: list[int]) -> None:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if is_alive(pid)], 20.0)
    assert [process.pid for process in alive if is_alive(process.pid)] == []


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()]


async def test_process_becomes_ready_and_says_so_in_the_state_file(make_spec, tmp_path):
    """A healthy engine that lists its model is ready, and the state file names it."""
    async with running(make_spec(), tmp_path) as processes:
        status = await until_state(processes, State.READY)
        assert (status.name, status.num_starts) == ("vllm-0", 1)
        assert f'"pid": {status.pid}' in (tmp_path / STATE_FILE).read_text()
        assert '"state": "ready"' in (tmp_path / STATE_FILE).read_text()
    assert processes.statuses()[0].state is State.STOPPED


async def test_unhealthy_engine_is_not_ready_until_it_is_healthy(make_spec, tmp_path):
    """A process that answers 503 stays in its start; it is ready once it answers 200."""
    gate = tmp_path / "gate"
    async with running(make_spec("--gate", str(gate)), tmp_path) as processes:
        await until_state(processes, State.STARTING)
        while not log_tail(tmp_path / "logs" / "vllm-0.log", 1):  # noqa: ASYNC110 - a file
            await asyncio.sleep(0.01)
        assert processes.statuses()[0].state is State.STARTING
        gate.touch()
        assert (await until_state(processes, State.READY)).num_starts == 1


async def test_crash_is_followed_by_a_new_start_on_the_same_port(make_spec, tmp_path, port):
    """An engine that exits while it serves is started again, and its old log is kept."""
    async with running(make_spec(), tmp_path) as processes:
        await until_state(processes, State.READY)
        with pytest.raises(OSError, match=r"closed|reset"):
            await get("127.0.0.1", port, "/crash", timeout_s=5.0, api_key=None)
        assert (await until_state(processes, State.READY, num_starts=2)).num_starts == 2
        assert (tmp_path / "logs" / "vllm-0.log.1").read_text() == f"listening on {port}\n"


async def test_process_that_never_comes_up_is_given_up_with_its_reason(make_spec, tmp_path):
    """Two first starts that fail are the end; the state says why and the log has the last words."""
    async with running(make_spec("--exit-code", "7"), tmp_path) as processes:
        status = await until_state(processes, State.FAILED)
        assert (status.num_starts, status.reason) == (2, "exited with code 7")
        assert log_tail(Path(status.log), 1) == ["no such model"]


async def test_start_that_misses_its_deadline_is_ended(make_spec, tmp_path):
    """A process that does not become ready in time is ended and counted as failed."""
    pids = tmp_path / "pids"
    spec = make_spec("--gate", "/nowhere", "--pids", str(pids), start_deadline_s=1.0)
    async with running(spec, tmp_path) as processes:
        status = await until_state(processes, State.FAILED)
        assert status.reason == "not ready within 1 s"
    until_gone(read_pids(pids))


async def test_stop_takes_children_that_escaped_and_resist(make_spec, tmp_path):
    """A child in a session of its own that ignores SIGTERM goes with its engine."""
    pids = tmp_path / "pids"
    spec = make_spec("--stubborn-child", "--pids", str(pids))
    async with running(spec, tmp_path) as processes:
        await until_state(processes, State.READY)
        assert len(read_pids(pids)) == 2
        await processes.stop(["vllm-0"])
        assert not any(is_alive(pid) for pid in read_pids(pids))


async def test_process_that_ignores_sigterm_is_killed_after_its_grace(make_spec, tmp_path):
    """The grace of a stop is a bound, not a wish."""
    pids = tmp_path / "pids"
    spec = make_spec("--ignore-term", "--pids", str(pids), grace_s=0.3)
    async with running(spec, tmp_path) as processes:
        await until_state(processes, State.READY)
        began_s = time.monotonic()
        await processes.stop(["vllm-0"])
        assert 0.3 <= time.monotonic() - began_s < 10.0
        assert not any(is_alive(pid) for pid in read_pids(pids))


async def test_kill_does_not_wait_for_the_grace(make_spec, tmp_path):
    """A second Ctrl-C ends even a process that ignores SIGTERM at once."""
    spec = make_spec("--ignore-term", grace_s=600.0)
    async with running(spec, tmp_path) as processes:
        await until_state(processes, State.READY)
        processes.kill()
        assert (await until_state(processes, State.STOPPED)).state is State.STOPPED


async def test_guardian_that_is_killed_takes_its_command_along(make_spec, tmp_path):
    """Killing the guardian leaves no engine behind on the port, and a new one is started."""
    pids = tmp_path / "pids"
    async with running(make_spec("--pids", str(pids)), tmp_path) as processes:
        status = await until_state(processes, State.READY)
        os.kill(status.pid, signal.SIGKILL)
        assert (await until_state(processes, State.READY, num_starts=2)).num_starts == 2
        first, second = read_pids(pids)
        assert not is_alive(first)
        assert is_alive(second)


SUPERVISOR = """
import asyncio, os, sys
from pathlib import Path
from serving.engines.launch import LaunchCommand
from serving.fleet.process import ProcessSpec, State
from serving.fleet.processes import Processes
from serving.fleet.readiness import EngineReady

async def main(port, state_dir, *argv):
    spec = ProcessSpec("vllm-0", LaunchCommand(tuple(argv), dict(os.environ)),
        EngineReady("127.0.0.1", int(port), "m"), Path(state_dir) / "x.log", 30.0, 5.0)
    def show(status):
        if status.state is State.READY:
            print("ready", flush=True)
    async with Processes(Path(state_dir), show) as processes:
        processes.start(spec)
        await processes.until(lambda _: False)

asyncio.run(main(*sys.argv[1:]))
"""


def test_supervisor_that_is_killed_leaves_nothing_behind(make_spec, tmp_path, port):
    """SIGKILL of the supervisor itself ends engines and their children all the same."""
    pids = tmp_path / "pids"
    spec = make_spec("--stubborn-child", "--pids", str(pids))
    argv = [sys.executable, "-c", SUPERVISOR, str(port), str(tmp_path), *spec.command.argv]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "ready\n"
        supervisor.kill()
    until_gone(read_pids(pids))


def test_delays_double_up_to_their_bound():
    """The delay before a restart doubles with each failure and stays at its bound."""
    policy = RestartPolicy(first_delay_s=1.0, max_delay_s=10.0)
    assert [policy.delay_s(n) for n in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 10, 10]


def test_state_folder_takes_one_platform(tmp_path):
    """A second platform with the same state folder is refused with the first one's pid."""
    refused = pytest.raises(ConfigError, match=rf"pid {os.getpid()}\) runs with")
    with only_one(tmp_path), refused, only_one(tmp_path):
        pytest.fail("two platforms share a state folder")
    with only_one(tmp_path):
        assert (tmp_path / "up.lock").read_text() == str(os.getpid())
