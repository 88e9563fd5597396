"""`python -m amq.report RUN`: writes the page of a run folder again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from amq.errors import AmqError
from amq.report import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the files that were written; 2 where the run cannot be shown."""
    parser = argparse.ArgumentParser(prog="python -m amq.report", description="Write the report of a search again.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder that a search wrote or is writing")
    try:
        for path in write_report(parser.parse_args(argv).run):
            print(path)
    except AmqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
