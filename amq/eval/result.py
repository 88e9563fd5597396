"""What an evaluation gives: rows of perplexities, of task figures and of answers, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from amq.eval.answers import AnswerRow
from amq.eval.simulated import Simulated
from amq.eval.tasks import TaskRow
from amq.quantize.bank import BankRecipe
from amq.util.files import write_json
from amq.util.records import JsonFile, to_json


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What was measured, and how; tokens: of the text, scored or not; stride: tokens of text in each window.

    window_prefix: tokens that every window begins with, not scored. bank: what the quantized forms of a plain model
    came from, None where checkpoints were measured. tasks: the settings of the tasks, and lm-eval's version.
    answers: how many there are, of how many tokens at most, to which prompts.
    """

    model: str
    text: str
    tokens: int
    window_length: int
    stride: int
    window_prefix: tuple[str, ...]
    backend: str
    activations: str
    bank: BankRecipe | None = None
    tasks: dict[str, Any] | None = None
    answers: dict[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """One model of the table. weight_bytes: all weights, linears as stored, everything else in 16 bits.

    perplexity, negative_log_likelihood: None where no text was asked for; a file has None where they are not finite.
    simulated: what no kernel computes, and was rounded in torch for this row; None for what runs so.
    """

    name: str
    bits_per_weight: float
    perplexity: float | None
    negative_log_likelihood: float | None
    weight_bytes: int
    simulated: Simulated | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(JsonFile):
    """What `python -m amq.eval --json` writes.

    rows: per model as given: full, with simulated activations, uniform formats, configurations; or a checkpoint in the
        runtime, dequantized, with simulated activations.

    settings: text, window, tokens and bank. tasks: every figure of every task, for each row in order. answers: one row
    for each of `rows`, where they were asked for.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/eval/1",)

    schema: str = SCHEMAS[0]
    settings: EvaluationSettings
    rows: tuple[Row, ...]
    tasks: tuple[TaskRow, ...] = ()
    answers: tuple[AnswerRow, ...] = ()

    def write(self, path: Path) -> None:
        """JSON has no infinity: a figure that is not finite is written as null."""
        data = to_json(self)
        figures = {name: [_finite(row) for row in data[name]] for name in ("rows", "tasks")}
        write_json(path, data | figures)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}


def table(result: Evaluation) -> str:
    """The rows as aligned text."""
    return "\n".join([*_perplexities(result), *_task_figures(result), *_answers(result)])


def _perplexities(result: Evaluation) -> Iterator[str]:
    s = result.settings
    width = max(len(r.name) for r in result.rows) if result.rows else 4
    if s.text:
        window = f"window = stride = {s.window_length}"
        if s.window_prefix:
            window = f"window {s.window_length}, {' '.join(s.window_prefix)} and {s.stride} of text"
        yield f"perplexity on {s.text}: {s.tokens} tokens, {window}"
    yield f"{'':{width}}  bits/weight  weights MiB" + ("  perplexity" if s.text else "")
    for row in result.rows:
        shown = "" if row.perplexity is None else f"  {row.perplexity:10.3f}"
        yield f"{row.name:{width}}  {row.bits_per_weight:11.3f}  {row.weight_bytes / 2**20:11.1f}{shown}"


def _task_figures(result: Evaluation) -> Iterator[str]:
    if not result.tasks:
        return
    version = (result.settings.tasks or {}).get("lm_eval", "of an unknown version")
    widths = {n: max(len(getattr(row, n)) for row in result.tasks) for n in ("model", "task", "metric")}
    yield f"tasks of lm-eval {version}, value ± standard error"
    for row in result.tasks:
        names = "  ".join(f"{getattr(row, n):{width}}" for n, width in widths.items())
        error = "" if row.stderr is None else f" ± {row.stderr:.4f}"
        notes = ["group" if row.count is None else f"{row.count} questions"]
        notes += [f"{row.num_fewshot}-shot"] if row.num_fewshot else []
        notes += [row.filter] if row.filter != "none" else []
        value = f"{'broken':>8}" if row.value is None else f"{row.value:8.4f}"
        yield f"{names}  {value}{error}  ({', '.join(notes)})"


def _answers(result: Evaluation) -> Iterator[str]:
    if not result.answers:
        return
    of = result.settings.answers or {}
    yield f"greedy answers to {of.get('count')} prompts ({of.get('kind')}), of at most {of.get('limit')} tokens"
    width = max(len(row.model) for row in result.answers)
    thinks = any(row.thoughts for row in result.answers)
    yield f"{'':{width}}  until first difference  equal   ended" + "  thoughts closed" * thinks
    for row in result.answers:
        error = "" if row.stderr is None else f"± {row.stderr:.1f} "
        closed = f"  {'' if row.closed is None else f'{row.closed:.1%}':>15}" * thinks
        agreed = f"{row.until_difference:.1f} {error}of {row.tokens:.1f}"
        yield f"{row.model:{width}}  {agreed:>22}  {row.equal:5.1%}  {row.ended:6.1%}{closed}"
