"""A simulated engine for the tests of the benchmarks."""

import os
import sys

import pytest

from benchmarks.pinned import PinnedProcess, free_port


@pytest.fixture(scope="session")
def engine_port(tmp_path_factory):
    """Port of a simulated engine with an event every 5 ms."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.fast_engine", "--port", str(port)]
    command += ["--interval-ms", "5"]
    core = min(os.sched_getaffinity(0))
    log = tmp_path_factory.mktemp("engine") / "log"
    with PinnedProcess(command, core, log) as process:
        process.wait_until_ready(port, "/health", 20.0)
        yield port
