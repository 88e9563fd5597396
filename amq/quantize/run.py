"""One quantization from settings to checkpoint folder: load, quantize block by block, write, describe."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amq.bank import BankRecipe
from amq.calibration import shared_inputs
from amq.checkpoint import QuantizationRecord, write_checkpoint
from amq.configuration import Configuration, memory_items, memory_json, parse_pins
from amq.data import WindowSampler, fixed_windows, load_corpus
from amq.errors import AmqError
from amq.files import check_new_folder, read_json, write_json
from amq.formats import get_format
from amq.linears import Inventory, check_weights
from amq.models import DTYPES, LoadedModel, load_model, model_fingerprint, resolve
from amq.packing import PackedWeight
from amq.perplexity import perplexity
from amq.progress import Progress
from amq.quantize.autoround import AutoRoundSource
from amq.quantize.card import write_card
from amq.quantize.head import Head, find_head, head_json, quantize_head, with_head
from amq.quantize.methods import METHODS, BlockQuantizer, BlockResult, BlockSource
from amq.quantize.settings import OTHER_METHODS, QuantizeSettings
from amq.quantize.sources import BankSource
from amq.quantize.work import WorkFolder
from amq.usable import Usable, find_usable

log = logging.getLogger(__name__)

SCHEMA = "amq/quantization/1"
SHARING_TOKENS = 16
MOST_ERROR = 0.5
"""Relative error of a linear above which a warning names it."""


@dataclass(frozen=True)
class QuantizeResult:
    """output: the checkpoint folder. log: the content of its quantization.json."""

    output: Path
    log: dict[str, Any]


def run_quantize(settings: QuantizeSettings, resume: bool = False, progress: Progress | None = None) -> QuantizeResult:
    """Quantizes a model into a checkpoint folder; raises AmqError for bad input before anything is written."""
    progress = progress or Progress()
    started = time.monotonic()
    settings.check()
    output = Path(settings.output)
    check_new_folder(output)
    loaded = load_model(settings.model, settings.dtype, settings.device)
    usable = find_usable(loaded.model)
    parts = usable.parts
    check_weights(loaded.model, parts.linears)
    configuration = _configuration(settings, usable)
    fingerprint = model_fingerprint(loaded.model)
    _check_provenance(configuration, fingerprint, settings.model)
    corpus = load_corpus(settings.calibration, loaded.tokenizer)
    windows = WindowSampler(corpus, settings.window_length, settings.seed).take(settings.windows)
    head = find_head(loaded.model, settings.head)
    quantized = parts.only(configuration.quantized)
    sharing = shared_inputs(loaded.model, quantized.linears, windows[:1, :SHARING_TOKENS].to(settings.device))
    record = _record(configuration, parts, settings.method, sharing, head)
    identity = settings.identity(fingerprint, dict(record.formats), configuration.group_size)
    perplexities = _Perplexities(settings, loaded, progress)
    stored = _stored_dtype(settings, loaded.model)
    source = _source(settings, loaded, parts, configuration, windows, fingerprint, stored, progress)
    work = WorkFolder(output, identity, record, resume)
    perplexities.measure("full")
    others: dict[str, PackedWeight] = {}
    head_log = None
    if head is not None:
        others[head.name], error = quantize_head(loaded.model, head, record.group_size, settings.zero_points)
        head_log = head_json(head, others[head.name], error)
    results = _blocks(source, work, parts.n_blocks, progress)
    perplexities.measure(settings.method)
    log = {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "model": {"name": settings.model, "fingerprint": fingerprint},
        "calibration_sha256": corpus.sha256,
        "bits_per_weight": round(configuration.bits_per_weight(parts.linears), 4),
        "memory": memory_json(with_head(memory_items(parts, configuration), head_log)),
        "perplexity": perplexities.figures,
        "linears": _linears(parts, configuration, results),
        "not_quantized": usable.reasons,
        "head": head_log,
        "notes": sorted({note for result in results for note in result.notes}),
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    packed = {name: weight for result in results for name, weight in result.packed.items()} | others
    _write(output, loaded, record, configuration, packed, log, stored, usable.loaded)
    work.remove()
    return QuantizeResult(output, log)


def _record(
    configuration: Configuration,
    parts: Inventory,
    method: str,
    sharing: tuple[tuple[str, ...], ...],
    head: Head | None,
) -> QuantizationRecord:
    formats = configuration.quantized
    shapes = {s.name: (s.out_features, s.in_features) for s in parts.linears}
    kept = {name: shapes.pop(name) for name in list(shapes) if name not in formats}
    if head is None:
        return QuantizationRecord(formats, shapes, configuration.group_size, method, sharing, kept=kept)
    embedding = {head.embedding: head.name} if head.embedding else {}
    return QuantizationRecord(
        {**formats, head.name: head.format.name},
        {**shapes, head.name: head.shape},
        configuration.group_size,
        method,
        sharing,
        head.name,
        embedding,
        kept,
    )


def _configuration(settings: QuantizeSettings, usable: Usable) -> Configuration:
    """What is asked for, pins included; names exactly the linears that can be quantized."""
    parts = usable.parts
    if settings.uniform:
        configuration = Configuration.uniform(parts.linears, get_format(settings.uniform), settings.group_size)
    else:
        configuration = Configuration.load(Path(settings.configuration))
        configuration.check(parts.linears, usable.reasons)
    pins = {name: fmt.name for name, fmt in parse_pins(settings.pin, parts.linears).items()}
    configuration = replace(configuration, formats={**configuration.formats, **pins})
    if not configuration.quantized:
        raise AmqError("every linear is kept in 16 bits: nothing is left to quantize")
    return configuration


def _check_provenance(configuration: Configuration, fingerprint: str, model: str) -> None:
    made_for = (configuration.details.get("provenance") or {}).get("model_fingerprint")
    if made_for and made_for != fingerprint:
        raise AmqError(
            f"the configuration was searched on other weights than those of {model}: search this model, or remove "
            "model_fingerprint from the file's provenance if you know that it fits"
        )


def _source(
    settings: QuantizeSettings,
    loaded: LoadedModel,
    parts: Inventory,
    configuration: Configuration,
    windows: Tensor,
    fingerprint: str,
    stored: torch.dtype,
    progress: Progress,
) -> BlockSource:
    """What makes block after block."""
    model, formats, group_size = loaded.model, configuration.quantized, configuration.group_size
    quantized = parts.only(formats)
    if settings.method in METHODS:
        method = METHODS[settings.method]
        return BlockQuantizer(model, parts, formats, group_size, method, windows, settings.zero_points, stored)
    if settings.method == "bank":
        names = ("calibration", "window_length", "seed")
        recipe = BankRecipe(
            "gptq", group_size, bank_windows=settings.windows, **{n: getattr(settings, n) for n in names}
        ).of(configuration)
        bank = recipe.open(loaded, quantized, set(formats.values()), progress, fingerprint)
        return BankSource(model, quantized, formats, bank)
    if settings.method == "autoround":
        iterations, zero_points = settings.autoround_iterations, settings.zero_points
        return AutoRoundSource(loaded, quantized, formats, group_size, windows, zero_points, iterations, settings.seed)
    raise AmqError(f"unknown method {settings.method!r}: expected one of {', '.join((*METHODS, *OTHER_METHODS))}")


def _blocks(source: BlockSource, work: WorkFolder, count: int, progress: Progress) -> list[BlockResult]:
    """Every block's result, from the work folder where it is there."""
    results = []
    with progress.stage("quantize", count) as step:
        for block in range(count):
            start = time.monotonic()
            result, note = work.load(block), "is there"
            if result is None:
                work.save(block, source.make(block))
                result = work.load(block)  # mapped, so that finished blocks take no memory
                note = _errors(result)
                _warn_of(result)
            source.finish(result)
            results.append(result)
            step(f"block {block}: {note}, {time.monotonic() - start:.1f} s")
    return results


