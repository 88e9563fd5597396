"""Which text should calibrate: `python benchmarks/calibration.py --json FILE`.

The bank's windows and those of the Fisher scores are taken from each of --calibration in turn, all pairs of the two,
and what comes of it is measured as perplexity on texts that nobody calibrated with: uniform formats for the bank alone,
and knapsack choices at --bits, as `amq.search` makes them. `self` is the model's own text; `self:plain` and `self:chat`
are its two halves apart (`amq.model.own_text`). Rows are added to FILE as they are done, and a second call goes on with
what is missing. `pydoc+self` mixes two texts, window by window. The table compares with the first text, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance, write_results
from torch import Tensor

from amq.formats import get_format, parse_formats
from amq.model.opened import OpenModel, open_model
from amq.model.own_text import own_corpus
from amq.model.perplexity import perplexity
from amq.model.text import SELF, WindowSampler, fixed_windows
from amq.proxy.fisher import Table, fisher_passes
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import BankSettings, WeightBank, open_bank
from amq.search.knapsack import select
from amq.search.space import SearchSpace
from amq.util.files import read_json
from amq.util.progress import Progress, terminal_progress

SCHEMA = "amq/calibration/1"
Formats = dict[str, str]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", default="pydoc,self", metavar="LIST")
    parser.add_argument(
        "--fisher",
        metavar="LIST",
        help="texts of the Fisher scores; same: the bank's (default: those of --calibration)",
    )
    parser.add_argument("--seeds", default="0", metavar="LIST")
    parser.add_argument("--formats", default="int2,int3,int4", metavar="LIST")
    parser.add_argument("--uniform", default="int3", metavar="LIST", help="uniform formats, of --formats")
    parser.add_argument("--bits", default="3.0,3.5", metavar="LIST", help="budgets of the knapsack, scales counted")
    parser.add_argument("--group-size", type=int, default=128, metavar="G")
    parser.add_argument("--bank-windows", type=int, default=24, metavar="N")
    parser.add_argument("--passes", type=int, default=16, metavar="N", help="backward passes of a Fisher table")
    parser.add_argument("--window-length", type=int, default=512, metavar="N")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="held out; default: docstrings")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    content = read_json(args.json) if args.json.is_file() else {"schema": SCHEMA, "rows": []}
    Benchmark(args, content, terminal_progress()).run()
    print(table(content["rows"], args.calibration.split(",")[0]))


@dataclass(frozen=True)
class Windows:
    """Of one text and seed: int64 [windows, length] each, without overlap. writing: seconds until they were there."""

    bank: Tensor
    fisher: Tensor
    unscored: int
    writing: float


class Benchmark:
    """The model with its held-out windows; rows are added to `content` and written one by one."""

    def __init__(self, args: argparse.Namespace, content: dict[str, Any], progress: Progress) -> None:
        self._args, self._content, self._progress = args, content, progress
        self._opened = opened = open_model(args.model)
        self._formats = parse_formats(args.formats)
        self._linears = opened.inventory.only({s.name for s in opened.inventory.linears})  # the head stays as it is
        self._space = SearchSpace.build(opened.inventory.linears, self._formats, args.group_size, {}, [])
        self._fingerprint = opened.fingerprint
        self._swap = LinearSwap(opened.model, [s.name for s in opened.inventory.linears])
        held_out = {Path(text).name: opened.corpus(text) for text in args.text or ["docstrings"]}
        self._unscored = next(iter(held_out.values())).unscored
        self._held_out = {n: fixed_windows(c, args.window_length, args.max_tokens) for n, c in held_out.items()}
        self._made = provenance()  # of every row, because a second call may be of another commit

    def run(self) -> None:
        if not self._done(bank=None):
            self._add({"bank": None, "fisher": None, "seed": None, "bits": 16.0, "name": "full precision"})
        for seed in map(int, self._args.seeds.split(",")):
            for text in self._args.calibration.split(","):
                self._one_bank(seed, text)

    def _one_bank(self, seed: int, text: str) -> None:
        wanted = list(self._missing(seed, text))
        if not wanted:
            return
        self._swap.restore()
        start = time.perf_counter()
        windows = self._windows(text, seed)
        bank = self._bank(windows.bank)
        seconds = {
            "writing": round(windows.writing, 1),
            "bank": round(time.perf_counter() - start - windows.writing, 1),
        }
        tables: dict[str, Table] = {}
        for row, formats in wanted:
            if formats is None:
                fisher = row["fisher"]
                if fisher not in tables:
                    self._swap.restore()
                    tables[fisher] = self._fisher(bank, self._windows(fisher, seed), seed)
                costs = self._space.variable_costs(tables[fisher])
                point = select(costs, self._space.sizes, self._space.capacity(row["budget"]))
                formats = self._space.decode(point)
            self._swap.apply(formats, bank)
            self._add(row | {"bits": round(self._space.bits_of(formats), 4), "seconds": seconds})

    def _missing(self, seed: int, text: str) -> Iterator[tuple[dict[str, Any], Formats | None]]:
        """(row without its figures, its formats, which are None where a knapsack is to choose them)"""
        args = self._args
        common = {
            "seed": seed, "bank": text, "bank_windows": args.bank_windows, "group_size": args.group_size,
            "window_length": args.window_length, "formats": args.formats,
        }  # fmt: skip
        for name in filter(None, args.uniform.split(",")):
            row = common | {"name": f"uniform {name}", "fisher": None}
            if not self._done(**row):
                yield row, self._space.uniform(get_format(name))
        for fisher in [text] if args.fisher == "same" else (args.fisher or args.calibration).split(","):
            for bits in filter(None, args.bits.split(",")):
                row = common | {
                    "name": f"searched {bits}", "fisher": fisher, "passes": args.passes, "budget": float(bits),
                }  # fmt: skip
                if not self._done(**row):
                    yield row, None

    def _windows(self, text: str, seed: int) -> Windows:
        args, opened = self._args, self._opened
        count, length = args.bank_windows + args.passes, args.window_length
        start = time.perf_counter()
        if text.startswith(f"{SELF}:"):
            kinds = (text.partition(":")[2],)
            corpus = own_corpus(opened.loaded, length, seed, count, self._fingerprint, self._progress, kinds)
            sampler = WindowSampler(corpus, length, seed)
        else:
            sampler = opened.sampler(text, length, seed, count, self._progress)
        bank, fisher = sampler.take(args.bank_windows), sampler.take(args.passes)
        return Windows(bank, fisher, sampler.corpus.unscored, time.perf_counter() - start)

    def _bank(self, windows: Tensor) -> WeightBank:
        settings = BankSettings("gptq", self._args.group_size, windows)
        return open_bank(
            self._opened.model, self._linears, self._formats, settings, self._progress,
            fingerprint=self._fingerprint,
        )  # fmt: skip

    def _fisher(self, bank: WeightBank, windows: Windows, seed: int) -> Table:
        """The mean of all passes."""
        opened: OpenModel = self._opened
        passes = []
        with self._progress.stage("fisher", len(windows.fisher)) as step:
            for one in fisher_passes(
                opened.model, self._linears, bank, windows.fisher, [f.name for f in self._formats], seed,
                unscored=windows.unscored,
            ):  # fmt: skip
                passes.append(one)
                step()
        return {n: {f: float(np.mean([p[n][f] for p in passes])) for f in row} for n, row in passes[0].items()}

    def _done(self, **key: Any) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self._content["rows"])

    def _add(self, row: dict[str, Any]) -> None:
        found = {n: perplexity(self._opened.model, w, self._unscored) for n, w in self._held_out.items()}
        row["perplexity"] = {name: round(value, 3) for name, value in found.items()}
        print(json.dumps(row), flush=True)
        tokens = {"model": self._args.model, "max_tokens": self._args.max_tokens}
        self._content["rows"].append(row | tokens | {name: self._made[name] for name in ("commit", "dirty", "date")})
        write_results(self._args.json, self._content)


def table(rows: list[dict[str, Any]], base: str) -> str:
    """Geometric means over seeds, one table per held-out text; in brackets the change against both texts `base`."""
    full = next(row["perplexity"] for row in rows if row["bank"] is None)
    rows = [row for row in rows if row["bank"] is not None]
    names = list(dict.fromkeys(row["name"] for row in rows))
    pairs = list(dict.fromkeys((row["bank"], row["fisher"]) for row in rows))
    parts = []
    for text, value in full.items():
        found = {(r["name"], r["bank"], r["fisher"], r["seed"]): r["perplexity"][text] for r in rows}
        lines = [f"{text}, full precision {value:.2f}:", ""]
        lines += [f"| bank | Fisher | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for bank, fisher in pairs:
            cells = [_cell(found, name, (bank, fisher), (base, None if fisher is None else base)) for name in names]
            lines.append(f"| {bank} | {fisher or ''} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(found: dict[Any, float], name: str, pair: tuple[str, str | None], base: tuple[str, str | None]) -> str:
    seeds = [key[3] for key in found if key[:3] == (name, *pair)]
    if not seeds:
        return ""
    shown = f"{math.exp(np.mean([math.log(found[(name, *pair, seed)]) for seed in seeds])):.2f}"
    both = [seed for seed in seeds if (name, *base, seed) in found]
    if pair == base or not both:
        return shown
    ratios = [found[(name, *pair, seed)] / found[(name, *base, seed)] for seed in both]
    better = sum(ratio < 1 for ratio in ratios)
    return f"{shown} ({math.exp(np.mean(np.log(ratios))) - 1:+.1%}, better in {better} of {len(both)})"


if __name__ == "__main__":
    main()
