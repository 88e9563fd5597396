"""What a check of predictors gives: a row per case, predictor, archive and seed, as JSON and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from amq.eval.predictor_settings import CASES, PredictorSettings
from amq.util.records import JsonFile

TABLE, MEASURED = "table", "measured"
"""Additive predictors: of the cost table itself, which knows of no outliers; of costs from single evaluations."""


@dataclass(frozen=True, kw_only=True)
class PredictorRow:
    """How a predictor orders what it is asked about: questions of all sizes, and (`within`) of the budget.

    predictor: a surrogate, or `table` or `measured`. evaluations: that it has seen.
    """

    case: str
    predictor: str
    evaluations: int
    seed: int
    spearman: float
    kendall: float
    within_spearman: float
    within_kendall: float


@dataclass(frozen=True, kw_only=True)
class PredictorTable(JsonFile):
    """predictor.json. costs: hash of the costs that losses are made of. linears: how many have a choice of their own.

    provenance: of the call that wrote last; see `amq.util.provenance`.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/predictor/1",)

    schema: str = SCHEMAS[0]
    settings: PredictorSettings
    costs: str
    linears: int
    provenance: dict[str, Any] = field(default_factory=dict)
    rows: tuple[PredictorRow, ...] = ()

    def has(self, case: str, seed: int, predictor: str) -> bool:
        return any((row.case, row.seed, row.predictor) == (case, seed, predictor) for row in self.rows)

    def median(self, case: str, predictor: str, evaluations: int | None, figure: str) -> float | None:
        """Of a figure over seeds; evaluations: None for those that a predictor always takes."""
        found = [
            float(getattr(row, figure))
            for row in self.rows
            if (row.case, row.predictor) == (case, predictor) and evaluations in (None, row.evaluations)
        ]
        return statistics.median(found) if found else None

    def needed(self, case: str, surrogate: str, figure: str) -> int | None:
        """The least archive from which on the median of `figure` is what is wanted; None where no archive is enough."""
        least = None
        for size in reversed(self.settings.size_list):
            value = self.median(case, surrogate, size, figure)
            if value is None or value < self.settings.wanted:
                break
            least = size
        return least


def markdown(table: PredictorTable) -> str:
    """Two rows per case, of all sizes and within the budget; a column per predictor and archive."""
    s = table.settings
    surrogates = [name for name in s.surrogate_list if any(row.predictor == name for row in table.rows)]
    singles = next((row.evaluations for row in table.rows if row.predictor == MEASURED), 0)
    names = ["case", "asked about", "additive, table", f"additive, {singles} single"]
    for surrogate in surrogates:
        names += [f"{surrogate}, {size}" for size in s.size_list] + [f"{surrogate} needs"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for case in CASES:
        if any(row.case == case for row in table.rows):
            for asked, prefix in (("all sizes", ""), (f"{s.budget:g} bits", "within_")):
                cells = [_cell(table, case, name, None, prefix) for name in (TABLE, MEASURED)]
                for surrogate in surrogates:
                    cells += [_cell(table, case, surrogate, size, prefix) for size in s.size_list]
                    needed = table.needed(case, surrogate, f"{prefix}spearman")
                    cells.append(f"more than {s.size_list[-1]}" if needed is None else str(needed))
                lines.append(f"| {case} | {asked} | {' | '.join(cells)} |")
    return "\n".join([*_head(table), "", *lines]) + "\n"


def _cell(table: PredictorTable, case: str, predictor: str, evaluations: int | None, prefix: str) -> str:
    figures = (table.median(case, predictor, evaluations, f"{prefix}{name}") for name in ("spearman", "kendall"))
    return " / ".join("–" if value is None else f"{value:.2f}" for value in figures)


def _head(table: PredictorTable) -> Iterator[str]:
    s, machine = table.settings, table.provenance.get("machine", {})
    seeds = ", ".join(map(str, sorted({row.seed for row in table.rows})))
    yield (
        f"Synthetic losses of the {table.linears} linears of {s.table}, {s.formats}, interaction {s.interaction:g}; "
        f"outliers: {100 * s.share:g} % of linears, {s.factor:g} times the cost; rare: probability {s.rare:g}. Medians "
        f"over seeds {seeds}, {s.questions} questions each."
    )
    yield (
        "Spearman / Kendall between predicted and true order. `needs`: the least archive from which on Spearman is "
        f"{s.wanted:g} or more."
    )
    if machine:
        yield f"{machine.get('processor')}, {machine.get('threads')} threads, {str(table.provenance.get('date'))[:10]}."
