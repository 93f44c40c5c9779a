"""Every engine behind a gateway of its own, and OpenAI's client before it.

Owns: the table of engines (`fronts`), each started once for the session: the real vLLM of
`tests/conftest.py`, the simulated vLLM, and the dialect servers of `tests/engines`. Never: knows
what an engine answers; that is asserted in the tests beside this file, the same for all.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import httpx
import openai
import pytest

from serving.fleet import default_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).parents[1]
HEADRACE = (sys.executable, "-W", "error", "-m", "serving.cli.main")
MODEL = "m"
ALIAS = "fast"
NUM_TOKENS = 8
"""Length of a simulated answer that nobody bounds sooner."""
CONTEXT_TOKENS = 2048
START_DEADLINE_S = 60.0
CLIENT_DEADLINE_S = 120.0

SIMULATED = ("vllm-sim", "sglang", "tensorrt-llm")
ENGINES = (*SIMULATED, pytest.param("vllm", marks=pytest.mark.engine))

_SIM = (
    "import sys, uvloop; from benchmarks.engine_sim.options import SimOptions; "
    "from benchmarks.engine_sim.server import serve; "
    "uvloop.run(serve(SimOptions.model_validate_json(sys.argv[1]), print))"
)


@dataclass(frozen=True)
class Front:
    """A gateway and the one engine behind it.

    Attributes:
        kind: Which engine.
        server: The gateway.
        engine_url: The engine's own address.
        model: Public name of its base model.
        alias: Another name for it.
        api_key: The gateway's.
    """

    kind: str
    server: Any
    engine_url: str
    model: str
    alias: str
    api_key: str = "none"

    def client(self) -> openai.OpenAI:
        """OpenAI's client; it never tries twice, so that no failure is hidden."""
        return openai.OpenAI(
            base_url=f"{self.server.url}/v1",
            api_key=self.api_key,
            max_retries=0,
            timeout=CLIENT_DEADLINE_S,
        )

    def post(self, path: str, **fields: object) -> httpx.Response:
        """The bytes that OpenAI's client would get."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        url = f"{self.server.url}{path}"
        return httpx.post(url, json=fields, headers=headers, timeout=CLIENT_DEADLINE_S)

    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens that the gateway has counted so far."""
        prompt = self.server.metric("headrace_prompt_tokens_total")
        return int(prompt), int(self.server.metric("headrace_completion_tokens_total"))

    def switch(self, **switches: object) -> dict[str, int]:
        """Sets switches of a dialect server; its accounts."""
        url, told = f"{self.engine_url}/_control", json.dumps(switches).encode()
        with urlopen(Request(url, told, method="POST"), timeout=START_DEADLINE_S) as answer:  # noqa: S310
            accounts: dict[str, int] = json.load(answer)
        return accounts


@dataclass(frozen=True)
class Fronts:
    """Starts them."""

    daemons: Any

    def start(self, name: str, kind: str, argv: list[str], port: int) -> Front:
        """An engine and a gateway before it; returns when a request would be answered."""
        self.daemons.start(f"{name}-engine", argv)
        gateway = self.daemons.server()
        engine_url = f"http://127.0.0.1:{port}"
        told = [*HEADRACE, "gateway", "--listen", gateway.name, "--alias", f"{ALIAS}={MODEL}"]
        dialect = "vllm" if kind == "vllm-sim" else kind
        daemon = self.daemons.start(
            f"{name}-gateway", [*told, "--replica", f"{dialect}={engine_url}"]
        )
        daemon.wait_ready(lambda: gateway.get("/readyz")[0] == 200, START_DEADLINE_S)
        return Front(kind, gateway, engine_url, MODEL, ALIAS)

    def sim(self, name: str = "vllm-sim", **options: object) -> Front:
        """The simulated vLLM."""
        port = self.daemons.port()
        told = {
            "model": MODEL,
            "port": port,
            "adapters": {"support": "/adapters/support"},
            "answer_tokens": NUM_TOKENS,
            "max_model_len": CONTEXT_TOKENS,
            "decode_tokens_per_s": 0,
            "prefill_tokens_per_s": 0,
            **options,
        }
        return self.start(name, "vllm-sim", [sys.executable, "-c", _SIM, json.dumps(told)], port)

    def dialect(self, kind: str, *flags: str, name: str = "") -> Front:
        """A dialect server of `tests/engines`."""
        port = self.daemons.port()
        script = TESTS / "engines" / f"{kind.replace('-', '_')}_server.py"
        argv = [sys.executable, str(script), "--port", str(port), "--model", MODEL]
        argv += ["--num-tokens", str(NUM_TOKENS), *flags]
        if kind == "sglang":
            argv += ["--adapter", "support=/adapters/support"]
        return self.start(name or kind, kind, argv, port)


@pytest.fixture(scope="session")
def fronts(session_daemons: Any) -> Fronts:
    """Starts engines for the session."""
    return Fronts(session_daemons)


@pytest.fixture(scope="session")
def front_of(request: pytest.FixtureRequest, fronts: Fronts) -> Callable[[str], Front]:
    """The front of an engine, started when it is first asked for."""
    started: dict[str, Front] = {}

    def start(kind: str) -> Front:
        if kind == "vllm-sim":
            return fronts.sim()
        if kind != "vllm":
            return fronts.dialect(kind)
        engine, gateway = (request.getfixturevalue(name) for name in ("engine", "gateway"))
        return Front(kind, gateway, engine.url, default_model.NAME, gateway.alias, gateway.api_key)

    def get(kind: str) -> Front:
        if kind not in started:
            started[kind] = start(kind)
        return started[kind]

    return get


@pytest.fixture(params=ENGINES)
def front(request: pytest.FixtureRequest, front_of: Callable[[str], Front]) -> Front:
    """Each engine in turn."""
    return front_of(request.param)


@pytest.fixture(params=SIMULATED)
def simulated(request: pytest.FixtureRequest, front_of: Callable[[str], Front]) -> Front:
    """Each engine whose answers are known beforehand."""
    return front_of(request.param)


@pytest.fixture
def client(front: Front) -> Iterator[openai.OpenAI]:
    """OpenAI's client of `front`."""
    with front.client() as opened:
        yield opened
