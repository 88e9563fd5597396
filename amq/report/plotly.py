"""The interactive charts: each function turns a chart's data into a plotly figure.

Titles live in the HTML around the figures; a figure takes the width of its column and has a fixed height, so it works
in a wide window and on a phone. All strings from the run are escaped, because plotly reads a subset of HTML in text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from amq.report import style as look
from amq.report.charts import (
    BitsData,
    BitsMap,
    FrontData,
    HistoryData,
    MemoryData,
    Point,
    PredictionData,
    SensitivityData,
)
from amq.report.data import show_bytes, show_loss

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', 'DejaVu Sans Mono', monospace"
AXIS = {"gridcolor": look.GRID, "linecolor": look.MUTED, "ticks": "outside", "ticklen": 4, "zeroline": False}


def _hover(lines: Iterable[str]) -> str:
    """Escaped lines; spaces become no-break spaces, because SVG text would merge the runs that align columns."""
    return "<br>".join(html.escape(line, quote=False).replace(" ", "\u00a0") for line in lines)


def _style(figure: go.Figure, height: int, zoom: bool = False, **layout: object) -> go.Figure:
    figure.update_layout(
        height=height,
        template="none",
        font={"family": FONT, "size": 13, "color": look.INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": "#ffffff", "font": {"family": MONO, "size": 11, "color": look.INK}, "align": "left"},
        legend={"orientation": "h", "x": 0, "y": 1 + 24 / height, "yanchor": "bottom"},
        legend_font_size=12,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
    )
    figure.update_layout(**layout)
    fixed = not zoom  # a fixed axis lets a finger scroll the page across the chart
    figure.update_xaxes(automargin=True, fixedrange=fixed, title_font_size=13, title_standoff=8)
    figure.update_yaxes(automargin=True, fixedrange=fixed, title_font_size=13, title_standoff=8)
    return figure


def _log_axis(low: float, high: float) -> dict[str, object]:
    ticks = look.log_ticks(low, high)
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
    }


def _block_ticks(blocks: Sequence[str]) -> dict[str, object]:
    """Ticks of a block axis: plotly thins them to the width it has, where a block's number is its position."""
    style = {"tickangle": 0, "tickfont": {"size": 11}}
    if len(blocks) > 12 and list(blocks) == [str(i) for i in range(len(blocks))]:
        return style | {"tickformat": "d"}
    ticks = look.pick_ticks(len(blocks), 12)
    return style | {"tickvals": ticks, "ticktext": [blocks[i] for i in ticks]}


def _points(points: Sequence[Point], floor: float, name: str, **style: object) -> go.Scatter:
    """One trace; a loss below `floor` (zero, on a log axis) is drawn on it, and its hover text tells the true value."""
    return go.Scatter(
        x=[round(p.bits, 5) for p in points],
        y=[float(f"{max(p.loss, floor):.6g}") for p in points],
        name=html.escape(name, quote=False),
        hovertext=[_hover(p.lines) for p in points],
        hoverinfo="text",
        **style,
    )


