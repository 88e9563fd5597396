"""`python -m amq.split serve|train|eval|report …`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from amq.split.settings import (
    ServeSettings,
    SplitEvalSettings,
    SplitReportSettings,
    SplitSettings,
    TrainSettings,
)
from amq.util.settings import parse_command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    parse_command(argv, SplitSettings)  # its help, or its error
    raise AssertionError("argparse knows more actions than there are commands")


def _serve(argv: Sequence[str]) -> int:
    settings = ServeSettings(**parse_command(argv, ServeSettings))
    from amq.split.run import run_serve
    from amq.util.progress import terminal_progress

    run_serve(settings, terminal_progress())
    return 0


def _train(argv: Sequence[str]) -> int:
    settings = TrainSettings(**parse_command(argv, TrainSettings))
    from amq.split.run import run_train
    from amq.util.progress import terminal_progress

    print(f"wrote {run_train(settings, terminal_progress())}")
    return 0


def _eval(argv: Sequence[str]) -> int:
    settings = SplitEvalSettings(**parse_command(argv, SplitEvalSettings))
    from amq.split.evaluate import run_evaluate, table
    from amq.util.progress import terminal_progress

    print(table(run_evaluate(settings, terminal_progress())))
    return 0


def _report(argv: Sequence[str]) -> int:
    settings = SplitReportSettings(**parse_command(argv, SplitReportSettings))
    from amq.split.report import write_report

    output = None if settings.output is None else Path(settings.output)
    print(*write_report([Path(run) for run in settings.runs], output), sep="\n")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve, "train": _train, "eval": _eval, "report": _report,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(run_command(main))
