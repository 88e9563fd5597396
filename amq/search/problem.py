"""Problem: all that a solver sees. A space, an archive, and callables that turn configurations into losses.

No weights, no model, no files: the losses may come from an `amq.proxy.evaluator.Evaluator` or from a formula in a test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from amq.configuration import compact
from amq.errors import AmqError
from amq.search.archive import Archive, Record
from amq.search.front import hypervolume, pareto_indices
from amq.search.records import SurrogateScores
from amq.search.space import SearchSpace
from amq.util.progress import Progress, Step

Formats = Mapping[str, str]
Table = dict[str, dict[str, float]]
Change = tuple[tuple[str, ...], str]
"""Weights of one block that change together, and the format that they get."""


class Losses(Protocol):
    """configuration → loss in nats per token, on a named set of windows.

    seconds, seconds_in_model: spent on losses so far, and the part of it in the model's own forward.
    """

    seconds: float
    seconds_in_model: float

    def evaluate(self, formats: Formats, windows: str = "search") -> float: ...

    def sensitivities(
        self, base: Formats, changes: Iterable[Change], windows: str = "search"
    ) -> Iterator[tuple[tuple[str, ...], str, float]]: ...


class TimeIsUp(Exception):
    """The `--time` bound was reached; what was evaluated stands."""


@dataclass
class Problem:
    """cost_tables: {kind: () -> table}, computed when first asked for. deadline: `time.monotonic()` value or None."""

    space: SearchSpace
    archive: Archive
    losses: Losses
    solver: str
    seed: int
    budget: float | None = None
    max_loss: float | None = None
    cost_tables: Mapping[str, Callable[[], Table]] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    deadline: float | None = None
    step: Step | None = None
    surrogate_log: list[SurrogateScores] = field(default_factory=list)

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator for one purpose, independent of how much others have drawn."""
        return np.random.default_rng([self.seed, *stream])

    def cost_table(self, kind: str) -> Table:
        if kind not in self.cost_tables:
            raise AmqError(f"unknown cost {kind!r}: expected one of {', '.join(self.cost_tables)}")
        return self.cost_tables[kind]()

    def evaluate(self, formats: Formats, phase: str, windows: str = "search", iteration: int | None = None) -> Record:
        """The record of a configuration: from the archive if it is there, else evaluated and appended."""
        record = self.archive.find(formats, windows)
        if record is None:
            self.check_time()
            start = time.perf_counter()
            loss = self.losses.evaluate(formats, windows)
            record = self._append(formats, loss, time.perf_counter() - start, phase, windows, iteration)
        if self.step:
            self.step(self.status())
        return record

    def sensitivities(self, base: Formats, changes: list[Change], phase: str = "sensitivity") -> dict[Change, Record]:
        """One record per change: these weights in that format, all others as in `base`."""
        records = {}
        missing = []
        for names, fmt in changes:
            record = self.archive.find({**base, **dict.fromkeys(names, fmt)})
            if record is None:
                missing.append((names, fmt))
            else:
                records[names, fmt] = record
        with self.progress.stage(phase, max(1, len(missing))) as step:
            start = time.perf_counter()
            for names, fmt, loss in self.losses.sensitivities(base, missing):
                formats = {**base, **dict.fromkeys(names, fmt)}
                records[names, fmt] = self._append(formats, loss, time.perf_counter() - start, phase, "search")
                step(f"{', '.join(compact(dict.fromkeys(names)))} {fmt}: {loss:.5f}")
                self.check_time()
                start = time.perf_counter()
        return records

    def _append(
        self, formats: Formats, loss: float, seconds: float, phase: str, windows: str, iteration: int | None = None
    ) -> Record:
        bits = self.space.bits_of(formats)
        return self.archive.append(
            formats,
            loss,
            bits,
            seconds,
            solver=self.solver,
            phase=phase,
            windows=windows,
            seed=self.seed,
            iteration=iteration,
        )

    def check_time(self) -> None:
        """Raises TimeIsUp once the deadline has passed; between evaluations and between backward passes."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise TimeIsUp

    def points(self) -> np.ndarray:
        """(bits per weight, loss) of everything feasible so far, float64 [n, 2]."""
        return np.array([(r.bits_per_weight, r.loss) for r in self.archive.evaluated()]).reshape(-1, 2)

    def best_at(self, budget: float | None) -> Record | None:
        """The feasible record of least loss within `budget` bits per weight (of all, without a budget)."""
        fits = [r for r in self.archive.evaluated() if budget is None or r.bits_per_weight <= budget + 1e-6]
        return min(fits, key=lambda r: (r.loss, r.bits_per_weight), default=None)

    def hypervolume(self) -> float:
        points = self.points()
        return hypervolume(points[pareto_indices(points)], self.space.front_range)

    def status(self) -> str:
        best = self.best_at(self.budget)
        text = f"hypervolume {self.hypervolume():.4f}"
        if self.budget is not None and best:
            text += f", best loss {best.loss:.4f} at ≤ {self.budget:.2f} bits"
        return text
