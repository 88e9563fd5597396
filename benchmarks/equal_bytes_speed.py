"""Decode tokens/s of the rows of `equal_bytes.py`, in turn: a round visits every row, in a process that ends with it.

The first round tries all ways in which a peer can run its file (`WAYS`), the others take the fastest of each. A row's
figure is the median of its rounds; `others` is the largest share of the cores' time that other processes had meanwhile,
and a row with more than 5 % is no figure to quote.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

from equal_bytes_make import AUTOROUND, ENGINES, OURS

from amq.bench.cases import Case
from amq.bench.own import OwnEngine
from amq.bench.peers import ik_llama, llama_cpp
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError

WAYS: dict[str, Sequence[Any]] = {
    llama_cpp.NAME: [
        llama_cpp.Configuration(layout, flash) for layout in ("own choice", "as stored") for flash in (True, False)
    ],
    ik_llama.NAME: ik_llama.CONFIGURATIONS,
}


def measure_speeds(content: dict[str, Any], args: argparse.Namespace) -> None:
    """Adds `speed` to those rows of `content` that --rows names."""
    wanted = args.rows.split(",")
    rows = [row for row in content["rows"] if any(fnmatch(row["name"], pattern) for pattern in wanted)]
    rows = [row for row in rows if row["engine"] in (OURS, AUTOROUND, *WAYS)]
    if not rows:
        raise AmqError(f"--rows {args.rows}: none of these is in {args.json} and can be run; make it first")
    ways: dict[str, dict[str, list[dict[str, Any]]]] = {row["name"]: {} for row in rows}
    for turn in range(args.rounds):
        for row in rows:
            tried = ways[row["name"]]
            for way in WAYS.get(row["engine"], [None]) if turn == 0 else [_fastest(tried, row)]:
                tried.setdefault(str(way), []).append(_visit(row, way, turn, args))
            print(f"round {turn + 1}, {row['name']}: {tried}", file=sys.stderr, flush=True)
    for row in rows:
        tried = ways[row["name"]]
        best = str(_fastest(tried, row))
        rates = [visit["rate"] for visit in tried[best]]
        shares = [visit["others"] for visit in tried[best] if visit["others"] is not None]
        row["speed"] = {
            "tokens_per_second": statistics.median(rates), "least": min(rates), "most": max(rates),
            "way": best, "others": max(shares, default=None), "threads": args.threads, "tokens": args.generate,
        }  # fmt: skip


def _fastest(tried: dict[str, list[dict[str, Any]]], row: dict[str, Any]) -> Any:
    """The way that was the fastest in the first round. Raises AmqError where none ran."""
    ways = WAYS.get(row["engine"], [None])
    best = max(ways, key=lambda way: tried[str(way)][0]["rate"])
    if not tried[str(best)][0]["rate"]:
        raise AmqError(f"{row['name']} runs in no way: {tried[str(best)][0]['failed']}")
    return best


def _visit(row: dict[str, Any], way: Any, turn: int, args: argparse.Namespace) -> dict[str, Any]:
    """{rate: tokens/s, others}, the second of two runs; rate 0 and `failed` where it does not run."""
    path, case = str(args.work / row["path"]), Case(True, args.generate)
    options = {"context": case.positions, "max_sequences": 1, "threads": args.threads}
    arguments = (path, args.seed, options) if way is None else (path, args.threads, way, args.seed)
    try:
        with ChildProcess(OwnEngine if way is None else ENGINES[row["engine"]], *arguments) as worker:
            worker.call("measure", case, 2 * turn)
            found = worker.call("measure", case, 2 * turn + 1)
    except (AmqError, ChildFailed) as error:
        return {"rate": 0.0, "others": None, "failed": str(error).splitlines()[-1]}
    return {"rate": case.tokens / found["seconds"], "others": found["others"]}
