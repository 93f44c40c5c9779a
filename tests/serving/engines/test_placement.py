"""Who gets which cores, memory and GPUs."""

from pathlib import Path

import pytest

from serving.engines.placement import (
    GIB,
    Host,
    physical_cpu_ids,
    split_cpus,
    split_gpus,
    visible_gpu_ids,
)
from serving.errors import ConfigError


def host(num_cpus: int = 2, gib: float = 24, num_gpus: int = 0) -> Host:
    gpu_ids = tuple(str(index) for index in range(num_gpus))
    return Host(tuple(range(num_cpus)), int(gib * GIB), gpu_ids)


@pytest.mark.parametrize(
    ("num_cpus", "num_replicas", "expected"),
    [
        (1, 1, [((), 1)]),
        (2, 1, [((), 1)]),
        (2, 2, [((), 1)] * 2),
        (2, 3, [((), 1)] * 3),
        (3, 1, [((), 2)]),
        (6, 2, [((), 2)] * 2),
        (8, 1, [((), None)]),
        (8, 2, [((0, 1, 2), None), ((4, 5, 6), None)]),
        (9, 2, [((0, 1, 2), None), ((4, 5, 6, 7), None)]),
    ],
)
def test_cores_are_split_in_order(num_cpus, num_replicas, expected):
    """Many cores are bound, each replica's last one free; few are a number of threads."""
    placements = split_cpus(host(num_cpus), num_replicas, 1, 0)
    assert [(placement.cpu_ids, placement.num_threads) for placement in placements] == expected


def test_replicas_that_do_not_fit_into_memory_are_refused():
    """Two replicas of 1 GiB cache and 1 GiB weights need 8 GiB with what vLLM itself takes."""
    assert len(split_cpus(host(gib=8), 2, 1, GIB)) == 2
    with pytest.raises(ConfigError, match=r"need about 8\.0 GiB of memory and 7\.9 are free"):
        split_cpus(host(gib=7.9), 2, 1, GIB)


def test_one_thread_of_each_core_is_used(tmp_path):
    """Of two hardware threads on one core only the first counts."""
    for cpu_id, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu_id}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cpu_ids([0, 1, 2, 3], tmp_path) == (0, 1)
    assert physical_cpu_ids([2, 3], tmp_path) == (2, 3)
    assert physical_cpu_ids([0, 1], Path("/nowhere")) == (0, 1)


def test_gpus_are_split_and_never_shared():
    """Two replicas of two GPUs take four; a fifth stays free; six are too many."""
    placements = split_gpus(host(num_gpus=5), 2, 2, 0.9)
    assert [placement.gpu_ids for placement in placements] == [("0", "1"), ("2", "3")]
    with pytest.raises(ConfigError, match="need 6 and this host shows 5"):
        split_gpus(host(num_gpus=5), 3, 2, 0.9)


@pytest.mark.parametrize(
    ("env", "expected"),
    [({}, ("0", "1")), ({"CUDA_VISIBLE_DEVICES": "1"}, ("1",)), ({"CUDA_VISIBLE_DEVICES": ""}, ())],
)
def test_visible_gpus_are_those_that_the_environment_leaves(tmp_path, env, expected):
    """`CUDA_VISIBLE_DEVICES` narrows what nvidia-smi lists."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 0\necho 1\n")
    smi.chmod(0o755)
    assert visible_gpu_ids({"PATH": f"{tmp_path}:/usr/bin:/bin", **env}) == expected


def test_host_without_nvidia_tools_has_no_gpu(tmp_path):
    """No nvidia-smi, no GPU."""
    assert visible_gpu_ids({"PATH": str(tmp_path)}) == ()
