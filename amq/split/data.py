"""Which windows of the text a step trains on: a function of seed and step alone, the same on every machine.

The order of an epoch is that of hashes, not of a random generator whose stream a library may change.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from amq.errors import AmqError
from amq.model.text import Corpus, fixed_windows

HELD_OUT = 10
"""One window in as many is never trained on: the last ones of the text."""


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, samples: int) -> tuple[int, ...]:
    def key(sample: int) -> bytes:
        return hashlib.blake2b(f"{seed} {epoch} {sample}".encode(), digest_size=8).digest()

    return tuple(sorted(range(samples), key=key))


def samples_of(seed: int, samples: int, batch: int, step: int) -> list[int]:
    """The `batch` samples of a step, each in [0, samples); every epoch has all samples once, in an order of its own."""
    places = range(step * batch, (step + 1) * batch)
    return [_order(seed, place // samples, samples)[place % samples] for place in places]


def label_type(rows: int) -> np.dtype[Any]:
    """As what token ids go over the wire; rows: of the model's embedding."""
    return np.dtype("<u2" if rows <= 1 << 16 else "<u4")


def windows_of(corpus: Corpus, length: int, samples: int) -> tuple[Tensor, Tensor]:
    """(windows to train on, windows held out), int64 [n, length] each.

    samples: how many of the former, from the first on; 0 for all. Raises AmqError where the text has fewer.
    """
    whole = fixed_windows(corpus, length, len(corpus.tokens))
    held_out = max(1, len(whole) // HELD_OUT)
    train = whole[: len(whole) - held_out]
    if len(train) < max(1, samples):
        raise AmqError(
            f"the text {corpus.name!r} has {len(train)} windows of {length} tokens beside those held out: expected "
            f"{max(1, samples)}; give a longer text, a smaller --window-length or fewer --samples"
        )
    return train[: samples or len(train)], whole[len(whole) - held_out :]
