"""Measures a `SpeedTable`: the kernels one shape and format at a time, the rest with the whole engine.

The engine runs drawn weights (`drawn.Drawn`) in the narrowest format, which fits where the model will; what its pass
takes beyond its linears' own times is the rest. A format's times are of `linear_each`, native calls without Python in
between, over as many copies as the model would have bytes in that format: what a cache holds of the model, it holds of
these. 16 bits have no such call: a second engine keeps the weights of that shape, and the difference counts.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amq.errors import AmqError
from amq.formats import FORMATS, KEPT, get_format
from amq.kernels import cpu
from amq.kernels.cpu import empty_bytes, prepared_bytes
from amq.model.speed_table import SpeedTable, kernels, model_key, shape_key
from amq.model.weight_files import weight_files
from amq.packing import PreparedWeight
from amq.runtime.decoder_spec import DecoderSpec, Linear, Mixture, Router
from amq.runtime.drawn import Drawn, draw
from amq.runtime.engine import Segment
from amq.runtime.native_engine import NativeEngine
from amq.runtime.native_weights import ALIGNMENT, NativeWeights
from amq.runtime.weights import expert_linears
from amq.util.files import read_json
from amq.util.limits import free_memory
from amq.util.machine import cpu_name
from amq.util.progress import Progress, Step
from amq.util.tensors import open_files

Shape = tuple[int, int]
TOKENS, ROUNDS, PARTS = 49, 13, 4
"""Tokens decoded at each depth, calls over all copies of a weight; how many parts `quiet` makes of either."""
TIMES, MIXTURES = 3, 3
"""Whole measurements; and mixtures of formats, drawn for each weight, by which the engine's times are fitted."""
ENOUGH = 0.7
"""Of the free memory, which a model of drawn weights may take."""
MOST_STEP = 1.5
"""Of a scale from one format to the next, and of that of mixtures: what is beyond is another process's doing."""
MOST_COPIES, SHARE = 4096, 4
"""Of one weight, and the part of the free memory that they may take."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How the engine will be opened. rows: sequences that decode together. depths: positions before a token."""

    group_size: int
    activations: str = "int8"
    cache: str = "float16"
    threads: int
    rows: int = 1
    depths: tuple[int, ...] = (0, 1024)


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights. config: of the file `source`; names: of its tensors."""

    config: Mapping[str, Any]
    source: str
    names: frozenset[str]

    @staticmethod
    def of(folder: Path) -> Skeleton:
        """Of a checkpoint or a model's folder; no weight is read."""
        source = folder / "config.json"
        config = read_json(source, floats=True)
        names = open_files(weight_files(folder))
        packed = config.get("quantization_config", {}).get("formats", {})
        return Skeleton(config, str(source), frozenset({*names, *packed}))

    def drawn(self, formats: Mapping[str, str], group_size: int) -> Drawn:
        return Drawn(self.config, self.source, self.names, formats, group_size)

    @property
    def key(self) -> str:
        return model_key(self.config)


def shapes_of(spec: DecoderSpec) -> tuple[dict[str, Shape], dict[str, float]]:
    """({weight: its shape}, {weight: how often a token is multiplied by it}) of linears and head, but routers."""
    routers = {router.weight.name for router in spec.parts(Router)}
    shapes = {one.name: (one.out_features, one.in_features) for one in spec.parts(Linear) if one.name not in routers}
    shapes[spec.head.name] = spec.head.rows, spec.head.columns
    reads = dict.fromkeys(shapes, 1.0)
    for mixture in spec.parts(Mixture):
        share = mixture.router.top_k / len(mixture.experts)
        reads |= {linear.name: share for linear in expert_linears(mixture)}
    return shapes, reads


def measure(
    model: Skeleton, wanted: Mapping[Shape, Collection[str]], how: How, progress: Progress | None = None,
    times: int = TIMES,
) -> SpeedTable:  # fmt: skip
    """wanted: {shape: formats, 16 bits among them or not}; of the model's other shapes one format is measured besides.

    Everything is measured `times` times from the beginning, and medians count: a shared machine's speed wanders for
    longer than one figure takes. Raises `Unsupported` where our engine lacks the family, AmqError where memory does not
    suffice.
    """
    base = next((f for f in FORMATS if any(f in formats for formats in wanted.values())), next(iter(FORMATS)))
    shapes, reads = shapes_of(model.drawn({}, how.group_size).spec)
    formats = {shape: {base, *wanted.get(shape, ())} for shape in sorted(set(shapes.values()))}
    with (progress or Progress()).stage("speed table", times * (1 + sum(map(len, formats.values())))) as step:
        found = [_measure(model, formats, shapes, reads, how, step) for _ in range(times)]
    linears = {
        shape: {name: statistics.median(one[0][shape][name] for one in found) for name in row}
        for shape, row in found[0][0].items()
    }
    depths = {str(depth): statistics.median(one[1][depth] for one in found) for depth in how.depths}
    return SpeedTable(
        processor=cpu_name(), isa=cpu.cpu_module().isa(), threads=how.threads, kernels=kernels(), model=model.key,
        activations=how.activations, cache=how.cache, group_size=how.group_size, rows=how.rows, linears=linears,
        depths=depths,
    )  # fmt: skip


