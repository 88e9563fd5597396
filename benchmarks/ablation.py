"""What each part of a search is worth at equal bytes: `python benchmarks/ablation.py --text FILE --json FILE`.

The search as it was without any of them, then each alone, then all together (VARIANTS). What a variant chooses at each
of --bits (head and embeddings counted) is measured as perplexity on texts that nobody calibrated with. With bank and
cost table go the time they took and the most memory that the process held meanwhile, the model included. Rows are
added to FILE as they are done, and a second call goes on with what is missing. A variant whose setting this version
does not have is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance, write_results

from amq.errors import AmqError
from amq.model.perplexity import perplexity
from amq.model.text import fixed_windows
from amq.proxy.fisher import RUNS, Table, fisher_passes
from amq.proxy.rows import RowBlocks, assembled, score_rows
from amq.search.archive import Archive
from amq.search.conduct import Timings
from amq.search.knapsack import select
from amq.search.problem import Problem
from amq.search.refine import AUTO_EVALUATIONS, refine
from amq.search.rows import select_rows
from amq.search.run import prepare
from amq.search.settings import SearchSettings
from amq.search.space import is_outer
from amq.util.files import read_json
from amq.util.progress import Progress, terminal_progress

SCHEMA = "amq/ablation/1"


@dataclass(frozen=True)
class Variant:
    """settings: of the search, those that the bank and the windows depend on. runs: of the Fisher scores. refine: its
    evaluations. blocks: of rows, that each linear is split into."""

    settings: dict[str, Any] = field(default_factory=dict)
    runs: tuple[int, ...] = (1,)
    refine: int = 0
    blocks: int = 1


VARIANTS = {
    "none of them": Variant(),
    "Fisher runs": Variant(runs=RUNS),
    "refine": Variant(refine=AUTO_EVALUATIONS),
    "rows": Variant(blocks=4),
    "guided bank": Variant({"proxy": "guided"}),
    "two-sided bank": Variant({"proxy": "two_sided"}),
    "self-written text": Variant({"calibration": "self"}),
    "rotation": Variant({"rotation": "auto"}),
    "rotation everywhere": Variant({"rotation": "64"}),
    "default": Variant({"rotation": "auto", "calibration": "auto"}, runs=RUNS),
    "default on pydoc": Variant({"rotation": "auto", "calibration": "pydoc"}, runs=RUNS),
    "all but rows": Variant({"rotation": "auto", "calibration": "auto"}, runs=RUNS, refine=AUTO_EVALUATIONS),
}
OFF = {"rotation": "none", "calibration": "pydoc"}
"""What a variant's settings are where it does not say: the search without any of its parts."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="LIST")
    parser.add_argument("--bits", default="2.5,3.0,3.5,4.0", metavar="LIST")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--group-size", type=int, default=128, metavar="G")
    parser.add_argument("--bank-windows", type=int, default=24, metavar="N")
    parser.add_argument("--passes", type=int, default=16, metavar="N", help="backward passes of a Fisher table")
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="that --refine searches on, and is held to")
    parser.add_argument("--window-length", type=int, default=512, metavar="N")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="held out; default: docstrings")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    if unknown := [v for v in args.variants.split(",") if v not in VARIANTS]:
        parser.error(f"--variants: {unknown[0]!r} is none of {', '.join(VARIANTS)}")
    content = read_json(args.json) if args.json.is_file() else {"schema": SCHEMA, "rows": []}
    Ablation(args, content, terminal_progress()).run()
    print(table(content["rows"]))


