"""The numbers behind each chart, worked out once for both renderers (report_plotly.py, report_png.py).

Every function takes a `Run` and returns either the chart's data or an `Omitted` with the reason in one line, which the
HTML prints in the chart's place. Losses are nats/token; bits are bits per weight, scales and zero points included.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from amq.report.data import (
    Grid,
    Run,
    child,
    format_label,
    make_grid,
    number,
    show_bits,
    show_loss,
    sort_formats,
)

LOSS_NAMES = {"jsd": "Jensen–Shannon divergence", "kl": "Kullback–Leibler divergence", "ce": "cross-entropy"}
COST_NAMES = {"fisher": "Fisher cost", "sensitivity": "Sensitivity cost", "weight": "Weight error"}
LOG_ABOVE = 15
"""Sensitivities whose maximum exceeds this many medians get a log axis, else one bar hides all others."""
MAX_PANELS = 14
"""More roles than this (experts, one role each) are merged: one panel per role name with its numbers blanked."""


@dataclass(frozen=True)
class Omitted:
    """A chart that cannot be drawn, and why."""

    reason: str


@dataclass(frozen=True)
class Point:
    """One configuration on the front chart; `lines` is its hover text, one entry per line."""

    bits: float
    loss: float
    confirm: float | None = None
    name: str = ""
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrontData:
    """Chart 1. `candidates` maps a phase to its points; `curve` is the predicted loss, `band` its (low, high)."""

    loss_name: str
    candidates: dict[str, list[Point]]
    front: list[Point]
    uniform: list[Point]
    chosen: Point | None
    curve: list[tuple[float, float]]
    band: tuple[list[float], list[float]] | None
    ceiling: float | None
    notes: tuple[str, ...]

    @property
    def crowded(self) -> bool:
        """Whether the candidates are so many that they need small, faint markers."""
        return sum(map(len, self.candidates.values())) > 1000

    @property
    def points(self) -> list[Point]:
        """Everything that the axes have to hold."""
        points = [*self.front, *self.uniform, *(p for group in self.candidates.values() for p in group)]
        return points + ([self.chosen] if self.chosen else [])

    def bits_range(self) -> tuple[float, float]:
        """Limits of the x axis, with room on the right for the label of the last uniform configuration."""
        low, high = min(p.bits for p in self.points), max(p.bits for p in self.points)
        room = (high - low) or 1.0
        return low - 0.05 * room, high + 0.11 * room

    def loss_range(self) -> tuple[float, float]:
        """Limits of the log y axis. Losses that are zero or negative (identical outputs) sit on the lower limit."""
        losses = [p.loss for p in self.points] + [p.confirm for p in self.points if p.confirm is not None]
        positive = [loss for loss in losses if loss > 0]
        if not positive:
            return 1e-6, 1.0
        low, high = min(positive) * 0.7, max(positive) * 1.4
        return low, max(high, self.ceiling * 1.15) if self.ceiling and high > self.ceiling / 3 else high


@dataclass(frozen=True)
class BitsMap:
    """One configuration on the map: `cells[role][block]` is an index into `BitsData.formats`, or None."""

    label: str
    cells: list[list[int | None]]
    counts: list[int]


@dataclass(frozen=True)
class BitsData:
    """Chart 2. `maps[shown]` is drawn first; `names[role][block]` is the linear there."""

    grid: Grid
    formats: list[str]
    labels: list[str]
    maps: list[BitsMap]
    shown: int
    names: list[list[str]]
    pinned: list[tuple[int, int]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """One linear of the sensitivity chart."""

    block: int
    value: float
    linear: str
    pinned: bool


@dataclass(frozen=True)
class SensitivityData:
    """Chart 3: one panel of bars per role over the blocks; `threshold` is the pinning line."""

    title: str
    unit: str
    blocks: list[str]
    panels: list[tuple[str, list[Bar]]]
    threshold: float | None
    log: bool
    notes: tuple[str, ...]

    def value_range(self) -> tuple[float, float]:
        """Limits of the y axis that all panels share."""
        values = [bar.value for _, bars in self.panels for bar in bars]
        high = max([*values, self.threshold or 0])
        if self.log:
            return min(v for v in values if v > 0) * 0.6, high * 1.6
        return min(0.0, *values), high * 1.08 or 1.0


@dataclass(frozen=True)
class HistoryData:
    """Chart 4 of the iterative solver: per panel (title, log axis, {series: [(iteration, value)]})."""

    panels: list[tuple[str, bool, dict[str, list[tuple[float, float]]]]]
    title: str


@dataclass(frozen=True)
class PredictionData:
    """Chart 4 of the additive solver: predicted (x) against true (y) loss of the front's points."""

    points: list[Point]
    title: str
    scores: str


