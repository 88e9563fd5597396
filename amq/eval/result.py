"""What an evaluation gives: rows of perplexities and of task figures, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from amq.eval.tasks import TaskRow


@dataclass(frozen=True)
class Row:
    """One model of the table. weight_bytes: all weights, linears as stored, everything else in 16 bits.

    perplexity, negative_log_likelihood: None where no text was asked for.
    """

    name: str
    bits_per_weight: float
    perplexity: float | None
    negative_log_likelihood: float | None
    weight_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """rows: per model as given: full, uniform formats, configurations; or a checkpoint in the runtime, dequantized.

    settings: text, window, tokens and bank. tasks: every figure of every task, for each row in order.
    """

    rows: list[Row]
    settings: dict[str, Any]
    tasks: tuple[TaskRow, ...] = ()

    def json(self) -> dict[str, Any]:
        """JSON has no infinity: a figure that is not finite is null."""

        def finite(row: Row | TaskRow) -> dict[str, Any]:
            values = asdict(row).items()
            return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values}

        data = {"schema": "amq/eval/1", "settings": self.settings, "rows": [finite(row) for row in self.rows]}
        return data | ({"tasks": [finite(row) for row in self.tasks]} if self.tasks else {})


def table(result: Evaluation) -> str:
    """The rows as aligned text."""
    return "\n".join([*_perplexities(result), *_task_figures(result)])


def _perplexities(result: Evaluation) -> Iterator[str]:
    s = result.settings
    width = max(len(r.name) for r in result.rows) if result.rows else 4
    if s["text"]:
        window = f"window = stride = {s['window_length']}"
        if s["window_prefix"]:
            window = f"window {s['window_length']}, {' '.join(s['window_prefix'])} and {s['stride']} of text"
        yield f"perplexity on {s['text']}: {s['tokens']} tokens, {window}"
    yield f"{'':{width}}  bits/weight  weights MiB" + ("  perplexity" if s["text"] else "")
    for row in result.rows:
        shown = "" if row.perplexity is None else f"  {row.perplexity:10.3f}"
        yield f"{row.name:{width}}  {row.bits_per_weight:11.3f}  {row.weight_bytes / 2**20:11.1f}{shown}"


def _task_figures(result: Evaluation) -> Iterator[str]:
    if not result.tasks:
        return
    widths = {n: max(len(getattr(row, n)) for row in result.tasks) for n in ("model", "task", "metric")}
    yield f"tasks of lm-eval {result.settings['tasks']['lm_eval']}, value ± standard error"
    for row in result.tasks:
        names = "  ".join(f"{getattr(row, n):{width}}" for n, width in widths.items())
        error = "" if row.stderr is None else f" ± {row.stderr:.4f}"
        notes = ["group" if row.count is None else f"{row.count} questions"]
        notes += [f"{row.num_fewshot}-shot"] if row.num_fewshot else []
        notes += [row.filter] if row.filter != "none" else []
        yield f"{names}  {row.value:8.4f}{error}  ({', '.join(notes)})"
