"""What is measured: `pp512` reads a prompt of 512 tokens, `tg128` decodes 128, `tg128 x4` four sequences at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One measurement.

    tokens: of the prompt, or decoded per sequence. sequences: decoded at a time (a prompt is one sequence).
    depth: tokens that are in the cache of every sequence before the clock starts.
    """

    decode: bool
    tokens: int
    sequences: int = 1
    depth: int = 0

    @property
    def name(self) -> str:
        sequences = f" x{self.sequences}" if self.sequences > 1 else ""
        return f"{'tg' if self.decode else 'pp'}{self.tokens}{sequences}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def positions(self) -> int:
        """Room that each sequence needs; one more than is computed, for the token that follows."""
        return self.depth + self.tokens + 1


def grid(prompts: Iterable[int], generates: Iterable[int], batches: Iterable[int], depths: Iterable[int]) -> list[Case]:
    """Every prompt length, then every number of tokens to decode at every batch size; all at every depth."""
    pairs = [(tokens, batch) for tokens in generates for batch in batches]
    return [
        case
        for depth in depths
        for case in (
            *(Case(False, tokens, depth=depth) for tokens in prompts),
            *(Case(True, tokens, batch, depth) for tokens, batch in pairs),
        )
    ]
