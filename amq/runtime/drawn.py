"""A checkpoint of drawn weights: what an engine is timed with where the real ones do not matter, or are not there yet.

How long a pass takes depends on shapes and formats, not on what the weights are. `Drawn` answers as a `Checkpoint` of
the model of a config.json would, with formats of the caller's choice, and makes each weight when it is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.record import QuantizationRecord
from amq.errors import AmqError
from amq.formats import BitFormat, get_format, n_groups, quantized_formats
from amq.packing import PackedWeight
from amq.runtime.decoder_spec import Array, DecoderSpec, Linear, Table
from amq.runtime.families import read_spec

SPREAD = 0.02
"""Standard deviation of drawn numbers, about that of trained models': nothing overflows in hundreds of layers."""


class Drawn:
    """A `weights.Source` of the model of `config`, the parsed config.json of the file `source`.

    names: of the model's tensors, of whatever checkpoint. formats: {linear, head or embedding: its format}; others are
    in 16 bits, and a table that is not named has the head's. Raises `Unsupported` where our engine lacks the family.
    """

    def __init__(
        self, config: Mapping[str, Any], source: str, names: Collection[str], formats: Mapping[str, str],
        group_size: int,
    ) -> None:  # fmt: skip
        self.folder, self.config = Path(source).parent, dict(config)
        self.spec: DecoderSpec = read_spec(config, source, names)
        shapes = self._weights
        if strange := sorted(formats.keys() - shapes.keys()):
            raise AmqError(f"{source} is of a model without {strange[0]}, which is to have {formats[strange[0]]}")
        given = quantized_formats(formats)
        self.record = QuantizationRecord(given, {name: shapes[name] for name in given}, group_size)
        self._made: dict[tuple[str, int, int], PackedWeight] = {}

    @cached_property
    def _weights(self) -> dict[str, tuple[int, int]]:
        """Shapes of all that may have a format; those of routers among them."""
        linears = {one.name: (one.out_features, one.in_features) for one in self.spec.parts(Linear)}
        return linears | {one.name: (one.rows, one.columns) for one in self.spec.parts(Table)}

    @cached_property
    def _others(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{tensor that is not packed: (dtype as safetensors spells it, shape)}."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            array.name: ("F32", array.shape) for array in self.spec.parts(Array) if array.name
        }
        found |= {f"{one.name}.bias": ("F32", (one.out_features,)) for one in self.spec.parts(Linear) if one.bias}
        kept = {name: shape for name, shape in self._weights.items() if name not in self.record.formats}
        return found | {f"{name}.weight": ("BF16", shape) for name, shape in kept.items()}

    @property
    def other_names(self) -> list[str]:
        return list(self._others)

    def described(self, name: str) -> tuple[str, list[int]]:
        dtype, shape = self._others[name]
        return dtype, list(shape)

    def tensor(self, name: str) -> Tensor:
        dtype, shape = self._others[name]
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * SPREAD
        return drawn if dtype == "F32" else drawn.bfloat16()

    def packed(self, linear: str) -> PackedWeight:
        """Weights of one format and shape are the same numbers, drawn once."""
        key = (self.record.formats[linear], *self.record.shapes[linear])
        if key not in self._made:
            self._made[key] = draw(get_format(key[0]), *key[1:], self.record.group_size)
        return self._made[key]


def draw(fmt: BitFormat, out_features: int, in_features: int, group_size: int) -> PackedWeight:
    """A weight whose codes are drawn evenly, with zero points in the middle."""
    generator = torch.Generator().manual_seed(0)
    groups = out_features, n_groups(in_features, group_size)
    codes = (out_features, fmt.row_bytes(in_features))
    if not fmt.is_dense:
        raise AmqError(f"{fmt.name} has bytes that are no codes: weights of it cannot be drawn byte by byte")
    bytes_ = torch.randint(256, codes, generator=generator, dtype=torch.uint8)
    scale = torch.full(groups, SPREAD / fmt.levels * 3.5, dtype=torch.float16)
    return PackedWeight(fmt, in_features, group_size, bytes_, scale, torch.full_like(scale, fmt.max_code / 2))