@dataclass(frozen=True)
class MemoryData:
    """Chart 5: (item, bytes now, bytes at 16 bits, note); `label` names the first bar.

    `compared` is False where run.json lists no shapes, so that the 16-bit size is unknown.
    """

    items: list[tuple[str, float, float, str]]
    label: str
    compared: bool

    @property
    def total(self) -> float:
        return sum(item[1] for item in self.items)

    @property
    def total_16(self) -> float:
        return sum(item[2] for item in self.items)


def front_data(run: Run) -> FrontData | Omitted:
    """Every evaluated candidate, the front, the uniform configurations and the chosen one."""
    grid = make_grid(run)
    candidates: dict[str, list[Point]] = {}
    infeasible = 0
    for line in run.archive:
        if line.windows == "confirm" or line.bits is None:
            continue
        if line.loss is None:
            infeasible += 1
        elif line.phase != "uniform" or not (run.front or {}).get("uniform"):
            text = f"{line.phase} #{line.index}: {show_bits(line.bits)} bits, loss {show_loss(line.loss)}"
            candidates.setdefault(line.phase, []).append(Point(line.bits, line.loss, lines=(text, line.counts)))
    front = [_front_point(row, grid) for row in (run.front or {}).get("front") or []]
    uniform = [_front_point(row, grid) for row in (run.front or {}).get("uniform") or []]
    if not candidates and not any(front) and not any(uniform):
        return Omitted("no evaluated configuration has a loss (archive.jsonl and front.json are absent or empty)")
    curve = (run.front or {}).get("curve") or []
    curve_rows = [(number(row.get("bits_per_weight")), number(row.get("loss"))) for row in curve]
    notes = [] if run.front else ["The run has no front.json, so only the evaluated candidates are drawn."]
    if infeasible:
        notes.append(f"{infeasible} infeasible candidate{'s' * (infeasible > 1)} (loss NaN or infinite) not drawn.")
    loss_key = str(run.settings.get("loss") or "jsd")
    return FrontData(
        loss_name=LOSS_NAMES.get(loss_key, loss_key),
        candidates=candidates,
        front=sorted((p for p in front if p), key=lambda p: p.bits),
        uniform=[p for p in uniform if p],
        chosen=_chosen_point(run, grid),
        curve=[(b, v) for b, v in curve_rows if b is not None and v is not None],
        band=_band(run, curve_rows),
        ceiling=math.log(2) if loss_key == "jsd" else None,
        notes=tuple(notes),
    )


def _front_point(row: dict[str, Any], grid: Grid) -> Point | None:
    bits, loss = number(row.get("bits_per_weight")), number(row.get("loss"))
    if bits is None or loss is None:
        return None
    confirm, predicted = number(row.get("loss_confirm")), number(row.get("predicted"))
    name = str(row.get("name") or "")
    first = f"{name + ': ' if name else ''}{show_bits(bits)} bits, loss {show_loss(loss)}"
    more = [f"{label} {show_loss(v)}" for label, v in (("confirm", confirm), ("predicted", predicted)) if v is not None]
    configuration = row.get("configuration") or {}
    lines = (first, *([", ".join(more)] if more else []), *(grid.lines(configuration) if configuration else []))
    return Point(bits, loss, confirm, name, lines)


def _chosen_point(run: Run, grid: Grid) -> Point | None:
    """The chosen configuration; where its loss was not measured, its predicted loss, and the text says so."""
    chosen = run.configuration or {}
    bits, loss = number(chosen.get("bits_per_weight")), number(chosen.get("loss"))
    word = "loss"
    if loss is None:
        loss, word = number(chosen.get("predicted_loss")), "predicted loss"
    if bits is None or loss is None:
        return None
    name = f"chosen: {show_bits(bits)} bits, {word} {show_loss(loss)}"
    confirm = number(chosen.get("loss_confirm"))
    lines = [name] + ([f"confirm {show_loss(confirm)}"] if confirm is not None else [])
    return Point(bits, loss, confirm, name, (*lines, *grid.lines(chosen.get("formats") or {})))


def _band(run: Run, curve: list[tuple[float | None, float | None]]) -> tuple[list[float], list[float]] | None:
    """The curve's band, where it has one finite pair per point of the curve."""
    band = child(run.front, "band")
    low, high = ([number(v) for v in band.get(key) or []] for key in ("low", "high"))
    whole = bool(curve) and len(low) == len(high) == len(curve) and None not in [*low, *high, *sum(curve, ())]
    return ([v for v in low if v is not None], [v for v in high if v is not None]) if whole else None


