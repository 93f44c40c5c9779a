"""The dialect servers run as processes too."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.pinned import answers, free_port

DEADLINE_S = 20.0
FOLDER = Path(__file__).parent


@pytest.mark.parametrize(
    ("script", "arguments", "path"),
    [
        ("sglang_server.py", ["--adapter", "a=/a", "--enable-metrics"], "/ready"),
        ("tensorrt_llm_server.py", ["--return-perf-metrics"], "/health"),
    ],
)
def test_serves_until_told_to_stop(script, arguments, path):
    """It serves on its port, can be switched over HTTP, and ends with 0 on SIGTERM."""
    port = free_port()
    command = [sys.executable, "-W", "error", str(FOLDER / script), "--port", str(port), *arguments]
    end_s = time.monotonic() + DEADLINE_S
    with subprocess.Popen(command) as made:
        try:
            while not answers(port, path):
                assert made.poll() is None
                assert time.monotonic() < end_s
            base = f"http://127.0.0.1:{port}"
            httpx.post(f"{base}/_control", json={"num_tokens": 2})
            body = {"model": "m", "prompt": "hi"}
            answer = httpx.post(f"{base}/v1/completions", json=body).json()
            assert answer["usage"]["completion_tokens"] == 2
            made.send_signal(signal.SIGTERM)
            assert made.wait(DEADLINE_S) == 0
        finally:
            made.kill()
