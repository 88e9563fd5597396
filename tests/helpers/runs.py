"""True run folders in a fraction of a second: the search's own code and writers, on the analytic problem.

folder = make_run(tmp_path / "run")                                     # the additive solver, with its cost table
folder = make_run(tmp_path / "run", solver="paper", initial=20)         # any setting of a search
folder = make_run(tmp_path / "run", stop_after=6)                       # as `--time` stops it
"""

from __future__ import annotations

import time
from pathlib import Path

from amq.model.inventory import HEAD, LinearSpec
from amq.search.choose import Budget, check_bits
from amq.search.conduct import Timings, conduct
from amq.search.problem import Problem, Table
from amq.search.records import Cost, KvEntry, LinearEntry, MachineEntry, ModelEntry, OtherEntry, RunFile, TextEntry
from amq.search.run_folder import RunFolder, RunWriter
from amq.search.sensitivity import sensitivity_costs
from amq.search.settings import SearchSettings
from amq.search.space import SearchSpace, is_outer
from helpers.analytic import AnalyticLosses, linears, settings


def make_run(
    path: Path,
    *,
    weights: tuple[LinearSpec, ...] | None = None,
    losses: AnalyticLosses | None = None,
    stop_after: int | None = None,
    **given: object,
) -> RunFolder:
    """A finished run in the folder `path`, or one that was stopped after `stop_after` evaluations of its solver.

    weights: of its model, those of `linears()` unless given.

    given: settings of the search; without a budget, 3.3 bits per weight.
    """
    if not given.keys() & {"target_bits", "max_loss", "memory"}:
        given["target_bits"] = 3.3
    options = settings(**{"output": str(path), **given})
    run = describe(options, weights or linears())
    of = SearchSpace.of(run.inventory, options)
    with RunFolder.create(path, of) as folder:
        stand_in = losses or AnalyticLosses(of)
        problem = Problem(of, folder.archive, stand_in, options.solver, options.seed)
        bits = None if options.target_bits is None else check_bits(options.target_bits, of)
        budget = Budget(bits, options.max_loss)
        problem.budget, problem.max_loss = budget.bits, budget.max_loss
        problem.cost_tables = {
            "fisher": lambda: _fisher(folder, of, stand_in, options),
            "sensitivity": lambda: sensitivity_costs(problem),
            "weight": lambda: _table(of, stand_in),
        }
        if stop_after is not None:
            _stop(problem, stop_after)
        conduct(problem, run, folder, Timings(), time.monotonic())
    return RunFolder.open(path)


def describe(options: SearchSettings, weights: tuple[LinearSpec, ...]) -> RunFile:
    """run.json of a model with these weights, an embedding that is its head as well unless they say otherwise, and
    norms."""
    blocks = [s for s in weights if not is_outer(s)]
    outer = [s for s in weights if is_outer(s)]
    tied = not any(s.kind == HEAD and not s.tied for s in outer)
    others = (OtherEntry("embed.weight", "embedding", 256 * 64), OtherEntry("norm.weight", "norm_or_bias", 64))
    if not tied:
        others = (*others, OtherEntry("lm_head.weight", "lm_head", 256 * 64))
    return RunFile(
        status="running",
        model=ModelEntry(
            name=options.model, fingerprint="f" * 32,
            parameters=sum(s.numel for s in blocks) + sum(o.numel for o in others),
            blocks=1 + max(s.block for s in blocks), architecture="AnalyticForCausalLM",
        ),
        settings=options,
        calibration=TextEntry(name="pydoc", sha256="0" * 64, tokens=4096, windows="1" * 32, window_prefix=("<s>",)),
        versions={"amq": "0", "python": "3"},
        machine=MachineEntry(cpu="a CPU", system="Linux", threads=2, device="cpu"),
        bank="/nowhere",
        linears=LinearEntry.of(blocks),
        outer=LinearEntry.of(outer),
        others=others,
        head_is_tied=tied,
        kv_cache=KvEntry(
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64
        ),
        pinned={},
    )  # fmt: skip


def _table(of: SearchSpace, losses: AnalyticLosses) -> Table:
    wanted = {s.name: of.weight_sizes[s.name].keys() & losses.table[s.name].keys() for s in of.quantized}
    return {name: {fmt: losses.table[name][fmt] for fmt in sorted(formats)} for name, formats in wanted.items()}


def _fisher(folder: RunWriter, of: SearchSpace, losses: AnalyticLosses, options: SearchSettings) -> Table:
    table = _table(of, losses)
    folder.write(Cost(kind="fisher", unit="nats/token", passes=options.cost_passes, cost=table))
    return table


def _stop(problem: Problem, evaluations: int) -> None:
    """The time is up once the archive has `evaluations` records; conduct sets the deadline after the first."""
    check = problem.check_time

    def check_time() -> None:
        if problem.step is not None and len(problem.archive.records) >= evaluations:
            problem.deadline = 0.0
        check()

    problem.check_time = check_time  # type: ignore[method-assign]
