"""Which files hold a model folder's weights, and what their headers say, before anything of that size is allocated.

transformers reads `model.safetensors`, without it the files that the index names, and no other: an adapter, a second
copy in one file (`consolidated.safetensors`) or half a download beside them is not the model. Everything that counts,
checks or reads weights asks here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.util.records import MOST, parse_record, read_record, shorten

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER = 100_000_000
"""Bytes; the safetensors library's own limit."""
LENGTH_BYTES = 8
LAYERS = re.compile(r"(num_.*layers|n_layers?|num_blocks|depth)")
"""Names in a config of counts that a model is built by, one object after the other."""
FEW_LAYERS = 256
"""So many cost nothing, and a part of the model that the files lack (an image encoder) may have them by default."""
EXPERTS = re.compile(r".*num.*experts|n_routed_experts|moe_num_experts")
MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class WeightIndex:
    """weight_map: {tensor: file}."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class HeaderEntry:
    """What a safetensors header says of one tensor. data_offsets: begin and end behind the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]

    def __post_init__(self) -> None:
        if any(not 0 <= size <= MOST for size in self.shape):
            raise ValueError(f"expected sizes up to {MOST}, got {shorten(self.shape)}")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights; raises AmqError naming one that is missing, or an index that is no index."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise AmqError(f"{folder} has no weights: expected {SINGLE}, or {INDEX} and its files{_hint(folder)}")
    paths = [folder / name for name in indexed(folder)]
    for path in paths:
        try:
            there = path.is_file()
        except OSError as error:  # a name that no file system takes
            named = f"{folder / INDEX} names {shorten(path.name)}"
            raise AmqError(f"{named}, which cannot be looked up: {error.strerror}; it was edited") from error
        if not there:
            raise AmqError(f"{path} is missing: the checkpoint is incomplete")
    return paths


def indexed(folder: Path) -> list[str]:
    """The names of files that a folder's index gives; raises AmqError for one that leaves the folder."""
    names = sorted(set(read_record(folder / INDEX, WeightIndex).weight_map.values()))
    for name in names:
        if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
            raise AmqError(f"{folder / INDEX} names {shorten(name)}, no file of this folder: it was edited")
    if not names:
        raise AmqError(f"{folder / INDEX} names no files: it is damaged")
    return names


def _hint(folder: Path) -> str:
    others = [p.name for pattern in ("*.bin", "*.pt") for p in sorted(folder.glob(pattern))]
    if others:
        return f" ({others[0]} is a pickle; save it again with save_pretrained)"
    others = [p.name for p in sorted(folder.glob("*.safetensors"))]
    if "adapter_model.safetensors" in others:
        return " (it holds an adapter: merge it into its base model, and save that with save_pretrained)"
    return f" ({others[0]} is not named by an index)" if others else ""


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """{tensor: entry} of a safetensors file. Raises AmqError for a header that its file cannot hold."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if not 2 <= length <= min(size - LENGTH_BYTES, MOST_HEADER):
                raise _unreadable(path, f"its header takes {length} of {size} bytes")
            header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        if isinstance(error, AmqError):
            raise
        raise _unreadable(path, str(error)) from None
    except OSError as error:
        raise AmqError(f"{path} cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise _unreadable(path, "its header is no object")
    header.pop("__metadata__", None)
    try:
        entries = parse_record(header, dict[str, HeaderEntry], str(path))
    except AmqError as error:
        raise _unreadable(path, str(error).removeprefix(str(path)).strip()) from None
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= size - LENGTH_BYTES - length:
            raise _unreadable(path, f"tensor {name} lies beyond its end; it is cut short")
    return entries


def _unreadable(path: Path, why: str) -> AmqError:
    return AmqError(f"{path} is not a readable safetensors file ({why}): download or save it again")


def check_config(config: Any, n_tensors: int, source: str) -> None:
    """Refuses counts that a model would be built by for hours: more layers than the files have tensors.

    config: what config.json holds, and what lies in it. Sizes of single weights need no bound: a model is built
    without memory and its weights are compared with those of the files. Raises AmqError naming the key.
    """
    if not isinstance(config, dict):
        raise AmqError(f"{source}: expected an object, got {shorten(config)}")
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_config(value, n_tensors, source)
        for pattern, most, what in (
            (LAYERS, max(n_tensors, FEW_LAYERS), f"the files' {n_tensors} tensors"),
            (EXPERTS, MOST_EXPERTS, f"the {MOST_EXPERTS} that amq knows"),
        ):
            if pattern.fullmatch(name) and isinstance(value, int) and value > most:
                raise AmqError(f"{source}: {name} is {shorten(value)}, more than {what}: it is damaged or was edited")
