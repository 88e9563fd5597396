"""Sequences of TorchEngine that come and go in any order: every row of logits is that of a fresh pass over its text.

Whatever an earlier sequence left, whoever decodes beside it. Two owners ask for texts that begin alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from helpers.families import FAMILIES
from helpers.tiny_models import ARCHITECTURES, dynamic_rope, longrope, random_tokens, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amq.runtime.engine import Segment
from amq.runtime.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, ALIKE = 44, (0, 24, 36, 43)
"""Of a text, and how many tokens of the first one each begins with; windows have 16 positions, a border lies at 32."""
ROUNDING = 64 * torch.finfo(torch.float32).eps
"""Relative distance of two ways to a row of logits: some sixty roundings of which none cancels another. The
two ways of transformers itself, the whole text at once and token by token, differ by up to fourteen here."""
BORDER = 32
LONGROPE, DYNAMIC = longrope(BORDER), dynamic_rope(BORDER)


def mamba() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 256, "eos_token_id": None}
    return randomized(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), 0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": ARCHITECTURES["llama"].build,
    "qwen3_5": FAMILIES["qwen3_5"].build,
    "lfm2": FAMILIES["lfm2"].build,
    "gemma3": ARCHITECTURES["gemma3"].build,
    "mamba": mamba,
    "captured": lambda: ARCHITECTURES["gemma3"].build(attn_implementation="sdpa"),
    "longrope": lambda: ARCHITECTURES["phi3"].build(**LONGROPE),
    "dynamic": lambda: ARCHITECTURES["llama"].build(**DYNAMIC),
}


@cache
def texts() -> list[list[int]]:
    first, *others = random_tokens(len(ALIKE), LENGTH).tolist()
    return [first, *(first[:alike] + other[alike:] for alike, other in zip(ALIKE[1:], others, strict=True))]


@cache
def model(name: str) -> Any:
    return MODELS[name]()


@cache
def expected(name: str) -> list[Tensor]:
    """Of each text the logits after each of its tokens, each of one call over the text so far where that matters."""
    fresh = MODELS[name]()
    with torch.no_grad():
        if name not in ("longrope", "dynamic"):
            return [fresh(torch.tensor([text])).logits[0] for text in texts()]
        rows = []
        for text in texts():
            for length in range(1, LENGTH + 1):
                fresh(torch.zeros(1, 1, dtype=torch.int64))  # a dynamic table would remember its longest text
                rows.append(fresh(torch.tensor([text[:length]])).logits[0, -1])
        return list(torch.stack(rows).split(LENGTH))


class Sequence:
    """An open slot, and how far its text is: what follows the prompt is what a model would have chosen."""

    def __init__(self, engine: TorchEngine, owner: str, text: int, prompt: int, reuse: bool) -> None:
        self.owner, self.text, self.prompt = owner, text, prompt
        self.slot = engine.open(texts()[text][:prompt], LENGTH - prompt, owner, reuse)
        self.done = self.slot.length

    def segment(self, more: int, logits: bool, every: bool) -> Segment | None:
        """None where the text is over."""
        end = self.prompt if self.done < self.prompt else self.done + 1
        tokens = texts()[self.text][self.done : min(end, self.done + more)]
        return Segment(self.slot, tokens, logits or self.done >= self.prompt, every) if tokens else None


OPEN = st.tuples(
    st.just("open"), st.sampled_from("aab"), st.sampled_from(range(len(ALIKE))), st.integers(18, LENGTH - 1),
    st.sampled_from((True, True, True, False)),
)  # fmt: skip
PASS = st.tuples(
    st.just("pass"), st.lists(st.sampled_from((24, 16, 7, 1, 0)), min_size=3, max_size=3), st.integers(2, 6),
    st.booleans(),
)  # fmt: skip
CLOSE = st.tuples(st.just("close"), st.integers(0, 2))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_row_is_that_of_a_fresh_pass(name: str) -> None:
    reused = []

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.one_of(OPEN, PASS, CLOSE), min_size=24, max_size=40))
    def check(steps: list[tuple[Any, ...]]) -> None:
        capture = (lambda step: step) if name == "captured" else None
        engine = TorchEngine(model(name), context=LENGTH, max_sequences=3, capture=capture)
        assert ("decode together" in engine.banner) == (name == "llama")
        running: list[Sequence] = []
        seen: dict[str, set[tuple[int, ...]]] = {"a": set(), "b": set()}  # beginnings that an owner's sequences had
        for what, *arguments in steps:
            if what == "open":
                if len(running) == 3:
                    engine.close(running.pop(0).slot)
                sequence = Sequence(engine, *arguments)
                beginning = tuple(texts()[sequence.text][: sequence.done])
                assert not beginning or (beginning in seen[sequence.owner] and arguments[-1])
                assert sequence.done < sequence.prompt
                reused.append(sequence.done)
                running.append(sequence)
            elif what == "pass":
                run(engine, running, *arguments)
                for sequence in running:
                    text = texts()[sequence.text]
                    seen[sequence.owner] |= {tuple(text[:n]) for n in range(1, sequence.done + 1)}
            elif what == "close" and arguments[0] < len(running):
                engine.close(running.pop(arguments[0]).slot)

    def run(engine: TorchEngine, running: list[Sequence], sizes: list[int], times: int, every: bool) -> None:
        """`times` passes; each sequence reads as many tokens of its prompt as its size says, 0: it is left out."""
        for _ in range(times):
            parts = []
            for sequence, size in zip(running, sizes, strict=False):
                segment = sequence.segment(size, size % 3 > 0, every and size % 2 > 0) if size else None
                if segment is not None:
                    parts.append((sequence, segment))
            rows = engine.forward([segment for _, segment in parts])
            wanted = []
            for sequence, segment in parts:
                own = expected(name)[sequence.text][sequence.done : sequence.done + len(segment.tokens)]
                wanted.append(own if segment.every else own[-1:] if segment.logits else own[:0])
                sequence.done += len(segment.tokens)
                assert sequence.slot.length == sequence.done
            wanted = torch.cat(wanted) if parts else rows
            assert rows.shape == wanted.shape
            assert ((rows - wanted).norm(dim=-1) <= ROUNDING * wanted.norm(dim=-1)).all()

    check()
    assert sum(length > 0 for length in reused) >= 5, reused
