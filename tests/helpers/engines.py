"""An engine that needs no model, and what runs beside real ones: a text, and transformers' logits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.runtime.engine import MAX_SCORED, Engine, S, Segment, Slot
from amq.runtime.native_engine import NativeEngine
from amq.runtime.sampling import follows_from_logits
from amq.runtime.settings import Sampling

SECONDS = 60.0
"""How long anything may take before a test fails; far above what it takes, because machines are busy at times."""


class FakeSlot(Slot):
    """prompt: as it was opened. tokens: all that were computed, or found computed."""

    def __init__(self, prompt: Sequence[int], new_tokens: int, length: int) -> None:
        super().__init__(len(prompt) + new_tokens, length)
        self.prompt, self.tokens = list(prompt), list(prompt[:length])


def repeat_the_prompt(slot: FakeSlot) -> int:
    """ "abc" goes on "abcabc…", so every answer tells whose it is."""
    return slot.prompt[slot.length % len(slot.prompt)]


class FakeEngine:
    """An `Engine` (amq.runtime.engine) that checks what it is asked. Everything may be changed while it runs.

    following: the likeliest token after those of a slot. delay: seconds of a pass. positions: of the KV cache, all
    slots together. gate: a pass waits while it is clear, so that a test can hold a request where it is for as long as
    it takes. failing: an exception that the next passes raise. nan: whether their first logits hold one. shared:
    positions that every prompt finds computed already. prompts, owners: of all sequences opened so far. passes: of all
    passes, each segment's tokens and whether it wanted logits, of one token or of every one.
    """

    banner = "a fake engine"

    def __init__(
        self,
        context: int = 512,
        max_sequences: int = 4,
        delay: float = 0.0,
        vocab_size: int = 256,
        max_rows: int = 512,
        positions: int | None = None,
        following: Callable[[FakeSlot], int] = repeat_the_prompt,
    ) -> None:
        self.context, self.max_sequences, self.delay, self.vocab_size = context, max_sequences, delay, vocab_size
        self.max_rows, self.following = max_rows, following
        self.positions = context * max_sequences if positions is None else positions
        self.failing: BaseException | None = None
        self.nan = False
        self.shared = 0
        self.slots: set[FakeSlot] = set()
        self.passes: list[list[tuple[list[int], bool]]] = []
        self.prompts: list[list[int]] = []
        self.owners: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def open(self, prompt: Sequence[int], new_tokens: int, owner: str = "", reuse: bool = True) -> FakeSlot | None:
        needed = len(prompt) + new_tokens
        if needed > self.positions:
            raise AmqError(f"{needed} positions never fit the cache of {self.positions}")
        if len(self.slots) >= self.max_sequences or self.cached_tokens()[0] + needed > self.positions:
            return None
        self.prompts.append(list(prompt))
        self.owners.append(owner)
        slot = FakeSlot(prompt, new_tokens, min(self.shared, len(prompt) - 1) if reuse else 0)
        self.slots.add(slot)
        return slot

    def close(self, slot: FakeSlot) -> None:
        self.slots.remove(slot)

    def forward(self, segments: Sequence[Segment[FakeSlot]]) -> Tensor:
        assert len({id(segment.slot) for segment in segments}) == len(segments)
        lengths = [len(segment.tokens) for segment in segments]
        assert 0 < sum(lengths) <= self.max_rows and min(lengths) > 0
        assert sum(len(segment.tokens) for segment in segments if segment.every) <= MAX_SCORED
        self.passes.append([(list(segment.tokens), segment.logits or segment.every) for segment in segments])
        assert self.gate.wait(2 * SECONDS), "the test never opened the gate"
        if self.delay:
            time.sleep(self.delay)
        if self.failing is not None:
            raise self.failing
        wanted = [row for segment in segments for row in self._rows(segment)]
        logits = torch.stack(wanted) if wanted else torch.empty(0, self.vocab_size)
        if self.nan and wanted:
            logits[0, 0] = torch.nan
        return logits

    def _rows(self, segment: Segment[FakeSlot]) -> list[Tensor]:
        slot, rows = segment.slot, []
        for place, token in enumerate(segment.tokens, 1):
            slot.tokens.append(token)
            slot.length = len(slot.tokens)
            assert slot.length <= slot.capacity
            if segment.every or (segment.logits and place == len(segment.tokens)):
                rows.append(self.logits(slot))
        return rows

    def logits(self, slot: FakeSlot) -> Tensor:
        """float32 [vocabulary] after the tokens of a slot."""
        logits = torch.zeros(self.vocab_size)
        logits[self.following(slot)] = 30.0
        return logits

    def cached_tokens(self) -> tuple[int, int]:
        return sum(slot.capacity for slot in self.slots), self.positions


class FakeSamplingEngine(FakeEngine):
    """A `SamplingEngine`: its tokens are the same, but come one pass late.

    alone: of each slot that decodes on its own, the token that it is fed next and how many passes it has left. steps:
    how many slots each pass of these had. seeds: of all slots, in the order in which they began. numberless: whether
    the first slot of the next passes has no token.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alone: dict[FakeSlot, tuple[int, int]] = {}
        self.steps: list[int] = []
        self.seeds: list[int] = []
        self.numberless = False
        self._running: dict[FakeSlot, int] = {}

    def can_sample(self, how: Sampling) -> bool:
        return follows_from_logits(how)

    def begin(self, slot: FakeSlot, token: int, how: Sampling, seed: int, passes: int) -> None:
        assert self.can_sample(how) and slot in self.slots and slot not in self.alone
        assert 0 < passes <= slot.capacity - slot.length and 0 <= seed < 2**64
        self.alone[slot] = token, passes
        self.seeds.append(seed)

    def step(self) -> dict[FakeSlot, int]:
        if self.failing is not None:
            raise self.failing
        before, self._running = self._running, {}
        for slot, (token, passes) in self.alone.items():
            if passes:
                slot.tokens.append(token)
                slot.length = len(slot.tokens)
                following = self.following(slot)
                self.alone[slot] = following, passes - 1
                self._running[slot] = -1 if self.numberless and not self._running else following
        self.steps.append(len(self._running))
        return {slot: token for slot, token in before.items() if slot in self.alone}

    def end(self, slot: FakeSlot) -> None:
        del self.alone[slot]

    def close(self, slot: FakeSlot) -> None:
        assert slot not in self.alone
        super().close(slot)

    def forward(self, segments: Sequence[Segment[FakeSlot]]) -> Tensor:
        assert not any(segment.slot in self.alone for segment in segments)
        return super().forward(segments)


