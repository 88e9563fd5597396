"""Predicted against measured time of a token: `python benchmarks/speed_model.py MODEL --json FOLDER`.

Makes a speed table of the machine, as `amq search --min-speed` does, then draws --configurations mixtures of formats
of different sizes and decodes with each in the engine, on drawn weights. Since a shared machine's speed wanders by more
than the error in question, each of --rounds rounds measures a table and all engines, and errors are of figures of one
round; their medians count.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, result_name, write_results

from amq.formats import FORMATS, KEPT
from amq.model.open import resolve
from amq.model.speed_table import SpeedTable, shape_key
from amq.runtime.speed_measure import How, Skeleton, decode_seconds, measure, open_drawn, shapes_of
from amq.util.machine import cpu_name
from amq.util.progress import terminal_progress
from amq.util.records import to_json

SCHEMA = "amq/speed_model/1"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--configurations", type=int, default=12, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="LIST")
    parser.add_argument("--group-size", type=int, default=128, metavar="G")
    parser.add_argument("--depths", default="0,1024", metavar="LIST")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE|FOLDER")
    args = parser.parse_args(argv)
    made = provenance()
    path = args.json
    if path.is_dir():
        path /= result_name("speed-model", Path(args.model).stem, cpu_name())
    content = compare(args)
    print(table(content))
    write_results(path, {**content, **{"provenance": made}})


def compare(args: argparse.Namespace) -> dict[str, Any]:
    model = Skeleton.of(resolve(args.model))
    depths = tuple(int(d) for d in args.depths.split(","))
    how = How(group_size=args.group_size, threads=torch.get_num_threads(), depths=depths)
    spec = model.drawn({}, args.group_size).spec
    shapes, reads = shapes_of(spec)
    names = args.formats.split(",")
    wanted = {shape: {*names} for shape in shapes.values()}
    wanted[shapes[spec.head.name]].add(KEPT.name)
    seeds = range(args.seed, args.seed + args.configurations)
    mixtures = [_draw(random.Random(seed), shapes, names, spec.head.name, i) for i, seed in enumerate(seeds)]
    engines = [open_drawn(model.drawn(formats, args.group_size), how) for formats in mixtures]
    tables, found = [], []
    with terminal_progress().stage("rounds", args.rounds) as step:
        for _ in range(args.rounds):
            tables.append(measure(model, wanted, how, times=1))
            found.append([[decode_seconds(engine, depth) for depth in depths] for engine in engines])
            step()

    def predicted(table: SpeedTable, formats: dict[str, str], depth: int) -> float:
        linears = (reads[n] * table.linears[shape_key(*s)][formats.get(n, KEPT.name)] for n, s in shapes.items())
        return table.beside(depth) + sum(linears)

    rows = []
    for i, formats in enumerate(mixtures):
        for j, depth in enumerate(depths):
            expected, measured = [predicted(t, formats, depth) for t in tables], [one[i][j] for one in found]
            rows.append({
                "configuration": i + 1, "depth": depth, "bytes": _bytes(formats, shapes, args.group_size),
                "head": formats.get(spec.head.name, KEPT.name), "measured": statistics.median(measured),
                "predicted": statistics.median(expected),
                "error": statistics.median(e / m for e, m in zip(expected, measured, strict=True)) - 1,
            })  # fmt: skip
    return {"schema": SCHEMA, "model": Path(args.model).name, "table": to_json(tables[-1]), "rows": rows}


def _draw(
    rng: random.Random, shapes: dict[str, tuple[int, int]], names: Sequence[str], head: str, number: int
) -> dict[str, str]:
    """Each mixture has weights of its own for the formats, so that sizes differ; every third keeps the head."""
    weights = [rng.random() ** 2 for _ in names]
    formats = {name: rng.choices(names, weights)[0] for name in shapes}
    if number % 3 == 2:
        del formats[head]
    return formats


def _bytes(formats: dict[str, str], shapes: dict[str, tuple[int, int]], group_size: int) -> int:
    stored = {**FORMATS, KEPT.name: KEPT}
    return sum(stored[formats.get(n, KEPT.name)].stored_bytes(*s, group_size) for n, s in shapes.items())


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    speeds, rows = content["table"], content["rows"]
    errors = [abs(row["error"]) for row in rows]
    lines = [
        f"{content['model']}, {speeds['processor']}, {speeds['isa']}, {speeds['threads']} threads",
        "",
        "| configuration | MB | head | after | tokens/s | predicted | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['configuration']} | {row['bytes'] / 1e6:.1f} | {row['head']} | {row['depth']} | "
            f"{1 / row['measured']:.1f} | {1 / row['predicted']:.1f} | {row['error']:+.1%} |"
        )
    lines += ["", f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
