"""The machine beneath a measurement: its processor, its read bandwidth, and who else was using it meanwhile."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from amq.util.machine import cpu_name, peak_memory_bytes

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ENVIRONMENT = ("OMP_", "GOMP_", "KMP_", "AMQ_", "GGML_", "MKL_", "LD_PRELOAD")
"""Variables of these names change speeds, ours and peers', and are recorded."""
BUSY = 0.05
"""A measurement during which other processes had more of the cores' time than this is marked."""


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core; None where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = (path.read_text().strip() for path in CACHES.glob("index*/size"))
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)


def describe(device: str) -> dict[str, Any]:
    """Facts about the machine, for JSON."""
    import torch

    from amq.kernels.cpu import cpu_module

    facts: dict[str, Any] = {"processor": cpu_name(), "cores": os.cpu_count(), "isa": cpu_module().isa()}
    facts["last_level_cache_bytes"] = last_level_cache()
    facts["environment"] = {n: v for n, v in sorted(os.environ.items()) if n.startswith(ENVIRONMENT)}
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


class OtherWork:
    """The share of all cores' time that went to other processes since its creation; None where /proc does not say.

    Threads that wait for each other by spinning, as those of most engines do, lose many times that share.
    """

    def __init__(self) -> None:
        self._start, self._others = time.perf_counter(), self._other_seconds()

    @staticmethod
    def _other_seconds() -> float | None:
        try:
            fields = Path("/proc/stat").read_text().split()[1:11]
        except OSError:
            return None
        user, nice, system, _, _, irq, soft, stolen, *_ = map(int, fields)
        return (user + nice + system + irq + soft + stolen) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])

    def share(self) -> float | None:
        now = self._other_seconds()
        if self._others is None or now is None:
            return None
        elapsed = time.perf_counter() - self._start
        share = (now - self._others) / elapsed / (os.cpu_count() or 1)
        return min(1.0, max(0.0, share))  # of a short time /proc/stat, which counts in ticks, can say anything


class Reading:
    """Bytes per second at which a buffer of a given size can be read, with torch's threads; on a GPU, copied.

    name: `memory`, a buffer that no cache holds, or `model`, one of the size of the weights that a token reads.
    """

    def __init__(self, name: str, size: int, device: str) -> None:
        import torch

        from amq.kernels.cpu import empty_bytes

        self.name, self.size = name, size
        self.samples: list[float] = []
        self._device = device
        if device == "cpu":
            self._buffer = empty_bytes(size).fill_(1)  # on large pages, as weights are; written, so that they exist
        else:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self._copy = torch.empty_like(self._buffer)

    def sample(self, readings: int = 3) -> None:
        """Adds readings, after one more that brings in what the cache can hold."""
        for i in range(readings + 1):
            speed = self._speed()
            if i:
                self.samples.append(speed)

    def _speed(self) -> float:
        import torch

        from amq.kernels.cpu import read_seconds

        if self._device == "cpu":
            return self.size / read_seconds(self._buffer)
        start = time.perf_counter()
        self._copy.copy_(self._buffer)
        torch.cuda.synchronize(self._device)
        return 2 * self.size / (time.perf_counter() - start)


def buffer_bytes() -> int:
    """Twice the last-level cache, or 256 MiB where the system does not say; at most a quarter of the free memory."""
    from amq.util.limits import free_memory

    return min(2 * (last_level_cache() or 128 << 20), free_memory() // 4)


def memory() -> dict[str, int]:
    """Bytes of this process's memory, now and at most.

    Linux's own high-water mark where there is one: that of getrusage starts from the parent's.
    """
    import psutil

    status = Path("/proc/self/status")
    marks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")] if status.exists() else []
    peak = int(marks[0].split()[1]) * 1024 if marks else peak_memory_bytes()
    now = psutil.Process().memory_info().rss
    return {"resident_memory_bytes": now, "peak_memory_bytes": max(peak, now)}  # the mark is updated with a delay
