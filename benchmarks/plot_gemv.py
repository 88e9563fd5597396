"""The roofline picture of `bench_gemv.py`: GB/s of weight bytes against stored bits per weight, one row of x.

    python benchmarks/plot_gemv.py RESULT.json OUT.png [--threads 2] [--shapes 4096x4096,14336x4096]

The line is the read bandwidth, the median of all readings of that panel, its band their range. A product cannot be
faster than the line, and at equal height fewer bits are proportionally faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

OURS = ("amq", "#0072B2", "o")
LIBRARIES = {  # Okabe and Ito's colours, and shapes for who sees none
    "onnxruntime": ("#E69F00", "s"),
    "auto-round": ("#009E73", "D"),
    "ggml": ("#CC79A7", "^"),
    "torch": ("#6B6B6B", "v"),
}
GREY = "#8A8A8A"
TICKS = (2, 3, 4, 6, 8, 16, 32)


def load(path: Path, threads: int, shape: str) -> list[dict]:
    """extra_info of the cases in one panel: one row of x, int8 activations, no forced instruction set."""
    cases = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]
    wanted = {"shape": shape, "threads": threads, "tokens": 1, "activations": "int8", "isa": ""}
    return [c for c in cases if all(c.get(field) == value for field, value in wanted.items())]


def weight_gbps(result: dict, shape: str) -> float:
    rows, columns = map(int, shape.split("x"))
    return result["bits_per_weight"] / 8 * rows * columns / (result["us"] * 1e3)


def points(cases: list[dict], shape: str) -> dict[str, list[tuple[float, float, str]]]:
    """library → (bits per weight, GB/s, label), peers once each."""
    found = {OURS[0]: [(c["bits_per_weight"], weight_gbps(c, shape), c["format"]) for c in cases]}
    peers = {name: result for case in cases for name, result in case["peers"].items()}
    for name, result in peers.items():
        library, kind = name.rsplit("-", 1)
        found.setdefault(library, []).append((result["bits_per_weight"], weight_gbps(result, shape), kind))
    return {library: sorted(places) for library, places in found.items()}


def draw(axes, cases: list[dict], shape: str, threads: int) -> tuple[list[tuple], float]:
    """Returns what `write_labels` wants: (bits, GB/s, label, colour, whether ours) per point, and the bandwidth."""
    readings = [c["bandwidth_gbps"] for c in cases]
    readings += [r["bandwidth_gbps"] for c in cases for r in c["peers"].values()]
    ceiling = statistics.median(readings)
    axes.axhspan(min(readings), max(readings), color=GREY, alpha=0.15, linewidth=0)
    axes.axhline(ceiling, color=GREY, linewidth=1.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1.9, 44)
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("stored bits per weight")
    axes.set_title(f"{shape.replace('x', ' × ')}, {threads} thread{'s' if threads > 1 else ''}", fontsize=11)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    marks = []
    for library, places in points(cases, shape).items():
        ours = library == OURS[0]
        colour, marker = OURS[1:] if ours else LIBRARIES[library]
        bits, gbps, _ = zip(*places, strict=True)
        axes.plot(bits, gbps, linestyle="-" if ours else "none", color=colour, marker=marker, label=library,
                  markersize=8 if ours else 7, linewidth=1.5, zorder=3 if ours else 2)  # fmt: skip
        marks += [(x, y, label, colour, ours) for x, y, label in places]
    axes.set_ylim(0, 1.12 * max(*readings, *(y for _, y, *_ in marks)))
    axes.annotate(f"read bandwidth {ceiling:.1f} GB/s", (0.72, min(readings)), xycoords=("axes fraction", "data"),
                  xytext=(0, -8), textcoords="offset points", ha="center", va="top", fontsize=9,
                  color="#555555")  # fmt: skip
    return marks, ceiling


def write_labels(axes, marks: list[tuple], bandwidth: float) -> None:
    """Each point's label at the first place around it that covers no point, no other label and not the ceiling."""
    to_points = 72 / axes.figure.dpi
    places = [axes.transData.transform((x, y)) * to_points for x, y, *_ in marks]
    left_edge, ceiling = axes.transData.transform((axes.get_xlim()[0], bandwidth)) * to_points
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    taken += [(0, ceiling - 1, 1e4, ceiling + 1), (0, 0, left_edge + 1, 1e4)]
    ours = [place for place, mark in zip(places, marks, strict=True) if mark[4]]
    for start, end in itertools.pairwise(ours):
        along_line = (start + (end - start) * step / 30 for step in range(1, 30))
        taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in along_line]
    for (x, y), (bits, gbps, label, colour, _) in zip(places, marks, strict=True):
        width, height = 4.6 * len(label), 8
        right, left, middle = 7, -7 - width, -width / 2
        up, level, down = 6, -height / 2, -6 - height
        around = [(right, level), (left, level), (middle, up), (middle, down)]
        around += [(side, along) for side in (right, left) for along in (up, down, 2 * up, 1.6 * down)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in around]
        chosen = next((i for i, box in enumerate(boxes) if not any(overlap(box, t) for t in taken)), 0)
        taken.append(boxes[chosen])
        axes.annotate(label, (bits, gbps), xytext=around[chosen], textcoords="offset points", va="bottom",
                      fontsize=8, color=colour)  # fmt: skip


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", default="4096x4096,14336x4096")
    options = parser.parse_args()
    shapes = options.shapes.split(",")
    panels = {shape: load(options.result, options.threads, shape) for shape in shapes}
    if absent := [shape for shape, cases in panels.items() if not cases]:
        parser.error(f"{options.result} has no M1 int8 case of {', '.join(absent)} at {options.threads} threads")
    figure, row = pyplot.subplots(1, len(shapes), figsize=(6.2 * len(shapes), 4.8), squeeze=False, layout="constrained")
    labels = [draw(axes, panels[shape], shape, options.threads) for axes, shape in zip(row[0], shapes, strict=True)]
    row[0][0].set_ylabel("GB/s of weight bytes")
    handles = {}
    for axes in row[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.canvas.draw()  # settles the layout, which the labels go by
    figure.set_layout_engine("none")
    for axes, arguments in zip(row[0], labels, strict=True):
        write_labels(axes, *arguments)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
