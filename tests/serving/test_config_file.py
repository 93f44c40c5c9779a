"""`headrace.toml`: the three layers, what is refused and how that is said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from serving.config import Cors, GatewayConfig, ReplicaConfig
from serving.config_file import (
    MAX_FILE_BYTES,
    ConfigSource,
    environment_overrides,
    layers,
    printable,
)
from serving.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "headrace.toml"
REPLICAS = '[[replicas]]\nkind = "vllm"\nurl = "http://10.0.0.5:8000"\n'


def _load(
    tmp_path: Path, text: str, overrides: Mapping[str, object] | None = None
) -> GatewayConfig:
    path = tmp_path / "headrace.toml"
    path.write_text(text)
    return ConfigSource(path, overrides or {}).load()


def _refusal(tmp_path: Path, text: str, overrides: Mapping[str, object] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text, overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(str(tmp_path), "DIR")


def test_the_example_is_valid(tmp_path: Path) -> None:
    """What ships as an example can be used; it names every section."""
    text = EXAMPLE.read_text()
    digest = hashlib.sha256(b"k").hexdigest()
    (tmp_path / "keys.txt").write_text(f"alice sha256:{digest}\n")
    config = _load(tmp_path, text)
    assert [replica.name for replica in config.replicas] == [
        "10.0.0.5:8000",
        "10.0.0.6:8000",
        "engines.internal:443",
    ]
    assert config.replicas[2].is_tls
    assert config.replicas[2].ca_file == tmp_path / "tls/engines-ca.pem"
    assert config.api_keys[0].name == "alice"
    sections = [name for name in GatewayConfig.model_fields if f"\n[{name}]" in text]
    assert sections == [
        "aliases",
        "timeouts",
        "limits",
        "resilience",
        "cors",
        "tls",
        "tracing",
        "control",
    ]


def test_layers(tmp_path: Path) -> None:
    """Environment beats the file, flags beat the environment; tables are merged, lists replaced."""
    text = (
        'workers = 2\nlisten = "127.0.0.1:81"\naliases = {a = "m", b = "m"}\n'
        f"{REPLICAS}[timeouts]\nidle_s = 1\ntotal_s = 2\nconnect_s = 3\n"
    )
    environ = {
        "HEADRACE_WORKERS": "3",
        "HEADRACE_TIMEOUTS_TOTAL_S": "20",
        "HEADRACE_TIMEOUTS_CONNECT_S": "30",
        "HEADRACE_ALIASES": "b=n, c=o",
        "HEADRACE_REPLICA_API_KEY": "s3cret",
        "HEADRACE_INSECURE_NO_AUTH": "",
        "HEADRACE_STATE_DIR": "/elsewhere",
    }
    flags = {"timeouts": {"connect_s": 300.0}, "workers": 4}
    config = _load(tmp_path, text, layers(environment_overrides(environ), flags))
    assert (config.workers, config.listen.port) == (4, 81)
    times = config.timeouts
    assert (times.idle_s, times.total_s, times.connect_s) == (1, 20, 300)
    assert config.aliases == {"a": "m", "b": "n", "c": "o"}
    assert [replica.name for replica in config.replicas] == ["10.0.0.5:8000"]
    assert config.replica_api_key is not None
    assert config.replica_api_key.get_secret_value() == "s3cret"


def test_environment_alone() -> None:
    """Everything can be set without a file, lists and sections included."""
    environ = {
        "HEADRACE_REPLICAS": "vllm=http://a:1,vllm=https://b",
        "HEADRACE_CORS_ALLOWED_ORIGINS": "https://a.example,https://b.example",
        "HEADRACE_CORS_ALLOW_CREDENTIALS": "true",
        "HEADRACE_TRACING_ENDPOINT": "http://c:4318/v1/traces",
        "HEADRACE_TRACING_HEADERS": "x-key=1",
    }
    config = ConfigSource(None, environment_overrides(environ)).load()
    assert config.replicas == (
        ReplicaConfig(kind="vllm", host="a", port=1),
        ReplicaConfig(kind="vllm", host="b", port=443, is_tls=True),
    )
    origins = ("https://a.example", "https://b.example")
    assert config.cors == Cors(allowed_origins=origins, allow_credentials=True)
    assert config.tracing is not None
    assert config.tracing.headers["x-key"].get_secret_value() == "1"
    with pytest.raises(ConfigError, match="HEADRACE_ALIASES: write KEY=VALUE"):
        environment_overrides({"HEADRACE_ALIASES": "a"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("workrs = 2\n", "unknown key 'workrs'; did you mean 'workers'?"),
        ("[timeouts]\nconect_s = 1\n", "'timeouts.conect_s'; did you mean 'connect_s'?"),
        ("[timeouts]\nxyz = 1\n", "'timeouts.xyz'; known keys are: connect_s, first_byte_s, "),
        ("[cors]\nallowed_origin = []\n", "'cors.allowed_origin'; did you mean 'allowed_origins'?"),
        ("[resilience]\nretry_rato = 1\n", "did you mean 'retry_ratio'?"),
        ("workers = 0\n", "workers: Input should be greater than or equal to 1"),
        ("workers = 'x'\n", "workers: Input should be a valid integer"),
        ("[timeouts]\nidle_s = -1\n", "timeouts.idle_s: Input should be greater than 0"),
        ("[cors]\nallowed_origins = ['*', 'https://a.example']\n", "* stands for all origins"),
        ("[cors]\nallowed_origins = ['https://a/x']\n", "without a path, or *"),
        (
            "[cors]\nallowed_origins = ['*']\nallow_credentials = true\n",
            "cors: allow_credentials needs named allowed_origins",
        ),
        (
            "[cors]\nallowed_origins=['*']\nallowed_headers = ['a\\r\\nb']\n",
            "not a method or header",
        ),
        ("[tls]\ncert_file = 'a'\n", "tls.key_file: Field required"),
        ("[tracing]\nendpoint = 'collector:4318'\n", "tracing.endpoint: String should match"),
        ("workers =\n", "it is not TOML: "),
        ("\xff\n", "unknown"),
        ("api_key_file = 'none'\n", "--api-key-file DIR/none: No such file or directory"),
    ],
)
def test_refused(tmp_path: Path, text: str, says: str) -> None:
    """One line that names the file, the key and what to do."""
    said = _refusal(tmp_path, f"{text}{REPLICAS}" if text != "\xff\n" else f"{REPLICAS}xx = 1")
    assert says in said
    if not said.startswith("--"):
        assert said.startswith("DIR/headrace.toml: "), said


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            'kind = "vllm"\nurl = "http://a:1"\nuri = "x"\n',
            "unknown key 'replicas[0].uri'; did you",
        ),
        ('kind = "vllm"\n', "replicas[0].url: Field required"),
        ('kind = "tgi"\nurl = "http://a:1"\n', "replicas[0].kind: Input should be 'vllm'"),
        ('kind = "vllm"\nurl = "http://a:1/v1"\n', "replicas[0]: the URL must not have a path"),
        ('kind = "vllm"\nurl = "ftp://a:1"\n', "replicas[0]: the URL must be http://HOST:PORT or"),
        ('kind = "vllm"\nurl = "http://a:1"\ninsecure = true\n', "are for https:// replicas"),
        (
            'kind = "vllm"\nurl = "https://a:1"\ninsecure = true\nca_file = "x"\n',
            "contradict each other",
        ),
    ],
)
def test_refused_replica(tmp_path: Path, table: str, says: str) -> None:
    """A table of a replica is named by its place."""
    assert says in _refusal(tmp_path, f"[[replicas]]\n{table}")


def test_origin_of_a_bad_value(tmp_path: Path) -> None:
    """What the environment or a flag set is not blamed on the file."""
    said = _refusal(
        tmp_path, REPLICAS, environment_overrides({"HEADRACE_LIMITS_MAX_ATTEMPTS": "x"})
    )
    assert said.startswith("flags or environment: limits.max_attempts: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a folder and a huge file are one line each."""
    with pytest.raises(ConfigError, match=r"--config .*/none: No such file or directory"):
        ConfigSource(tmp_path / "none").load()
    with pytest.raises(ConfigError, match="Is a directory"):
        ConfigSource(tmp_path).load()
    huge = tmp_path / "huge"
    huge.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        ConfigSource(huge).load()
    with pytest.raises(ConfigError, match="no replica is named"):
        ConfigSource().load()


def test_printable_hides_secrets(tmp_path: Path) -> None:
    """The resolved settings can be shown to anybody."""
    (tmp_path / "keys").write_text(f"alice sha256:{'0' * 64}\n")
    text = (
        f"api_key_file = 'keys'\nreplica_api_key = 's3cret'\n{REPLICAS}"
        "[tracing]\nendpoint = 'http://c/v1'\nheaders = {a = 's3cret'}\n"
    )
    shown = printable(_load(tmp_path, text))
    assert "s3cret" not in shown
    assert "0" * 64 not in shown
    resolved = json.loads(shown)
    assert resolved["api_keys"] == ["alice"]
    assert resolved["replica_api_key"] == "**********"
    assert resolved["timeouts"]["connect_s"] == 2.0
