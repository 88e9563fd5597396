"""Measured sensitivities, and the paper's pruning rule.

A linear's sensitivity is the loss with that linear in the lowest format and all others in the highest (AMQ, §3.2). A
linear whose sensitivity exceeds `threshold` (2) times the median is pinned to the highest format. The rule is on the
loss itself, so it depends on the base loss of the uniform highest configuration; the paper's wording is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amq.search.loss_curve import saturation
from amq.search.problem import Problem, Table
from amq.util.records import JsonFile


@dataclass(frozen=True, kw_only=True)
class Sensitivity(JsonFile):
    """sensitivity.json. loss: {linear: loss, None where not finite}; pinned: linears above threshold × median."""

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


def prune(loss: dict[str, float], threshold: float) -> tuple[float, tuple[str, ...]]:
    """(median, linears whose loss exceeds threshold × median)."""
    median = float(np.median(list(loss.values())))
    return median, tuple(name for name, value in loss.items() if value > threshold * median)


def measure(problem: Problem, threshold: float) -> Sensitivity:
    """One linear in the lowest format, all others in the highest, for every linear that is not pinned by the user."""
    space = problem.space
    lowest, highest = space.format_names[0], space.format_names[-1]
    base = space.decode(np.full(len(space.variables), len(space.formats) - 1))
    base_loss = problem.evaluate(base, "uniform").loss
    free = [s.name for s in space.linears if s.name not in space.pinned]
    records = problem.sensitivities(base, [(name, lowest) for name in free])
    median, pinned = prune({name: records[name, lowest].ranked for name in free}, threshold)
    return Sensitivity(
        lowest=lowest, highest=highest, base_loss=base_loss, median=median if np.isfinite(median) else None,
        threshold=threshold, pinned=pinned, loss={name: records[name, lowest].loss for name in free},
    )  # fmt: skip


def sensitivity_costs(problem: Problem) -> Table:
    """Measured losses as a cost table: T(one linear in a format) − T(base), at least 0, for every format.

    T is `loss_curve.saturation`, in which losses add up. The highest format costs nothing here: what it costs the base
    is the same for every configuration.
    """
    space = problem.space
    highest = len(space.formats) - 1
    base = space.decode(np.full(len(space.variables), highest))
    base_record = problem.evaluate(base, "uniform")
    changes = [(s.name, f) for s in space.linears if s.name not in space.pinned for f in space.format_names[:-1]]
    records = problem.sensitivities(base, changes)
    zero = float(saturation(np.array(base_record.ranked)))
    table: Table = {
        s.name: dict.fromkeys((*space.format_names, *(f.name for f in space.pinned.values())), 0.0)
        for s in space.quantized
    }
    for (name, fmt), record in records.items():
        table[name][fmt] = max(0.0, float(saturation(np.array(record.ranked))) - zero)
    # a constant for the base makes sums comparable with losses: T(base) is spread over quantized linears by size
    numel = sum(spec.numel for spec in space.quantized)
    for spec in space.quantized:
        for fmt in table[spec.name]:
            table[spec.name][fmt] += zero * spec.numel / numel
    return table
