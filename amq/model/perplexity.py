"""Perplexity: exp of the mean negative log-likelihood over disjoint windows (stride = window).

In every window of L tokens the last L − 1 are predicted from those before them in the same window. Where the tokenizer
begins a text with BOS (or more), so does every window, and predictions made at that position do not count: a window
[BOS, t1, …] is scored from t2 on, which is predicted from BOS and t1. So the same tokens count with BOS as without,
each behind at least one token of text, and no window is charged for a first token that nobody could guess.

llama.cpp's `perplexity` counts likewise, but for two things: it puts BOS in the place of each window's first token
instead of before it, and by default it counts the second half of each window only. lm-eval's `loglikelihood_rolling`
puts BOS (or EOS, for a tokenizer that adds nothing) before the text once, scores the first token of the text from it,
and begins every later window with the last token of the one before. tests/test_prefix.py counts in all three ways.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amq.model.blocks import TOKENS, BlockRunner
from amq.model.inventory import embedding_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def perplexity(model: PreTrainedModel, windows: Tensor, unscored: int = 0) -> float:
    """exp of `negative_log_likelihood`."""
    return exp(negative_log_likelihood(model, windows, unscored))


def exp(loss: float) -> float:
    # a broken model's mean log-likelihood can exceed what exp can hold; infinity is then the honest perplexity
    return math.inf if loss > 700 else math.exp(loss)


def negative_log_likelihood(model: PreTrainedModel, windows: Tensor, unscored: int = 0) -> float:
    """Mean over the last length − 1 − unscored tokens of every window, nats; logits of `TOKENS` tokens at a time.

    windows: int64 [n, length]. unscored: leading positions whose predictions do not count, `Corpus.unscored`.
    """
    runner = BlockRunner(model)
    device = embedding_weight(model).device
    total = 0.0
    with torch.no_grad():
        batches = windows.to(device).split(1)
        for window, final in zip(batches, runner.final(batches), strict=True):
            scored, wanted = final[0, unscored:-1], window[0, unscored + 1 :]
            for states, labels in zip(scored.split(TOKENS), wanted.split(TOKENS), strict=True):
                logits = runner.logits(states).float()
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / (len(windows) * (windows.shape[1] - 1 - unscored))
