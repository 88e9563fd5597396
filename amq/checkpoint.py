"""A quantized model on disk: safetensors, config.json, and a hash of every tensor (docs/format.md).

`write_checkpoint` writes a whole folder or none; `open_checkpoint` reads one without transformers, tensors
memory-mapped. Hashes stand in the header of the safetensors file that holds the tensors, so that shards can be moved
and a folder saved again by transformers (`amq.hf`) carries its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.files import is_out_of_memory, json_floats, write_json
from amq.folders import write_folder
from amq.formats import KEPT, BitFormat, check_group_size, get_format, n_groups
from amq.linears import LinearSpec
from amq.packing import PackedWeight
from amq.records import MOST, parse_record, read_record
from amq.tensors import save_file
from amq.weight_files import INDEX, check_config, weight_files

METHOD = "amq"
"""`quant_method` in config.json."""
VERSIONS = (1, 2)
"""1: only linears are packed. 2: an embedding is, too, which a reader of version 1 would look for in vain."""
PARTS = ("qweight", "scale", "zero_point")
HASHES = "amq_hashes"
"""Key of a safetensors header: JSON {tensor name: hash}."""
SHARD_SIZE = 4 << 30

AUTO_CLASS = "AutoModelForCausalLM"
REMOTE_MODULE = "modeling_amq"
REMOTE_CODE = '''"""Lets transformers load this folder with trust_remote_code=True; `import amq` does so without it."""

import amq  # noqa: F401  (pip install amq)
from transformers import {architecture}


class Amq{architecture}({architecture}):
    """The same model; the import above is what makes its quantized weights known."""
'''
"""Without amq, transformers loads an unknown quant_method as random weights and only warns. Its check of a module's
imports stops that, and says `pip install amq`."""


@dataclass(frozen=True)
class QuantizationRecord:
    """What config.json says under `quantization_config`.

    formats: {linear: format name}, every quantized linear of the model.
    shapes: {linear: (out_features, in_features)}; bytes alone do not tell how many codes the last unit of a row holds.
    quantizer: the method that made the weights, such as `gptq`; for information.
    shared_inputs: groups of linears that read one tensor (q, k, v), which a runtime may multiply in one call.
    head: the linear behind the blocks (`lm_head`), where it is one of `formats`; else empty.
    embedding: {embedding: linear} where an embedding's row i is row i of that packed linear: tied weights. Such an
        embedding has no tensor of its own.
    kept: {linear: (out_features, in_features)} of the blocks' linears that were left in 16 bits by choice: plain
        tensors under their own names, counted in bits per weight.
    """

    formats: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    group_size: int
    quantizer: str = ""
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    head: str = ""
    embedding: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def configuration(self) -> Configuration:
        """Of the linears in the blocks, as a search makes it: without the head, with what is kept."""
        formats = {name: self.formats[name] for name in self.block_shapes}
        return Configuration({**formats, **dict.fromkeys(self.kept, KEPT.name)}, self.group_size)

    @property
    def bits_per_weight(self) -> float:
        """Of the linears in the blocks, kept ones at their 16 bits."""
        shapes = {**self.block_shapes, **self.kept}
        return self.configuration.bits_per_weight([LinearSpec(n, 0, n, *shape) for n, shape in shapes.items()])

    @property
    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """`shapes` without the head's: the quantized linears of the blocks."""
        return {name: shape for name, shape in self.shapes.items() if name != self.head}

    def json(self) -> dict[str, Any]:
        records = {name: asdict(get_format(name)) for name in sorted(set(self.formats.values()))}
        return {
            "quant_method": METHOD,
            "version": VERSIONS[bool(self.embedding)],
            "group_size": self.group_size,
            "quantizer": self.quantizer,
            "records": {n: {k: v for k, v in r.items() if k != "name"} for n, r in records.items()},
            "formats": dict(self.formats),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "shared_inputs": [list(group) for group in self.shared_inputs],
            **({"head": self.head} if self.head else {}),
            **({"embedding": dict(self.embedding)} if self.embedding else {}),
            **({"kept": {name: list(shape) for name, shape in self.kept.items()}} if self.kept else {}),
        }

    @staticmethod
    def parse(data: Any, source: str) -> QuantizationRecord:
        """Reads `quantization_config`; `source` names the file in errors. Unknown keys are ignored."""
        if not isinstance(data, Mapping) or data.get("quant_method") != METHOD:
            found = data.get("quant_method") if isinstance(data, Mapping) else None
            raise AmqError(f"{source}: expected quantization_config.quant_method {METHOD!r}, found {found!r}")
        version = data.get("version")
        if type(version) is not int or version not in VERSIONS:
            raise AmqError(
                f"{source}: checkpoint version {version!r} is not known to this amq, which reads "
                f"{' and '.join(map(str, VERSIONS))}: upgrade amq"
            )
        stored = parse_record(data, _Stored, f"{source}: quantization_config")
        stored.check(source)
        shared = tuple(tuple(group) for group in stored.shared_inputs)
        return QuantizationRecord(
            stored.formats, stored.shapes, stored.group_size, stored.quantizer, shared, stored.head, stored.embedding,
            stored.kept,
        )  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """`quantization_config` as `QuantizationRecord.json` writes it."""

    formats: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    group_size: int
    records: dict[str, Any]
    quantizer: str = ""
    shared_inputs: list[list[str]] = field(default_factory=list)
    head: str = ""
    embedding: dict[str, str] = field(default_factory=dict)
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in (*self.shapes.items(), *self.kept.items()):
            if min(shape) < 1 or max(shape) > MOST:
                raise ValueError(f"expected a shape of {name} from 1 to {MOST}, got {list(shape)}")

    def check(self, source: str) -> None:
        """Raises AmqError, naming the file `source`, unless the parts fit each other and this amq's formats."""
        check_group_size(self.group_size)
        if odd := sorted(self.formats.keys() ^ self.shapes.keys()):
            raise AmqError(f"{source}: linear {odd[0]!r} has a format or a shape, but not both; the file is damaged")
        for name in sorted(set(self.formats.values())):
            _check_record(get_format(name), self.records.get(name), source)
        once: set[str] = set()
        for name in (n for group in self.shared_inputs for n in group):
            if name not in self.formats or name in once:
                why = "which is in another group too" if name in once else "which has no format"
                raise AmqError(f"{source}: shared_inputs names {name!r}, {why}; the file is damaged")
            once.add(name)
        head = {"head": self.head} if self.head else {}
        for key, name in (*head.items(), *(("embedding", n) for n in self.embedding.values())):
            if name not in self.formats:
                raise AmqError(f"{source}: {key} names {name!r}, which has no format; the file is damaged")
        if both := sorted(self.formats.keys() & self.kept.keys()):
            raise AmqError(f"{source}: linear {both[0]!r} has a format and is kept as well; the file is damaged")