def _measure(
    model: Skeleton, formats: Mapping[Shape, Collection[str]], shapes: Mapping[str, Shape],
    reads: Mapping[str, float], how: How, step: Step,
) -> tuple[dict[str, dict[str, float]], dict[int, float]]:  # fmt: skip
    """(linears, depths) of a `SpeedTable`."""
    base, first = next(f for f in FORMATS if f in next(iter(formats.values()))), how.depths[0]
    all_of_them = dict.fromkeys(shapes, base)
    whole = _passes(model.drawn(all_of_them, how.group_size), how)
    step("the engine")
    linears: dict[str, dict[str, float]] = {}
    for shape, names in formats.items():
        row = linears[shape_key(*shape)] = {}
        for name in [f for f in FORMATS if f in names]:
            row[name] = _kernel(shape, name, _bytes(dict.fromkeys(shapes, name), shapes, how, reads), how)
            step(f"{shape_key(*shape)} {name}")
    beside = _fit_to_engine(model, linears, shapes, reads, whole[first], how)
    for shape in [s for s, names in formats.items() if KEPT.name in names]:
        kept = {n: f for n, f in all_of_them.items() if shapes[n] != shape}
        more = _passes(model.drawn(kept, how.group_size), how, depths=(first,))[first]
        count, row = sum(reads[n] for n in shapes if shapes[n] == shape), linears[shape_key(*shape)]
        row[KEPT.name] = max(*row.values(), row[base] + (more - whole[first]) / count)
        step(f"{shape_key(*shape)} {KEPT.name}")
    return linears, {depth: beside + max(0.0, seconds - whole[first]) for depth, seconds in whole.items()}


def _fit_to_engine(
    model: Skeleton, linears: dict[str, dict[str, float]], shapes: Mapping[str, Shape], reads: Mapping[str, float],
    least: float, how: How,
) -> float:  # fmt: skip
    """Scales each format's times so that the engine's pass in that format is met, where shapes lack it in the narrowest
    one that all have; returns what is no product.

    least: seconds of a pass in that narrowest format. A format in which the model does not fit the memory is scaled as
    the one before. Then all by mixtures of formats, which is what a search chooses.
    """
    beside, scale = 0.0, 1.0
    base = next(iter(_common(linears)))
    for name in [f for f in FORMATS if any(f in row for row in linears.values())]:
        chosen = {n: name if name in linears[shape_key(*s)] else base for n, s in shapes.items()}
        times = {n: reads[n] * linears[shape_key(*shapes[n])][fmt] for n, fmt in chosen.items()}
        products = sum(times[n] for n, fmt in chosen.items() if fmt == name)
        others = sum(times.values()) - products
        if name == base:
            scale = min(1.0, least / products)
            beside = least - scale * products
        elif _bytes(chosen, shapes, how) < free_memory() * ENOUGH:
            seconds = _passes(model.drawn(chosen, how.group_size), how, depths=how.depths[:1])[how.depths[0]]
            measured = (seconds - beside - others) / products
            scale = min(max(measured, scale / MOST_STEP), scale * MOST_STEP)
        for row in linears.values():
            row |= {name: row[name] * scale} if name in row else {}
    mixed = statistics.median(_mixed(model, linears, shapes, reads, beside, how))
    scale = min(max(mixed, 1 / MOST_STEP), MOST_STEP)
    for row in linears.values():
        row |= {name: seconds * scale for name, seconds in row.items()}
    return beside


def _mixed(
    model: Skeleton, linears: Mapping[str, Mapping[str, float]], shapes: Mapping[str, Shape],
    reads: Mapping[str, float], beside: float, how: How,
) -> Iterator[float]:  # fmt: skip
    """How many times as long as by the table the products of a model take whose weights have formats of their own: one
    call has parts in several formats then."""
    for seed in range(MIXTURES):
        rng = random.Random(seed)
        chosen = {name: rng.choice([f for f in FORMATS if f in linears[shape_key(*s)]]) for name, s in shapes.items()}
        products = sum(reads[n] * linears[shape_key(*shapes[n])][f] for n, f in chosen.items())
        seconds = _passes(model.drawn(chosen, how.group_size), how, depths=how.depths[:1])[how.depths[0]]
        yield (seconds - beside) / products


