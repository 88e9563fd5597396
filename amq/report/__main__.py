"""`python -m amq.report RUN`: writes the page of a run folder again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from amq.report import write_report
from amq.util.settings import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the files that were written."""
    parser = argparse.ArgumentParser(prog="python -m amq.report", description="Writes the report of a search again.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a search, finished or still running")
    print(*write_report(parser.parse_args(argv).run), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
