"""What TorchEngine keeps of sequences that have ended: who finds it, how far, how much there is of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from helpers.families import FAMILIES
from helpers.tiny_models import ARCHITECTURES, byte_tokenizer, random_tokens, randomized
from torch import nn

from amq.errors import AmqError
from amq.runtime import torch_kept
from amq.runtime.engine import Segment
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer
from amq.runtime.torch_cache import copied, is_whole, states, stored_bytes
from amq.runtime.torch_engine import OPENING, TorchEngine
from amq.runtime.torch_kept import agreement

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT, OTHER = (tokens.tolist() for tokens in random_tokens(2, 60))


def mamba() -> nn.Module:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 256, "eos_token_id": None}
    return randomized(transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), 0)


def read(engine: TorchEngine, prompt: list[int], owner: str = "", after: list[int] | None = None, **how: Any) -> int:
    """Reads a prompt and the tokens `after` it, ends the sequence; returns how many tokens it found."""
    slot = engine.open(prompt, len(after or ()), owner, **how)
    found = slot.length
    assert found < len(prompt)
    for tokens in (prompt[found:], *([token] for token in after or ())):
        engine.forward([Segment(slot, tokens)])
    engine.close(slot)
    return found


def found(engine: TorchEngine, prompt: list[int], owner: str = "", **how: Any) -> int:
    """How many tokens a sequence would find; it computes nothing."""
    slot = engine.open(prompt, 0, owner, **how)
    engine.close(slot)
    return slot.length


def positions(engine: TorchEngine) -> list[int]:
    return [len(kept.tokens) for kept in engine._kept._kept]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens each call of `model` computes."""
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield lengths
    hook.remove()


@pytest.mark.parametrize("captured", [False, True])
def test_keys_and_values_serve_whatever_begins_alike(captured: bool) -> None:
    model = ARCHITECTURES["llama"].build(attn_implementation="sdpa")
    engine = TorchEngine(model, context=80, max_sequences=2, capture=(lambda step: step) if captured else None)
    assert read(engine, TEXT[:40], "a", TEXT[40:44]) == 0
    assert found(engine, TEXT, "b") == found(engine, TEXT) == found(engine, OTHER, "a") == 0
    assert found(engine, TEXT, "a", reuse=False) == 0
    if captured:  # the places are two, and those who looked have taken both
        assert read(engine, TEXT[:40], "a", TEXT[40:44]) == 0
    assert read(engine, [*TEXT[:30], *OTHER[:9]], "a") == 30
    assert read(engine, TEXT[:41], "a") == (30 if captured else 40)  # in place: the rest was written over
    if not captured:
        assert found(engine, TEXT, "a") == 44 and found(engine, TEXT[:44], "a") == 43 and found(engine, [7], "a") == 0
    with counted(model) as lengths:
        assert read(engine, TEXT[:41], "a") == 40
    assert lengths == [1]


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_what_cannot_be_cropped_is_kept_before_the_answer_is_opened(name: str) -> None:
    """gemma3: windows of 16 positions, which are full."""
    model = FAMILIES[name].build()
    engine = TorchEngine(model, context=80)
    with counted(model) as lengths:
        assert read(engine, TEXT[:40], "a", TEXT[40:43]) == 0
    assert lengths == [40 - OPENING, OPENING, 1, 1, 1]
    assert sorted(positions(engine)) == [32, 43]
    assert found(engine, TEXT, "a") == 43 and found(engine, TEXT, "b") == 0
    turn = [*TEXT[:36], *OTHER[:20]]  # the answer is written otherwise than it was opened
    assert found(engine, turn, "a") == found(engine, TEXT[:40], "a") == 32  # also where the same is asked again
    assert found(engine, [*TEXT[:31], *OTHER[:40]], "a") == 0
    with counted(model) as lengths:
        assert read(engine, turn, "a") == 32
    assert lengths == [len(turn) - 32 - OPENING, OPENING]
    assert 32 not in positions(engine)  # used last, and yet the first to go beside two of the later turn


def test_a_window_that_is_not_full_can_be_cropped() -> None:
    engine = TorchEngine(FAMILIES["gemma3"].build(), context=80)
    read(engine, TEXT[:12], "a")
    assert positions(engine) == [12] and found(engine, [*TEXT[:7], *OTHER], "a") == 7


