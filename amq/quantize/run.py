"""One quantization from settings to checkpoint folder: load, quantize block by block, write, describe."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from amq.checkpoint.record import QuantizationRecord
from amq.configuration import Configuration, Memory, memory_items, parse_pins
from amq.errors import AmqError
from amq.formats import FORMATS, NO_ROTATION, BitFormat, get_format
from amq.model.calibration import shared_inputs
from amq.model.inventory import EMBEDDING, HEAD, Inventory, LinearSpec, get_weight
from amq.model.open import fingerprint as content_hash
from amq.model.opened import OpenModel, open_model
from amq.model.own_text import BUILT_IN
from amq.model.paging import after_reading, holding, memory_text
from amq.model.perplexity import perplexity
from amq.model.settings import AUTO
from amq.model.shape import ModelShape
from amq.model.text import Corpus, fixed_windows
from amq.model.usable import Usable
from amq.packing import PackedWeight
from amq.quantize.autoround import AutoRoundSource
from amq.quantize.bank import BankRecipe
from amq.quantize.blocks import BlockQuantizer, BlockResult, BlockSource, install
from amq.quantize.head import check_grid, quantize_outer, with_outer
from amq.quantize.log import LinearOutcome, OuterOutcome, PerplexityFigures, QuantizationLog, SourceEntry
from amq.quantize.methods import METHODS, rotation_of
from amq.quantize.output import CheckpointOutput, stored_dtype
from amq.quantize.plan import HEADERS, check_disk, plan_text, time_text, working_bytes
from amq.quantize.resume import Identity, WorkFolder
from amq.quantize.rotate import check_widths
from amq.quantize.settings import QuantizeSettings
from amq.quantize.shown import errors_text, experts_outcomes, warn_of
from amq.quantize.sources import BankSource
from amq.quantize.tune import Tuner
from amq.util.folders import check_new_folder
from amq.util.machine import peak_memory_bytes
from amq.util.progress import Progress

SHARING_TOKENS = 16


@dataclass(frozen=True)
class QuantizeResult:
    """output: the checkpoint folder. log: the content of its quantization.json."""

    output: Path
    log: QuantizationLog


def run_quantize(settings: QuantizeSettings, resume: bool = False, progress: Progress | None = None) -> QuantizeResult:
    """Quantizes a model into a checkpoint folder; raises AmqError for bad input before anything is written."""
    progress = progress or Progress()
    started = time.monotonic()
    output = Path(settings.output)
    check_new_folder(output)
    with WorkFolder(output, Identity.of(settings), resume) as work:
        job = _prepare(settings, output, progress)
        perplexities = _Perplexities(settings, job.opened, progress)
        log = _log(settings, job, perplexities)
        small = job.output.try_out(log)
        dtype = job.output.dtype
        tuner = Tuner(settings, job.opened, job.configuration, dtype, progress) if settings.tune is not None else None
        _say_plan(settings, job, work, perplexities, small, progress, tuner)
        source = _source(settings, job, progress)
        work.begin(_identity(settings, job, source), job.record)
        if tuner is not None:
            tuner.learn(progress)
        perplexities.measure("full")
        packed, errors = _outer(job, settings.zero_points)
        results = _blocks(source, work, job, progress)
        perplexities.measure(settings.method)
        for result in results:
            errors |= result.errors
            packed |= result.packed
        tuning = None
        if tuner is not None:
            packed, tuning = tuner.run(packed, progress)
            perplexities.measure(f"{settings.method}, tuned")
        log = replace(
            log, perplexity=perplexities.figures, **_outcomes(job, errors, packed), tuning=tuning,
            notes=tuple(sorted({note for result in results for note in result.notes})),
            seconds=round(time.monotonic() - started, 1),
            peak_memory_bytes=peak_memory_bytes(),
        )  # fmt: skip
        job.output.write(packed, log)
        work.remove()
    return QuantizeResult(output, log)


@dataclass(frozen=True)
class _Job:
    """A loaded model with all that is decided about it before the first block.

    windows: int64 [windows, length], of the calibration text. rotation: of `ROTATIONS`, what it comes to.
    """

    opened: OpenModel
    configuration: Configuration
    corpus: Corpus
    windows: Tensor
    record: QuantizationRecord
    output: CheckpointOutput
    rotation: str

    @property
    def inventory(self) -> Inventory:
        return self.opened.inventory

    @property
    def outer(self) -> dict[LinearSpec, BitFormat]:
        """Head and embeddings that are quantized."""
        return _outer_formats(self.configuration, self.inventory)

    @property
    def linear_formats(self) -> dict[str, str]:
        """{linear of the blocks: format} of those that are quantized."""
        formats = self.configuration.quantized
        return {s.name: formats[s.name] for s in self.inventory.linears if s.name in formats}


def _outer_formats(configuration: Configuration, inventory: Inventory) -> dict[LinearSpec, BitFormat]:
    formats = configuration.quantized
    return {s: get_format(formats[s.name]) for s in inventory.outer if s.name in formats}


def _prepare(settings: QuantizeSettings, output: Path, progress: Progress) -> _Job:
    """Loads the model and refuses what does not fit it."""
    opened = open_model(settings.model, settings.dtype, settings.device, settings.trust_remote_code, settings.load)
    model, inventory = opened.model, opened.inventory
    configuration = _configuration(settings, opened.usable)
    _check_provenance(configuration, opened.fingerprint, settings.model)
    _check_cache(configuration, opened.shape)
    count = settings.windows
    sampler = opened.sampler(_text(settings), settings.window_length, settings.seed, count, progress)
    windows = sampler.take(count)
    for spec, fmt in _outer_formats(configuration, inventory).items():
        check_grid(spec, get_weight(model, spec.name).detach(), fmt, configuration.group_size)
    quantized, rotation = inventory.only(configuration.quantized), _rotation(settings, configuration)
    check_widths(rotation, quantized.linears)
    sharing = shared_inputs(model, quantized.linears, windows[:1, :SHARING_TOKENS].to(settings.device))
    record = _record(configuration, inventory, settings.method, sharing)
    dtype = stored_dtype(opened.folder, model)
    files = CheckpointOutput(
        output,
        opened.folder,
        opened.loaded,
        inventory,
        record,
        configuration,
        dtype,
        opened.usable.loaded,
        settings.trust_remote_code,
        opened.unused.kept,
    )
    return _Job(opened, configuration, sampler.corpus, windows, record, files, rotation)


def _calibrated(settings: QuantizeSettings) -> bool:
    method = METHODS.get(settings.method)
    return settings.method == "autoround" or (method is not None and method.calibrated)


def _text(settings: QuantizeSettings) -> str:
    """Windows that nothing is calibrated with here need no text that takes minutes to write."""
    return BUILT_IN if settings.calibration == AUTO and not _calibrated(settings) else settings.calibration


def _rotation(settings: QuantizeSettings, configuration: Configuration) -> str:
    """What is asked for, else what the configuration was searched with, else `auto`; of a bank what it has.

    `auto` goes by the formats that the linears have, and not by the one that decided for the search's bank.
    """
    provenance = configuration.details.provenance
    found = provenance.rotation if provenance else None
    if settings.method == "bank":
        found = _bank(settings, configuration).rotation
        if settings.rotation not in (None, AUTO if found in FORMATS else found):
            raise AmqError(
                f"--rotation {settings.rotation}: the bank that the configuration was searched on has {found}: "
                "leave --rotation out, or use --method gptq"
            )
    elif found in FORMATS:
        found = AUTO
    return rotation_of(settings.method, settings.rotation or found or AUTO, settings.zero_points)


def _bank(settings: QuantizeSettings, configuration: Configuration) -> BankRecipe:
    """Of `--method bank`."""
    return BankRecipe(
        "gptq", configuration.group_size, settings.calibration, settings.windows, settings.window_length, settings.seed,
        settings.rotation or AUTO,
    ).of(configuration)  # fmt: skip


def _identity(settings: QuantizeSettings, job: _Job, source: BlockSource) -> Identity:
    """What a finished block depends on; what settings only name is hashed."""
    windows = content_hash([("windows", job.windows)])
    inputs = {"calibration text": job.corpus.sha256, "calibration windows": windows}
    if isinstance(source, BankSource):
        inputs["bank"] = source.key
    formats, group_size = dict(job.record.formats), job.record.group_size
    of = job.opened.fingerprint
    known, rotation = Identity.of(settings), job.rotation
    return replace(known, model=of, formats=formats, group_size=group_size, rotation=rotation, inputs=inputs)


def _say_plan(
    settings: QuantizeSettings,
    job: _Job,
    work: WorkFolder,
    perplexities: _Perplexities,
    small: int,
    progress: Progress,
    tuner: Tuner | None,
) -> None:
    """Says what is going to happen; raises AmqError where memory or disk do not suffice.

    small: bytes of the checkpoint's other files.
    """
    method, calibrated = METHODS.get(settings.method), _calibrated(settings)
    scales = method is not None and method.scales
    memory = working_bytes(
        job.opened.model, job.inventory, job.configuration, job.record.shared_inputs, job.windows, calibrated, scales,
        job.rotation != NO_ROTATION,
    )  # fmt: skip
    if tuner is not None:
        memory = tuner.kept_bytes + max(memory, tuner.working_bytes)
    checkpoint = _memory(job).total
    needed = checkpoint + job.configuration.bytes(job.inventory.linears) + small + HEADERS - work.nbytes
    disk = needed, check_disk(Path(settings.output), needed)
    progress.say(
        plan_text(job.inventory, job.configuration, settings.method, checkpoint, memory, disk, settings.device)
    )
    if text := memory_text(job.opened.model):
        progress.say(text)
    if tuner is not None:
        progress.say(tuner.plan())
    progress.say(perplexities.plan())
    done = work.finished(job.inventory.n_blocks)
    there = (
        f"{done} of {job.inventory.n_blocks} blocks are there"
        if done
        else "what a block takes is measured on the first"
    )
    progress.say(f"plan: {there}")


def _memory(job: _Job) -> Memory:
    """The checkpoint's size, itemised."""
    return Memory.of(memory_items(job.inventory, job.configuration))


