"""CPU time that processes have used, by the kernel's own accounts.

Reads the CPU clock of each process of a tree (all threads, ended ones too, in nanoseconds). Never
samples and never touches the processes. Called by the load generator at the edges of a window.
"""

from __future__ import annotations

import time

import psutil

_CPUCLOCK_SCHED = 2


def process_tree(root_pid: int) -> list[int]:
    """Ids of a process and everything it started that is alive."""
    root = psutil.Process(root_pid)
    return [root_pid, *(child.pid for child in root.children(recursive=True))]


def cpu_s(pids: list[int]) -> float:
    """CPU seconds, user and system, that the processes have used since they began.

    Args:
        pids: Processes that must be alive.

    Raises:
        OSError: If one of them is gone.
    """
    # The clock id of another process, as clock_getcpuclockid(3) makes it.
    return sum(time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED) for pid in pids)


def machine_busy_s() -> float:
    """Seconds that all cores together have not been idle (10 ms steps).

    Includes time that a hypervisor has given to other machines.
    """
    times = psutil.cpu_times()
    used_s = times.user + times.nice + times.system + times.irq + times.softirq
    return float(used_s + times.steal)
