"""The maps of the report: what each weight holds, and what it costs, by role and block.

The experts of a layer and role are one cell, with the spread among them in its tooltip where they differ. Head and
embeddings are in no block: each is a bar across the map, below the roles.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt

from amq.report.data import Cell, Point, Shown, count_formats, show_loss, sort_formats
from amq.report.look import ORANGE, RAMP, Chart, Missing, finish, table

MOST_HEIGHT = 900


def bits_chart(run: Shown) -> Chart:
    """The format of each linear by block and role, of one configuration of the front at a time."""
    if not run.choices:
        return Missing("the run has neither a front nor a chosen configuration yet")
    formats = sort_formats(name for point in run.choices for name in point.formats.values())
    last = len(run.choices) - 1
    start = next((i for i, p in enumerate(run.choices) if run.is_chosen(p)), last // 2)
    slider = alt.binding_range(min=0, max=last, step=1, name="point of the front ") if last else alt.Undefined
    labels = [_label(run, point) for point in run.choices]
    values = {cell.name: _formats_of(cell, run.choices, formats) for cell in run.cells}
    colors = [RAMP[round(i * (len(RAMP) - 1) / max(1, len(formats) - 1))] for i in range(len(formats))]
    color = alt.Color("format:N").title(None).scale(domain=formats, range=colors)
    formulas = {"format": "names[datum.value[at]]", "experts": "datum.spread ? datum.spread[at] : ''"}
    chart = _heat_map(run, formulas, values, color, alt.expr("labels[at]"))
    names, texts = alt.param(name="names", value=formats), alt.param(name="labels", value=labels)
    return chart.add_params(names, texts, alt.param(name="at", value=start, bind=slider))


def _label(run: Shown, point: Point) -> list[str]:
    outer = [f"{s.name} {point.formats[s.name]}" for s in run.folder.inventory.outer if s.name in point.formats]
    figures = f"{point.bits:.2f} bits, loss {show_loss(point.lost)}" + " (chosen)" * run.is_chosen(point)
    return [", ".join([figures, *outer]), count_formats(point.formats.values())]


def _formats_of(cell: Cell, points: Iterable[Point], formats: list[str]) -> dict[str, Any]:
    """Of each point the index of the format that most of the cell's members have, and where they differ how many have
    which."""
    counts = [Counter(point.formats[name] for name in cell.members) for point in points]
    found: dict[str, Any] = {"value": [formats.index(count.most_common(1)[0][0]) for count in counts]}
    if any(len(count) > 1 for count in counts):
        found["spread"] = [count_formats(count.elements()) for count in counts]
    return found


def _heat_map(
    run: Shown, formulas: Mapping[str, str], values: Mapping[str, dict[str, Any]], color: alt.Color, title: Any
) -> alt.LayerChart:
    """Role by block, and a frame around each pinned cell. values: {cell: its fields}. formulas: {field: its value, from
    the others}, the first of which is coloured."""
    rows = [*run.roles.values(), *(s.name for s in run.folder.inventory.outer if s.name in values)]
    x = alt.X("block:O").title("block").axis(labelAngle=0, grid=False, labelOverlap="parity")
    x = x.scale(paddingInner=min(0.06, run.folder.run.model.blocks / 400))
    y = alt.Y("role:N").title(None).axis(labelLimit=150, grid=False).scale(paddingInner=0.08, domain=rows)
    tooltip = ["linear:N", color["shorthand"], *(f"{name}:N" for name in list(formulas)[1:]), "pinned:N"]
    pinned = run.folder.run.pinned
    cells = [
        {"linear": c.name, "role": c.role, "block": c.block, **values[c.name]}
        | {"pinned": next((pinned[name] for name in c.members if name in pinned), "no")}
        for c in run.cells
        if c.name in values
    ]
    layers = []
    for within, encodings in ((True, (x, y)), (False, (y,))):
        mine = [cell for cell in cells if (cell["block"] is not None) == within]
        if mine:
            map_ = table(mine).transform_calculate(**formulas).mark_rect()
            layers.append(map_.encode(*encodings, color, tooltip=tooltip))
        if frames := [cell for cell in mine if cell["pinned"] != "no"]:
            framed = table(frames).mark_rect(filled=False, stroke=ORANGE, strokeWidth=2)
            layers.append(framed.encode(*encodings))
    row = max(2, min(26, MOST_HEIGHT // len(rows)))
    field = next(iter(formulas))
    return finish(layers, title, f"Heat map: the {field} of each linear by role and block", row * len(rows))


def cost_chart(run: Shown) -> Chart:
    """Measured sensitivities, or where the run has none the solver's cost at the lowest format."""
    adds_up = run.folder.sensitivity is None
    if run.folder.sensitivity is not None:
        title, unit = f"Sensitivity of each linear at {run.folder.sensitivity.lowest}", run.objective.unit
        found: dict[str, float | None] = {**run.folder.sensitivity.loss}
    elif run.folder.cost is not None:
        lowest = next(iter(sort_formats(name for row in run.folder.cost.cost.values() for name in row)), "")
        title, unit = f"Cost ({run.folder.cost.kind}) of each linear at {lowest}", run.folder.cost.unit
        found = {linear: row.get(lowest) for linear, row in run.folder.cost.cost.items()}
    else:
        return Missing("the run has no sensitivity.json and no cost.json")
    values = {cell.name: _cost_of(cell, found, adds_up) for cell in run.cells}
    values = {name: value for name, value in values.items() if value}
    if not values:
        return Missing("no linear has a finite cost")
    log = min(value["value"] for value in values.values()) > 0
    scale = alt.Scale(type="log" if log else "linear", scheme="viridis")
    legend = alt.Legend(gradientLength=220, format=".2~g", tickCount=3)
    color = alt.Color("cost:Q", title=unit, scale=scale, legend=legend)
    formulas = {"cost": "datum.value", "experts": "datum.spread || ''"}
    return _heat_map(run, formulas, values, color, title)


def _cost_of(cell: Cell, found: Mapping[str, float | None], adds_up: bool) -> dict[str, Any]:
    """The summed cost of a cell's members (of sensitivities, which were measured together or do not add up, the mean),
    and from where to where they are; empty where none has a finite one."""
    known = [value for name in cell.members if (value := found.get(name)) is not None and math.isfinite(value)]
    if not known:
        return {}
    whole = {"value": sum(known) if adds_up else sum(known) / len(known)}
    return whole if min(known) == max(known) else {**whole, "spread": f"{min(known):.2g} to {max(known):.2g} each"}
