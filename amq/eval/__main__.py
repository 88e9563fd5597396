"""`python -m amq.eval MODEL…`: one table of perplexities and task figures, and its JSON."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from amq.eval.settings import EvalCommand, EvalSettings
from amq.util.files import check_file
from amq.util.settings import parse_command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    command = COMMANDS.get(argv[0]) if argv else None
    return command(argv[1:]) if command else _evaluate(argv)


def _order(argv: Sequence[str]) -> int:
    from amq.eval.order import main

    return main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"order": _order}
"""Sub-commands, which import their modules when they run; a first argument that is none of them is a model."""


def _evaluate(argv: Sequence[str]) -> int:
    given = parse_command(argv, EvalSettings, EvalCommand)
    path = given.pop("json", None)
    check_file(path, "--json")
    from amq.eval import evaluate, table
    from amq.util.progress import terminal_progress

    result = evaluate(**given, progress=terminal_progress())
    print(table(result))
    if path:
        result.write(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
