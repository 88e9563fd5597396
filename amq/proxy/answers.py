"""How far a configuration agrees with the full-precision model's greedy answers, made smooth: the objective `answers`.

Windows hold prompts and the full-precision model's answers (`amq.model.answers`). With m the margin of an answer's
token, its logit less the largest other one, a configuration writes the token, behind the answer so far, where m ≥ 0. A
search needs to see that m gets smaller before it changes its sign, so every token counts as agreed upon with

    a = min(1, σ(m / WIDTH) / σ(m° / WIDTH))        m°: the full-precision model's margin,

which is 1 where the configuration is as sure of the token as the full-precision model. The loss of an answer is
1 − mean(a), a configuration's the mean over answers: in [0, 1], and 0 for the full-precision model.

Answers end their agreement with the first difference, so that 1 − (a₁ + a₁a₂ + … + a₁…aₙ)/n, the share expected to be
lost behind it, is what a user sees. But it hangs on the first tokens of a few answers: on as many of them it ranks
configurations less as exact agreement on other prompts does (docs/quality.md, benchmarks/objectives.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amq.model.answers import Answer

WIDTH = 1.0
"""Of logits; a half, 2 and 4 rank alike."""


@dataclass(frozen=True)
class AnswerWindows:
    """Prompts and answers as windows of one length, filled up behind their end, where nothing sees it.

    tokens: int64 [answers, length], without the last token of each answer, from which nothing is predicted. scored:
    bool of the same shape, where a token of an answer is predicted. targets: int64 [scored tokens], these tokens in
    order. lengths: of the answers.
    """

    tokens: Tensor
    scored: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(answers: Sequence[Answer]) -> AnswerWindows:
        rows = [(*a.prompt, *a.tokens[:-1]) for a in answers]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            tokens[index, : len(row)] = torch.tensor(row)
            scored[index, len(answer.prompt) - 1 : len(row)] = True
        targets = torch.tensor([token for a in answers for token in a.tokens])
        return AnswerWindows(tokens, scored, targets, tuple(len(a.tokens) for a in answers))


class Agreement:
    """A `Measure` of windows of answers, by their names."""

    def __init__(self, windows: Mapping[str, AnswerWindows]) -> None:
        self._windows = windows

    @property
    def tokens(self) -> dict[str, Tensor]:
        return {name: some.tokens for name, some in self._windows.items()}

    @property
    def scored(self) -> dict[str, Tensor]:
        return {name: some.scored for name, some in self._windows.items()}

    @property
    def hashed(self) -> dict[str, Tensor]:
        """All that decides what is measured, under names of their own."""
        parts = ("tokens", "scored", "targets")
        return {f"{name} {part}": getattr(some, part) for name, some in self._windows.items() for part in parts}

    def of_reference(self, windows: str, rows: slice, logits: Tensor) -> Tensor:
        """ln σ(m° / WIDTH), float32 [tokens]."""
        return _log_sure(logits, self._windows[windows].targets[rows])

    def of_tokens(self, windows: str, rows: slice, reference: Tensor, logits: Tensor) -> Tensor:
        """1 − a, float32 [tokens]."""
        return -(_log_sure(logits, self._windows[windows].targets[rows]) - reference).clamp(max=0).expm1()

    def of_windows(self, windows: str, tokens: Tensor) -> float:
        parts = tokens.double().split(self._windows[windows].lengths)
        return float(torch.stack([part.mean() for part in parts]).mean())


def _log_sure(logits: Tensor, targets: Tensor) -> Tensor:
    """ln σ(m / WIDTH). logits: float32 [tokens, vocabulary]."""
    at = targets[:, None].to(logits.device)
    own = logits.gather(1, at)
    others = logits.scatter(1, at, -torch.inf).amax(-1, keepdim=True)
    return torch.nn.functional.logsigmoid((own - others) / WIDTH)[:, 0]
