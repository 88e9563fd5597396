"""WeightBank: every linear in every candidate format, built once, cached on disk, memory-mapped.

The bank is the search's proxy: a configuration is assembled from it without quantizing anything. With an
activation-aware quantizer (gptq) it is deployable as it stands. It lives under the cache directory in a folder named
by a hash of the model's weights and the settings, one safetensors file per (block, format): formats are built and
added independently, an interrupted build goes on at the first missing file, and a second search opens the files at
once. Head and embeddings, where they are wanted, have formats and files of their own in the same folder: one per
format, rounded to the grid of least squared error (`amq.quantize.head`) whatever the quantizer of the blocks is.

Building streams block by block through the full-precision model: hidden states at one block boundary are held for the
calibration windows, the block runs once to collect the second moments of its linears' inputs (shared by linears that
read one tensor), its linears are quantized, and the hidden states move on.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from amq.configuration import Configuration, linear_bytes
from amq.errors import AmqError
from amq.formats import FORMATS, NO_ROTATION, BitFormat, check_group_size, get_format
from amq.model.calibration import CalibrationStream, InputGroup, in_parts
from amq.model.inventory import Inventory, LinearSpec, get_linear, get_weight
from amq.model.open import LoadedModel, model_fingerprint
from amq.model.open import fingerprint as content_hash
from amq.model.own_text import open_sampler
from amq.model.paging import holding
from amq.model.settings import AUTO
from amq.model.token_weights import OutputMoments, token_weights
from amq.packing import PARTS, PackedWeight, part_names
from amq.quantize.head import check_grid, round_to_grid
from amq.quantize.methods import rotation_of
from amq.quantize.pieces import Room, square_error, stacks
from amq.quantize.quantizers import NEEDS_GRAM, NEEDS_OUTPUTS, NEEDS_WEIGHTS, QUANTIZERS
from amq.quantize.quantizers.grid import check_scales
from amq.quantize.rotate import Rotator, check_widths
from amq.util.files import cache_dir, make_folder
from amq.util.progress import Progress
from amq.util.records import JsonFile
from amq.util.temporary import remove_stale_below
from amq.util.tensors import hashes_metadata, save_tensors, verify_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 7
"""Part of the cache key: raised whenever a quantizer, the calibration windows or the file layout change its results."""
INDEX = "bank.json"
ERROR, ROTATION = "weight_error", "rotation"
"""Beside the three parts of each linear: ‖W − Ŵ‖², float64, and `PackedWeight.rotation`, int64 (not of head and
embeddings); tensors, so that their hashes are kept as those of the others are."""
DECIDING = "int3"
"""The format whose error decides with `--rotation auto`, whichever a bank is opened for: formats are added one by one,
and linears that share an input are rotated alike in all. A search names that nearest to its budget instead."""


@dataclass(frozen=True)
class BankSettings:
    """What the bank's bytes depend on besides the model."""

    proxy: str = "gptq"
    group_size: int = 128
    calibration: Tensor | None = None
    """int64 [windows, length]; used by quantizers that need activations."""
    rotation: str = NO_ROTATION
    """Of `BANK_ROTATIONS`."""

    @property
    def rotates(self) -> str:
        """`rotation` as far as the quantizer has something to decide it by: 64, none, or the format that decides."""
        found = rotation_of(self.proxy, self.rotation)
        return DECIDING if found == AUTO else found

    @property
    def windows(self) -> Tensor | None:
        """`calibration` where the quantizer needs it: raises AmqError where it is missing then."""
        if self.proxy not in NEEDS_GRAM:
            return None
        if self.calibration is None or not len(self.calibration):
            raise AmqError(f"the {self.proxy} bank needs at least one calibration window (--bank-windows)")
        return self.calibration

    def key(self, fingerprint_of_model: str, linears: Iterable[str] = ()) -> str:
        """linears: the names of those that the bank holds; kept ones are not built."""
        how = (self.proxy, str(self.group_size), self.rotates)
        parts = [f"amq-bank-{VERSION}", *how, fingerprint_of_model, *linears]
        if (windows := self.windows) is not None:
            parts.append(content_hash([("calibration", windows)]))
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class BankIndex(JsonFile):
    """bank.json, for people: what a bank is of. Programs find a bank by its key, and its content by its files' names.

    rotation: 64, none, or the format that decided; model: the class; linears: how many; outer: head and embeddings in
    it, as far as it was built for them.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/bank/1",)

    schema: str = SCHEMAS[0]
    proxy: str
    group_size: int
    rotation: str = NO_ROTATION
    model: str
    linears: int
    outer: tuple[str, ...] = ()


@dataclass(frozen=True)
class BankRecipe:
    """What names a bank of one model in the words of a command line: `BankSettings` with the text by its name."""

    proxy: str
    group_size: int
    calibration: str
    bank_windows: int
    window_length: int
    seed: int
    rotation: str = NO_ROTATION

    def of(self, configuration: Configuration) -> BankRecipe:
        """The bank that a configuration was searched on; what its provenance does not say is taken from here. One that
        names a bank and no rotation is of a time when there was none."""
        names = ("proxy", "calibration", "bank_windows", "window_length", "seed", "rotation")
        provenance = configuration.details.provenance
        found = {n: getattr(provenance, n, None) for n in names}
        if provenance and provenance.proxy and provenance.rotation is None:
            found["rotation"] = NO_ROTATION
        given = {n: getattr(self, n) if value is None else value for n, value in found.items()}
        return BankRecipe(group_size=configuration.group_size, **given)

    def open(
        self,
        loaded: LoadedModel,
        inventory: Inventory,
        formats: set[str],
        progress: Progress,
        fingerprint: str,
        outer: Mapping[str, Iterable[str]] | None = None,
    ) -> WeightBank:
        """Opens or builds it, for a model that holds its full-precision weights.

        formats: of the linears. outer: {head or embedding: its formats}.
        """
        count = self.bank_windows
        sampler = open_sampler(loaded, self.calibration, self.window_length, self.seed, count, fingerprint, progress)
        windows = sampler.take(count)
        settings = BankSettings(self.proxy, self.group_size, windows, self.rotation)
        others = {name: _records(names) for name, names in (outer or {}).items()}
        return open_bank(
            loaded.model, inventory, _records(formats), settings, progress, fingerprint=fingerprint, outer=others
        )


def _records(names: Iterable[str]) -> list[BitFormat]:
    return sorted((get_format(n) for n in set(names)), key=lambda f: f.code_bits)


class WeightBank:
    """Read access to a built bank. `get` returns memory-mapped tensors and costs microseconds.

    formats: of every linear of the blocks. outer: {head or embedding: its formats}.
    """

    def __init__(
        self,
        folder: Path,
        linears: Sequence[LinearSpec],
        formats: Sequence[BitFormat],
        group_size: int,
        outer: Mapping[LinearSpec, Sequence[BitFormat]] | None = None,
    ) -> None:
        self.folder, self.formats, self.group_size = folder, tuple(formats), group_size
        self._specs = {s.name: s for s in (*linears, *(outer or {}))}
        self._outer = {s.name: tuple(fs) for s, fs in (outer or {}).items()}
        self._open = lru_cache(maxsize=None)(_open_file)

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that it holds."""
        return tuple(self._specs)

    def formats_of(self, name: str) -> tuple[BitFormat, ...]:
        """What it holds that linear, head or embedding in."""
        return self._outer.get(name, self.formats)

    def get(self, linear: str, fmt: str) -> PackedWeight:
        """One linear, head or embedding in one format."""
        if linear not in self._specs:
            raise AmqError(f"linear {linear!r} is not in the bank at {self.folder}")
        if fmt not in {f.name for f in self.formats_of(linear)}:
            has, whose = self.formats_of(linear), f" for {linear}" if linear in self._outer else ""
            raise AmqError(f"format {fmt!r} is not in this bank{whose} (it has {', '.join(f.name for f in has)})")
        spec = self._specs[linear]
        path = self._path(spec, get_format(fmt))
        file = self._open(path)
        try:
            parts = [file.get_tensor(n) for n in part_names(linear)]
            rotation = 0 if linear in self._outer else _rotation_in(file, linear)
            packed = PackedWeight(get_format(fmt), spec.in_features, self.group_size, *parts, rotation=rotation)
        except (SafetensorError, AmqError, RuntimeError) as error:  # RuntimeError: of a tensor with several elements
            raise _damaged(path, error) from error
        if packed.out_features != spec.out_features:
            raise _damaged(path, f"{linear} has {packed.out_features} rows, expected {spec.out_features}")
        return packed

    def weight_errors(self) -> dict[str, dict[str, float]]:
        """‖W − Ŵ‖² (sum of squares) of everything in each of its formats, as measured when the bank was built."""
        errors: dict[str, dict[str, float]] = {name: {} for name in self._specs}
        for name, spec in self._specs.items():
            for fmt in self.formats_of(name):
                path = self._path(spec, fmt)
                try:
                    errors[name][fmt.name] = float(self._open(path).get_tensor(f"{name}.{ERROR}").item())
                except (SafetensorError, RuntimeError) as error:  # of a tensor with several elements
                    raise _damaged(path, error) from error
        return errors

    def _path(self, spec: LinearSpec, fmt: BitFormat) -> Path:
        if spec.name in self._outer:
            return _outer_file(self.folder, spec, fmt)
        return _file(self.folder, spec.block, fmt)


