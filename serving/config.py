"""Settings of the serving processes, as immutable pydantic models.

Reads nothing by itself but what `from_environment` names: flags are parsed by `serving/cli`,
which is the only caller that builds these.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from serving.errors import ConfigError

EngineKind = Literal["vllm"]
ENGINE_KINDS: tuple[EngineKind, ...] = ("vllm",)


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaConfig(Settings):
    """One engine process that is reachable over HTTP."""

    kind: EngineKind
    """Dialect that the replica speaks."""
    host: str
    port: int = Field(ge=1, le=65535)

    @property
    def name(self) -> str:
        """Label of the replica in metrics and logs, for example `127.0.0.1:9001`."""
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `ENGINE=URL`, for example `vllm=http://127.0.0.1:9001`.

        Raises:
            ConfigError: If the text is not of that form.
        """
        kind, separator, url = text.partition("=")
        if not separator:
            raise ConfigError(f"--replica {text}: write ENGINE=URL, e.g. vllm=http://10.0.0.5:8000")
        if kind not in ENGINE_KINDS:
            raise ConfigError(f"--replica {text}: engine must be one of: {', '.join(ENGINE_KINDS)}")
        try:
            parts = urlsplit(url)
            port = parts.port or 80
        except ValueError as error:
            raise ConfigError(f"--replica {text}: {error}") from None
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"--replica {text}: the URL must be http://HOST:PORT")
        if parts.path not in ("", "/") or parts.query:
            raise ConfigError(f"--replica {text}: the URL must not have a path")
        return cls(kind=kind, host=parts.hostname, port=port)


class Timeouts(Settings):
    """Deadlines of a request, in seconds. A request never waits without one."""

    connect_s: float = Field(default=2.0, gt=0)
    """TCP connect to a replica."""
    first_byte_s: float = Field(default=600.0, gt=0)
    """From sending the request to the first byte of the answer (OpenAI's client waits 600 s)."""
    idle_s: float = Field(default=120.0, gt=0)
    """Between two parts of a response; also how long a client may refuse to read."""
    total_s: float = Field(default=3600.0, gt=0)
    """From the complete request to the end of the response."""
    client_head_s: float = Field(default=15.0, gt=0)
    """For a client to send a request line and headers once it has begun."""
    client_body_s: float = Field(default=60.0, gt=0)
    """Between two parts of a request body."""
    keep_alive_s: float = Field(default=75.0, gt=0)
    """How long an idle client connection stays open."""
    drain_s: float = Field(default=30.0, gt=0)
    """How long requests in flight may go on after SIGTERM."""


class Limits(Settings):
    """Bounds on what one client, and all of them, can make a worker hold."""

    max_head_bytes: int = Field(default=65_536, ge=1024)
    max_target_bytes: int = Field(default=8_192, ge=64)
    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    max_pipelined: int = Field(default=64, ge=1)
    """Requests that a connection may send ahead of their answers."""
    max_connections: int = Field(default=20_000, ge=1)
    """Client connections of one worker; one more is answered 503 and closed."""
    max_attempts: int = Field(default=3, ge=1)
    """Replicas that one request may try before its first byte."""


class Listen(Settings):
    """Address that the gateway serves on."""

    host: str
    port: int = Field(ge=0, le=65535)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `HOST:PORT`; an IPv6 host stands in brackets.

        Raises:
            ConfigError: If the text is not of that form.
        """
        host, separator, port = text.rpartition(":")
        if not separator or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"--listen {text}: write HOST:PORT, e.g. 127.0.0.1:8000")
        return cls(host=host.strip("[]") or "0.0.0.0", port=int(port))  # noqa: S104

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class ApiKeyHash(Settings):
    """SHA-256 of an API key; the key itself is never kept."""

    name: str
    sha256_hex: str = Field(pattern=r"^[0-9a-f]{64}$")


class GatewayConfig(Settings):
    """Everything that a gateway worker needs to serve."""

    listen: Listen
    replicas: tuple[ReplicaConfig, ...] = Field(min_length=1, max_length=1024)
    aliases: dict[str, str] = Field(default_factory=dict)
    """Public model name → name of a model that replicas serve."""
    workers: int = Field(default=1, ge=1, le=256)
    api_keys: tuple[ApiKeyHash, ...] = ()
    replica_api_key: SecretStr | None = None
    """Sent to the replicas as a bearer token, for engines started with `--api-key`."""
    insecure_no_auth: bool = False
    """Allows listening beyond loopback without API keys."""
    metrics_dir: Path | None = None
    """Where the workers keep their shared counters; None is a temporary folder."""
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        names = [replica.name for replica in self.replicas]
        if len(set(names)) != len(names):
            raise ConfigError("--replica: the same address is given twice")
        if not (self.api_keys or self.listen.is_loopback or self.insecure_no_auth):
            raise ConfigError(
                f"--listen {self.listen.host}: others can reach this address and no API keys are set: "
                "give --api-key-file FILE (headrace keys create --file FILE), or --insecure-no-auth"
            )
        return self


def state_dir() -> Path:
    """Folder for what a running platform keeps: `HEADRACE_STATE_DIR`, else `~/.local/state/headrace`."""
    return Path(os.environ.get("HEADRACE_STATE_DIR") or Path.home() / ".local/state/headrace")


def cache_dir() -> Path:
    """Folder for what can be made again: `HEADRACE_CACHE_DIR`, else `~/.cache/headrace`."""
    return Path(os.environ.get("HEADRACE_CACHE_DIR") or Path.home() / ".cache/headrace")
