"""`python -m amq.eval MODEL…`: one table of perplexities and task figures, and its JSON."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from amq.eval.settings import EvalCommand, EvalSettings
from amq.util.files import check_file
from amq.util.settings import parse_command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
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
