"""One seed of a comparison: a model with its bank, and what each strategy allocates there and loses by it.

A configuration that several strategies ask for is measured once and charged to each. So is a table of costs: `fisher`
and `trace` come from the same passes, and both pay for them.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amq.configuration import configuration_key
from amq.errors import AmqError
from amq.eval.strategy_settings import StrategySettings
from amq.eval.strategy_table import SeedEntry, StrategyRow, key
from amq.model.inventory import get_weight
from amq.model.losses import OBJECTIVES
from amq.model.perplexity import perplexity
from amq.model.text import Corpus, fixed_windows
from amq.proxy import dialects, stacks
from amq.proxy.channels import extra_bytes, fitting_share, rank_features, widened
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import DRAWN, FISHER, TAYLOR, Table, add_pass, gradient_passes
from amq.proxy.outputs import OutputErrors, output_errors, tables
from amq.proxy.rows import SALIENCE_PASSES, Part, assembled, installed, score_rows
from amq.proxy.soft import Shares, learn
from amq.search.archive import Archive, Record
from amq.search.conduct import Timings
from amq.search.front import hypervolume
from amq.search.greedy import climb
from amq.search.knapsack import select
from amq.search.problem import Formats, Problem
from amq.search.recipe import follow
from amq.search.refine import refine
from amq.search.rows import select_rows
from amq.search.run import prepare
from amq.search.sensitivity import sensitivity_costs
from amq.search.solvers import SOLVERS
from amq.search.space import SearchSpace
from amq.search.strategies import Strategy
from amq.util.progress import Progress
from amq.util.settings import parse_size

HV_POINTS = 7
SINGLE = "sensitivity"
"""Phase of evaluations with one linear changed."""
ITERATIONS, SHARE = 5, 20
"""Of the paper's search here: so many iterations, each of one such part of the evaluations; the rest come first."""


