"""One search from settings to run folder: load, bank, plan, solve, confirm, choose, report.

The run folder is the result and the memory of a search: `run.json` (settings, versions, timings), `archive.jsonl`,
`cost.json`, `sensitivity.json`, `surrogate.json`, `front.json`, `configuration.json` and the report. Everything but the
archive is written whole; see docs/format.md.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amq.configuration import Configuration, parse_pins
from amq.errors import AmqError
from amq.formats import Kept
from amq.model.inventory import Inventory
from amq.model.open import fingerprint as content_hash
from amq.model.opened import OpenModel, open_model
from amq.model.shape import LayerCache
from amq.model.text import Corpus, WindowSampler
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import fisher_passes
from amq.quantize.bank import BankSettings, WeightBank, open_bank
from amq.search.archive import Archive
from amq.search.choose import Budget, budget_from_memory, check_bits, choose, to_configuration
from amq.search.front import pareto_indices
from amq.search.loss_curve import fit_records
from amq.search.problem import Problem, Table, TimeIsUp
from amq.search.records import describe_model, front_json, provenance, versions
from amq.search.run_folder import COST_SCHEMA, RUN_SCHEMA, CostFile, RunFile
from amq.search.sensitivity import sensitivity_costs
from amq.search.settings import SearchSettings, differences
from amq.search.solvers import Solution, get_solver
from amq.search.space import SearchSpace
from amq.util.files import check_place, write_json
from amq.util.limits import check_memory
from amq.util.machine import cpu_name
from amq.util.progress import Progress
from amq.util.settings import parse_size, parse_time

log = logging.getLogger(__name__)

MOST_CONFIRMED = 24
"""Points of the front that are measured again on held-out windows."""


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves: the chosen configuration, the front, and where everything else is."""

    output: Path
    configuration: Configuration
    front: list[dict[str, Any]]
    uniform: list[dict[str, Any]]
    hypervolume: float
    status: str
    timings: dict[str, float]


@dataclass
class _Timings:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class _Stage:
    """A loaded model with its bank and evaluator: everything of a search that touches weights.

    quantized: its linears without those that are kept in 16 bits.
    """

    opened: OpenModel
    quantized: Inventory
    space: SearchSpace
    bank: WeightBank
    evaluator: Evaluator
    cost_windows: torch.Tensor
    corpus: Corpus
    windows_key: str
    budget: Budget


def run_search(settings: SearchSettings, resume: bool = False, progress: Progress | None = None) -> SearchResult:
    """Runs (or resumes) a search; raises AmqError for bad input before anything is written."""
    progress = progress or Progress()
    output = Path(settings.output)
    started = time.monotonic()
    previous = _check_output(output, settings, resume)
    timings = _Timings()
    stage = _prepare(settings, progress, timings)
    if previous:
        _check_same_inputs(previous, settings, stage)
    run = _describe(settings, stage)
    archive = Archive(output / "archive.jsonl", stage.space)  # first: it refuses a folder that another search is using
    try:
        write_json(output / "run.json", run)
        problem = Problem(stage.space, archive, stage.evaluator, settings.solver, settings.seed, progress=progress)
        problem.budget, problem.max_loss = stage.budget.bits, stage.budget.max_loss
        problem.cost_tables = _cost_tables(settings, stage, problem, output, timings)
        deadline = None if settings.time is None else started + parse_time(settings.time)
        solution, status = _solve(problem, settings, progress, timings, deadline)
        _write_tables(output, solution, problem)
        return _finish(problem, settings, stage, solution, status, run, timings, started)
    finally:
        archive.close()


def _check_output(output: Path, settings: SearchSettings, resume: bool) -> RunFile | None:
    """The earlier run.json when resuming; refuses a folder that is in use or that was made with other settings."""
    check_place(output, "--output")
    exists = output.is_dir() and any(output.iterdir())
    if not exists:
        return None
    if not resume:
        raise AmqError(f"--output {output} is not empty: give another folder, or --resume to go on with the run in it")
    if not (output / "run.json").is_file():
        raise AmqError(f"--resume: {output} holds no run.json, so it is not a run folder of amq")
    previous, before = RunFile.read(output / "run.json")
    if previous.schema != RUN_SCHEMA:
        raise AmqError(
            f"--resume: {output} holds a run of schema {previous.schema!r}, this amq writes {RUN_SCHEMA!r}, and losses "
            "of the two do not compare (windows begin with the tokenizer's BOS now): use another --output"
        )
    changed = differences(before.json(), settings.json())
    if changed:
        raise AmqError(f"--resume: {output} was made with other settings: {'; '.join(changed)}")
    if (output / "archive.jsonl").is_file():  # damaged, or another search's: said before a model is loaded
        Archive(output / "archive.jsonl").close()
    return previous


