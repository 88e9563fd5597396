"""Safetensors files whose bytes depend on their content alone, and that hold a hash of every tensor.

safetensors' own writer puts a header's metadata in an order that changes from process to process, so two equal runs
gave different files. `save_file` is called like its namesake in `safetensors.torch` and brings the header's metadata
into the order of its keys afterwards; `save_tensors` also writes the file whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from amq.errors import AmqError
from amq.util.files import is_out_of_memory, write_atomic
from amq.util.records import parse_record

HASHES = "amq_hashes"
"""Key of a safetensors header: JSON {tensor name: hash}."""
METADATA = "__metadata__"
LENGTH_BYTES = 8
"""A file opens with the length of its JSON header, little-endian; the header ends in spaces up to a multiple of 8."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `tensors` (contiguous, on the CPU) to `path`, whole or not at all: equal content gives equal bytes.

    metadata: texts of the file's header. Raises AmqError naming `path` where it cannot be written.
    """
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """`safetensors.torch.save_file` with equal bytes for equal content; not atomic, for a folder that is."""
    from safetensors.torch import save_file as save

    save(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    if metadata is not None and len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Rewrites the header in place, its metadata sorted; everything else stays where it is."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header[METADATA] = dict(sorted(header[METADATA].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise AmqError(f"{path}: the sorted header takes {len(text)} bytes where {length} are: report this")
        file.seek(LENGTH_BYTES)
        file.write(text.ljust(length))


def open_file(path: Path) -> Any:
    """A safetensors file, mapped; a truncated one is an error that names it."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors has an exception type of its own, and OSError
        if is_out_of_memory(error):
            raise AmqError(
                f"there is no memory to map {path} ({error}): close other programs, raise the limit that this process "
                "runs under, or use a larger machine"
            ) from error
        raise AmqError(f"{path} cannot be read ({error}): it is damaged or cut short; copy it again") from error


def open_files(paths: Iterable[Path]) -> dict[str, Any]:
    """{tensor name: open file that holds it}."""
    return {name: file for file in map(open_file, paths) for name in file.keys()}


def tensor_hash(tensor: Tensor) -> str:
    """BLAKE2b of a tensor's dtype, shape and bytes, 16 bytes as hex; see docs/format.md."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hashes_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Header entries for a file of `tensors`."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashlib releases the GIL
        hashes = dict(zip(tensors, pool.map(tensor_hash, tensors.values()), strict=True))
    return {"format": "pt", HASHES: json.dumps(hashes)}


def stored_hashes(file: Any, path: Path) -> dict[str, str]:
    """{tensor: hash} as the header of the open `file` gives them; raises AmqError naming `path` where it does not."""
    try:
        stored = json.loads((file.metadata() or {})[HASHES])
    except (KeyError, ValueError, RecursionError):
        raise AmqError(f"{path} has no hashes of its tensors: it was not written by amq, or was altered") from None
    return parse_record(stored, dict[str, str], f"{path}: {HASHES}")


def verify_file(path: Path, whole: bool = False) -> Any:
    """The open file; raises AmqError unless every tensor in it has the hash that its header gives.

    whole: and unless every tensor that has a hash is there, which the shards that transformers saves are not asked: all
        of them have the hashes of all.
    """
    file = open_file(path)
    expected = stored_hashes(file, path)
    found = json.loads(hashes_metadata({n: file.get_tensor(n) for n in file.keys()})[HASHES])
    for name in found.keys() | (expected.keys() if whole else set()):
        if expected.get(name) != found.get(name):
            raise AmqError(f"{path}: tensor {name} is not what was written (its hash differs); copy the file again")
    return file