def _file(folder: Path, block: int, fmt: BitFormat) -> Path:
    return folder / f"block-{block:03d}.{fmt.name}.safetensors"


def _outer_file(folder: Path, spec: LinearSpec, fmt: BitFormat) -> Path:
    return folder / f"{spec.name}.{fmt.name}.safetensors"


def _open_file(path: Path) -> Any:
    """The file, mapped, once all of its tensors have been found to be what was written.

    A damaged file is named, not built again: a disk that changes what it holds is something to know about.
    """
    try:
        return verify_file(path, whole=True)
    except AmqError as error:
        raise _damaged(path, error) from error


def _rotation_in(file: Any, linear: str) -> int:
    """Raises SafetensorError where the file lacks it, RuntimeError for a tensor with several elements."""
    return int(file.get_tensor(f"{linear}.{ROTATION}").item())


def _damaged(path: Path, error: Exception | str) -> AmqError:
    return AmqError(f"{path} is damaged ({error}): delete it and run the same command again")


Missing = dict[int, list[BitFormat]]
"""{block: formats whose files are not there}."""
MissingOuter = dict[LinearSpec, list[BitFormat]]


def open_bank(
    model: PreTrainedModel,
    inventory: Inventory,
    formats: Sequence[BitFormat],
    settings: BankSettings,
    progress: Progress | None = None,
    cache: Path | None = None,
    fingerprint: str | None = None,
    outer: Mapping[str, Sequence[BitFormat]] | None = None,
) -> WeightBank:
    """The bank of `model` (a full-precision causal LM), from the cache; what is missing is built first.

    formats: of all of the inventory's linears. outer: {name in `inventory.outer`: its formats}; those that it does not
    name are not in the bank.
    fingerprint: `model_fingerprint(model)` where the caller has it already.
    """
    QUANTIZERS[settings.proxy]  # noqa: B018 - raises on an unknown name
    check_group_size(settings.group_size)
    check_widths(settings.rotates, inventory.linears)
    progress = progress or Progress()
    folder = (cache or cache_dir() / "banks") / settings.key(
        fingerprint or model_fingerprint(model), (s.name for s in inventory.linears)
    )
    remove_stale_below(folder)
    wanted = _find_outer(inventory, outer or {})
    blocks = sorted({s.block for s in inventory.linears})
    missing = {b: [f for f in formats if not _file(folder, b, f).is_file()] for b in blocks}
    missing = {b: fs for b, fs in missing.items() if fs}
    missing_outer = {s: [f for f in fs if not _outer_file(folder, s, f).is_file()] for s, fs in wanted.items()}
    missing_outer = {s: fs for s, fs in missing_outer.items() if fs}
    if missing or missing_outer:
        _check_disk(folder, _bytes(inventory, missing, missing_outer, settings.group_size), progress)
        make_folder(folder, "point AMQ_CACHE at a folder that can be written")
        index = BankIndex(
            proxy=settings.proxy, group_size=settings.group_size, rotation=settings.rotates, model=type(model).__name__,
            linears=len(inventory.linears), outer=tuple(s.name for s in wanted),
        )  # fmt: skip
        index.write(folder / INDEX)
        _build_outer(model, folder, missing_outer, settings.group_size, progress)
        if missing:
            _build(model, inventory, folder, missing, settings, progress)
    return WeightBank(folder, inventory.linears, formats, settings.group_size, wanted)