def test_a_state_that_goes_on_token_by_token_is_used_where_that_is_less_work() -> None:
    """Mamba's prompts are read whole but for the last token; all logits are those of the same steps without reuse."""
    model = mamba()
    engine, fresh = (TorchEngine(model, context=80) for _ in range(2))
    assert read(engine, TEXT[:40], "a") == 0 and sorted(positions(engine)) == [39, 40]
    assert found(engine, TEXT[:40], "a") == 39 and found(engine, TEXT[:45], "a") == 40
    assert found(engine, TEXT[:46], "a") == 0  # six steps cost more than 46 tokens at once
    slot, other = engine.open(TEXT[:44], 1, "a"), fresh.open(TEXT[:44], 1)
    assert slot.length == 40
    fresh.forward([Segment(other, TEXT[:39])])
    fresh.forward([Segment(other, TEXT[39:40])])
    rows = [e.forward([Segment(s, [t])]) for t in TEXT[40:44] for e, s in ((engine, slot), (fresh, other))]
    assert all(torch.equal(rows[i], rows[i + 1]) for i in range(0, 8, 2))


def test_at_most_so_many_and_so_many_bytes() -> None:
    model = ARCHITECTURES["llama"].build()
    per_token = 3 * 2 * 2 * 16 * 4  # blocks, keys and values, heads, features, bytes
    engine = TorchEngine(model, context=80, max_sequences=2, kept_bytes=60 * per_token)
    texts = [tokens.tolist() for tokens in random_tokens(4, 40, seed=3)]
    for text in texts[:2]:
        read(engine, text[:20])
    assert engine._kept.bytes == 40 * per_token and positions(engine) == [20, 20]
    assert found(engine, texts[0]) == 20  # now the other one is the least recently used
    read(engine, texts[2][:20])
    assert found(engine, texts[1]) == 0 and found(engine, texts[0]) == found(engine, texts[2]) == 20
    read(engine, texts[3])
    assert positions(engine) == [20, 40] and engine._kept.bytes == engine._kept.budget
    read(engine, [*TEXT, 1])  # more than all there is: not kept, and nothing goes for it
    assert positions(engine) == [20, 40]
    nothing = TorchEngine(model, context=80, kept_bytes=0)
    read(nothing, TEXT)
    assert found(nothing, TEXT) == 0


def test_a_longer_text_takes_the_place_of_its_beginning() -> None:
    engine = TorchEngine(ARCHITECTURES["llama"].build(), context=80, max_sequences=4)
    for end in (20, 30, 25):
        read(engine, TEXT[:end])
    assert positions(engine) == [30]
    read(engine, TEXT[:30], "b")
    read(engine, [*TEXT[:20], *OTHER[:5]])
    assert positions(engine) == [30, 30, 25]


def test_part_of_a_prompt_is_kept_and_a_failed_pass_is_not() -> None:
    model = ARCHITECTURES["llama"].build()
    engine = TorchEngine(model, context=80, max_sequences=2)
    slot = engine.open(TEXT, 1)
    engine.forward([Segment(slot, TEXT[:20], logits=False)])
    engine.close(slot)
    assert found(engine, TEXT) == 20

    def fail(*_: Any) -> None:
        raise RuntimeError("broken in the middle")

    slot, other = engine.open(TEXT, 1), engine.open(TEXT, 1)
    assert slot.length == other.length == 20
    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        engine.forward([Segment(slot, [1]), Segment(other, [2])])
    hook.remove()
    with pytest.raises(AmqError, match="an earlier pass of a segment's slot failed"):
        engine.forward([Segment(other, [2])])
    for broken in (slot, other):
        engine.close(broken)
    assert positions(engine) == [20] and found(engine, TEXT) == 20


def test_a_failed_step_of_a_captured_place_is_not_gone_on_from() -> None:
    model = ARCHITECTURES["llama"].build(attn_implementation="sdpa")
    engine = TorchEngine(model, context=80, capture=lambda step: step)
    slot = engine.open(TEXT, 1)
    engine.forward([Segment(slot, TEXT[:20])])

    def fail(*_: Any) -> None:
        raise RuntimeError("broken in the middle")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        engine.forward([Segment(slot, TEXT[20:])])
    hook.remove()
    engine.close(slot)
    slot = engine.open(TEXT, 1)
    assert slot.length == 0
    with torch.no_grad():
        whole = model(torch.tensor([TEXT])).logits[0, -1]
    torch.testing.assert_close(engine.forward([Segment(slot, TEXT)])[0], whole, atol=2e-4, rtol=1e-4)


