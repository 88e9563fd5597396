"""Evaluation: perplexity and tasks of full-precision models, uniform banks, configurations and checkpoints."""

from amq.eval.result import Evaluation, Row, table
from amq.eval.run import evaluate
from amq.eval.tasks import TaskRow, TaskSettings
from amq.model.perplexity import negative_log_likelihood, perplexity

__all__ = [
    "Evaluation", "Row", "TaskRow", "TaskSettings", "evaluate", "negative_log_likelihood", "perplexity", "table",
]  # fmt: skip
