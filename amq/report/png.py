"""The same charts as PNG files, with matplotlib's object interface (no pyplot, no display, no browser).

Every function turns a chart's data into a `Figure` with its title on it, so that the picture stands alone in a paper or
a chat; `save` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from amq.report import style as look
from amq.report.charts import (
    BitsData,
    FrontData,
    HistoryData,
    MemoryData,
    Point,
    PredictionData,
    SensitivityData,
)
from amq.report.data import show_bytes, show_loss
from amq.util.files import write_atomic

DPI = 150


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`, whole or not at all."""
    FigureCanvasAgg(figure)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI, facecolor="white"))


def _plain(text: str) -> str:
    """`text` with its dollar signs escaped: matplotlib would read a pair of them as mathematics."""
    return text.replace("$", r"\$")


def _style(axes: Axes) -> None:
    axes.grid(color=look.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(look.MUTED)
    axes.tick_params(colors=look.INK, labelsize=9)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(_plain(text), loc="left", fontsize=11, fontweight="bold", color=look.INK)


def _log(axes: Axes, which: str, low: float, high: float, ticks: Sequence[float] = ()) -> None:
    """A log axis with plain numbers ("0.05") as labels."""
    ticks = list(ticks) or look.log_ticks(low, high)
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    getattr(axes, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(axes, f"set_{which}lim")(low, high)


def _draw(axes: Axes, points: Sequence[Point], low: float, **style: object) -> None:
    axes.plot([p.bits for p in points], [max(p.loss, low) for p in points], **style)


def front_figure(data: FrontData, model: str) -> Figure:
    """Chart 1: loss against bits per weight, log y."""
    low, high = data.loss_range()
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    size, alpha = (3, 0.5) if data.crowded else (5, 0.8)
    for phase, points in data.candidates.items():
        style = {"color": look.PHASES.get(phase, look.OTHER_PHASE), "label": _plain(f"{phase} ({len(points):,})")}
        _draw(axes, points, low, linestyle="", marker="o", markersize=size, alpha=alpha, markeredgewidth=0, **style)
    xs = [bits for bits, _ in data.curve]
    if data.band:
        axes.fill_between(xs, *([max(v, low) for v in edge] for edge in data.band), color=look.CURVE, alpha=0.18, lw=0)
    if data.curve:
        axes.plot(xs, [max(v, low) for _, v in data.curve], "--", color=look.CURVE, linewidth=1.3, label="predicted")
    _draw_confirm(axes, data, low)
    if data.front:
        style = {"color": look.FRONT, "marker": "o", "markersize": 4.5, "linewidth": 1.8}
        _draw(axes, data.front, low, label="Pareto front", **style)
    if data.uniform:
        _draw(axes, data.uniform, low, linestyle="", marker="D", markersize=6, color=look.UNIFORM, label="uniform")
        for p in data.uniform:
            place = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 9, "color": look.INK}
            axes.annotate(_plain(p.name), (p.bits, max(p.loss, low)), **place)
    if data.chosen:
        star = {"marker": "*", "markersize": 15, "color": look.CHOSEN, "markeredgecolor": "white", "linestyle": ""}
        _draw(axes, [data.chosen], low, label=_plain(data.chosen.name), zorder=5, **star)
    if data.ceiling and high > data.ceiling:
        axes.axhline(data.ceiling, color=look.FAINT, linestyle=":", linewidth=1.2, zorder=0)
        where = {"xycoords": ("axes fraction", "data"), "xytext": (-4, -3), "textcoords": "offset points"}
        text = {"ha": "right", "va": "top", "fontsize": 8, "color": look.MUTED}
        axes.annotate("ln 2: the largest possible", (1, data.ceiling), **where, **text)
    _log(axes, "y", low, high)
    axes.set_xlim(data.bits_range())
    axes.set_xlabel("bits per weight, scales and zero points included")
    axes.set_ylabel(f"{data.loss_name}, nats/token")
    _title(axes, f"{model}: loss against bits per weight")
    axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), alignment="left")
    return figure


