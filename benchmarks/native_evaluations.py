"""Losses and speed of the native engine against the reference that it stands in for, in the default search's setting.

    python benchmarks/native_evaluations.py MODEL --json benchmarks/results/FILE.json

Configurations of the search's own space are measured by the reference (torch, float32), and natively with activations
of 8 bits and of 32, in turns, so that what else the machine does falls on all three alike. Half of them are spread over
all budgets; the others are one that exchanges formats at equal size, which is what a search has to tell apart. Times
are of the processor, per evaluation; those on the wall are there too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from provenance import write_results
from scipy.stats import kendalltau, spearmanr

from amq.proxy.evaluator import Evaluator
from amq.proxy.native import NativeStates
from amq.search.run import _quantized, prepare
from amq.search.settings import SearchSettings
from amq.util.progress import LineProgress
from amq.util.settings import parse_size

ENGINES = ("reference", "native int8", "native fp32")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--settings", type=json.loads, default={}, help="further settings of the search, as JSON")
    parser.add_argument("--configurations", type=int, default=24)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    settings = SearchSettings.make(model=args.model, output="unused", backend="reference", **args.settings)
    stage = prepare(settings, LineProgress(), _NoTimings())
    evaluators = {"reference": stage.evaluator, **{f"native {a}": native(stage, settings, a) for a in ("int8", "fp32")}}
    configurations = spread(stage.space, args.configurations // 2) + alike(stage.space, args.configurations // 2)
    rows = []
    for index, formats in enumerate([configurations[0], *configurations]):  # the first one warms up
        row = {"bits_per_weight": round(stage.space.bits_of(formats), 4), "head": head_of(stage.space, formats)}
        for name, evaluator in evaluators.items():
            start, wall = time.process_time(), time.perf_counter()
            loss = evaluator.evaluate(formats)
            row[name] = {
                "loss": loss,
                "cpu_seconds": time.process_time() - start,
                "seconds": time.perf_counter() - wall,
            }
            evaluator.restore()
        if index:
            rows.append(row)
            print(row, flush=True)
    content = {"settings": settings.json(), "summary": summary(rows), "configurations": rows}
    print(content["summary"])
    write_results(args.json, content)
    return 0


class _NoTimings:
    """Stands in for what a search measures its stages with."""

    def measure(self, name: str):
        return nullcontext()


def native(stage, settings: SearchSettings, activations: str) -> Evaluator:
    opened = stage.opened
    states = NativeStates(opened.loaded, _quantized(opened.inventory, stage.space), settings.group_size, activations)
    windows = {"search": stage.evaluator._windows["search"]}
    return Evaluator(
        opened.loaded, opened.inventory, stage.near, windows, settings.loss, parse_size(settings.cache_memory), "cpu",
        activations, stage.corpus.unscored, native=states,
    )  # fmt: skip


def spread(space, count: int) -> list[dict[str, str]]:
    """Random formats around a budget each, over all budgets."""
    rng = np.random.default_rng(0)
    found = []
    for place in np.linspace(0.1, 0.9, count):
        shares = rng.beta(1 + 8 * place, 1 + 8 * (1 - place), len(space.variables))
        found.append(space.decode(np.minimum((shares * space.counts).astype(int), space.largest)))
    return found


def alike(space, count: int) -> list[dict[str, str]]:
    """Of one size but for the rounding: every one exchanges the formats of a tenth of the linears with another's."""
    rng = np.random.default_rng(1)
    linears = np.array([len(v) == 1 and v[0].kind == "linear" for v in space.variables])
    base = np.minimum(rng.integers(0, 3, len(space.variables)), space.largest)
    roles = np.array([v[0].role for v in space.variables])
    found = []
    for _ in range(count):
        point = base.copy()
        for role in sorted(set(roles[linears])):
            places = np.flatnonzero(linears & (roles == role))
            some = rng.choice(places, max(2, len(places) // 5), replace=False)
            point[some] = rng.permutation(point[some])
        found.append(space.decode(point))
    return found


def head_of(space, formats: dict[str, str]) -> dict[str, str]:
    return {spec.name: formats[spec.name] for spec in space.outer if spec.name in formats}


def summary(rows: list[dict]) -> dict:
    half = len(rows) // 2
    found: dict = {}
    for name in ENGINES:
        cpu = np.array([row[name]["cpu_seconds"] for row in rows])
        found[name] = {
            "cpu_seconds": round(float(np.median(cpu)), 3),
            "seconds": round(float(np.median([row[name]["seconds"] for row in rows])), 3),
            "speed_up": round(float(np.median([row["reference"]["cpu_seconds"] for row in rows] / cpu)), 2),
        }
        if name == "reference":
            continue
        losses, truth = (np.array([row[of]["loss"] for row in rows]) for of in (name, "reference"))
        found[name] |= {
            "largest_difference": float(np.abs(losses - truth).max()),
            "mean_difference": float((losses - truth).mean()),
            "relative": {
                "median": float(np.median(losses / truth - 1)),
                "largest": float(np.abs(losses / truth - 1).max()),
            },
        }
        for part, of in (("all", slice(None)), ("spread", slice(0, half)), ("alike", slice(half, None))):
            found[name][part] = {
                "spearman": round(float(spearmanr(losses[of], truth[of])[0]), 4),
                "kendall": round(float(kendalltau(losses[of], truth[of])[0]), 4),
                "best_agrees": bool(losses[of].argmin() == truth[of].argmin()),
            }
    return found


if __name__ == "__main__":
    sys.exit(main())
