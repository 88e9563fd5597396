"""Do divergence and answers rank configurations alike: `python benchmarks/objectives.py --json FILE`.

Configurations of --bits (what the knapsack makes of a Fisher table, and neighbours of it by the noise that `--refine`
puts on costs) and uniform ones are measured by everything that a search could measure: the Jensen–Shannon divergence on
windows of --calibration and on answers, and loss of agreement with the full-precision model's greedy answers, as it is
and in forms that are smooth (`FORMS`). The judge is what a user sees: tokens until the first difference, as a share of
the answer, of answers to other questions (`amq.model.answers`); and a steadier one, the share of their tokens that
differ, each behind the answer so far. Spearman's and Kendall's coefficients say how each ranks as a judge does, over
all configurations and, where a search has to choose, among those of one budget.

Rows are added to FILE as they are done, and a second call goes on with what is missing; --table only shows them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import write_results
from torch import Tensor

from amq.formats import parse_formats
from amq.model.answers import HELD_OUT, SEARCHED, Answers, open_answers
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.opened import open_model
from amq.proxy.fisher import fisher_passes
from amq.proxy.meter import token_losses
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import BankSettings, WeightBank, open_bank
from amq.search.knapsack import select
from amq.search.refine import SIGMA
from amq.search.space import SearchSpace
from amq.util.files import read_json
from amq.util.progress import Progress, terminal_progress

SCHEMA = "amq/objectives/1"
JUDGE = "answers held out"
JUDGES = (f"{JUDGE}: first difference", f"{JUDGE}: differing tokens")
Formats = dict[str, str]


@dataclass(frozen=True)
class Told:
    """What a form of the model says of one answer, float64 [tokens] each: by how much the token's logit is over the
    largest other one, and the log-probability of the token; and what the full-precision model says."""

    margin: np.ndarray
    log_q: np.ndarray
    full_margin: np.ndarray
    log_p: np.ndarray


def _leading(agreement: np.ndarray) -> float:
    """1 − the expected share of tokens until the first difference, each agreeing with such a probability."""
    return 1 - float(np.cumprod(agreement).mean())


def _soft(margin: np.ndarray, width: float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(margin / width, -60, 60)))


def _beside(told: Told, width: float) -> np.ndarray:
    """1 where the full-precision model itself is no surer of the token."""
    return np.minimum(_soft(told.margin, width) / _soft(told.full_margin, width), 1)


FORMS: dict[str, Callable[[Told], float]] = {
    "first difference": lambda t: _leading(t.margin >= 0),
    "first difference, margin / 0.25": lambda t: _leading(_soft(t.margin, 0.25)),
    "first difference, margin / 0.5": lambda t: _leading(_soft(t.margin, 0.5)),
    "first difference, margin / 1": lambda t: _leading(_soft(t.margin, 1.0)),
    "first difference, margin / 0.5 beside the full model's": lambda t: _leading(_beside(t, 0.5)),
    "first difference, margin / 1 beside the full model's": lambda t: _leading(_beside(t, 1.0)),
    "first difference, margin / 2 beside the full model's": lambda t: _leading(_beside(t, 2.0)),
    "first difference, q / p": lambda t: _leading(np.exp(np.minimum(t.log_q - t.log_p, 0))),
    "differing tokens": lambda t: float((t.margin < 0).mean()),
    "differing tokens, margin / 1 beside the full model's": lambda t: 1 - float(_beside(t, 1.0).mean()),
    "differing tokens, margin / 0.5": lambda t: 1 - float(_soft(t.margin, 0.5).mean()),
    "differing tokens, margin / 1": lambda t: 1 - float(_soft(t.margin, 1.0).mean()),
    "cross-entropy": lambda t: -float(t.log_q.mean()),
}
"""Losses of one answer; a configuration's is the mean over answers."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--formats", default="int2,int3,int4,int6", metavar="LIST")
    parser.add_argument("--uniform", default="int3,int4", metavar="LIST")
    parser.add_argument("--bits", default="3.0,3.5,4.0,4.5", metavar="LIST", help="budgets, scales counted")
    parser.add_argument("--neighbours", type=int, default=4, metavar="N", help="of each knapsack point")
    parser.add_argument("--group-size", type=int, default=128, metavar="G")
    parser.add_argument("--calibration", default="pydoc", metavar="TEXT")
    parser.add_argument("--bank-windows", type=int, default=24, metavar="N")
    parser.add_argument("--passes", type=int, default=16, metavar="N", help="backward passes of the Fisher table")
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="that divergence is measured on")
    parser.add_argument("--window-length", type=int, default=512, metavar="N")
    parser.add_argument("--answers", type=int, default=16, metavar="N", help="that a search would measure on")
    parser.add_argument("--held-out", type=int, default=32, metavar="N", help="answers of the judge")
    parser.add_argument("--answer-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for what each form says of each token, as .npz")
    parser.add_argument("--table", action="store_true", help="show what is in FILE")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    content = read_json(args.json) if args.json.is_file() else {"schema": SCHEMA, "models": {}}
    if args.table:
        print(*(f"{name}\n{table(entry)}" for name, entry in content["models"].items()), sep="\n")
        return
    entry = content["models"].setdefault(args.model, {"settings": _settings(args), "rows": []})
    if entry["settings"] != _settings(args):
        raise SystemExit(f"{args.json} holds rows of {args.model} with other settings: give another --json")
    Benchmark(args, content, entry, terminal_progress()).run()
    print(table(entry))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("json", "keep", "model", "table")}


