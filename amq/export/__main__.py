"""`amq export DIR --to FORMAT --output OUT`: a checkpoint for other tools."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from amq.export.settings import ExportSettings
from amq.util.settings import parse_command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    settings = ExportSettings(**parse_command(argv, ExportSettings))
    from amq.export.run import run_export

    for phrase, value in run_export(settings).items():
        print(f"{phrase}: {value}")
    print(f"written to {settings.output}; its README.md says how to load it")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
