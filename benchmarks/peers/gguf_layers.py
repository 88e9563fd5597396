"""A GGUF file of many layers made of one of few: their tensors again and again, each a copy of its own.

Random weights are as good in every layer, and the export of a few layers takes minutes less than that of all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from amq.errors import AmqError

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
SECTIONS = "rope.dimension_sections"
"""Always four numbers, not one per layer."""


def repeat_layers(source: Path, output: Path, layers: int) -> None:
    """Writes `source` with `layers` layers, a multiple of its own number."""
    import gguf

    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    counted = f"{arch}.block_count"
    own = int(reader.fields[counted].contents())
    if layers % own:
        raise AmqError(f"{source} has {own} layers: expected a multiple of them, got {layers}")
    writer = gguf.GGUFWriter(output, arch)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, kind = entry.contents(), entry.types[0]
        inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if name == counted:
            value = layers
        elif inner and name.startswith(f"{arch}.") and not name.endswith(SECTIONS) and len(value) == own:
            value = value * (layers // own)
        writer.add_key_value(name, value, kind, inner)
    for name, tensor in _repeated(reader, layers // own, own):
        writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _repeated(reader: Any, times: int, own: int) -> list[tuple[str, Any]]:
    """(name, tensor of the source) of the file to be written."""
    found = []
    for tensor in reader.tensors:
        block = BLOCK.fullmatch(tensor.name)
        if block is None:
            found.append((tensor.name, tensor))
        else:
            first, rest = int(block[1]), block[2]
            found += [(f"blk.{first + i * own}.{rest}", tensor) for i in range(times)]
    return found
