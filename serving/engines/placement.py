"""Splits a host's cores, memory or GPUs between the replicas that start on it.

Owns: who gets what, as pure functions of what the host has, and `Host`, which looks that up.
Never: starts anything. Called by: `serving/fleet/local_platform.py` and `serving/fleet/doctor.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from serving.engines.launch import CpuPlacement, GpuPlacement
from serving.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GIB = 1 << 30
# Beside its KV cache a vLLM process takes this and its weights (measured: 1.9 GiB with SmolLM2).
ENGINE_OVERHEAD_BYTES = 2 * GIB
BIND_FROM_CORES = 4
TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Host:
    """What a host can give to engines."""

    cpu_ids: tuple[int, ...]
    """One logical CPU a physical core, of those that this process may use."""
    available_bytes: int
    gpu_ids: tuple[str, ...]


def look_at_host(env: Mapping[str, str]) -> Host:
    """Look up the cores, free memory and GPUs of this host.

    Args:
        env: the environment; `CUDA_VISIBLE_DEVICES` narrows the GPUs.
    """
    return Host(
        cpu_ids=physical_cpu_ids(sorted(os.sched_getaffinity(0))),
        available_bytes=psutil.virtual_memory().available,
        gpu_ids=visible_gpu_ids(env),
    )


def physical_cpu_ids(logical_ids: Sequence[int], topology: Path = TOPOLOGY) -> tuple[int, ...]:
    """Return one logical CPU for each physical core: two threads of a core slow OpenMP down."""
    first_of_core: dict[str, int] = {}
    for cpu_id in logical_ids:
        path = topology / f"cpu{cpu_id}" / "topology" / "thread_siblings_list"
        core = path.read_text().strip() if path.exists() else str(cpu_id)
        first_of_core.setdefault(core, cpu_id)
    return tuple(first_of_core.values())


def visible_gpu_ids(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return the NVIDIA GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    nvidia_smi = shutil.which("nvidia-smi", path=env.get("PATH"))
    if nvidia_smi is None:
        return ()
    try:
        argv = [nvidia_smi, "--query-gpu=index", "--format=csv,noheader"]
        listing = subprocess.run(  # noqa: S603 - fixed argv
            argv, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    present = listing.stdout.split() if listing.returncode == 0 else []
    if present and "CUDA_VISIBLE_DEVICES" in env:
        return tuple(
            part.strip() for part in env["CUDA_VISIBLE_DEVICES"].split(",") if part.strip()
        )
    return tuple(present)


def split_cpus(
    host: Host, num_replicas: int, kv_cache_gib: int, weights_bytes: int
) -> list[CpuPlacement]:
    """Give each replica its own cores, in order, less one that is for its scheduler.

    Few cores are given as a number of threads only: bound to one core, a replica starves beside
    anything else that runs there, while the kernel would have moved it (measured on two cores: 157
    instead of 46 seconds to start). One replica alone on many cores is left to vLLM.

    Args:
        host: what there is.
        num_replicas: how many engines start.
        kv_cache_gib: KV cache of each, in GiB.
        weights_bytes: size of the model's weights.

    Raises:
        ConfigError: if they do not fit into the free memory.
    """
    needed_bytes = num_replicas * (kv_cache_gib * GIB + weights_bytes + ENGINE_OVERHEAD_BYTES)
    if needed_bytes > host.available_bytes:
        msg = (
            f"{num_replicas} replica(s) need about {needed_bytes / GIB:.1f} GiB of memory and"
            f" {host.available_bytes / GIB:.1f} are free: give fewer --replicas, a smaller"
            " --kv-cache-gib, or a smaller model"
        )
        raise ConfigError(msg)
    if num_replicas == 1 and len(host.cpu_ids) >= BIND_FROM_CORES:
        return [CpuPlacement(kv_cache_gib=kv_cache_gib)]
    return [
        _place(_share(host.cpu_ids, index, num_replicas), kv_cache_gib)
        for index in range(num_replicas)
    ]


def _place(cpu_ids: Sequence[int], kv_cache_gib: int) -> CpuPlacement:
    if len(cpu_ids) < BIND_FROM_CORES:
        return CpuPlacement(num_threads=max(1, len(cpu_ids) - 1), kv_cache_gib=kv_cache_gib)
    return CpuPlacement(cpu_ids=tuple(cpu_ids[:-1]), kv_cache_gib=kv_cache_gib)


def _share(cpu_ids: Sequence[int], index: int, num_replicas: int) -> tuple[int, ...]:
    start = index * len(cpu_ids) // num_replicas
    end = (index + 1) * len(cpu_ids) // num_replicas
    return tuple(cpu_ids[start:end])


def split_gpus(
    host: Host, num_replicas: int, gpus_per_replica: int, memory_utilization: float
) -> list[GpuPlacement]:
    """Give each replica GPUs of its own.

    Raises:
        ConfigError: if there are not enough of them.
    """
    needed = num_replicas * gpus_per_replica
    if needed > len(host.gpu_ids):
        msg = (
            f"{num_replicas} replica(s) of {gpus_per_replica} GPU(s) need {needed} and this host"
            f" shows {len(host.gpu_ids)}: give fewer --replicas or --gpus-per-replica"
        )
        raise ConfigError(msg)
    return [
        GpuPlacement(
            gpu_ids=host.gpu_ids[index * gpus_per_replica : (index + 1) * gpus_per_replica],
            memory_utilization=memory_utilization,
        )
        for index in range(num_replicas)
    ]
