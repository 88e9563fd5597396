"""Fronts of several searches of one bank, text and loss, side by side: on the search's windows and on held-out text.

    python benchmarks/paper_front.py "paper=RUN" "additive=RUN" "refined=RUN,RUN,…" --text FILE \\
        --json benchmarks/results/FILE.json --plot docs/paper-front.png

Each method is one run folder, or several of which each was made for a budget of its own. At every budget a method gives
what `amq search select` gives: the best that was measured, or what its table predicts to be better; of several runs the
best on the search's windows. All of these are measured again by the reference, on the windows that all of the runs
searched with, and on windows of another text, which none of them has seen. HV6 is the hypervolume of the six losses and
of the two uniform end points, normalised by the box up to (largest bits, 0.70 nats).
"""

from __future__ import annotations

import argparse
import filecmp
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from provenance import write_results

matplotlib.use("Agg")
from matplotlib import pyplot

from amq.configuration import Configuration
from amq.proxy.evaluator import Evaluator
from amq.search.front import REFERENCE_LOSS, hypervolume
from amq.search.run import prepare
from amq.search.run_folder import RunFolder
from amq.search.select import select_from_run
from amq.util.progress import LineProgress

BUDGETS = (2.5, 2.75, 3.0, 3.25, 3.5, 4.0)
ALIKE = (
    *("model", "proxy", "group_size", "formats", "head", "loss"),
    *("calibration", "window_length", "windows", "seed", "dtype"),
)
"""Settings without which losses of two runs do not compare."""
KINDS = ("search", "held_out")
STYLES = (("#D55E00", "s"), ("#0072B2", "o"), ("#009E73", "D"), ("#CC79A7", "^"))
"""Okabe and Ito's colours, and shapes for who sees none."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="NAME=RUN[,RUN…]")
    parser.add_argument("--text", required=True, help="held-out text, as --calibration of amq.search takes it")
    parser.add_argument("--windows", type=int, default=4, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    runs = {name: [RunFolder.open(Path(p)) for p in paths.split(",")] for name, paths in map(_pair, args.methods)}
    check_alike([run for some in runs.values() for run in some])
    measured = Measured(next(iter(runs.values()))[0], args.text, args.windows, args.length)
    uniform = [measured.losses(dict(measured.space.uniform(fmt))) for fmt in measured.space.formats]
    rows = {}
    for name, some in runs.items():
        points = [measured.losses(formats) for formats in (best(some, budget, measured) for budget in args.budgets)]
        rows[name] = {
            **effort(some),
            "points": [{"budget": budget, **point} for budget, point in zip(args.budgets, points, strict=True)],
            **{
                f"hv6_{kind}": measured.volume([*points, uniform[0], uniform[-1]], kind)
                for kind in ("search", "held_out")
            },
        }
        print(name, rows[name], flush=True)
    settings = {name: getattr(measured.run.settings, name) for name in ALIKE}
    held_out = {"text": Path(args.text).name, "windows": args.windows, "length": args.length}
    content = {"settings": settings, "held_out": held_out, "uniform": uniform, "methods": rows}
    write_results(args.json, content)
    if args.plot:
        draw(content, args.plot)
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, _, paths = text.partition("=")
    if not paths:
        sys.exit(f"{text}: expected NAME=RUN")
    return name, paths


def check_alike(runs: list[RunFolder]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for name in ALIKE:
            if getattr(run.settings, name) != getattr(first.settings, name):
                sys.exit(f"--{name} of {run.path} is {getattr(run.settings, name)}, that of {first.path} "
                         f"{getattr(first.settings, name)}: their losses do not compare")  # fmt: skip
        if not same_bank(Path(run.run.bank), Path(first.run.bank)):
            sys.exit(f"{run.path} and {first.path} have different banks: their losses do not compare")


def same_bank(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights: versions of amq name a bank differently that has not changed."""
    names = sorted(path.name for path in one.glob("block-*.safetensors"))
    return one == other or (bool(names) and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names)


class Measured:
    """Losses by the reference, on the windows of `run`'s search and on `count` windows of `length` tokens of `text`."""

    def __init__(self, run: RunFolder, text: str, count: int, length: int) -> None:
        self.run = run
        settings = replace(run.settings, backend="reference", activations="fp32")
        stage = prepare(settings, LineProgress(), _NoTimings())
        self.space = stage.space
        held_out = stage.opened.sampler(text, length, 0, count)
        self._search = stage.evaluator
        self._held_out = Evaluator(
            stage.opened.loaded, stage.opened.inventory, stage.near, {"held out": held_out.take(count)},
            settings.loss, unscored=held_out.corpus.unscored,
        )  # fmt: skip
        self._known: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}

    def losses(self, formats: dict[str, str]) -> dict[str, float]:
        key = tuple(sorted(formats.items()))
        if key not in self._known:
            search = self._search.evaluate(formats)
            self._search.restore()
            held_out = self._held_out.evaluate(formats, "held out")
            self._held_out.restore()
            bits = round(self.space.bits_of(formats), 4)
            self._known[key] = {"bits_per_weight": bits, "search": search, "held_out": held_out}
        return self._known[key]

    def volume(self, points: list[dict[str, float]], kind: str) -> float:
        return hypervolume(np.array([(p["bits_per_weight"], p[kind]) for p in points]), self.space.front_range)


class _NoTimings:
    """Stands in for what a search measures its stages with."""

    def measure(self, name: str):
        from contextlib import nullcontext

        return nullcontext()


def best(runs: list[RunFolder], budget: float, measured: Measured) -> dict[str, str]:
    """What the runs choose for a budget; of several the best on the search's windows."""
    found: list[Configuration] = [select_from_run(run.path, target_bits=budget) for run in runs]
    return dict(min((dict(c.formats) for c in found), key=lambda formats: measured.losses(formats)["search"]))


def effort(runs: list[RunFolder]) -> dict[str, object]:
    """What was evaluated, each configuration once per run, and how long it took."""
    records = [record for run in runs for record in run.archive]
    each = [record.seconds for record in records if record.windows == "search"]
    return {
        "runs": len(runs),
        "evaluations": sum(r.windows == "search" and r.phase != "sensitivity" for r in records),
        "sensitivities": sum(r.phase == "sensitivity" for r in records),
        "confirmations": sum(r.windows != "search" for r in records),
        "seconds_evaluating": round(sum(r.seconds for r in records), 1),
        "seconds_each": round(float(np.median(each)), 4),
        "seconds_total": round(sum((run.run.timings or {}).get("total", 0.0) for run in runs), 1),
        "status": sorted({run.run.status for run in runs}),
        "measured_by": sorted({run.run.measured_by for run in runs}),
    }


def draw(content: dict, path: Path) -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axes, kind, title in zip(
        panels, ("search", "held_out"), ("the search's windows", "held-out text"), strict=True
    ):
        axes.plot([p["bits_per_weight"] for p in content["uniform"]], [p[kind] for p in content["uniform"]],
                  linestyle="none", marker="x", color="#6B6B6B", label="uniform", markersize=8)  # fmt: skip
        for (name, row), (colour, marker) in zip(content["methods"].items(), STYLES, strict=False):
            bits, losses = zip(*((p["bits_per_weight"], p[kind]) for p in row["points"]), strict=True)
            label = f"{name} ({row['evaluations'] + row['sensitivities']:,} evaluations)"
            axes.plot(bits, losses, color=colour, marker=marker, label=label)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("bits per weight")
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, REFERENCE_LOSS)
    panels[0].set_ylabel("Jensen–Shannon divergence, nats per token")
    panels[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
