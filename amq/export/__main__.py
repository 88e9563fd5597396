"""`python -m amq.export DIR --to FORMAT --output OUT`: a checkpoint for other tools."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from amq.export import EXPORTS, export
from amq.util.settings import run_command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m amq.export",
        description="Writes a quantized checkpoint as what another tool loads.",
        epilog="formats: " + "; ".join(f"{name}: {entry.help}" for name, entry in EXPORTS.items()),
    )
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a folder written by amq.quantize; only read")
    parser.add_argument("--to", required=True, choices=list(EXPORTS), help="the target")
    parser.add_argument("--output", required=True, type=Path, metavar="OUT", help="a new or empty folder")
    args = parser.parse_args(argv)
    facts = export(args.checkpoint, args.to, args.output)
    for phrase, value in facts.items():
        print(f"{phrase}: {value}")
    print(f"written to {args.output}; its README.md says how to load it")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
