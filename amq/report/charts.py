"""The report's charts: one Altair specification each, drawn alike by the page and as a PNG.

A chart is a function of the run that gives the chart, or a `Missing` with the reason that the page prints in its place.
Colours that have to stand on a white and on a dark page are chosen for both; what cannot (text, grid) is in `theme`.
Widths are the container's, so that the page fits a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import altair as alt

from amq.report.data import Point, Shown, count_formats, show_bits, show_loss, sort_formats

LOSSES = {"jsd": "Jensen–Shannon divergence", "kl": "Kullback–Leibler divergence", "ce": "cross-entropy"}
RAMP = ("#f2de7e", "#a6d49f", "#55b7ad", "#2f8fc0", "#4569bd", "#6a3f9e")
"""Formats from few bits to many. Steps differ in lightness, and so stay apart for colour-blind readers and in print."""
GREY, BLUE, GREEN, MAGENTA, ORANGE = "#8b98a5", "#3280c8", "#0f9d76", "#c2569a", "#e8710a"
KINDS = {
    "evaluated": (GREY, "circle", 20),
    "front": (BLUE, "circle", 60),
    "held-out windows": (GREEN, "cross", 60),
    "uniform": (MAGENTA, "square", 70),
    "chosen": (ORANGE, "diamond", 200),
}
"""Kinds of point in scatter charts: colour, shape and area in pixels; later ones are drawn over earlier ones."""
PARTS = (BLUE, "#8fc1ea", GREEN, "#d9b945", MAGENTA, ORANGE, GREY)
MOST_HEIGHT = 900
DASHED: dict[str, Any] = {"color": GREY, "strokeDash": [5, 4], "strokeWidth": 1.3}
BAND: dict[str, Any] = {"color": GREEN, "opacity": 0.2, "clip": True}


@dataclass(frozen=True)
class Missing:
    """A chart that cannot be drawn, and why."""

    reason: str


Chart = alt.LayerChart | Missing


def theme(ink: str, muted: str, line: str, columns: int) -> dict[str, Any]:
    """A Vega-Lite configuration: colours of text, labels and grid; columns: legend entries beside each other."""
    labels = {"labelColor": muted, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500}
    lines = {"gridColor": line, "domainColor": line, "tickColor": line}
    return {
        "background": "transparent",
        "font": "system-ui, 'Liberation Sans', 'DejaVu Sans', sans-serif",
        "axis": {**labels, **lines, "labelOverlap": "greedy", "labelSeparation": 4},
        "legend": {**labels, "orient": "bottom", "columns": columns, "labelLimit": 300, "symbolStrokeWidth": 0},
        "title": {"color": ink, "subtitleColor": muted, "anchor": "start", "fontSize": 13, "subtitleFontSize": 12},
        "view": {"stroke": None},
        "style": {"label": {"fill": ink}},
    }


LIGHT, DARK = ("#1c2430", "#55626f", "#dfe4e9"), ("#e8edf2", "#a3b0bd", "#38424d")
THEMES = {
    name: {width: theme(*colors, columns) for width, columns in (("wide", 5), ("narrow", 2))}
    for name, colors in (("light", LIGHT), ("dark", DARK))
}


def _rows(rows: Iterable[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=list(rows)))


def _finish(layers: list[alt.Chart], title: Any, description: str, height: int = 300) -> alt.LayerChart:
    size = alt.AutoSizeParams(type="fit-x", contains="padding")
    return alt.layer(*layers).properties(
        width="container", height=height, autosize=size, title=alt.Title(title), description=description
    )


def _log(values: Iterable[float]) -> alt.Scale:
    """A logarithmic scale around the values, all of them positive."""
    found = list(values)
    return alt.Scale(type="log", nice=False, domain=[min(found) * 0.85, max(found) * 1.18], clamp=True)


def _points(rows: list[dict[str, Any]], x: alt.X, y: alt.Y, *tooltip: alt.Tooltip) -> alt.Chart:
    """Rows of one of `KINDS` each, in the order of drawing, with a legend."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    color = alt.Color("kind:N").title(None).scale(domain=kinds, range=[KINDS[kind][0] for kind in kinds])
    shape = alt.Shape("kind:N").title(None).scale(domain=kinds, range=[KINDS[kind][1] for kind in kinds])
    sized = ({**row, "size": KINDS[row["kind"]][2]} for row in rows)
    marks = _rows(sized).mark_point(filled=True, opacity=0.9)
    tips = [alt.Tooltip("kind:N"), alt.Tooltip("bits:Q", format=".3f"), *tooltip, alt.Tooltip("formats:N")]
    return marks.encode(x, y, color, shape, alt.Size("size:Q").scale(None).legend(None), tooltip=tips)


