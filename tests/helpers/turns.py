"""A conversation with an engine, turn by turn: how many tokens of each prompt are read.

Every turn's prompt is everything said before and a new message; the answer is the likeliest tokens. An engine that
remembers nothing reads the whole prompt each time, one that goes on where it ended reads the new message. Through the
Engine protocol alone: no template, no text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from amq.runtime.engine import Engine, Segment, Slot


@dataclass(frozen=True)
class Turn:
    """prompt: its tokens. read: those that were computed. answer: tokens decoded."""

    prompt: int
    read: int
    answer: int


def conversation(
    engine: Engine[Slot], turns: int = 10, message: int = 200, answer: int = 100, seed: int = 0
) -> list[Turn]:
    """`turns` turns of one owner, messages of `message` random tokens and answers of `answer` tokens.

    Beginnings are kept apart by the seed: another conversation on the same engine takes another one.
    """
    generator = torch.Generator().manual_seed(seed)
    said: list[int] = []
    result = []
    for _ in range(turns):
        said += torch.randint(engine.vocab_size, (message,), generator=generator).tolist()
        slot = engine.open(said, answer)
        assert slot is not None, "the engine is in use"
        prompt, read = len(said), len(said) - slot.length
        try:
            token = _run(engine, slot, said)
            for _ in range(answer):
                said.append(token)
                token = _run(engine, slot, said)
        finally:
            engine.close(slot)
        result.append(Turn(prompt, read, answer))
    return result


def _run(engine: Engine[Slot], slot: Slot, tokens: list[int]) -> int:
    """Computes what the slot lacks of `tokens`; returns the likeliest token after them."""
    while True:
        part = tokens[slot.length :][: engine.max_rows]
        last = slot.length + len(part) == len(tokens)
        logits = engine.forward([Segment(slot, part, logits=last)])
        if last:
            return int(logits[0].argmax())
