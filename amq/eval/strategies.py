"""`run_strategies`: every strategy of `amq.search.strategies` on one model, bank and loss, as one table that goes on.

    python -m amq.eval strategies smollm2 --budgets 2.75,3,3.5,4 --seeds 0,1,2 --output runs/strategies

A seed changes the windows of text, the bank that is calibrated on some of them, labels and every random draw. For each,
the model with its bank is prepared as for a search (`amq.search.run.prepare`), and each strategy allocates within all
budgets there (`amq.eval.strategy_run`). FOLDER gets strategies.json after every row, strategies.md, and in the end
report.html with its chart. The same command again goes on with the rows that lack, and more seeds or strategies may be
asked for; a table of other settings, or of another model, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from amq.errors import AmqError
from amq.eval.strategy_run import SeedRun
from amq.eval.strategy_settings import FREE, REMEDIES, StrategySettings
from amq.eval.strategy_table import StrategyTable, chart_rows, key, markdown
from amq.eval.tables import check_same, open_table
from amq.model.paging import pager_of
from amq.search.choose import check_bits
from amq.search.recipe import steps_up
from amq.search.rows import check_rows
from amq.search.strategies import RESIDENT, check_needs
from amq.util.files import write_text
from amq.util.progress import Progress
from amq.util.provenance import provenance

JSON, MARKDOWN = "strategies.json", "strategies.md"
FILES = (JSON, MARKDOWN, "strategies.png", "report.html")
"""What a folder gets."""


def run_strategies(settings: StrategySettings, progress: Progress | None = None) -> StrategyTable:
    """The table of `settings`, of which rows that its folder has are not measured again.

    Raises AmqError for unusable input, and for a folder with a table of other settings, before a model is loaded; for
    another model or text, and for a strategy that the model cannot be given, before anything is measured.
    """
    progress, output = progress or Progress(), Path(settings.output)
    table = open_table(StrategyTable, output / JSON, settings, FREE)
    for seed in settings.seed_list:
        missing = [row for row in settings.rows if table is None or not table.has(row.name, seed)]
        if not missing:
            continue
        run = SeedRun(settings, seed, progress)
        _check_model(run)
        held_out = run.held_out()
        texts = {"calibration": run.stage.corpus.sha256} | ({"held-out": held_out.sha256} if held_out else {})
        now = _describe(run, texts)
        table = now if table is None else _go_on(table, now, output)
        if table.full is None and held_out is not None:
            table = replace(table, full=round(run.perplexity(held_out), 4))
        for strategy in missing:
            progress.say(f"{strategy.name}, seed {seed}")
            row = run.measure(strategy, held_out)
            table = replace(table, rows=(*table.rows, row), provenance=provenance())
            table.write(output / JSON)
            write_text(output / MARKDOWN, markdown(table))
            progress.say(f"{strategy.name}, seed {seed}: HV7 {row.hv7:.4f}, {row.equivalents:.0f} evaluations' time")
    assert table is not None, "settings name a seed and a strategy"
    _report(table, output)
    return table


def _check_model(run: SeedRun) -> None:
    """Raises AmqError where a strategy is not for this model, or a budget is none of it."""
    for budget in run.settings.shown_budgets:
        check_bits(budget, run.space)
    paged = pager_of(run.stage.opened.model) is not None
    check_needs(run.settings.rows, {RESIDENT: not paged}, REMEDIES)
    if paged and run.settings.text:
        raise AmqError(
            f"perplexities want a model in memory, {run.settings.model} is read block by block: give --load memory, or "
            '--text "" for none'
        )
    checks = {"recipe": steps_up, "rows": check_rows, "dialect": run.check_dialects, "bitstack": run.check_stacks}
    for row in run.settings.rows:
        if row.how in checks:
            checks[row.how](run.space)


def _describe(run: SeedRun, texts: Mapping[str, str]) -> StrategyTable:
    (high, _), (low, _) = run.ends[0], run.ends[-1]
    return StrategyTable(
        settings=run.settings, fingerprint=run.stage.opened.fingerprint, measured_by=run.stage.measured_by,
        texts=dict(texts), ends=(low, high), hv_budgets=tuple(run.hv_budgets), seeds={key(run.seed): run.entry},
    )  # fmt: skip


def _go_on(table: StrategyTable, now: StrategyTable, output: Path) -> StrategyTable:
    """`table` with the seed of `now`. Raises AmqError where a name in the settings stands for something else now."""
    same = {"fingerprint": "model (or other weights)", "measured_by": "engine", "texts": "text"}
    check_same(table, now, str(output), same)
    for seed, entry in now.seeds.items():
        if table.seeds.get(seed, entry) != entry:
            raise AmqError(
                f"--output {output}: the bank or the windows of seed {seed} were others ({table.seeds[seed]}, now "
                f"{entry}), since amq or the tokenizer has changed: give another folder"
            )
    return replace(table, seeds={**table.seeds, **now.seeds})


def _report(table: StrategyTable, output: Path) -> None:
    from amq.util.extras import needs

    with needs("report", "the chart of amq eval strategies"):
        from amq.report.strategies import write
    write(output, table.settings.model, chart_rows(table))