def _check_same_inputs(previous: RunFile, settings: SearchSettings, stage: _Stage) -> None:
    """Refuses to resume where a name in the settings stands for something else than it did."""
    output = settings.output
    if previous.model.fingerprint != stage.opened.fingerprint:
        raise AmqError(
            f"{output} holds a run of another model (or other weights) than {settings.model}: use another --output"
        )
    if previous.calibration.sha256 != stage.corpus.sha256:
        raise AmqError(
            f"--resume: the text {settings.calibration!r} is not the one that {output} was begun with (SHA-256 "
            f"{stage.corpus.sha256[:12]}…, was {previous.calibration.sha256[:12]}…): restore it or use another --output"
        )
    if previous.calibration.windows not in ("", stage.windows_key):
        raise AmqError(
            f"--resume: the text {settings.calibration!r} gives other windows of tokens than when {output} was begun: "
            f"the tokenizer of {settings.model} or the version of amq has changed; use another --output"
        )


def _prepare(settings: SearchSettings, progress: Progress, timings: _Timings) -> _Stage:
    with timings.measure("load"):
        opened = open_model(settings.model, settings.dtype, settings.device, settings.trust_remote_code)
        inventory = opened.inventory
        size = opened.model.get_input_embeddings().weight.dtype.itemsize
        check_memory(
            sum(s.numel for s in inventory.linears) * size + parse_size(settings.cache_memory),
            "the working copy of the linears and --cache-memory", settings.device,
        )  # fmt: skip
        pinned = parse_pins(settings.pin, inventory.linears)
        space = SearchSpace.build(inventory.linears, settings.bit_formats, settings.group_size, pinned, settings.ties)
        quantized = inventory.only({s.name for s in space.quantized})
        budget = _budget(settings, opened, space)
        corpus = opened.corpus(settings.calibration)
        sampler = WindowSampler(corpus, settings.window_length, settings.seed)
        bank_windows = sampler.take(settings.bank_windows)
        windows = {"search": sampler.take(settings.windows), "confirm": sampler.take(settings.confirm_windows)}
        cost_windows = sampler.take(settings.cost_passes)
        fingerprint = opened.fingerprint
        windows_key = content_hash([*windows.items(), ("bank", bank_windows), ("cost", cost_windows)])
    pins = {fmt for fmt in pinned.values() if not isinstance(fmt, Kept)}
    formats = sorted({*settings.bit_formats, *pins}, key=lambda f: f.code_bits)
    with timings.measure("bank"):
        bank = open_bank(
            opened.model, quantized, formats, BankSettings(settings.proxy, settings.group_size, bank_windows), progress,
            fingerprint=fingerprint,
        )  # fmt: skip
    with timings.measure("reference"):
        evaluator = Evaluator(
            opened.loaded, inventory, bank, windows, settings.loss, parse_size(settings.cache_memory), settings.backend,
            settings.activations, corpus.unscored,
        )  # fmt: skip
    return _Stage(opened, quantized, space, bank, evaluator, cost_windows, corpus, windows_key, budget)


