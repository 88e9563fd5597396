"""What the report shows of a run folder: points, memory, costs and scores, each in one record, and how figures read.

Everything is read through `RunFolder.open`; no file of a run is known here. The archive can hold 10,000 configurations
of hundreds of linears, so a line shrinks to its bits, its loss and a count of formats. Losses are nats/token, sizes
bytes; bits are bits per weight, scales and zero points included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from amq.configuration import MemoryItem
from amq.formats import STORED, get_format
from amq.search.archive import Record
from amq.search.run_folder import RunFolder

EPSILON = 1e-6
"""Two bits per weight closer than this are the same cost."""
NEIGHBOURS = 2
"""Front points on each side of the chosen one that the page compares it with."""


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
class Shown:
    """A run folder as the page and its charts see it."""

    folder: RunFolder

    @staticmethod
    def open(run_dir: Path) -> Shown:
        """Raises AmqError for a folder that is none of a search's; damaged files are named when they are read."""
        return Shown(RunFolder.open(run_dir))

    @cached_property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.folder.run.linears)

    @cached_property
    def evaluated(self) -> list[Record]:
        """The archive without its confirmations."""
        return [record for record in self.folder.archive if record.windows == "search"]

    @cached_property
    def front(self) -> list[Point]:
        """By rising bits; empty where the run has no front.json yet."""
        points = self.folder.front.front if self.folder.front else ()
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
        if self.folder.configuration is None:
            return None
        of = self.folder.configuration
        bits = of.bits_per_weight(self.folder.run.linears)
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
    def neighbours(self) -> list[Point]:
        """The chosen point between the next smaller and larger ones of the front; empty where none was chosen."""
        at = next((i for i, p in enumerate(self.choices) if self.is_chosen(p)), None)
        return [] if at is None else self.choices[max(0, at - NEIGHBOURS) : at + NEIGHBOURS + 1]

    @property
    def memory(self) -> tuple[MemoryItem, ...]:
        details = self.folder.configuration.details if self.folder.configuration else None
        return details.memory.items if details and details.memory else ()

    @property
    def others(self) -> list[MemoryItem]:
        """`memory` without the linears: what every configuration needs."""
        return [item for item in self.memory if not item.name.startswith("linears")]

    def size(self, point: Point) -> int:
        """Bytes of everything that `memory` lists, with the linears of `point`; of its linears alone without a list."""
        return sum(item.bytes for item in self.others) + round(point.bits * self.numel / 8)

    @property
    def size_16(self) -> int:
        """As `size`, with all linears in 16 bits."""
        return sum(item.bytes for item in self.others) + 2 * self.numel

    @cached_property
    def roles(self) -> dict[str, str]:
        """{role: label} in the model's order: the role's last part where that stays unambiguous."""
        roles = list(dict.fromkeys(spec.role for spec in self.folder.run.linears))
        tails = [role.rsplit(".", 1)[-1] for role in roles]
        return dict(zip(roles, tails if len(set(tails)) == len(tails) else roles, strict=True))


def format_bits(name: str) -> float:
    """Code bits of a format; a name from a newer registry sorts last."""
    return STORED[name].code_bits if name in STORED else math.inf


def sort_formats(names: Iterable[str]) -> list[str]:
    """Distinct format names, fewest bits first."""
    return sorted(set(names), key=lambda name: (format_bits(name), name))


def count_formats(names: Iterable[str]) -> str:
    """`"45 × int2, 120 × int3"`: how many linears hold each format, fewest bits first."""
    counts = Counter(names)
    return ", ".join(f"{counts[name]} × {name}" for name in sort_formats(counts))


def show_loss(loss: float | None) -> str:
    """Three significant digits without an exponent above 1e-5; a dash for None."""
    if loss is None:
        return "–"
    if loss == 0 or abs(loss) < 1e-5:
        return f"{loss:.2g}"
    return f"{loss:.{max(0, 2 - math.floor(math.log10(abs(loss))))}f}"


def show_bits(bits: float | None) -> str:
    return "–" if bits is None else f"{bits:.2f}"


def show_bytes(count: float) -> str:
    """Binary units, three significant digits: "812 MiB", "−1.35 GiB"."""
    sign, count = "−" * (count < 0), abs(count)
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{sign}{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{sign}{count:.0f} B"


def show_change(new: float | None, old: float | None) -> str:
    """`"+12 %"`, `"−3 %"`; a dash where either is unknown."""
    if new is None or not old:
        return "–"
    percent = round(100 * (new / old - 1))
    return f"{percent:+d} %".replace("-", "−") if percent else "0 %"