class Benchmark:
    """The model with its bank, windows and answers; rows are added to `entry` of `content` and written one by one."""

    def __init__(
        self, args: argparse.Namespace, content: dict[str, Any], entry: dict[str, Any], progress: Progress
    ) -> None:
        self._args, self._content, self._entry, self._progress = args, content, entry, progress
        self._opened = opened = open_model(args.model)
        self._linears = opened.inventory.only({s.name for s in opened.inventory.linears})  # the head stays as it is
        self._space = SearchSpace.build(opened.inventory.linears, parse_formats(args.formats), args.group_size, {}, [])
        self._answers = {
            name: open_answers(opened.loaded, count, args.answer_tokens, args.seed, opened.fingerprint, half, progress)
            for name, count, half in (("answers", args.answers, SEARCHED), (JUDGE, args.held_out, HELD_OUT))
        }
        count = args.bank_windows + args.passes + args.windows
        sampler = opened.sampler(args.calibration, args.window_length, args.seed, count, progress)
        self._bank_windows, self._cost_windows = sampler.take(args.bank_windows), sampler.take(args.passes)
        self._windows, self._unscored = sampler.take(args.windows), sampler.corpus.unscored
        self._swap = LinearSwap(opened.model, [s.name for s in opened.inventory.linears])
        self._runner = BlockRunner(opened.model)
        self.keep: Path | None = args.keep

    def run(self) -> None:
        opened, args = self._opened, self._args
        bank = open_bank(
            opened.model, self._linears, list(parse_formats(args.formats)),
            BankSettings("gptq", args.group_size, self._bank_windows), self._progress, fingerprint=opened.fingerprint,
        )  # fmt: skip
        wanted = list(self._configurations(self._costs(bank)))
        reference = Reference.of(self)
        done = {row["name"] for row in self._entry["rows"]}
        with self._progress.stage("objectives", len(wanted)) as step:
            for name, budget, formats in wanted:
                if name not in done:
                    self._swap.apply(formats, bank)
                    start = time.perf_counter()
                    row = {"name": name, "budget": budget, "bits": round(self._space.bits_of(formats), 4)}
                    row |= {"losses": reference.losses(self, name), "seconds": round(time.perf_counter() - start, 1)}
                    self._entry["rows"].append(row)
                    write_results(self._args.json, self._content)
                step(name)

    def _costs(self, bank: WeightBank) -> np.ndarray:
        names = [f.name for f in parse_formats(self._args.formats)]
        passes = list(
            fisher_passes(
                self._opened.model, self._linears, bank, self._cost_windows, names, self._args.seed, 0, self._unscored
            )
        )
        mean = {n: {f: float(np.mean([p[n][f] for p in passes])) for f in row} for n, row in passes[0].items()}
        return self._space.variable_costs(mean)

    def _configurations(self, costs: np.ndarray) -> Iterator[tuple[str, float, Formats]]:
        """(name, budget, formats)"""
        space = self._space
        for fmt in parse_formats(self._args.uniform):
            formats = space.uniform(fmt)
            yield f"uniform {fmt.name}", space.bits_of(formats), formats
        for budget in map(float, self._args.bits.split(",")):
            capacity = space.capacity(budget)
            yield f"{budget:g} knapsack", budget, space.decode(select(costs, space.sizes, capacity))
            for index in range(self._args.neighbours):
                noise = np.random.default_rng([self._args.seed, index]).standard_normal(len(costs))
                sigma = SIGMA * (1 + index)  # from as near as a refinement begins to far away
                point = select(costs * np.exp(sigma * noise)[:, None], space.sizes, capacity)
                yield f"{budget:g} noise {sigma:.2f}", budget, space.decode(point)

    def final(self, answers: Answers) -> Iterator[tuple[Tensor, Tensor]]:
        """(states [tokens, hidden_size] that the tokens of an answer are predicted from, the tokens), of each."""
        batches = [torch.tensor([[*item.prompt, *item.tokens[:-1]]]) for item in answers.items]
        for item, hidden in zip(answers.items, self._runner.final(batches), strict=True):
            yield hidden[0, len(item.prompt) - 1 :], torch.tensor(item.tokens)

    def states(self) -> Tensor:
        """Of the windows, [scored tokens, hidden_size]."""
        return torch.cat([h[0, self._unscored :] for h in self._runner.final(self._windows.split(1))])

    def logits(self, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(states), TOKENS):
            rows = slice(start, start + TOKENS)
            yield rows, self._runner.logits(states[rows]).float().contiguous()

    @property
    def answers(self) -> dict[str, Answers]:
        return self._answers


