"""A search once its losses can be asked for: plan, solve, confirm, choose, and the run folder's files.

It sees losses, not weights: `run.py` brings those of a model, tests those of a formula.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from amq.configuration import Configuration
from amq.formats import BitFormat, Kept
from amq.model.inventory import EXPERT
from amq.model.losses import LN2
from amq.search.archive import Record
from amq.search.choose import Budget, choose, to_configuration
from amq.search.front import pareto_indices
from amq.search.front_file import FrontPoint, UniformPoint, make_front
from amq.search.loss_curve import fit_records
from amq.search.problem import Problem, TimeIsUp
from amq.search.records import Cost, Evaluations, RunFile
from amq.search.refine import AUTO_BITS, AUTO_EVALUATIONS
from amq.search.run_folder import NAMES, RunWriter
from amq.search.settings import SPEED, SearchSettings
from amq.search.solvers import SOLVERS
from amq.search.solvers.base import Solution
from amq.search.space import SearchSpace
from amq.util.settings import parse_time

MOST_CONFIRMED = 24
"""Points of the front that are measured again on held-out windows."""


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves: the chosen configuration, the front, and where everything else is."""

    output: Path
    configuration: Configuration
    front: tuple[FrontPoint, ...]
    uniform: tuple[UniformPoint, ...]
    hypervolume: float
    status: str
    timings: dict[str, float]


