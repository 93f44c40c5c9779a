"""The whole platform on this machine: engines, then the gateway, supervised until it is stopped.

Owns: the order of a start and of an end, and what each process is told. Never: prints, or reads
flags and environment by itself (`serving/cli/up.py` does both). Called by: `serving/cli/up.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Protocol

from serving.engines.installed import check_startable
from serving.engines.placement import look_at_host, split_cpus, split_gpus
from serving.fleet import model_source
from serving.fleet.ports import AddressClaim, PortReservation
from serving.fleet.process import ProcessSpec, ProcessStatus, State
from serving.fleet.process_specs import CONTROL, GATEWAY, PlatformSpecs
from serving.fleet.processes import Processes, is_down_for_good, only_one, write_atomically
from serving.fleet.readiness import PathReady

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serving.engines.launch import CpuPlacement, GpuPlacement
    from serving.fleet.model_source import ModelSource
    from serving.fleet.up_config import UpConfig

READYZ_DEADLINE_S = 60.0
# Without it everything but changes works, so nothing waits for its database longer than this.
CONTROL_WAIT_S = 15.0
TOKEN_BYTES = 32
RESOLVED_CONFIG_FILE = "up.json"


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
            specs = PlatformSpecs(
                config,
                self._env,
                secrets.token_urlsafe(TOKEN_BYTES),
                held.enter_context(PortReservation()).port,
            )
            engines = [
                specs.engine(index, port, placement, model)
                for index, (port, placement) in enumerate(zip(ports, placements, strict=True))
            ]
            control = specs.control(ports, model)
            asyncio.run(self._serve(engines, control, specs.gateway(ports), model))

    def _place(self, device: str, model: ModelSource) -> Sequence[CpuPlacement | GpuPlacement]:
        config = self._config
        host = look_at_host(self._env)
        if device == "gpu":
            return split_gpus(
                host, config.num_replicas, config.gpus_per_replica, config.gpu_memory_utilization
            )
        kv_cache_gib = config.kv_cache_gib or model.kv_cache_gib
        return split_cpus(host, config.num_replicas, kv_cache_gib, model.weights_bytes)

    async def _serve(
        self,
        engines: Sequence[ProcessSpec],
        control: ProcessSpec,
        gateway: ProcessSpec,
        model: ModelSource,
    ) -> None:
        failure: StartError | None = None
        async with Processes(self._config.state_dir, self._observer.changed) as processes:
            self._processes = processes
            self._loop = asyncio.get_running_loop()
            try:
                await self._start_and_wait(engines, control, gateway, model)
            except StartError as error:
                failure = error
            finally:
                self._observer.stopping()
                # The gateway first: it drains while its engines still answer.
                await processes.stop([GATEWAY])
                await processes.stop([CONTROL])
                await processes.stop([spec.name for spec in engines])
                self._loop = None
        if failure is not None:
            raise failure

    async def _start_and_wait(
        self,
        engines: Sequence[ProcessSpec],
        control: ProcessSpec,
        gateway: ProcessSpec,
        model: ModelSource,
    ) -> None:
        for spec in [*engines, control]:
            self._known().start(spec)
        await self._until_ready([spec.name for spec in engines])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONTROL_WAIT_S):
                await self._until_decided(CONTROL)
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

    async def _until_decided(self, name: str) -> None:
        """Wait until a process is up, or will not come up: what works without it is served anyway."""

        def is_decided(statuses: list[ProcessStatus]) -> bool:
            status = next(each for each in statuses if each.name == name)
            return self._stop_asked or status.state in (State.READY, State.FAILED)

        await self._known().until(is_decided)

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
    beside = (GATEWAY, CONTROL)
    engines_left = [each for each in statuses if each.name not in beside and each not in down]
    for status in down:
        if status.name == GATEWAY or not engines_left:
            return status
    return None