def _check_record(fmt: BitFormat, record: Any, source: str) -> None:
    expected = {"levels": fmt.levels, "unit_codes": fmt.unit_codes, "unit_bytes": fmt.unit_bytes}
    if record != expected:
        raise AmqError(f"{source}: format {fmt.name} was written as {record}, this amq knows it as {expected}")


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
        return [name for name in self._files if name not in packed]

    def verify(self) -> None:
        """Reads all tensors once; raises AmqError unless they have the hashes that were written."""
        for path in weight_files(self.folder):
            verify_file(path)

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


def part_names(linear: str) -> list[str]:
    return [f"{linear}.{part}" for part in PARTS]


def check_parts(
    linear: str, record: QuantizationRecord, qweight: Tensor, scale: Tensor, zero_point: Tensor
) -> PackedWeight:
    """The three tensors of `linear` as a PackedWeight of the recorded shape and format, or an error that names it."""
    out_features, in_features = record.shapes[linear]
    try:
        packed = PackedWeight(
            get_format(record.formats[linear]), in_features, record.group_size, qweight, scale, zero_point
        )
    except AmqError as error:
        raise AmqError(f"{linear}: {error}; the checkpoint is damaged") from None
    if packed.out_features != out_features:
        raise AmqError(f"{linear}: expected {out_features} output rows, got {packed.out_features}; it is damaged")
    return packed


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