class MemoLosses:
    """Losses that are measured once. spent: seconds that the strategy at hand would have paid alone."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._known: dict[tuple[str, str], tuple[float, float]] = {}
        self.spent = self.seconds = self.seconds_in_model = 0.0

    @property
    def each(self) -> float:
        """Median seconds of an evaluation so far."""
        return statistics.median(seconds for _, seconds in self._known.values())

    def evaluate(self, formats: Formats, windows: str = "search") -> float:
        return next(self.evaluate_many([formats], windows))[0]

    def evaluate_many(self, configurations: Sequence[Formats], windows: str = "search") -> Iterator[list[float]]:
        keys = [(configuration_key(formats), windows) for formats in configurations]
        missing = {k: f for k, f in zip(keys, configurations, strict=True) if k not in self._known}
        left, chunks = iter(missing), self._evaluator.evaluate_many(list(missing.values()), windows)
        for known in keys:
            while known not in self._known:
                start = time.perf_counter()
                losses = next(chunks)
                seconds = (time.perf_counter() - start) / len(losses)
                self._known |= {next(left): (loss, seconds) for loss in losses}
            loss, seconds = self._known[known]
            self.spent += seconds
            yield [loss]
        self.seconds, self.seconds_in_model = self._evaluator.seconds, self._evaluator.seconds_in_model


@dataclass(frozen=True)
class Choice:
    """What a strategy chose within a budget. put: has it in the model inside. formats: where it is a configuration."""

    bits: float
    loss: float
    put: Callable[[], AbstractContextManager[None]]
    formats: Formats | None = None


@dataclass
class Found:
    """choices: by budget. seconds, passes: spent besides evaluations that the memo knows. evaluations, singles: such,
    too."""

    choices: Mapping[float, Choice]
    seconds: float = 0.0
    passes: int = 0
    evaluations: int = 0
    singles: int = 0


@dataclass(frozen=True)
class _Made:
    """A cost table, the seconds that it took, and the windows that were looked at."""

    table: Table
    seconds: float = 0.0
    passes: int = 0


@dataclass
class SeedRun:
    """Rows of one seed. The bank is opened or built, and the uniform ends are measured, when it is made."""

    settings: StrategySettings
    seed: int
    progress: Progress
    _tables: dict[str, _Made] = field(default_factory=dict)
    _perplexities: dict[str, float] = field(default_factory=dict)
    _outputs: dict[str, OutputErrors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stage = prepare(self.settings.search(self.seed), self.progress, Timings())
        self.space, self.losses = self.stage.space, MemoLosses(self.stage.evaluator)
        formats = self.space.formats
        self.ends = [(self.space.bits_of(f), self.losses.evaluate(f)) for f in map(self.space.uniform, formats[::-1])]
        (high, _), (low, _) = self.ends[0], self.ends[-1]
        self.hv_budgets = [round(low + (high - low) * i / (HV_POINTS + 1), 6) for i in range(1, HV_POINTS + 1)]
        self.budgets = sorted({*self.hv_budgets, *self.settings.shown_budgets})
        self.memory = parse_size(self.settings.cache_memory)

    @property
    def entry(self) -> SeedEntry:
        return SeedEntry(self.stage.bank.folder.name, self.stage.windows_key)

    def held_out(self) -> Corpus | None:
        """The text of the perplexities."""
        return self.stage.opened.corpus(self.settings.text) if self.settings.text else None

    def measure(self, strategy: Strategy, held_out: Corpus | None) -> StrategyRow:
        """The row of a strategy. Raises AmqError where the model is not one that it can allocate."""
        with _new_archive() as archive:
            problem = Problem(self.space, archive, self.losses, strategy.how, self.seed, progress=self.progress)
            problem.cost_tables = {SINGLE: lambda: sensitivity_costs(problem)}
            self.losses.spent = 0.0
            found = HOW[strategy.how](self, strategy, problem)
            seconds = self.losses.spent + found.seconds
            singles = sum(record.phase == SINGLE for record in archive.records)
            evaluations = len(archive.records) - singles + found.evaluations
            singles += found.singles
        objective, choices = OBJECTIVES["jsd"], found.choices
        points = [(b, min(choices[b].loss, objective.ceiling)) for b in self.hv_budgets]
        hv7 = hypervolume(np.array(points + [self.ends[0], self.ends[-1]]), self.space.bits_range)
        shown = {budget: choices[budget] for budget in self.budgets}
        measured = {} if held_out is None else self._perplexity(choices, held_out)
        return StrategyRow(
            strategy=strategy.name, seed=self.seed, evaluations=evaluations, singles=singles, passes=found.passes,
            seconds=round(seconds, 2), equivalents=round(seconds / self.losses.each, 1), hv7=round(hv7, 5),
            losses={key(b): _finite(c.loss, 6) for b, c in shown.items()},
            bits={key(b): round(c.bits, 4) for b, c in shown.items()}, perplexity=measured,
        )  # fmt: skip

    def _perplexity(self, choices: Mapping[float, Choice], corpus: Corpus) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for budget in self.settings.shown_perplexities:
            choice = choices[budget]
            name = None if choice.formats is None else configuration_key(choice.formats)
            if name is None or name not in self._perplexities:
                value = self.perplexity(corpus, choice.put)
                self._perplexities |= {} if name is None else {name: value}
            found[key(budget)] = _finite(self._perplexities[name] if name is not None else value, 4)
        return found

    def perplexity(self, corpus: Corpus, put: Callable[[], AbstractContextManager[None]] = nullcontext) -> float:
        """Of the model with what `put` has in it; with nothing, of the full-precision model."""
        windows = fixed_windows(corpus, self.settings.window_length, self.settings.max_tokens)
        with self.stage.evaluator.full_precision(), put():
            return perplexity(self.stage.opened.model, windows, corpus.unscored)

    # strategies, by `Strategy.how`

    def uniform(self, strategy: Strategy, problem: Problem) -> Found:
        """The widest format that fits."""
        by_bits = [(bits, self.space.uniform(fmt)) for (bits, _), fmt in zip(self.ends, self.space.formats[::-1],
                                                                            strict=True)]  # fmt: skip
        return self._evaluated(problem, {b: next(f for bits, f in by_bits if bits <= b + 1e-6) for b in self.budgets})

    def recipe(self, strategy: Strategy, problem: Problem) -> Found:
        return self._evaluated(problem, {b: follow(self.space, b) for b in self.budgets})

    def by_table(self, strategy: Strategy, problem: Problem) -> Found:
        """The knapsack over a table of costs."""
        return self._solved(problem, self._table(strategy.name, problem))

    def by_divergence(self, strategy: Strategy, problem: Problem) -> Found:
        """`sensitivity` with Kullback and Leibler's divergence for the loss of single linears; none is in the memo."""
        loss, losses = strategy.how, MemoLosses(self.stage.evaluator)
        with _new_archive() as archive, self.stage.evaluator.by(loss):
            other = Problem(
                self.space, archive, losses, loss, self.seed, objective=OBJECTIVES[loss], progress=self.progress
            )  # fmt: skip
            made, singles = _Made(sensitivity_costs(other), losses.spent), len(archive.records)
        return replace(self._solved(problem, made), singles=singles)

    def gradient(self, strategy: Strategy, problem: Problem) -> Found:
        stage, space, steps = self.stage, self.space, self.settings.steps
        shares = Shares(
            space.variables, space.format_names, torch.from_numpy(8.0 * space.sizes / space.numel),
            8 * space.pinned_bytes / space.numel, (self.budgets[0] + self.budgets[-1]) / 2,
        )  # fmt: skip
        start = time.perf_counter()
        with stage.evaluator.full_precision(), self.progress.stage("gradient", steps) as step:
            table = learn(
                stage.opened.model, stage.quantized, stage.near, stage.cost_windows, shares, steps,
                stage.corpus.unscored, self.memory, step,
            )  # fmt: skip
        return self._solved(problem, _Made(table, time.perf_counter() - start, steps))

    def searched(self, strategy: Strategy, problem: Problem) -> Found:
        """By a solver of `amq.search`: the best of all that it evaluated, within each budget."""
        n = self.settings.evaluations
        part = n // SHARE
        options = {
            "random": {"initial": n, "iterations": 0},
            "paper": {"initial": n - ITERATIONS * part, "iterations": ITERATIONS, "per_iteration": part},
        }[strategy.how]
        SOLVERS[strategy.how](problem, self.settings.search(self.seed, solver=strategy.how, **options))
        records = [r for r in problem.archive.evaluated() if r.phase != SINGLE]
        best = {
            b: min((r for r in records if r.bits_per_weight <= b + 1e-6), key=lambda r: (r.ranked, r.bits_per_weight))
            for b in self.budgets
        }
        return self._chosen(best)

    def greedy(self, strategy: Strategy, problem: Problem) -> Found:
        with self.progress.stage("greedy", self.settings.evaluations) as problem.step:
            return self._chosen(climb(problem, self.budgets, self.settings.evaluations))

    def refined(self, strategy: Strategy, problem: Problem) -> Found:
        """The Fisher table's choices, and as many moves around each as there are evaluations for."""
        made, each = self._table(FISHER, problem), self.settings.evaluations // len(self.budgets)
        costs, best = self.space.variable_costs(made.table), dict[float, Record]()
        with self.progress.stage("refine", self.settings.evaluations) as problem.step:
            for budget, start in self._choose(made.table).items():
                best[budget] = problem.evaluate(refine(problem, costs, start, budget, each), "budget")
        found = self._chosen(best)
        return Found(found.choices, made.seconds, made.passes)

    def by_rows(self, strategy: Strategy, problem: Problem) -> Found:
        """The knapsack over blocks of rows; weights that no kernel runs are measured by torch."""
        stage, space, start = self.stage, self.space, time.perf_counter()
        with stage.evaluator.full_precision():
            blocks = score_rows(
                stage.opened.model, stage.quantized, stage.near, stage.cost_windows, space.format_names, self.seed,
                self.settings.row_blocks, stage.corpus.unscored, memory=self.memory,
            )  # fmt: skip
            counts = {name: [len(rows) for rows in parts] for name, parts in blocks.rows.items()}
            whole, choices = np.zeros(space.sizes.shape), dict[float, Choice]()
            for budget in self.budgets:
                chosen, stored = select_rows(space, whole, blocks.costs, counts, space.capacity(budget))
                parts = [(name, None if n is None else blocks.rows[name][n], fmt) for name, n, fmt in chosen]
                put = partial(assembled, stage.opened.model, stage.near, parts)
                choices[budget] = self._put_choice(stored, put)
        looked = len(stage.cost_windows) + min(SALIENCE_PASSES, len(stage.cost_windows))
        return Found(choices, time.perf_counter() - start, looked, len(choices))

    def channels(self, strategy: Strategy, problem: Problem) -> Found:
        """The widest uniform format that fits, and what is left for input features in int8 beside it."""
        stage, space, made = self.stage, self.space, self._table("activation", problem)
        start, choices = time.perf_counter(), dict[float, Choice]()
        linears, ranked = [s for v in space.variables for s in v], dict[str, dict[str, torch.Tensor]]()
        squares = {name: own.features for name, own in self._outputs.items()}
        with stage.evaluator.full_precision():
            for budget in self.budgets:
                fmt = [
                    f.name for f, (bits, _) in zip(space.formats[::-1], self.ends, strict=True) if bits <= budget + 1e-6
                ][0]
                if fmt not in ranked:
                    ranked[fmt] = rank_features(stage.opened.model, linears, stage.near, squares, fmt)
                base = sum(space.weight_sizes[s.name][fmt] for s in linears)
                share = fitting_share(linears, space.capacity(budget) - base, space.group_size)
                of = (stage.opened.model, linears, stage.near, ranked[fmt], fmt, share, space.group_size)
                put = partial(_installed, *of)
                choices[budget] = self._put_choice(base + extra_bytes(linears, share, space.group_size), put)
        seconds = time.perf_counter() - start + made.seconds
        return Found(choices, seconds, made.passes, len(choices))

    def dialects(self, strategy: Strategy, problem: Problem) -> Found:
        """The knapsack over Fisher's table, every group of what it chooses in the dialect that fits it best."""
        stage, space, made = self.stage, self.space, self._table(FISHER, problem)
        start, choices = time.perf_counter(), dict[float, Choice]()
        costs, sizes, rows = space.variable_costs(made.table), self._dialect_sizes, np.arange(len(space.variables))
        blocks = len({spec.block for spec in stage.quantized.linears})
        with stage.evaluator.full_precision():
            with self.progress.stage("dialects", blocks) as step:
                weights = dialects.dialect_weights(
                    stage.opened.model, stage.quantized, stage.near, stage.cost_windows, space.formats,
                    space.group_size, step,
                )  # fmt: skip
            for budget in self.budgets:
                point = select(costs, sizes, space.capacity(budget))
                put = partial(_in_dialects, stage.opened.model, weights, space.decode(point))
                choices[budget] = self._put_choice(int(sizes[rows, point].sum()), put)
        seconds = time.perf_counter() - start + made.seconds
        return Found(choices, seconds, made.passes + len(stage.cost_windows), len(choices))

    @property
    def _dialect_sizes(self) -> np.ndarray:
        """`SearchSpace.sizes` with the numbers of dialects."""
        extra = [sum(dialects.extra_bytes(s, self.space.group_size) for s in v) for v in self.space.variables]
        return self.space.sizes + np.array(extra)[:, None]

    def check_dialects(self, space: SearchSpace) -> None:
        """Raises AmqError where a budget does not hold the narrowest format with the numbers of its dialects."""
        narrowest = int(self._dialect_sizes[:, 0].sum()) + space.pinned_bytes
        self._check_least("dialect", narrowest, f"{space.format_names[0]} and the numbers of its dialects take")

    def _check_least(self, name: str, stored: int, what: str) -> None:
        """Raises AmqError where the lowest budget is below `stored` bytes."""
        least = 8 * stored / self.space.numel
        if self.budgets[0] < least:
            raise AmqError(
                f"strategy {name!r}: {what} {least:.4f} bits per weight, give --budgets above that instead of "
                f"{self.budgets[0]:g}, or leave it out of --strategies"
            )

    def stacks(self, strategy: Strategy, problem: Problem) -> Found:
        """As many rounds of the linears as fit, in turn, those first whose lack of all but one loses most."""
        stage, made = self.stage, self._table("activation", problem)
        start, model, linears = time.perf_counter(), stage.opened.model, stage.quantized.linears
        choices, weights, lost = dict[float, Choice](), dict[str, stacks.Stack](), dict[str, float]()
        with stage.evaluator.full_precision(), self.progress.stage("stacks", 2 * len(linears)) as step:
            for spec in linears:
                squares = self._outputs[spec.name].features
                weights[spec.name] = stacks.decompose(get_weight(model, spec.name), squares, self.seed)
                step()
            with _in_stacks(model, weights, dict.fromkeys(weights, stacks.ROUNDS)):
                for spec in linears:
                    with _in_stacks(model, weights, {spec.name: 1}):
                        loss = stage.evaluator.loss_as_it_is()
                    lost[spec.name] = loss if math.isfinite(loss) else math.inf
                    step(f"{spec.name}: {loss:.5f}")
            order = sorted(linears, key=lambda spec: -lost[spec.name])
            for budget in self.budgets:
                counts = stacks.fill(order, self.space.capacity(budget))
                stored = sum(counts[spec.name] * stacks.round_bytes(spec) for spec in linears)
                choices[budget] = self._put_choice(stored, partial(_in_stacks, model, weights, counts))
        seconds = time.perf_counter() - start + made.seconds
        return Found(choices, seconds, made.passes, len(choices), len(linears))

    def check_stacks(self, space: SearchSpace) -> None:
        """Raises AmqError where a budget does not hold a round of every linear."""
        first = sum(map(stacks.round_bytes, self.stage.quantized.linears)) + space.pinned_bytes
        self._check_least("bitstack", first, "the first round of every linear takes")

    def _put_choice(self, stored: int, put: Callable[[], AbstractContextManager[None]]) -> Choice:
        """stored: bytes of what has a choice. The loss is that of the model by torch, with `put` in it."""
        with put():
            loss = self.stage.evaluator.loss_as_it_is()
        loss = loss if math.isfinite(loss) else math.inf
        return Choice(8 * (stored + self.space.pinned_bytes) / self.space.numel, loss, put)

    def _table(self, kind: str, problem: Problem) -> _Made:
        if kind == SINGLE:  # its evaluations are in the memo, and charged there
            return _Made(problem.cost_table(SINGLE))
        if kind not in self._tables:
            start = time.perf_counter()
            with self.stage.evaluator.full_precision():
                found, passes = self._make(kind)
            seconds = time.perf_counter() - start
            self._tables |= {name: _Made(table, seconds, passes) for name, table in found.items()}
        return self._tables[kind]

    def _make(self, kind: str) -> tuple[dict[str, Table], int]:
        """Of a kind and of what comes with it."""
        stage, formats = self.stage, self.space.format_names
        of, passes = (stage.opened.model, stage.quantized, stage.near, stage.cost_windows), len(stage.cost_windows)
        if kind == "weight":
            return {"weight": stage.bank.weight_errors()}, 0
        if kind in ("activation", "entropy"):
            self._outputs = output_errors(*of, formats, self.memory)
            activation, entropy = tables(self._outputs)
            return {"activation": activation, "entropy": entropy}, passes
        kinds, done = DRAWN if kind in DRAWN else (TAYLOR,), 0
        found: dict[str, Table] = dict.fromkeys(kinds, {})
        with self.progress.stage(f"cost {' and '.join(kinds)}", passes) as step:
            for one in gradient_passes(*of, formats, self.seed, kinds, stage.corpus.unscored, self.memory):
                found = {name: add_pass(found[name], table, done) for name, table in one.items()}
                done += 1
                step()
        return found, passes

    def _choose(self, table: Table) -> dict[float, dict[str, str]]:
        costs = self.space.variable_costs(table)
        return {
            b: self.space.decode(select(costs, self.space.sizes, self.space.capacity(b))) for b in self.budgets
        }  # fmt: skip

    def _solved(self, problem: Problem, made: _Made) -> Found:
        found = self._evaluated(problem, self._choose(made.table))
        return Found(found.choices, made.seconds, made.passes)

    def _evaluated(self, problem: Problem, formats: Mapping[float, Formats]) -> Found:
        records = problem.evaluate_many([(of, "budget") for of in formats.values()])
        return self._chosen(dict(zip(formats, records, strict=True)))

    def _chosen(self, records: Mapping[float, Record]) -> Found:
        def choice(record: Record) -> Choice:
            parts: list[Part] = [(name, None, fmt) for name, fmt in record.configuration.items()]
            put = partial(assembled, self.stage.opened.model, self.stage.near, parts)
            return Choice(record.bits_per_weight, record.ranked, put, record.configuration)

        return Found({budget: choice(record) for budget, record in records.items()})


