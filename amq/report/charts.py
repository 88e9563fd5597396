"""The report's charts: one Altair specification each, drawn alike by the page and as a PNG.

A chart is a function of the run that gives the chart, or a `Missing` with the reason that the page prints in its place.
Colours and sizes are those of `look`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import altair as alt

from amq.configuration import MemoryItem
from amq.report.data import Point, Shown, count_formats, is_of_linears
from amq.report.look import (
    BLUE,
    GREEN,
    GREY,
    MAGENTA,
    ORANGE,
    PARTS,
    RAMP,
    Chart,
    Missing,
    finish,
    log_scale,
    table,
)
from amq.report.maps import bits_chart, cost_chart

KINDS = {
    "evaluated": (GREY, "circle", 20),
    "front": (BLUE, "circle", 60),
    "held-out windows": (GREEN, "cross", 60),
    "uniform": (MAGENTA, "square", 70),
    "chosen": (ORANGE, "diamond", 200),
}
"""Kinds of point in scatter charts: colour, shape and area in pixels; later ones are drawn over earlier ones."""
DASHED: dict[str, Any] = {"color": GREY, "strokeDash": [5, 4], "strokeWidth": 1.3, "clip": True}
BAND: dict[str, Any] = {"color": GREEN, "opacity": 0.2, "clip": True}


def _points(rows: list[dict[str, Any]], x: alt.X, y: alt.Y, *tooltip: str, colors: bool = True) -> alt.Chart:
    """Rows of one of `KINDS` each, in the order of drawing, with a legend. colors: it has them, beside shapes."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    color = alt.Color("kind:N").title(None).scale(domain=kinds, range=[KINDS[kind][0] for kind in kinds])
    color = color if colors else color.legend(None)
    shape = alt.Shape("kind:N").title(None).scale(domain=kinds, range=[KINDS[kind][1] for kind in kinds])
    size = alt.Size("size:Q").scale(None).legend(None)
    marks = table({**row, "size": KINDS[row["kind"]][2]} for row in rows).mark_point(filled=True, opacity=0.9)
    return marks.encode(x, y, color, shape, size, tooltip=["kind:N", "bits:Q", *tooltip, "formats:N"])


def memory_chart(run: Shown) -> Chart:
    """Everything that must be resident, now and with everything in 16 bits."""
    if not run.memory or run.chosen is None:
        return Missing("nothing was chosen yet, or configuration.json itemises no memory")
    whole = run.items(run.widest)
    full = sum(item.bytes for item in whole if is_of_linears(item))
    unit, size = ("GiB", 2**30) if run.size(run.widest) >= 2**30 else ("MiB", 2**20)
    now = f"{run.chosen.bits:.2f} bits"
    bars = [(now, _part(run, item), item.bytes) for item in run.memory if item.bytes]
    bars += [("16 bits", bars[0][1], full)]
    bars += [("16 bits", _part(run, item), item.bytes) for item in whole if item.bytes and not is_of_linears(item)]
    parts = list(dict.fromkeys(part for _, part, _ in bars))
    rows = ({"bar": bar, "part": part, unit: n / size, "at": parts.index(part)} for bar, part, n in bars if n)
    chart = table(rows).mark_bar(height=26).encode(
        alt.X(f"{unit}:Q").axis(tickCount=6),
        alt.Y("bar:N").title(None).sort(None),
        alt.Color("part:N").title(None).scale(domain=parts, range=[PARTS[i % len(PARTS)] for i in range(len(parts))]),
        alt.Order("at:O"),
        tooltip=["part:N", f"{unit}:Q"],
    )  # fmt: skip
    return finish([chart], "Memory", f"Stacked bars: memory by part in {unit}, now and in 16 bits", 84)


def _part(run: Shown, item: MemoryItem) -> str:
    """Its name in the chart: a tied head and its embedding are the same bytes, in 16 bits and in fewer."""
    tied = run.folder.run.head_is_tied and item.name in ("embeddings", "lm_head")
    return "embeddings and lm_head" if tied else item.name


