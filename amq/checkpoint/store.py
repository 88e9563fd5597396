"""A quantized model on disk: safetensors, config.json, and a hash of every tensor (docs/format.md).

`write_checkpoint` writes a whole folder or none; `open_checkpoint` reads one without transformers, tensors
memory-mapped. Hashes stand in the header of the safetensors file that holds the tensors, so that shards can be moved
and a folder saved again by transformers (`amq.integrations.transformers`) carries its own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from amq.checkpoint.record import METHOD, QuantizationRecord, check_parts
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import get_format, n_groups
from amq.model.weight_files import INDEX, check_config, weight_files
from amq.packing import PackedWeight, part_names
from amq.util.extras import install_hint
from amq.util.files import json_floats, write_json
from amq.util.folders import write_folder
from amq.util.records import read_record
from amq.util.tensors import hashes_metadata, open_file, open_files, save_file, stored_hashes, verify_file

SHARD_SIZE = 1 << 30
"""Also what is held for a file at once, besides the tensor that no longer fits it."""

UNUSED = "amq_unused_tensors"
"""Key of config.json: names of tensors that are kept for other programs, as they were, and belong to no module."""
AUTO_CLASS = "AutoModelForCausalLM"
REMOTE_MODULE = "modeling_amq"
REMOTE_CODE = '''"""Lets transformers load this folder with trust_remote_code=True; `import amq` does so without it."""

try:  # transformers looks imports up too, and would name a package that is not this one; it leaves `try` alone
    import amq  # noqa: F401
except ImportError as error:
    raise ImportError("the weights of this model are packed by amq: {install}") from error
from transformers import {architecture}


class Amq{architecture}({architecture}):
    """The same model; the import above is what makes its quantized weights known."""
'''
"""Without amq, transformers loads an unknown quant_method as random weights and only warns: this stops it."""


class Checkpoint:
    """Read access to a folder; tensors are memory-mapped. Made by `open_checkpoint`."""

    def __init__(self, folder: Path, config: dict[str, Any], record: QuantizationRecord) -> None:
        self.folder, self.config, self.record = folder, config, record
        self._files = open_files(weight_files(folder))
        names = [n for linear in record.formats for n in part_names(linear)]
        check_complete(folder, [*names, *(f"{linear}.weight" for linear in record.kept)], self._files)
        for linear in record.formats:
            self._check_parts(linear)

    @property
    def configuration(self) -> Configuration:
        return self.record.configuration

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return list(self._files)

    @property
    def other_names(self) -> list[str]:
        """Tensors that are not part of a packed weight: norms, biases, an embedding that no head is tied to."""
        packed = {name for linear in self.record.formats for name in part_names(linear)}
        unused = self.config.get(UNUSED)
        packed |= set(unused) if isinstance(unused, list) else set()
        return [name for name in self._files if name not in packed]

    def verify(self) -> None:
        """Reads all tensors once; raises AmqError unless they have the hashes that were written."""
        for path in weight_files(self.folder):
            verify_file(path)

    def hashes(self) -> dict[str, str]:
        """{tensor: hash} as written, nothing read; with the config they tell the model from every other."""
        return {n: h for path in weight_files(self.folder) for n, h in stored_hashes(open_file(path), path).items()}

    def described(self, name: str) -> tuple[str, list[int]]:
        """(dtype as safetensors spells it, shape) of a tensor, from the file's header: nothing is read or allocated."""
        if name not in self._files:
            raise AmqError(f"{self.folder} has no tensor {name!r}")
        found = self._files[name].get_slice(name)
        return found.get_dtype(), found.get_shape()

    def tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise AmqError(f"{self.folder} has no tensor {name!r}")
        return self._files[name].get_tensor(name)

    def _check_parts(self, linear: str) -> None:
        """That the files' headers give the parts of `linear` the recorded shape, before anything is sized by it."""
        rows, in_features = self.record.shapes[linear]
        groups = n_groups(in_features, self.record.group_size)
        row_bytes = get_format(self.record.formats[linear]).row_bytes(in_features)
        expected = (("U8", [rows, row_bytes]), ("F16", [rows, groups]), ("F16", [rows, groups]))
        for name, wanted in zip(part_names(linear), expected, strict=True):
            found = self.described(name)
            if found != wanted:
                raise AmqError(
                    f"{self.folder}: {name} must be {wanted[0]} {wanted[1]} for {self.record.formats[linear]} of "
                    f"{[rows, in_features]}, which quantization_config in config.json says, got {found[0]} {found[1]}; "
                    "the checkpoint is damaged or was edited"
                )

    def packed(self, linear: str) -> PackedWeight:
        """One quantized linear, by dotted name; raises AmqError unless its tensors have the recorded shape."""
        if linear not in self.record.formats:
            raise AmqError(f"{self.folder} has no quantized linear {linear!r}")
        return check_parts(linear, self.record, *(self.tensor(name) for name in part_names(linear)))


@dataclass(frozen=True)
class _Config:
    """config.json, of any model."""

    quantization_config: dict[str, Any] | None = None


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a model that amq quantized; raises AmqError where its config.json is no JSON object."""
    path = folder / "config.json"
    try:
        if not path.is_file():
            return False
    except OSError:  # a name that is too long, a folder that may not be entered
        return False
    found = read_record(path, _Config, floats=True).quantization_config
    return found is not None and found.get("quant_method") == METHOD


def open_checkpoint(folder: Path | str, verify: bool = True) -> Checkpoint:
    """Opens a quantized folder.

    verify: read all tensors once and compare their hashes.
    Raises AmqError naming the file or tensor that is missing, truncated, altered or of an unknown version.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = read_record(path, dict[str, Any], floats=True)
    record = QuantizationRecord.parse(config.get("quantization_config"), str(path))
    checkpoint = Checkpoint(folder, config, record)
    check_config(config, len(checkpoint.names), str(path))
    if verify:
        checkpoint.verify()
    return checkpoint


