"""Safetensors files whose bytes depend on their content alone.

safetensors' own writer puts a header's metadata in an order that changes from process to process, so two equal runs
gave different files. `save_file` is called like its namesake in `safetensors.torch` and brings the header's metadata
into the order of its keys afterwards; `save_tensors` also writes the file whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from amq.errors import AmqError
from amq.files import write_atomic

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
