"""Calls at exact times on an event loop, finer than the loop's own timers.

uvloop rounds `call_at` to whole milliseconds, which is the size of what the benchmarks measure.
A `Schedule` holds a heap of calls and one Linux timerfd. It never measures anything. The simulated
engine paces its events with it, the load generator its arrivals.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_FLAGS = 0o2004000  # TFD_CLOEXEC | TFD_NONBLOCK
_TFD_TIMER_ABSTIME = 1
_NS_PER_S = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


class Schedule:
    """Runs calls at times of `time.monotonic()`, each late by a wake-up only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._armed_s = float("inf")
        # `struct itimerspec` of a 64-bit machine: interval and value, each in s and ns.
        self._spec = (ctypes.c_long * 4)()
        self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed: the benchmarks need Linux")
        loop.add_reader(self._fd, self._on_alarm)

    def at(self, when_s: float, call: Callable[[], None]) -> None:
        """Runs `call` once, at `when_s` seconds of the monotonic clock or as soon as possible.

        Args:
            when_s: Time by `time.monotonic()`, in seconds.
            call: What to run on the loop; must not raise.
        """
        heapq.heappush(self._calls, (when_s, next(self._order), call))
        if when_s < self._armed_s:
            self._arm(when_s)

    def close(self) -> None:
        """Drops all calls and releases the timer."""
        self._calls.clear()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _arm(self, when_s: float) -> None:
        self._armed_s = when_s
        # A value of zero would disarm the timer.
        when_ns = max(1, int(when_s * _NS_PER_S))
        self._spec[2], self._spec[3] = divmod(when_ns, _NS_PER_S)
        _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, self._spec, None)

    def _on_alarm(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            # Re-armed to a later time between the alarm and this call.
            return
        self._armed_s = float("inf")
        calls = self._calls
        while calls and calls[0][0] <= time.monotonic():
            heapq.heappop(calls)[2]()
        if calls and calls[0][0] < self._armed_s:
            self._arm(calls[0][0])