def _outer(job: _Job, zero_points: str) -> tuple[dict[str, PackedWeight], dict[str, float]]:
    """Rounds head and embeddings in place: {name: weight} and {name: relative error}."""
    made = {
        spec.name: quantize_outer(job.opened.model, spec, fmt, job.record.group_size, zero_points)
        for spec, fmt in job.outer.items()
    }
    return {name: packed for name, (packed, _) in made.items()}, {name: error for name, (_, error) in made.items()}


def _outcomes(
    job: _Job, errors: Mapping[str, float], packed: Mapping[str, PackedWeight] | None = None
) -> dict[str, Any]:
    """What quantization.json says of every weight. errors: relative ones of linears, head and embeddings, as far as
    they are known. packed: what has been made of them."""
    formats, linears = job.configuration.formats, job.inventory.linears

    def outer(spec: LinearSpec, fmt: BitFormat) -> OuterOutcome:
        size = fmt.stored_bytes(spec.out_features, spec.in_features, job.record.group_size)
        return OuterOutcome(
            name=spec.name, format=fmt.name, shape=(spec.out_features, spec.in_features), bytes=size,
            relative_error=errors.get(spec.name), embedding=spec.tied or None,
        )  # fmt: skip

    def linear(spec: LinearSpec) -> LinearOutcome:
        made = packed.get(spec.name) if packed else None
        rotation = made.rotation or None if made else None
        return LinearOutcome(formats[spec.name], (spec.out_features, spec.in_features), errors.get(spec.name), rotation)

    head = [outer(spec, fmt) for spec, fmt in job.outer.items() if spec.kind == HEAD]
    return {
        "linears": {s.name: linear(s) for s in linears},
        "experts": experts_outcomes(linears, formats, errors),
        "head": head[0] if head else None,
        "embeddings": tuple(outer(spec, fmt) for spec, fmt in job.outer.items() if spec.kind == EMBEDDING),
    }


