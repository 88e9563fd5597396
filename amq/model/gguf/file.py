"""What a GGUF file says before its weights: keys, and where each tensor lies. Every size is bounded before it is used.

The gguf package reads as many elements as a file claims to have, which for a damaged one can be 2^62. Here each count
is compared with the bytes that are left in the file before anything is read or allocated, so that a bad file is named
at once. Weights are read in pieces with `read`; a model in parts is several files, see `parts_of`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from amq.errors import AmqError
from amq.util.records import shorten

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 4
MOST_NAME = 2**16 - 1
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
LEAST_KEY, LEAST_TENSOR = 13, 24
"""Bytes that a key with its value and a tensor's description take at least."""
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""How llama.cpp names the parts of a split model."""


@dataclass(frozen=True)
class Strings:
    """An array of texts; how many there are is all that is read of them."""

    length: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. type: its name in `gguf.GGMLQuantizationType`. shape: in transformers' order, rows first.

    offset: of its first byte in the file `path`, which holds all n_bytes of it.
    """

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.numel // self.shape[-1]

    def read(self, first: int, last: int) -> np.ndarray:
        """uint8 [last − first, bytes per row]: the stored rows `first` up to `last`."""
        width = self.n_bytes // self.rows
        with open(self.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), (last - first) * width, self.offset + first * width)
        if len(data) != (last - first) * width:
            raise AmqError(f"{self.path} ended while tensor {self.name} was read: it changed meanwhile; try again")
        return np.frombuffer(data, np.uint8).reshape(last - first, width)


