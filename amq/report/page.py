"""The page: its sentences and tables, plain values that page.html.jinja puts in place and escapes.

Its sections answer, in this order: what the budget buys and what it costs, where the bits went, what one step more or
less would change, and what there is to trust.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert

from amq.report import charts
from amq.report.charts import Missing
from amq.report.data import EPSILON, Point, Shown, count_formats, show_bits, show_bytes, show_change, show_loss
from amq.util.files import write_atomic

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
TEMPLATE = Path(__file__).with_name("page.html.jinja")
PNG_WIDTH, PNG_SCALE = 760, 1.5
NAMES = ("memory", "bits", "cost", "front", "heldout", "predicted", "surrogate", "progress")
"""Of all charts, each drawn by the function of its name in `charts`."""


@dataclass(frozen=True)
class Table:
    """Text by row and column. strong: the row of the chosen point; words: columns of words; fold: a title to open."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None
    words: Sequence[int] = (0,)
    fold: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart's place on the page; `spec` is None where `reason` says why there is no chart. name: also its PNG's."""

    name: str
    spec: dict[str, Any] | None
    reason: str
    caption: str


@dataclass(frozen=True)
class Section:
    heading: str
    sentences: Sequence[str]
    figures: Sequence[Figure]
    tables: Sequence[Table] = ()


def write(run_dir: Path) -> list[Path]:
    """As `amq.report.write_report`."""
    run = Shown.open(run_dir)
    sections = [_gain(run), _places(run), _steps(run), _trust(run)]
    figures = [figure for section in sections for figure in section.figures]
    files = {f"{f.name}.png": _png(f.spec, run.folder.run.model.name) if f.spec else b"" for f in figures}
    files = {
        "report.html": _render(run, sections, figures).encode(),
        **dict.fromkeys((f"{name}.png" for name in NAMES), b""),
        **files,
    }
    for name, content in files.items():
        if content:
            write_atomic(run_dir / name, lambda temporary, content=content: temporary.write_bytes(content))
        else:
            (run_dir / name).unlink(missing_ok=True)  # of an earlier report
    return [run_dir / name for name, content in files.items() if content]


def _png(spec: dict[str, Any], model: str) -> bytes:
    """The chart as it stands on a light page, with the model's name under its title."""
    config = {**charts.THEMES["light"]["wide"], "background": "#ffffff", "padding": 12}
    fixed = {**spec, "width": PNG_WIDTH, "title": {**spec["title"], "subtitle": model}, "config": config}
    return vl_convert.vegalite_to_png(fixed, vl_version=VEGA_LITE, scale=PNG_SCALE)


def _render(run: Shown, sections: Sequence[Section], figures: Sequence[Figure]) -> str:
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    page = jinja2.Environment(autoescape=True, **options).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return page.render(
        run=run.folder.run,
        summary=_summary(run),
        sections=sections,
        details=_details(run),
        specs={figure.name: figure.spec for figure in figures if figure.spec is not None},
        themes=charts.THEMES,
        javascript=vl_convert.javascript_bundle(vl_version=VEGA_LITE),
    )


def _figure(name: str, run: Shown, caption: str = "") -> Figure:
    chart = getattr(charts, f"{name}_chart")(run)
    if isinstance(chart, Missing):
        return Figure(name, None, chart.reason, caption)
    spec = chart.to_dict()
    del spec["config"]  # the page's and the PNG's own
    return Figure(name, spec, "", caption)


def _summary(run: Shown) -> list[tuple[str, str, str]]:
    """The figures at the top: (what, value, remark)."""
    chosen, settings = run.chosen, run.folder.settings
    if chosen is None:
        return [("chosen", "nothing yet", f"{len(run.evaluated)} evaluations so far")]
    aims = (("target", settings.target_bits), ("memory", settings.memory), ("loss at most", settings.max_loss))
    aim = next((f"asked for: {name} {value}" for name, value in aims if value is not None), "no budget was given")
    share = f"{100 * run.size(chosen) / run.size_16:.0f} % of {show_bytes(run.size_16)} with the linears in 16 bits"
    found = [
        ("bits per weight", show_bits(chosen.bits), aim),
        ("memory" if run.memory else "memory of the linears", show_bytes(run.size(chosen)), share),
        ("loss, nats/token", show_loss(chosen.lost), "predicted" if chosen.loss is None else "on the search windows"),
        ("held-out loss", show_loss(chosen.heldout), "not measured" if chosen.heldout is None else "on unseen windows"),
    ]
    rivals = [p for p in run.uniform if p.loss is not None and p.bits <= chosen.bits + EPSILON]
    if not rivals:
        return [*found, ("uniform", "–", "none that was evaluated costs as little")]
    rival = min(rivals, key=lambda p: p.lost)
    ours, theirs = _paired(chosen, rival)
    times = f"{theirs / ours:.2g} times as much" if ours and theirs else "no loss to compare"
    return [*found, (f"uniform {rival.name} loses", show_loss(theirs), f"{times}, at {show_bits(rival.bits)} bits")]


def _paired(ours: Point, theirs: Point) -> tuple[float | None, float | None]:
    """Two losses on the same windows: the held-out ones where both have them, for the search chose on the others."""
    if ours.heldout is not None and theirs.heldout is not None:
        return ours.heldout, theirs.heldout
    return ours.lost, theirs.lost