def _log(settings: QuantizeSettings, job: _Job, perplexities: _Perplexities) -> QuantizationLog:
    """What quantization.json says, as far as it is known before the first block."""
    return QuantizationLog(
        settings=replace(settings, calibration=job.corpus.name),
        model=SourceEntry(settings.model, job.opened.fingerprint),
        calibration_sha256=job.corpus.sha256,
        window_prefix=tuple(job.corpus.prefix_names),
        bits_per_weight=round(job.configuration.bits_per_weight(job.inventory.weights), 4),
        memory=_memory(job),
        perplexity=perplexities.figures,
        not_quantized=job.opened.usable.reasons,
        **_outcomes(job, {}),
    )


def _record(
    configuration: Configuration, inventory: Inventory, method: str, sharing: tuple[tuple[str, ...], ...]
) -> QuantizationRecord:
    formats, outer = configuration.quantized, _outer_formats(configuration, inventory)
    shapes = {s.name: (s.out_features, s.in_features) for s in (*inventory.linears, *outer)}
    kept = {name: shapes.pop(name) for name in list(shapes) if name not in formats}
    stored = {other.name for other in inventory.others}  # a tied pair under one of its names
    kept |= {
        name: (s.out_features, s.in_features)
        for s in configuration.of(inventory.outer)
        for name in (s.name, s.tied)
        if s.name not in formats and f"{name}.weight" in stored
    }
    heads = [s.name for s in outer if s.kind == HEAD]
    tied = {s.tied: s.name for s in outer if s.tied}
    embedding = tied | {s.name: s.name for s in outer if s.kind == EMBEDDING}
    head = heads[0] if heads else ""
    return QuantizationRecord(
        formats, shapes, configuration.group_size, method, sharing, head, embedding, kept, cache=configuration.cache
    )