def front_figure(data: FrontData) -> go.Figure:
    """Chart 1: loss against bits per weight, log y."""
    low, high = data.loss_range()
    figure = go.Figure()
    size, opacity = (5, 0.5) if data.crowded else (7, 0.8)
    for phase, points in data.candidates.items():
        marker = {"size": size, "opacity": opacity, "color": look.PHASES.get(phase, look.OTHER_PHASE)}
        figure.add_trace(_points(points, low, f"{phase} ({len(points):,})", mode="markers", marker=marker))
    if data.band:
        xs = [bits for bits, _ in data.curve]
        edges = [max(v, low) for v in [*data.band[1], *reversed(data.band[0])]]
        area = {"fill": "toself", "fillcolor": "rgba(138,151,165,0.18)", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=[*xs, *reversed(xs)], y=edges, mode="lines", name="band", **area))
    if data.curve:
        xs, ys = zip(*data.curve, strict=True)
        line = {"color": look.CURVE, "dash": "dash", "width": 1.5}
        heights = [max(y, low) for y in ys]
        figure.add_trace(go.Scatter(x=xs, y=heights, mode="lines", name="predicted", line=line, hoverinfo="skip"))
    _add_confirm(figure, data, low)
    if data.front:
        line, marker = {"color": look.FRONT, "width": 2}, {"size": 7, "color": look.FRONT}
        figure.add_trace(_points(data.front, low, "Pareto front", mode="lines+markers", line=line, marker=marker))
    if data.uniform:
        marker = {"size": 10, "symbol": "diamond", "color": look.UNIFORM}
        text = {"text": [_hover([p.name]) for p in data.uniform], "textposition": "top right", "cliponaxis": False}
        figure.add_trace(_points(data.uniform, low, "uniform", mode="markers+text", marker=marker, **text))
    if data.chosen:
        marker = {"size": 17, "symbol": "star", "color": look.CHOSEN, "line": {"color": "#ffffff", "width": 1}}
        figure.add_trace(_points([data.chosen], low, data.chosen.name, mode="markers", marker=marker))
    if data.ceiling and high > data.ceiling:
        figure.add_hline(y=data.ceiling, line={"color": look.FAINT, "dash": "dot", "width": 1.5}, layer="below")
        text = {"text": "ln 2: the largest possible", "font": {"size": 11, "color": look.MUTED}, "showarrow": False}
        where = {"x": 1, "xref": "paper", "xanchor": "right", "yanchor": "top"}
        figure.add_annotation(y=math.log10(data.ceiling), **where, **text)  # on a log axis plotly wants the exponent
    figure.update_xaxes(title="bits per weight", range=data.bits_range(), **AXIS)
    figure.update_yaxes(title=f"{data.loss_name}, nats/token", **AXIS, **_log_axis(low, high))
    return _style(figure, 540, zoom=True, hovermode="closest")


def _add_confirm(figure: go.Figure, data: FrontData, low: float) -> None:
    """Losses on the confirmation windows: an open circle, tied to the point by a thin line."""
    points = [p for p in [*data.front, *data.uniform, *([data.chosen] if data.chosen else [])] if p.confirm is not None]
    points = list({(p.bits, p.confirm): p for p in points}.values())
    if not points:
        return
    xs = [x for p in points for x in (p.bits, p.bits, None)]
    ys = [y for p in points for y in (max(p.loss, low), max(p.confirm or 0, low), None)]
    tie = {"color": look.MUTED, "width": 1}
    figure.add_trace(go.Scatter(x=xs, y=ys, mode="lines", line=tie, showlegend=False, hoverinfo="skip"))
    marker = {"size": 6, "symbol": "circle-open", "color": look.MUTED, "line": {"width": 1.2}}
    name = "on the confirmation windows"
    heights = [max(p.confirm or 0, low) for p in points]
    circles = {"x": [p.bits for p in points], "y": heights, "name": name, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(**circles, mode="markers", marker=marker))


def _cell_text(data: BitsData, one: BitsMap) -> list[list[str]]:
    return [["" if cell is None else data.labels[cell] for cell in row] for row in one.cells]