def test_without_memory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    engine = TorchEngine(FAMILIES["qwen3_5"].build(), context=80)
    read(engine, TEXT[:40])
    with monkeypatch.context() as patch:
        patch.setattr(torch_kept, "cropped", refuse)
        assert found(engine, TEXT) == 0 and "no memory to keep what was read" in caplog.text
    assert positions(engine) == []
    with monkeypatch.context() as patch:
        patch.setattr(torch_kept, "copied", refuse)
        read(engine, TEXT[:40])
    assert positions(engine) == [40]  # what needs no copy

    plain = TorchEngine(ARCHITECTURES["llama"].build(), context=80, max_sequences=2)
    slots = [plain.open(text, 1) for text in (TEXT, OTHER)]
    for tokens in (slice(20), slice(20, 21)):
        plain.forward([Segment(slot, text[tokens]) for slot, text in zip(slots, (TEXT, OTHER), strict=True)])
    with monkeypatch.context() as patch:
        patch.setattr(slots[0].place.batch, "give_back", refuse)
        plain.close(slots[0])  # which others decode beside
    assert positions(plain) == []
    alone = plain.forward([Segment(slots[1], OTHER[21:22])])[0]
    with torch.no_grad():
        whole = plain._model(torch.tensor([OTHER[:22]])).logits[0, -1]
    torch.testing.assert_close(alone, whole, atol=2e-4, rtol=1e-4)

    def wrong(*_: Any) -> None:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(torch_kept, "cropped", wrong)
    with pytest.raises(RuntimeError, match="another kind"):
        engine.open(TEXT, 1)


def test_models_with_their_state_in_modules_keep_nothing() -> None:
    config = ARCHITECTURES["llama"].config().to_dict() | {"lru_width": 64, "attention_window_size": 16}
    config = {k: v for k, v in config.items() if k not in ("model_type", "rope_parameters", "head_dim")}
    griffin = randomized(transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**config)), 0)
    engine = TorchEngine(griffin, context=80)
    assert read(engine, TEXT) == 0 and found(engine, TEXT) == 0 and not len(engine._kept)


@pytest.mark.parametrize("build", [ARCHITECTURES["llama"].build, FAMILIES["gemma3"].build, FAMILIES["qwen3_5"].build])
def test_copies_share_nothing_and_are_compact(build: Callable[[], nn.Module]) -> None:
    model = build()
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([TEXT]), use_cache=True, past_key_values=cache)
    before = {path: tensor.clone() for path, tensor in states(cache)}
    copy = copied(cache)
    size = sum(tensor.nbytes for tensor in before.values())
    assert stored_bytes(copy) == size <= stored_bytes(cache)
    with torch.inference_mode():
        for _, tensor in states(copy):
            tensor.zero_()
    assert all(torch.equal(tensor, before[path]) for path, tensor in states(cache))
    assert is_whole(cache, len(TEXT)) == (type(model).__name__ == "LlamaForCausalLM")
    assert not is_whole(cache, len(TEXT) - 1)
    assert not is_whole(transformers.DynamicCache(config=model.config), 0)


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_a_conversation_reads_only_what_is_new(name: str) -> None:
    """Turns through the scheduler: each prompt is all that was said before and something new."""
    model = FAMILIES[name].build()
    engine, tokenizer = (
        TorchEngine(model, context=200, max_sequences=2),
        Tokenizer.from_transformers(byte_tokenizer(), []),
    )
    scheduler, said, found = Scheduler(engine, tokenizer), list[int](), []
    for turn in (TEXT[:40], OTHER[:20], TEXT[40:]):
        chosen: list[int] = []

        def listen(piece: Piece, chosen: list[int] = chosen) -> None:
            chosen.extend(choice.token for choice in piece.choices)

        said += turn
        request = Request(list(said), Sampling(max_new_tokens=10), listen, "a")
        scheduler.submit(request)
        while scheduler.step():
            pass
        said += chosen
        found.append(request.cached_tokens)
    assert found == [0, 40 + 9, 40 + 10 + 20 + 9]  # the last token of an answer is never computed


def test_agreement() -> None:
    assert [agreement([1, 2, 3], other) for other in ([], [1], [1, 2, 3, 4], [1, 5, 3], [2])] == [0, 1, 3, 1, 0]