def bits_data(run: Run) -> BitsData | Omitted:
    """The chosen configuration by role and block, and every other one on the front."""
    grid = make_grid(run)
    if not grid.cells:
        return Omitted("run.json lists no linears")
    chosen = child(run.configuration, "formats")
    rows = [row for row in (run.front or {}).get("front") or [] if row.get("configuration")]
    rows.sort(key=lambda row: number(row.get("bits_per_weight")) or 0)
    configurations = [(_label(row), row["configuration"]) for row in rows]
    shown = next((i for i, (_, c) in enumerate(configurations) if c == chosen), None)
    notes: tuple[str, ...] = ()
    if chosen and shown is None:
        bits = number((run.configuration or {}).get("bits_per_weight")) or 0
        shown = sum((number(row.get("bits_per_weight")) or 0) < bits for row in rows)
        configurations.insert(shown, (_label(run.configuration or {}), chosen))
    elif not configurations:
        return Omitted("no configuration in this run (configuration.json and front.json are absent or empty)")
    elif not chosen:
        shown = len(configurations) // 2
        notes = ("The run has no configuration.json, so nothing is marked as chosen.",)
    if chosen and shown is not None:
        configurations[shown] = (configurations[shown][0] + " (chosen)", chosen)
    offered = run.settings.get("formats")
    offered = [part.strip() for part in offered.split(",")] if isinstance(offered, str) else offered or []
    formats = sort_formats([*offered, *(name for _, c in configurations for name in c.values())])
    names = [[""] * len(grid.blocks) for _ in grid.roles]
    for linear, (role, block) in grid.cells.items():
        names[role][block] = linear
    return BitsData(
        grid=grid,
        formats=formats,
        labels=[format_label(name) for name in formats],
        maps=[_bits_map(label, c, grid, formats) for label, c in configurations],
        shown=shown or 0,
        names=names,
        pinned=sorted(grid.cells[linear] for linear in run.pinned if linear in grid.cells),
        notes=notes,
    )


def _label(row: dict[str, Any]) -> str:
    return f"{show_bits(number(row.get('bits_per_weight')))} bits per weight, loss {show_loss(number(row.get('loss')))}"


def _bits_map(label: str, configuration: dict[str, str], grid: Grid, formats: list[str]) -> BitsMap:
    cells: list[list[int | None]] = [[None] * len(grid.blocks) for _ in grid.roles]
    counts = [0] * len(formats)
    for linear, name in configuration.items():
        if linear in grid.cells:
            role, block = grid.cells[linear]
            cells[role][block] = formats.index(name)
            counts[formats.index(name)] += 1
    return BitsMap(label, cells, counts)


def sensitivity_data(run: Run) -> SensitivityData | Omitted:
    """Measured sensitivities, or where the run has none the solver's cost at the lowest format."""
    notes: tuple[str, ...] = ()
    threshold = None
    if run.sensitivity and run.sensitivity.get("loss"):
        values = {linear: number(loss) for linear, loss in run.sensitivity["loss"].items()}
        median, factor = number(run.sensitivity.get("median")), number(run.sensitivity.get("threshold"))
        threshold = None if median is None or factor is None else median * factor
        lowest, highest = run.sensitivity.get("lowest"), run.sensitivity.get("highest")
        title, unit = f"Sensitivity: one linear at {lowest}, all others at {highest}", "nats/token"
        base = number(run.sensitivity.get("base_loss"))
        notes = () if base is None else (f"With every linear at {highest} the loss is {show_loss(base)}.",)
    elif run.cost and run.cost.get("cost"):
        costs = run.cost["cost"]
        lowest = sort_formats(name for row in costs.values() for name in row)[0]
        values = {linear: number(row.get(lowest)) for linear, row in costs.items()}
        kind = str(run.cost.get("kind") or "cost")
        title, unit = f"{COST_NAMES.get(kind, kind)} at {lowest}", str(run.cost.get("unit") or "")
        notes = ("No sensitivity was measured in this run; these are the costs that the solver used.",)
    else:
        return Omitted("no sensitivity.json and no cost.json in this run")
    grid = make_grid(run)
    finite = {k: v for k, v in values.items() if v is not None and k in grid.cells}
    if not finite:
        return Omitted("every sensitivity in this run is null")
    middle = statistics.median(finite.values())
    pinned = {k for k in run.pinned if k in finite}
    missing = len(values) - len(finite)
    if missing:
        notes += (f"{missing} linear{'s' * (missing > 1)} without a value left out.",)
    return SensitivityData(
        title=title,
        unit=unit,
        blocks=grid.blocks,
        panels=_panels(grid, finite, pinned),
        threshold=threshold,
        log=min(finite.values()) > 0 and max(finite.values()) > LOG_ABOVE * middle,
        notes=notes,
    )