def _gain(run: Shown) -> Section:
    """What do I get at my budget, and what do I lose?"""
    loss, tables = charts.LOSSES.get(run.folder.settings.loss, run.folder.settings.loss), []
    sentence = f"Losses are the {loss} from the full-precision model, in nats per token; held-out ones are on windows "
    sentence += "that the search did not choose by."
    if run.chosen is not None:
        points = sorted([run.chosen, *run.uniform], key=lambda p: p.bits)
        changes = (show_change(*reversed(_paired(run.chosen, p))) for p in points)
        rows = [[*_cells(run, p.name or "chosen", p), change] for p, change in zip(points, changes, strict=True)]
        heads = ("uniform", "bits", "memory", "loss", "held-out", "than the chosen")
        tables.append(Table(heads, rows, points.index(run.chosen)))
    if run.memory:
        total = sum(item.bytes for item in run.memory)
        items = [[i.name, show_bytes(i.bytes), f"{100 * i.bytes / total:.0f} %", i.note] for i in run.memory]
        items.append(["in all", show_bytes(total), "", ""])
        tables.append(Table(("memory", "bytes", "share", ""), items, len(items) - 1, words=(0, 3)))
    return Section("What the budget buys, and what it costs", [sentence], [_figure("memory", run)], tables)


def _cells(run: Shown, name: str, point: Point) -> list[str]:
    losses = (show_loss(point.loss), show_loss(point.heldout))
    return [name, show_bits(point.bits), show_bytes(run.size(point)), *losses]


def _places(run: Shown) -> Section:
    """Where did the bits go?"""
    caption = "Move the slider to see the other points of the front. " if len(run.choices) > 1 else ""
    caption += f"Pinned linears ({len(run.folder.run.pinned)}) have a frame." if run.folder.run.pinned else ""
    cost = "What the search knew of each linear: the more it costs, the more it gains from bits."
    of = run.folder.sensitivity
    if of is not None:
        cost += f" All others were at {of.highest}. Above {of.threshold:g} times the median of {show_loss(of.median)} "
        cost += "a linear is pinned."
    return Section("Where the bits went", [], [_figure("bits", run, caption), _figure("cost", run, cost)])


def _steps(run: Shown) -> Section:
    """What would one step more or less cost?"""
    caption = (
        "Lower and further left is better. Dashed: the predicted loss of the best configuration at each number of "
    )
    caption += "bits. Green: where held-out losses are expected. A click on the front shows its bits in the map above."
    figures = [_figure("front", run, caption)]
    chosen, points = run.chosen, run.neighbours
    if chosen is None or len(points) < 2:
        return Section("One step more or less", ["The front has no other point to compare with."], figures)
    at = next(i for i, p in enumerate(points) if run.is_chosen(p))
    names = [f"{at - i} smaller" if i < at else f"{i - at} larger" if i > at else "chosen" for i in range(len(points))]
    differ = [sum(p.formats[linear] != fmt for linear, fmt in chosen.formats.items()) for p in points]
    changes = [(show_bytes(run.size(p) - run.size(chosen)), show_change(p.lost, chosen.lost)) for p in points]
    rows = [
        [*_cells(run, name, p), *change, str(count)]
        for name, p, change, count in zip(names, points, changes, differ, strict=True)
    ]
    sentences = [
        f"One point {names[i].split()[1]} on the front means {changes[i][0]} of memory and {changes[i][1]} of loss."
        for i in (at - 1, at + 1)
        if 0 <= i < len(points)
    ]
    heads = ("step", "bits", "memory", "loss", "held-out", "memory change", "loss change", "linears that differ")
    return Section("One step more or less", sentences, figures, [Table(heads, rows, at)])


def _trust(run: Shown) -> Section:
    """Can I trust it?"""
    sentences, front = [], run.folder.front
    if front is not None and front.band is not None:
        band = front.band
        sentences.append(
            f"On held-out windows the front loses {band.ratio:.2f} times what it loses on the search windows; one more "
            f"point would mostly lose {band.low:.2f} to {band.high:.2f} times as much."
        )
    elif front is not None:
        sentences.append(f"There is no error band: {front.band_missing}.")
    if run.folder.settings.refine:
        sentences.append("--refine looked at the held-out windows too, so they are not wholly unseen.")
    if front is not None and front.fit is not None:
        fit = front.fit
        sentences.append(
            f"Over the {fit.points} evaluations that the prediction was fitted to, it ranks with Spearman "
            f"{fit.spearman:.3f} and Kendall {fit.kendall:.3f}, and is off by {show_loss(fit.rmse)} nats/token (RMSE)."
        )
    infeasible = sum(record.loss is None for record in run.evaluated)
    if infeasible:
        sentences.append(f"{infeasible} of {len(run.evaluated)} evaluations gave no finite loss and are in no chart.")
    names = ("predicted",) if run.folder.surrogate is None else ("surrogate", "progress")
    figures = [_figure("heldout", run, "On the dashed line both are equal."), *(_figure(name, run) for name in names)]
    losses = ([show_loss(loss) for loss in (p.loss, p.heldout, p.predicted)] for p in run.choices)
    rows = [
        [show_bits(p.bits), *cells, count_formats(p.formats.values())]
        for p, cells in zip(run.choices, losses, strict=True)
    ]
    chosen = next((i for i, p in enumerate(run.choices) if run.is_chosen(p)), None)
    every = Table(("bits", "loss", "held-out", "predicted", "linears"), rows, chosen, (4,), f"All {len(rows)} points")
    return Section("Can it be trusted?", sentences, figures, [every] if rows else [])


def _details(run: Shown) -> dict[str, dict[str, str]]:
    """Everything needed to repeat the run, by group."""
    of = run.folder.run
    groups: dict[str, dict[str, Any]] = {
        "Model": asdict(of.model), "Settings": of.settings.json(), "Calibration": asdict(of.calibration),
        "Seconds": dict(of.timings or {}), "Evaluations": asdict(of.evaluations) if of.evaluations else {},
        "Machine": asdict(of.machine), "Versions": of.versions, "Pinned linears": of.pinned,
    }  # fmt: skip
    return {
        heading: {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
        for heading, values in groups.items()
        if values
    }