class Steps(Timings):
    """Also the most memory that the process held in each stage, GiB; none where there is no /proc."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        own = Path("/proc/self")
        if resets := (own / "clear_refs").exists():
            (own / "clear_refs").write_bytes(b"5")  # the high-water mark begins anew
        with super().measure(name):
            yield
        if resets and (found := re.search(r"^VmHWM:\s+(\d+) kB", (own / "status").read_text(), re.MULTILINE)):
            self.peaks[name] = max(self.peaks.get(name, 0.0), int(found[1]) / 2**20)

    def json(self, *names: str) -> dict[str, dict[str, float | None]]:
        return {
            n: {"seconds": round(self.seconds[n], 1), "peak_gib": round(self.peaks[n], 2) if n in self.peaks else None}
            for n in names
            if n in self.seconds
        }


class Ablation:
    """Adds the rows that `content` lacks, one by one. One stage (a model with a bank) is in memory at a time."""

    def __init__(self, args: argparse.Namespace, content: dict[str, Any], progress: Progress) -> None:
        self._args, self._content, self._progress = args, content, progress
        self._made = provenance()  # of every row, because a second call may be of another commit

    def run(self) -> None:
        names = self._args.variants.split(",")
        stages: dict[str, list[str]] = {}
        for name in names:
            if any(not self._done(name, bits) for bits in self._bits):
                stages.setdefault(json.dumps(VARIANTS[name].settings), []).append(name)
        for members in stages.values():
            try:
                settings = self._settings(VARIANTS[members[0]].settings)
            except AmqError as error:
                self._progress.say(f"left out: {', '.join(members)}: {error}")
                continue
            stage = Stage(settings, self._args, self._progress)
            if not self._done("full precision", None):
                self._add({"variant": "full precision", "budget": None, "bits": 16.0}, stage.perplexities())
            for name in members:
                self._measure(stage, name)

    @property
    def _bits(self) -> list[float]:
        return [float(b) for b in self._args.bits.split(",")]

    def _settings(self, given: dict[str, Any]) -> SearchSettings:
        args = self._args
        known = SearchSettings.__dataclass_fields__
        off = {name: value for name, value in OFF.items() if name in known}
        own = {"bank_windows": args.bank_windows, "cost_passes": args.passes, "windows": args.windows}
        own |= {"confirm_windows": args.windows, "window_length": args.window_length, "group_size": args.group_size}
        own |= {"backend": "reference"}  # the model's own modules, which perplexity and blocks of rows want
        return SearchSettings.make(model=args.model, output="-", seed=args.seed, **{**own, **off, **given})

    def _measure(self, stage: Stage, name: str) -> None:
        for bits in self._bits:
            if not self._done(name, bits):
                row, found = stage.measure(VARIANTS[name], bits)
                self._add({"variant": name, "budget": bits, **row}, found)

    def _common(self) -> dict[str, Any]:
        names = ("model", "seed", "group_size", "max_tokens", "passes", "bank_windows", "window_length")
        return {name: getattr(self._args, name) for name in names}

    def _done(self, variant: str, bits: float | None) -> bool:
        key = {"variant": variant, "budget": bits, **self._common()}
        return any(all(row.get(k) == v for k, v in key.items()) for row in self._content["rows"])

    def _add(self, row: dict[str, Any], found: dict[str, float]) -> None:
        row["perplexity"] = {name: round(value, 3) for name, value in found.items()}
        print(json.dumps(row), flush=True)
        made = {name: self._made[name] for name in ("commit", "dirty", "date")}
        self._content["rows"].append(row | self._common() | made)
        write_results(self._args.json, self._content)


class Stage:
    """A model with the bank of one group of variants; cost tables are made when they are first asked for."""

    def __init__(self, settings: SearchSettings, args: argparse.Namespace, progress: Progress) -> None:
        self._settings, self._progress, self._steps = settings, progress, Steps()
        self._stage = stage = prepare(settings, progress, self._steps)
        texts = {Path(text).stem: stage.opened.corpus(text) for text in args.text or ["docstrings"]}
        self._held_out = {n: fixed_windows(c, args.window_length, args.max_tokens) for n, c in texts.items()}
        self._tables: dict[tuple[int, ...], Table] = {}
        self._rows: RowBlocks | None = None

    def perplexities(self) -> dict[str, float]:
        """Of what is in the model."""
        unscored = self._stage.corpus.unscored
        return {n: perplexity(self._stage.opened.model, w, unscored) for n, w in self._held_out.items()}

    def measure(self, variant: Variant, bits: float) -> tuple[dict[str, Any], dict[str, float]]:
        """The row of a variant at a budget, without its name, and its perplexities."""
        stage, space = self._stage, self._stage.space
        table = self._table(variant.runs)
        costs, capacity = space.variable_costs(table), space.capacity(bits)
        steps = {"steps": self._steps.json("bank", f"cost {variant.runs}")}
        if variant.blocks > 1:
            blocks = self._row_blocks(variant)
            counts = {name: [len(rows) for rows in parts] for name, parts in blocks.rows.items()}
            chosen, stored = select_rows(space, costs, blocks.costs, counts, capacity)
            parts = [(name, None if part is None else blocks.rows[name][part], fmt) for name, part, fmt in chosen]
            with stage.evaluator.full_precision(), assembled(stage.opened.model, stage.near, parts):
                found = self.perplexities()
            return {"bits": round(8 * (stored + space.pinned_bytes) / space.numel, 4), **steps}, found
        start = time.perf_counter()
        formats = space.decode(select(costs, space.sizes, capacity))
        losses: dict[str, Any] = {}
        if variant.refine:
            formats, losses = self._refine(costs, formats, bits, variant.refine)
        losses |= {"solve_seconds": round(time.perf_counter() - start, 1)}
        stage.evaluator.apply(formats)
        linears = round(space.bits_of_linears(formats), 4)
        return {"bits": round(space.bits_of(formats), 4), "linears": linears, **losses, **steps}, self.perplexities()

    def _table(self, runs: tuple[int, ...]) -> Table:
        """The mean of all passes."""
        if runs not in self._tables:
            stage = self._stage
            formats = sorted({f.name for name in stage.bank.names for f in stage.bank.formats_of(name)})
            with self._steps.measure(f"cost {runs}"), stage.evaluator.full_precision():
                passes = list(fisher_passes(
                    stage.opened.model, stage.quantized, stage.near, stage.cost_windows, formats, self._settings.seed,
                    unscored=stage.corpus.unscored, runs=runs,
                ))  # fmt: skip
            mean = {n: {f: float(np.mean([p[n][f] for p in passes])) for f in row} for n, row in passes[0].items()}
            self._tables[runs] = mean
        return self._tables[runs]

    def _row_blocks(self, variant: Variant) -> RowBlocks:
        if self._rows is None:
            stage, linears = self._stage, {v[0].name for v in self._stage.space.variables if not is_outer(v[0])}
            with self._steps.measure("cost of rows"), stage.evaluator.full_precision():
                self._rows = score_rows(
                    stage.opened.model, stage.quantized.only(linears), stage.near, stage.cost_windows,
                    stage.space.format_names, self._settings.seed, variant.blocks, stage.corpus.unscored, variant.runs,
                )  # fmt: skip
        return self._rows

    def _refine(
        self, costs: np.ndarray, start: dict[str, str], bits: float, evaluations: int
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """What refinement makes of `start`, and the losses of both on its windows and on the held-out ones."""
        with tempfile.TemporaryDirectory() as folder, self._progress.stage("refine", evaluations) as step:
            archive = Archive(Path(folder) / "archive.jsonl")
            problem = Problem(self._stage.space, archive, self._stage.evaluator, "additive", self._settings.seed)
            problem.budget, problem.step = bits, step
            found = refine(problem, costs, start, bits, evaluations)
            losses = {
                f"{windows}_{what}": round(problem.evaluate(formats, "refine", windows).ranked, 5)
                for what, formats in (("start", start), ("refined", found))
                for windows in ("search", "confirm")
            }
            archive.close()
        return found, losses


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table per model and held-out text; in brackets the change against none of the parts."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        budgets = sorted({row["budget"] for row in mine if row["budget"] is not None})
        for text in mine[0]["perplexity"]:
            found = {(r["variant"], r["budget"]): r["perplexity"][text] for r in mine}
            full = found.get(("full precision", None), math.nan)
            lines = [f"{model}, {text}, full precision {full:.2f}:", ""]
            lines += [f"| with | {' | '.join(f'{b:g} bits' for b in budgets)} |", "|---" * (len(budgets) + 1) + "|"]
            for variant in dict.fromkeys(v for v, budget in found if budget is not None):
                cells = [_cell(found, variant, budget) for budget in budgets]
                lines.append(f"| {variant} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(found: dict[tuple[str, float | None], float], variant: str, budget: float) -> str:
    value, base = found.get((variant, budget)), found.get(("none of them", budget))
    if value is None:
        return ""
    shown = f"{value:.2f}"
    return shown if base is None or variant == "none of them" else f"{shown} ({value / base - 1:+.1%})"


if __name__ == "__main__":
    main()
