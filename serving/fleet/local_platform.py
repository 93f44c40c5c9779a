"""The whole platform on this machine: engines, then the gateway, supervised until it is stopped.

Owns: the order of a start and of an end, and what each process is told. Never: prints, or reads
flags and environment by itself (`serving/cli/up.py` does both). Called by: `serving/cli/up.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from pydantic import Field

from serving.config import Listen, ReplicaConfig, Settings
from serving.config_file import ConfigSource
from serving.engines import dialect_of
from serving.engines.installed import check_startable
from serving.engines.launch import EngineOptions, LaunchCommand, vllm_command
from serving.engines.launch_gpu import (
    sglang_command,
    tensorrt_llm_command,
    tensorrt_llm_config,
)
from serving.engines.placement import look_at_host, split_cpus, split_gpus
from serving.errors import ConfigError
from serving.fleet import model_source
from serving.fleet.ports import LOOPBACK, AddressClaim, PortReservation
from serving.fleet.process import ProcessSpec, ProcessStatus, State
from serving.fleet.processes import Processes, is_down_for_good, only_one, write_atomically
from serving.fleet.readiness import EngineReady, PathReady

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serving.config import EngineKind, GatewayConfig
    from serving.engines.launch import CpuPlacement, GpuPlacement
    from serving.fleet.model_source import ModelSource

GATEWAY = "gateway"
GATEWAY_START_DEADLINE_S = 60.0
# The gateway drains for 30 s (`Timeouts.drain_s`) and then ends by itself.
GATEWAY_GRACE_S = 35.0
READYZ_DEADLINE_S = 60.0
# vLLM ends by itself after its own `--shutdown-timeout`; on busy cores that takes a while.
ENGINE_GRACE_MARGIN_S = 15.0
RESOLVED_CONFIG_FILE = "up.json"


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
    tool_call_parser: str | None = None
    engine_arguments: tuple[str, ...] = ()
    start_timeout_s: float = Field(default=900.0, gt=0.0)
    """For an engine to become ready, downloading its model included."""
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


class Observer(Protocol):
    """Who shows what happens."""

    def preparing(self, stage: str, done: float) -> None:
        """The model is being made ready; `done` is a fraction from 0 to 1."""

    def changed(self, status: ProcessStatus) -> None:
        """A process changed."""

    def serving(self, model: ModelSource) -> None:
        """The first request would be answered now."""

    def stopping(self) -> None:
        """Everything is being taken down."""


class StartError(Exception):
    """A process that does not come up, or that went down for good."""

    def __init__(self, status: ProcessStatus) -> None:
        super().__init__(f"{status.name}: {status.reason}")
        self.status = status


class LocalPlatform:
    """One platform: made, served until `stop`, gone."""

    def __init__(self, config: UpConfig, env: Mapping[str, str], observer: Observer) -> None:
        """Prepare; `run` does everything.

        Args:
            config: what to start.
            env: environment of the processes to start.
            observer: who shows what happens.
        """
        self._config = config
        self._env = env
        self._observer = observer
        self._stop_asked = False
        self._processes: Processes | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> bool:
        """Take everything down in order; called again, at once. May be called by a signal handler.

        Returns:
            Whether there was something to take down.
        """
        if self._loop is None:
            return False
        self._loop.call_soon_threadsafe(self._stop_in_loop)
        return True

    def _stop_in_loop(self) -> None:
        processes = self._known()
        if self._stop_asked:
            processes.kill()
        self._stop_asked = True
        processes.poke()

    def run(self) -> None:
        """Check everything, make the model ready, serve until `stop`, take everything down.

        Raises:
            ConfigError: if a setting cannot work; found before the model is touched.
            StartError: if a process does not come up, or went down for good.
        """
        config = self._config
        device = check_startable(config.engine)
        config.check_listen()
        with contextlib.ExitStack() as held:
            held.enter_context(only_one(config.state_dir))
            claim = AddressClaim(config.listen.host, config.listen.port)
            held.callback(claim.release)
            model = model_source.resolve(config.model, config.cache_dir, self._observer.preparing)
            placements = self._place(device, model)
            ports = [held.enter_context(PortReservation()).port for _ in placements]
            write_atomically(
                config.state_dir / RESOLVED_CONFIG_FILE, config.model_dump_json(indent=1) + "\n"
            )
            engines = [
                self._engine_spec(index, port, placement, model)
                for index, (port, placement) in enumerate(zip(ports, placements, strict=True))
            ]
            asyncio.run(self._serve(engines, self._gateway_spec(ports), model))

    def _place(self, device: str, model: ModelSource) -> Sequence[CpuPlacement | GpuPlacement]:
        config = self._config
        host = look_at_host(self._env)
        if device == "gpu":
            return split_gpus(
                host, config.num_replicas, config.gpus_per_replica, config.gpu_memory_utilization
            )
        kv_cache_gib = config.kv_cache_gib or model.kv_cache_gib
        return split_cpus(host, config.num_replicas, kv_cache_gib, model.weights_bytes)

    def _engine_spec(
        self, index: int, port: int, placement: CpuPlacement | GpuPlacement, model: ModelSource
    ) -> ProcessSpec:
        config = self._config
        options = EngineOptions(
            model=model.location,
            served_name=model.served_name,
            placement=placement,
            port=port,
            is_local=model.is_local,
            max_model_len_tokens=config.max_model_len_tokens,
            tool_call_parser=config.tool_call_parser or model.tool_call_parser,
            max_loras=config.max_loras,
            extra_arguments=config.engine_arguments,
        )
        name = f"{config.engine}-{index}"
        return ProcessSpec(
            name=name,
            command=self._engine_command(name, options),
            readiness=EngineReady(
                LOOPBACK,
                port,
                model.served_name,
                dialect_of(cast("EngineKind", config.engine)).health_path,
            ),
            log=self._log(name),
            start_deadline_s=config.start_timeout_s,
            grace_s=options.shutdown_timeout_s + ENGINE_GRACE_MARGIN_S,
        )

    def _engine_command(self, name: str, options: EngineOptions) -> LaunchCommand:
        if self._config.engine == "sglang":
            return sglang_command(options, self._env)
        if self._config.engine == "tensorrt-llm":
            path = self._config.state_dir / "engines" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, tensorrt_llm_config(options))
            return tensorrt_llm_command(options, self._env, str(path))
        return vllm_command(options, self._env)

    def _gateway_spec(self, ports: Sequence[int]) -> ProcessSpec:
        config = self._config
        argv = [sys.executable, "-m", "serving.cli.main", "gateway"]
        argv += ["--listen", config.listen_text(), "--workers", str(config.num_workers)]
        for port in ports:
            argv += ["--replica", f"{config.engine}=http://{LOOPBACK}:{port}"]
        if config.api_key_file is not None:
            argv += ["--api-key-file", str(config.api_key_file)]
        if config.insecure_no_auth:
            argv.append("--insecure-no-auth")
        if config.gateway_config is not None:
            argv += ["--config", str(config.gateway_config)]
        host = config.reachable_host()
        return ProcessSpec(
            name=GATEWAY,
            command=LaunchCommand(argv=tuple(argv), env=self._env),
            readiness=PathReady(host, config.listen.port, "/healthz", config.is_tls),
            log=self._log(GATEWAY),
            start_deadline_s=GATEWAY_START_DEADLINE_S,
            grace_s=GATEWAY_GRACE_S,
        )

    def _log(self, name: str) -> Path:
        return self._config.state_dir / "logs" / f"{name}.log"

    async def _serve(
        self, engines: Sequence[ProcessSpec], gateway: ProcessSpec, model: ModelSource
    ) -> None:
        failure: StartError | None = None
        async with Processes(self._config.state_dir, self._observer.changed) as processes:
            self._processes = processes
            self._loop = asyncio.get_running_loop()
            try:
                await self._start_and_wait(engines, gateway, model)
            except StartError as error:
                failure = error
            finally:
                self._observer.stopping()
                # The gateway first: it drains while its engines still answer.
                await processes.stop([GATEWAY])
                await processes.stop([spec.name for spec in engines])
                self._loop = None
        if failure is not None:
            raise failure

    async def _start_and_wait(
        self, engines: Sequence[ProcessSpec], gateway: ProcessSpec, model: ModelSource
    ) -> None:
        for spec in engines:
            self._known().start(spec)
        await self._until_ready([spec.name for spec in engines])
        if self._is_stopping():
            return
        self._known().start(gateway)
        await self._until_ready([GATEWAY])
        await self._until_first_request_works(gateway)
        if self._is_stopping():
            return
        self._observer.serving(model)
        lost = await self._until_lost_or_stopped()
        if lost is not None:
            raise StartError(lost)

    def _is_stopping(self) -> bool:
        return self._stop_asked

    async def _until_ready(self, names: Sequence[str]) -> None:
        """Wait for some processes; each has its own deadline, after which it counts as failed."""

        def is_decided(statuses: list[ProcessStatus]) -> bool:
            chosen = [each for each in statuses if each.name in names]
            is_up = all(each.state is State.READY for each in chosen)
            return self._stop_asked or is_up or any(each.state is State.FAILED for each in chosen)

        for status in await self._known().until(is_decided):
            if status.name in names and status.state is State.FAILED:
                raise StartError(status)

    async def _until_first_request_works(self, gateway: ProcessSpec) -> None:
        config = self._config
        ready = PathReady(config.reachable_host(), config.listen.port, "/readyz", config.is_tls)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READYZ_DEADLINE_S):
                while not (self._stop_asked or await ready.is_ready()):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.1)
                return
        status = next(each for each in self._known().statuses() if each.name == gateway.name)
        raise StartError(status)

    async def _until_lost_or_stopped(self) -> ProcessStatus | None:
        """Wait until `stop`, or until what is left cannot serve; return the process at fault."""

        def is_over(statuses: list[ProcessStatus]) -> bool:
            return self._stop_asked or _lost(statuses) is not None

        statuses = await self._known().until(is_over)
        return None if self._stop_asked else _lost(statuses)

    def _known(self) -> Processes:
        if self._processes is None:
            msg = "the platform is not running"
            raise RuntimeError(msg)
        return self._processes


def _lost(statuses: Sequence[ProcessStatus]) -> ProcessStatus | None:
    """Return the process whose loss ends the platform: the gateway, or the last engine."""
    down = [status for status in statuses if is_down_for_good(status)]
    engines_left = [status for status in statuses if status.name != GATEWAY and status not in down]
    for status in down:
        if status.name == GATEWAY or not engines_left:
            return status
    return None