def verify_file(path: Path, whole: bool = False) -> Any:
    """The open file; raises AmqError unless every tensor in it has the hash that its header gives.

    whole: and unless every tensor that has a hash is there, which the shards that transformers saves are not asked: all
        of them have the hashes of all.
    """
    file = open_file(path)
    try:
        stored = json.loads((file.metadata() or {})[HASHES])
    except (KeyError, ValueError, RecursionError):
        raise AmqError(f"{path} has no hashes of its tensors: it was not written by amq, or was altered") from None
    expected = parse_record(stored, dict[str, str], f"{path}: {HASHES}")
    found = json.loads(hashes_metadata({n: file.get_tensor(n) for n in file.keys()})[HASHES])
    for name in found.keys() | (expected.keys() if whole else set()):
        if expected.get(name) != found.get(name):
            raise AmqError(f"{path}: tensor {name} is not what was written (its hash differs); copy the file again")
    return file


def write_checkpoint(
    output: Path,
    config: Mapping[str, Any],
    record: QuantizationRecord,
    packed: Mapping[str, PackedWeight],
    others: Mapping[str, Tensor],
    extras: Callable[[Path], None] | None = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Writes a whole checkpoint folder, or nothing.

    output: must not exist, or be empty.
    config: the model's config.json without `quantization_config`; infinity is allowed.
    packed: {linear: weight}, as in `record`. others: every other tensor of the model by its name, shared ones once.
    extras: called with the folder before it gets its name: tokenizer, model card, logs, and a last look at it.
    shard_size: bytes per safetensors file.

    Where config names the model's class, the folder also gets a `modeling_amq.py`, for people who load it with
    trust_remote_code=True and without `import amq`: see `REMOTE_CODE`.
    """
    if odd := sorted(packed.keys() ^ record.formats.keys()):
        raise AmqError(f"linear {odd[0]!r} has a weight or a format, but not both: nothing was written")
    tensors = {f"{n}.{part}": getattr(weight, part) for n, weight in packed.items() for part in PARTS} | dict(others)

    def write(folder: Path) -> None:
        write_tensors(folder, tensors.items(), shard_size, hashes_metadata)
        write_config(folder, config, record)
        if extras:
            extras(folder)

    write_folder(output, write)


def write_config(folder: Path, config: Mapping[str, Any], record: QuantizationRecord) -> None:
    """Writes config.json and the module that it names; numbers that JSON lacks as transformers writes them."""
    data = {**_with_remote_code(config, folder), "quantization_config": record.json()}
    write_json(folder / "config.json", json_floats(data))


def _with_remote_code(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Writes modeling_amq.py; returns `config` with the key by which transformers finds it, which a model with code of
    its own keeps."""
    if AUTO_CLASS in (config.get("auto_map") or {}):
        return dict(config)
    architecture = next(iter(config.get("architectures") or ()), "")
    if not architecture:
        return dict(config)
    (folder / f"{REMOTE_MODULE}.py").write_text(REMOTE_CODE.format(architecture=architecture), encoding="utf-8")
    return {**config, "auto_map": {AUTO_CLASS: f"{REMOTE_MODULE}.Amq{architecture}"}}


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shard_size: int = SHARD_SIZE,
    metadata: Callable[[Mapping[str, Tensor]], dict[str, str]] = lambda shard: {"format": "pt"},
) -> None:
    """Writes model.safetensors, or shards and their index, holding at most one shard in memory.

    metadata: what a shard's header says, from its tensors.
    """
    shards: list[dict[str, Tensor]] = [{}]
    files: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shards[0], folder / f"{len(files)}.part", metadata=metadata(shards[0]))
        files.append(list(shards[0]))
        shards[0] = {}

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[0] and size + bytes_ > shard_size:
            flush()
            size = 0
        shards[0][name] = tensor.contiguous()
        size, total = size + bytes_, total + bytes_
    flush()
    if len(files) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
