"""Measured launch parameters, one file per GPU: what `python benchmarks/gpu/tune.py` writes and the launchers look up.

    <cache>/gpu/<GPU>.json, a `LaunchTable`

A key of its entries names the kernel and what its best parameters depend on. What no entry covers gets the parameters
that were reasoned out on paper. The table is read once per process; nothing is measured, written or compiled anew while
a model is served.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from amq.util.files import cache_dir
from amq.util.records import JsonFile, parse_record

DENSE_KEY = "triton dense rows>="
"""Rows of x from which dequantizing and a torch product are faster than the gemm."""

ROWS_CLASSES = (1, 16, 32)
"""Rows of x up to which a Triton launch stays the same; and one for more than the last."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """parameters: of the fastest launch, a number or those of `amq.kernels.triton.Launch`; tried: {launch: times}."""

    parameters: int | list[int]
    microseconds: float | None = None
    tried: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LaunchTable(JsonFile):
    """What was measured on one GPU, with the versions and the date of the last measurement."""

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/gpu-tuning/1",)
    REMEDY: ClassVar[str] = "delete it, and run `python benchmarks/gpu/tune.py` again"

    schema: str = SCHEMAS[0]
    gpu: str
    torch: str = ""
    triton: str = ""
    date: str = ""
    entries: dict[str, Entry]


def table_path(gpu: str) -> Path:
    """Where the table of the GPU with this name lies."""
    return cache_dir() / "gpu" / ("".join(c if c.isalnum() else "-" for c in gpu) + ".json")


def triton_key(rows: int, in_features: int, bits: int) -> str:
    """A Triton launch: one for each class of rows, since each is a kernel that is compiled. What is tuned there does
    not change the order of sums."""
    most = next((most for most in ROWS_CLASSES if rows <= most), None)
    which = f"rows>{ROWS_CLASSES[-1]}" if most is None else f"rows<={most}"
    return f"triton {which} in_features={in_features} bits={bits}"


def look_up(key: str, gpu: str | None = None) -> Any:
    """The parameters measured best on the GPU called `gpu` (None: torch's current one), or None where nothing was
    measured."""
    found = _entries(gpu or current_gpu()).get(key)
    return found and found.parameters


def save(gpu: str, entries: dict[str, dict[str, Any]], versions: dict[str, str]) -> Path:
    """Adds `entries` to the table of `gpu`, replacing those of the same key, and returns its path.

    entries: as `Entry` has them. versions: of torch and triton, and the date.
    """
    path = table_path(gpu)
    _entries.cache_clear()
    new = parse_record(entries, dict[str, Entry], "the new entries")
    LaunchTable(gpu=gpu, entries=_entries(gpu) | new, **versions).write(path)
    _entries.cache_clear()
    return path


def current_gpu() -> str | None:
    """The name of torch's current GPU, None without one. Kinds of GPU may be mixed in a machine."""
    return _gpu_name(torch.cuda.current_device()) if torch.cuda.is_available() else None


@lru_cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache
def _entries(gpu: str | None) -> dict[str, Entry]:
    if gpu is None or not (path := table_path(gpu)).exists():
        return {}
    table = LaunchTable.read(path)
    log.info("launch parameters from %s", path)
    return table.entries
