"""The pictures of a run: speed.png and decode.png beside the suite.json that they are drawn from.

    python benchmarks/gpu/plot.py DIR

The suite's last part: it also puts the clocks into suite.json, and how the other parts ended.

A run on a machine without matplotlib says so and can be drawn later, anywhere, from its suite.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import clocks
from common import arguments, record, say, write_json

FORMATS = {"int2": "#0072B2", "int3": "#009E73", "int4": "#E69F00"}  # Okabe and Ito's colours
MARKS = {("cuda", "fp32"): "o", ("cuda", "int8"): "D", ("triton", "fp32"): "v"}
GREY = "#6B6B6B"


def height(value: float | None) -> float:
    """Smoke runs have no figures: their points lie on the axis."""
    return 0.0 if value is None else value


def draw_shapes(axes, rows: list[dict], figure: str) -> None:
    """One row of x: a figure by shape, ordered by size."""
    chosen = [r for r in rows if r["rows"] == 1 and r["format"] in FORMATS]
    sizes = {r["shape"]: r["weight_bytes"] / r["bits_per_weight"] for r in chosen}
    order = sorted(sizes, key=sizes.get)
    for (backend, mode), mark in MARKS.items():
        for name, colour in FORMATS.items():
            points = [r for r in chosen if (r["backend"], r["activations"], r["format"]) == (backend, mode, name)]
            xs = [order.index(r["shape"]) for r in points]
            axes.plot(xs, [height(r[figure]) for r in points], mark, color=colour, markersize=6, alpha=0.8,
                      label=f"{name} {backend} {mode}")  # fmt: skip
    bars = {r["format"]: float(t["target"].split()[-1]) for r in chosen for t in r["targets"] if figure in t["target"]}
    for name, bar in bars.items():
        axes.axhline(bar, color=FORMATS[name], linestyle="--", linewidth=1)
    axes.set_xticks(range(len(order)), order, rotation=60, ha="right", fontsize=7)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#E5E5E5")


def draw_rows(axes, rows: list[dict]) -> None:
    """Times torch's fp16 by rows of x, at the largest shape that has all of them."""
    chosen = [r for r in rows if r["format"] in FORMATS]
    tried = {r["shape"]: {q["rows"] for q in chosen if q["shape"] == r["shape"]} for r in chosen}
    largest = max(chosen, key=lambda r: (len(tried[r["shape"]]), r["weight_bytes"]))
    chosen = [r for r in chosen if r["shape"] == largest["shape"]]
    for (backend, mode), mark in MARKS.items():
        for name, colour in FORMATS.items():
            points = [r for r in chosen if (r["backend"], r["activations"], r["format"]) == (backend, mode, name)]
            points.sort(key=lambda r: r["rows"])
            axes.plot([r["rows"] for r in points], [height(r["times_torch_fp16"]) for r in points], f"{mark}-",
                      color=colour, markersize=5, linewidth=1)  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows of x")
    axes.set_title(f"times torch fp16, {largest['shape']}", fontsize=10)
    axes.grid(axis="y", color="#E5E5E5")


def draw_speed(pyplot, result: dict, to: Path) -> None:
    figure, (shares, factors, rows) = pyplot.subplots(1, 3, figsize=(19, 6), layout="constrained")
    draw_shapes(shares, result["speed"]["rows"], "share_of_copy")
    shares.set_title("share of copy bandwidth, one row of x (dashed: targets)", fontsize=10)
    draw_shapes(factors, result["speed"]["rows"], "times_torch_fp16")
    factors.set_title("times torch fp16, one row of x (dashed: targets)", fontsize=10)
    draw_rows(rows, result["speed"]["rows"])
    handles, labels = shares.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title(result, "one linear, weights cold"))
    figure.savefig(to, dpi=110)


def draw_decode(pyplot, result: dict, to: Path) -> None:
    rows = result["decode"]["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(rows) + 1.6), layout="constrained")
    speeds = [height(r["tokens_per_second"]) for r in rows]
    axes.barh(range(len(rows)), speeds, color=[GREY if r["backend"] == "torch" else FORMATS["int2"] for r in rows])
    for at, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        figures = (("share_of_copy", "of copy bandwidth"), ("times_fp16", "× fp16"))
        notes = [f"{row[name]:.2f} {unit}" for name, unit in figures if row[name] is not None]
        axes.text(speed, at, f" {speed:.0f}: " + ", ".join(notes), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{r['variant']} ({r['bits_per_weight']:.2f} bits)" for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max(*speeds, 1))
    axes.set_xlabel("tokens per second")
    axes.set_title(title(result, f"decode, {result['decode']['model']} shapes"), fontsize=10)
    figure.savefig(to, dpi=110)


def title(result: dict, what: str) -> str:
    if result["smoke"]:
        return f"{what}: smoke run, nothing was measured"
    machine = result["machine"]
    return f"{what}: {machine['gpu']}, {machine['date'][:10]}, {machine['commit'][:20]}"


def main() -> int:
    parser = arguments(__doc__, 60)
    parser.add_argument("--parts", default="", help="how the suite's parts ended: NAME=STATUS …, to be recorded")
    options = parser.parse_args()
    path = options.folder / "suite.json"
    result = json.loads(path.read_text())
    if options.parts:
        parts = dict(part.split("=") for part in options.parts.split())
        record(options.folder, "parts", {name: int(status) for name, status in parts.items()}, result["smoke"])
        record(options.folder, "clocks", clocks.collect(options.folder), result["smoke"])
    draw_all(options, result)
    write_json(path, json.loads(path.read_text()), indent=1)  # for people
    return 0


def draw_all(options, result: dict) -> None:
    try:
        import matplotlib
    except ImportError as error:
        record(options.folder, "pictures", f"none: matplotlib cannot be imported ({error})", result["smoke"])
        say("plot: no matplotlib here; draw later with benchmarks/gpu/plot.py and this suite.json")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {}
    for section, draw in (("speed", draw_speed), ("decode", draw_decode)):
        rows = result.get(section, {}).get("rows")
        if rows:
            draw(pyplot, result, options.folder / f"{section}.png")
        drawn[section] = f"{section}.png" if rows else "none: no rows"
    record(options.folder, "pictures", drawn, result["smoke"])
    say(f"plot: {drawn}")


if __name__ == "__main__":
    sys.exit(main())
