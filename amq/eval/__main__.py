"""`python -m amq.eval MODEL…`: one table of perplexities and task figures, and its JSON.

`python -m amq.eval strategies MODEL --output FOLDER`: strategies of bit allocation compared on one model.
`python -m amq.eval order MODEL --output FOLDER`: whether a bank ranks configurations as deployed methods do.
`python -m amq.eval predictor TABLE --output FOLDER`: how large an archive a predictor of losses needs.
"""

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
    if argv and argv[0] in COMPARISONS:
        return COMPARISONS[argv[0]](argv[1:])
    return _evaluate(argv)


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
    from amq.eval.strategies import FILES, run_strategies
    from amq.eval.strategy_table import markdown
    from amq.util.progress import terminal_progress

    return _compare(lambda: markdown(run_strategies(settings, terminal_progress())), settings.output, FILES)


def _order(argv: Sequence[str]) -> int:
    from amq.eval.order_settings import OrderSettings

    settings = OrderSettings.make(**parse_command(argv, OrderSettings))
    from amq.eval.order import FILES, run_order
    from amq.eval.order_table import markdown
    from amq.util.progress import terminal_progress

    return _compare(lambda: markdown(run_order(settings, terminal_progress())), settings.output, FILES)


def _predictor(argv: Sequence[str]) -> int:
    from amq.eval.predictor_settings import PredictorSettings

    settings = PredictorSettings.make(**parse_command(argv, PredictorSettings))
    from amq.eval.predictor import FILES, run_predictor
    from amq.eval.predictor_table import markdown
    from amq.util.progress import terminal_progress

    return _compare(lambda: markdown(run_predictor(settings, terminal_progress())), settings.output, FILES)


COMPARISONS = {"strategies": _strategies, "order": _order, "predictor": _predictor}


def _compare(run: Callable[[], str], output: str, files: Sequence[str]) -> int:
    """Prints the Markdown that `run` gives, and says which files it has left in `output`."""
    try:
        shown = run()
    except KeyboardInterrupt:
        print("interrupted: the figures that are there are kept; the same command goes on", file=sys.stderr)
        return 130
    print(shown, end="")
    print(f"wrote {output}/{', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
