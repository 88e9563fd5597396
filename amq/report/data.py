"""What the report shows of a run folder: its points and what they take, and how figures read.

Everything is read through `RunFolder.open`. Losses are in the objective's unit, sizes bytes; bits are bits per weight,
scales and zero points included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from amq.configuration import CACHE, Configuration, MemoryItem, bytes_read, compact, memory_items
from amq.errors import AmqError
from amq.formats import KEPT, STORED, get_format
from amq.model.inventory import EXPERT
from amq.model.losses import OBJECTIVES, Objective
from amq.search.archive import Record
from amq.search.loss_curve import fit_records, table_cost
from amq.search.refine import PHASE as REFINE
from amq.search.run_folder import RunFolder
from amq.search.space import is_outer
from amq.search.speed import Speed

SIZES = 4
"""Of which the speed chart has a line each, evenly between the smallest and the largest, and of that."""
EPSILON = 1e-6
"""Two bits per weight closer than this are the same cost."""


@dataclass(frozen=True)
class Point:
    """A configuration. A loss is None where it was not measured, or not predicted; name: of a uniform one."""

    bits: float
    loss: float | None
    heldout: float | None
    predicted: float | None
    formats: Mapping[str, str]
    name: str = ""

    @property
    def lost(self) -> float:
        """Its loss, the predicted one where none was measured, infinite where neither is known."""
        return next((loss for loss in (self.loss, self.predicted) if loss is not None), math.inf)


@dataclass(frozen=True)
class Cell:
    """A weight on the maps, or the experts of a layer and role. block: None outside of blocks, where `role` is its
    name."""

    name: str
    role: str
    block: int | None
    members: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A run folder as the page and its charts see it. Its files are read, and damage to them named, when asked for."""

    folder: RunFolder

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.folder.settings.loss]

    @cached_property
    def cells(self) -> list[Cell]:
        """In the model's order; head and embeddings, where they were searched, in the end."""
        groups: dict[tuple[str, int | None], list[str]] = {}
        for spec in self.folder.space.weights:
            key = (spec.name, None) if is_outer(spec) else (self.roles[spec.role], spec.block)
            groups.setdefault(key, []).append(spec.name)
        return [
            Cell(", ".join(compact(dict.fromkeys(names))), role, block, tuple(names))
            for (role, block), names in groups.items()
        ]

    @cached_property
    def speed(self) -> Speed | None:
        """What a token takes, where the search asked."""
        folder = self.folder
        if folder.speed is None:
            return None
        of = folder.settings
        return Speed.of(folder.speed, folder.inventory, folder.space, of.context, of.min_speed)

    def timed(self, formats: Mapping[str, str]) -> dict[str, float]:
        """Bits per weight and tokens/s by the speed table, as a row of a chart."""
        assert self.speed is not None, "the search asked for speed"
        bits = self.folder.space.bits_of(formats)
        return {"bits": round(bits, 4), "tokens/s": round(1 / self.speed.seconds(formats), 3)}

    @cached_property
    def trades(self) -> list[tuple[float, Mapping[str, str], float]]:
        """(bits per weight at most, formats, predicted loss) by the search's tables: for some sizes, what is best as
        time is worth more, as long as that is faster; empty where there is no cost table, or nothing fits it."""
        folder, speed = self.folder, self.speed
        if folder.cost is None or speed is None:
            return []
        table, space = folder.cost.cost, folder.space
        fit = fit_records(folder.archive, table, self.objective.ceiling)
        if fit is None:
            return []
        low, high = space.front_range
        costs, found = space.variable_costs(table), list[tuple[float, Mapping[str, str], float]]()
        for bits in np.linspace(low, high, SIZES + 2)[1:]:
            fastest = 0.0
            for formats in map(space.decode, speed.fastest(costs, space.capacity(float(bits)))):
                if (now := 1 / speed.seconds(formats)) > fastest:
                    fastest = now
                    loss = float(fit.predict(np.array(table_cost(table, formats))))
                    found.append((round(float(bits), 2), formats, loss))
        return found

    @property
    def has_experts(self) -> bool:
        return any(spec.kind == EXPERT for spec in self.folder.inventory.linears)

    @cached_property
    def widest(self) -> dict[str, str]:
        """Everything that was searched in 16 bits."""
        return dict.fromkeys((spec.name for spec in self.folder.space.weights), KEPT.name)

    @cached_property
    def evaluated(self) -> list[Record]:
        """The archive without its confirmations."""
        return [record for record in self.folder.archive if record.windows == "search"]

    @cached_property
    def is_refined(self) -> bool:
        """Whether the choice looked at the held-out windows, as refinement does, asked for or by default."""
        return any(record.phase == REFINE for record in self.folder.archive)

    @cached_property
    def front(self) -> list[Point]:
        """By rising bits, empty before the search has one. Raises AmqError for points that are not the run's."""
        points = self.folder.front.front if self.folder.front else ()
        try:
            for point in points:
                self.folder.space.check(point.configuration)
        except ValueError as error:
            raise AmqError(f"{self.folder.path / 'front.json'}: {error}; the file is damaged or was edited") from None
        found = (Point(p.bits_per_weight, p.loss, p.loss_confirm, p.predicted, p.configuration) for p in points)
        return sorted(found, key=lambda p: p.bits)

    @cached_property
    def uniform(self) -> list[Point]:
        points = self.folder.front.uniform if self.folder.front else ()
        formats = ((p, self.folder.space.uniform(get_format(p.name))) for p in points)
        found = (Point(p.bits_per_weight, p.loss, p.loss_confirm, None, f, p.name) for p, f in formats)
        return sorted(found, key=lambda p: p.bits)

    @cached_property
    def chosen(self) -> Point | None:
        """What configuration.json holds; None before the search has chosen."""
        of = self.folder.configuration
        if of is None:
            return None
        of.check(self.folder.inventory.linears, outer=self.folder.inventory.outer)
        bits = of.bits_per_weight(self.folder.inventory.weights)
        return Point(bits, of.details.loss, of.details.loss_confirm, of.details.predicted_loss, of.formats)

    @cached_property
    def choices(self) -> list[Point]:
        """The points of the front, with the chosen one among them, by rising bits."""
        if self.chosen is None or any(self.is_chosen(p) for p in self.front):
            return self.front
        return sorted([*self.front, self.chosen], key=lambda p: p.bits)

    def is_chosen(self, point: Point) -> bool:
        return self.chosen is not None and point.formats == self.chosen.formats

    def kind(self, point: Point) -> str:
        """Its kind of mark in a chart, one of `amq.report.charts.KINDS`."""
        return "uniform" if point.name else "chosen" if self.is_chosen(point) else "front"

    @property
    def memory(self) -> tuple[MemoryItem, ...]:
        details = self.folder.configuration.details if self.folder.configuration else None
        return details.memory.items if details and details.memory else ()

    def items(self, formats: Mapping[str, str]) -> list[MemoryItem]:
        """`memory` of another configuration, with the same KV cache."""
        cache = [item for item in self.memory if item.name == CACHE]
        return [*memory_items(self.folder.inventory, self._with(formats)), *cache]

    def size(self, formats: Mapping[str, str]) -> int:
        """Bytes of all that `items` lists; of what has a format alone, where nothing says what else there is."""
        if not self.memory:
            return self._with(formats).bytes(self.folder.inventory.weights)
        return sum(item.bytes for item in self.items(formats))

    def read(self, formats: Mapping[str, str]) -> float:
        """Bytes of weights that one token reads."""
        return bytes_read(self.folder.inventory, self._with(formats))

    def _with(self, formats: Mapping[str, str]) -> Configuration:
        return Configuration(formats, self.folder.settings.group_size)

    @cached_property
    def roles(self) -> dict[str, str]:
        """{role: label} in the model's order: the role's last part where that stays unambiguous."""
        roles = list(dict.fromkeys(spec.role for spec in self.folder.inventory.linears))
        tails = [role.rsplit(".", 1)[-1] for role in roles]
        return dict(zip(roles, tails if len(set(tails)) == len(tails) else roles, strict=True))


