"""Solvers at equal numbers of true evaluations on SmolLM2: hypervolume, losses at fixed budgets, compute.

    python benchmarks/compare_solvers.py --seeds 0,1,2 --json benchmarks/results/FILE.json

Protocol: int2/int3/int4 at group 64, loss on 2 windows of 256 tokens of pydoc_data.topics, budgets 2.75, 3.0 … 4.25
bits per weight. HV7 is the hypervolume of the best losses at those seven budgets and the two uniform end points,
normalised by the box up to (4.5 bits, 0.70 nats). A seed changes the text windows, the sampled labels and every random
draw of a solver. `evaluations` counts true evaluations of the solver; `equivalents` adds everything else it measured
(sensitivities, backward passes) in units of one evaluation's time, so that a solver cannot hide its cost. A
configuration that several methods ask for is measured once and charged to each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from provenance import write_results

from amq.configuration import configuration_key
from amq.formats import FORMATS
from amq.search.archive import Archive
from amq.search.conduct import Timings
from amq.search.front import hypervolume
from amq.search.problem import Problem
from amq.search.run import _cost_tables, _prepare
from amq.search.run_folder import RunWriter
from amq.search.settings import SearchSettings
from amq.search.solvers import SOLVERS
from amq.util.progress import LineProgress

BUDGETS = tuple(2.5 + 0.25 * i for i in range(1, 8))
SHOWN = (2.75, 3.0, 3.25, 3.5, 4.0)
METHODS = {
    "additive, Fisher": {"solver": "additive", "cost": "fisher"},
    "additive, weight error": {"solver": "additive", "cost": "weight"},
    "additive, sensitivity": {"solver": "additive", "cost": "sensitivity"},
    "random": {"solver": "random", "initial": 20, "iterations": 0},
    "paper, scaled to 20": {"solver": "paper", "initial": 10, "iterations": 2, "per_iteration": 5},
    "random, 225": {"solver": "random", "initial": 225, "iterations": 0},
    "paper, scaled to 275": {"solver": "paper", "initial": 225, "iterations": 5, "per_iteration": 10},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--proxy", default="hqq")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(f'"{m}"' for m in METHODS), help="quoted names, comma-separated")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    methods = json.loads(f"[{args.methods}]")
    rows = []
    for seed in (int(s) for s in args.seeds.split(",")):
        base = {"model": args.model, "output": "-", "group_size": 64, "proxy": args.proxy, "windows": 2,
                "window_length": 256, "points": len(BUDGETS), "seed": seed, "head": "16bit"}  # fmt: skip
        timings = Timings()
        stage = _prepare(SearchSettings.make(**base), LineProgress(), timings)
        losses = MemoLosses(stage.evaluator)
        for method in methods:
            row = run_method(SearchSettings.make(**{**base, **METHODS[method]}), stage, losses)
            rows.append({"method": method, "seed": seed, **row})
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows, methods))
    if args.json:
        write_results(args.json, {"schema": "amq/compare/1", "proxy": args.proxy, "rows": rows})
    return 0


class MemoLosses:
    """Losses that are measured once per seed; `spent` is what the current method would have paid, in seconds."""

    def __init__(self, evaluator) -> None:  # noqa: ANN001
        self._evaluator = evaluator
        self._known: dict[tuple[str, str], tuple[float, float]] = {}
        self.spent = 0.0
        self.each: list[float] = []

    def evaluate(self, formats, windows="search"):  # noqa: ANN001, ANN201
        return next(self.evaluate_many([formats], windows))[0]

    def evaluate_many(self, configurations, windows="search"):  # noqa: ANN001, ANN201
        keys = [(configuration_key(formats), windows) for formats in configurations]
        missing = {k: f for k, f in zip(keys, configurations, strict=True) if k not in self._known}
        left, start = iter(missing), time.perf_counter()
        for losses in self._evaluator.evaluate_many(list(missing.values()), windows):
            now = time.perf_counter()
            for loss in losses:
                self._known[next(left)] = loss, (now - start) / len(losses)
                self.each.append((now - start) / len(losses))
            start = now
        for key in keys:
            loss, seconds = self._known[key]
            self.spent += seconds
            yield [loss]


def run_method(settings: SearchSettings, stage, losses: MemoLosses) -> dict:  # noqa: ANN001
    """One solver on a fresh archive."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(Path(folder) / "archive.jsonl")
        problem = Problem(stage.space, archive, losses, settings.solver, settings.seed)
        timings = Timings()
        problem.cost_tables = _cost_tables(settings, stage, problem, RunWriter(Path(folder), archive), timings)
        losses.spent = 0.0
        SOLVERS[settings.solver](problem, settings)
        archive.close()
    # the sensitivity table's seconds are in `spent` already
    seconds = losses.spent + (timings.seconds.get("cost", 0.0) if settings.cost == "fisher" else 0.0)
    each = float(np.median(losses.each))
    # the 210 sensitivities are measured before the front; the front itself is what the solver chose to evaluate
    chosen = [r for r in archive.evaluated() if r.phase != "sensitivity"]
    ends = [stage.space.uniform(FORMATS[n]) for n in ("int2", "int4")]
    losses = {b: min((r.loss for r in chosen if r.bits_per_weight <= b + 1e-6), default=np.log(2)) for b in BUDGETS}
    points = [(b, loss) for b, loss in losses.items()]
    points += [(stage.space.bits_of(e), archive.find(e).loss) for e in ends]
    return {
        "evaluations": len(chosen), "sensitivities": len(archive.records) - len(chosen),
        "hv7": round(hypervolume(np.array(points), stage.space.bits_range), 4),
        "losses": {str(b): round(losses[b], 4) for b in BUDGETS}, "seconds": round(seconds, 1),
        "equivalents": round(seconds / each, 1),
    }  # fmt: skip


def table(rows: list[dict], methods: list[str]) -> str:
    """Markdown, medians over seeds."""
    lines = ["| method | evaluations | equivalents | " + " | ".join(f"{b:g}" for b in SHOWN) + " | HV7 (each seed) |",
             "|---|---|---|" + "---|" * (len(SHOWN) + 1)]  # fmt: skip
    for method in methods:
        mine = [r for r in rows if r["method"] == method]
        losses = [f"{np.median([r['losses'][str(b)] for r in mine]):.3f}" for b in SHOWN]
        extra = f" + {mine[0]['sensitivities']} single" if mine[0]["sensitivities"] else ""
        each = ", ".join(format(r["hv7"], ".3f") for r in mine)
        hv = f"{np.median([r['hv7'] for r in mine]):.3f} ({each})"
        cost = np.median([r["equivalents"] for r in mine])
        lines.append(
            f"| {method} | {mine[0]['evaluations']}{extra} | {cost:.0f} | " + " | ".join(losses) + f" | {hv} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
