"""`headrace gateway`: flags, and how bad ones end."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from serving.cli.main import app
from serving.config import GatewayConfig, Listen, ReplicaConfig
from serving.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from serving.config_file import ConfigSource

REPLICA = ("--replica", "vllm=http://127.0.0.1:9001")


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch) -> list[GatewayConfig]:
    """The configurations that the command would have served with."""
    configs: list[GatewayConfig] = []

    def run(config: GatewayConfig, on_ready: Any, source: ConfigSource) -> None:
        assert source.load() == config
        configs.append(config)
        on_ready("http://127.0.0.1:8000")

    monkeypatch.setattr("serving.cli.gateway.run", run)
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        monkeypatch.delenv(name)
    return configs


def _invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["gateway", *arguments])


def test_defaults(run_with: list[GatewayConfig]) -> None:
    """One replica is all that has to be named."""
    result = _invoke(*REPLICA)
    assert (result.exit_code, result.stdout) == (
        0,
        "headrace gateway: serving on http://127.0.0.1:8000\n",
    )
    (config,) = run_with
    assert config == GatewayConfig(
        listen=Listen(host="127.0.0.1", port=8000),
        replicas=(ReplicaConfig(kind="vllm", host="127.0.0.1", port=9001),),
    )


def test_all_flags(run_with: list[GatewayConfig], tmp_path: Path) -> None:
    """Each flag has its place."""
    keys = tmp_path / "keys"
    CliRunner().invoke(app, ["keys", "create", "--file", str(keys)])
    result = _invoke(
        *("--replica", "vllm=http://a:1", "--replica", "vllm=http://[::1]:2/", "--workers", "3"),
        *("--listen", "0.0.0.0:81", "--alias", "x=y", "--alias", "a=b=c"),
        *("--api-key-file", str(keys), "--max-body-bytes", "2048", "--connect-timeout-s", "1.5"),
        *("--first-byte-timeout-s", "2", "--idle-timeout-s", "3", "--total-timeout-s", "4"),
        *("--drain-timeout-s", "5"),
    )
    assert result.exit_code == 0, result.output
    (config,) = run_with
    assert [(one.host, one.port, one.name) for one in config.replicas] == [
        ("a", 1, "a:1"),
        ("::1", 2, "::1:2"),
    ]
    assert (config.listen.host, config.listen.port, config.workers) == ("0.0.0.0", 81, 3)
    assert config.aliases == {"x": "y", "a": "b=c"}
    assert [key.name for key in config.api_keys] == ["default"]
    assert config.limits.max_body_bytes == 2048
    times = config.timeouts
    assert (times.connect_s, times.first_byte_s, times.idle_s, times.total_s, times.drain_s) == (
        1.5,
        2,
        3,
        4,
        5,
    )


def test_environment(run_with: list[GatewayConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags beat the environment."""
    monkeypatch.setenv("HEADRACE_LISTEN", "127.0.0.1:82")
    monkeypatch.setenv("HEADRACE_WORKERS", "2")
    monkeypatch.setenv("HEADRACE_REPLICA_API_KEY", "s3cret")
    _invoke(*REPLICA)
    _invoke(*REPLICA, "--workers", "4")
    assert [(config.listen.port, config.workers) for config in run_with] == [(82, 2), (82, 4)]
    assert "s3cret" not in repr(run_with[0])
    assert run_with[0].replica_api_key is not None
    assert run_with[0].replica_api_key.get_secret_value() == "s3cret"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--replica", "http://127.0.0.1:9001"), "write ENGINE=URL"),
        (("--replica", "9001"), "write ENGINE=URL"),
        (("--replica", "tgi=http://127.0.0.1:9001"), "engine must be one of: vllm"),
        (("--replica", "vllm=ftp://127.0.0.1:9001"), "the URL must be http://HOST:PORT"),
        (("--replica", "vllm=127.0.0.1:9001"), "the URL must be http://HOST:PORT"),
        (("--replica", "vllm=http://127.0.0.1:9001/v1"), "must not have a path"),
        (("--replica", "vllm=http://127.0.0.1:99999"), "--replica vllm=http://127.0.0.1:99999: "),
        (("--replica", "vllm=http://127.0.0.1:x"), "--replica vllm=http://127.0.0.1:x: "),
        (("--replica", "vllm=http://[::1"), "--replica vllm=http://[::1: "),
        ((), "--replica: no replica is named"),
        (("--config", "no/such/file"), "--config no/such/file: No such file or directory"),
        ((*REPLICA, *REPLICA), "the same address is given twice"),
        ((*REPLICA, "--listen", "8000"), "write HOST:PORT"),
        ((*REPLICA, "--listen", "127.0.0.1:x"), "write HOST:PORT"),
        ((*REPLICA, "--listen", "127.0.0.1:²"), "write HOST:PORT"),
        ((*REPLICA, "--listen", "127.0.0.1:70000"), "write HOST:PORT"),
        ((*REPLICA, "--listen", "0.0.0.0:8000"), "--api-key-file FILE"),
        ((*REPLICA, "--listen", ":8000"), "--api-key-file FILE"),
        ((*REPLICA, "--listen", "[::]:8000"), "--api-key-file FILE"),
        ((*REPLICA, "--listen", "gateway.example:8000"), "--api-key-file FILE"),
        ((*REPLICA, "--alias", "x"), "write NAME=MODEL"),
        ((*REPLICA, "--alias", "=x"), "write NAME=MODEL"),
        ((*REPLICA, "--api-key-file", "no/such/file"), "No such file"),
    ],
)
def test_bad_flag(run_with: list[GatewayConfig], arguments: tuple[str, ...], says: str) -> None:
    """One line that names the flag and says what to do; exit code 2, nothing is served."""
    result = _invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("headrace: --")
    assert says in result.stderr
    assert run_with == []


