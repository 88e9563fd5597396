"""What the pages of reports have in common: colours, themes, charts as PNG, and how a page and its files are written.

    write_page(folder, TEMPLATE, charts, subtitle, known, values) -> [report.html, NAME.png, …]

A template extends `base.html.jinja` (the frame, the style, the script that draws) and imports `parts.html.jinja` (a
figure, a table). Colours that have to stand on a white and on a dark page are chosen for both; what cannot (text, grid)
is in `theme`. Widths are the container's, so that a page fits a telephone. A page carries Vega's JavaScript, and loads
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert

from amq.util.files import write_atomic

RAMP = ("#f2de7e", "#a6d49f", "#55b7ad", "#2f8fc0", "#4569bd", "#6a3f9e")
"""Few bits to many. Steps differ in lightness, and so stay apart for colour-blind readers and in print."""
GREY, BLUE, GREEN, MAGENTA, ORANGE = "#8b98a5", "#3280c8", "#0f9d76", "#c2569a", "#e8710a"
PARTS = (BLUE, "#8fc1ea", GREEN, "#d9b945", MAGENTA, ORANGE, GREY)
COLORS = {"light": ("#1c2430", "#55626f", "#dfe4e9"), "dark": ("#e8edf2", "#a3b0bd", "#38424d")}
"""Of text, labels and grid."""
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
GLOBALS = "window.vegaEmbed = vegaEmbed"
"""What a page's script needs of Vega's bundle."""
PNG_WIDTH, PNG_SCALE = 760, 1.5


@dataclass(frozen=True)
class Missing:
    """A chart that cannot be drawn, and why."""

    reason: str


Chart = alt.LayerChart | Missing


def theme(ink: str, muted: str, line: str, columns: int) -> dict[str, Any]:
    """A Vega-Lite configuration: colours of text, labels and grid; columns: legend entries beside each other."""
    labels = {"labelColor": muted, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500}
    lines = {"gridColor": line, "domainColor": line, "tickColor": line, "labelOverlap": "greedy", "labelSeparation": 4}
    legend = {"orient": "bottom", "columns": columns, "labelLimit": 75 * columns, "symbolStrokeWidth": 0}
    return {
        "background": "transparent",
        "font": "system-ui, 'Liberation Sans', 'DejaVu Sans', sans-serif",
        "numberFormat": ".4~g",
        "axis": {**labels, **lines},
        "legend": {**labels, **legend},
        "title": {"color": ink, "subtitleColor": muted, "anchor": "start", "fontSize": 13, "subtitleFontSize": 12},
        "view": {"stroke": None},
        "text": {"color": ink, "fontSize": 12},
    }


THEMES = {name: {"wide": theme(*colors, 5), "narrow": theme(*colors, 2)} for name, colors in COLORS.items()}


def table(rows: Iterable[dict[str, Any]]) -> alt.Chart:
    """A chart without marks yet, of these rows."""
    return alt.Chart(alt.Data(values=list(rows)))


def finish(layers: list[alt.Chart], title: Any, description: str, height: int = 300) -> alt.LayerChart:
    """The layers as one chart. description: for who cannot see it."""
    size = alt.AutoSizeParams(type="fit-x", contains="padding")
    more: dict[str, Any] = {"autosize": size, "title": alt.Title(title), "description": description}
    return alt.LayerChart(layer=layers, width="container", height=height, **more)


def log_scale(values: Iterable[float]) -> alt.Scale:
    """A logarithmic scale around the values, all of them positive."""
    found = list(values)
    return alt.Scale(type="log", nice=False, domain=[min(found) * 0.85, max(found) * 1.18])


def show_details(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The values as text, by group; without those groups that hold nothing."""
    return {
        heading: {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
        for heading, values in groups.items()
        if values
    }


def write_page(
    folder: Path,
    template: Path,
    drawn: Mapping[str, Chart],
    subtitle: str,
    known: Iterable[str],
    values: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]] | None = None,
) -> list[Path]:
    """Writes report.html and a PNG per chart into `folder`; returns their paths, report.html first.

    subtitle: under the titles of the PNG files. known: names of all charts that a report of this kind may have; no PNG
    of an earlier one stays behind. values, filters: of the template, which also gets drawn, specs, themes, javascript.
    """
    specs = {name: chart.to_dict() for name, chart in drawn.items() if not isinstance(chart, Missing)}
    for spec in specs.values():
        del spec["config"]  # the page and the PNG files have their own
    files = {f"{name}.png": _png(spec, subtitle) for name, spec in specs.items()}
    javascript = vl_convert.javascript_bundle(GLOBALS, vl_version=VEGA_LITE)
    page = _environment(template, filters or {}).get_template(template.name)
    html = page.render(**values, drawn=drawn, specs=specs, themes=THEMES, javascript=javascript)
    files = {"report.html": html.encode(), **files}
    for name, content in files.items():
        _save(folder / name, content)
    for name in set(known) - specs.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    return [folder / name for name in files]


def _environment(template: Path, filters: Mapping[str, Callable[..., Any]]) -> jinja2.Environment:
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(autoescape=True, loader=loader, **options)
    environment.filters.update(filters)
    return environment


def _save(path: Path, content: bytes) -> None:
    def put(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, put)


def _png(spec: dict[str, Any], subtitle: str) -> bytes:
    """The chart as it stands on a light page, with a subtitle under its title."""
    config = {**THEMES["light"]["wide"], "background": "#ffffff", "padding": 12}
    fixed = {**spec, "width": PNG_WIDTH, "title": {**spec["title"], "subtitle": subtitle}, "config": config}
    return vl_convert.vegalite_to_png(fixed, vl_version=VEGA_LITE, scale=PNG_SCALE)
