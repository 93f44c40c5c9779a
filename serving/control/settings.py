"""Settings of the control plane, from flags and `HEADRACE_CONTROL_…`.

Owns the fields, their bounds and what contradicts. Never opens the database. Made by
`serving/cli/control.py`, read by everything beside this file.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from adapters.limits import IntakeLimits
from serving.config import Listen, ReplicaConfig, Settings, state_dir
from serving.errors import ConfigError

MIN_TOKEN_CHARS = 16
MAX_TOKEN_FILE_BYTES = 4096
DEFAULT_LISTEN = Listen(host="127.0.0.1", port=8100)
_DATABASES = ("sqlite", "postgresql", "postgres", "postgresql+psycopg")


class ControlLimits(Settings):
    """Bounds on what callers can make the control plane hold."""

    max_json_bytes: int = Field(default=1024 * 1024, ge=1024)
    """Body of everything but an upload."""
    max_upload_bytes: int = Field(default=2 * 1024**3, ge=1024)
    """Body of an upload, as sent."""
    intake: IntakeLimits = IntakeLimits()
    """How large an adapter may be, unpacked."""
    max_uploads: int = Field(default=4, ge=1)
    """Uploads at a time; one more is answered 503."""
    upload_s: float = Field(default=900.0, gt=0)
    """How long the body of an upload may take to arrive."""
    max_waiters: int = Field(default=1024, ge=1)
    """Long polls at a time; one more is answered 503."""
    max_wait_s: float = Field(default=60.0, gt=0, le=600)
    """Longest that a request may ask to wait."""


class ControlSettings(Settings):
    """Everything that `headrace control` needs to serve."""

    listen: Listen = DEFAULT_LISTEN
    insecure_listen: bool = False
    """Allows listening beyond loopback, where the token passes in plain text."""
    state_dir: Path = Field(default_factory=state_dir)
    """Folder of the database by default, of uploads in progress and of locks."""
    database_url: str | None = None
    """`sqlite:///FILE` or `postgresql://…`; None is `control.db` in the state folder."""
    store_url: str | None = None
    """Where adapter files are kept, `file:///…` or `s3://…`; None is `store` in the state folder."""
    replicas: tuple[ReplicaConfig, ...] = Field(default=(), max_length=1024)
    gateway_url: str = "http://127.0.0.1:8000"
    """Through which adapters are probed."""
    replica_api_key: SecretStr | None = None
    """Sent to the replicas as a bearer token, for engines started with `--api-key`."""
    base_models: dict[str, Path] = Field(default_factory=dict)
    """Public name of a base model → folder with its configuration, for the linter."""
    max_lora_rank: int = Field(default=16, ge=1)
    """What the replicas were started with (`--max-lora-rank`), where they do not say it themselves."""
    max_loras: int = Field(default=2, ge=1)
    """Adapters in one batch of theirs (`--max-loras`), where they do not say it themselves."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Adapters that one may know at once (`--max-cpu-loras`), where it does not say it itself."""
    cache_dir: Path | None = None
    """Where adapters lie for the engines of this machine; None is `adapters` in the state folder."""
    cache_max_bytes: int = Field(default=50 * 1024**3, ge=1024)
    """How much may lie there."""
    token: SecretStr
    """What callers present as a bearer token."""
    allow_local_paths: bool | None = None
    """Whether `file://` sources are taken; None is yes on loopback, no elsewhere."""
    local_roots: tuple[Path, ...] = ()
    """Folders that `file://` sources must lie in; empty is anywhere."""
    ack_wait_s: float = Field(default=2.0, ge=0)
    """How long a change waits for the live gateways to have it before it is answered."""
    gateway_ttl_s: float = Field(default=15.0, gt=0)
    """A gateway not heard of for this long counts as gone."""
    gateway_grace_s: float = Field(default=3.0, ge=0)
    """After a start, how long gateways have to come back before anybody is taken for gone."""
    poll_s: float = Field(default=0.5, gt=0)
    """How often changes by other control planes on the same database are looked for."""
    garbage_interval_s: float = Field(default=3600.0, gt=0)
    """How often files of deleted versions and of broken uploads are looked for."""
    garbage_grace_s: float = Field(default=24 * 3600.0, gt=0)
    """How long they are kept after nobody names them; has to be longer than an upload takes."""
    limits: ControlLimits = ControlLimits()

    @field_validator("token")
    @classmethod
    def _check_token(cls, token: SecretStr) -> SecretStr:
        text = token.get_secret_value()
        if len(text) < MIN_TOKEN_CHARS or not text.isascii() or not text.isprintable():
            raise ValueError(f"give at least {MIN_TOKEN_CHARS} printable ASCII characters")
        return token

    @field_validator("database_url")
    @classmethod
    def _check_database(cls, url: str | None) -> str | None:
        if url is not None and url.partition(":")[0] not in _DATABASES:
            raise ValueError("write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")
        return url

    @field_validator("gateway_url")
    @classmethod
    def _check_gateway(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write http://HOST:PORT")
        return url.rstrip("/")

    @field_validator("base_models")
    @classmethod
    def _check_bases(cls, bases: dict[str, Path]) -> dict[str, Path]:
        for name in bases:
            # "@" tells versions from base models wherever a target is named.
            if not name or "@" in name:
                raise ValueError(f"'{name}' cannot name a base model: it is empty or has an '@'")
        return bases

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        names = [replica.name for replica in self.replicas]
        if len(set(names)) != len(names):
            raise ConfigError("--replica: the same address is given twice")
        if self.local_roots and self.allow_local_paths is False:
            raise ConfigError("--local-root contradicts --no-local-paths; choose one")
        return self

    @property
    def takes_local_paths(self) -> bool:
        """Whether `file://` sources are taken."""
        if self.allow_local_paths is None:
            return self.listen.is_loopback
        return self.allow_local_paths

    @property
    def database(self) -> str:
        """URL of the database."""
        return self.database_url or f"sqlite:///{self.state_dir / 'control.db'}"

    @property
    def cache(self) -> Path:
        """Folder where engines read adapters."""
        return (self.cache_dir or self.state_dir / "adapters").absolute()

    @property
    def store(self) -> str:
        """URL of the store."""
        return self.store_url or (self.state_dir / "store").resolve().as_uri()


def read_token(path: Path) -> str:
    """Read the token from a file that only its owner can read.

    Raises:
        ConfigError: If it cannot be read, or others can read it too.
    """
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"--token-file {path}: others can read it; run chmod 600 on it")
        with path.open("rb") as file:
            content = file.read(MAX_TOKEN_FILE_BYTES + 1)
        return content.decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"--token-file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file {path}: it is not ASCII text") from None
