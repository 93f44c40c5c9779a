"""What `headrace up` starts, as settings that are checked before a model is touched.

Owns: the fields and what contradicts. Never: starts anything. Made by `serving/cli/up.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from serving.config import Listen, ReplicaConfig, Settings
from serving.config_file import ConfigSource
from serving.errors import ConfigError
from serving.fleet.ports import LOOPBACK

if TYPE_CHECKING:
    from serving.config import GatewayConfig


class UpConfig(Settings):
    """What `headrace up` starts."""

    listen: Listen
    model: str
    engine: str = "vllm"
    num_replicas: int = Field(default=1, ge=1, le=64)
    num_workers: int = Field(default=1, ge=1, le=256)
    """Gateway processes on the port."""
    api_key_file: Path | None = None
    insecure_no_auth: bool = False
    """Serve without API keys where others can reach the address."""
    gateway_config: Path | None = None
    """The gateway's `headrace.toml`; its replicas, address and workers are ours."""
    gpus_per_replica: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_gib: int | None = Field(default=None, ge=1)
    """On CPUs; None is what the model's length asks for."""
    max_model_len_tokens: int | None = Field(default=None, ge=1)
    max_loras: int = Field(default=2, ge=0)
    """Adapters that one batch may mix; 0 starts without LoRA."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Adapters that a replica keeps in memory."""
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    tool_call_parser: str | None = None
    engine_arguments: tuple[str, ...] = ()
    start_timeout_s: float = Field(default=900.0, gt=0.0)
    """For an engine to become ready, downloading its model included."""
    database_url: str | None = None
    """Of the control plane; None is SQLite in the state folder."""
    adapter_store: str | None = None
    """Where adapter files are kept (`s3://…`); None is a folder in the state folder."""
    state_dir: Path
    cache_dir: Path

    def listen_text(self) -> str:
        """Return the address as `--listen` takes it."""
        host = f"[{self.listen.host}]" if ":" in self.listen.host else self.listen.host
        return f"{host}:{self.listen.port}"

    def reachable_host(self) -> str:
        """Return a host by which this machine reaches the address."""
        return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.listen.host, self.listen.host)  # noqa: S104

    def resolved_gateway(self) -> GatewayConfig | None:
        """Return what the gateway's file means, or None where there is none.

        Raises:
            ConfigError: if the file cannot work.
        """
        if self.gateway_config is None:
            return None
        overrides = {
            "listen": self.listen,
            "replicas": [ReplicaConfig(kind="vllm", host=LOOPBACK, port=1)],
        }
        if self.api_key_file is not None:
            overrides["api_key_file"] = self.api_key_file
        if self.insecure_no_auth:
            overrides["insecure_no_auth"] = True
        config = ConfigSource(self.gateway_config, overrides).load()
        if config.tls is not None and config.tls.client_ca_file is not None:
            raise ConfigError(
                f"{self.gateway_config}: tls.client_ca_file: headrace up has no client certificate to "
                "ask its own gateway with; start the gateway by headrace gateway"
            )
        return config

    @property
    def is_tls(self) -> bool:
        """Whether the gateway serves over TLS."""
        config = self.resolved_gateway()
        return config is not None and config.tls is not None

    def check_listen(self) -> None:
        """Refuse an address that cannot work before a model is loaded for it.

        Raises:
            ConfigError: if others could reach the gateway without a key, or the port is left open.
        """
        gateway = self.resolved_gateway()
        has_keys = self.api_key_file is not None or (gateway is not None and gateway.api_keys)
        if self.listen.port == 0:
            msg = "--listen: give a port, for example 127.0.0.1:8000"
            raise ConfigError(msg)
        if not (has_keys or self.listen.is_loopback or self.insecure_no_auth):
            msg = (
                f"--listen {self.listen.host}: others can reach this address and no API keys are set:"
                " give --api-key-file FILE (headrace keys create --file FILE), or --insecure-no-auth"
            )
            raise ConfigError(msg)
        if self.api_key_file is not None and not self.api_key_file.is_file():
            msg = (
                f"--api-key-file {self.api_key_file}: no such file; headrace keys create makes one"
            )
            raise ConfigError(msg)