def check_complete(folder: Path, names: Iterable[str], found: Container[str]) -> None:
    """Raises AmqError unless all tensors `names` are `found` in `folder`."""
    missing = [name for name in names if name not in found]
    if missing:
        raise AmqError(f"{folder} lacks {len(missing)} tensors, such as {missing[0]}: the checkpoint is incomplete")


def check_tensors(
    files: Mapping[str, Any], model: Mapping[str, Tensor], name_in_model: Callable[[str], str] = str
) -> None:
    """Raises AmqError, naming the tensor, unless those that `files` and `model` share have one shape and are floats in
    both or in none: transformers would cast integers and complex numbers to what the model has, and say nothing.

    files: {tensor name: open file}, as of `open_files`. model: a state dict, of any device.
    """
    for name, file in files.items():
        wanted = model.get(name_in_model(name))
        if wanted is None:
            continue
        found = file.get_slice(name)
        dtype, shape = found.get_dtype(), list(found.get_shape())
        if shape != list(wanted.shape) or dtype.startswith(("F", "BF")) != wanted.is_floating_point():
            kind = "floats" if wanted.is_floating_point() else str(wanted.dtype).removeprefix("torch.")
            raise AmqError(
                f"{name}: the model's config.json makes it {kind} {list(wanted.shape)}, the checkpoint has {dtype} "
                f"{shape}: it is damaged, or config.json was altered or belongs to another model"
            )


def write_checkpoint(
    output: Path,
    config: Mapping[str, Any],
    record: QuantizationRecord,
    packed: Mapping[str, PackedWeight],
    others: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    extras: Callable[[Path], None] | None = None,
    shard_size: int = SHARD_SIZE,
    auto_class: str = AUTO_CLASS,
) -> None:
    """Writes a whole checkpoint folder, or nothing.

    output: must not exist, or be empty.
    config: the model's config.json without `quantization_config`; infinity is allowed.
    packed: {linear: weight}, as in `record`. others: every other tensor of the model by its name, shared ones once;
        pairs are taken one after the other, so that they need not be in memory together.
    extras: called with the folder before it gets its name: tokenizer, model card, logs, and a last look at it.
    shard_size: bytes per safetensors file.
    auto_class: of transformers, which loads the model.

    Where config names the model's class, the folder also gets a `modeling_amq.py`, for people who load it with
    trust_remote_code=True and without `import amq`: see `REMOTE_CODE`.
    """
    if odd := sorted(packed.keys() ^ record.formats.keys()):
        raise AmqError(f"linear {odd[0]!r} has a weight or a format, but not both: nothing was written")
    parts = ((f"{n}.{part}", t) for n, weight in packed.items() for part, t in weight.parts.items())

    def write(folder: Path) -> None:
        rest = others.items() if isinstance(others, Mapping) else others
        write_tensors(folder, chain(parts, rest), shard_size, hashes_metadata)
        write_config(folder, config, record, auto_class)
        if extras:
            extras(folder)

    write_folder(output, write)


def write_config(
    folder: Path, config: Mapping[str, Any], record: QuantizationRecord, auto_class: str = AUTO_CLASS
) -> None:
    """Writes config.json and the module that it names; numbers that JSON lacks as transformers writes them."""
    data = {**_with_remote_code(config, folder, auto_class), "quantization_config": record.json()}
    write_json(folder / "config.json", json_floats(data))


def _with_remote_code(config: Mapping[str, Any], folder: Path, auto_class: str) -> dict[str, Any]:
    """Writes modeling_amq.py; returns `config` with the key by which transformers finds it, which a model with code of
    its own keeps."""
    if auto_class in (config.get("auto_map") or {}):
        return dict(config)
    architecture = next(iter(config.get("architectures") or ()), "")
    if not architecture:
        return dict(config)
    code = REMOTE_CODE.format(architecture=architecture, install=install_hint())
    (folder / f"{REMOTE_MODULE}.py").write_text(code, encoding="utf-8")
    return {**config, "auto_map": {auto_class: f"{REMOTE_MODULE}.Amq{architecture}"}}


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shard_size: int = SHARD_SIZE,
    metadata: Callable[[Mapping[str, Tensor]], dict[str, str]] = lambda shard: {"format": "pt"},
) -> None:
    """Writes model.safetensors, or shards and their index, holding at most one shard and the next tensor in memory.

    A tensor of more than half a shard, an embedding, is the last of its own: two of them are never held.

    metadata: what a shard's header says, from its tensors.
    """
    shards: list[dict[str, Tensor]] = [{}]
    files: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal size
        save_file(shards[0], folder / f"{len(files)}.part", metadata=metadata(shards[0]))
        files.append(list(shards[0]))
        shards[0], size = {}, 0

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[0] and size + bytes_ > shard_size:
            flush()
        shards[0][name] = tensor.contiguous()
        size, total = size + bytes_, total + bytes_
        del tensor
        if 2 * bytes_ > shard_size:
            flush()
    if shards[0] or not files:
        flush()
    if len(files) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
