"""What `equal_bytes.py` found, as a table and a picture: `python benchmarks/equal_bytes_show.py OUT.png FILE …`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amq.util.files import read_json

FULL, OURS = "full", "amq"
MARKS = {  # Okabe and Ito's colours, and shapes for who sees none
    OURS: ("#0072B2", "o"),
    "llama.cpp": ("#E69F00", "s"),
    "ik_llama.cpp": ("#CC79A7", "^"),
    "auto-round": ("#009E73", "D"),
}
LEAST, TICKS = 0.2, (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000)
"""Percent above full precision: less is drawn as this."""


def table(content: dict[str, Any]) -> str:
    """Markdown, smallest first."""
    rows = sorted(content["rows"], key=lambda row: row["bytes"])
    lines = [
        "| | MB in all | bits/weight | perplexity | ours at these bytes | tokens/s | made in |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        exact = f" ({row['perplexity_exact']:.2f} exact)" if "perplexity_exact" in row else ""
        ours = "" if row["engine"] in (FULL, OURS) else _against(content["rows"], row)
        speed = f"{row['speed']['tokens_per_second']:.0f}" if "speed" in row else ""
        name = f"**{row['name']}**" if row["engine"] == OURS else row["name"]
        cells = [name, f"{row['bytes'] / 1e6:.1f}", f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}{exact}",
                 ours, speed, _making(row)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interpolated(rows: Sequence[dict[str, Any]], size: int) -> float | None:
    """Our perplexity at `size` bytes: its logarithm is straight between neighbours; None beyond the ends."""
    points = sorted((row["bytes"], math.log(row["perplexity"])) for row in rows if row["engine"] == OURS)
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= size <= right:
            share = (size - left) / (right - left) if right > left else 0.0
            return math.exp(low + share * (high - low))
    return None


def _against(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> str:
    found = interpolated(rows, row["bytes"])
    return "" if found is None else f"{found:.2f} ({100 * (found / row['perplexity'] - 1):+.1f} %)"


def _making(row: dict[str, Any]) -> str:
    """Seconds of processor time and the largest peak of memory."""
    made = row["made"].values()
    if not made or row["engine"] == FULL:
        return ""
    seconds, peak = sum(step["processor_seconds"] for step in made), max(step["peak_bytes"] for step in made)
    return f"{seconds:.0f} s, {peak / 2**30:.1f} GiB"


def draw(axes: Any, content: dict[str, Any], title: str) -> list[tuple[Any, ...]]:
    """How far perplexity is above full precision's, over MB. Returns what `plot_gemv.write_labels` wants."""
    rows = content["rows"]
    full = next(row["perplexity"] for row in rows if row["engine"] == FULL)
    marks = []
    for engine, (colour, marker) in MARKS.items():
        ours = engine == OURS
        places = sorted(
            (row["bytes"] / 1e6, max(LEAST, 100 * (row["perplexity"] / full - 1)), row["name"].partition(" ")[2])
            for row in rows
            if row["engine"] == engine and not row["name"].endswith("F32")
        )
        if places:
            x, y, labels = zip(*places, strict=True)
            axes.plot(x, y, linestyle="-" if ours else "none", color=colour, marker=marker, label=engine,
                      markersize=7 if ours else 6, linewidth=1.5, zorder=3 if ours else 2)  # fmt: skip
            marks += [(*place, label, colour, ours) for *place, label in zip(x, y, labels, strict=True)]
    axes.margins(x=0.16)  # for the labels
    axes.set_yscale("log")
    highest = max(y for _, y, *_ in marks)
    axes.set_ylim(0.8 * LEAST, 1.5 * highest)
    ticks = [tick for tick in TICKS if tick <= 1.5 * highest]
    axes.set_yticks(ticks, [f"+{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("MB of everything that must be resident")
    axes.set_title(f"{title} (full precision: perplexity {full:.2f})", fontsize=11)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return marks


def main() -> None:
    from plot_gemv import pyplot, write_labels  # it chooses a back end without windows

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--titles", default="", metavar="LIST", help="default: the models' names")
    options = parser.parse_args()
    contents = [read_json(path) for path in options.results]
    titles = options.titles.split(",") if options.titles else [Path(content["model"]).stem for content in contents]
    figure, row = pyplot.subplots(
        1, len(contents), figsize=(6.2 * len(contents), 5.2), squeeze=False, layout="constrained"
    )
    marks = [draw(axes, *given) for axes, *given in zip(row[0], contents, titles, strict=True)]
    row[0][0].set_ylabel("perplexity above full precision's")
    handles = {
        label: handle for axes in row[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.canvas.draw()  # settles the layout, which the labels go by
    figure.set_layout_engine("none")
    for axes, found in zip(row[0], marks, strict=True):
        write_labels(axes, found, axes.get_ylim()[0])
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