def memory_chart(run: Shown) -> Chart:
    """Everything that must be resident, now and with the linears in 16 bits."""
    if not run.memory or run.chosen is None:
        return Missing("nothing was chosen yet, or configuration.json itemises no memory")
    unit, size = ("GiB", 2**30) if run.size_16 >= 2**30 else ("MiB", 2**20)
    now, parts = f"{show_bits(run.chosen.bits)} bits", [item.name for item in run.memory if item.bytes]
    bars = [(now, item.name, item.bytes) for item in run.memory]
    bars += [("16 bits", item.name, item.bytes) for item in run.others]
    bars.append(("16 bits", parts[0], 2 * run.numel))
    rows = ({"bar": bar, "part": part, "size": n / size, "at": parts.index(part)} for bar, part, n in bars if n)
    colors = [PARTS[i % len(PARTS)] for i in range(len(parts))]
    chart = _rows(rows).mark_bar(height=26).encode(
        alt.X("size:Q").title(unit).axis(tickCount=6),
        alt.Y("bar:N").title(None).sort(None),
        alt.Color("part:N").title(None).scale(domain=parts, range=colors),
        alt.Order("at:O"),
        tooltip=[alt.Tooltip("part:N"), alt.Tooltip("size:Q", format=".3f", title=unit)],
    )  # fmt: skip
    return _finish([chart], "Memory", f"Stacked bars: memory by part in {unit}, now and in 16 bits", 84)


