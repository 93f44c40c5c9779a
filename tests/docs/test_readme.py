"""The README's examples, executed as they stand against a real vLLM behind a gateway without keys."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
WRITTEN_ADDRESS = "127.0.0.1:8000"
EXAMPLE_DEADLINE_S = 120.0
READY_DEADLINE_S = 60.0

pytestmark = pytest.mark.engine


def example(name: str) -> tuple[str, str]:
    """Language and text of the code block after `<!-- example: NAME -->`."""
    found = re.search(rf"<!-- example: {name} -->\n```(\w+)\n(.*?)```", README, re.DOTALL)
    assert found is not None, f"README has no example {name}"
    return found[1], found[2]


@pytest.fixture
def run(daemons: Any, engine: Any, until: Any) -> Callable[[str], str]:
    """Runs an example and returns what it printed."""
    server = daemons.server()
    argv = [sys.executable, "-m", "serving.cli.main", "gateway"]
    daemons.start(
        "readme-gateway", [*argv, "--listen", server.name, "--replica", f"vllm={engine.url}"]
    )
    until(lambda: server.get("/readyz")[0] == 200, READY_DEADLINE_S, "the gateway is ready")

    def run_example(name: str) -> str:
        language, text = example(name)
        command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        done = subprocess.run(
            [*command[language], text.replace(WRITTEN_ADDRESS, server.name)],
            capture_output=True,
            text=True,
            timeout=EXAMPLE_DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_example


def test_tour(run: Callable[[str], str]) -> None:
    """Each example of the tour works and says what it should; the metrics count the others."""
    assert "Paris" in run("curl")
    whole, streamed = run("openai").splitlines()
    assert "Paris" in whole
    assert streamed == whole
    assert run("anthropic").strip()
    metrics = run("metrics")
    assert 'endpoint="/v1/chat/completions"' in metrics
    assert 'endpoint="/v1/messages"' in metrics


def test_links() -> None:
    """Every file that README and docs name exists."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_request_walk() -> None:
    """Every file on the request's way exists under `serving/`."""
    walk = section("A request's way", "An adapter's way")
    for name in re.findall(r"`([\w/]+\.py)`", walk):
        assert (ROOT / "serving" / name).exists(), name


def test_adapter_walk() -> None:
    """Every file on an adapter's way exists."""
    names = re.findall(r"`([\w/]+\.py)`", section("An adapter's way", "What it costs"))
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name


def section(title: str, following: str) -> str:
    """The text between two headings of the README."""
    return README.partition(f"## {title}")[2].partition(f"## {following}")[0]