def _budget(settings: SearchSettings, opened: OpenModel, space: SearchSpace) -> Budget:
    """What is asked for; raises AmqError where nothing fits it."""
    if settings.max_loss is not None:
        return Budget(max_loss=settings.max_loss)
    if settings.memory is not None:
        memory = parse_size(settings.memory)
        caches = _caches(settings, opened)
        return Budget(budget_from_memory(memory, settings.context, opened.inventory, caches, space))
    if settings.target_bits is not None:
        return Budget(check_bits(settings.target_bits, space))
    # no budget given: the cost of the middle format, so that there is something to compare with
    middle = space.formats[len(space.formats) // 2]
    low, high = space.bits_range
    return Budget(min(max(space.bits_of(space.uniform(middle)), low), high))


def _caches(settings: SearchSettings, opened: OpenModel) -> tuple[LayerCache, ...]:
    """What the model's layers keep of a sequence; nothing without --context, where it need not be known."""
    return opened.shape.caches if settings.context else ()


def _cost_tables(
    settings: SearchSettings, stage: _Stage, problem: Problem, output: Path, timings: _Timings
) -> dict[str, Any]:
    def timed(make: Any) -> Any:
        def table() -> Table:
            with timings.measure("cost"):
                return make()

        return table

    return {
        "fisher": timed(lambda: _fisher(settings, stage, problem, output / "cost.json")),
        "sensitivity": timed(lambda: sensitivity_costs(problem)),
        "weight": timed(stage.bank.weight_errors),
    }


def _fisher(settings: SearchSettings, stage: _Stage, problem: Problem, path: Path) -> Table:
    """The Fisher table, one file update per pass, so that an interrupted search goes on at the next pass."""
    formats = [f.name for f in stage.bank.formats]
    done, total = 0, None
    if path.is_file():
        saved = CostFile.read(path, stage.space)
        if saved.kind != "fisher" or saved.passes is None or saved.passes > settings.cost_passes:
            raise AmqError(
                f"{path}: expected a Fisher table of at most {settings.cost_passes} passes, got {saved.kind!r} of "
                f"{saved.passes}: delete it and run the search with --resume"
            )
        done, total = saved.passes, saved.cost
    with (
        problem.progress.stage("cost table", max(1, settings.cost_passes - done)) as step,
        stage.evaluator.full_precision(),
    ):
        passes = fisher_passes(
            stage.opened.model, stage.quantized, stage.bank, stage.cost_windows, formats, settings.seed, done,
            stage.corpus.unscored,
        )  # fmt: skip
        for table in passes:
            total = table if total is None else {
                n: {f: (total[n][f] * done + row[f]) / (done + 1) for f in row} for n, row in table.items()
            }  # fmt: skip
            done += 1
            write_json(
                path, {"schema": COST_SCHEMA, "kind": "fisher", "unit": "nats/token", "passes": done, "cost": total}
            )
            step()
            if done < settings.cost_passes:
                problem.check_time()
    return total


def _solve(
    problem: Problem, settings: SearchSettings, progress: Progress, timings: _Timings, deadline: float | None
) -> tuple[Solution, str]:
    planned = _planned_evaluations(settings, problem.space)
    with timings.measure("evaluate"):  # the trial evaluation; every solver starts with it
        trial = problem.evaluate(problem.space.uniform(problem.space.formats[-1]), "uniform")
    progress.say(_plan(problem, planned, trial["seconds"]))
    problem.deadline = deadline
    solution, status = Solution(), "finished"
    with timings.measure("solve"), progress.stage("search", planned) as problem.step:
        try:
            solution = get_solver(settings.solver)(problem, settings)
        except TimeIsUp:
            status = "stopped"
    problem.step = None
    if status == "stopped":
        progress.say(
            f"--time {settings.time} is up: choosing from {len(problem.archive.records)} evaluations (--resume goes on)"
        )
    return solution, status


def _planned_evaluations(settings: SearchSettings, space: SearchSpace) -> int:
    linears = sum(len(v) for v in space.variables)
    uniform = len(space.formats)
    if settings.solver == "additive":
        sensitivities = linears * (uniform - 1) if settings.cost == "sensitivity" else 0
        return uniform + 1 + settings.points + settings.refine + sensitivities
    return uniform + linears + settings.initial + settings.iterations * settings.per_iteration


def _plan(problem: Problem, planned: int, seconds: float) -> str:
    import psutil

    space = problem.space
    low, high = space.bits_range
    pinned = f", {len(space.pinned)} pinned" if space.pinned else ""
    resident = psutil.Process().memory_info().rss / 2**30
    target = f"loss ≤ {problem.max_loss}" if problem.max_loss is not None else f"{problem.budget:.4f} bits per weight"
    formats = ",".join(space.format_names)
    return (
        f"plan: {len(space.linears)} linears{pinned}, {len(space.variables)} variables, formats {formats}, "
        f"10^{space.log10_size:.0f} configurations of {low:.3f} to {high:.3f} bits per weight; budget {target}\n"
        f"plan: about {planned} evaluations of {seconds:.2f} s (measured) = {planned * seconds / 60:.1f} min, "
        f"and the confirmation of the front; {resident:.2f} GiB resident"
    )


def _write_tables(output: Path, solution: Solution, problem: Problem) -> None:
    if solution.table is not None and not (output / "cost.json").is_file():
        kind = "sensitivity" if any(r["phase"] == "sensitivity" for r in problem.archive.records) else "weight"
        unit = "−ln(1 − loss/ln 2)" if kind == "sensitivity" else "sum of squares"
        write_json(output / "cost.json", {"schema": COST_SCHEMA, "kind": kind, "unit": unit, "cost": solution.table})
    if solution.sensitivity is not None:
        write_json(output / "sensitivity.json", solution.sensitivity.json())
    if problem.surrogate_log:
        write_json(output / "surrogate.json", problem.surrogate_log)


def _finish(
    problem: Problem, settings: SearchSettings, stage: _Stage, solution: Solution, status: str,
    run: dict[str, Any], timings: _Timings, started: float,
) -> SearchResult:  # fmt: skip
    output = Path(settings.output)
    fit = fit_records(problem.archive.records, solution.table) if solution.table else None
    chosen = choose(stage.budget, stage.space, problem.archive.records, solution.table, fit)
    with timings.measure("confirm"):
        front = _confirm(problem, chosen.formats, status)
    chosen = choose(stage.budget, stage.space, problem.archive.records, solution.table, fit)
    configuration = to_configuration(
        chosen, settings.model, settings.group_size, stage.opened.inventory, _caches(settings, stage.opened),
        settings.context, provenance(settings.json(), stage.opened.fingerprint, stage.corpus.prefix_names),
    )  # fmt: skip
    configuration.save(output / "configuration.json")
    content = front_json(problem, front, solution.table, fit)
    write_json(output / "front.json", content)
    run.update(status=status, pinned={n: f.name for n, f in _all_pins(problem.space, solution).items()})
    run["timings"] = {k: round(v, 3) for k, v in timings.seconds.items()}
    run["timings"]["total"] = round(time.monotonic() - started, 3)
    run["evaluations"] = _evaluation_counts(problem, stage.evaluator, timings)
    write_json(output / "run.json", run)
    return SearchResult(
        output, configuration, content["front"], content["uniform"], content["hypervolume"], status, run["timings"]
    )


def _all_pins(space: SearchSpace, solution: Solution) -> dict[str, Any]:
    pruned = solution.sensitivity.pinned if solution.sensitivity else ()
    return {**space.pinned, **dict.fromkeys(pruned, space.formats[-1])}


def _confirm(problem: Problem, chosen: dict[str, str], status: str) -> list[dict[str, Any]]:
    """Measures the uniform points, the front and the chosen configuration on the held-out windows.

    Returns the front.
    """
    records = problem.archive.evaluated()
    front = [records[i] for i in pareto_indices(problem.points())]
    if len(front) > MOST_CONFIRMED:  # a long paper run: confirm an even selection of its front
        front_shown = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, MOST_CONFIRMED).round().astype(int))]
    else:
        front_shown = front
    wanted = [r for r in records if r["phase"] == "uniform"] + front_shown
    wanted = [r["configuration"] for r in wanted] + [chosen]
    problem.deadline = None  # a stopped search still gets its error bars for what it chose
    if status == "stopped":
        wanted = [chosen]
    if problem.archive.find(chosen) is None:
        problem.evaluate(chosen, "budget")
    with problem.progress.stage("confirm", len(wanted)) as step:
        for formats in wanted:
            record = problem.evaluate(formats, "confirm", windows="confirm")
            step("" if record["loss"] is None else f"{record['bits_per_weight']:.3f} bits: {record['loss']:.5f}")
    return front