def text(length: int, seed: int = 0) -> list[int]:
    """Random token ids of a tiny model's vocabulary."""
    from helpers.tiny_models import VOCABULARY

    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def last_rows(
    engine: Engine[S], slots: Mapping[int, S], texts: Mapping[int, list[int]], parts: Iterable[tuple[int, int]]
) -> dict[int, Tensor]:
    """{text: logits after its last token} of texts that share passes. In each pass text 0 goes on by the first number
    of tokens of a part, every other one by the second."""
    found = {}
    for size, others in parts:
        segments = [(name, texts[name][slots[name].length :][: others if name else size]) for name in texts]
        segments = [(name, tokens) for name, tokens in segments if tokens]
        logits = engine.forward([Segment(slots[name], tokens) for name, tokens in segments])
        for row, (name, _) in zip(logits, segments, strict=True):
            if slots[name].length == len(texts[name]):
                found[name] = row.clone()
    return found


def assert_shared_passes_change_nothing(engine: NativeEngine, length: int, first: int) -> None:
    """A text of `length` tokens in pieces of many sizes, the first of `first`, beside three others, one or several
    tokens at a time: the last logits of each are bit for bit those of the text alone."""
    texts = {seed: text(size, seed) for seed, size in ((0, length), (1, 21), (2, 5), (3, 70))}
    alone = {seed: engine.all_logits(tokens)[-1] for seed, tokens in texts.items()}
    slots = {seed: engine.open(tokens, 0, reuse=False) for seed, tokens in texts.items()}
    found = last_rows(engine, slots, texts, ((first, 1), (1, 1), (1, 2), (17, 1), (2, 2), (22, 0), (27, 64)))
    assert found.keys() == texts.keys()
    for seed in texts:
        assert torch.equal(found[seed], alone[seed]), seed


def transformers_logits(folder: Path, tokens: list[int], activations: str = "fp32") -> Tensor:
    """float32 [tokens, vocabulary] of a checkpoint, as transformers runs it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from amq.integrations.transformers import AmqConfig

    known = type(AutoConfig.from_pretrained(folder)) in AutoModelForCausalLM._model_mapping
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    how = AmqConfig(activations=activations)
    model = auto.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]