def _find_outer(
    inventory: Inventory, outer: Mapping[str, Sequence[BitFormat]]
) -> dict[LinearSpec, Sequence[BitFormat]]:
    specs = {s.name: s for s in inventory.outer}
    for name in outer:
        if name not in specs:
            found = ", ".join(specs) or "none"
            raise AmqError(f"{name!r} is no head or embedding of this model that can be quantized: it has {found}")
    return {specs[name]: formats for name, formats in outer.items()}


def _bytes(inventory: Inventory, missing: Missing, outer: MissingOuter, group_size: int) -> int:
    linears = sum(
        linear_bytes(s, f, group_size) for b, fs in missing.items() for s in inventory.in_block(b) for f in fs
    )
    return linears + sum(linear_bytes(s, f, group_size) for s, fs in outer.items() for f in fs)


def _check_disk(folder: Path, needed: int, progress: Progress) -> None:
    """Says what the bank takes before it is built; raises AmqError where the disk has not so much."""
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise AmqError(
            f"the bank needs {needed / 2**30:.2f} GiB under {folder}, {free / 2**30:.2f} GiB are free: "
            "free some space, or point AMQ_CACHE at a larger disk"
        )
    progress.say(f"bank: {needed / 2**30:.2f} GiB to write, {free / 2**30:.2f} GiB free at {parent}")