def front_chart(run: Shown) -> Chart:
    """Loss against bits: all that was evaluated, the front with its band, the uniform configurations, the choice."""
    rows = _front_rows(run)
    if not rows:
        return Missing("no configuration has a loss yet")
    x = alt.X("bits:Q").title("bits per weight").scale(zero=False, nice=False, padding=14).axis(tickCount=10)
    y = alt.Y("loss:Q").title(run.objective.label).scale(log_scale(row["loss"] for row in rows))
    front, layers = run.folder.front, []
    if front is not None and front.band is not None:
        edges = [(p.bits_per_weight, *front.band.around(p.loss)) for p in front.front if p.loss > 0]
        band = table({"bits": bits, "low": low, "high": high} for bits, low, high in edges).mark_area(**BAND)
        layers.append(band.encode(x, alt.Y("low:Q"), alt.Y2("high:Q")))
    if front is not None and front.curve:
        curve = ({"bits": p.bits_per_weight, "loss": p.loss} for p in front.curve if p.loss > 0)
        layers.append(table(curve).mark_line(**DASHED).encode(x, y))
    if run.folder.settings.target_bits is not None:
        rule = table([{"bits": run.folder.settings.target_bits}]).mark_rule(color=ORANGE, strokeDash=[2, 3])
        layers.append(rule.encode(alt.X("bits:Q")))
    layers.append(table(row for row in rows if row["kind"] == "front").mark_line(color=BLUE).encode(x, y))
    layers.append(_points(rows, x, y, "loss:Q"))
    names = table({"bits": p.bits, "loss": p.loss, "name": p.name} for p in run.uniform if p.loss and p.loss > 0)
    layers.append(names.mark_text(align="left", dx=9, dy=-6).encode(x, y, alt.Text("name:N")))
    return finish(layers, "Loss against bits per weight", "Scatter chart: loss against bits, with the front", 380)


def speed_chart(run: Shown) -> Chart:
    """Loss, tokens/s and size: what is on the front, and for several sizes what the tables say that time costs."""
    if run.speed is None:
        return Missing("the search asked for no speed")
    marks = [("front", p) for p in run.front] + [("uniform", p) for p in run.uniform]
    marks += [("chosen", run.chosen)] if run.chosen else []
    points: list[dict[str, Any]] = [
        {"kind": kind, **run.timed(p.formats), "loss": p.lost, "formats": count_formats(p.formats.values())}
        for kind, p in marks
        if 0 < p.lost < math.inf
    ]
    if not points:
        return Missing("no configuration has a loss yet")
    lines: list[dict[str, Any]] = [
        {"budget": bits, **run.timed(f), "loss": loss} for bits, f, loss in run.trades if loss > 0
    ]
    x = alt.X("tokens/s:Q").scale(zero=False, nice=False, padding=14).axis(tickCount=8)
    y = alt.Y("loss:Q").title(run.objective.label).scale(log_scale(row["loss"] for row in (*points, *lines)))
    color = alt.Color("budget:Q").title("at most so many bits per weight").scale(range=list(RAMP))
    layers = []
    if lines:
        drawn = table(lines).mark_line(strokeWidth=2, clip=True)
        layers.append(drawn.encode(x, y, color, alt.Detail("budget:N"), alt.Order("tokens/s:Q")))
    if run.speed.least:
        rule = table([{"tokens/s": run.speed.least}]).mark_rule(color=ORANGE, strokeDash=[2, 3])
        layers.append(rule.encode(alt.X("tokens/s:Q")))
    marked = _points(points, x, y, "tokens/s:Q", "loss:Q")
    layers.append(marked)
    return finish(
        layers, "Loss against speed, by size", "Scatter chart: loss against tokens/s, by size", 340
    ).resolve_scale(color="independent")