@pytest.mark.parametrize(
    "arguments",
    [
        (*REPLICA, "--workers", "0"),
        (*REPLICA, "--workers", "x"),
        (*REPLICA, "--idle-timeout-s", "0"),
        (*REPLICA, "--nothing"),
    ],
)
def test_flag_that_typer_refuses(run_with: list[GatewayConfig], arguments: tuple[str, ...]) -> None:
    """Exit code 2, nothing is served, and no traceback."""
    result = _invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert run_with == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    """Only this machine can reach it."""
    assert Listen(host=host, port=1).is_loopback


def test_others_need_keys_or_a_word(run_with: list[GatewayConfig]) -> None:
    """Without keys an address that others can reach needs the explicit flag."""
    replicas = (ReplicaConfig.parse(REPLICA[1]),)
    with pytest.raises(ConfigError, match="no API keys are set"):
        GatewayConfig(listen=Listen(host="10.0.0.1", port=1), replicas=replicas)
    assert _invoke(*REPLICA, "--listen", "10.0.0.1:1", "--insecure-no-auth").exit_code == 0
    assert run_with[0].insecure_no_auth


def test_file(
    run_with: list[GatewayConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags beat the file; it is found by flag or variable, and never in the working folder."""
    file = tmp_path / "headrace.toml"
    file.write_text('workers = 2\n[[replicas]]\nkind = "sglang"\nurl = "http://a:1"\n')
    assert _invoke("--config", str(file), "--idle-timeout-s", "7").exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert _invoke().exit_code == 2
    monkeypatch.setenv("HEADRACE_CONFIG", str(file))
    assert _invoke("--workers", "3").exit_code == 0
    first, second = run_with
    assert (first.workers, first.timeouts.idle_s, first.replicas[0].kind) == (2, 7, "sglang")
    assert second.workers == 3


def test_check(run_with: list[GatewayConfig], tmp_path: Path) -> None:
    """The resolved settings as JSON, and nothing is served; exit code 2 for what cannot work."""
    file = tmp_path / "headrace.toml"
    file.write_text('[[replicas]]\nkind = "vllm"\nurl = "http://a:1"\n')
    result = _invoke("--config", str(file), "--check", "--workers", "5")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["workers"] == 5
    file.write_text(file.read_text() + '[tls]\ncert_file = "c"\nkey_file = "k"\n')
    result = _invoke("--config", str(file), "--check")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"headrace: tls: {tmp_path}/c: No such file or directory\n"
    assert run_with == []
