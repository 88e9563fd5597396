"""The split report's charts: one Altair specification each, drawn alike by the page and as a PNG.

A chart is a function of the runs that gives the chart, or a `Missing` with the reason that the page prints in its
place. What a run has thousands of is thinned or binned, so that the page stays small: steps to `POINTS`, channels to
`BINS` rows of mean widths, tables to as many columns.
"""

from __future__ import annotations

import colorsys
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import altair as alt

from amq.report.look import (
    BLUE,
    GREEN,
    GREY,
    MAGENTA,
    ORANGE,
    RAMP,
    Chart,
    Missing,
    finish,
    log_scale,
    table,
)
from amq.split.figures import LINKS, STREAMS, ShownRun

POINTS, BINS = 300, 60
SEAM = 0.004
"""By how much of the axis a cell reaches under the next one: cells that only touch show the page between them."""
MIB = 2**20
RUN_COLORS = (BLUE, ORANGE, GREEN, MAGENTA, "#c9a227", "#7a5fc0", "#4fa3a5", GREY)
LINE: dict[str, Any] = {"strokeWidth": 2, "clip": True}
STROKES: dict[str, Any] = {"symbolType": "stroke", "symbolStrokeWidth": 2.5, "symbolOpacity": 1}
SECONDS_COLORS = {"compute": BLUE, "encode": ORANGE, "wait": "#b9c2cb"}
NO_STEP = "the run has no step yet"
Item = TypeVar("Item")


def loss_chart(runs: Sequence[ShownRun]) -> Chart:
    """Loss against what was sent for it."""
    points: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for run in runs:
        steps = [s for s in run.steps if math.isfinite(s.loss) and s.sent + s.received > 0]
        means = _smooth([s.loss for s in steps])
        for step, mean in _thin(list(zip(steps, means, strict=True))):
            row = {"run": run.name, "step": step.step, "MiB": (step.sent + step.received) / MIB}
            points.append({**row, "loss": step.loss})
            lines.append({**row, "loss": mean})
    if not points:
        return Missing(NO_STEP if not any(run.steps for run in runs) else "no step has a finite loss")
    x = alt.X("MiB:Q").title("MiB sent, both directions").scale(log_scale(row["MiB"] for row in points))
    y = alt.Y("loss:Q").title("loss, nats/token").scale(zero=False)
    color, tips = _run_color(runs), ["run:N", "step:Q", "MiB:Q", "loss:Q"]
    layers = [
        table(points).mark_circle(size=14, opacity=0.3).encode(x, y, color, tooltip=tips),
        table(lines).mark_line(**LINE).encode(x, y, color, alt.Order("step:Q")),
    ]
    return finish(layers, "Loss against MiB sent", "Line chart: training loss against MiB sent, by run", 340)


def bits_chart(runs: Sequence[ShownRun]) -> Chart:
    """Mean width of the codes per value over the steps, each direction."""
    rows: list[dict[str, Any]] = [
        {"run": run.name, "step": step.step, "direction": name, "bits": getattr(step, f"{name}_bits")}
        for run in runs
        for name in ("forward", "backward")
        for step in _thin(run.steps)
    ]
    if not rows:
        return Missing(NO_STEP)
    bits = [row["bits"] for row in rows]
    wide = min(bits) > 0 and max(bits) > 8  # unquantized ones among them
    y = alt.Y("bits:Q").title("bits per value").scale(zero=False, padding=8)
    if wide:
        y = y.scale(log_scale(bits)).axis(values=[0.5, 1, 2, 3, 4, 6, 8, 16, 32])
    dash = alt.StrokeDash("direction:N").title(None).legend(orient="top", **STROKES)
    chart = table(rows).mark_line(**LINE).encode(
        alt.X("step:Q").scale(nice=False).axis(tickCount=10, tickMinStep=1),
        y,
        _run_color(runs),
        dash.scale(domain=["forward", "backward"], range=[[1, 0], [5, 4]]),
        tooltip=["run:N", "direction:N", "step:Q", "bits:Q"],
    )  # fmt: skip
    return finish([chart], "Mean width of the codes", "Line chart: mean bits per value over the steps, by direction")


