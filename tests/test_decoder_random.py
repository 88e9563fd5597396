"""Decoders of random steps and odd sizes: what a token gives depends neither on threads, nor on what shares its passes,
nor on how its text is cut into them, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.random_specs import PAGE, RandomDecoder, memory

from amq.kernels.cpu import NO_MEMORY, cpu_module

CONTEXT, THREADS, SEQUENCES = 200, 4, 3
Numbers = np.ndarray[Any, Any]


class Run:
    """Sequences with pages and states of their own; a part of one is (sequence, position, tokens)."""

    def __init__(self, made: RandomDecoder, isa: str) -> None:
        self.made, self.isa = made, isa
        pages = -(-CONTEXT // PAGE) + made.decoder.spare_pages + made.decoder.first_pages
        self.pages = made.random.permutation(SEQUENCES * pages).astype(np.int32).reshape(SEQUENCES, pages)
        self.cache = np.full(max(1, SEQUENCES * pages * made.decoder.page_bytes), 0x7F, np.uint8)
        self.states = np.full((SEQUENCES, max(1, made.decoder.state_floats)), np.nan, np.float32)

    def forward(self, parts: Sequence[tuple[int, int, Numbers]], threads: int) -> list[Numbers]:
        """Logits of every token, part by part. The second sequence is a long text."""
        tokens = np.concatenate([part[2] for part in parts]).astype(np.int32)
        logits = np.full((len(tokens), self.made.spec.vocabulary), np.nan, np.float32)
        segments: list[Any] = [
            (len(text), position, memory(self.pages[i]), i == 1, i, []) for i, position, text in parts
        ]  # fmt: skip
        self.made.decoder.forward(
            memory(tokens), segments, list(range(len(tokens))), memory(logits), memory(self.cache),
            memory(self.states) if self.made.decoder.state_floats else NO_MEMORY, threads, self.isa,
        )  # fmt: skip
        return np.split(logits, np.cumsum([len(part[2]) for part in parts])[:-1])


@pytest.mark.parametrize(
    ("seed", "cache"), [*((seed, None) for seed in range(16)), *((seed, "int4") for seed in range(16, 28))]
)
def test_a_token_depends_on_its_text_alone(seed: int, cache: str | None) -> None:
    """cache: of what kind; None: any, each step's its own. That whose keys are rounded by the page has the most that
    passes could change."""
    made = RandomDecoder(seed, CONTEXT, THREADS, cache)
    isa, most = made.pick(*cpu_module().isas()), made.max_rows
    lengths = [made.pick(1, 2, 5, 17, 70, 150) for _ in range(SEQUENCES)]
    texts = [made.random.integers(0, made.spec.vocabulary, length) for length in lengths]
    alone, together = Run(made, isa), Run(made, isa)
    expected = [
        np.concatenate([alone.forward([(i, at, text[at : at + most])], 1)[0] for at in range(0, len(text), most)])
        for i, text in enumerate(texts)
    ]
    assert all(np.isfinite(logits).all() for logits in expected)
    done = [0] * SEQUENCES
    while done != lengths:
        room, parts = most, []
        for i in made.random.permutation(SEQUENCES).tolist():
            count = min(room, lengths[i] - done[i], made.pick(0, 1, 1, 2, 3, 5, 16, 17, 100))
            if count:
                parts.append((i, done[i], texts[i][done[i] : done[i] + count]))
                room -= count
        if not parts:
            continue
        for (i, at, text), logits in zip(parts, together.forward(parts, made.pick(1, 2, 3, THREADS)), strict=True):
            assert logits.tobytes() == expected[i][at : at + len(text)].tobytes(), (i, at, len(text))
            done[i] += len(text)
