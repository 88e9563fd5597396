"""How much memory and how many processors this process may use: the machine's, or its container's where that is less.

A container's limits are files of its control group, of version 1 or 2, which psutil and torch do not look at: both see
the machine, and a process that takes more is killed without a word. Groups lie in each other, and the tightest of those
above a process holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from amq.errors import AmqError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNLIMITED = 2**60
"""Version 1 writes a number near 2^63 where there is no limit."""


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that this process can still take.

    proc, cgroups: where the system shows processes and control groups; tests have their own.
    """
    import psutil

    return min([psutil.virtual_memory().available, *_rooms(proc, cgroups)])


def total_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes that this process could take if nothing else ran."""
    import psutil

    limits = (limit for folder, version in _groups("memory", proc, cgroups) if (limit := _limit(folder, version)))
    return min([psutil.virtual_memory().total, *limits])


def processors(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Processors that this process may keep busy: those it may run on, at most its share of time rounded up."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (quota for folder, version in _groups("cpu", proc, cgroups) if (quota := _quota(folder, version)))
    return max(1, min([own, *(math.ceil(quota) for quota in quotas)]))


def fit_threads() -> int:
    """Lowers torch's number of threads to `processors`; returns it. OMP_NUM_THREADS is the user's own choice."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (most := processors()):
        torch.set_num_threads(most)
    return torch.get_num_threads()


def fits(needed: int, device: str = "cpu") -> bool:
    """Whether so many bytes are free on `device`."""
    return needed <= free_on(device)


def free_on(device: str) -> int:
    """Bytes that this process can still take on `device`; of a GPU with what torch holds there and does not use."""
    if torch.device(device).type != "cuda":
        return free_memory()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_memory(needed: int, what: str, device: str = "cpu") -> None:
    """Raises AmqError when `needed` bytes are more than what is free on `device`."""
    if needed > (free := free_on(device)):
        raise AmqError(
            f"not enough memory for {what}: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free on {device}; "
            "close other programs, use --dtype bfloat16, or use a larger machine"
        )


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of this process's control group and of all above it, as far as they can be seen here.

    Inside a container the path that /proc gives is often the host's, and the container's own group is the root.
    """
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            root, version = cgroups, 2
            if (cgroups / "unified").is_dir():
                root = cgroups / "unified"
        elif controller in names.split(","):
            version = 1
            root = next((p for p in (cgroups / names, cgroups / controller) if p.is_dir()), cgroups / controller)
        else:
            continue
        folder = root / path.lstrip("/")
        if ".." in folder.parts or not folder.is_dir():
            folder = root
        while True:
            yield folder, version
            if folder == root:
                break
            folder = folder.parent


def _rooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """Bytes left in each group that has a limit; pages of files that the kernel would give up are not counted."""
    for folder, version in _groups("memory", proc, cgroups):
        used = _number(_read(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")))
        limit = _limit(folder, version)
        if limit is None or used is None:
            continue
        name = "inactive_file" if version == 2 else "total_inactive_file"
        lines = (_read(folder / "memory.stat") or "").splitlines()
        cached = next((_number(line.split()[1]) or 0 for line in lines if line.split()[:1] == [name]), 0)
        yield max(0, limit - max(0, used - cached))


def _limit(folder: Path, version: int) -> int | None:
    files = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limits = [value for name in files if (value := _number(_read(folder / name))) is not None and value < UNLIMITED]
    return min(limits, default=None)


def _quota(folder: Path, version: int) -> float | None:
    """Processors' worth of time."""
    if version == 2:
        texts = (_read(folder / "cpu.max") or "").split()
    else:
        texts = [_read(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
    quota, period = (_number(text) for text in texts) if len(texts) == 2 else (None, None)
    return quota / period if quota and period and quota > 0 else None  # −1 and max: no limit


def _read(path: Path) -> str | None:
    """None where a file is not there or not for us: the limit is not known then."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:  # max
        return None
