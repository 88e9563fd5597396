"""Answers of a form of a model beside the full-precision model's: how long they agree, and whether they end.

`amq.model.answers` says what is asked and what agreeing means. Agreement takes one pass over prompts and answers; to
see whether its own answers end, each form really writes them, up to the same bound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from amq.errors import AmqError
from amq.model.answers import HELD_OUT, Answers, Writer, agreement, find_beginnings, open_answers, thoughts_end
from amq.model.open import LoadedModel
from amq.model.opened import OpenModel
from amq.util.progress import Progress


@dataclass(frozen=True)
class AnswerRow:
    """model: the name of its row in the perplexity table. answers: how many there are.

    tokens, until_difference: of the full-precision model's answers, end token included, and those of them that this
        form writes too until the first that it does not; means over answers. stderr: of `until_difference`.
    equal: share of answers that are the full-precision model's, to the end or the bound.
    ended: share of this form's own answers with an end token before the bound.
    thoughts: answers of the full-precision model that have thoughts in them; closed: share of these prompts at which
        this form ends its thoughts before the bound, None where there are none.
    """

    model: str
    answers: int
    tokens: float
    until_difference: float
    stderr: float | None
    equal: float
    ended: float
    thoughts: int
    closed: float | None


class AnswerRunner:
    """count: of answers. limit: tokens of each. seed: of what is drawn. `prepare` before any `run`."""

    def __init__(self, count: int, limit: int, seed: int, progress: Progress) -> None:
        self._count, self._limit, self._seed, self._progress = count, limit, seed, progress
        self._answers: Answers | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked: for the file."""
        found = self._prepared
        return {"count": len(found.items), "limit": found.limit, "seed": self._seed, "kind": found.kind,
                "sha256": found.sha256}  # fmt: skip

    @property
    def _prepared(self) -> Answers:
        assert self._answers is not None, "a full-precision model comes first"
        return self._answers

    def prepare(self, opened: OpenModel) -> None:
        """The answers of the first full-precision model are those that all are compared with; to be called while
        nothing is swapped in. Raises AmqError for a model that is asked in other tokens."""
        if self._answers is not None:
            self.check(opened.loaded)
            return
        self._answers = open_answers(
            opened.loaded, self._count, self._limit, self._seed, opened.fingerprint, HELD_OUT, self._progress
        )

    def check(self, loaded: LoadedModel) -> None:
        """Raises AmqError for a model whose tokenizer or chat template asks otherwise."""
        own, first = find_beginnings(loaded), self._prepared.beginnings
        if (own.prefix, own.openings) != (first.prefix, first.openings):
            raise AmqError(
                f"{loaded.name} gives the questions of --answers other tokens than the first model, by its tokenizer "
                "or its chat template, so that answers do not compare: evaluate them apart"
            )

    def run(self, loaded: LoadedModel, name: str) -> AnswerRow:
        """Of the model as it is now."""
        answers = self._prepared
        agreed = agreement(loaded.model, answers)
        own = Writer(loaded.model).write(answers.prompts, answers.limit, answers.ends)
        count = len(answers.items)
        equal = sum(n == len(item.tokens) for n, item in zip(agreed, answers.items, strict=True))
        ended = sum(tokens[-1] in answers.ends for tokens in own)
        thoughts = list(_thoughts(loaded, answers, own))
        return AnswerRow(
            name, count, statistics.fmean(len(item.tokens) for item in answers.items), statistics.fmean(agreed),
            statistics.stdev(agreed) / math.sqrt(count) if count > 1 else None, equal / count, ended / count,
            len(thoughts), statistics.fmean(thoughts) if thoughts else None,
        )  # fmt: skip


def _thoughts(loaded: LoadedModel, answers: Answers, own: list[tuple[int, ...]]) -> Iterator[bool]:
    """Whether this form ends its thoughts, for each answer of the full-precision model that has some."""

    def text(tokens: tuple[int, ...]) -> str:
        return str(loaded.tokenizer.decode(list(tokens), skip_special_tokens=False))

    for item, tokens in zip(answers.items, own, strict=True):
        prompt = text(item.prompt)
        if thoughts_end(prompt, text(item.tokens)) is not None:
            yield thoughts_end(prompt, text(tokens)) is True
