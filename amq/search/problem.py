"""Problem: all that a solver sees. A space, an archive, and callables that turn configurations into losses.

No weights, no model, no files: the losses may come from an `amq.proxy.evaluator.Evaluator` or from a formula in a test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from amq.configuration import compact, configuration_key
from amq.errors import AmqError
from amq.model.losses import OBJECTIVES, Objective
from amq.search.archive import Archive, Record
from amq.search.front import hypervolume, pareto_indices, reference_loss
from amq.search.records import SurrogateScores
from amq.search.space import SearchSpace
from amq.search.speed import Speed, within
from amq.util.progress import Progress, Step

Formats = Mapping[str, str]
Table = dict[str, dict[str, float]]
Change = tuple[tuple[str, ...], str]
"""Weights of one block that change together, and the format that they get."""


class Losses(Protocol):
    """configuration → loss in the objective's unit, on a named set of windows.

    seconds, seconds_in_model: spent on losses so far, and the part of it in the model's own forward.
    """

    seconds: float
    seconds_in_model: float

    def evaluate(self, formats: Formats, windows: str = "search") -> float: ...

    def evaluate_many(self, configurations: Sequence[Formats], windows: str = "search") -> Iterator[list[float]]:
        """The losses of all, in order, those of several at a time; neighbours that agree in their first blocks
        share what these take."""
        ...


class TimeIsUp(Exception):
    """The `--time` bound was reached; what was evaluated stands."""


@dataclass
class Problem:
    """cost_tables: {kind: () -> table}, computed when first asked for. deadline: `time.monotonic()` value or None.
    table: the last one that was asked for, which a search that is stopped later still has. speed: what a token may
    take, where that is asked. kinds: {layer: kind of cache} where the memory is shared with it."""

    space: SearchSpace
    archive: Archive
    losses: Losses
    solver: str
    seed: int
    budget: float | None = None
    max_loss: float | None = None
    objective: Objective = OBJECTIVES["jsd"]
    cost_tables: Mapping[str, Callable[[], Table]] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    deadline: float | None = None
    step: Step | None = None
    surrogate_log: list[SurrogateScores] = field(default_factory=list)
    table: Table | None = None
    speed: Speed | None = None
    kinds: Mapping[str, str] | None = None

    def select(self, costs: np.ndarray, capacity: float) -> np.ndarray:
        """The knapsack's choice within `capacity` bytes, and within the time that a token may take."""
        return within(self.speed, costs, self.space, capacity)

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator for one purpose, independent of how much others have drawn."""
        return np.random.default_rng([self.seed, *stream])

    def cost_table(self, kind: str) -> Table:
        if kind not in self.cost_tables:
            raise AmqError(f"unknown cost {kind!r}: expected one of {', '.join(self.cost_tables)}")
        self.table = self.cost_tables[kind]()
        return self.table

    def evaluate(self, formats: Formats, phase: str, windows: str = "search", iteration: int | None = None) -> Record:
        """The record of a configuration: from the archive if it is there, else evaluated and appended."""
        return self.evaluate_many([(formats, phase)], windows, iteration)[0]

    def evaluate_many(
        self,
        wanted: Iterable[tuple[Formats, str]],
        windows: str = "search",
        iteration: int | None = None,
        seen: Callable[[Record], None] | None = None,
    ) -> list[Record]:
        """One record per (configuration, phase), measured together where the archive lacks them.

        The archive gets the lines, in their order, that asking for one after the other would give it. Raises TimeIsUp
        between what is measured at once; the archive holds what was. seen: called with each record once it is there.
        """
        wanted, seen = list(wanted), seen or self._show_status
        missing: dict[str, tuple[Formats, str]] = {}
        for formats, phase in wanted:
            if self.archive.find(formats, windows) is None:
                missing.setdefault(configuration_key(formats), (formats, phase))
        for formats, phase, loss, seconds in self._measure(list(missing.values()), windows):
            seen(self._append(formats, loss, seconds, phase, windows, iteration))
        records = [self._found(formats, windows) for formats, _ in wanted]
        for record in records:
            if missing.pop(record.key, None) is None:
                seen(record)
        return records

    def _show_status(self, record: Record) -> None:
        if self.step:
            self.step(self.status())

    def _found(self, formats: Formats, windows: str) -> Record:
        record = self.archive.find(formats, windows)
        assert record is not None, "what was measured is in the archive"
        return record

    def _measure(
        self, wanted: Sequence[tuple[Formats, str]], windows: str
    ) -> Iterator[tuple[Formats, str, float, float]]:
        """(configuration, phase, loss, seconds) for each of `wanted`, the seconds of those that were measured at once
        in equal parts."""
        left = iter(wanted)
        chunks = self.losses.evaluate_many([formats for formats, _ in wanted], windows)
        done = 0
        while done < len(wanted):
            self.check_time()
            start = time.perf_counter()
            losses = next(chunks)
            seconds = (time.perf_counter() - start) / len(losses)
            done += len(losses)
            for loss in losses:
                yield *next(left), loss, seconds

    def sensitivities(self, base: Formats, changes: list[Change], phase: str = "sensitivity") -> dict[Change, Record]:
        """One record per change: these weights in that format, all others as in `base`."""
        configurations = {change: {**base, **dict.fromkeys(*change)} for change in changes}
        missing = [change for change in changes if self.archive.find(configurations[change]) is None]
        blocks = {spec.name: spec.block for spec in self.space.weights}
        missing.sort(key=lambda change: blocks[change[0][0]])  # each shares what comes before its block with the others
        with self.progress.stage(phase, max(1, len(missing))) as step:
            wanted = [(configurations[change], phase) for change in missing]
            for (names, fmt), found in zip(missing, self._measure(wanted, "search"), strict=True):
                formats, _, loss, seconds = found
                self._append(formats, loss, seconds, phase, "search")
                step(f"{', '.join(compact(dict.fromkeys(names)))} {fmt}: {loss:.5f}")
        return {change: self._found(formats, "search") for change, formats in configurations.items()}

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
        return hypervolume(
            points[pareto_indices(points)], self.space.front_range, reference_loss(self.objective.ceiling)
        )

    def status(self) -> str:
        best = self.best_at(self.budget)
        text = f"hypervolume {self.hypervolume():.4f}"
        if self.budget is not None and best:
            text += f", best loss {best.loss:.4f} at ≤ {self.budget:.2f} bits"
        return text