def _build_outer(model: nn.Module, folder: Path, missing: MissingOuter, group_size: int, progress: Progress) -> None:
    if not missing:
        return
    with progress.stage("head and embeddings", sum(map(len, missing.values()))) as step, torch.no_grad():
        for spec, formats in missing.items():
            weight = get_weight(model, spec.name).detach()
            energy = square_error(weight, None) or 1.0
            for fmt in formats:
                check_grid(spec, weight, fmt, group_size)
                packed = round_to_grid(weight, fmt, group_size, "fractional")
                error = square_error(weight, packed)
                content = {f"{spec.name}.{part}": t for part, t in {**packed.parts, **_error(error)}.items()}
                save_tensors(_outer_file(folder, spec, fmt), content, hashes_metadata(content))
                step(f"{spec.name} {fmt.name}: relative error {(error / energy) ** 0.5:.3f}")


def _error(error: float) -> dict[str, Tensor]:
    return {ERROR: torch.tensor(error, dtype=torch.float64)}


def _build(
    model: PreTrainedModel,
    inventory: Inventory,
    folder: Path,
    missing: Missing,
    settings: BankSettings,
    progress: Progress,
) -> None:
    stream, outputs = None, None
    if settings.windows is not None:
        outputs = OutputMoments(inventory.linears) if settings.proxy in NEEDS_OUTPUTS else None
        weighted = settings.proxy in NEEDS_WEIGHTS
        weights = token_weights(model, inventory, settings.windows, outputs=outputs) if weighted else None
        stream = CalibrationStream(model, settings.windows, weights=weights)
    names = ",".join(sorted({f.name for fs in missing.values() for f in fs}))
    with progress.stage(f"{settings.proxy} bank", max(missing) + 1) as step, torch.no_grad():
        for block in range(max(missing) + 1):
            wanted = missing.get(block)
            if not wanted:
                if stream is not None:
                    stream.advance()
                step(f"block {block} is there")
                continue
            start = time.monotonic()
            linears, notes = inventory.in_block(block), list[str]()
            decided = _rotations(folder, block, linears) if settings.rotates in FORMATS else {}
            made = _Block(model, linears, wanted, settings, decided, outputs)
            with holding(model, block):
                if stream is None:
                    made.add(linears, None)
                else:
                    for groups in _parts(stream, linears, notes):
                        made.add_inputs(groups)
            made.save(folder, block)
            said = "".join(f"; {note}" for note in (*filter(None, [made.rotator.text]), *notes))
            step(f"block {block} {names}: relative error {made.errors()}, {time.monotonic() - start:.1f} s{said}")


