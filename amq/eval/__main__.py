"""`python -m amq.eval MODEL…`: one table of perplexities and task figures, and its JSON.

`python -m amq.eval strategies MODEL --output FOLDER`: strategies of bit allocation compared on one model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from amq.eval.settings import EvalCommand, EvalSettings
from amq.util.files import check_file
from amq.util.settings import parse_command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return _strategies(argv[1:]) if argv[:1] == ["strategies"] else _evaluate(argv)


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


def _strategies(argv: Sequence[str]) -> int:
    from amq.eval.strategy_settings import StrategySettings

    settings = StrategySettings.make(**parse_command(argv, StrategySettings))
    from amq.eval.strategies import run_strategies
    from amq.eval.strategy_table import markdown
    from amq.util.progress import terminal_progress

    try:
        table = run_strategies(settings, terminal_progress())
    except KeyboardInterrupt:
        print("interrupted: the rows that are done are kept; the same command goes on", file=sys.stderr)
        return 130
    print(markdown(table), end="")
    print(f"wrote {settings.output}/strategies.json, strategies.md, strategies.png, report.html")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
