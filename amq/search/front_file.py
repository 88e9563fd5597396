"""front.json: the uniform configurations, the Pareto front, what the fit predicts between its points, and how far the
losses hold on text that the search did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from amq.configuration import compact, expand
from amq.search.archive import Record
from amq.search.front import hypervolume, reference_loss
from amq.search.knapsack import select
from amq.search.loss_curve import LossFit, table_cost
from amq.search.problem import Problem, Table
from amq.search.space import SearchSpace
from amq.util.files import write_json
from amq.util.records import JsonFile, check_range, to_json

CURVE_POINTS = 120
LEAST_BAND = 4
"""Points below which a standard deviation says nothing."""
DEVIATIONS = 2.0


@dataclass(frozen=True, kw_only=True)
class UniformPoint:
    """Every linear in one format; a loss that was not finite, or not measured on held-out windows, is None."""

    name: str
    bits_per_weight: float
    loss: float | None
    loss_confirm: float | None


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A point of the front; predicted: by the fit, where there is one."""

    bits_per_weight: float
    loss: float
    loss_confirm: float | None
    predicted: float | None
    archive_index: int
    configuration: dict[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "configuration", expand(self.configuration))


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    bits_per_weight: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Band:
    """Held-out loss in units of the loss on the search windows: `ratio` in the middle, mostly within `low` to `high`.

    points: of the front, that it was computed from.
    """

    points: int
    ratio: float
    low: float
    high: float

    def __post_init__(self) -> None:
        check_range(self, "points", least=LEAST_BAND)
        check_range(self, "ratio", "low", "high", least=0, most=1e6)

    def around(self, loss: float) -> tuple[float, float]:
        """(low, high) of the held-out loss of a point of the front, from its loss on the search windows."""
        return loss * self.low, loss * self.high


@dataclass(frozen=True, kw_only=True)
class Front(JsonFile):
    """front.json. objective: what losses are, of `amq.model.losses.OBJECTIVES`. curve, fit: None without a cost table;
    band: None where `band_missing` says why."""

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/front/1",)
    REMEDY: ClassVar[str] = "run the search again"

    schema: str = SCHEMAS[0]
    objective: str = "jsd"
    bits_range: tuple[float, float]
    hypervolume: float
    uniform: tuple[UniformPoint, ...]
    front: tuple[FrontPoint, ...]
    curve: tuple[CurvePoint, ...] | None
    fit: LossFit | None
    band: Band | None = None
    band_missing: str = ""

    def write(self, path: Path) -> None:
        data = to_json(self)
        for point in data["front"]:
            point["configuration"] = compact(point["configuration"])
        write_json(path, data)


def make_front(
    problem: Problem, front: Sequence[Record], table: Table | None, fit: LossFit | None, objective: str = "jsd"
) -> Front:
    """front: the archive's records on the Pareto front, by rising bits. objective: by its name."""
    space, archive = problem.space, problem.archive

    def confirmed(formats: dict[str, str]) -> float | None:
        record = archive.find(formats, "confirm")
        return record.loss if record else None

    def predicted(formats: dict[str, str]) -> float | None:
        return float(fit.predict(table_cost(table, formats))) if fit and table else None

    uniform = [(f.name, archive.find(space.uniform(f))) for f in space.formats]
    points = tuple(
        FrontPoint(
            bits_per_weight=r.bits_per_weight, loss=r.loss, loss_confirm=confirmed(r.configuration),
            predicted=predicted(r.configuration), archive_index=r.index, configuration=r.configuration,
        )
        for r in front if r.loss is not None
    )  # fmt: skip
    pairs = np.array([(p.bits_per_weight, p.loss) for p in points]).reshape(-1, 2)
    band = make_band(points)
    return Front(
        objective=objective,
        bits_range=space.bits_range,
        hypervolume=hypervolume(pairs, space.front_range, reference_loss(problem.objective.ceiling)),
        uniform=tuple(
            UniformPoint(
                name=name, bits_per_weight=r.bits_per_weight, loss=r.loss, loss_confirm=confirmed(r.configuration)
            )
            for name, r in uniform if r
        ),
        front=points,
        curve=_curve(space, table, fit) if table and fit else None,
        fit=fit,
        band=None if isinstance(band, str) else band,
        band_missing=band if isinstance(band, str) else "",
    )  # fmt: skip


def make_band(points: Sequence[FrontPoint]) -> Band | str:
    """The band, or why there is none.

    Of each point that was measured on both window sets, d = ln(held-out loss / search loss): `ratio` is exp of the mean
    of d, and the band exp(mean ± 2 s·√(1 + 1/n)), s being the standard deviation of d over the n points. So it is where
    one more point of the front would be found on the held-out windows; see docs/format.md for what it is not.
    """
    pairs = np.array([(p.loss, p.loss_confirm) for p in points if p.loss_confirm is not None]).reshape(-1, 2)
    pairs = pairs[(pairs > 0).all(axis=1)]  # rounding can take a loss of nothing to 0 or below
    count = len(pairs)
    if count < LEAST_BAND:
        return f"{count} of {len(points)} points of the front have a loss on held-out windows; it takes {LEAST_BAND}"
    d = np.log(pairs[:, 1] / pairs[:, 0])
    middle, reach = float(d.mean()), DEVIATIONS * float(d.std(ddof=1)) * np.sqrt(1 + 1 / count)
    ratio, low, high = (round(float(np.exp(x)), 6) for x in (middle, middle - reach, middle + reach))
    return Band(points=count, ratio=ratio, low=low, high=high)


def _curve(space: SearchSpace, table: Table, fit: LossFit) -> tuple[CurvePoint, ...]:
    """Predicted loss of the knapsack optimum at evenly spaced budgets."""
    costs, pinned = space.variable_costs(table), space.pinned_cost(table)
    rows = np.arange(len(costs))
    curve = []
    for bits in np.linspace(*space.front_range, CURVE_POINTS):
        point = select(costs, space.sizes, space.capacity(float(bits) + 1e-9))
        loss = float(fit.predict(float(costs[rows, point].sum()) + pinned))
        curve.append(CurvePoint(bits_per_weight=float(space.bits(point)), loss=loss))
    return tuple(curve)
