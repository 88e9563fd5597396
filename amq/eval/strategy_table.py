"""What a comparison of strategies gives: a row per strategy and seed, as JSON, as Markdown, and for the chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from amq.eval.strategy_settings import StrategySettings
from amq.search.strategies import FINER, STRATEGIES
from amq.util.records import JsonFile


@dataclass(frozen=True, kw_only=True)
class StrategyRow:
    """One strategy with one seed; budgets are bits per weight of the linears, as text (`3.5`).

    evaluations: true ones of whole configurations, on the windows of the loss and, of refine, on those it is held to.
    singles: those with one linear (or what is tied) changed. passes: windows that it looked at otherwise.
    seconds: all that it would have taken alone; equivalents: that in evaluations of this seed's median time.
    losses, bits: of its choice within each budget; a loss is None where it is not finite. hv7: hypervolume of its
    choices at the seven budgets of the file with the uniform ends. perplexity: of its choices on the held-out text.
    """

    strategy: str
    seed: int
    evaluations: int
    singles: int
    passes: int
    seconds: float
    equivalents: float
    hv7: float
    losses: dict[str, float | None]
    bits: dict[str, float]
    perplexity: dict[str, float | None]


@dataclass(frozen=True)
class SeedEntry:
    """What a seed stands for: the name of its bank's folder, and the hash of its windows."""

    bank: str
    windows: str


@dataclass(frozen=True, kw_only=True)
class StrategyTable(JsonFile):
    """strategies.json.

    fingerprint: of the model's weights. measured_by: what ran the candidates. texts: {calibration, held-out: SHA-256}.
    hv_budgets: the seven, evenly between the uniform ends, whose bits per weight are `ends`. full: perplexity of the
    full-precision model. seeds: by number. provenance: of the call that wrote last; see `amq.util.provenance`.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/strategies/1",)

    schema: str = SCHEMAS[0]
    settings: StrategySettings
    fingerprint: str
    measured_by: str
    texts: dict[str, str]
    ends: tuple[float, float]
    hv_budgets: tuple[float, ...]
    full: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, SeedEntry] = field(default_factory=dict)
    rows: tuple[StrategyRow, ...] = ()

    def has(self, strategy: str, seed: int) -> bool:
        return any((row.strategy, row.seed) == (strategy, seed) for row in self.rows)

    def of(self, strategy: str) -> list[StrategyRow]:
        """By seed."""
        return sorted((row for row in self.rows if row.strategy == strategy), key=lambda row: row.seed)


def key(budget: float) -> str:
    """How a budget is written in a row."""
    return f"{budget:g}"


def markdown(table: StrategyTable) -> str:
    """A row per strategy, medians over seeds; what it deviates in below."""
    done = [name for name in STRATEGIES if table.of(name)]
    heads, perplexities = table.settings.shown_budgets, table.settings.shown_perplexities
    names = ["strategy", "family", "granularity", "looks at", "evaluations", "equivalents"]
    names += (
        [f"loss at {key(b)}" for b in heads] + ["HV7 (each seed)"] + [f"perplexity at {key(b)}" for b in perplexities]
    )
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(_cells(table, name))} |" for name in done]
    notes = [f"- `{name}` ({STRATEGIES[name].systems}): {STRATEGIES[name].deviation}." for name in done]
    return "\n".join([*_head(table), "", *lines, "", "What each does otherwise than the systems that allocate so:", "",
                      *notes]) + "\n"  # fmt: skip


def _head(table: StrategyTable) -> Iterator[str]:
    s, machine = table.settings, table.provenance.get("machine", {})
    seeds = ", ".join(sorted(table.seeds, key=int))
    yield (
        f"{s.model}, {s.proxy} bank ({s.formats}, group {s.group_size}, rotation {s.rotation}), Jensen–Shannon "
        f"divergence in nats per token on {s.windows} windows of {s.window_length} tokens of {s.calibration}, by the "
        f"{table.measured_by}; seeds {seeds}, medians over them; head and embeddings in 16 bits, budgets are of the "
        "linears."
    )
    yield (
        f"{s.cost_passes} windows for strategies that look at inputs or gradients, {s.evaluations} evaluations for "
        f"those that search, {s.steps} steps of gradient. HV7: hypervolume of the losses at "
        f"{key(table.hv_budgets[0])} to {key(table.hv_budgets[-1])} bits and the uniform ends."
    )
    dense = [f"`{name}`" for name, about in STRATEGIES.items() if about.family == FINER and table.of(name)]
    if s.activations != "fp32" and dense:
        yield f"Candidates of {', '.join(dense)}, which no kernel runs, are measured by torch with exact activations."
    if s.shown_perplexities:
        full = "" if table.full is None else f", full precision {table.full:.3f}"
        yield f"Perplexity on {s.max_tokens} tokens of {s.text}, windows of {s.window_length}, by torch{full}."
    if machine:
        yield f"{machine.get('processor')}, {machine.get('threads')} threads, {str(table.provenance.get('date'))[:10]}."


def _cells(table: StrategyTable, name: str) -> list[str]:
    about, rows = STRATEGIES[name], table.of(name)
    singles = f" + {rows[0].singles} single" if rows[0].singles else ""
    passes = f" + {rows[0].passes} passes" if rows[0].passes else ""
    losses = [_median((r.losses.get(key(b)) for r in rows), 4) for b in table.settings.shown_budgets]
    each = ", ".join(f"{row.hv7:.4f}" for row in rows)
    hv7 = f"{statistics.median(row.hv7 for row in rows):.4f} ({each})" if len(rows) > 1 else each
    found = [_median((r.perplexity.get(key(b)) for r in rows), 2) for b in table.settings.shown_perplexities]
    equivalents = f"{statistics.median(row.equivalents for row in rows):.0f}"
    return [
        name, about.family, about.granularity, about.inputs, f"{rows[0].evaluations}{singles}{passes}", equivalents,
        *losses, hv7, *found,
    ]  # fmt: skip


def _median(values: Iterable[float | None], digits: int) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.{digits}f}" if found else "not finite"


def chart_rows(table: StrategyTable) -> list[dict[str, Any]]:
    """For `amq.report.strategies`: a dict per strategy."""
    found = []
    for name, about in STRATEGIES.items():
        if rows := table.of(name):
            values = [row.hv7 for row in rows]
            found.append({
                "strategy": name, "family": about.family, "hv7": statistics.median(values), "least": min(values),
                "most": max(values), "equivalents": statistics.median(row.equivalents for row in rows),
                "granularity": about.granularity, "inputs": about.inputs, "systems": about.systems,
                "deviation": about.deviation,
            })  # fmt: skip
    return found
