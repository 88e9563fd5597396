"""TorchEngine against transformers: parts of prompts, sliding windows, captured steps, limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_models import ARCHITECTURES, random_tokens, randomized
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from amq.errors import AmqError
from amq.runtime.engine import Segment
from amq.runtime.torch_engine import GRAPH_CONTEXT, TorchEngine, weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


class NoHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: reading the device's values, making tensors of Python's."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not re.search("_local_scalar_dense|nonzero|masked_select|lift_fresh|unique|aten.equal", str(op)), op
        return op(*args, **(kwargs or {}))


class Recorded:
    """In place of CUDA graphs: runs a step again, if it could be captured, and notes how often."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            with NoHost():
                return step()

        return replay


def logits_after(engine: TorchEngine, tokens: list[int], parts: list[int], slot: Any = None) -> Tensor:
    """The logits after each part of `tokens`."""
    slot = slot or engine.open(tokens, 1)
    rows, start = [], 0
    for part in parts:
        rows.append(engine.forward([Segment(slot, tokens[start : start + part])])[0].clone())
        start += part
    engine.close(slot)
    return torch.stack(rows)


GROWING, STATIC = ("llama", "gemma2", "mistral", "phi3"), ("llama", "gemma3", "mistral", "opt", "mixtral")


@pytest.mark.parametrize("name, static", [(n, False) for n in GROWING] + [(n, True) for n in STATIC])
def test_parts_of_a_prompt_and_steps_give_what_a_whole_forward_gives(name: str, static: bool) -> None:
    """60 tokens with a sliding window of 16, where the family has one."""
    model = ARCHITECTURES[name].build()
    recorded = Recorded() if static else None
    engine = TorchEngine(model, context=80, capture=recorded)
    tokens, parts = random_tokens(1, 60)[0].tolist(), [10, 1, 1, 20, 1, 1, 7, 9, *[1] * 10]
    with torch.no_grad():
        whole = model(torch.tensor([tokens])).logits[0]
    expected = whole[torch.tensor(parts).cumsum(0) - 1]
    for _ in range(2):  # the second sequence in the same place sees nothing of the first
        torch.testing.assert_close(logits_after(engine, tokens, parts), expected, atol=2e-4, rtol=1e-4)
    if recorded:
        assert (recorded.captured, recorded.replayed) == (1, 2 * 14)
    assert static == ("captured" in engine.banner)


def test_models_with_a_recurrent_state_get_their_prompts_whole() -> None:
    options = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 256, "eos_token_id": None}
    mamba = randomized(transformers.MambaForCausalLM(transformers.MambaConfig(**options)), 0)
    griffin = ARCHITECTURES["llama"].config().to_dict() | {"lru_width": 64, "attention_window_size": 16}
    griffin = {k: v for k, v in griffin.items() if k not in ("model_type", "rope_parameters", "head_dim")}
    griffin = randomized(transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**griffin)), 0)
    tokens = random_tokens(1, 40)[0].tolist()
    for model in (mamba, griffin):
        with torch.no_grad():
            whole = model(torch.tensor([tokens])).logits[0]
        engine = TorchEngine(model, context=64, max_rows=20)
        for _ in range(2):
            slot = engine.open(tokens, 1)
            assert not len(engine.forward([Segment(slot, tokens[:20], False)]))
            rows = [engine.forward([Segment(slot, tokens[a:b])])[0] for a, b in ((20, 30), (30, 31), (31, 40))]
            torch.testing.assert_close(torch.stack(rows), whole[[29, 30, 39]], atol=2e-5, rtol=1e-5)
            engine.close(slot)
    with pytest.raises(AmqError, match="recurrent_gemma runs one sequence at a time"):
        TorchEngine(griffin, max_sequences=2)


