"""The page of split runs: what page.html.jinja puts in place and escapes, and the files.

The template holds the sentences, this module the figures of its tiles and tables. A run alone and runs that are
compared have the same page; tiles are those of the run, or of the best among several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from amq.report.data import show_bytes
from amq.report.look import show_details, write_page
from amq.split import charts
from amq.split.figures import (
    LAST,
    LINKS,
    SAME,
    STREAMS,
    ShownRun,
    find_differences,
    read_runs,
)
from amq.split.records import QUANTIZED, TUNED
from amq.util.files import check_place

TEMPLATE = Path(__file__).with_name("page.html.jinja")
HEADS = (
    *("run", "policy", "coder", "steps", "bits forward", "bits backward", "bits on the wire", "MiB sent", "× float16"),
    *("loss", "perplexity", "its cut quantized", "s/step"),
)


def write(paths: Sequence[Path], output: Path | None) -> list[Path]:
    """As `amq.split.report.write_report`."""
    runs = read_runs(paths)
    folder = paths[0] if output is None else output
    check_place(folder, "--output")
    drawn = charts.draw(runs)
    return write_page(folder, TEMPLATE, drawn, _subtitle(runs), charts.KNOWN, _values(runs, drawn))


def _subtitle(runs: Sequence[ShownRun]) -> str:
    models = dict.fromkeys(run.run.model for run in runs)
    return ", ".join(models) + (f": {runs[0].name}" if len(runs) == 1 else "")


def _values(runs: Sequence[ShownRun], drawn: dict[str, charts.Chart]) -> dict[str, Any]:
    """What the template wants besides the charts."""
    differences = find_differences(runs)
    return {
        "runs": runs, "models": ", ".join(dict.fromkeys(run.run.model for run in runs)), "last": LAST,
        "tiles": _run_tiles(runs[0]) if len(runs) == 1 else _best_tiles(runs), "heads": HEADS,
        "rows": [_row(run) for run in runs], "evaluations": _evaluation_rows(runs),
        "unlike": [term for term in SAME if term in differences],
        "differences": [[term, *values] for term, values in differences.items()],
        "widths": [name for s in STREAMS if (name := charts.widths_name(s, len(runs) == 1)) in drawn],
        "times": [_times(run) for run in runs], "links": list(LINKS), "bins": charts.BINS, "details": _details(runs),
    }  # fmt: skip


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _seconds(value: float | None) -> str:
    """Three significant digits."""
    return "–" if value is None else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _run_tiles(run: ShownRun) -> list[tuple[str, str, str]]:
    """The figures of one run: (what, value, remark)."""
    last, first = run.evaluated(QUANTIZED), run.evaluated(TUNED)
    unquantized = f"{_number(first.perplexity)} with the cut unquantized" if first else "on held-out text"
    per_step = "no step yet" if run.sent_per_step is None else f"{show_bytes(run.sent_per_step)} per step"
    share, forward, backward = run.encode_share, run.mean_bits("forward"), run.mean_bits("backward")
    return [
        ("loss, nats/token", _number(run.loss, 3), f"mean of the last {min(LAST, len(run.steps))} steps"),
        (
            "held-out perplexity",
            _number(last.perplexity if last else None),
            unquantized if last else "amq split eval has not measured it",
        ),
        ("sent", show_bytes(run.sent), per_step),
        (
            "against float16",
            "–" if run.ratio is None else f"{run.ratio:.1f} × less",
            f"{show_bytes(run.float16)} per step as float16",
        ),
        (
            "bits per value",
            _number(forward),
            f"backward {_number(backward)}; {_number(run.wire_bits)} on the wire, everything included",
        ),
        (
            "encoding",
            "–" if share is None else f"{100 * share:.1f} %",
            "of the time in which the parties work",
        ),
    ]


def _best_tiles(runs: Sequence[ShownRun]) -> list[tuple[str, str, str]]:
    """Of several runs: which has the least of what."""

    def best(
        what: str, figure: Callable[[ShownRun], float | None], show: Callable[[float], str], missing: str
    ) -> tuple[str, str, str]:
        found = [(value, run.name) for run in runs if (value := figure(run)) is not None and math.isfinite(value)]
        return (what, show(min(found)[0]), min(found)[1]) if found else (what, "–", missing)

    def perplexity(run: ShownRun) -> float | None:
        row = run.evaluated(QUANTIZED)
        return row.perplexity if row else None

    slow = list(LINKS)[-1]
    return [
        ("runs", str(len(runs)), f"{sum(len(run.steps) for run in runs)} steps in all"),
        best("lowest loss, nats/token", lambda run: run.loss, lambda v: _number(v, 3), "no step yet"),
        best("lowest held-out perplexity", perplexity, _number, "amq split eval has measured none"),
        best("fewest bytes per step", lambda run: run.sent_per_step, show_bytes, "no step yet"),
        best(
            f"least time per step, {slow}",
            lambda run: run.step_seconds(LINKS[slow]),
            lambda v: f"{_seconds(v)} s",
            "no step yet",
        ),
    ]


def _row(run: ShownRun) -> list[str]:
    """As `HEADS`."""
    tuned, quantized = run.evaluated(TUNED), run.evaluated(QUANTIZED)
    return [
        run.name, run.terms.policy, run.terms.coder, f"{len(run.steps)} of {run.terms.steps}",
        _number(run.mean_bits("forward")), _number(run.mean_bits("backward")), _number(run.wire_bits),
        _number(run.sent / charts.MIB), "–" if run.ratio is None else f"{run.ratio:.1f}", _number(run.loss, 3),
        _number(tuned.perplexity if tuned else None), _number(quantized.perplexity if quantized else None),
        _seconds(run.measured),
    ]  # fmt: skip


def _times(run: ShownRun) -> list[str]:
    """The run, the slower party's work, then for each of `LINKS` transfer and step, and what was measured over what."""
    pairs = [(run.transfer(rate), run.step_seconds(rate)) for rate in LINKS.values()]
    computed = [_seconds(value) for pair in pairs for value in pair]
    return [run.name, _seconds(run.work), *computed, _seconds(run.measured), run.run.link or "–"]


def _evaluation_rows(runs: Sequence[ShownRun]) -> list[list[str]]:
    """Run, what was measured, perplexity, loss, bits at the cut, tokens, text."""
    return [
        [run.name, row.name, _number(row.perplexity), _number(row.loss, 4), _number(row.bits)]
        + [str(run.evaluation.tokens), run.evaluation.text]
        for run in runs
        if run.evaluation is not None
        for row in run.evaluation.rows
    ]


def _details(runs: Sequence[ShownRun]) -> dict[str, dict[str, str]]:
    """Everything needed to repeat the runs, by group."""
    groups: dict[str, dict[str, Any]] = {}
    for run in runs:
        of, before = run.run, "" if len(runs) == 1 else f"{run.name}: "
        groups[f"{before}run"] = {
            "folder": str(run.path), "status": of.status, "model": of.model, "architecture": of.architecture,
            "blocks": of.blocks, "hidden size": of.hidden_size, "parameters": of.parameters,
            "trainable parameters": of.trainable, "link": of.link or "as it is", "bytes sent": of.sent,
            "bytes received": of.received,
        }  # fmt: skip
        groups |= {f"{before}terms": of.terms, f"{before}machine": of.machine, f"{before}versions": of.versions}
    return show_details(groups)