@dataclass(frozen=True)
class GgufFile:
    """keys: {name: number, text, `Strings` or numpy array}. tensors: in the file's order."""

    path: Path
    keys: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture`; raises AmqError without one."""
        name = self.keys.get("general.architecture")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_-]+", name):
            raise AmqError(f"{self.path} names no architecture (general.architecture is {shorten(name)}): no model")
        return name


def parts_of(path: Path) -> list[Path]:
    """All files of the model that `path` is a file of, in order; raises AmqError naming one that is missing."""
    if not path.is_file():
        raise AmqError(f"{path} does not exist: expected a GGUF file")
    match = PART.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{match['count']}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing or not paths:
        first = missing[0] if missing else path.name
        raise AmqError(
            f"{path.name} is one of {count} parts of a model, of which {len(missing)} are missing in {path.parent}, "
            f"such as {first}: put all parts beside each other"
        )
    return paths


def read_model(paths: Iterable[Path]) -> GgufFile:
    """The parts of one model as one file: the keys are the first part's, the tensors those of all."""
    files = [read_gguf(path) for path in paths]
    first = files[0]
    if int(_scalar(first, "split.count", 1)) != len(files):
        raise AmqError(
            f"{first.path} is part of a model in {_scalar(first, 'split.count', 1)} parts (split.count), found "
            f"{len(files)}: the parts need their names NAME-00001-of-0000N.gguf and must lie beside each other"
        )
    for i, file in enumerate(files):
        if len(files) > 1 and int(_scalar(file, "split.no", i)) != i:
            raise AmqError(f"{file.path} says that it is part {file.keys['split.no'] + 1}: it was renamed")
    tensors = tuple(tensor for file in files for tensor in file.tensors)
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise AmqError(f"{tensor.path} is not a readable GGUF file: it has tensor {tensor.name} a second time")
        names.add(tensor.name)
    return GgufFile(first.path, first.keys, tensors)


def _scalar(file: GgufFile, key: str, default: int) -> int:
    value = file.keys.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise AmqError(f"{file.path}: key {key} must be a whole number, got {shorten(value)}")
    return value


def read_gguf(path: Path) -> GgufFile:
    """The header of one file. Raises AmqError naming the file, what is wrong with it and where."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(MAGIC) + 20:
                raise _error(path, f"it has {size} bytes, too few for a header")
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                return _Reader(path, data, size).file()
    except OSError as error:
        raise AmqError(f"{path} cannot be read: {error}") from None


def _error(path: Path, what: str) -> AmqError:
    return AmqError(f"{path} is not a readable GGUF file: {what}; download or convert it again")


class _Reader:
    """Walks the header once, from the first byte on."""

    def __init__(self, path: Path, data: mmap, size: int) -> None:
        self._path, self._data, self._size, self._at = path, data, size, 0

    def file(self) -> GgufFile:
        if self._take(4, "the magic number") != MAGIC:
            raise _error(self._path, "it does not begin with GGUF")
        version = self._number("<I", "the version")
        if version not in VERSIONS:
            raise _error(self._path, f"its version is {version}, expected one of {VERSIONS} in little-endian order")
        tensor_count = self._count("<Q", LEAST_TENSOR, "tensors")
        key_count = self._count("<Q", LEAST_KEY, "keys")
        keys: dict[str, Any] = {}
        for _ in range(key_count):
            name = self._text("a key")
            if name in keys:
                raise _error(self._path, f"it has key {name} twice")
            keys[name] = self._value(self._number("<I", f"the type of {name}"), name)
        described = [self._tensor() for _ in range(tensor_count)]
        alignment = keys.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _error(self._path, f"general.alignment is {shorten(alignment)}, expected a power of two")
        start = -(-self._at // alignment) * alignment
        return GgufFile(self._path, keys, tuple(self._placed(start, alignment, *each) for each in described))

    def _take(self, length: int, what: str) -> bytes:
        if length > self._size - self._at:
            raise _error(
                self._path, f"{what} at byte {self._at} takes {length} bytes, beyond the file's end at {self._size}"
            )
        self._at += length
        return self._data[self._at - length : self._at]

    def _number(self, kind: str, what: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind), what))[0]

    def _count(self, kind: str, least: int, what: str) -> int:
        """A number of things of at least `least` bytes each, which must fit what is left of the file."""
        count = self._number(kind, f"the number of {what}")
        if count * least > self._size - self._at:
            raise _error(self._path, f"it says that it has {count} {what}, more than its {self._size} bytes can hold")
        return count

    def _text(self, what: str) -> str:
        length = self._number("<Q", f"the length of {what}")
        raw = self._take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _error(self._path, f"{what} at byte {self._at - length} is no UTF-8 text ({error.reason})") from None

    def _value(self, kind: int, name: str) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind], f"the value of {name}")
        if kind == STRING:
            return self._text(f"the value of {name}")
        if kind != ARRAY:
            raise _error(self._path, f"key {name} has a value of type {kind}, which GGUF does not know")
        kind = self._number("<I", f"the elements' type of {name}")
        if kind in SCALARS:
            count = self._count("<Q", struct.calcsize(SCALARS[kind]), f"elements of {name}")
            raw = self._take(count * struct.calcsize(SCALARS[kind]), name)
            return np.frombuffer(raw, np.dtype(SCALARS[kind]))
        if kind != STRING:
            raise _error(self._path, f"key {name} is an array of type {kind}, expected numbers or texts")
        count = self._count("<Q", 8, f"elements of {name}")
        for _ in range(count):
            self._take(self._number("<Q", f"a length in {name}"), f"a text of {name}")
        return Strings(count)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape with rows first, type's number, offset in the part for data)."""
        name = self._text("a tensor's name")
        if not 0 < len(name) <= MOST_NAME:
            raise _error(self._path, f"a tensor has a name of {len(name)} letters")
        count = self._number("<I", f"the number of dimensions of {name}")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise _error(self._path, f"tensor {name} has {count} dimensions, expected 1 to {MOST_DIMENSIONS}")
        shape = struct.unpack(f"<{count}Q", self._take(8 * count, f"the shape of {name}"))
        kind = self._number("<I", f"the type of {name}")
        return name, tuple(reversed(shape)), kind, self._number("<Q", f"the offset of {name}")

    def _placed(self, start: int, alignment: int, name: str, shape: tuple[int, ...], kind: int, at: int) -> GgufTensor:
        import gguf

        try:
            type_ = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise _error(self._path, f"tensor {name} has type {kind}, which is not known") from None
        block, width = gguf.GGML_QUANT_SIZES[type_]
        numel = math.prod(shape)
        if not numel or shape[-1] % block:
            raise _error(self._path, f"tensor {name} of type {type_.name} cannot have shape {list(shape)}")
        n_bytes = numel // block * width
        if at % alignment or start + at + n_bytes > self._size:
            raise _error(
                self._path, f"tensor {name} takes {n_bytes} bytes from {start + at} on, not in the file's {self._size}"
            )
        return GgufTensor(self._path, name, type_.name, shape, start + at, n_bytes)
