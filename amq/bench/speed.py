"""`amq bench MODEL --table FILE`: a speed table of this machine, and its text for people."""

from __future__ import annotations

from amq.bench.settings import BenchSettings
from amq.formats import FORMATS, KEPT
from amq.model.open import resolve
from amq.model.shape import DEFAULT_CACHE
from amq.model.speed_table import SpeedTable
from amq.runtime.settings import AUTO_CACHE
from amq.runtime.speed_measure import How, Skeleton, measure, shapes_of
from amq.util.limits import fit_threads
from amq.util.progress import Progress


def speed_table(settings: BenchSettings, group_size: int, progress: Progress) -> SpeedTable:
    """Of every shape of the model in every format; the head also in 16 bits."""
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = Skeleton.of(resolve(settings.model, settings.trust_remote_code))
    spec = model.drawn({}, group_size).spec
    wanted = {shape: {*FORMATS} for shape in shapes_of(spec)[0].values()}
    wanted[spec.head.rows, spec.head.columns].add(KEPT.name)
    decoded = [case for case in settings.cases if case.decode]
    how = How(
        group_size=group_size, activations=settings.activations or "int8",
        cache=DEFAULT_CACHE if settings.cache == AUTO_CACHE else settings.cache,
        threads=settings.threads or fit_threads(), rows=decoded[0].sequences if decoded else 1,
        depths=tuple(dict.fromkeys(case.depth for case in settings.cases)),
    )  # fmt: skip
    return measure(model, wanted, how, progress)


def text(table: SpeedTable) -> str:
    """A line per shape, in microseconds."""
    names = [f for f in (*FORMATS, KEPT.name) if any(f in row for row in table.linears.values())]
    width = max(map(len, table.linears))
    lines = [f"µs per linear, {table.rows} rows, {table.processor}, {table.isa}, {table.threads} threads"]
    lines += [f"{'':{width}}" + "".join(f"{name:>9}" for name in names)]
    for shape, row in table.linears.items():
        cells = (f"{1e6 * row[name]:9.1f}" if name in row else " " * 9 for name in names)
        lines.append(f"{shape:{width}}" + "".join(cells))
    lines += [f"all else after {depth} tokens: {1e6 * seconds:.0f} µs" for depth, seconds in table.depths.items()]
    return "\n".join(lines)
