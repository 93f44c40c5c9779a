"""Settings of the serving processes, as immutable pydantic models.

Reads no file: `serving/config_file.py` makes these from file, environment and flags.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from serving.errors import ConfigError

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_PRIVATE_SUFFIXES = (".internal", ".local", ".localhost", ".svc")

EngineKind = Literal["vllm", "sglang", "tensorrt-llm"]
ENGINE_KINDS: tuple[EngineKind, ...] = ("vllm", "sglang", "tensorrt-llm")


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaConfig(Settings):
    """One engine process that is reachable over HTTP."""

    kind: EngineKind
    """Dialect that the replica speaks."""
    host: str = Field(min_length=1)
    port: int = Field(ge=1, le=65535)
    is_tls: bool = False
    """Whether it is spoken to over TLS."""
    ca_file: Path | None = None
    """Certificates to verify it by; None is the system's."""
    insecure: bool = False
    """Encrypts without verifying who answers; for tests."""

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
        try:
            return cls(**_replica_fields(text))
        except ValueError as error:
            raise ConfigError(f"--replica {text}: {error}") from None

    @model_validator(mode="before")
    @classmethod
    def _read_url(cls, value: Any) -> Any:
        """Takes `ENGINE=URL`, and a table with `url` in place of `host` and `port`."""
        if isinstance(value, str):
            return _replica_fields(value)
        if isinstance(value, dict) and isinstance(value.get("url"), str):
            rest = {key: part for key, part in value.items() if key != "url"}
            return _url_fields(value["url"]) | rest
        return value

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if (self.ca_file or self.insecure) and not self.is_tls:
            raise ValueError("ca_file and insecure are for https:// replicas")
        if self.ca_file and self.insecure:
            raise ValueError("ca_file and insecure contradict each other; choose one")
        return self


def _replica_fields(text: str) -> dict[str, Any]:
    """Fields of `ENGINE=URL`."""
    kind, separator, url = text.partition("=")
    if not separator:
        raise ValueError("write ENGINE=URL, e.g. vllm=http://10.0.0.5:8000")
    if kind not in ENGINE_KINDS:
        raise ValueError(f"engine must be one of: {', '.join(ENGINE_KINDS)}")
    return {"kind": kind, **_url_fields(url)}


