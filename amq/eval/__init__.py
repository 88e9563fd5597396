"""Evaluation: perplexity, tasks and answers of full-precision models, uniform banks, configurations and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from amq.util.lazy import lazy

if TYPE_CHECKING:
    from amq.eval.answers import AnswerRow
    from amq.eval.result import Evaluation, Row, table
    from amq.eval.tasks import TaskRow
    from amq.model.perplexity import negative_log_likelihood, perplexity
    from amq.util.progress import Progress

__all__ = [
    "AnswerRow", "Evaluation", "Row", "TaskRow", "evaluate", "negative_log_likelihood", "perplexity", "table",
]  # fmt: skip
__getattr__ = lazy(
    __name__,
    {
        "AnswerRow": "amq.eval.answers",
        "Evaluation": "amq.eval.result",
        "Row": "amq.eval.result",
        "table": "amq.eval.result",
        "TaskRow": "amq.eval.tasks",
        "negative_log_likelihood": "amq.model.perplexity",
        "perplexity": "amq.model.perplexity",
    },
)


def evaluate(
    model: str | Sequence[str],
    configurations: Sequence[str | PathLike[str]] = (),
    uniform: str = "",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Evaluation:
    """Perplexities on one text, figures of tasks, and agreement of greedy answers.

    settings: further fields of `amq.eval.settings.EvalSettings`, which says what they do.
    Raises AmqError for unusable input before anything is computed; for a tokenizer unlike the first when it is loaded.
    """
    from amq.eval.settings import EvalSettings

    models = (model,) if isinstance(model, str) else tuple(model)
    files = tuple(map(str, configurations))
    made = EvalSettings.make(model=models, configurations=files, uniform=uniform, **settings)
    from amq.eval.run import run_evaluate

    return run_evaluate(made, progress)
