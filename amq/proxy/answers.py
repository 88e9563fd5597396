"""How long greedy answers agree with the full-precision model's, made smooth: the objective `answers`.

Windows hold prompts and the full-precision model's answers (`amq.model.answers`). With m the margin of an answer's
token, its logit less the largest other one, a configuration writes the token where m ≥ 0. A search needs to see that m
gets smaller before it changes its sign, and exact agreement of a few answers takes few values. So every token counts as
agreed upon with

    a = min(1, σ(m / WIDTH) / σ(m° / WIDTH))        m°: the full-precision model's margin,

which is 1 where the configuration is as sure of the token as the full-precision model, and the loss of an answer of n
tokens is 1 − (a₁ + a₁a₂ + … + a₁…aₙ)/n: what is expected to be lost of the share of tokens until the first difference.
A configuration's loss is the mean over answers, in [0, 1], and 0 for the full-precision model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amq.model.answers import Answer

WIDTH = 1.0
"""Of logits. Of those tried, the one that ranks most as exact agreement on other prompts does (docs/quality.md)."""


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
        """ln a, float32 [tokens]."""
        return (_log_sure(logits, self._windows[windows].targets[rows]) - reference).clamp(max=0)

    def of_windows(self, windows: str, tokens: Tensor) -> float:
        parts = tokens.double().split(self._windows[windows].lengths)
        kept = torch.stack([part.cumsum(0).exp().mean() for part in parts])
        return 1 - float(kept.mean())


def _log_sure(logits: Tensor, targets: Tensor) -> Tensor:
    """ln σ(m / WIDTH). logits: float32 [tokens, vocabulary]."""
    at = targets[:, None].to(logits.device)
    own = logits.gather(1, at)
    others = logits.scatter(1, at, -torch.inf).amax(-1, keepdim=True)
    return torch.nn.functional.logsigmoid((own - others) / WIDTH)[:, 0]
