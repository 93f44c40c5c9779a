"""Real processes for tests: one vLLM for the whole session, and how to start further ones.

Owns: `Daemon`, a command under Headrace's guardian that ends whole even if pytest is killed;
`Server`, an address with its metrics; the session's engine; the processes' logs in the report of a
failed test. Never: starts anything for a test that does not ask for it. Used by: every test that
needs a real engine or gateway process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.config import cache_dir
from serving.engines.launch import CpuPlacement, EngineOptions, LaunchCommand, vllm_command
from serving.fleet import default_model, model_source
from serving.fleet.ports import LOOPBACK, PortReservation
from serving.fleet.process import GUARDIAN
from serving.fleet.processes import log_tail

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

Got = TypeVar("Got")

HEADRACE = (sys.executable, "-W", "error", "-m", "serving.cli.main")
ALIAS = "smol"
CONTEXT_TOKENS = 2048
ENGINE_START_DEADLINE_S = 280.0
FIRST_ENGINE_TEST_DEADLINE_S = 900.0
GATEWAY_START_DEADLINE_S = 60.0
ANSWER_DEADLINE_S = 30.0
GRACE_S = 30.0
END_DEADLINE_S = 60.0
MAX_LOG_BYTES = 64 * 1024 * 1024
SHOWN_LOG_LINES = 25
POLL_S = 0.02

LOGS = pytest.StashKey[dict[str, Path]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option for whoever works on these tests and will not wait for an engine each time."""
    parser.addoption(
        "--engine-url",
        help="http://127.0.0.1:PORT of a running vLLM, started as `engine_command` does, to use "
        "instead of starting one.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes room for the processes' logs."""
    config.stash[LOGS] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts what needs an engine after everything else, and what is slow last.

    The first test with the session's engine gets the time of its start, which on a fresh machine
    fetches and converts the default model.
    """

    def has(item: pytest.Item, mark: str) -> bool:
        return item.get_closest_marker(mark) is not None

    items.sort(key=lambda item: (has(item, "engine"), has(item, "slow")))
    needy = [item for item in items if has(item, "engine")]
    for item in [item for item in needy if "engine" in getattr(item, "fixturenames", ())][:1]:
        item.add_marker(pytest.mark.timeout(FIRST_ENGINE_TEST_DEADLINE_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the end of each process's log with a failure."""
    report = yield
    if report.failed:
        for name, log in item.config.stash[LOGS].items():
            shown = "\n".join(log_tail(log, SHOWN_LOG_LINES))
            report.sections.append((f"end of the log of {name} ({log})", shown))
    return report


def poll(ask: Callable[[], Got], deadline_s: float, what: str) -> Got:
    """Asks until the answer is true, and returns that.

    Args:
        ask: The condition.
        deadline_s: How long to try, in seconds.
        what: What is waited for; the message of the failure.
    """
    end_s = time.monotonic() + deadline_s
    while not (got := ask()):
        if time.monotonic() > end_s:
            pytest.fail(f"not within {deadline_s:g} s: {what}")
        time.sleep(POLL_S)
    return got


@dataclass(frozen=True)
class Server:
    """A process that serves HTTP on this machine."""

    port: int
    host: str = LOOPBACK

    @property
    def url(self) -> str:
        """For example `http://127.0.0.1:9001`."""
        return f"http://{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """The gateway's label for it."""
        return f"{self.host}:{self.port}"

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; status 0 if nothing answers."""
        connection = HTTPConnection(self.host, self.port, timeout=ANSWER_DEADLINE_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, HTTPException):
            return 0, b""
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name that have these labels, from its `/metrics`."""
        status, text = self.get("/metrics")
        assert status == 200
        return sum(
            sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@dataclass(frozen=True)
class Engine(Server):
    """A real vLLM."""

    model: str = default_model.NAME
    context_tokens: int = CONTEXT_TOKENS

    def num_running(self) -> int:
        """Requests that the engine works on."""
        return int(self.metric("vllm:num_requests_running"))


@dataclass(frozen=True)
class Gateway(Server):
    """A `headrace gateway`, and what its clients need."""

    model: str = default_model.NAME
    alias: str = ALIAS
    api_key: str = ""

    def num_ended(self, **labels: str) -> int:
        """Requests that have ended."""
        return int(self.metric("headrace_requests_total", **labels))


@dataclass
class Daemon:
    """A command under the guardian of `serving/fleet`, with its log.

    Closing the guardian's standard input ends it too: that is how everything goes when pytest is
    killed.
    """

    name: str
    command: LaunchCommand
    log: Path
    guardian: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Starts it, for the first time or again."""
        argv = [sys.executable, str(GUARDIAN), str(self.log), str(MAX_LOG_BYTES), str(GRACE_S)]
        self.guardian = subprocess.Popen(
            [*argv, "--", *self.command.argv],
            stdin=subprocess.PIPE,
            env=dict(self.command.env),
            start_new_session=True,
        )

    def wait_ready(self, is_ready: Callable[[], bool], deadline_s: float) -> None:
        """Waits until it serves; fails with its log if it does not, or ends instead."""

        def is_decided() -> bool:
            return self._running().poll() is not None or is_ready()

        poll(is_decided, deadline_s, f"{self.name} is ready; its log: {self.log}")
        code = self._running().poll()
        if code is not None:
            tail = "\n".join(log_tail(self.log, SHOWN_LOG_LINES))
            pytest.fail(f"{self.name} ended with code {code}:\n{tail}")

    def kill_group(self) -> None:
        """SIGKILL for every process of its group at once, as a crash of the whole engine."""
        (main,) = psutil.Process(self._running().pid).children()
        os.killpg(main.pid, signal.SIGKILL)
        self._wait()

    def end(self) -> int:
        """Ends it in order; its exit code."""
        self._running().send_signal(signal.SIGTERM)
        return self._wait()

    @property
    def is_running(self) -> bool:
        """Whether it has been started and not ended."""
        return self.guardian is not None and self.guardian.poll() is None

    def _wait(self) -> int:
        guardian = self._running()
        try:
            return guardian.wait(END_DEADLINE_S)
        finally:
            if guardian.stdin is not None:
                guardian.stdin.close()

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.guardian is not None, f"{self.name} was not started"
        return self.guardian


class Daemons:
    """Starts daemons and ports for one scope, and ends them with it."""

    def __init__(self, config: pytest.Config, folder: Path, held: ExitStack) -> None:
        self._logs = config.stash[LOGS]
        self._folder = folder
        self._held = held

    def port(self) -> int:
        """A port that stays ours until the scope ends, for servers started on it again and again."""
        return self._held.enter_context(PortReservation()).port

    def server(self) -> Server:
        """The same as an address on which nothing serves yet."""
        return Server(self.port())

    def start(self, name: str, argv: list[str], env: Mapping[str, str] | None = None) -> Daemon:
        """Starts a command."""
        command = LaunchCommand(argv=tuple(argv), env=dict(os.environ if env is None else env))
        daemon = Daemon(name, command, self._folder / f"{name}.log")
        self._logs[name] = daemon.log
        daemon.start()
        self._held.callback(self._end, daemon)
        return daemon

    def start_engine(self, name: str, port: int) -> Daemon:
        """Starts a vLLM of the default model; `wait_engine` waits for it."""
        command = engine_command(port)
        return self.start(name, list(command.argv), command.env)

    def start_gateway(self, name: str, engines: Sequence[Engine]) -> Gateway:
        """Starts `headrace gateway` with keys and an alias; returns when it knows a model."""
        key_file = self._folder / f"{name}.keys"
        api_key = create_key(key_file)
        gateway = Gateway(self.port(), api_key=api_key)
        argv = [*HEADRACE, "gateway", "--listen", gateway.name, "--api-key-file", str(key_file)]
        argv += ["--alias", f"{ALIAS}={gateway.model}"]
        for engine in engines:
            argv += ["--replica", f"vllm={engine.url}"]
        daemon = self.start(name, argv)
        self._held.callback(end_cleanly, daemon)
        daemon.wait_ready(lambda: gateway.get("/readyz")[0] == 200, GATEWAY_START_DEADLINE_S)
        return gateway

    def _end(self, daemon: Daemon) -> None:
        self._logs.pop(daemon.name, None)
        if daemon.is_running:
            daemon.end()


@contextmanager
def daemons_of(config: pytest.Config, folder: Path) -> Iterator[Daemons]:
    """Daemons of one scope."""
    with ExitStack() as held:
        yield Daemons(config, folder, held)


def engine_command(port: int) -> LaunchCommand:
    """The command that `headrace up` gives for the default model, with a short context."""
    source = model_source.resolve(default_model.NAME, cache_dir(), lambda stage, done: None)
    options = EngineOptions(
        model=source.location,
        served_name=source.served_name,
        placement=CpuPlacement(kv_cache_gib=source.kv_cache_gib),
        port=port,
        is_local=source.is_local,
        max_model_len_tokens=CONTEXT_TOKENS,
        tool_call_parser=source.tool_call_parser,
    )
    return vllm_command(options, os.environ)


def create_key(key_file: Path) -> str:
    """A new API key, made by the real command; its hash is in the file."""
    made = subprocess.run(
        [*HEADRACE, "keys", "create", "--file", str(key_file), "--name", "tests"],
        capture_output=True,
        text=True,
        timeout=GATEWAY_START_DEADLINE_S,
        check=True,
    )
    return made.stdout.strip()


def end_cleanly(daemon: Daemon) -> None:
    """Ends a gateway, which must not have met anything that it did not expect."""
    assert daemon.is_running, f"{daemon.name} died; its log: {daemon.log}"
    code, log = daemon.end(), daemon.log.read_text()
    assert code == 0
    assert "Traceback" not in log, log


def wait_engine(daemon: Daemon, engine: Engine) -> None:
    """Waits until an engine serves its model."""

    def is_ready() -> bool:
        return engine.get("/health")[0] == 200 and engine.get("/v1/models")[0] == 200

    daemon.wait_ready(is_ready, ENGINE_START_DEADLINE_S)


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], Got], float, str], Got]:
    """`poll`, for tests."""
    return poll


@pytest.fixture
def daemons(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemons]:
    """Processes of one test."""
    with daemons_of(request.config, tmp_path) as scope:
        yield scope


@pytest.fixture(scope="session")
def session_daemons(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemons]:
    """Processes of the whole session."""
    with daemons_of(request.config, tmp_path_factory.mktemp("processes")) as scope:
        yield scope


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, session_daemons: Daemons) -> Engine:
    """The session's vLLM with the default model."""
    url = request.config.getoption("--engine-url")
    if url is not None:
        host, _, port = url.removeprefix("http://").partition(":")
        return Engine(int(port), host)
    engine = Engine(session_daemons.port())
    wait_engine(session_daemons.start_engine("engine", engine.port), engine)
    return engine


@pytest.fixture(scope="session")
def gateway(session_daemons: Daemons, engine: Engine) -> Gateway:
    """A gateway with API keys in front of the session's vLLM."""
    return session_daemons.start_gateway("gateway", [engine])


@pytest.fixture
def start_second_engine(daemons: Daemons) -> Callable[[], tuple[Engine, Daemon]]:
    """Starts another vLLM of the same model, for this test alone."""

    def start() -> tuple[Engine, Daemon]:
        engine = Engine(daemons.port())
        daemon = daemons.start_engine("second-engine", engine.port)
        wait_engine(daemon, engine)
        return engine, daemon

    return start


@pytest.fixture(scope="session")
def wait_until_serving() -> Callable[[Daemon, Engine], None]:
    """`wait_engine`, for tests that start an engine again."""
    return wait_engine