@contextmanager
def _new_archive() -> Iterator[Archive]:
    with tempfile.TemporaryDirectory() as folder, closing(Archive(Path(folder) / "archive.jsonl")) as archive:
        yield archive


def _installed(*of: Any) -> AbstractContextManager[None]:
    """of: arguments of `widened`."""
    return installed(of[0], widened(*of))


def _in_dialects(*of: Any) -> AbstractContextManager[None]:
    """of: arguments of `dialects.in_dialects`."""
    return installed(of[0], dialects.in_dialects(*of))


def _in_stacks(*of: Any) -> AbstractContextManager[None]:
    """of: arguments of `stacks.in_stacks`."""
    return installed(of[0], stacks.in_stacks(*of))


HOW: dict[str, Callable[[SeedRun, Strategy, Problem], Found]] = {
    "table": SeedRun.by_table, "uniform": SeedRun.uniform, "recipe": SeedRun.recipe, "gradient": SeedRun.gradient,
    "random": SeedRun.searched, "paper": SeedRun.searched, "greedy": SeedRun.greedy, "refine": SeedRun.refined,
    "rows": SeedRun.by_rows, "channels": SeedRun.channels, "kl": SeedRun.by_divergence,
    "dialect": SeedRun.dialects, "bitstack": SeedRun.stacks,
}  # fmt: skip
"""By `Strategy.how`."""


def _finite(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
