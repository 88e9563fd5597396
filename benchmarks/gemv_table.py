"""The README's table from a result of bench_gemv.py: `python benchmarks/gemv_table.py FILE.json [--threads 2]`.

One row per format and shape with one row of x, int8, the instruction set that amq picks: microseconds per product,
share of the read bandwidth measured beside it, and every peer's time over ours. `!` marks cases that other processes
disturbed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def rows(result: dict, threads: int) -> list[dict]:
    """The cases of the table, in the order of the run."""
    infos = [benchmark["extra_info"] for benchmark in result["benchmarks"]]
    wanted = {"tokens": 1, "activations": "int8", "threads": threads, "isa": "", "cold": True}
    return [info for info in infos if all(info[key] == value for key, value in wanted.items())]


def line(info: dict) -> str:
    busy = " !" if info.get("others", 0) > 0.05 else ""
    peers = sorted(info["versus"].items(), key=lambda item: item[1])
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in peers)
    cells = (info["shape"].replace("x", "×"), info["format"], f"{info['us']:.0f}{busy}", f"{info['us_through_op']:.0f}",
             f"{info['gbps']:.1f}", f"{info['bandwidth_share']:.0%}", shown or "–")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print("| N×K | format | µs | µs through the op | GB/s | of read bandwidth | peers' time ÷ ours |")
    print("|---|---|---|---|---|---|---|")
    for info in rows(json.loads(args.file.read_text()), args.threads):
        print(line(info))


if __name__ == "__main__":
    main()
