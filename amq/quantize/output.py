"""The checkpoint folder of a quantization: what goes into it besides packed weights, and a trial of all of it.

`try_out` writes everything but the weights' bytes before the first block is quantized, and loads it as a user will:
what would fail after hours fails then. `write` writes the same files for good and opens them once before they get their
name.
"""

from __future__ import annotations

import json
import logging
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import UNUSED, write_checkpoint, write_config
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import get_format, n_groups
from amq.integrations.opening import open_checkpoint_once
from amq.model.auto import auto_name
from amq.model.companions import copy_model_files
from amq.model.inventory import Inventory, narrowed
from amq.model.open import DTYPES, LoadedModel
from amq.model.paging import in_turn, named_weights
from amq.model.weight_source import TensorFiles
from amq.packing import PackedWeight, part_names
from amq.quantize.card import write_card
from amq.quantize.log import LOG, QuantizationLog
from amq.util.files import read_json, reason, write_text
from amq.util.folders import real_folder

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
HOLLOW = "model.safetensors"


@dataclass(frozen=True)
class CheckpointOutput:
    """folder: as the user gave it. source: the model folder that `loaded` came from; only read.
    dtype: the 16 bits that unquantized weights are stored in. originals: {name: tensor} in place of those of the model,
    which changed them as it ran. trust_remote_code: that the user said so. unused: tensors of the source's files that
    go into the checkpoint as they are, for other programs (`amq.model.unused`)."""

    folder: Path
    source: Path
    loaded: LoadedModel
    inventory: Inventory
    record: QuantizationRecord
    configuration: Configuration
    dtype: torch.dtype
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    trust_remote_code: bool = False
    unused: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json, with what the model is rather than what its own file says."""
        config = {**self.loaded.config.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")}
        unused = {UNUSED: list(self.unused)} if self.unused else {}
        return {**config_as_found(config, self.inventory.head_is_tied), **unused}

    def try_out(self, log: QuantizationLog) -> int:
        """Raises AmqError where this checkpoint could not be written or loaded; returns the bytes of all but weights.

        log: as far as it is known.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="amq-") as temporary:
                return self._try_out(Path(temporary), log)
        except OSError as error:
            raise AmqError(
                f"the output could not be tried out in {tempfile.gettempdir()}: {reason(error)}; set TMPDIR to a "
                "folder that can be written"
            ) from error

    def _try_out(self, folder: Path, log: QuantizationLog) -> int:
        shapes = {
            name: shape for linear in self.record.formats for name, shape in packed_shapes(self.record, linear).items()
        }
        shapes |= {name: tuple(tensor.shape) for name, tensor in self._others().items()}
        shapes |= {name: tuple(self._files.shape(name)) for name in self.unused}
        try:
            write_hollow(folder / HOLLOW, shapes)
            write_config(folder, self.config, self.record, auto_name(self.loaded.config))
            self._describe(folder, log)
            open_checkpoint_once(folder, self.trust_remote_code)
        except AmqError as error:
            what = str(error).replace(str(folder), str(self.folder))
            raise AmqError(
                f"a checkpoint of {self.loaded.name} could not be loaded again, so nothing was quantized: {what}"
            ) from error
        return sum(path.stat().st_size for path in folder.rglob("*") if path.name != HOLLOW)

    def write(self, packed: Mapping[str, PackedWeight], log: QuantizationLog) -> None:
        """Writes the folder, whole or not at all, and opens it once. The record takes its rotations from `packed`."""
        record = replace(self.record, rotation={n: w.rotation for n, w in packed.items() if w.rotation})

        def extras(folder: Path) -> None:
            self._describe(folder, log)
            open_checkpoint_once(folder, self.trust_remote_code)

        write_checkpoint(
            self.folder,
            self.config,
            record,
            packed,
            self._stored(),
            extras,
            auto_class=auto_name(self.loaded.config),
        )

    def _describe(self, folder: Path, log: QuantizationLog) -> None:
        """Everything that is neither weights nor config.json."""
        copy_model_files(self.source, folder)
        generation = self.loaded.model.generation_config
        if generation is not None and not (folder / GENERATION).exists():  # of config.json; not validated, see below
            write_text(folder / GENERATION, generation.to_json_string())  # save_pretrained refuses what loading accepts
        self.configuration.save(folder / "configuration.json")
        log.write(folder / LOG)
        write_card(folder, real_folder(self.folder).name, self.record, log)

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what stays unquantized, as it is stored; one after the other, since of a model that is
        larger than memory one block is there at a time."""
        model = self.loaded.model
        for name in in_turn(model, self._others()):
            owner = model.get_submodule(name.rpartition(".")[0])
            tensor = self.originals.get(name)
            if tensor is None:
                tensor = cast(Tensor, getattr(owner, name.rpartition(".")[2])).detach()
            yield name, narrowed(name, tensor.cpu(), self.dtype if tensor.dtype == torch.float32 else tensor.dtype)
        for name in self.unused:
            yield name, self._files.read(name)

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self.source)

    def _others(self) -> dict[str, Tensor]:
        """Of a model that is larger than memory, empty ones of the same shapes."""
        return other_tensors(self.loaded.model, (*self.record.formats, *self.record.embedding), self.originals)


def config_as_found(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """`config` where it says whether embedding and head are one, at the top and of a text model within.

    A file may have a head of its own although its config says `tie_word_embeddings`; transformers then keeps the head,
    and other readers trust the config.
    """
    key = "tie_word_embeddings"
    text = config.get("text_config")
    found = {**config, key: tied}
    return {**found, "text_config": {**text, key: tied}} if isinstance(text, Mapping) and key in text else found


def other_tensors(model: nn.Module, packed: Iterable[str], originals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that stays unquantized by its name, shared tensors once.

    packed: modules, by their names. originals: {name: tensor} in place of those of the model.
    """
    taken = {f"{name}.weight" for name in packed}
    kept = {name for name, _ in model.named_parameters()}  # a shared parameter only under its first name
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor
        for name, tensor in {**model.state_dict(), **originals}.items()
        if name not in taken and (name in kept or name not in parameters)
    }