def bits_figure(data: BitsData) -> go.Figure:
    """Chart 2: role × block, one colour per format, with a slider over the front's configurations."""
    palette = look.format_colors(len(data.formats))
    count = len(data.formats)
    scale = [[edge / count, color] for i, color in enumerate(palette) for edge in (i, i + 1)]
    shown = data.maps[data.shown]
    blocks, roles = len(data.grid.blocks), len(data.grid.roles)
    figure = go.Figure(
        go.Heatmap(
            z=shown.cells,
            text=_cell_text(data, shown),
            customdata=[[html.escape(name, quote=False) for name in row] for row in data.names],
            texttemplate="%{text}" if blocks <= 40 and roles <= 40 else None,
            hovertemplate="%{customdata}<br>%{text} bits<extra></extra>",
            colorscale=scale,
            zmin=-0.5,
            zmax=count - 0.5,
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    for name, color in zip(data.formats, palette, strict=True):
        marker = {"symbol": "square", "size": 12, "color": color, "line": {"color": look.MUTED, "width": 1}}
        key = {"x": [None], "y": [None], "mode": "markers", "marker": marker, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(**key, name=html.escape(name, quote=False)))
    outline = {"color": look.CHOSEN, "width": 2}
    for role, block in data.pinned:
        figure.add_shape(type="rect", x0=block - 0.5, x1=block + 0.5, y0=role - 0.5, y1=role + 0.5, line=outline)
    if data.pinned:
        marker = {"symbol": "square-open", "size": 11, "color": look.CHOSEN, "line": {"width": 2}}
        name = f"pinned ({len(data.pinned)})"
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip"))
    rows = look.pick_ticks(roles, 60)
    names = [html.escape(data.grid.roles[i], quote=False) for i in rows]
    figure.update_xaxes(title="block", **_block_ticks(data.grid.blocks))
    figure.update_xaxes(range=[-0.5, blocks - 0.5], showgrid=False, zeroline=False)
    figure.update_yaxes(tickvals=rows, ticktext=names, range=[roles - 0.5, -0.5], showgrid=False, zeroline=False)
    slider = [_slider(data)] if len(data.maps) > 1 else []
    height = min(1500, 34 * roles if roles <= 20 else 14 * roles) + (205 if slider else 110)
    return _style(figure, height, sliders=slider, legend_itemclick=False, legend_itemdoubleclick=False)


def _slider(data: BitsData) -> dict[str, object]:
    """One step per configuration of the front; the labels under the ticks are hidden, the current one is on top."""
    steps = [
        {"method": "restyle", "label": one.label, "args": [{"z": [one.cells], "text": [_cell_text(data, one)]}, [0]]}
        for one in data.maps
    ]
    return {
        "active": data.shown,
        "steps": steps,
        "currentvalue": {"font": {"size": 13, "color": look.INK}, "xanchor": "left"},
        "font": {"size": 1, "color": "rgba(0,0,0,0)"},
        "ticklen": 5,
        "pad": {"t": 62, "b": 0},
    }


def sensitivity_figure(data: SensitivityData) -> go.Figure:
    """Chart 3: one row of bars per role over the blocks; all rows share both axes."""
    count = len(data.panels)
    figure = make_subplots(rows=count, cols=1, shared_xaxes=True, vertical_spacing=min(0.22 / count, 0.06))
    low, high = data.value_range()
    for row, (title, bars) in enumerate(data.panels, start=1):
        for pinned, color, name in ((False, look.BAR, "searched"), (True, look.CHOSEN, "pinned")):
            part = [bar for bar in bars if bar.pinned == pinned]
            texts = [_hover([bar.linear, f"{bar.value:.4g} {data.unit}" + " (pinned)" * pinned]) for bar in part]
            xs, ys = [bar.block for bar in part], [bar.value for bar in part]
            style = {"marker_color": color, "name": name, "showlegend": False, "width": 0.75}
            figure.add_trace(go.Bar(x=xs, y=ys, hovertext=texts, hoverinfo="text", **style), row=row, col=1)
        if data.threshold is not None:
            line = {"color": look.INK, "dash": "dot", "width": 1}
            figure.add_hline(y=data.threshold, line=line, row=row, col=1)
        where = {"x": 0, "y": 1, "xref": "x domain", "yref": "y domain", "xanchor": "left", "yanchor": "bottom"}
        text = {"text": f"<b>{html.escape(title, quote=False)}</b>", "showarrow": False, "font": {"size": 12}}
        figure.add_annotation(**where, **text, row=row, col=1)
    _sensitivity_legend(figure, data)
    axis = _log_axis(low, high) if data.log else {"range": [low, high], "nticks": 4}
    if data.log:
        decades = [t for t in look.log_ticks(low, high) if math.log10(t) == round(math.log10(t))]
        ticks = decades if len(decades) > 1 else look.log_ticks(low, high)
        axis |= {"tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
    figure.update_yaxes(**AXIS, **axis, tickfont={"size": 11})
    figure.update_xaxes(**{**AXIS, "showgrid": False, "range": [-0.6, len(data.blocks) - 0.4]})
    figure.update_xaxes(**_block_ticks(data.blocks))
    figure.update_xaxes(title="block", row=count, col=1)
    return _style(figure, 96 * count + 90, barmode="overlay")


def _sensitivity_legend(figure: go.Figure, data: SensitivityData) -> None:
    keys = [("searched", {"mode": "markers", "marker": {"symbol": "square", "size": 11, "color": look.BAR}})]
    if any(bar.pinned for _, bars in data.panels for bar in bars):
        keys.append(("pinned", {"mode": "markers", "marker": {"symbol": "square", "size": 11, "color": look.CHOSEN}}))
    if data.threshold is not None:
        line = {"color": look.INK, "dash": "dot", "width": 1.5}
        keys.append((f"pinning threshold {show_loss(data.threshold)}", {"mode": "lines", "line": line}))
    for name, style in keys if len(keys) > 1 else ():
        figure.add_trace(go.Scatter(x=[None], y=[None], name=name, hoverinfo="skip", **style), row=1, col=1)
    figure.update_layout(legend_itemclick=False, legend_itemdoubleclick=False)


def history_figure(data: HistoryData) -> go.Figure:
    """Chart 4, iterative solver: the surrogate's scores over the iterations."""
    count = len(data.panels)
    figure = make_subplots(rows=count, cols=1, shared_xaxes=True, vertical_spacing=0.3 / count)
    for row, (title, log, series) in enumerate(data.panels, start=1):
        for (label, pairs), color in zip(series.items(), look.SERIES, strict=False):
            xs, ys = zip(*pairs, strict=True)
            style = {"mode": "lines+markers", "line": {"color": color, "width": 1.8}, "marker": {"size": 4}}
            style |= {"showlegend": len(series) > 1, "hovertemplate": f"{label} %{{y:.4g}}<extra></extra>"}
            figure.add_trace(go.Scatter(x=xs, y=ys, name=label, **style), row=row, col=1)
        where = {"x": 0, "y": 1, "xref": "x domain", "yref": "y domain", "xanchor": "left", "yanchor": "bottom"}
        text = {"text": f"<b>{title}</b>", "showarrow": False, "font": {"size": 12}}
        figure.add_annotation(**where, **text, row=row, col=1)
        values = [y for pairs in series.values() for _, y in pairs]
        axis = _log_axis(min(values) * 0.8, max(values) * 1.25) if log else {"nticks": 5}
        figure.update_yaxes(**AXIS, **axis, row=row, col=1)
    figure.update_xaxes(**AXIS)
    figure.update_xaxes(title="iteration", row=count, col=1)
    return _style(figure, 150 * count + 80, hovermode="x")


def prediction_figure(data: PredictionData) -> go.Figure:
    """Chart 4, additive solver: true against predicted loss with the line where they agree."""
    every = [v for p in data.points for v in (p.bits, p.loss)]
    low, high = min(every) * 0.7, max(every) * 1.4
    line = {"color": look.CURVE, "dash": "dash", "width": 1.5}
    ends = [low, high]
    figure = go.Figure(go.Scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip"))
    marker = {"size": 9, "color": look.FRONT}
    figure.add_trace(_points(data.points, low, "front points", mode="markers", marker=marker))
    figure.update_xaxes(title="predicted loss, nats/token", **AXIS, **_log_axis(low, high))
    figure.update_yaxes(title="true loss, nats/token", **AXIS, **_log_axis(low, high))
    return _style(figure, 440, hovermode="closest")


def memory_figure(data: MemoryData) -> go.Figure:
    """Chart 5: one stacked bar now, one at 16 bits."""
    unit, size = ("GiB", 2**30) if max(data.total, data.total_16) >= 2**30 else ("MiB", 2**20)
    figure = go.Figure()
    for i, (name, now, full, _) in enumerate(data.items):
        bars = [now, full] if data.compared else [now]
        labels = [data.label, "16 bits"][: len(bars)]
        texts = [_hover([f"{name}: {show_bytes(value)}"]) for value in bars]
        style = {"orientation": "h", "marker_color": look.PARTS[i % len(look.PARTS)], "hoverinfo": "text"}
        values = [value / size for value in bars]
        legend = html.escape(name, quote=False)
        figure.add_trace(go.Bar(y=labels, x=values, name=legend, hovertext=texts, **style))
    for label, total in ((data.label, data.total), ("16 bits", data.total_16))[: 2 if data.compared else 1]:
        text = {"text": f" {show_bytes(total)}", "showarrow": False, "xanchor": "left", "font": {"size": 13}}
        figure.add_annotation(x=total / size, y=label, **text)
    longest = max(data.total, data.total_16 if data.compared else 0) / size
    figure.update_xaxes(title=unit, range=[0, longest * 1.28], **AXIS)
    figure.update_yaxes(autorange="reversed", **{**AXIS, "ticks": "", "showgrid": False})
    return _style(figure, 260 if data.compared else 200, barmode="stack", bargap=0.35, legend_traceorder="normal")
