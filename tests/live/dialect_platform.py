"""A control plane, a gateway and two dialect servers of one kind, with adapters of different weights.

Owns their start, their end and the commands for them; the servers run in a thread with a loop of its
own, so that tests can look into them and may block. Never asserts what is answered. Used by: the
adapter tests of the dialects beside this file.
"""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread

import httpx

sys.path.append(str(Path(__file__).parents[1] / "engines"))
sys.path.append(str(Path(__file__).parents[1] / "adapters"))

from adapter_folders import make_adapter, make_base
from adapter_weights import contents_of
from sglang_options import SglangOptions
from sglang_server import SglangServer
from tensorrt_llm_server import TensorrtLlmServer

from adapters.golden import GOLDEN_PROMPTS

HEADRACE = (sys.executable, "-W", "error", "-m", "serving.cli.main")
MODEL = "m"
TOKEN = "token-of-the-dialect-tests"
SWING, STEADY = "swing", "steady"
NUM_TOKENS = 8
TOKEN_INTERVAL_S = 0.003
DEADLINE_S = 30.0
WEIGHTS = "adapter_model.safetensors"


def make_engine(kind, port):
    """One dialect server."""
    switches = {"num_tokens": NUM_TOKENS, "token_interval_s": TOKEN_INTERVAL_S}
    if kind == "sglang":
        return SglangServer(MODEL, port, SglangOptions(checks_lora_paths=True), **switches)
    return TensorrtLlmServer(MODEL, port, **switches)


class EngineThread:
    """Dialect servers in a loop of their own.

    Attributes:
        engines: The servers; their records may be read from any thread.
    """

    def __init__(self, engines):
        self.engines = engines
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._is_up = Event()
        self._thread = Thread(target=self._run, name="dialect-servers")

    def __enter__(self):
        self._thread.start()
        assert self._is_up.wait(DEADLINE_S)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def crash(self, engine):
        """Ends one as a killed process does; what it had loaded is gone."""
        self._do(self._crash(engine))

    def revive(self, engine):
        """Starts it on the same port, without adapters."""
        self._do(engine.listen())

    @staticmethod
    async def _crash(engine):
        engine.die()
        if isinstance(engine, SglangServer):
            engine.loras.restart()
        else:
            engine.lora_cache.clear()

    def _do(self, work):
        asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def _run(self):
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self):
        async with AsyncExitStack() as stack:
            for engine in self.engines:
                await stack.enter_async_context(engine)
            self._is_up.set()
            await self._stop.wait()


def named_version(seen):
    """The version that a request to an engine names, or None; loads and unloads name one too."""
    body = seen.json
    if "lora_name" in body:
        return body["lora_name"]
    if "lora_request" in body:
        return body["lora_request"]["lora_name"]
    return str(body.get("model", "")).partition(":")[2] or None


def is_proof(seen):
    """Whether a request to an engine is one of the control plane's: a load or a probe."""
    return "lora_name" in seen.json or seen.json.get("prompt") == list(GOLDEN_PROMPTS)