def _common(linears: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Formats that all shapes have times of, the narrowest first."""
    return [f for f in FORMATS if all(f in row for row in linears.values())]


def _bytes(
    formats: Mapping[str, str], shapes: Mapping[str, Shape], how: How, reads: Mapping[str, float] | None = None
) -> float:
    """Of all of `formats`, or (with `reads`) what a token reads of them."""
    each = {key: prepared_bytes(get_format(key[0]), *key[1], how.group_size)
            for key in {(fmt, shapes[name]) for name, fmt in formats.items()}}  # fmt: skip
    return sum(each[fmt, shapes[name]] * (1.0 if reads is None else reads[name]) for name, fmt in formats.items())


def _kernel(shape: Shape, fmt: str, footprint: float, how: How) -> float:
    """Seconds of one product in a row of those of `footprint` bytes."""
    size = prepared_bytes(get_format(fmt), *shape, how.group_size)
    room = min(footprint, free_memory() / SHARE)
    count = max(1, min(MOST_COPIES, int(room // size)))
    first = PreparedWeight.of(packed := draw(get_format(fmt), *shape, how.group_size), "cpu", cpu.prepare(packed))
    aligned = -(-size // ALIGNMENT) * ALIGNMENT
    memory = empty_bytes(aligned * count)
    copies = []
    for i in range(count):
        place = memory[i * aligned : i * aligned + size]
        place.copy_(first.data)
        copies.append(PreparedWeight.of(packed, "cpu", place))
    x = torch.randn(how.rows, shape[1], generator=torch.Generator().manual_seed(0))
    samples = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        cpu.linear_each(x, copies, how.activations)
        samples.append((time.perf_counter() - start) / count)
    return quiet(samples[1:])


def _passes(drawn: Drawn, how: How, depths: Sequence[int] = ()) -> dict[int, float]:
    """{depth: seconds of a pass that decodes a token of each sequence there}."""
    engine = open_drawn(drawn, how)
    return {depth: decode_seconds(engine, depth, how.rows) for depth in depths or how.depths}


def open_drawn(drawn: Drawn, how: How) -> NativeEngine:
    """With room for the deepest of `how.depths`; Raises AmqError where the model is for no such text."""
    context = max(how.depths) + TOKENS + 2
    if context > drawn.spec.longest:
        raise AmqError(
            f"the model is for {drawn.spec.longest} positions: give a --context or --depth that leaves {TOKENS}"
        )
    weights = NativeWeights(drawn, drawn.spec, context)
    options = {"int8": how.activations == "int8", "cache": (how.cache,) * drawn.spec.own_caches}
    return NativeEngine(weights, context, options, "", how.rows, how.threads)


def decode_seconds(engine: NativeEngine, depth: int, rows: int = 1, tokens: int = TOKENS) -> float:
    """The median pass that decodes one token of each of `rows` sequences with `depth` positions and more before it."""
    generator = torch.Generator().manual_seed(0)
    slots = []
    for _ in range(rows):
        prompt = torch.randint(engine.vocab_size, (depth + 1,), generator=generator).tolist()
        slot = engine.open(prompt, tokens, reuse=False)
        if slot is None:
            raise AmqError(f"the engine has no room for {rows} sequences of {depth + tokens} positions")
        for first in range(0, depth, engine.max_rows):
            part = prompt[first : min(depth, first + engine.max_rows)]
            engine.forward([Segment(slot, part, logits=False)])
        slots.append(slot)
    last: list[int] = [prompt[-1]] * rows
    samples = []
    for _ in range(tokens):
        start = time.perf_counter()
        logits = engine.forward([Segment(slot, [token]) for slot, token in zip(slots, last, strict=True)])
        last = logits.argmax(-1).tolist()
        samples.append(time.perf_counter() - start)
    for slot in slots:
        engine.close(slot)
    return quiet(samples[1:])


def quiet(samples: Sequence[float]) -> float:
    """The least of the medians of `PARTS` parts: what other work of the machine delays lasts longer than one pass, and
    rarely all of them."""
    size = -(-len(samples) // PARTS)
    return min(statistics.median(samples[i : i + size]) for i in range(0, len(samples), size))