@dataclass
class Timings:
    """Seconds by stage, summed over its calls."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def conduct(problem: Problem, run: RunFile, folder: RunWriter, timings: Timings, started: float) -> SearchResult:
    """The search from its first evaluation to its last file. started: `time.monotonic()`, when `--time` began."""
    settings = run.settings
    folder.write(run)
    if problem.speed is not None:
        folder.write(problem.speed.table)
    deadline = None if settings.time is None else started + parse_time(settings.time)
    solution, status = _solve(problem, settings, timings, deadline)
    _write_tables(folder, solution, problem)
    records, budget = problem.archive.records, _budget(problem, settings)
    fit = fit_records(records, solution.table, problem.objective.ceiling) if solution.table else None
    chosen = choose(budget, problem.space, records, solution.table, fit)
    with timings.measure("confirm"):
        on_front = _confirm(problem, chosen.formats, status)
    chosen = choose(budget, problem.space, records, solution.table, fit)
    configuration = to_configuration(chosen, run, settings, problem.speed, problem.kinds)
    folder.write_configuration(configuration)
    front = make_front(problem, on_front, solution.table, fit, settings.loss)
    folder.write(front)
    seconds = {k: round(v, 3) for k, v in (*timings.seconds.items(), ("total", time.monotonic() - started))}
    pruned = problem.space.widest(solution.sensitivity.pinned if solution.sensitivity else ())
    pins = {name: fmt.name for name, fmt in {**problem.space.pinned, **pruned}.items()}
    folder.write(replace(
        run, status=status, pinned=pins, timings=seconds,
        evaluations=_count_evaluations(problem, timings),
    ))  # fmt: skip
    return SearchResult(folder.path, configuration, front.front, front.uniform, front.hypervolume, status, seconds)


def _budget(problem: Problem, settings: SearchSettings) -> Budget:
    return Budget(problem.budget, problem.max_loss, problem.speed, settings.prefer == SPEED)


def _solve(
    problem: Problem, settings: SearchSettings, timings: Timings, deadline: float | None
) -> tuple[Solution, str]:
    progress, planned = problem.progress, _planned_evaluations(settings, problem.space)
    with timings.measure("evaluate"):  # the trial evaluation; every solver starts with it
        trial = problem.evaluate(problem.space.uniform(problem.space.formats[-1]), "uniform")
    progress.say(_plan(problem, planned, _plan_refine(settings), trial.seconds))
    problem.deadline = deadline
    solution, status = Solution(), "finished"
    with timings.measure("solve"), progress.stage("search", planned) as problem.step:
        try:
            solution = SOLVERS[settings.solver](problem, settings)
        except TimeIsUp:
            solution, status = Solution(table=problem.table), "stopped"
    problem.step = None
    if status == "stopped":
        progress.say(
            f"--time {settings.time} is up: choosing from {len(problem.archive.records)} evaluations (--resume goes on)"
        )
    return solution, status


def _planned_evaluations(settings: SearchSettings, space: SearchSpace) -> int:
    uniform = len(space.formats)
    if settings.solver == "additive":
        sensitivities = int((space.counts - 1).sum()) if settings.cost == "sensitivity" else 0
        return uniform + 1 + settings.points + sensitivities
    return uniform + len(space.variables) + settings.initial + settings.iterations * settings.per_iteration


def _plan_refine(settings: SearchSettings) -> str:
    """What comes to the planned evaluations."""
    if (
        settings.solver != "additive"
        or settings.refine == 0
        or (settings.refine is None and settings.max_loss is not None)
    ):
        return ""
    if settings.refine is not None:
        return f", {settings.refine} of --refine"
    return f", {AUTO_EVALUATIONS} of --refine if the linears get less than {AUTO_BITS} bits per weight"


def _plan(problem: Problem, planned: int, refine: str, seconds: float) -> str:
    import psutil

    space = problem.space
    low, high = space.bits_range
    resident = psutil.Process().memory_info().rss / 2**30
    target = f"loss ≤ {problem.max_loss}" if problem.max_loss is not None else f"{problem.budget:.4f} bits per weight"
    if problem.speed is not None and problem.speed.least is not None:
        target += f", {problem.speed.least:g} tokens/s after {problem.speed.context} others"
    return (
        f"plan: {describe(space)}, "
        f"10^{space.log10_size:.0f} configurations of {low:.3f} to {high:.3f} bits per weight; budget {target}\n"
        f"plan: about {planned} evaluations of {seconds:.2f} s (measured) = {planned * seconds / 60:.1f} min"
        f"{refine}, and the confirmation of the front; {resident:.2f} GiB resident"
    )


def describe(space: SearchSpace) -> str:
    """What is searched, in a line: items, what is tied, what head and embeddings choose among."""
    experts = [s for s in space.weights if s.kind == EXPERT]
    counts = [f"{len(space.weights) - len(experts) - len(space.outer)} linears"]
    if experts:
        groups = sum(v[0].kind == EXPERT for v in space.variables)
        how = "each with its own format" if groups == len(experts) else "tied by layer and role"
        counts.append(f"{len(experts)} linears of experts ({how})")
    for spec in space.outer:
        pinned = space.pinned.get(spec.name)
        among = [pinned] if pinned else space.formats_of(spec)
        tied = f" with {spec.tied}" if spec.tied else ""
        counts.append(f"{spec.name}{tied} ({spec.numel / space.numel:.0%} of the weights: {_names(among)})")
    pins = f", {len(space.pinned)} pinned" if space.pinned else ""
    return f"{', '.join(counts)}{pins}, {len(space.variables)} variables, formats {_names(space.formats)}"


def _names(formats: Iterable[BitFormat | Kept]) -> str:
    return ",".join(fmt.name for fmt in formats)


def _write_tables(folder: RunWriter, solution: Solution, problem: Problem) -> None:
    if solution.table is not None and not (folder.path / NAMES[Cost]).is_file():
        kind = "sensitivity" if any(r.phase == "sensitivity" for r in problem.archive.records) else "weight"
        ceiling = "ln 2" if problem.objective.ceiling == LN2 else f"{problem.objective.ceiling:g}"
        unit = f"−ln(1 − loss/{ceiling})" if kind == "sensitivity" else "sum of squares"
        folder.write(Cost(kind=kind, unit=unit, cost=solution.table))
    if solution.sensitivity is not None:
        folder.write(solution.sensitivity)
    if problem.surrogate_log:
        folder.write_surrogate(problem.surrogate_log)


def _confirm(problem: Problem, chosen: dict[str, str], status: str) -> list[Record]:
    """Measures the uniform points, the front and the chosen configuration on the held-out windows.

    Returns the front.
    """
    records = problem.archive.evaluated()
    front = [records[i] for i in pareto_indices(problem.points())]
    if len(front) > MOST_CONFIRMED:  # a long paper run: confirm an even selection of its front
        front_shown = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, MOST_CONFIRMED).round().astype(int))]
    else:
        front_shown = front
    wanted = [r for r in records if r.phase == "uniform"] + front_shown
    wanted = [r.configuration for r in wanted] + [chosen]
    problem.deadline = None  # a stopped search still gets its error bars for what it chose
    if status == "stopped":
        wanted = [chosen]
    if problem.archive.find(chosen) is None:
        problem.evaluate(chosen, "budget")
    with problem.progress.stage("confirm", len(wanted)) as step:
        problem.evaluate_many([(formats, "confirm") for formats in wanted], "confirm", seen=lambda r: step(_note(r)))
    return front


def _note(record: Record) -> str:
    return "" if record.loss is None else f"{record.bits_per_weight:.3f} bits: {record.loss:.5f}"


def _count_evaluations(problem: Problem, timings: Timings) -> Evaluations:
    records, losses = problem.archive.records, problem.losses
    seconds = [r.seconds for r in problem.archive.evaluated() if r.phase != "sensitivity"]
    each = float(np.median(seconds)) if seconds else None
    outside = round(1 - losses.seconds_in_model / losses.seconds, 4) if losses.seconds else None
    return Evaluations(
        count=sum(r.windows == "search" and r.phase != "sensitivity" for r in records),
        sensitivities=sum(r.phase == "sensitivity" for r in records),
        confirmations=sum(r.windows == "confirm" for r in records),
        seconds_each=each,
        cost_in_evaluations=round(timings.seconds.get("cost", 0.0) / each, 2) if each else None,
        share_outside_model=outside,
    )
