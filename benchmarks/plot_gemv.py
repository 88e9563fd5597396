"""The roofline picture of `bench_gemv.py`: GB/s of weight bytes against stored bits per weight, one row of x.

    python benchmarks/plot_gemv.py RESULT.json OUT.png [--threads 2] [--shapes 4096x4096,14336x4096]

The line is the read bandwidth, the median of all readings of that panel, its band their range. A product cannot be
faster than the line, and at equal height fewer bits are proportionally faster.
"""

from __future__ import annotations

import argparse
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


def draw(axes, cases: list[dict], shape: str, threads: int) -> None:
    readings = [c["bandwidth_gbps"] for c in cases]
    readings += [r["bandwidth_gbps"] for c in cases for r in c["peers"].values()]
    ceiling = statistics.median(readings)
    axes.axhspan(min(readings), max(readings), color=GREY, alpha=0.15, linewidth=0)
    axes.axhline(ceiling, color=GREY, linewidth=1.5)
    axes.annotate(f"read bandwidth {ceiling:.1f} GB/s", (0.99, ceiling), xycoords=("axes fraction", "data"),
                  xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9, color="#555555")  # fmt: skip
    taken: list[tuple[float, float]] = []
    for library, places in points(cases, shape).items():
        colour, marker = OURS[1:] if library == OURS[0] else LIBRARIES[library]
        bits, gbps, labels = zip(*places, strict=True)
        ours = library == OURS[0]
        axes.plot(bits, gbps, linestyle="-" if ours else "none", color=colour, marker=marker, label=library,
                  markersize=8 if ours else 7, linewidth=1.5, zorder=3 if ours else 2)  # fmt: skip
        for x, y, label in zip(bits, gbps, labels, strict=True):
            place_label(axes, (x, y), label, colour, taken, ceiling)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1.9, 40)
    ticks = (2, 3, 4, 6, 8, 16, 32)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.18 * max(readings))
    axes.set_xlabel("stored bits per weight")
    axes.set_title(f"{shape.replace('x', ' × ')}, {threads} thread{'s' if threads > 1 else ''}", fontsize=11)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def place_label(axes, point, label: str, colour: str, taken: list, ceiling: float) -> None:
    """Writes the label to the right of its point, or where no earlier label is: left, above, below."""
    from math import log2

    x, y = log2(point[0]) / 4.4, point[1] / (1.18 * ceiling)  # roughly, in fractions of the panel
    width, height = 0.018 * len(label), 0.045
    options = [(0.02, 0, "left", "center"), (-0.02 - width, 0, "right", "center"),
               (-width / 2, 0.05, "center", "bottom"), (-width / 2, -0.05, "center", "top"),
               (0.02, 0.045, "left", "bottom"), (0.02, -0.045, "left", "top")]  # fmt: skip
    dx, dy, across, along = next(
        (o for o in options
         if all(abs(x + o[0] + width / 2 - a) > (width + w) / 2 or abs(y + o[1] - b) > height for a, b, w in taken)),
        options[0],
    )  # fmt: skip
    taken += [(x + dx + width / 2, y + dy, width), (x, y, 0.02)]
    offset = {"left": 7, "right": -7, "center": 0}[across], {"center": 0, "bottom": 6, "top": -6}[along]
    axes.annotate(
        label, point, xytext=offset, textcoords="offset points", ha=across, va=along, fontsize=8, color=colour
    )


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
    figure, row = pyplot.subplots(
        1, len(shapes), figsize=(6.2 * len(shapes), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (shape, cases) in zip(row[0], panels.items(), strict=True):
        draw(axes, cases, shape, options.threads)
    row[0][0].set_ylabel("GB/s of weight bytes")
    handles, labels = {}, []
    for axes in row[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = list(handles)
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