def _parts(stream: CalibrationStream, linears: Sequence[LinearSpec], notes: list[str]) -> Iterator[list[InputGroup]]:
    """The linears of the next block by their inputs, as many as are measured at once; the stream goes on behind the
    block. notes: what there is to say of them is added."""
    parts = in_parts(linears)
    for number, part in enumerate(parts, 1):
        groups = stream.measure(part, advance=number == len(parts))
        notes += stream.notes
        yield groups


def _rotations(folder: Path, block: int, linears: Sequence[LinearSpec]) -> dict[str, int]:
    """{linear: rotation} that the block's other formats have, which an earlier run built; empty without any."""
    path = next(iter(sorted(folder.glob(f"block-{block:03d}.*.safetensors"))), None)
    if path is None:
        return {}
    file = _open_file(path)
    try:
        return {s.name: _rotation_in(file, s.name) for s in linears}
    except (SafetensorError, RuntimeError) as error:
        raise _damaged(path, error) from error


class _Block:
    """The files of one block, one per format, as they fill."""

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[LinearSpec],
        formats: Sequence[BitFormat],
        settings: BankSettings,
        rotations: Mapping[str, int],
        outputs: OutputMoments | None,
    ) -> None:
        self._model, self._formats, self._group_size = model, formats, settings.group_size
        quantize, rotation = QUANTIZERS[settings.proxy], settings.rotates
        self._deciding = [FORMATS[rotation]] if rotation in FORMATS else []
        setting = AUTO if self._deciding else rotation
        self.rotator = Rotator(setting, quantize, settings.group_size, known=rotations, outputs=outputs)
        sizes = {f.name: sum(linear_bytes(s, f, settings.group_size) for s in linears) for f in formats}
        numbers = (torch.float64.itemsize + torch.int64.itemsize) * len(linears)
        tensors = (len(PARTS) + 2) * len(linears)
        self._rooms = {n: Room(Room.needed(size + numbers, tensors)) for n, size in sizes.items()}
        self._errors, self._energy = dict.fromkeys(sizes, 0.0), 0.0

    def add_inputs(self, groups: list[InputGroup]) -> None:
        """Decides which of these inputs are rotated, and quantizes the linears that read them. Empties `groups`."""
        self.rotator.decide(groups, self._weight, lambda spec: self._deciding)
        while groups:  # a group's matrix goes when it has been used
            group = groups.pop(0)
            self.add(group.linears, group.gram)

    def _weight(self, spec: LinearSpec) -> Tensor:
        return get_linear(self._model, spec.name).weight.detach()

    def add(self, specs: Sequence[LinearSpec], gram: Tensor | None) -> None:
        """Quantizes linears that share an input, as many at once as memory is set aside for."""
        for stack in stacks(specs):
            weights = [self._weight(s) for s in stack]
            for spec, weight in zip(stack, weights, strict=True):
                for fmt in self._formats:
                    check_scales(spec.name, weight, fmt, self._group_size)
            results = self.rotator.quantize(stack, weights, self._formats, gram)
            for spec, weight, result in zip(stack, weights, results, strict=True):
                self._energy += square_error(weight, None)
                for name, packed in result.items():
                    error = square_error(weight, packed)
                    self._errors[name] += error
                    rotation = {ROTATION: torch.tensor(packed.rotation)}
                    for part, tensor in {**packed.parts, **_error(error), **rotation}.items():
                        self._rooms[name].keep(f"{spec.name}.{part}", tensor)

    def save(self, folder: Path, block: int) -> None:
        for fmt in self._formats:
            content = self._rooms.pop(fmt.name).tensors()
            save_tensors(_file(folder, block, fmt), content, hashes_metadata(content))

    def errors(self) -> str:
        """Relative weight errors of the formats."""
        return " ".join(f"{name} {(e / (self._energy or 1.0)) ** 0.5:.3f}" for name, e in self._errors.items())