def _evaluation_counts(problem: Problem, evaluator: Evaluator, timings: _Timings) -> dict[str, Any]:
    fresh = problem.archive.evaluated()
    seconds = [r["seconds"] for r in fresh if r["phase"] != "sensitivity"]
    each = float(np.median(seconds)) if seconds else None
    return {
        "count": sum(r["windows"] == "search" and r["phase"] != "sensitivity" for r in problem.archive.records),
        "sensitivities": sum(r["phase"] == "sensitivity" for r in problem.archive.records),
        "confirmations": sum(r["windows"] == "confirm" for r in problem.archive.records),
        "seconds_each": each,
        "cost_in_evaluations": round(timings.seconds.get("cost", 0.0) / each, 2) if each else None,
        "share_outside_model": round(1 - evaluator.seconds_in_model / evaluator.seconds, 4)
        if evaluator.seconds
        else None,
    }


def _describe(settings: SearchSettings, stage: _Stage) -> dict[str, Any]:
    inventory = stage.opened.inventory
    return {
        "schema": RUN_SCHEMA,
        "status": "running",
        "model": {
            "name": settings.model, "fingerprint": stage.opened.fingerprint, "parameters": inventory.numel,
            "blocks": inventory.n_blocks, "class": type(stage.opened.model).__name__,
        },
        "settings": settings.json(),
        "calibration": {
            "name": stage.corpus.name, "sha256": stage.corpus.sha256, "tokens": len(stage.corpus.tokens),
            "windows": stage.windows_key, "window_prefix": list(stage.corpus.prefix_names),
        },
        "versions": versions(),
        "machine": {
            "cpu": cpu_name(), "system": platform.platform(),
            "threads": torch.get_num_threads(), "device": settings.device,
        },
        "bank": str(stage.bank.folder),
        **describe_model(inventory, stage.opened.shape),
        "pinned": {n: f.name for n, f in stage.space.pinned.items()},
    }  # fmt: skip
