"""Notices a pass of the engine that does not end.

It looks at the number of the pass that runs, a few times while one may last. Only time in which it looks counts: after
a process was stopped (a paused container, a laptop's lid) nothing is taken for a hang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LOOKS = 8
"""Per time limit."""

LONGEST_LOOK = 1.0
"""Seconds between two looks, at most."""


class Watchdog:
    """current: the number of the running pass, 0 while none runs. limit: seconds that a pass may take.
    bite: called once, on the event loop, with what is wrong."""

    def __init__(self, current: Callable[[], int], limit: float, bite: Callable[[str], None]) -> None:
        self._current, self._limit, self._bite = current, limit, bite
        self._period = min(limit / LOOKS, LONGEST_LOOK)
        self._number, self._seen, self._looked = 0, 0.0, 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._looked = time.perf_counter()
        self._timer = asyncio.get_running_loop().call_later(self._period, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        now, number = time.perf_counter(), self._current()
        if number and number == self._number:
            self._seen += min(now - self._looked, 2 * self._period)
        else:
            self._number, self._seen = number, 0.0
        if self._seen >= self._limit:
            self._bite(f"a pass of the engine has not ended within {self._limit:g} s")
            return
        self._looked = now
        self._timer = asyncio.get_running_loop().call_later(self._period, self._look)
