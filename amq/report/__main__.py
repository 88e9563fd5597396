"""`amq report RUN`: writes the page of a run folder again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from amq.report.settings import ReportSettings
from amq.util.settings import parse_command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the files that were written."""
    settings = ReportSettings(**parse_command(argv, ReportSettings))
    from amq.report import write_report

    print(*write_report(Path(settings.run)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