def _errors(result: BlockResult) -> str:
    """`relative error q_proj int3 0.12 …`, linears by the last part of their names."""
    shown = [
        f"{name.rpartition('.')[2]} {result.packed[name].format.name} {error:.3f}"
        for name, error in result.errors.items()
    ]
    return "relative error " + " ".join(shown)


def _warn_of(result: BlockResult) -> None:
    """Names the linears of a block that lost more than half of what they compute."""
    for name, error in result.errors.items():
        if not error <= MOST_ERROR:
            fmt = result.packed[name].format.name
            log.warning("%s in %s has a relative error of %.2f: give it a wider format", name, fmt, error)


def _linears(parts: Inventory, configuration: Configuration, results: list[BlockResult]) -> dict[str, dict[str, Any]]:
    errors = {name: error for result in results for name, error in result.errors.items()}
    return {
        s.name: {
            "format": configuration.formats[s.name],
            "shape": [s.out_features, s.in_features],
            "relative_error": errors.get(s.name),
        }
        for s in parts.linears
    }


class _Perplexities:
    """Perplexity of the model in memory, before and after: what the model card shows."""

    def __init__(self, settings: QuantizeSettings, loaded: LoadedModel, progress: Progress) -> None:
        self._model, self._progress = loaded.model, progress
        self.figures: dict[str, Any] | None = None
        if settings.perplexity == "none":
            return
        corpus = load_corpus(settings.perplexity, loaded.tokenizer)
        self._windows = fixed_windows(corpus, settings.window_length, settings.perplexity_tokens)
        self.figures = {
            "text": settings.perplexity,
            "tokens": self._windows.numel(),
            "window_length": settings.window_length,
            "rows": {},
        }

    def measure(self, name: str) -> None:
        if self.figures is None:
            return
        with self._progress.stage("perplexity", 1) as step:
            value = perplexity(self._model, self._windows)
            step(f"{name}: {value:.3f}")
        self.figures["rows"][name] = value if math.isfinite(value) else None