def test_greedy_tokens_are_those_of_generate() -> None:
    model, prompt = ARCHITECTURES["llama"].build(), random_tokens(1, 9)[0].tolist()
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    engine = TorchEngine(model)
    slot, tokens = engine.open(prompt, 40), prompt
    ours = []
    for _ in range(40):
        ours.append(int(engine.forward([Segment(slot, tokens)])[0].argmax()))
        tokens = ours[-1:]
    assert ours == theirs


@pytest.mark.parametrize("static", [False, True])
def test_sequences_do_not_see_each_other(static: bool) -> None:
    model = ARCHITECTURES["llama"].build()
    engine = TorchEngine(model, context=40, max_sequences=2, capture=Recorded() if static else None)
    texts = [t.tolist() for t in random_tokens(2, 20)]
    alone = [logits_after(engine, tokens, [15, 5])[1] for tokens in texts]
    a, b = (engine.open(tokens, 1) for tokens in texts)
    assert engine.open([1], 1) is None
    assert engine.forward([Segment(a, texts[0][:3], False), Segment(b, texts[1][:17], False)]).shape == (0, 256)
    assert engine.cached_tokens() == (20, 80)
    both = engine.forward([Segment(b, texts[1][17:]), Segment(a, texts[0][3:])])
    torch.testing.assert_close(both, torch.stack(alone[::-1]), atol=1e-4, rtol=1e-4)
    assert both.dtype == torch.float32
    engine.close(a)
    assert engine.open([1], 1) is not None


def test_limits_are_errors_that_say_so() -> None:
    model = ARCHITECTURES["llama"].build()
    engine = TorchEngine(model, context=100, max_rows=10)
    with pytest.raises(AmqError, match="do not fit the context of 100"):
        engine.open([1] * 90, 11)
    slot = engine.open([1] * 5, 3)
    for tokens, message in (
        ([1] * 11, "11 tokens, expected at most 10"),
        ([1] * 9, "9 tokens after 0 in a slot for 8"),
        ([], "0 tokens after 0"),
        ([256], "outside the model's vocabulary of 256"),
        ([-1], "outside the model's vocabulary"),
    ):
        with pytest.raises(AmqError, match=message):
            engine.forward([Segment(slot, tokens)])
    assert slot.length == 0
    engine.close(slot)
    with pytest.raises(AmqError, match="slot is closed"):
        engine.forward([Segment(slot, [1])])
    for options, message in (
        ({"context": 513}, "context must be from 2 to the model's 512, got 513"),
        ({"context": 1}, "context must be"),
        ({"max_sequences": 0}, "max_sequences must be from 1"),
    ):
        with pytest.raises(AmqError, match=message):
            TorchEngine(model, **options)


def test_contexts() -> None:
    model = ARCHITECTURES["llama"].build(max_position_embeddings=2 * GRAPH_CONTEXT, num_hidden_layers=1)
    assert TorchEngine(model).context == 2 * GRAPH_CONTEXT
    assert TorchEngine(model, capture=Recorded()).context == GRAPH_CONTEXT
    assert TorchEngine(model, context=64).context == 64


def test_what_cannot_be_captured_runs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    model, tokens = ARCHITECTURES["llama"].build(), random_tokens(1, 12)[0].tolist()
    engine = TorchEngine(model, context=64, capture=refuse, why="for a test")
    assert "no CUDA graphs (operation not permitted when stream is capturing)" in engine.banner
    assert engine.banner.endswith("context 64 (for a test)") and "slower" in caplog.text
    plain = logits_after(TorchEngine(model), tokens, [11, 1])
    torch.testing.assert_close(logits_after(engine, tokens, [11, 1]), plain, atol=0, rtol=0)


def test_weight_bytes_count_what_a_token_reads() -> None:
    tied, untied = (ARCHITECTURES["llama"].build(tie_word_embeddings=t) for t in (True, False))
    table = 256 * 64 * 4

    def total(model: nn.Module) -> int:
        return sum(p.nbytes for p in model.parameters())

    assert weight_bytes(tied) == total(tied) and weight_bytes(untied) == total(untied) - table == total(tied)