def _draw_confirm(axes: Axes, data: FrontData, low: float) -> None:
    """Losses on the confirmation windows: an open circle, tied to the point by a thin line."""
    points = [p for p in [*data.front, *data.uniform, *([data.chosen] if data.chosen else [])] if p.confirm is not None]
    if not points:
        return
    for p in points:
        axes.plot([p.bits, p.bits], [max(p.loss, low), max(p.confirm or 0, low)], color=look.MUTED, linewidth=0.8)
    style = {"linestyle": "", "marker": "o", "markersize": 4.5, "markerfacecolor": "none", "color": look.MUTED}
    heights = [max(p.confirm or 0, low) for p in points]
    axes.plot([p.bits for p in points], heights, label="on the confirmation windows", **style)


def bits_figure(data: BitsData, model: str) -> Figure:
    """Chart 2: role × block, one colour per format, with the bits in each cell where they fit."""
    roles, blocks = len(data.grid.roles), len(data.grid.blocks)
    shown, palette = data.maps[data.shown], look.format_colors(len(data.formats))
    tall = 0.3 if roles <= 20 else 0.14
    figure = Figure(figsize=(min(16, max(6.5, 2 + 0.27 * blocks)), min(24, 1.5 + tall * roles)), layout="constrained")
    axes = figure.add_subplot()
    cells = [[float("nan") if cell is None else float(cell) for cell in row] for row in shown.cells]
    norm = BoundaryNorm([i - 0.5 for i in range(len(palette) + 1)], max(len(palette), 1))
    axes.pcolormesh(cells, cmap=ListedColormap(palette), norm=norm, edgecolors="white", linewidth=0.8)
    if blocks <= 48 and roles <= 40:
        for r, row in enumerate(shown.cells):
            for b, cell in enumerate(row):
                if cell is not None:
                    style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": look.text_on(palette[cell])}
                    axes.text(b + 0.5, r + 0.5, _plain(data.labels[cell]), **style)
    for role, block in data.pinned:
        axes.add_patch(Rectangle((block, role), 1, 1, fill=False, edgecolor=look.CHOSEN, linewidth=1.8, zorder=3))
    rows, columns = look.pick_ticks(roles, 60), look.pick_ticks(blocks, 40)
    names = [_plain(data.grid.roles[i]) for i in rows]
    axes.set_yticks([i + 0.5 for i in rows], names, fontsize=9 if roles <= 20 else 6)
    axes.set_xticks([i + 0.5 for i in columns], [data.grid.blocks[i] for i in columns], fontsize=8)
    axes.set_ylim(roles, 0)
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _title(axes, f"{model}: {shown.label}")
    keys: list[Patch] = []
    for name, color, count in zip(data.formats, palette, shown.counts, strict=True):
        keys.append(Patch(facecolor=color, edgecolor=look.MUTED, label=_plain(f"{name} ({count})")))
    if data.pinned:
        keys.append(Patch(facecolor="none", edgecolor=look.CHOSEN, linewidth=1.8, label=f"pinned ({len(data.pinned)})"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9, frameon=False)
    return figure


def sensitivity_figure(data: SensitivityData, model: str) -> Figure:
    """Chart 3: one row of bars per role over the blocks; all rows share both axes."""
    count = len(data.panels)
    figure = Figure(figsize=(9, 1.3 + 1.0 * count), layout="constrained")
    low, high = data.value_range()
    panels = figure.subplots(count, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    decades = [t for t in look.log_ticks(low, high) if f"{t:e}".startswith("1.000000")] if data.log else []
    for axes, (title, bars) in zip(panels, data.panels, strict=True):
        _style(axes)
        axes.grid(visible=False, axis="x")
        for pinned, color in ((False, look.BAR), (True, look.CHOSEN)):
            part = [bar for bar in bars if bar.pinned == pinned]
            heights = [bar.value - low if data.log else bar.value for bar in part]
            axes.bar([bar.block for bar in part], heights, bottom=low if data.log else 0, color=color, width=0.75)
        if data.threshold is not None:
            axes.axhline(data.threshold, color=look.INK, linestyle=":", linewidth=1)
        axes.set_title(_plain(title), loc="left", fontsize=9, fontweight="bold", pad=2)
        if data.log:
            _log(axes, "y", low, high, decades if len(decades) > 1 else ())
        else:
            axes.set_ylim(low, high)
            axes.locator_params(axis="y", nbins=3)
    ticks = look.pick_ticks(len(data.blocks), 40)
    panels[-1].set_xticks(ticks, [data.blocks[i] for i in ticks], fontsize=8)
    panels[-1].set_xlim(-0.7, len(data.blocks) - 0.3)
    panels[-1].set_xlabel("block")
    figure.supylabel(_plain(data.unit), fontsize=10)
    figure.suptitle(_plain(f"{model}: {data.title}"), fontsize=11, fontweight="bold", x=0.01, ha="left")
    keys: list[Patch | Line2D] = [Patch(color=look.BAR, label="searched")]
    if any(bar.pinned for _, bars in data.panels for bar in bars):
        keys.append(Patch(color=look.CHOSEN, label="pinned"))
    if data.threshold is not None:
        name = f"pinning threshold {show_loss(data.threshold)}"
        keys.append(Line2D([], [], color=look.INK, linestyle=":", label=name))
    if len(keys) > 1:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9, frameon=False)
    return figure


def history_figure(data: HistoryData, model: str) -> Figure:
    """Chart 4, iterative solver: the surrogate's scores over the iterations."""
    count = len(data.panels)
    figure = Figure(figsize=(9, 1.0 + 1.8 * count), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, log, series) in zip(panels, data.panels, strict=True):
        _style(axes)
        for (label, pairs), color in zip(series.items(), look.SERIES, strict=False):
            axes.plot(*zip(*pairs, strict=True), color=color, marker="o", markersize=3, linewidth=1.6, label=label)
        if log:
            values = [y for pairs in series.values() for _, y in pairs]
            _log(axes, "y", min(values) * 0.8, max(values) * 1.25)
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold", pad=3)
        if len(series) > 1:
            axes.legend(fontsize=8.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[-1].set_xlabel("iteration")
    figure.suptitle(_plain(f"{model}: {data.title}"), fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def prediction_figure(data: PredictionData, model: str) -> Figure:
    """Chart 4, additive solver: true against predicted loss with the line where they agree."""
    every = [v for p in data.points for v in (p.bits, p.loss)]
    low, high = min(every) * 0.7, max(every) * 1.4
    figure = Figure(figsize=(6.8, 5.6), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    axes.plot([low, high], [low, high], "--", color=look.CURVE, linewidth=1.3, label="equal")
    _draw(axes, data.points, low, linestyle="", marker="o", markersize=6, color=look.FRONT, label="front points")
    _log(axes, "x", low, high)
    _log(axes, "y", low, high)
    axes.set_xlabel("predicted loss, nats/token")
    axes.set_ylabel("true loss, nats/token")
    axes.legend(fontsize=9, frameon=False, loc="upper left")
    _title(axes, f"{model}\n{data.title}")
    return figure


def memory_figure(data: MemoryData, model: str) -> Figure:
    """Chart 5: one stacked bar now, one at 16 bits."""
    totals = [data.total, data.total_16] if data.compared else [data.total]
    unit, size = ("GiB", 2**30) if max(totals) >= 2**30 else ("MiB", 2**20)
    rows = [data.label, "16 bits"][: len(totals)]
    figure = Figure(figsize=(9, 1.9 + 0.55 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    axes.grid(visible=False, axis="y")
    lefts = [0.0] * len(rows)
    for i, (name, now, full, _) in enumerate(data.items):
        values = [value / size for value in (now, full)][: len(rows)]
        axes.barh(rows, values, left=lefts, color=look.PARTS[i % len(look.PARTS)], label=_plain(name), height=0.6)
        lefts = [left + value for left, value in zip(lefts, values, strict=True)]
    for row, total in zip(rows, totals, strict=True):
        axes.annotate(show_bytes(total), (total / size, row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(totals) / size * 1.13)
    axes.set_xlabel(unit)
    axes.invert_yaxis()
    _title(axes, f"{model}: memory")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    return figure