def _write(
    output: Path,
    loaded: LoadedModel,
    record: QuantizationRecord,
    configuration: Configuration,
    packed: Mapping[str, PackedWeight],
    log: dict[str, Any],
    dtype: torch.dtype,
    originals: Mapping[str, Tensor],
) -> None:
    others = _other_tensors(loaded.model, (*packed, *record.embedding), dtype, originals)

    def extras(folder: Path) -> None:
        loaded.tokenizer.save_pretrained(folder)
        if loaded.model.generation_config is not None:
            loaded.model.generation_config.save_pretrained(folder)
        configuration.save(folder / "configuration.json")
        write_json(folder / "quantization.json", log)
        write_card(folder, output.name, record, log)

    config = {**loaded.config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    write_checkpoint(output, config, record, packed, others, extras)


def _other_tensors(
    model: nn.Module, packed: Iterable[str], dtype: torch.dtype, originals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Everything that stays unquantized, float32 as `dtype`, shared tensors once.

    packed: modules, by their names. originals: {name: tensor} in place of those of the model.
    """
    taken = {f"{name}.weight" for name in packed}
    kept = {name for name, _ in model.named_parameters()}  # a shared parameter only under its first name
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor.detach().cpu().to(dtype if tensor.dtype == torch.float32 else tensor.dtype)
        for name, tensor in {**model.state_dict(), **originals}.items()
        if name not in taken and (name in kept or name not in parameters)
    }


def _stored_dtype(settings: QuantizeSettings, model: nn.Module) -> torch.dtype:
    """The 16 bits that unquantized weights are stored in: the source's own, else float16 where it does not overflow."""
    config = read_json(resolve(settings.model) / "config.json", floats=True)
    own = DTYPES.get(config.get("dtype") or config.get("torch_dtype"))
    if own is not None and own.itemsize == 2:
        return own
    largest = [float(p.abs().max()) for p in model.parameters() if p.numel()]
    limits = torch.finfo(torch.float16)
    fits = max(largest) < limits.max / 4 and all(size >= limits.tiny for size in largest if size)
    return torch.float16 if fits else torch.bfloat16
