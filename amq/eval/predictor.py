"""`run_predictor`: how many evaluations does a predictor of losses need before it orders configurations rightly?

    python -m amq.eval predictor runs/smollm2 --output runs/predictor

The paper's search fits a predictor (radial basis functions) to an archive of evaluated configurations and asks it about
others. Here losses are synthetic but for the costs, which are a real search's (`amq.search.synthetic`): so archives
may have thousands of evaluations, and what goes wrong in practice can be put in, a case each (`predictor_settings`):
outliers, and formats that the archive has rarely or not at all. Beside it stand two additive predictors, as the
knapsack has them: the cost table as it was given, which knows of no outliers and takes no evaluation; and costs that
are measured by one evaluation of each linear in each format.

Predictors are asked about random configurations of all sizes, and of one budget, where a search has to choose. FOLDER
gets predictor.json after every case and seed, and predictor.md; the same command goes on where it was stopped, and more
cases, seeds or surrogates may be asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from amq.errors import AmqError
from amq.eval.predictor_settings import CASES, FREE, OUTLIERS, RARE, UNSEEN, PredictorSettings
from amq.eval.predictor_table import MEASURED, TABLE, PredictorRow, PredictorTable, markdown
from amq.eval.tables import check_same, open_table
from amq.formats import GROUP_SIZES, parse_formats
from amq.model.inventory import LinearSpec
from amq.search.draws import band_points, spread_points
from amq.search.records import Cost
from amq.search.run_folder import RunFolder
from amq.search.scores import quality
from amq.search.solvers.base import random_points
from amq.search.space import SearchSpace
from amq.search.surrogates import SURROGATES
from amq.search.synthetic import SyntheticLosses, additive, measured_costs, with_outliers, without_widest
from amq.util.files import write_text
from amq.util.progress import Progress
from amq.util.provenance import provenance

JSON, MARKDOWN = "predictor.json", "predictor.md"
FILES = (JSON, MARKDOWN)
"""What a folder gets."""


def run_predictor(settings: PredictorSettings, progress: Progress | None = None) -> PredictorTable:
    """The table of `settings`, of which rows that its folder has are not made again.

    Raises AmqError for unusable input, and for a folder with a table of other settings or costs.
    """
    progress, output = progress or Progress(), Path(settings.output)
    before = open_table(PredictorTable, output / JSON, settings, FREE)
    space, costs = open_costs(settings)
    hashed = hashlib.sha256(costs.tobytes() + space.sizes.tobytes()).hexdigest()
    table = PredictorTable(settings=settings, costs=hashed, linears=len(space.variables))
    if before is not None:
        check_same(before, table, settings.output, {"costs": "cost table"})
        table = before
    trials = [Trial(settings, space, costs, case, seed) for case in settings.case_list for seed in settings.seed_list]
    wanted = (TABLE, MEASURED, *settings.surrogate_list)
    with progress.stage("predictors", len(trials)) as step:
        for trial in trials:
            lacking = [name for name in wanted if not table.has(trial.case, trial.seed, name)]
            made = [row for name in lacking for row in trial.rows(name)]
            if made:
                table = replace(table, rows=(*table.rows, *made), provenance=provenance())
                table.write(output / JSON)
                write_text(output / MARKDOWN, markdown(table))
            step(f"{trial.case}, seed {trial.seed}")
    return table


def open_costs(settings: PredictorSettings) -> tuple[SearchSpace, np.ndarray]:
    """The blocks' linears with the formats of `settings`, and their costs, float64 [n_variables, n_formats], nats per
    token. Raises AmqError for what is no run or cost table, and where it lacks a format."""
    path, formats = Path(settings.table).expanduser(), parse_formats(settings.formats)
    if path.is_dir():
        run = RunFolder.open(path)
        if run.cost is None:
            raise AmqError(f"{path} has no cost table yet, or its solver makes none: give a run of the additive solver")
        cost, linears, group_size = run.cost, run.inventory.linears, run.settings.group_size
    else:
        cost, group_size = Cost.read(path), GROUP_SIZES[0]
        linears = tuple(LinearSpec(name, 0, name, group_size, group_size) for name in cost.cost)
    space = SearchSpace.build(linears, formats, group_size)
    return space, np.maximum(space.variable_costs(cost.cost), 0.0)


@dataclass(frozen=True)
class Trial:
    """One case with one seed: losses, an archive of the largest size, and questions."""

    settings: PredictorSettings
    space: SearchSpace
    table: np.ndarray
    case: str
    seed: int

    def _rng(self, stream: int) -> np.random.Generator:
        """Questions and neighbours' signs are those of the seed in every case."""
        return np.random.default_rng([self.seed, stream])

    @cached_property
    def losses(self) -> SyntheticLosses:
        costs = self.table
        if self.case == OUTLIERS:
            costs = with_outliers(costs, self.settings.share, self.settings.factor, self._rng(1))
        return SyntheticLosses.draw(costs, self.settings.interaction, self._rng(2))

    @cached_property
    def archive(self) -> np.ndarray:
        """Points [largest size, n_variables]; a smaller archive is its beginning."""
        count, rng = self.settings.size_list[-1], self._rng(10 + list(CASES).index(self.case))
        if self.case in (RARE, UNSEEN):
            return without_widest(self.space, count, self.settings.rare if self.case == RARE else 0.0, rng)
        return random_points(self.space, count, rng)

    @cached_property
    def questions(self) -> tuple[np.ndarray, np.ndarray]:
        """Points of all sizes, and of the budget."""
        s = self.settings
        within = band_points(self.space, s.budget, s.width, s.questions, self._rng(4))
        return spread_points(self.space, s.questions, self._rng(3)), within

    def rows(self, predictor: str) -> Iterator[PredictorRow]:
        """Of a predictor: one for each archive, or one alone where there is none to learn from."""
        if predictor == TABLE:
            yield self._row(predictor, 0, [additive(self.table, points) for points in self.questions])
        elif predictor == MEASURED:
            costs, evaluations = measured_costs(self.losses)
            yield self._row(predictor, evaluations, [additive(costs, points) for points in self.questions])
        else:
            known = self.losses(self.archive)
            for size in self.settings.size_list:
                surrogate = SURROGATES[predictor](self.seed)
                surrogate.fit(self.archive[:size], known[:size])
                yield self._row(predictor, size, [surrogate.predict(points) for points in self.questions])

    def _row(self, predictor: str, evaluations: int, predicted: list[np.ndarray]) -> PredictorRow:
        everything, within = (
            quality(self.losses(points), found) for points, found in zip(self.questions, predicted, strict=True)
        )
        return PredictorRow(
            case=self.case, predictor=predictor, evaluations=evaluations, seed=self.seed,
            spearman=round(everything["spearman"], 4), kendall=round(everything["kendall"], 4),
            within_spearman=round(within["spearman"], 4), within_kendall=round(within["kendall"], 4),
        )  # fmt: skip