def channels_chart(run: ShownRun, stream: str) -> Chart:
    """The widths of a stream's channels over time: channels sorted by their final width, the mean of each bin."""
    tables = run.widths.get(stream, [])
    if not tables:
        return Missing(f"policy {run.terms.policy} has written no table of widths for this direction")
    count = len(tables[0].widths)
    order = sorted(range(count), key=lambda channel: (tables[-1].widths[channel], channel))
    edges = [count * i // min(BINS, count) for i in range(min(BINS, count) + 1)]
    shown = _thin(tables, BINS)
    end = max(shown[-1].step + 1, run.steps[-1].step + 1 if run.steps else 0)
    rows = [
        {"from": of.step, "to": to, "low": low, "high": high, "bits": round(mean, 2)}
        for of, to in zip(shown, [*(following.step for following in shown[1:]), end], strict=True)
        for low, high in zip(edges, edges[1:], strict=False)
        for mean in [sum(of.widths[channel] for channel in order[low:high]) / (high - low)]
    ]
    bits = [row["bits"] for row in rows]
    low, high = math.floor(min(bits)), max(math.ceil(max(bits)), math.floor(min(bits)) + 1)
    stops = [low + (high - low) * i / (len(RAMP) - 1) for i in range(len(RAMP))]
    color = alt.Color("bits:Q").title("bits").scale(domain=stops, range=list(RAMP))
    color = color.legend(gradientLength=200, tickCount=high - low, format="d")
    x = alt.X("from:Q").title("step").scale(domain=[shown[0].step, end], nice=False)
    x = x.axis(grid=False, tickCount=8, tickMinStep=1)
    y = alt.Y("low:Q").title("channels, by final width").scale(domain=[0, count], nice=False).axis(grid=False)
    tips = [alt.Tooltip("from:Q", title="from step"), alt.Tooltip("to:Q", title="to step"), "low:Q", "high:Q", "bits:Q"]
    seams = {"right": f"datum.to + {SEAM * (end - shown[0].step)}", "top": f"datum.high + {SEAM * count}"}
    marks = table(rows).transform_calculate(**seams).mark_rect(clip=True).encode(
        x, y, color, alt.X2("right:Q"), alt.Y2("top:Q"), tooltip=tips
    )  # fmt: skip
    title = f"Widths of {count} channels, {_name(stream)}"
    return finish([marks], title, f"Heat map: mean width by channel and step, {_name(stream)}", 280)


def widths_chart(runs: Sequence[ShownRun], stream: str) -> Chart:
    """How many channels have which width in the end, run by run."""
    last = {run.name: run.widths[stream][-1].widths for run in runs if stream in run.widths}
    if not last:
        return Missing("no run has written a table of widths for this direction")
    found = sorted({width for widths in last.values() for width in widths})
    colors = [RAMP[round(i * (len(RAMP) - 1) / max(1, len(found) - 1))] for i in range(len(found))]
    rows = [
        {"run": name, "bits": str(width), "at": width, "share": 100 * count / len(widths), "channels": count}
        for name, widths in last.items()
        for width, count in sorted(Counter(widths).items())
    ]
    chart = table(rows).mark_bar(height=18).encode(
        alt.X("share:Q").title("share of channels, %").scale(domain=[0, 100]),
        _bars("run:N"),
        alt.Color("bits:N").title("bits").scale(domain=[str(width) for width in found], range=colors),
        alt.Order("at:Q"),
        tooltip=["run:N", "bits:N", "channels:Q", "share:Q"],
    )  # fmt: skip
    title = f"Final widths, {_name(stream)}"
    return finish([chart], title, f"Stacked bars: share of channels by width, {_name(stream)}", 26 * len(last))


def links_chart(runs: Sequence[ShownRun]) -> Chart:
    """What a step takes of the slower party and of two links, and what was measured over the run's own."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        work = "slower party" if run.overlaps else "both parties"
        found = {work: run.work, **{f"at {link}": run.transfer(rate) for link, rate in LINKS.items()}}
        if run.run.link:
            found["measured"] = run.measured
        rows += [{"run": run.name, "what": k, "seconds": v, "link": run.run.link} for k, v in found.items() if v]
    if not rows:
        return Missing(NO_STEP)
    colors = {"slower party": BLUE, "both parties": "#6a3f9e"}
    colors |= dict(zip((f"at {link}" for link in LINKS), ("#8ecfb8", GREEN), strict=True))
    colors["measured"] = ORANGE
    kinds = [kind for kind in colors if any(row["what"] == kind for row in rows)]
    x = alt.X("seconds:Q").title("seconds per step").scale(domain=[0, 1.18 * max(row["seconds"] for row in rows)])
    x = x.axis(tickCount=8)
    offset = alt.YOffset("what:N").scale(domain=kinds)
    base = table(rows).encode(x, _bars("run:N"), offset)
    color = alt.Color("what:N").title(None).scale(domain=kinds, range=[colors[kind] for kind in kinds])
    bars = base.mark_bar().encode(color, tooltip=["run:N", "what:N", "seconds:Q", "link:N"])
    texts = base.mark_text(align="left", dx=4, fontSize=11).encode(alt.Text("seconds:Q", format=".3~g"))
    description = "Bars: seconds of a step that the slower party and the transfer take, by run"
    return finish([bars, texts], "A step on slow links", description, 19 * len(kinds) * len(runs))


def parties_chart(runs: Sequence[ShownRun]) -> Chart:
    """Where a step's seconds go at each party."""
    rows = [
        {"who": party if len(runs) == 1 else f"{party}, {run.name}", "part": part, "seconds": getattr(found, part)}
        | {"at": at}
        for run in runs
        for party in ("client", "server")
        if (found := run.seconds(party)) is not None
        for at, part in enumerate(SECONDS_COLORS)
    ]
    if not rows:
        return Missing(NO_STEP)
    chart = table(rows).mark_bar(height=18).encode(
        alt.X("seconds:Q").title("seconds per step").axis(tickCount=8),
        _bars("who:N"),
        alt.Color("part:N").title(None).scale(domain=list(SECONDS_COLORS), range=list(SECONDS_COLORS.values())),
        alt.Order("at:Q"),
        tooltip=["who:N", "part:N", "seconds:Q"],
    )  # fmt: skip
    description = "Stacked bars: seconds of computing, encoding and waiting, by party"
    return finish([chart], "A step's seconds at each party", description, 26 * len({row["who"] for row in rows}))


def draw(runs: Sequence[ShownRun]) -> dict[str, Chart]:
    """All charts, in the page's order. The second cut's are there for runs that have one."""
    streams = [s for s in STREAMS if "." not in s or any(s in run.widths for run in runs)]
    drawn: dict[str, Chart] = {"loss": loss_chart(runs), "bits": bits_chart(runs)}
    for stream in streams:
        alone = len(runs) == 1
        drawn[widths_name(stream, alone)] = channels_chart(runs[0], stream) if alone else widths_chart(runs, stream)
    return {**drawn, "links": links_chart(runs), "parties": parties_chart(runs)}


def widths_name(stream: str, alone: bool) -> str:
    """The name of a stream's chart of widths, of one run alone or of several; also an element's id and a file's."""
    return f"{'channels' if alone else 'widths'}-{stream.replace('.', '-')}"


KNOWN = ("loss", "bits", *(widths_name(s, alone) for s in STREAMS for alone in (True, False)), "links", "parties")
"""Every name that `draw` may give."""


def _name(stream: str) -> str:
    direction, _, second = stream.partition(".")
    return f"{direction}, second cut" if second else direction


def _bars(field: str) -> alt.Y:
    """An axis of names in the rows' order."""
    return alt.Y(field).title(None).sort(None).axis(labelLimit=120, grid=False, labelOverlap=False)


def _run_color(runs: Sequence[ShownRun]) -> alt.Color:
    """One colour per run; a legend where there are several."""
    names, colors = [run.name for run in runs], RUN_COLORS[: len(runs)]
    if len(runs) > len(RUN_COLORS):
        found = (colorsys.hls_to_rgb(i / len(runs), 0.52, 0.55) for i in range(len(runs)))
        colors = tuple("#" + "".join(f"{round(255 * part):02x}" for part in rgb) for rgb in found)
    color = alt.Color("run:N").title(None).scale(domain=names, range=list(colors))
    return color.legend(None) if len(runs) == 1 else color.legend(**STROKES)


def _thin(items: Sequence[Item], most: int = POINTS) -> Sequence[Item]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _smooth(values: Sequence[float]) -> Iterable[float]:
    """The running mean over a twentieth of the values, at least five, around each; fewer at the ends."""
    half, sums = max(2, len(values) // 40), [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        yield (sums[high] - sums[low]) / (high - low)