def is_of_linears(item: MemoryItem) -> bool:
    """Whether it is one of what `memory_items` says of linears in blocks."""
    return item.name.startswith("linears")


def sort_formats(names: Iterable[str]) -> list[str]:
    """Distinct format names, fewest bits first."""
    return sorted(set(names), key=lambda name: (STORED[name].code_bits, name))


def count_formats(names: Iterable[str]) -> str:
    """`"45 × int2, 120 × int3"`: how many linears hold each format, fewest bits first."""
    counts = Counter(names)
    return ", ".join(f"{counts[name]} × {name}" for name in sort_formats(counts))


def show_loss(loss: float | None) -> str:
    """Three significant digits without an exponent above 1e-5; a dash for one that is unknown."""
    if loss is None or math.isinf(loss):
        return "–"
    if loss == 0 or abs(loss) < 1e-5:
        return f"{loss:.2g}"
    return f"{loss:.{max(0, 2 - math.floor(math.log10(abs(loss))))}f}"


def show_bytes(count: float, plus: str = "") -> str:
    """Binary units, three significant digits: "812 MiB", "−1.35 GiB". plus: a sign for what is above zero."""
    sign, count = "−" if count < 0 else plus * (count > 0), abs(count)
    unit, size = next((u for u in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)) if count >= u[1]), ("B", 1))
    value = count / size
    return f"{sign}{value:.{0 if size == 1 or value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def show_change(new: float | None, old: float | None) -> str:
    """`"+12 %"`, `"−3 %"`; a dash where either is unknown."""
    if new is None or not old or not math.isfinite(new / old):
        return "–"
    percent = round(100 * (new / old - 1))
    return f"{percent:+d} %".replace("-", "−") if percent else "0 %"
