"""Safetensors files written tensor by tensor, with one tensor in memory, for weights that are made one after another.

safetensors' own writer wants all of a file's tensors at once. A header needs their names, shapes and hashes, of which
the hashes are known last: they have a fixed length, so that the header is written first without and then with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from amq.util.files import write_json

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NO_HASH = "0" * 32


def write_stream(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    hash_key: str,
    hash_of: Callable[[Tensor], str],
    dtype: torch.dtype = torch.float32,
    shard_size: int = 4 << 30,
) -> None:
    """Writes model.safetensors, or shards and their index.

    shapes: of every tensor, in the order of the files. make(name): that tensor, contiguous, of `dtype`.
    hash_key, hash_of: the key of a header, and what its JSON text says of each tensor, 32 letters.
    """
    files = list(_shards(shapes, dtype.itemsize, shard_size))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        several = f"-{i + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = f"model{several}.safetensors"
        _write_file(folder / file, {name: shapes[name] for name in names}, make, hash_key, hash_of, dtype)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, shard_size: int) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        n_bytes = itemsize * math.prod(shape)
        if names and size + n_bytes > shard_size:
            yield names
            names, size = [], 0
        names.append(name)
        size += n_bytes
    yield names


def _write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    hash_key: str,
    hash_of: Callable[[Tensor], str],
    dtype: torch.dtype,
) -> None:
    hashes = dict.fromkeys(shapes, NO_HASH)
    with open(path, "wb") as file:
        header = _header(shapes, hashes, hash_key, dtype)
        file.write(header)
        for name, shape in shapes.items():
            tensor = make(name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            hashes[name] = hash_of(tensor)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor
        file.seek(0)
        file.write(_header(shapes, hashes, hash_key, dtype))


def _header(
    shapes: Mapping[str, tuple[int, ...]], hashes: Mapping[str, str], hash_key: str, dtype: torch.dtype
) -> bytes:
    header: dict[str, object] = {"__metadata__": {hash_key: json.dumps(hashes), "format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