class DialectPlatform:
    """Two replicas of a kind with everything before them.

    Attributes:
        kind: Which engine they imitate.
        engines: The two servers.
        server: Where the gateway serves.
        control: The daemon of the control plane, `gateway` that of the gateway.
        versions: The two versions of `SWING`.
        steady: The version of `STEADY`.
    """

    def __init__(self, kind, daemons, folder):
        self.kind = kind
        self._daemons, self._folder = daemons, folder
        self._base = make_base(folder / "base")
        self._sources = {}
        self._ports = [daemons.port(), daemons.port()]
        self.engines = [make_engine(kind, port) for port in self._ports]
        self._thread = EngineThread(self.engines)
        self.server, self._control_server = daemons.server(), daemons.server()
        self._env = {**os.environ, "HEADRACE_CONTROL_TOKEN": TOKEN}

    @contextmanager
    def running(self):
        """Everything up, with the adapters pushed."""
        with self._thread:
            told = [word for port in self._ports for word in self._replica(port)]
            argv = [*HEADRACE, "control", "--listen", self._control_server.name, *told]
            argv += ["--gateway", self.server.url, "--base-model", f"{MODEL}={self._base}"]
            argv += ["--state-dir", str(self._folder / "control")]
            self.control = self._daemons.start(f"control-{self.kind}", argv, self._env)
            argv = [*HEADRACE, "gateway", "--listen", self.server.name, *told]
            argv += ["--control", self._control_server.url, "--state-dir", str(self._gateway_state)]
            self.gateway = self._daemons.start(f"gateway-{self.kind}", argv, self._env)
            self.wait_control()
            self.wait_gateway()
            self.versions = [self.push(1, SWING, SWING), self.push(2, SWING)]
            self.steady = self.push(3, STEADY, STEADY)
            self._want_everywhere(SWING, self.versions[0])
            self._want_everywhere(STEADY, self.steady)
            try:
                yield self
            finally:
                for daemon in (self.gateway, self.control):
                    if daemon.is_running:
                        daemon.end()

    def wait_control(self):
        """Until the control plane answers."""
        up = self._control_server
        self.control.wait_ready(lambda: up.get("/healthz")[0] == 200, DEADLINE_S)

    def wait_gateway(self):
        """Until a first request would be answered."""
        self.gateway.wait_ready(lambda: self.server.get("/readyz")[0] == 200, DEADLINE_S)

    def crash(self, engine):
        """A replica is gone, and what it had loaded."""
        self._thread.crash(engine)

    def revive(self, engine):
        """It is back, as a new process."""
        self._thread.revive(engine)

    def push(self, seed, name, alias=None):
        """Pushes an adapter whose weights are this seed's; the version's name."""
        source = self._folder / f"source-{seed}"
        make_adapter(source, seed=seed)
        argv = [*HEADRACE, "adapters", "push", str(source), "--name", name]
        argv += ["--alias", alias] if alias else []
        ran = subprocess.run(
            [*argv, "--url", self.server.url, "--json"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert ran.returncode == 0, f"{ran.stderr}{ran.stdout}"
        version = json.loads(ran.stdout)["version"]["version"]
        self._sources[version] = source
        return version

    def _want_everywhere(self, alias, version):
        answer = httpx.put(
            f"{self.server.url}/admin/v1/aliases/{alias}",
            json={"target": version, "min_copies": len(self.engines)},
            timeout=DEADLINE_S,
        )
        assert answer.status_code == 200, answer.text

    def client(self):
        """A client of the gateway, for administration."""
        return httpx.AsyncClient(base_url=self.server.url, timeout=90.0)

    def name_of(self, engine):
        """What the platform calls a replica."""
        return f"127.0.0.1:{engine.port}"

    def published(self):
        """The snapshot that the gateway has on disk."""
        return json.loads((self._gateway_state / "published.json").read_text())

    def is_ready_on(self, engine, version):
        """Whether clients that ask for a version are routed to a replica, by that snapshot."""
        known = self.published()["versions"].get(version, {"placements": {}})
        placement = known["placements"].get(self.name_of(engine))
        return placement is not None and placement["state"] == "ready"

    def weights(self):
        """Version → where engines read it and what is in that folder; the weights are as pushed."""
        found = {}
        for version, known in self.published()["versions"].items():
            paths = {placement["path"] for placement in known["placements"].values()}
            for path in paths:
                pushed = (self._sources[version] / WEIGHTS).read_bytes()
                assert (Path(path) / WEIGHTS).read_bytes() == pushed
                found[version] = (path, contents_of(path))
        return found

    @property
    def _gateway_state(self):
        return self._folder / "gateway"

    def _replica(self, port):
        return ("--replica", f"{self.kind}=http://127.0.0.1:{port}")
