"""WeightBank: every linear in every candidate format, built once, cached on disk, memory-mapped.

The bank is the search's proxy: a configuration is assembled from it without quantizing anything. With an
activation-aware quantizer (gptq) it is deployable as it stands. It lives under the cache directory in a folder named
by a hash of the model's weights and the settings, one safetensors file per (block, format): formats are built and
added independently, an interrupted build goes on at the first missing file, and a second search opens the files at
once.

Building streams block by block through the full-precision model: hidden states at one block boundary are held for the
calibration windows, the block runs once to collect the second moments of its linears' inputs (shared by linears that
read one tensor), its linears are quantized, and the hidden states move on.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from amq.configuration import Configuration, linear_bytes
from amq.errors import AmqError
from amq.formats import BitFormat, check_group_size, get_format
from amq.kernels.cpu import dequantized
from amq.model.calibration import CalibrationStream
from amq.model.inventory import Inventory, LinearSpec, get_linear
from amq.model.open import LoadedModel, model_fingerprint
from amq.model.open import fingerprint as content_hash
from amq.model.own_text import open_sampler
from amq.packing import PackedWeight, part_names
from amq.quantize.quantizers import NEEDS_GRAM, QUANTIZERS
from amq.quantize.quantizers.grid import check_scales
from amq.util.files import cache_dir, make_folder
from amq.util.progress import Progress
from amq.util.records import JsonFile
from amq.util.temporary import remove_stale_below
from amq.util.tensors import hashes_metadata, save_tensors, verify_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 3
"""Part of the cache key: raised whenever a quantizer, the calibration windows or the file layout change its results."""
INDEX = "bank.json"
ERROR = "weight_error"
"""Beside the three parts of each linear: ‖W − Ŵ‖², float64, a tensor so that its hash is kept as theirs are."""


@dataclass(frozen=True)
class BankSettings:
    """What the bank's bytes depend on besides the model."""

    proxy: str = "gptq"
    group_size: int = 128
    calibration: Tensor | None = None
    """int64 [windows, length]; used by quantizers that need activations."""

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
        parts = [f"amq-bank-{VERSION}", self.proxy, str(self.group_size), fingerprint_of_model, *linears]
        if (windows := self.windows) is not None:
            parts.append(content_hash([("calibration", windows)]))
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class BankIndex(JsonFile):
    """bank.json, for people: what a bank is of. Programs find a bank by its key, and its content by its files' names.

    model: the class; linears: how many.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/bank/1",)

    schema: str = SCHEMAS[0]
    proxy: str
    group_size: int
    model: str
    linears: int


@dataclass(frozen=True)
class BankRecipe:
    """What names a bank of one model in the words of a command line: `BankSettings` with the text by its name."""

    proxy: str
    group_size: int
    calibration: str
    bank_windows: int
    window_length: int
    seed: int

    def of(self, configuration: Configuration) -> BankRecipe:
        """The bank that a configuration was searched on; what its provenance does not say is taken from here."""
        names = ("proxy", "calibration", "bank_windows", "window_length", "seed")
        found = {n: getattr(configuration.details.provenance, n, None) for n in names}
        given = {n: getattr(self, n) if value is None else value for n, value in found.items()}
        return BankRecipe(group_size=configuration.group_size, **given)

    def open(
        self, loaded: LoadedModel, inventory: Inventory, formats: set[str], progress: Progress, fingerprint: str
    ) -> WeightBank:
        """Opens or builds it, for a model that holds its full-precision weights."""
        count = self.bank_windows
        sampler = open_sampler(loaded, self.calibration, self.window_length, self.seed, count, fingerprint, progress)
        windows = sampler.take(count)
        records = sorted((get_format(n) for n in formats), key=lambda f: f.code_bits)
        settings = BankSettings(self.proxy, self.group_size, windows)
        return open_bank(loaded.model, inventory, records, settings, progress, fingerprint=fingerprint)


class WeightBank:
    """Read access to a built bank. `get` returns memory-mapped tensors and costs microseconds."""

    def __init__(
        self, folder: Path, linears: Sequence[LinearSpec], formats: Sequence[BitFormat], group_size: int
    ) -> None:
        self.folder, self.formats, self.group_size = folder, tuple(formats), group_size
        self._specs = {s.name: s for s in linears}
        self._open = lru_cache(maxsize=None)(_open_file)

    def get(self, linear: str, fmt: str) -> PackedWeight:
        """One linear in one format."""
        if linear not in self._specs:
            raise AmqError(f"linear {linear!r} is not in the bank at {self.folder}")
        if fmt not in {f.name for f in self.formats}:
            raise AmqError(f"format {fmt!r} is not in this bank (it has {', '.join(f.name for f in self.formats)})")
        spec = self._specs[linear]
        path = _file(self.folder, spec.block, get_format(fmt))
        file = self._open(path)
        try:
            packed = PackedWeight(
                get_format(fmt), spec.in_features, self.group_size, *(file.get_tensor(n) for n in part_names(linear))
            )
        except (SafetensorError, AmqError) as error:
            raise _damaged(path, error) from error
        if packed.out_features != spec.out_features:
            raise _damaged(path, f"{linear} has {packed.out_features} rows, expected {spec.out_features}")
        return packed

    def weight_errors(self) -> dict[str, dict[str, float]]:
        """‖W − Ŵ‖² (sum of squares) of every linear and format, as measured when the bank was built."""
        errors: dict[str, dict[str, float]] = {name: {} for name in self._specs}
        for name, spec in self._specs.items():
            for fmt in self.formats:
                path = _file(self.folder, spec.block, fmt)
                try:
                    errors[name][fmt.name] = float(self._open(path).get_tensor(f"{name}.{ERROR}"))
                except (SafetensorError, RuntimeError) as error:  # of a tensor with several elements
                    raise _damaged(path, error) from error
        return errors


def _file(folder: Path, block: int, fmt: BitFormat) -> Path:
    return folder / f"block-{block:03d}.{fmt.name}.safetensors"


def _open_file(path: Path) -> Any:
    """The file, mapped, once all of its tensors have been found to be what was written.

    A damaged file is named, not built again: a disk that changes what it holds is something to know about.
    """
    try:
        return verify_file(path, whole=True)
    except AmqError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception | str) -> AmqError:
    return AmqError(f"{path} is damaged ({error}): delete it and run the same command again")


def open_bank(
    model: PreTrainedModel,
    inventory: Inventory,
    formats: Sequence[BitFormat],
    settings: BankSettings,
    progress: Progress | None = None,
    cache: Path | None = None,
    fingerprint: str | None = None,
) -> WeightBank:
    """The bank of `model` (a full-precision causal LM), from the cache; what is missing is built first.

    fingerprint: `model_fingerprint(model)` where the caller has it already.
    """
    QUANTIZERS[settings.proxy]  # noqa: B018 - raises on an unknown name
    check_group_size(settings.group_size)
    folder = (cache or cache_dir() / "banks") / settings.key(
        fingerprint or model_fingerprint(model), (s.name for s in inventory.linears)
    )
    remove_stale_below(folder)
    blocks = sorted({s.block for s in inventory.linears})
    missing = {b: [f for f in formats if not _file(folder, b, f).is_file()] for b in blocks}
    missing = {b: fs for b, fs in missing.items() if fs}
    if missing:
        _check_disk(folder, inventory, missing, settings.group_size)
        make_folder(folder, "point AMQ_CACHE at a folder that can be written")
        index = BankIndex(
            proxy=settings.proxy, group_size=settings.group_size, model=type(model).__name__,
            linears=len(inventory.linears),
        )  # fmt: skip
        index.write(folder / INDEX)
        _build(model, inventory, folder, missing, settings, progress or Progress())
    return WeightBank(folder, inventory.linears, formats, settings.group_size)


def _check_disk(folder: Path, inventory: Inventory, missing: dict[int, list[BitFormat]], group_size: int) -> None:
    needed = sum(linear_bytes(s, f, group_size) for b, fs in missing.items() for s in inventory.in_block(b) for f in fs)
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise AmqError(
            f"the bank needs {needed / 2**30:.2f} GiB under {folder}, {free / 2**30:.2f} GiB are free: "
            "free some space, or point AMQ_CACHE at a larger disk"
        )


def _build(
    model: PreTrainedModel,
    inventory: Inventory,
    folder: Path,
    missing: dict[int, list[BitFormat]],
    settings: BankSettings,
    progress: Progress,
) -> None:
    quantize = QUANTIZERS[settings.proxy]
    stream = None if settings.windows is None else CalibrationStream(model, settings.windows)
    names = ",".join(sorted({f.name for fs in missing.values() for f in fs}))
    with progress.stage(f"{settings.proxy} bank", max(missing) + 1) as step, torch.no_grad():
        for block in range(max(missing) + 1):
            linears = inventory.in_block(block)
            wanted = missing.get(block)
            groups: list[tuple[Sequence[LinearSpec], Tensor | None]] = []
            if stream is None:
                groups = [(tuple(linears), None)]
            elif wanted:
                groups = [(group.linears, group.gram) for group in stream.measure(linears, advance=True)]
            else:
                stream.advance()
            if not wanted:
                step(f"block {block} is there")
                continue
            start = time.monotonic()
            errors = _quantize_block(model, groups, wanted, settings.group_size, quantize, folder, block)
            step(f"block {block} {names}: relative error {errors}, {time.monotonic() - start:.1f} s")


def _quantize_block(
    model: nn.Module,
    groups: Sequence[tuple[Sequence[LinearSpec], Tensor | None]],
    formats: Sequence[BitFormat],
    group_size: int,
    quantize: Callable[..., list[dict[str, PackedWeight]]],
    folder: Path,
    block: int,
) -> str:
    """Writes one file per format; returns the relative weight errors as text."""
    tensors: dict[str, dict[str, Tensor]] = {f.name: {} for f in formats}
    errors = dict.fromkeys(tensors, 0.0)
    energy = 0.0
    for specs, gram in groups:
        weights = [get_linear(model, s.name).weight.detach().cpu() for s in specs]
        for spec, weight in zip(specs, weights, strict=True):
            for fmt in formats:
                check_scales(spec.name, weight, fmt, group_size)
        results = quantize(weights, formats, group_size, gram)
        for spec, weight, result in zip(specs, weights, results, strict=True):
            energy += float(weight.double().square().sum())
            for name, packed in result.items():
                error = _square_error(weight, packed)
                errors[name] += error
                tensors[name][f"{spec.name}.{ERROR}"] = torch.tensor(error, dtype=torch.float64)
                tensors[name] |= {f"{spec.name}.{part}": tensor.clone() for part, tensor in packed.parts.items()}
    for fmt in formats:
        content = tensors[fmt.name]
        save_tensors(_file(folder, block, fmt), content, hashes_metadata(content))
    return " ".join(f"{name} {(e / (energy or 1.0)) ** 0.5:.3f}" for name, e in errors.items())


def _square_error(weight: Tensor, packed: PackedWeight) -> float:
    return float(dequantized(packed).sub_(weight.float()).square_().sum(dtype=torch.float64))
