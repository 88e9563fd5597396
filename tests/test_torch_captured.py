"""Captured steps of TorchEngine over one static cache: what they attend to, several sequences at once, what fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.captures import Recorded
from helpers.tiny_models import ARCHITECTURES, dynamic_rope, random_tokens
from torch import Tensor, nn

from amq.errors import AmqError
from amq.runtime import torch_attention, torch_captured, torch_engine
from amq.runtime.engine import Segment
from amq.runtime.torch_attention import NAME, attention_of
from amq.runtime.torch_captured import Shape, buckets, sizes
from amq.runtime.torch_engine import TorchEngine
from amq.runtime.torch_static import Store

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [tokens.tolist() for tokens in random_tokens(8, 1100)]
PLAIN = ("llama", "qwen3", "opt")
FLOAT = 64 * torch.finfo(torch.float32).eps
"""Relative, of logits: some sixty roundings of float32 of which none cancels another, as in test_torch_batch.py."""


def build(name: str = "llama", **options: Any) -> nn.Module:
    return ARCHITECTURES[name].build(**{"attn_implementation": "sdpa", "max_position_embeddings": 1100, **options})


def engine_of(model: nn.Module, sequences: int = 4, context: int = 1024, capture: Any = None, **more: Any) -> Any:
    return TorchEngine(model, context=context, max_sequences=sequences, capture=capture or Recorded(), **more)


def start(engine: TorchEngine, lengths: tuple[int, ...]) -> list[Any]:
    """Open slots that have read so many tokens of TEXTS each."""
    slots = [engine.open(text[:length], 20, reuse=False) for text, length in zip(TEXTS, lengths, strict=False)]
    for slot, text, length in zip(slots, TEXTS, lengths, strict=False):
        for first in range(0, length, 400):
            engine.forward([Segment(slot, text[first : min(first + 400, length)])])
    return slots


def step(engine: TorchEngine, slots: list[Any], which: list[int]) -> Tensor:
    """The next token of the texts `which`, in one pass."""
    return engine.forward([Segment(slots[i], [TEXTS[i][slots[i].length]]) for i in which]).clone()


@torch.no_grad()
def alone(model: nn.Module, slots: list[Any], which: list[int]) -> Tensor:
    """Of a call over each whole text."""
    return torch.stack([model(torch.tensor([TEXTS[i][: slots[i].length]])).logits[0, -1] for i in which])


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert ((found - expected).norm(dim=-1) <= FLOAT * expected.norm(dim=-1)).all()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(sequences, positions) of every call of our attention."""
    found: list[tuple[int, int]] = []
    ours = torch_attention.flash_decode

    def noted(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        found.append((len(query), key.shape[2]))
        return ours(query, key, *rest)

    monkeypatch.setattr(torch_attention, "flash_decode", noted)
    return found


def test_shapes_of_steps() -> None:
    assert buckets(8192) == [256, 512, 1024, 2048, 4096, 8192] and buckets(40) == [256]
    assert buckets(600) == [256, 512, 768] and buckets(256) == [256] and buckets(257) == [256, 512]
    for context in (40, 300, 8192):
        for length in range(256, context):  # at most twice what is used
            assert min(b for b in buckets(context) if b >= length + 1) <= 2 * length
    assert [sizes(n) for n in (1, 2, 3, 4, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 8]]


@pytest.mark.parametrize("name", [*PLAIN, "gemma3", "mistral"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_steps_attend_to_the_bucket_of_the_length(name: str, sequences: int, attended: list[tuple[int, int]]) -> None:
    """On both sides of every border, also of models with a window of 16, whose own mask does the sliding."""
    model = build(name)
    engine = engine_of(model, sequences)
    for length, seen in ((3, 256), (254, 256), (255, 256), (256, 512), (511, 512), (512, 1024), (1000, 1024)):
        slots = start(engine, (length,))
        attended.clear()
        found = step(engine, slots, [0])
        assert attended == [(1, seen)] * 3, length
        assert_equal(found, alone(model, slots, [0]))
        engine.close(slots[0])


@pytest.mark.parametrize("name", PLAIN)
def test_sequences_that_come_and_go_get_the_logits_of_each_alone(name: str, attended: list[tuple[int, int]]) -> None:
    model = build(name)
    engine = engine_of(model)
    assert "decode steps captured, sequences decode together" in engine.banner
    slots = start(engine, (9, 254, 60, 3))
    groups = [[0, 1], [0, 1], [0, 1, 2], [2, 1, 0], [3, 2], [3], [3, 2], [0, 1], [0], [1, 2, 3, 0], [0, 3]]
    for which in groups:
        attended.clear()
        found = step(engine, slots, which)
        rows = 1 << (len(which) - 1).bit_length()
        positions = 512 if 1 in which and slots[1].length > 256 else 256
        assert attended == [(rows, positions)] * 3, which
        assert_equal(found, alone(model, slots, which))
    engine.close(slots[1])
    slots[1] = engine.open(TEXTS[1][:20], 100, reuse=False)  # in the place of one that was longer
    engine.forward([Segment(slots[1], TEXTS[1][:20]), Segment(slots[3], [TEXTS[3][slots[3].length]])])
    assert_equal(step(engine, slots, [0, 1, 3]), alone(model, slots, [0, 1, 3]))


def test_three_and_eight_sequences() -> None:
    model = build()
    for sequences in (3, 8):
        recorded = Recorded()
        engine = engine_of(model, sequences, 300, recorded)
        assert recorded.captured == len(sizes(sequences)) * 2
        slots = start(engine, (5, 255, 30, 256, 60, 7, 8, 9)[:sequences])
        for count in (sequences, sequences, 2, 1, sequences - 1):
            which = list(range(sequences))[-count:]
            assert_equal(step(engine, slots, which), alone(model, slots, which))


def test_bfloat16_differs_by_its_rounding() -> None:
    """Captured steps of several are as far from float64 as a cache that grows."""
    model, exact = build().bfloat16(), build().bfloat16().double()
    engine, growing = engine_of(model), TorchEngine(build().bfloat16(), context=1024, max_sequences=4)
    lengths, errors = (600, 40, 300, 3), {"captured": 0.0, "growing": 0.0}
    ours, theirs = start(engine, lengths), start(growing, lengths)
    for _ in range(5):
        found, other = step(engine, ours, [0, 1, 2, 3]), step(growing, theirs, [0, 1, 2, 3])
        truth = alone(exact, ours, [0, 1, 2, 3])
        errors["captured"] += float((found - truth).square().sum())
        errors["growing"] += float((other - truth).square().sum())
    assert 0 < errors["captured"] <= 2**2 * errors["growing"]


def test_rows_that_take_no_part_keep_what_they_hold(attended: list[tuple[int, int]]) -> None:
    """Also one that is full, and prefixes that ended sequences have left, wherever their rows are moved to."""
    model = build()
    engine = engine_of(model, context=256)
    long = engine.open(TEXTS[0][:256], 0, reuse=False)
    engine.forward([Segment(long, TEXTS[0][:254], False)])
    ended = engine.open(TEXTS[1][:60], 10, "someone")
    engine.forward([Segment(ended, TEXTS[1][:60])])
    engine.close(ended)
    slots = [long, None, *start_at(engine, {2: 30, 3: 40})]
    for which in ([2, 3], [3], [2], [2, 3], [3]):
        assert_equal(step(engine, slots, which), alone(model, slots, which))
    slots[1] = engine.open(TEXTS[1][:70], 10, "someone")
    assert slots[1].length == 60
    engine.forward([Segment(slots[1], TEXTS[1][60:70])])
    for _ in range(2):  # three of four rows, then the fourth; it is full in the end
        assert_equal(step(engine, slots, [1, 2, 3]), alone(model, slots, [1, 2, 3]))
        assert_equal(step(engine, slots, [0]), alone(model, slots, [0]))
    assert long.length == engine.context
    assert_equal(step(engine, slots, [1, 2, 3]), alone(model, slots, [1, 2, 3]))
    assert {rows for rows, _ in attended} == {1, 2, 4}
    rows = [place.row for place in engine._captured.places]
    assert sorted(rows) == [0, 1, 2, 3] and rows != [0, 1, 2, 3]


def start_at(engine: TorchEngine, lengths: dict[int, int]) -> list[Any]:
    slots = [engine.open(TEXTS[i][:length], 20, reuse=False) for i, length in lengths.items()]
    for slot, (i, length) in zip(slots, lengths.items(), strict=True):
        engine.forward([Segment(slot, TEXTS[i][:length])])
    return slots


@pytest.mark.parametrize("sequences", [1, 2])
def test_numbers_that_are_none_stay_with_the_sequence_that_made_them(sequences: int) -> None:
    """What a mask hides is multiplied by 0, which makes no NaN a 0: places are cleared."""
    model = build(num_hidden_layers=1)
    engine = engine_of(model, sequences, 300)
    slots = start(engine, (100,) * sequences)
    with torch.inference_mode():
        for store in engine._captured.stores:
            store.keys[:100] = store.values[:100] = torch.nan
    assert step(engine, slots, [0]).isnan().all()
    for slot in slots:
        engine.close(slot)
    slots = start(engine, (20,) * sequences)
    which = list(range(sequences))
    assert_equal(step(engine, slots, which), alone(model, slots, which))


def test_a_pass_that_fails_leaves_nothing_to_the_next_sequence() -> None:
    model = build(num_hidden_layers=1)
    engine = engine_of(model, 1, 300)
    slot = engine.open(TEXTS[0][:30], 10)

    def fail(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: something")

    hook = model.lm_head.register_forward_hook(fail)  # all keys and values have been written
    with pytest.raises(RuntimeError, match="something"):
        engine.forward([Segment(slot, TEXTS[0][:30])])
    hook.remove()
    with pytest.raises(AmqError, match="an earlier pass of a segment's slot failed"):
        engine.forward([Segment(slot, [1])])
    engine.close(slot)
    slots = start(engine, (5,))
    assert all(not tensor[5:-1].any() for store in engine._captured.stores for tensor in store.allocated())
    assert_equal(step(engine, slots, [0]), alone(model, slots, [0]))


def without(model: nn.Module, *names: str) -> nn.Module:
    """`model`, whose forward does not look at these arguments."""
    old = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return old(self, *args, **{name: value for name, value in kwargs.items() if name not in names})

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    return model


@pytest.mark.parametrize("names", [("attention_mask",), ("position_ids",)])
def test_models_that_overlook_mask_or_positions_are_captured_one_by_one(names: tuple[str, ...]) -> None:
    model, recorded = without(build(), *names), Recorded()
    engine = engine_of(model, 2, 300, recorded)
    assert "captured, one sequence after another (the model takes no sequences of different" in engine.banner
    assert recorded.captured == 2 * 2
    slots = start(engine, (9, 270))
    assert_equal(step(engine, slots, [0, 1]), alone(model, slots, [0, 1]))


def test_windows_and_tables_that_depend_on_the_length_are_captured_one_by_one() -> None:
    for model, reason in (
        (build("gemma3"), "windows of them"),
        (build("gemma2", attn_implementation="eager"), "windows of them"),
        (build(**dynamic_rope(300)), "rotary tables depend on the length"),
    ):
        engine = engine_of(model, 2, 300, lambda step: step)
        assert f"captured, one sequence after another ({'the cache holds' if 'win' in reason else ''}" in engine.banner
        assert reason in engine.banner
        slots = start(engine, (9, 270))
        assert_equal(step(engine, slots, [0, 1]), alone(model, slots, [0, 1]))


def test_our_attention_is_given_up_where_its_logits_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_attention, "flash_decode", lambda query, *rest: query * 100)
    model = build()
    engine = engine_of(model, 2, 300)
    assert attention_of(model) == "sdpa" and "sdpa attention" in engine.banner and "together" in engine.banner
    slots = start(engine, (9, 270))
    assert_equal(step(engine, slots, [0, 1]), alone(model, slots, [0, 1]))


def test_steps_whose_logits_are_others_are_not_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from amq.runtime.torch_static import StepLayer

    monkeypatch.setattr(StepLayer, "get_seq_length", lambda self: torch.tensor(0))
    model, recorded = build(), Recorded()
    engine = engine_of(model, 1, 300, recorded)
    assert recorded.captured == 0 and attention_of(model) == "sdpa"
    assert "no CUDA graphs (its logits over a static cache are others" in engine.banner and "slower" in caplog.text
    slots = start(engine, (9,))
    assert_equal(step(engine, slots, [0]), alone(model, slots, [0]))


def test_a_move_that_fails_halfway_ends_both_sequences_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    engine = engine_of(model, 3, 256)
    slots, exchange = start(engine, (9, 20, 30)), Store.exchange

    def fail(store: Store, a: int, b: int, length: int) -> None:
        if store is engine._captured.stores[1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        exchange(store, a, b, length)

    monkeypatch.setattr(Store, "exchange", fail)
    with pytest.raises(AmqError, match="out of memory on cpu: its caches hold 59 tokens of 3 sequences"):
        step(engine, slots, [2])
    monkeypatch.undo()
    moved = next(slot for slot in slots[:2] if not slot.place.sound)
    kept = next(i for i in (0, 1) if slots[i] is not moved)
    for slot in (slots[2], moved):
        with pytest.raises(AmqError, match="an earlier pass of a segment's slot failed"):
            engine.forward([Segment(slot, [1])])
        engine.close(slot)
    assert_equal(step(engine, slots, [kept]), alone(model, slots, [kept]))
    after = [engine.open(TEXTS[3 + i][:10], 5) for i in range(2)]
    assert all(slot.length == 0 for slot in after)
    for i, slot in enumerate(after):
        engine.forward([Segment(slot, TEXTS[3 + i][:10])])
    slots[3:] = after
    assert_equal(step(engine, slots, [3, 4, kept]), alone(model, slots, [3, 4, kept]))


class Failing(Recorded):
    """From capture number `first` on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.captured >= self.first:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return super().__call__(step)


def test_a_larger_step_runs_where_a_smaller_one_could_not_be_captured(
    caplog: pytest.LogCaptureFixture, attended: list[tuple[int, int]]
) -> None:
    model = build()
    engine = engine_of(model, 2, 600, Failing(2))  # of two rows over 768 and 512 positions
    assert set(engine._captured._steps) == {Shape(0, 2, 768), Shape(0, 2, 512)}
    assert caplog.text.count("a larger one runs in its place") == 4
    assert "step of 1 sequences over 256 positions is not captured" in caplog.text
    assert "decode steps captured" in engine.banner
    slots = start(engine, (9, 20))
    attended.clear()
    assert_equal(step(engine, slots, [1]), alone(model, slots, [1]))
    assert attended == [(2, 512)] * 3


def test_the_first_capture_that_fails_leaves_none(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    engine = engine_of(model, 2, 600, Failing(0))
    assert engine._captured is None and attention_of(model) == "sdpa"
    assert "no CUDA graphs (CUDA out of memory. Tried to allocate; a smaller context or fewer" in engine.banner
    slots = start(engine, (9, 20))
    assert_equal(step(engine, slots, [0, 1]), alone(model, slots, [0, 1]))


def test_a_context_without_room_is_refused_or_lowered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three layers of two heads of 16: 768 bytes a position; a tenth of what is free is left."""
    model, capture = build(max_position_embeddings=4096), lambda step: step
    monkeypatch.setattr(torch_engine, "free_on", lambda device: 10 * 768 * 2 * 600 // 9 + 9)
    with pytest.raises(AmqError, match=r"2 sequences of 1024 tokens: 0\.00 GiB needed.*; 512 tokens fit for each: use"):
        engine_of(model, 2, 1024, capture)
    assert engine_of(model, 2, 512, capture).context == 512
    with caplog.at_level(logging.WARNING):
        engine = engine_of(model, 2, None, capture)
    assert engine.context == 512 and "512 tokens fit for each, which is the context now" in caplog.text
    assert "context 512" in engine.banner
    monkeypatch.setattr(torch_engine, "free_on", lambda device: 100_000)
    with pytest.raises(AmqError, match="0 tokens fit for each"):
        engine_of(model, 2, None, capture)


def test_a_pass_that_runs_out_of_memory_says_how_many_tokens_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    engine = TorchEngine(model, context=600, max_sequences=2)
    slots = start(engine, (9, 20))

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.register_forward_pre_hook(fail)
    monkeypatch.setattr(torch_engine, "free_on", lambda device: 768 * 50)
    with pytest.raises(AmqError, match="caches hold 29 tokens of 2 sequences, and 50 more fit"):
        engine.forward([Segment(slots[0], TEXTS[0][9:12])])
    hook.remove()
    assert_equal(step(engine, slots, [1]), alone(model, slots, [1]))  # the other goes on


def test_int8_activations_are_exact_in_the_trial_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    exact = torch_engine.exact_activations
    monkeypatch.setattr(torch_engine, "exact_activations", lambda model: entered.append(model) or exact(model))
    agree = torch_captured.CapturedSteps.agree
    monkeypatch.setattr(torch_captured.CapturedSteps, "agree", lambda self: bool(entered) and agree(self))
    model = build()
    assert NAME in engine_of(model, 2, 300).banner and entered == [model]