def _url_fields(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the URL must be http://HOST:PORT or https://HOST:PORT")
    if parts.path not in ("", "/") or parts.query or parts.username:
        raise ValueError("the URL must not have a path, a query or a user")
    return {"host": parts.hostname, "port": port, "is_tls": is_tls}


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
    client_body_total_s: float = Field(default=600.0, gt=0)
    """From a request's head to the end of its body, however steadily it trickles in."""
    keep_alive_s: float = Field(default=75.0, gt=0)
    """How long an idle client connection stays open."""
    adapter_load_s: float = Field(default=30.0, gt=0)
    """For a request to wait for an adapter that no replica has ready."""
    drain_s: float = Field(default=30.0, gt=0)
    """How long requests in flight may go on after SIGTERM."""


class Limits(Settings):
    """Bounds on what one client, and all of them, can make a worker hold."""

    max_head_bytes: int = Field(default=65_536, ge=1024)
    max_target_bytes: int = Field(default=8_192, ge=64)
    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    """Of a JSON body, which is held whole."""
    max_upload_bytes: int = Field(default=512 * 1024 * 1024, ge=1024)
    """Of a form with a file for an engine, which is relayed while it comes."""
    max_form_head_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Held of such a form until its `model` has come."""
    max_admin_body_bytes: int = Field(default=16 * 1024**3, ge=1024)
    """Of a body for the control plane, which has limits of its own."""
    max_pipelined: int = Field(default=64, ge=1)
    """Requests that a connection may send ahead of their answers."""
    max_connections: int = Field(default=20_000, ge=1)
    """Client connections of one worker; one more is answered 503 and closed."""
    max_attempts: int = Field(default=3, ge=1)
    """Replicas that one request may try before its first byte."""
    max_waiting_requests: int = Field(default=256, ge=1)
    """Requests of one worker that may wait for one adapter to be loaded."""
    max_waiting_requests_per_worker: int = Field(default=1024, ge=1)
    """Of one worker, for all adapters together."""


class Resilience(Settings):
    """When a failed attempt is repeated, and when a replica is left alone for a while."""

    retry_ratio: float = Field(default=0.2, ge=0, le=1)
    """Retries that the traffic may add to itself, as a share of its requests."""
    min_retries_per_s: float = Field(default=10.0, ge=0)
    """Retries a second that are allowed beside that share."""
    breaker_failures: int = Field(default=5, ge=1)
    """Failures in a row that open a replica's breaker."""
    breaker_open_s: float = Field(default=5.0, gt=0)
    """How long it stays open at first; each time in a row twice as long."""
    breaker_max_open_s: float = Field(default=60.0, gt=0)
    outlier_window_s: float = Field(default=10.0, gt=0)
    """Over which a replica's share of failures is counted."""
    outlier_min_requests: int = Field(default=20, ge=1)
    """Requests in a window before the share means anything."""
    outlier_failure_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of failures that ejects a replica."""
    min_routable_ratio: float = Field(default=0.5, ge=0, le=1)
    """Breakers never take the fleet below this share of its healthy replicas."""
    slow_start_s: float = Field(default=20.0, ge=0)
    """How long a replica that has just come up is given less than its share."""
    canary: bool = True
    """Whether replicas have to generate a token to be believed; their health routes do not tell."""
    canary_interval_s: float = Field(default=15.0, gt=0)
    """A replica that has answered nothing for this long proves itself by one generated token."""
    canary_timeout_s: float = Field(default=20.0, gt=0)
    """How long that token may take."""


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

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        return cls.parse(value).model_dump() if isinstance(value, str) else value

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
    is_admin: bool = False
    """Whether it may change the platform, not only ask models."""


class Cors(Settings):
    """Which web pages may call the gateway from a browser."""

    allowed_origins: tuple[str, ...] = Field(min_length=1)
    """Origins as a browser sends them (`https://app.example.com`), or `*` alone for all."""
    allowed_methods: tuple[str, ...] = ("GET", "POST")
    allowed_headers: tuple[str, ...] = ("*",)
    """Names of request headers; `*` allows whichever a browser asks for."""
    exposed_headers: tuple[str, ...] = ("x-request-id", "x-headrace-inference-id", "retry-after")
    """Response headers that pages may read."""
    max_age_s: int = Field(default=600, ge=0, le=86_400)
    """How long a browser may remember the answer to a preflight."""
    allow_credentials: bool = False
    """Whether cookies may come along; API keys in headers do not need it."""

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            if origin not in ("*", f"{parts.scheme}://{parts.netloc}"):
                raise ValueError(f"{origin}: write SCHEME://HOST[:PORT] without a path, or *")
        if "*" in origins and len(origins) > 1:
            raise ValueError("* stands for all origins: leave the others out")
        return tuple(origin.lower() for origin in origins)

    @field_validator("allowed_methods", "allowed_headers", "exposed_headers")
    @classmethod
    def _check_tokens(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not _TOKEN.fullmatch(name):
                raise ValueError(f"{name!r} is not a method or header name")
        return names

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.allow_credentials and "*" in self.allowed_origins:
            raise ValueError(
                "allow_credentials needs named allowed_origins: browsers refuse it with *"
            )
        return self


class Tls(Settings):
    """TLS towards clients; the files are read again when they change."""

    cert_file: Path
    """Certificate chain, PEM."""
    key_file: Path
    """Its private key, PEM, without a passphrase."""
    client_ca_file: Path | None = None
    """Where set, only clients with a certificate by one of these authorities are served."""


class Tracing(Settings):
    """OpenTelemetry spans, sent over OTLP/HTTP; needs the extra `tracing`."""

    endpoint: str = Field(pattern=r"^https?://[^\s]+$")
    """URL that takes traces, for example `http://127.0.0.1:4318/v1/traces`."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Sent with each export, for example an API key of the collector."""
    service_name: str = "headrace"
    sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the requests without a `traceparent` that are traced; with one, its flag decides."""
    max_queued_spans: int = Field(default=4096, ge=1)
    """Of one worker; more are dropped and counted."""
    export_interval_s: float = Field(default=1.0, gt=0)
    export_timeout_s: float = Field(default=5.0, gt=0)


class ControlPlane(Settings):
    """The process that answers what is not inference; everything else works without it."""

    url: str
    """`http://HOST:PORT`, on this machine or a private network: it is spoken to in plain text."""
    token: SecretStr = Field(min_length=1)
    """Shared secret by which it knows the gateway."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        fields = _url_fields(url)
        if fields["is_tls"] or not _is_private(fields["host"]):
            raise ValueError("write http://HOST:PORT with a loopback or private address")
        return url

    @property
    def host(self) -> str:
        """Its address."""
        return str(_url_fields(self.url)["host"])

    @property
    def port(self) -> int:
        """Its port."""
        return int(_url_fields(self.url)["port"])


def _is_private(host: str) -> bool:
    """Whether an address is not a public one; of names, those that no public DNS has."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_SUFFIXES)


class GatewayConfig(Settings):
    """Everything that a gateway worker needs to serve."""

    listen: Listen = Listen(host="127.0.0.1", port=8000)
    replicas: tuple[ReplicaConfig, ...] = Field(min_length=1, max_length=1024)
    aliases: dict[str, str] = Field(default_factory=dict)
    """Public model name → name of a model that replicas serve."""
    workers: int = Field(default=1, ge=1, le=256)
    api_key_file: Path | None = None
    """Where `api_keys` were read from; None serves without keys."""
    api_keys: tuple[ApiKeyHash, ...] = ()
    replica_api_key: SecretStr | None = None
    """Sent to the replicas as a bearer token, for engines started with `--api-key`."""
    insecure_no_auth: bool = False
    """Allows listening beyond loopback without API keys."""
    metrics_dir: Path | None = None
    """Where the workers keep their shared counters; None is a temporary folder."""
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    resilience: Resilience = Resilience()
    cors: Cors | None = None
    """None answers no preflight and sends none of its headers."""
    tls: Tls | None = None
    """None serves plain HTTP."""
    tracing: Tracing | None = None
    """None traces nothing."""
    control: ControlPlane | None = None
    """None answers the control plane's routes with 404."""
    state_dir: Path | None = None
    """Where the last snapshot of the control plane is kept, to start from without it; None keeps none."""

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
