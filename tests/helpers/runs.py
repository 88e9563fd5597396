"""True run folders in a fraction of a second: the search's own code and writers, on the analytic problem.

folder = make_run(tmp_path / "run")                                     # the additive solver, with its cost table
folder = make_run(tmp_path / "run", solver="paper", initial=20)         # any setting of a search
folder = make_run(tmp_path / "run", stop_after=6)                       # as `--time` stops it
"""

from __future__ import annotations

import time
from pathlib import Path

from amq.configuration import parse_pins
from amq.search.choose import Budget, check_bits
from amq.search.conduct import Timings, conduct
from amq.search.problem import Problem, Table
from amq.search.records import Cost, KvEntry, LinearEntry, MachineEntry, ModelEntry, OtherEntry, RunFile, TextEntry
from amq.search.run_folder import RunFolder, RunWriter
from amq.search.sensitivity import sensitivity_costs
from amq.search.settings import SearchSettings
from amq.search.space import SearchSpace, is_outer
from helpers.analytic import AnalyticLosses, linears, settings, space


def make_run(
    path: Path,
    *,
    blocks: int = 4,
    losses: AnalyticLosses | None = None,
    stop_after: int | None = None,
    **given: object,
) -> RunFolder:
    """A finished run in the folder `path`, or one that was stopped after `stop_after` evaluations of its solver.

    given: settings of the search; without a budget, 3.3 bits per weight.
    """
    if not given.keys() & {"target_bits", "max_loss", "memory"}:
        given["target_bits"] = 3.3
    options = settings(**{"output": str(path), **given})
    of = make_space(options, blocks)
    run = describe(options, of)
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


def make_space(options: SearchSettings, blocks: int) -> SearchSpace:
    pinned = parse_pins(options.pin, linears(blocks))
    return space(options.formats, blocks, pinned=pinned, ties=options.ties)


def describe(options: SearchSettings, of: SearchSpace) -> RunFile:
    """run.json of a model with the linears of `of`, an embedding and its tied head, and norms."""
    return RunFile(
        status="running",
        model=ModelEntry(
            name=options.model, fingerprint="f" * 32, parameters=of.numel + 256 * 64 + 64,
            blocks=1 + max(s.block for s in of.weights), architecture="AnalyticForCausalLM",
        ),
        settings=options,
        calibration=TextEntry(name="pydoc", sha256="0" * 64, tokens=4096, windows="1" * 32, window_prefix=("<s>",)),
        versions={"amq": "0", "python": "3"},
        machine=MachineEntry(cpu="a CPU", system="Linux", threads=2, device="cpu"),
        bank="/nowhere",
        linears=LinearEntry.of(s for s in of.weights if not is_outer(s)),
        outer=LinearEntry.of(of.outer),
        others=(OtherEntry("embed.weight", "embedding", 256 * 64), OtherEntry("norm.weight", "norm_or_bias", 64)),
        head_is_tied=True,
        kv_cache=KvEntry(
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64
        ),
        pinned={name: fmt.name for name, fmt in of.pinned.items()},
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
