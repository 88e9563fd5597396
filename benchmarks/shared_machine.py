"""How much slower the CPU runtime is beside other processes: `python benchmarks/shared_machine.py DIR --json FILE`.

DIR is a checkpoint that the native engine runs. Beside none, one and two processes that only count (--beside),
on one thread and on as many as this process may use: a decoded token, a prompt, and one product through the public op.
A token's time is the mean of TOKENS of them, since what a neighbour costs comes in slices; of several turns the median
counts, and numbers of threads take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from provenance import write_results

from amq.bench.cases import Case
from amq.bench.own import OwnEngine
from amq.formats import FORMATS
from amq.kernels.backends import prepare
from amq.kernels.ops import linear
from amq.quantize.quantizers import QUANTIZERS
from amq.util.limits import fit_threads

TOKENS, PRODUCTS = 60, 200
COUNTING = "while True: pass"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--beside", default="0,1,2", metavar="LIST", help="numbers of other processes")
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--features", type=int, default=4096, metavar="N", help="of the product, int4, in and out")
    parser.add_argument("--turns", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    rows = measure(args, [int(n) for n in args.beside.split(",")])
    print(table(rows))
    if args.json:
        write_results(args.json, {"folder": args.folder.name, "prompt": args.prompt, "rows": rows})


def measure(args: argparse.Namespace, beside: Sequence[int]) -> list[dict[str, Any]]:
    """One row per number of other processes and of threads."""
    threads, cases = sorted({1, fit_threads()}), {"token": Case(True, TOKENS), "prompt": Case(False, args.prompt)}
    context = max(case.positions for case in cases.values())
    engines = {t: OwnEngine(str(args.folder), t, {"threads": t, "context": context}) for t in threads}
    multiply = product(args.features)
    found: dict[tuple[int, int], list[dict[str, float]]] = {}
    for others in beside:
        with counting(others):
            for turn in range(args.turns + 1):
                for count, engine in engines.items():
                    torch.set_num_threads(count)
                    key = turn + others * (args.turns + 1)  # no prompt twice, whose beginning an engine remembers
                    times = {name: engine.measure(case, key)["seconds"] for name, case in cases.items()}
                    times = {"token": times["token"] / TOKENS, "prompt": times["prompt"], "product": multiply()}
                    if turn:  # the first one warms up
                        found.setdefault((others, count), []).append(times)
    return [
        {"beside": others, "threads": count, "turns": turns}
        | {f"{name}_ms": 1e3 * statistics.median(turn[name] for turn in turns) for name in turns[0]}
        for (others, count), turns in found.items()
    ]


@contextmanager
def counting(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", COUNTING]) for _ in range(count)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def product(features: int) -> Callable[[], float]:
    """Seconds of y = x · Wᵀ, mean of PRODUCTS."""
    fmt = FORMATS["int4"]
    packed = QUANTIZERS["rtn"]([torch.randn(features, features)], [fmt], 128, None, "fractional")[0][fmt.name]
    weight, x = prepare(packed), torch.randn(1, features)

    def run() -> float:
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            linear(x, [weight], activations="int8")
        return (time.perf_counter() - start) / PRODUCTS

    return run


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; in brackets how many times what it takes with nothing beside and all threads."""
    alone = max((row for row in rows if not row["beside"]), key=lambda row: row["threads"], default=None)
    names = [key for key in rows[0] if key.endswith("_ms")]
    heads = " | ".join(f"{name.removesuffix('_ms')}, ms" for name in names)
    lines = [f"| busy processes beside | threads | {heads} |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [
            f"{row[n]:.2f}" + (f" ({row[n] / alone[n]:.2f}×)" if alone and row is not alone else "") for n in names
        ]
        lines.append(f"| {row['beside']} | {row['threads']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