@dataclass(frozen=True)
class Reference:
    """Of the full-precision model. head: its own logits of states. answers: {set: log-probabilities float32 [tokens,
    vocabulary] of each answer}; windows: the same of the windows, in chunks."""

    answers: dict[str, list[Tensor]]
    windows: list[Tensor]

    @staticmethod
    @torch.no_grad()
    def of(benchmark: Benchmark) -> Reference:
        def all_of(states: Tensor) -> list[Tensor]:
            return [logits.log_softmax(-1) for _, logits in benchmark.logits(states)]

        answers = {
            name: [torch.cat(all_of(states)).half() for states, _ in benchmark.final(some)]
            for name, some in benchmark.answers.items()
        }
        return Reference(answers, [p.half() for p in all_of(benchmark.states())])

    @torch.no_grad()
    def losses(self, benchmark: Benchmark, row: str) -> dict[str, float]:
        """Of the configuration that is in the model; row: its name."""
        divergence = token_losses("jsd", torch.device("cpu"))
        found: dict[str, float] = {}
        for name, answers in benchmark.answers.items():
            told, jsd = [], []
            for p, (states, tokens) in zip(self.answers[name], benchmark.final(answers), strict=True):
                logits = torch.cat([some for _, some in benchmark.logits(states)])
                told.append(tell(p.float(), logits, tokens))
                jsd.append(float(divergence(p.float(), logits).mean()))
            if benchmark.keep is not None:
                parts = {f"{i}.{part}": values for i, t in enumerate(told) for part, values in vars(t).items()}
                np.savez(benchmark.keep / f"{row} {name}.npz", **parts)
            prefix = f"{name}: "
            found |= {prefix + form: float(np.mean([loss(t) for t in told])) for form, loss in FORMS.items()}
            found[prefix + "JSD"] = float(np.mean(jsd))
        states = benchmark.states()
        parts = zip(self.windows, benchmark.logits(states), strict=True)
        total = sum(float(divergence(p.float(), x).sum(dtype=torch.float64)) for p, (_, x) in parts)
        return found | {"windows: JSD": total / len(states)}


def tell(log_p: Tensor, logits: Tensor, tokens: Tensor) -> Told:
    """log_p, logits: float32 [tokens, vocabulary], of the full-precision model and of another form; tokens: int64."""
    margin, own = _margin(logits, tokens)
    full_margin, full = _margin(log_p, tokens)
    parts = (margin, own - logits.logsumexp(-1), full_margin, full)
    return Told(*(part.double().numpy() for part in parts))


def _margin(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(over the largest other logit, itself) of each token's logit, [tokens]."""
    at = tokens[:, None]
    own = logits.gather(1, at)[:, 0]
    return own - logits.scatter(1, at, -torch.inf).amax(-1), own


def correlations(rows: Sequence[dict[str, Any]], judge: str) -> dict[str, tuple[float, float, float]]:
    """{loss: (Spearman's, Kendall's) coefficient with the judge over all rows, the mean of Spearman's within budgets};
    NaN where one of the two is the same for all."""
    from scipy.stats import kendalltau, spearmanr

    budgets = sorted({row["budget"] for row in rows})
    bands = [band for b in budgets if len(band := [row["losses"] for row in rows if row["budget"] == b]) > 2]

    def coefficient(of: Any, losses: Sequence[dict[str, float]], name: str) -> float:
        pair = [x[name] for x in losses], [x[judge] for x in losses]
        return float(of(*pair).statistic) if all(len(set(some)) > 1 for some in pair) else math.nan

    found = {}
    everything = [row["losses"] for row in rows]
    for name in everything[0] if len(rows) > 2 else ():
        within = [coefficient(spearmanr, band, name) for band in bands]
        known = [value for value in within if math.isfinite(value)]
        mean = float(np.mean(known)) if known else math.nan
        found[name] = (coefficient(spearmanr, everything, name), coefficient(kendalltau, everything, name), mean)
    return found


def table(entry: dict[str, Any]) -> str:
    lines = []
    for judge in JUDGES:
        title = f"{len(entry['rows'])} configurations, rank correlation with {judge}"
        lines.append(f"{title:72}  Spearman  Kendall  within budgets")
        for name, figures in correlations(entry["rows"], judge).items():
            shown = (f"{value:{width}.3f}" for value, width in zip(figures, (8, 7, 14), strict=True))
            lines.append(f"{name:72}  {'  '.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
