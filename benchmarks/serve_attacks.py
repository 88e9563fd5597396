"""Attacks on a server, as a table: `python benchmarks/serve_attacks.py DIR`, DIR being a folder that amq quantized.

What others notice: the longest pause of somebody's stream, how long a second client's small answer and /health take,
the server's memory; and what the attacker got. `held` says that the row's target was met. An older commit is attacked
from its worktree, with the same flags:

    git worktree add ../before COMMIT
    python benchmarks/serve_attacks.py DIR --source ../before --json before.json

The clients have loopback addresses of their own (127.0.0.2, …), so it wants Linux; and 1,100 connections want as many
files (`ulimit -n`). --smoke takes tiny sizes, and an engine that repeats prompts instead of a model.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from attacks import engine, identity, load
from attacks.bench import MIB, SMOKE, Bench, Row, Size
from provenance import checkout, write_results
from serving import ROOT, Launch

from amq.errors import AmqError
from amq.util.settings import run_command

SCHEMA = "amq/serve_attacks/1"
GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "requests": load.requests,
    "silent": load.silent,
    "names": identity.names,
    "turns": identity.turns,
    "faults": engine.faults,
    "templates": engine.templates,
}
OWN_FILES = 300
"""Descriptors that this process needs beside the silent connections."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if bool(args.folder) == args.smoke:
        raise AmqError("give a folder that amq quantized, or --smoke")
    size = SMOKE if args.smoke else Size()
    groups = args.only.split(",") if args.only else list(GROUPS)
    if unknown := set(groups) - set(GROUPS):
        raise AmqError(f"unknown group {min(unknown)!r}: there are {', '.join(GROUPS)}")
    open_files(size.idle + OWN_FILES)
    how = Launch(args.python, args.source.resolve())
    bench = Bench(args.folder, shlex.split(args.server_args), size, how)
    rows = []
    for group in groups:
        for row in GROUPS[group](bench):
            print(f"{row.attack}: {row.verdict}: {row.happened}", file=sys.stderr, flush=True)
            rows.append(row)
    print(table(rows))
    if args.json:
        attacked = {"commit": checkout(args.source)[0], "server_args": args.server_args}
        write_results(args.json, {"schema": SCHEMA, "attacked": attacked, "rows": [row.json() for row in rows]})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, metavar="DIR", help="the checkpoint to serve")
    add("--server-args", default="--context 2048", metavar="ARGS", help="for every server (default: %(default)s)")
    add("--source", type=Path, default=ROOT, metavar="DIR", help="checkout whose amq is attacked (default: this one)")
    add("--python", default=sys.executable, metavar="FILE", help="that runs it (default: this one)")
    add("--only", metavar="LIST", help=f"of {', '.join(GROUPS)}")
    add("--json", type=Path, metavar="FILE", help="write the table's figures")
    add("--smoke", action="store_true", help="tiny sizes, no model: checks the benchmark, measures nothing")
    return parser


def open_files(wanted: int) -> None:
    """Lets this process open so many. Raises AmqError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise AmqError(f"this needs {wanted} open files, the limit is {hard}: raise it (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def table(rows: Sequence[Row]) -> str:
    """Markdown. Two figures: quiet → under attack."""
    lines = [
        "| attack | stream's longest pause, s | second client, s | /health, s | memory, MiB | what came of it | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = ["", "", ""]
        if row.quiet and row.seen:
            figures = [
                f"{getattr(row.quiet, name):.2f} → {getattr(row.seen, name):.2f}"
                for name in ("pause", "second", "health")
            ]
        sizes = f"{row.memory[0] / MIB:.0f} → {row.memory[1] / MIB:.0f}" if row.memory else ""
        cells = [f"{row.attack}: {row.did}", *figures, sizes, row.happened, f"**{row.verdict}**"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "⏎") for cell in cells) + " |")
    held, tried = sum(row.good is True for row in rows), sum(row.good is not None for row in rows)
    return "\n".join([*lines, "", f"{held} of {tried} held, {len(rows) - tried} left out"])


if __name__ == "__main__":
    sys.exit(run_command(main))
