"""What is measured of every form of a model: perplexity on one text, tasks, and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from amq.errors import AmqError
from amq.eval.answers import AnswerRow, AnswerRunner
from amq.eval.result import Row
from amq.eval.simulated import Simulated
from amq.eval.tasks import TaskRow, TaskRunner
from amq.model.blocks import BlockRunner
from amq.model.inventory import embedding_weight
from amq.model.open import LoadedModel
from amq.model.perplexity import exp, negative_log_likelihood
from amq.model.text import fixed_windows, load_corpus
from amq.util.progress import Progress


@dataclass(frozen=True)
class Form:
    """One form of a loaded model, a row of the table: `apply` puts it into the model, and it is measured inside of what
    `within` makes."""

    name: str
    bits_per_weight: float
    weight_bytes: int
    apply: Callable[[], object] = lambda: None
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    simulated: Simulated | None = None


@dataclass
class Measure:
    """text: empty for no perplexity. tasks, answers: None for none. The first model's tokenizer sets the windows."""

    text: str
    window_length: int
    max_tokens: int
    tasks: TaskRunner | None
    answers: AnswerRunner | None
    progress: Progress
    rows: list[Row] = field(default_factory=list)
    task_rows: list[TaskRow] = field(default_factory=list)
    answer_rows: list[AnswerRow] = field(default_factory=list)
    windows: Tensor | None = None
    window_prefix: tuple[str, ...] = ()
    """Tokens that every window begins with; they are not scored."""

    @property
    def tokens(self) -> int:
        """Of text, in all windows."""
        return 0 if self.windows is None else self.windows[:, len(self.window_prefix) :].numel()

    def prepare(self, loaded: LoadedModel) -> None:
        """Refuses a model that cannot be measured like those before it; to be called while nothing is swapped in."""
        if not self.text:
            return
        corpus = load_corpus(self.text, loaded.tokenizer, loaded.embedding_rows)
        windows = fixed_windows(corpus, self.window_length, self.max_tokens)
        if self.windows is not None and not windows.equal(self.windows):
            raise AmqError(
                f"{loaded.name} splits the text {self.text!r} into other tokens than the model before it, so that "
                "perplexities per token do not compare: evaluate them apart"
            )
        self.windows, self.window_prefix = windows, corpus.prefix_names
        BlockRunner(loaded.model).check(windows[:1, :32].to(embedding_weight(loaded.model).device))

    def run(self, loaded: LoadedModel, forms: Sequence[Form]) -> None:
        what = "perplexity" if self.text else "tasks" if self.tasks else "answers"
        with self.progress.stage(what, len(forms)) as step:
            for form in forms:
                form.apply()
                with form.within():
                    perplexity = self._measure(loaded, form)
                step(form.name if perplexity is None else f"{form.name}: {perplexity:.3f}")

    def _measure(self, loaded: LoadedModel, form: Form) -> float | None:
        """Adds the rows of a form that is in the model; returns its perplexity."""
        loss = self._loss(loaded)
        perplexity, bits = None if loss is None else exp(loss), round(form.bits_per_weight, 4)
        self.rows.append(Row(form.name, bits, perplexity, loss, form.weight_bytes, form.simulated))
        if self.tasks:
            self.task_rows += self.tasks.run(loaded, form.name)
        if self.answers:
            self.answer_rows.append(self.answers.run(loaded, form.name))
        return perplexity

    def _loss(self, loaded: LoadedModel) -> float | None:
        if self.windows is None:
            return None
        return negative_log_likelihood(loaded.model, self.windows, len(self.window_prefix))