def _panels(grid: Grid, values: dict[str, float], pinned: set[str]) -> list[tuple[str, list[Bar]]]:
    """Bars per role; with very many roles, roles that differ only in a number share a panel, worst linear first."""
    titles = grid.roles
    if len(titles) > MAX_PANELS:
        titles = [".".join("*" if part.isdigit() else part for part in role.split(".")) for role in titles]
    panels: dict[str, dict[int, Bar]] = {title: {} for title in titles}
    for linear, value in values.items():
        role, block = grid.cells[linear]
        bar = Bar(block, value, linear, linear in pinned)
        panel = panels[titles[role]]
        if block not in panel or panel[block].value < value:
            panel[block] = bar
    return [(title, [bars[block] for block in sorted(bars)]) for title, bars in panels.items() if bars]


def surrogate_data(run: Run) -> HistoryData | PredictionData | Omitted:
    """The surrogate's scores by iteration, or predicted against true loss where there is no surrogate."""
    if run.surrogate:
        return _history(run.surrogate)
    points = []
    for row in (run.front or {}).get("front") or []:
        loss, predicted = number(row.get("loss")), number(row.get("predicted"))
        if loss is not None and predicted is not None and loss > 0 and predicted > 0:
            text = f"{show_bits(number(row.get('bits_per_weight')))} bits"
            lines = (text, f"predicted {show_loss(predicted)}", f"true {show_loss(loss)}")
            points.append(Point(predicted, loss, name=text, lines=lines))
    if len(points) < 2:
        solver = run.settings.get("solver") or "this"
        return Omitted(f"no surrogate.json ({solver} solver), and fewer than two front points have a predicted loss")
    fit = child(run.front, "fit")
    spearman, rmse, kendall, over = (number(fit.get(key)) for key in ("spearman", "rmse", "kendall", "points"))
    parts = [] if spearman is None else [f"Spearman {spearman:.3f}"]
    parts += [] if rmse is None else [f"RMSE {rmse:.2g} nats/token"]
    scores = "" if over is None else f"Scores are over the {over:.0f} evaluations that the prediction was fitted to"
    scores += f" (Kendall {kendall:.3f})." if scores and kendall is not None else "." if scores else ""
    return PredictionData(points, "Predicted and true loss" + (": " + ", ".join(parts) if parts else ""), scores)


def _history(rows: list[dict[str, Any]]) -> HistoryData | Omitted:
    kinds = (
        ("rank correlation", False, (("Spearman", "spearman"), ("Kendall", "kendall"))),
        ("RMSE, nats/token", True, (("RMSE", "rmse"),)),
        ("hypervolume", False, (("hypervolume", "hypervolume"),)),
        ("best loss at the budget", False, (("best loss", "best_loss_at_budget"),)),
    )
    panels = []
    for title, log, keys in kinds:
        series = {label: _series(rows, key) for label, key in keys}
        series = {label: values for label, values in series.items() if values}
        if series:
            panels.append((title, log and all(v > 0 for s in series.values() for _, v in s), series))
    if not panels:
        return Omitted("surrogate.json holds no score")
    last = rows[-1]
    counted = f", {last['evaluations']:,} evaluations" if last.get("evaluations") else ""
    return HistoryData(panels, f"Surrogate {last.get('surrogate') or ''} over {len(rows)} iterations{counted}")


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = ((number(row.get("iteration")), number(row.get(key))) for row in rows)
    return [(float(i) if x is None else x, y) for i, (x, y) in enumerate(pairs) if y is not None]


def memory_data(run: Run) -> MemoryData | Omitted:
    """Each part of the model's memory, now and with all weights at 16 bits."""
    rows = child(run.configuration, "memory").get("items") or []
    rows = [(str(r.get("name")), number(r.get("bytes")) or 0.0, str(r.get("note") or "")) for r in rows]
    if not any(size for _, size, _ in rows):
        return Omitted("configuration.json is absent or has no memory breakdown")
    numel = sum(int(s.get("out_features") or 0) * int(s.get("in_features") or 0) for s in run.linears)
    kept = sum(size for name, size, _ in rows if not name.startswith(("linears", "KV cache")))
    full = 2 * ((number(child(run.run, "model").get("parameters")) or 0) - numel)
    items, placed = [], False
    for name, size, note in rows:
        if not name.startswith("linears"):
            items.append((name, size, size, note))
        else:
            items.append((name, size, 0.0 if placed else 2.0 * numel, note))
            placed = True
    if full > 0 and kept and full > 1.02 * kept:  # parts outside the linears are compressed too
        items.append(("outside the linears: saved against 16 bits", 0.0, full - kept, ""))
    bits = number((run.configuration or {}).get("bits_per_weight"))
    return MemoryData([item for item in items if item[1] or item[2]], f"{show_bits(bits)} bits", numel > 0)
