"""A GGUF file in 32 bits of any GGUF file: what every quantizer of a comparison starts from.

Real models come as files that are quantized already. Dequantized, their weights still lie on the grid of their blocks
of 32, and a type of the same blocks finds that grid again: Q5_0 of a dequantized Q5_0 is exact, at no merit of its own.
So by default the features between two linears are scaled, by random factors within a quarter, and what reads them is
scaled back: the model computes the same, and its weights lie on no grid. Scaled are the norms' outputs (before q, k, v,
gate and up, and before a head that is not tied to the embedding), the values before the output projection, and the
products of the MLP before down. Embeddings, and a head that is tied to them, stay on their grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from amq.errors import AmqError

FACTOR = 1.25
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Whose MLPs have a gate, and whose norms multiply by their weight: what `Scaled` knows."""


def write_source(file: Path, output: Path, on_grid: bool = False, seed: int = 0) -> int:
    """Writes `file` in float32 and returns how many weights it has; on_grid: leave the weights as they are.

    Raises AmqError for a model of whose features nothing is known here, unless on_grid.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    arch = str(reader.fields["general.architecture"].contents())
    tensors = {t.name: t for t in reader.tensors}
    change = (lambda name, values: values) if on_grid else Scaled(reader, arch, set(tensors), seed)
    writer = gguf.GGUFWriter(output, arch)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = entry.types[0]
        inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, entry.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in tensors.items()}
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        writer.write_tensor_data(change(name, values.reshape(shapes[name])))
    writer.close()
    return sum(int(np.prod(shape)) for shape in shapes.values())


class Scaled:
    """(name, values) → the values on no grid; see the head of this file."""

    def __init__(self, reader: Any, arch: str, names: set[str], seed: int) -> None:
        if arch not in ARCHITECTURES:
            raise AmqError(
                f"it is not known here which features of {arch} can be scaled: expected one of "
                f"{', '.join(ARCHITECTURES)}; --on-grid leaves the weights as they are"
            )
        heads, kv_heads = (
            int(reader.fields[f"{arch}.attention.{n}"].contents()) for n in ("head_count", "head_count_kv")
        )
        self._heads, self._group = heads, heads // kv_heads
        self._untied, self._seed = "output.weight" in names, seed
        self._factors: dict[str, np.ndarray] = {}

    def __call__(self, name: str, values: np.ndarray) -> np.ndarray:
        block, _, role = name.rpartition(".")[0].rpartition(".")
        place = "" if name.endswith(".bias") and role != "attn_v" else role
        if place in ("attn_norm", "ffn_norm") or (place == "output_norm" and self._untied):
            return values / self._of(block + place, len(values))
        if norm := {"attn_q": "attn_norm", "attn_k": "attn_norm", "ffn_gate": "ffn_norm"}.get(place):
            return values * self._of(block + norm, values.shape[1])
        if place == "attn_v":
            rows = self._of(block + place, len(values))
            if values.ndim == 1:
                return values * rows
            return rows[:, None] * values * self._of(block + "attn_norm", values.shape[1])
        if place == "attn_output":
            width = values.shape[1] // self._heads
            factors = self._of(block + "attn_v", values.shape[1] // self._group).reshape(-1, 1, width)
            return values / np.broadcast_to(factors, (len(factors), self._group, width)).reshape(-1)
        if place == "ffn_up":
            rows = self._of(block + place, len(values))
            return rows[:, None] * values * self._of(block + "ffn_norm", values.shape[1])
        if place == "ffn_down":
            return values / self._of(block + "ffn_up", values.shape[1])
        if place == "output":
            return values * self._of("output_norm", values.shape[1])
        return values

    def _of(self, features: str, count: int) -> np.ndarray:
        """float32 [count]: the same for everything that has these features."""
        if features not in self._factors:
            random = np.random.Generator(np.random.SFC64([self._seed, *features.encode()]))
            exponents = random.random(count, dtype=np.float32) * np.float32(2) - np.float32(1)
            self._factors[features] = np.float32(FACTOR) ** exponents
        assert len(self._factors[features]) == count
        return self._factors[features]