def bits_chart(run: Shown) -> Chart:
    """The format of each linear by block and role, of one configuration of the front at a time."""
    if not run.choices:
        return Missing("the run has neither a front nor a chosen configuration yet")
    formats = sort_formats(name for point in run.choices for name in point.formats.values())
    last = len(run.choices) - 1
    start = next((i for i, p in enumerate(run.choices) if run.is_chosen(p)), last // 2)
    slider = {"bind": alt.binding_range(min=0, max=last, step=1, name="point of the front ")} if last else {}
    labels = [
        [
            f"{show_bits(p.bits)} bits, loss {show_loss(p.lost)}" + " (chosen)" * run.is_chosen(p),
            count_formats(p.formats.values()),
        ]
        for p in run.choices
    ]
    codes = {s.name: [formats.index(p.formats[s.name]) for p in run.choices] for s in run.folder.run.linears}
    colors = [RAMP[round(i * (len(RAMP) - 1) / max(1, len(formats) - 1))] for i in range(len(formats))]
    color = alt.Color("format:N").title(None).scale(domain=formats, range=colors)
    layers = _heat_map(run, {"codes": codes}, color, alt.Tooltip("format:N"))
    layers[0] = layers[0].transform_calculate(format="names[datum.codes[at]]")
    title, described = alt.expr("labels[at]"), "Heat map: the format of each linear by role and block"
    values = (alt.param(name="names", value=formats), alt.param(name="labels", value=labels))
    return _finish(layers, title, described, _height(run)).add_params(
        alt.param(name="at", value=start, **slider), *values
    )


def _heat_map(
    run: Shown, columns: dict[str, dict[str, Any]], color: alt.Color, tooltip: alt.Tooltip
) -> list[alt.Chart]:
    """Role by block, and a frame around each pinned linear. columns: {field: {linear: value}}."""
    x = alt.X("block:O").title("block").axis(labelAngle=0, grid=False).scale(paddingInner=0.05)
    y = alt.Y("role:N").title(None).sort(list(run.roles.values())).axis(labelLimit=150, grid=False)
    y = y.scale(paddingInner=0.08)
    cells = [
        {
            **{"linear": spec.name, "role": run.roles[spec.role], "block": spec.block},
            **{"pinned": run.folder.run.pinned.get(spec.name, "no")},
            **{field: values[spec.name] for field, values in columns.items()},
        }
        for spec in run.folder.run.linears
        if all(spec.name in values for values in columns.values())
    ]
    tips = [alt.Tooltip("linear:N"), tooltip, alt.Tooltip("pinned:N")]
    pinned = _rows(cell for cell in cells if cell["pinned"] != "no")
    frames = pinned.mark_rect(filled=False, stroke=ORANGE, strokeWidth=2).encode(x, y)
    return [_rows(cells).mark_rect().encode(x, y, color, tooltip=tips), *([frames] if run.folder.run.pinned else [])]


def _height(run: Shown) -> int:
    """Of a heat map: with lower rows where a model of experts has hundreds of roles."""
    return len(run.roles) * max(2, min(26, MOST_HEIGHT // len(run.roles)))


def cost_chart(run: Shown) -> Chart:
    """Measured sensitivities, or where the run has none the solver's cost at the lowest format."""
    if run.folder.sensitivity is not None:
        title, unit = f"Sensitivity of each linear at {run.folder.sensitivity.lowest}", "nats/token"
        found = run.folder.sensitivity.loss
    elif run.folder.cost is not None:
        lowest = sort_formats(name for row in run.folder.cost.cost.values() for name in row)[0]
        title, unit = f"Cost ({run.folder.cost.kind}) of each linear at {lowest}", run.folder.cost.unit
        found = {linear: row.get(lowest) for linear, row in run.folder.cost.cost.items()}
    else:
        return Missing("the run has no sensitivity.json and no cost.json")
    values = {linear: value for linear, value in found.items() if value is not None and math.isfinite(value)}
    if not values:
        return Missing("no linear has a finite cost")
    scale = alt.Scale(type="log" if min(values.values()) > 0 else "linear", scheme="viridis")
    legend = alt.Legend(gradientLength=220, format=".2~g", tickCount=3)
    color = alt.Color("cost:Q", title=unit, scale=scale, legend=legend)
    layers = _heat_map(run, {"cost": values}, color, alt.Tooltip("cost:Q", format=".3g"))
    return _finish(layers, title, "Heat map: the cost of each linear by role and block", _height(run))


def front_chart(run: Shown) -> Chart:
    """Loss against bits: all that was evaluated, the front with its band, the uniform configurations, the choice."""
    rows = _front_rows(run)
    if not rows:
        return Missing("no configuration has a loss yet")
    x = alt.X("bits:Q").title("bits per weight").scale(zero=False, nice=False, padding=14).axis(tickCount=10)
    y = alt.Y("loss:Q").title("loss, nats/token").scale(_log(row["loss"] for row in rows)).axis(format="~g")
    front, layers = run.folder.front, []
    if front is not None and front.band is not None:
        edges = [(p.bits_per_weight, *front.band.around(p.loss)) for p in front.front if p.loss > 0]
        band = _rows({"bits": bits, "low": low, "high": high} for bits, low, high in edges).mark_area(**BAND)
        layers.append(band.encode(x, alt.Y("low:Q"), alt.Y2("high:Q")))
    if front is not None and front.curve:
        curve = ({"bits": p.bits_per_weight, "loss": p.loss} for p in front.curve if p.loss > 0)
        layers.append(_rows(curve).mark_line(**DASHED).encode(x, y))
    if run.folder.settings.target_bits is not None:
        rule = _rows([{"bits": run.folder.settings.target_bits}]).mark_rule(color=ORANGE, strokeDash=[2, 3])
        layers.append(rule.encode(alt.X("bits:Q")))
    layers.append(_rows(row for row in rows if row["kind"] == "front").mark_line(color=BLUE).encode(x, y))
    layers.append(_points(rows, x, y, alt.Tooltip("loss:Q", format=".3g")))
    names = _rows({"bits": p.bits, "loss": p.loss, "name": p.name} for p in run.uniform if p.loss and p.loss > 0)
    text = names.mark_text(style="label", align="left", dx=9, dy=-6, fontSize=12)
    layers.append(text.encode(x, y, alt.Text("name:N")))
    return _finish(layers, "Loss against bits per weight", "Scatter chart: loss against bits, with the front", 380)


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
    return _agreement(
        run, pairs, "loss on search windows", "on held-out windows", (band.low, band.high) if band else None
    )


def predicted_chart(run: Shown) -> Chart:
    """Measured against predicted loss of the front."""
    return _agreement(run, [(p, p.predicted, p.loss) for p in run.choices], "predicted loss", "measured loss")


def _agreement(
    run: Shown,
    pairs: Iterable[tuple[Point, float | None, float | None]],
    across: str,
    up: str,
    slopes: tuple[float, float] | None = None,
) -> Chart:
    """Points (x, y) and the line where the two are equal; slopes: of the band's edges y = slope · x."""
    rows = [
        {"kind": run.kind(p), "bits": p.bits, "x": x, "y": y, "formats": count_formats(p.formats.values())}
        for p, x, y in pairs
        if x is not None and y is not None and x > 0 and y > 0
    ]
    if len(rows) < 2:
        return Missing(f"fewer than two configurations have both a {across} and a {up}")
    scale = _log(row[k] for row in rows for k in ("x", "y"))
    low, high = slopes or (1.0, 1.0)
    ends = _rows({"x": end, "y": end, "low": end * low, "high": end * high} for end in scale.domain)
    x = alt.X("x:Q").title(f"{across}, nats/token").scale(scale).axis(format="~g", tickCount=5)
    y = alt.Y("y:Q").title(up).scale(scale).axis(format="~g")
    tips = (alt.Tooltip("x:Q", format=".3g", title=across), alt.Tooltip("y:Q", format=".3g", title=up))
    layers = [ends.mark_line(**DASHED).encode(x, y), _points(rows, x, y, *tips)]
    if slopes:
        layers.insert(0, ends.mark_area(**BAND).encode(x, alt.Y("low:Q").scale(scale), alt.Y2("high:Q")))
    title = f"{up} against {across}".removeprefix("on ").capitalize()
    return _finish(layers, title, f"Scatter chart: {title}")


def surrogate_chart(run: Shown) -> Chart:
    """How well the surrogate of the iterative solver ranked candidates that it had not seen."""
    return _history(run, "Surrogate: rank correlation by iteration", ("spearman", "kendall"))


def progress_chart(run: Shown) -> Chart:
    """How far the front had come at each iteration of the iterative solver."""
    return _history(run, "Hypervolume of the front by iteration", ("hypervolume",))


def _history(run: Shown, title: str, scores: tuple[str, ...]) -> Chart:
    rows = [
        {"iteration": row.iteration, "value": getattr(row, name), "score": name, "rmse": row.rmse}
        for row in run.folder.surrogate or ()
        for name in scores
        if getattr(row, name) is not None
    ]
    if not rows:
        return Missing("the run has no such scores; the paper solver writes them after each iteration")
    tips = [alt.Tooltip(f"{name}:Q", format=".3~g") for name in ("iteration", "value", "rmse")]
    chart = _rows(rows).mark_line(point=True).encode(
        alt.X("iteration:Q").axis(tickMinStep=1).scale(zero=False),
        alt.Y("value:Q").title(None).scale(zero=False),
        alt.Color("score:N").title(None).scale(domain=scores, range=[BLUE, ORANGE][: len(scores)]),
        tooltip=[alt.Tooltip("score:N"), *tips],
    )  # fmt: skip
    return _finish([chart], title, f"Line chart: {title}", 260)