def packed_shapes(record: QuantizationRecord, linear: str) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of the three parts of `linear`."""
    rows, columns = record.shapes[linear]
    groups = n_groups(columns, record.group_size)
    sizes = (get_format(record.formats[linear]).row_bytes(columns), groups, groups)
    return {name: (rows, size) for name, size in zip(part_names(linear), sizes, strict=True)}


def write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file with tensors of `shapes`, uint8 codes and otherwise fp16, that takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        code, size = ("U8", 1) if name.endswith(".qweight") else ("F16", 2)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end := end + size * prod(shape)]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole up to there


def stored_dtype(source: Path, module: nn.Module) -> torch.dtype:
    """The 16 bits that unquantized weights are stored in: the source's own, else float16 where it reaches."""
    config = read_json(source / "config.json", floats=True)
    own = DTYPES.get(config.get("dtype") or config.get("torch_dtype"))
    sizes = [_reach(p) for part in named_weights(module) for _, p in part if p.numel()]
    if own is not None and own.itemsize == 2:
        if max(sizes) <= torch.finfo(own).max:
            return own
        log.warning(
            "the model's config says %s, which its largest weight %.4g is beyond: what stays unquantized is stored in "
            "bfloat16", str(own).removeprefix("torch."), max(sizes),
        )  # fmt: skip
        return torch.bfloat16
    limits = torch.finfo(torch.float16)
    fits = max(sizes) < limits.max / 4 and all(size >= limits.tiny for size in sizes if size)
    return torch.float16 if fits else torch.bfloat16


def _reach(tensor: Tensor) -> float:
    """The largest size of its numbers; without a copy of it, which an embedding may have no room for."""
    return max(abs(float(extreme)) for extreme in tensor.aminmax())