def _front_rows(run: Shown) -> list[dict[str, Any]]:
    """One row per mark, in the order of drawing. A loss of 0 or below has no place on a logarithmic axis."""
    front, uniform = list(enumerate(run.choices)), [(None, p) for p in run.uniform]
    marks = [
        *(("evaluated", None, r.bits_per_weight, r.loss, r.configuration) for r in run.evaluated),
        *(("front", i, p.bits, p.loss, p.formats) for i, p in front if p in run.front),
        *(("held-out windows", i, p.bits, p.heldout, p.formats) for i, p in [*uniform, *front]),
        *(("uniform", None, p.bits, p.loss, p.formats) for p in run.uniform),
        *(("chosen", i, p.bits, p.lost, p.formats) for i, p in front if run.is_chosen(p)),
    ]
    return [
        {"kind": kind, "at": at, "bits": bits, "loss": loss, "formats": count_formats(formats.values())}
        for kind, at, bits, loss, formats in marks
        if loss is not None and 0 < loss < math.inf
    ]


def heldout_chart(run: Shown) -> Chart:
    """Loss on held-out windows against loss on the windows that the search chose by."""
    pairs = [(p, p.loss, p.heldout) for p in (*run.uniform, *run.choices)]
    band = run.folder.front.band if run.folder.front else None
    return _agreement(run, pairs, "search loss", "held-out loss", (band.low, band.high) if band else None)


def predicted_chart(run: Shown) -> Chart:
    """Measured against predicted loss of the front."""
    return _agreement(run, [(p, p.predicted, p.loss) for p in run.choices], "predicted loss", "measured loss", None)


def _agreement(
    run: Shown, pairs: Iterable[tuple[Point, float | None, float | None]], across: str, up: str,
    slopes: tuple[float, float] | None,
) -> Chart:  # fmt: skip
    """Points (x, y) and the line where the two are equal; slopes: of the band's edges y = slope · x."""
    rows: list[dict[str, Any]] = [
        {"kind": run.kind(p), "bits": p.bits, across: x, up: y, "formats": count_formats(p.formats.values())}
        for p, x, y in pairs
        if x is not None and y is not None and x > 0 and y > 0
    ]
    if len(rows) < 2:
        return Missing(f"fewer than two configurations have both a {across} and a {up}")
    low, high = slopes or (1.0, 1.0)
    domain = log_scale(row[name] for row in rows for name in (across, up))
    ends = table({across: end, up: end, "low": end * low, "high": end * high} for end in domain["domain"])
    x = alt.X(f"{across}:Q").title(f"{across}, {run.objective.unit}").scale(domain).axis(tickCount=5)
    y = alt.Y(f"{up}:Q").scale(domain)
    layers = [ends.mark_line(**DASHED).encode(x, y), _points(rows, x, y, f"{across}:Q", f"{up}:Q")]
    if slopes:
        layers.insert(0, ends.mark_area(**BAND).encode(x, alt.Y("low:Q").title(up).scale(domain), alt.Y2("high:Q")))
    title = f"{up.capitalize()} against {across}"
    return finish(layers, title, f"Scatter chart: {title}")


def surrogate_chart(run: Shown) -> Chart:
    """How well the surrogate of the iterative solver ranked candidates that it had not seen."""
    scores = ("spearman", "kendall")
    rows = [
        {
            "score": name,
            "value": getattr(row, name),
            **{k: getattr(row, k) for k in ("iteration", "rmse", "hypervolume")},
        }
        for row in run.folder.surrogate or ()
        for name in scores
        if getattr(row, name) is not None
    ]
    if not rows:
        return Missing("no iteration has a score; the paper solver writes one after each")
    chart = table(rows).mark_line(point=True).encode(
        alt.X("iteration:Q").axis(tickMinStep=1).scale(zero=False),
        alt.Y("value:Q").title("rank correlation").scale(zero=False),
        alt.Color("score:N").title(None).scale(domain=scores, range=(BLUE, ORANGE)),
        tooltip=["iteration:Q", "score:N", "value:Q", "rmse:Q", "hypervolume:Q"],
    )  # fmt: skip
    return finish([chart], "Surrogate: rank correlation by iteration", "Line chart: rank correlation by iteration")


CHARTS: dict[str, Callable[[Shown], Chart]] = {
    "memory": memory_chart, "bits": bits_chart, "cost": cost_chart, "front": front_chart, "heldout": heldout_chart,
    "predicted": predicted_chart, "surrogate": surrogate_chart, "speed": speed_chart,
}  # fmt: skip
"""In the page's order; a name is also its PNG's."""
