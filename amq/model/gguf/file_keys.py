"""Keys of a GGUF file below its architecture's name: taken one by one, checked, and remembered as taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amq.errors import AmqError
from amq.model.gguf.file import GgufFile, Strings
from amq.util.records import MOST, shorten


@dataclass
class FileKeys:
    """The keys below a file's architecture; remembers which were taken."""

    file: GgufFile
    taken: set[str] = field(default_factory=set)

    @property
    def architecture(self) -> str:
        return self.file.architecture

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.keys

    def take(self, key: str, default: Any = None, kind: type = float) -> Any:
        """The value of `{architecture}.key` as a `kind`; without a default it must be there."""
        name = f"{self.architecture}.{key}"
        if name not in self.file.keys:
            if default is None:
                raise AmqError(f"{self.file.path} lacks the key {name}: the model cannot be built without it")
            return default
        self.taken.add(name)
        value: Any = self.file.keys[name]
        if isinstance(value, np.ndarray) and kind is not np.ndarray:
            value = self._same(name, value)
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise AmqError(f"{self.file.path}: key {name} must be a {kind.__name__}, got {shorten(value)}")
        return float(value) if kind is float else value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to `amq.util.records.MOST`."""
        value = self.take(key, default, int)
        if not 1 <= value <= MOST:
            raise AmqError(f"{self.file.path}: {self.architecture}.{key} is {shorten(value)}, expected 1 to {MOST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.take(key, default)
        if not math.isfinite(value):
            raise AmqError(f"{self.file.path}: {self.architecture}.{key} is {value}, expected a finite number")
        return value

    def varies(self, key: str) -> bool:
        """Whether it is a list whose values differ."""
        value = self.file.keys.get(f"{self.architecture}.{key}")
        return isinstance(value, np.ndarray) and len(value) > 0 and bool((value != value[0]).any())

    def by_layer(self, key: str, layers: int, kind: type = int) -> list[Any]:
        """A value per layer, of a list or of the one value that is for all."""
        name = f"{self.architecture}.{key}"
        if not isinstance(value := self.file.keys.get(name), np.ndarray):
            return [self.take(key, kind=kind)] * layers
        self.taken.add(name)
        if len(value) != layers:
            raise AmqError(
                f"{self.file.path}: {name} has {len(value)} values, expected one for each of {layers} blocks"
            )
        if kind is int and not all(0 <= x <= MOST for x in value.tolist()):
            raise AmqError(f"{self.file.path}: {name} is {shorten(value.tolist())}, expected numbers from 0 to {MOST}")
        return [kind(x) for x in value.tolist()]

    def error(self, key: str, expected: str, found: Any) -> AmqError:
        return AmqError(f"{self.file.path}: {self.architecture}.{key} is {shown(found)}, expected {expected}")

    def _same(self, name: str, values: np.ndarray) -> Any:
        if not len(values) or (values != values[0]).any():
            raise AmqError(f"{self.file.path}: {name} differs from block to block, which is not supported")
        return values[0].item()

    def untaken(self) -> dict[str, Any]:
        """Those below the architecture's name that no translation took."""
        mine = f"{self.architecture}."
        return {k: v for k, v in self.file.keys.items() if k.startswith(mine) and k not in self.taken}


@dataclass
class Read:
    """What a family's `read` works on. values: of the config, made so far. shapes: of the file's tensors, by name.

    layers: of the decoder, without those that predict further tokens.
    """

    values: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    layers: int

    def some(self, part: str) -> bool:
        """Whether a block has the tensor `part`, as in `attn_q.bias`."""
        return any(name.startswith("blk.") and name.endswith(f".{part}") for name in self.shapes)

    def first(self, part: str) -> tuple[int, ...]:
        """The shape of that tensor of the first block that has it; () where none has."""
        return next((self.shapes[n] for i in range(self.layers) if (n := f"blk.{i}.{part}") in self.shapes), ())


def shown(value: Any) -> str:
    """Of a key, for an error."""
    return f"{value.length} texts" if isinstance(value, Strings) else shorten(value)
