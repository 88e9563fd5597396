"""Perplexity: exp of the mean negative log-likelihood over disjoint windows (stride = window).

In every window of L tokens the last L − 1 are predicted from those before them in the same window.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amq.blocks import TOKENS, BlockRunner


def perplexity(model: torch.nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood per predicted token; windows: int64 [n, length]."""
    return exp(negative_log_likelihood(model, windows))


def exp(loss: float) -> float:
    # a broken model's mean log-likelihood can exceed what exp can hold; infinity is then the honest perplexity
    return math.inf if loss > 700 else math.exp(loss)


def negative_log_likelihood(model: torch.nn.Module, windows: Tensor) -> float:
    """Mean over the last length − 1 tokens of every window, nats; logits of `TOKENS` tokens at a time."""
    runner = BlockRunner(model)
    device = model.get_input_embeddings().weight.device
    total = 0.0
    with torch.no_grad():
        for window in windows.to(device).split(1):
            hidden = runner.hidden(window, runner.n_blocks)[0, :-1]
            for states, labels in zip(hidden.split(TOKENS), window[0, 1:].split(TOKENS), strict=True):
                logits = runner.logits(states).float()
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / (len(windows) * (windows.shape[1] - 1))
