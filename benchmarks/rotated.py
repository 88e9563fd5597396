"""What the rotation of activations costs on a CPU: `python benchmarks/rotated.py [PLAIN ROTATED] [--json FILE]`.

Products of one row first, by rotated and by plain weights in turn, in calls without Python between them: of one tile,
which is the activation step and little else, and of N × K. Then decoded tokens of two checkpoints, if they are given,
which `amq quantize` wrote with `--rotation none` and `--rotation 64` in the same formats: the engines take turns.
Times are the processor's, of one thread. Ratios are plain's over rotated's, the median of all turns and in brackets
their quartiles: what else the machine does weighs on both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import write_results

from amq.formats import get_format, n_groups
from amq.kernels.backends import prepare
from amq.kernels.cpu import linear_each
from amq.packing import PackedWeight
from amq.runtime.engine import Segment
from amq.runtime.native_engine import NativeEngine, open_native

SHAPES = ((16, 576), (16, 1536), (16, 4096), (576, 576), (1536, 576), (576, 1536), (4096, 4096))
"""out_features × in_features."""
TURNS, SECONDS = 40, 0.02


def compare(turn: tuple[Callable[[], None], Callable[[], None]], turns: int, calls: int) -> dict[str, Any]:
    """Plain and rotated, by turns of `calls` calls: µs of a call (median), and plain's time over rotated's."""
    times: list[list[float]] = [[], []]
    for _ in range(turns):
        for one, run in zip(times, turn, strict=True):
            start = time.process_time()
            for _ in range(calls):
                run()
            one.append((time.process_time() - start) / calls * 1e6)
    ratios = [plain / rotated for plain, rotated in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    plain, rotated = (statistics.median(one) for one in times)
    return {"plain_us": plain, "rotated_us": rotated, "ratio": middle, "quartiles": [low, high]}


def products(shape: tuple[int, int], activations: str, group_size: int, repeats: int) -> dict[str, Any]:
    """One weight `repeats` times in a native call; the times are of one product."""
    rows, features = shape
    fmt = get_format("int4")
    codes = torch.randint(256, (rows, fmt.row_bytes(features)), dtype=torch.uint8)
    scale = torch.rand(rows, n_groups(features, group_size)).half()
    plain = prepare(PackedWeight(fmt, features, group_size, codes, scale, torch.full_like(scale, 7.5)))
    x = torch.randn(1, features)
    runs = [
        lambda weights=[weight] * repeats: linear_each(x, weights, activations)
        for weight in (plain, replace(plain, rotation=64))
    ]
    start = time.process_time()
    runs[0]()
    calls = max(1, int(SECONDS / (time.process_time() - start)))
    found = compare((runs[0], runs[1]), TURNS, calls)
    return found | {name: found[name] / repeats for name in ("plain_us", "rotated_us")}


def decoding(folders: list[Path], activations: str, tokens: int, turns: int) -> dict[str, Any]:
    """A token of each checkpoint, from the 100th position on."""

    def decode(engine: NativeEngine) -> Callable[[], None]:
        fed = list(range(1, 101))
        slot = engine.open(fed, turns * tokens)
        assert slot is not None
        fed = [int(engine.forward([Segment(slot, fed)])[0].argmax())]

        def run() -> None:
            for _ in range(tokens):
                fed[0] = int(engine.forward([Segment(slot, fed)])[0].argmax())

        return run

    plain, rotated = (decode(open_native(folder, activations, 100 + turns * tokens)) for folder in folders)
    found = compare((plain, rotated), turns, 1)
    return found | {name: found[name] / tokens for name in ("plain_us", "rotated_us")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for activations in ("int8", "fp32"):
        for shape in SHAPES:
            repeats = 1000 if shape[0] == 16 else 20
            what = f"int4 {shape[0]}x{shape[1]} {activations}"
            rows.append({"what": what, **products(shape, activations, 128, repeats)})
        if args.folders:
            what = f"a token after 100, {activations}"
            rows.append({"what": what, **decoding(args.folders, activations, args.tokens, args.turns)})
    for row in rows:
        low, high = row["quartiles"]
        times = f"plain {row['plain_us']:.2f} µs, rotated {row['rotated_us']:.2f} µs"
        print(f"{row['what']}: {times}, {row['ratio']:.3f}× ({low:.3f} to {high:.3f})")
    if args.json:
        write_results(args.json, {"folders": [folder.name for folder in args.folders], "rows": rows})


if __name__ == "__main__":
    main()
