"""The report of a search: one HTML file that works offline, and the same charts as PNG files.

    write_report(run_dir) -> [report.html, front.png, bits.png, sensitivity.png, surrogate.png, memory.png]

`report_data` reads the run folder, `report_charts` works out each chart's numbers, `report_plotly` and `report_png`
draw them, `report_page` writes the text around them. A chart whose data the run lacks is omitted: its place in the HTML
says why, and no PNG of an earlier report stays behind. Plotly's JavaScript is written into the HTML once; nothing is
loaded from elsewhere. Plotly and matplotlib load when a report is written, not when this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amq.report.charts import (
    BitsData,
    FrontData,
    HistoryData,
    MemoryData,
    Omitted,
    PredictionData,
    SensitivityData,
    bits_data,
    front_data,
    memory_data,
    sensitivity_data,
    surrogate_data,
)
from amq.report.data import Run, load_run, show_bytes
from amq.report.page import Section, memory_table, page
from amq.util.extras import needs
from amq.util.files import write_atomic

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Chart:
    """A chart's name (also its PNG's), heading and data; `renderer` is the function in both drawing modules."""

    name: str
    heading: str
    data: Any
    renderer: str
    caption: str = ""
    table: str = ""


def write_report(run_dir: Path) -> list[Path]:
    """Write report.html and the charts' PNG files into `run_dir`; returns their paths, report.html first."""
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    plotly_charts, png_charts, plotly_js = _renderers()
    sections, written = [], [run_dir / "report.html"]
    for chart in _charts(run):
        png = run_dir / f"{chart.name}.png"
        if isinstance(chart.data, Omitted):
            png.unlink(missing_ok=True)
            sections.append(Section(chart.name, chart.heading, reason=chart.data.reason))
            continue
        figure = getattr(plotly_charts, chart.renderer)(chart.data)
        sections.append(Section(chart.name, chart.heading, _embed(figure, chart.name), chart.caption, chart.table))
        png_charts.save(getattr(png_charts, chart.renderer)(chart.data, run.model), png)
        written.append(png)
    text = page(run, sections, plotly_js())
    write_atomic(written[0], lambda temporary: temporary.write_bytes(text.encode()))
    return written


def _renderers() -> tuple[Any, Any, Callable[[], str]]:
    with needs("report", "the report"):
        from plotly.offline import get_plotlyjs

        from amq.report import plotly as report_plotly
        from amq.report import png as report_png
    return report_plotly, report_png, get_plotlyjs


def _charts(run: Run) -> list[Chart]:
    """The five charts in the order of the page."""
    front, bits, sensitivity = front_data(run), bits_data(run), sensitivity_data(run)
    surrogate, memory = surrogate_data(run), memory_data(run)
    history = isinstance(surrogate, HistoryData)
    return [
        Chart("front", "Loss against bits per weight", front, "front_figure", _front_caption(front)),
        Chart("bits", "Which linear holds how many bits", bits, "bits_figure", _bits_caption(bits)),
        Chart(
            "sensitivity",
            sensitivity.title if isinstance(sensitivity, SensitivityData) else "Sensitivity",
            sensitivity,
            "sensitivity_figure",
            _sensitivity_caption(sensitivity),
        ),
        Chart(
            "surrogate",
            "Surrogate" if isinstance(surrogate, Omitted) else surrogate.title,
            surrogate,
            "history_figure" if history else "prediction_figure",
            _surrogate_caption(surrogate),
        ),
        Chart(
            "memory",
            "Memory",
            memory,
            "memory_figure",
            _memory_caption(memory),
            memory_table(memory) if isinstance(memory, MemoryData) else "",
        ),
    ]


def _front_caption(data: FrontData | Omitted) -> str:
    if isinstance(data, Omitted):
        return ""
    parts = ["Lower and further left is better; hover over a point to see its configuration."]
    parts.append("Drag to zoom, double-click to go back. Bits include scales and zero points.")
    if data.ceiling:
        parts.append("The loss cannot exceed ln 2 = 0.693, where the two models share no likely token.")
    return " ".join([*parts, *data.notes])


def _bits_caption(data: BitsData | Omitted) -> str:
    if isinstance(data, Omitted):
        return ""
    parts = ["Darker is more bits."]
    if len(data.maps) > 1:
        parts.append("Move the slider to see the other configurations of the front.")
    return " ".join([*parts, *data.notes])


def _sensitivity_caption(data: SensitivityData | Omitted) -> str:
    if isinstance(data, Omitted):
        return ""
    scale = " The axis is logarithmic." if data.log else ""
    return f"Unit: {data.unit}." * bool(data.unit) + scale + "".join(f" {note}" for note in data.notes)


def _surrogate_caption(data: HistoryData | PredictionData | Omitted) -> str:
    if isinstance(data, HistoryData):
        return "The surrogate's scores, and how far the front had come, at each iteration."
    if isinstance(data, PredictionData):
        return f"{data.scores} One point per front configuration; on the dashed line prediction and evaluation agree."
    return ""


def _memory_caption(data: MemoryData | Omitted) -> str:
    if isinstance(data, Omitted) or not data.compared or not data.total_16:
        return ""
    share = 100 * data.total / data.total_16
    full = show_bytes(data.total_16)
    return f"{show_bytes(data.total)} instead of {full} with all weights at 16 bits: {share:.0f} %."


def _embed(figure: go.Figure, name: str) -> str:
    """The figure's `<div>` and its script, without plotly's own JavaScript."""
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=f"chart-{name}",
        config={"responsive": True, "displayModeBar": False},
    )
