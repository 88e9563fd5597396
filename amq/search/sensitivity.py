"""Measured sensitivities, and the paper's pruning rule.

A linear's sensitivity is the loss with that linear in the lowest format and all others in the highest (AMQ, §3.2). A
linear whose sensitivity exceeds `threshold` (2) times the median is pinned to the highest format. The rule is on the
loss itself, so it depends on the base loss of the uniform highest configuration; the paper's wording is kept. What is
tied changes together, in one measurement: the experts of a layer and role, above all. A head or embedding that is
searched has 16 bits for its highest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from amq.configuration import compact, expand
from amq.formats import KEPT
from amq.search.loss_curve import saturation
from amq.search.problem import Problem, Table
from amq.util.files import write_json
from amq.util.records import JsonFile, to_json


@dataclass(frozen=True, kw_only=True)
class Sensitivity(JsonFile):
    """sensitivity.json. loss: {weight: loss, None where not finite}; pinned: weights above threshold × median.

    What is tied was measured together, and has that one loss. highest: of linears.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/sensitivity/1",)
    REMEDY: ClassVar[str] = "run the search again"

    schema: str = SCHEMAS[0]
    lowest: str
    highest: str
    base_loss: float | None
    median: float | None
    threshold: float
    pinned: tuple[str, ...]
    loss: dict[str, float | None]

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", expand(self.loss))
        object.__setattr__(self, "pinned", tuple(expand(dict.fromkeys(self.pinned))))

    def write(self, path: Path) -> None:
        short = {"pinned": list(compact(dict.fromkeys(self.pinned))), "loss": compact(self.loss)}
        write_json(path, {**to_json(self), **short})


def prune(loss: dict[str, float], threshold: float) -> tuple[float, tuple[str, ...]]:
    """(median, linears whose loss exceeds threshold × median)."""
    median = float(np.median(list(loss.values())))
    return median, tuple(name for name, value in loss.items() if value > threshold * median)


def measure(problem: Problem, threshold: float) -> Sensitivity:
    """Each variable in the lowest format, all others in their highest."""
    space = problem.space
    lowest, highest = space.format_names[0], space.format_names[-1]
    base = space.decode(space.largest)
    base_loss = problem.evaluate(base, "sensitivity").loss
    groups = {v[0].name: tuple(s.name for s in v) for v in space.variables}
    records = problem.sensitivities(base, [(group, lowest) for group in groups.values()])
    ranked = {name: records[group, lowest].ranked for name, group in groups.items()}
    median, pinned = prune(ranked, threshold)
    return Sensitivity(
        lowest=lowest, highest=highest, base_loss=base_loss, median=median if np.isfinite(median) else None,
        threshold=threshold, pinned=tuple(name for leader in pinned for name in groups[leader]),
        loss={name: records[group, lowest].loss for group in groups.values() for name in group},
    )  # fmt: skip


def sensitivity_costs(problem: Problem) -> Table:
    """Measured losses as a cost table: T(one variable in a format) − T(base), at least 0, for every format.

    T is `loss_curve.saturation`, in which losses add up. The highest format costs nothing here: what it costs the base
    is the same for every configuration. The cost of what is tied is spread over its members by size.
    """
    space = problem.space
    base = space.decode(space.largest)
    ceiling = problem.objective.ceiling
    zero = float(saturation(np.array(problem.evaluate(base, "sensitivity").ranked), ceiling))
    changes = [
        (tuple(s.name for s in v), fmt.name)
        for v, choices in zip(space.variables, space.choices, strict=True)
        for fmt in choices[:-1]
    ]
    records = problem.sensitivities(base, changes)
    table: Table = {s.name: {f.name: 0.0 for f in space.formats_of(s) if f is not KEPT} for s in space.quantized}
    numel = {s.name: s.numel for s in space.quantized}
    for (names, fmt), record in records.items():
        cost = max(0.0, float(saturation(np.array(record.ranked), ceiling)) - zero)
        size = sum(numel[name] for name in names)
        for name in names:
            table[name][fmt] += cost * numel[name] / size
    # a constant for the base makes sums comparable with losses: T(base) is spread by size over what is quantized in it
    quantized = [s for s in space.quantized if base[s.name] != KEPT.name]
    whole = sum(spec.numel for spec in quantized)
    for spec in quantized:
        for fmt in table[spec.name]:
            table[spec.name][fmt] += zero * spec.numel / whole
    return table
