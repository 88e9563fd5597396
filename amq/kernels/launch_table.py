"""Measured launch parameters, one file per GPU: what `python benchmarks/gpu/tune.py` writes and the launchers look up.

    <cache>/gpu/<GPU>.json = {"schema": "amq/gpu-tuning/1", "gpu", "torch", "triton", "date",
                              "entries": {key: {"parameters": …, "microseconds": …, "tried": …}}}

A key names the kernel and what its best parameters depend on. What no entry covers gets the parameters that were
reasoned out on paper. The table is read once per process; nothing is measured, written or compiled anew while a model
is served.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from amq.errors import AmqError
from amq.util.files import cache_dir, read_json, write_json

SCHEMA = "amq/gpu-tuning/1"

DENSE_KEY = "triton dense rows>="
"""Rows of x from which dequantizing and a torch product are faster than the gemm."""

log = logging.getLogger(__name__)


def table_path(gpu: str) -> Path:
    """Where the table of the GPU with this name lies."""
    return cache_dir() / "gpu" / ("".join(c if c.isalnum() else "-" for c in gpu) + ".json")


def cuda_key(in_features: int) -> str:
    """The CUDA gemv's warps per block. Of in_features alone, so that fused and separate launches sum in one order."""
    return f"cuda in_features={in_features}"


def triton_key(rows: int, in_features: int, bits: int) -> str:
    """A Triton launch; rows in powers of two. What is tuned there does not change the order of sums."""
    return f"triton rows<={1 << (rows - 1).bit_length()} in_features={in_features} bits={bits}"


def look_up(key: str) -> Any:
    """The parameters measured best on torch's current GPU, or None where nothing was measured."""
    return _entries(_gpu()).get(key, {}).get("parameters")


def save(gpu: str, entries: dict[str, dict], versions: dict[str, str]) -> Path:
    """Adds `entries` to the table of `gpu`, replacing those of the same key, and returns its path."""
    path = table_path(gpu)
    _entries.cache_clear()
    old = _entries(gpu)
    write_json(path, {"schema": SCHEMA, "gpu": gpu, **versions, "entries": old | entries})
    _entries.cache_clear()
    return path


@lru_cache(maxsize=1)
def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@lru_cache
def _entries(gpu: str | None) -> dict[str, dict]:
    if gpu is None or not (path := table_path(gpu)).exists():
        return {}
    table = read_json(path)
    if not isinstance(table, dict) or table.get("schema") != SCHEMA or not isinstance(table.get("entries"), dict):
        raise AmqError(
            f"{path} is not a table of schema {SCHEMA}: delete it, and run `python benchmarks/gpu/tune.py` again"
        )
    log.info("launch parameters from %s", path)
    return table["entries"]
