"""`headrace bench engine` as a process."""

import signal
import subprocess
import sys
import time

import httpx
import pytest

DEADLINE_S = 30.0
BENCH = (sys.executable, "-W", "error", "-c", "from serving.cli.bench import bench; bench()")


def run(*arguments):
    """Runs it to its end."""
    return subprocess.run(
        [*BENCH, "engine", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_serves_until_told_to_stop():
    """It says its address, serves adapters named on the command line, and ends with 0."""
    arguments = [
        "--port",
        "0",
        "--adapter",
        "la",
        "--adapter",
        "lb=/b",
        "--decode-tokens-per-s",
        "0",
    ]
    with subprocess.Popen(
        [*BENCH, "engine", *arguments], stdout=subprocess.PIPE, text=True
    ) as made:
        try:
            url = made.stdout.readline().split()[-1]
            end_s = time.monotonic() + DEADLINE_S
            assert httpx.get(f"{url}/health", timeout=DEADLINE_S).status_code == 200
            cards = httpx.get(f"{url}/v1/models", timeout=DEADLINE_S).json()["data"]
            assert [(card["id"], card["root"]) for card in cards[1:]] == [
                ("la", "/adapters/la"),
                ("lb", "/b"),
            ]
            made.send_signal(signal.SIGTERM)
            assert made.wait(end_s - time.monotonic()) == 0
        finally:
            made.kill()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-model-len", "9000000"], "kv_cache_tokens must hold one request"),
        (["--block-size", "0"], "block_size: Input should be greater than or equal to 1"),
        (["--kv-events-replay", "tcp://*:1"], "kv_events_replay needs kv_events"),
    ],
)
def test_bad_settings_are_one_line(arguments, told):
    """A setting that cannot be is refused with one line and exit code 2."""
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("headrace: ")
    assert told in ended.stderr


def test_help_is_the_modules():
    """`--help` lists the engine's options."""
    ended = run("--help")
    assert ended.returncode == 0
    assert "--prefill-tokens-per-s" in ended.stdout
