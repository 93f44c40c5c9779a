"""How each process of a local platform is started, and when it counts as ready.

Owns: commands, readiness and deadlines of engines, control plane and gateway. Never: starts them, or
decides in which order. Called by: `serving/fleet/local_platform.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from serving.engines import dialect_of
from serving.engines.launch import EngineOptions, LaunchCommand, vllm_command
from serving.engines.launch_gpu import sglang_command, tensorrt_llm_command, tensorrt_llm_config
from serving.fleet.ports import LOOPBACK
from serving.fleet.process import ProcessSpec
from serving.fleet.processes import write_atomically
from serving.fleet.readiness import EngineReady, PathReady

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from serving.config import EngineKind
    from serving.engines.launch import CpuPlacement, GpuPlacement
    from serving.fleet.model_source import ModelSource
    from serving.fleet.up_config import UpConfig

GATEWAY = "gateway"
CONTROL = "control"
GATEWAY_START_DEADLINE_S = 60.0
# The gateway drains for 30 s (`Timeouts.drain_s`) and then ends by itself.
GATEWAY_GRACE_S = 35.0
# vLLM ends by itself after its own `--shutdown-timeout`; on busy cores that takes a while.
ENGINE_GRACE_MARGIN_S = 15.0
CONTROL_START_DEADLINE_S = 60.0
CONTROL_GRACE_S = 15.0


@dataclass(frozen=True)
class PlatformSpecs:
    """Builds the specs of one platform.

    Attributes:
        config: What to start.
        env: Environment of the processes.
        token: Shared by the gateway and the control plane, and by nobody else.
        control_port: Of the control plane, on loopback.
    """

    config: UpConfig
    env: Mapping[str, str]
    token: str
    control_port: int

    def engine(
        self, index: int, port: int, placement: CpuPlacement | GpuPlacement, model: ModelSource
    ) -> ProcessSpec:
        """Return the spec of one replica."""
        config = self.config
        options = EngineOptions(
            model=model.location,
            served_name=model.served_name,
            placement=placement,
            port=port,
            is_local=model.is_local,
            max_model_len_tokens=config.max_model_len_tokens,
            tool_call_parser=config.tool_call_parser or model.tool_call_parser,
            max_loras=config.max_loras,
            max_cpu_loras=config.max_cpu_loras,
            max_lora_rank=config.max_lora_rank,
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
        if self.config.engine == "sglang":
            return sglang_command(options, self.env)
        if self.config.engine == "tensorrt-llm":
            path = self.config.state_dir / "engines" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, tensorrt_llm_config(options))
            return tensorrt_llm_command(options, self.env, str(path))
        return vllm_command(options, self.env)

    def control(self, ports: Sequence[int], model: ModelSource) -> ProcessSpec:
        """Return the spec of the control plane.

        Args:
            ports: Of the replicas.
            model: The base model, for the linter.
        """
        config = self.config
        argv = [sys.executable, "-m", "serving.cli.main", "control"]
        argv += ["--listen", f"{LOOPBACK}:{self.control_port}", "--gateway", self._gateway_url()]
        for port in ports:
            argv += ["--replica", f"{config.engine}=http://{LOOPBACK}:{port}"]
        argv += ["--max-loras", str(config.max_loras), "--max-cpu-loras", str(config.max_cpu_loras)]
        argv += ["--max-lora-rank", str(config.max_lora_rank)]
        if model.is_local:
            argv += ["--base-model", f"{model.served_name}={model.location}"]
        if config.database_url is not None:
            argv += ["--database-url", config.database_url]
        if config.adapter_store is not None:
            argv += ["--store", config.adapter_store]
        return ProcessSpec(
            name=CONTROL,
            command=LaunchCommand(argv=tuple(argv), env=self._env_with_token()),
            readiness=PathReady(LOOPBACK, self.control_port, "/healthz"),
            log=self._log(CONTROL),
            start_deadline_s=CONTROL_START_DEADLINE_S,
            grace_s=CONTROL_GRACE_S,
        )

    def gateway(self, ports: Sequence[int]) -> ProcessSpec:
        """Return the spec of the gateway over replicas on some ports."""
        config = self.config
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
        env = {
            **self._env_with_token(),
            "HEADRACE_CONTROL_URL": f"http://{LOOPBACK}:{self.control_port}",
            "HEADRACE_STATE_DIR": str(config.state_dir),
        }
        host = config.reachable_host()
        return ProcessSpec(
            name=GATEWAY,
            command=LaunchCommand(argv=tuple(argv), env=env),
            readiness=PathReady(host, config.listen.port, "/healthz", config.is_tls),
            log=self._log(GATEWAY),
            start_deadline_s=GATEWAY_START_DEADLINE_S,
            grace_s=GATEWAY_GRACE_S,
        )

    def _gateway_url(self) -> str:
        host = self.config.reachable_host()
        scheme = "https" if self.config.is_tls else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.config.listen.port}"

    def _env_with_token(self) -> dict[str, str]:
        # By environment, not by flag: command lines can be read by everybody on the machine.
        return {
            **self.env,
            "HEADRACE_CONTROL_TOKEN": self.token,
            "HEADRACE_STATE_DIR": str(self.config.state_dir),
        }

    def _log(self, name: str) -> Path:
        return self.config.state_dir / "logs" / f"{name}.log"