def _configuration(settings: QuantizeSettings, usable: Usable) -> Configuration:
    """What is asked for, pins, head and embeddings included; names exactly the linears that can be quantized."""
    inventory = usable.inventory
    if settings.uniform:
        configuration = Configuration.uniform(inventory.linears, get_format(settings.uniform), settings.group_size)
    else:
        configuration = Configuration.load(Path(settings.configuration))
        configuration.check(inventory.linears, usable.reasons, inventory.outer)
    pins = {name: fmt.name for name, fmt in parse_pins(settings.pin, inventory.linears).items()}
    given = {HEAD: settings.head, EMBEDDING: settings.embeddings}
    formats = with_outer({**configuration.formats, **pins}, inventory, usable.reasons, given)
    configuration = replace(configuration, formats=formats)
    if not inventory.only(configuration.quantized).linears:
        raise AmqError("every linear is kept in 16 bits: nothing is left to quantize")
    return configuration


def _check_cache(configuration: Configuration, shape: ModelShape) -> None:
    if configuration.cache:
        try:
            shape.cache_kinds(configuration.cache)
        except AmqError as error:
            raise AmqError(f"the configuration's cache: {error}; correct it, or take `cache` out") from None


def _check_provenance(configuration: Configuration, fingerprint: str, model: str) -> None:
    provenance = configuration.details.provenance
    if provenance and provenance.model_fingerprint not in (None, fingerprint):
        raise AmqError(
            f"the configuration was searched on other weights than those of {model} in this --dtype: search it, or "
            "remove model_fingerprint from the file's provenance if you know that it fits"
        )


def _source(settings: QuantizeSettings, job: _Job, progress: Progress) -> BlockSource:
    """What makes block after block."""
    loaded, windows, formats = job.opened.loaded, job.windows, job.linear_formats
    model, group_size, zero_points = loaded.model, job.configuration.group_size, settings.zero_points
    quantized = job.inventory.only(formats)
    if settings.method in METHODS:
        method, dtype = METHODS[settings.method], job.output.dtype
        return BlockQuantizer(
            model, job.inventory, formats, group_size, method, windows, zero_points, dtype, job.rotation
        )
    if settings.method == "bank":
        recipe, wanted = _bank(settings, job.configuration), set(formats.values())
        bank = recipe.open(loaded, quantized, wanted, progress, job.opened.fingerprint)
        return BankSource(model, quantized, formats, bank)
    iterations = settings.autoround_iterations
    return AutoRoundSource(loaded, quantized, formats, group_size, windows, zero_points, iterations, settings.seed)


def _blocks(source: BlockSource, work: WorkFolder, job: _Job, progress: Progress) -> list[BlockResult]:
    """Every block's result, from the work folder where it is there."""
    count, specs = job.inventory.n_blocks, {s.name: s for s in job.inventory.linears}
    results: list[BlockResult] = []
    measured = False
    with progress.stage("quantize", count) as step:
        for block in range(count):
            start = time.monotonic()
            note, made = "is there", not work.has(block)
            with holding(job.opened.model, block):
                if made:
                    work.save(block, source.make(block))
                result = work.load(block)  # mapped, so that finished blocks take no memory
                source.finish(result)
            after_reading(job.opened.model, block, partial(install, job.opened.model, result))
            if made:
                note = errors_text(result, specs)
                warn_of(result, specs)
            results.append(result)
            seconds = time.monotonic() - start
            step(f"block {block}: {note}, {seconds:.1f} s")
            if made and not measured and block + 1 < count:
                measured, left = True, count - block - 1
                progress.say(f"plan: {left} blocks more at {seconds:.1f} s take about {time_text(left * seconds)}")
    return results


class _Perplexities:
    """Perplexity of the model in memory, before and after: what the model card shows."""

    def __init__(self, settings: QuantizeSettings, opened: OpenModel, progress: Progress) -> None:
        self._model, self._progress = opened.model, progress
        self.figures: PerplexityFigures | None = None
        if settings.perplexity == "none":
            return
        corpus = opened.corpus(settings.perplexity)
        self._windows = fixed_windows(corpus, settings.window_length, settings.perplexity_tokens)
        self._unscored = corpus.unscored
        self.figures = PerplexityFigures(
            text=settings.perplexity, tokens=self._windows[:, corpus.unscored :].numel(),
            window_length=settings.window_length, window_prefix=tuple(corpus.prefix_names), rows={},
        )  # fmt: skip

    def plan(self) -> str:
        """What the two measurements will take, by one window."""
        if self.figures is None:
            return "plan: no perplexities (--perplexity TEXT measures them)"
        start = time.monotonic()
        perplexity(self._model, self._windows[:1])
        seconds = time_text(len(self._windows) * (time.monotonic() - start))
        return (
            f"plan: the perplexities before and after, on {self._windows.numel()} tokens, take about {seconds} each "
            "(one window was measured); --perplexity none leaves them out"
        )

    def measure(self, name: str) -> None:
        if self.figures is None:
            return
        with self._progress.stage("perplexity", 1) as step:
            value = perplexity(self._model, self._windows, self._unscored)
            step(f"{name}: {value:.3f}")
        rows = {**self.figures.rows, name: value if math.isfinite(value) else None}
        self.figures = replace(self.figures, rows=rows)
