"""Sequences of TorchEngine that decode in one call, against each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.families import FAMILIES
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from amq.errors import AmqError
from amq.integrations.transformers import AmqConfig
from amq.kernels.modules import StoredLinear
from amq.runtime.engine import Segment
from amq.runtime.torch_batch import SHORT, decodes_together
from amq.runtime.torch_engine import TorchEngine
from amq.runtime.torch_places import CachedModel
from amq.runtime.trial import WRONG

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [tokens.tolist() for tokens in random_tokens(4, 200)]
LENGTHS = (9, 40, 60, 3)
PLAIN = ("llama", "qwen3", "opt", "mixtral")


@contextmanager
def batches(model: nn.Module) -> Iterator[list[int]]:
    """How many sequences each call of `model` has."""
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache"):  # not of the tests' own calls
            sizes.append(len(kwargs["input_ids"]))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield sizes
    hook.remove()


def start(engine: TorchEngine, lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    """Open slots that have read so many tokens of TEXTS each."""
    slots = [engine.open(text[:length], 60) for text, length in zip(TEXTS, lengths, strict=False)]
    for slot, text, length in zip(slots, TEXTS, lengths, strict=False):
        engine.forward([Segment(slot, text[:length])])
    return slots


def step(engine: TorchEngine, slots: list[Any], which: list[int]) -> Tensor:
    """The next token of the texts `which`, in one pass."""
    return engine.forward([Segment(slots[i], [TEXTS[i][slots[i].length]]) for i in which]).clone()


def alone(model: nn.Module, text: int, length: int) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([TEXTS[text][:length]])).logits[0, -1].float()


@pytest.mark.parametrize("name", PLAIN)
def test_sequences_that_come_and_go_get_the_logits_of_each_alone(name: str) -> None:
    model = ARCHITECTURES[name].build()
    engine = TorchEngine(model, context=256, max_sequences=4)
    assert "sequences decode together" in engine.banner
    slots = start(engine)
    groups = [[0, 1], [0, 1], [0, 1, 2], [2, 1, 0], [3, 2], [3, 2], [0, 1], [0], [1, 2, 3, 0], [0, 3]]
    with batches(model) as sizes:
        for which in groups:
            rows = step(engine, slots, which)
            expected = torch.stack([alone(model, i, slots[i].length) for i in which])
            # some sixty roundings of float32 of which none cancels another, as in test_torch_sequences.py
            allowed = 64 * torch.finfo(torch.float32).eps
            assert ((rows - expected).norm(dim=-1) <= allowed * expected.norm(dim=-1)).all(), which
    assert sizes == [len(which) for which in groups]
    for slot in slots:
        engine.close(slot)


def test_bfloat16_differs_by_its_rounding() -> None:
    """The way of a batch and the way of each alone are as far from float64 as each other."""
    model, exact = ARCHITECTURES["llama"].build().bfloat16(), ARCHITECTURES["llama"].build().bfloat16().double()
    engine = TorchEngine(model, context=256, max_sequences=4)
    assert "sequences decode together" in engine.banner
    slots, errors = start(engine), {"batch": 0.0, "alone": 0.0}
    for _ in range(10):
        rows = step(engine, slots, [0, 1, 2, 3])
        for i, slot in enumerate(slots):
            truth = alone(exact, i, slot.length)
            errors["batch"] += float((rows[i] - truth).square().sum())
            errors["alone"] += float((alone(model, i, slot.length) - truth).square().sum())
    assert 0 < errors["batch"] <= 2**2 * errors["alone"]


def test_batches_last_and_are_taken_apart() -> None:
    """Formed once while the same sequences decode; prompts and single sequences go beside them."""
    model = ARCHITECTURES["llama"].build()
    engine = TorchEngine(model, context=256, max_sequences=4)
    slots = start(engine)
    step(engine, slots, [0, 1])
    batch = slots[0].place.batch
    step(engine, slots, [1, 0])
    engine.forward([Segment(slots[0], [1]), Segment(slots[2], [4, 5]), Segment(slots[1], [2])])
    assert slots[0].place.batch is slots[1].place.batch is batch and slots[2].place.batch is None
    step(engine, slots, [0])
    assert slots[0].place.batch is slots[1].place.batch is None
    step(engine, slots, [0, 1])
    engine.close(slots[0])
    assert slots[1].place.batch is None
    torch.testing.assert_close(step(engine, slots, [1, 2]).shape, torch.Size([2, 256]))


def test_short_sequences_are_not_padded_to_long_ones() -> None:
    """At most by their own length, or SHORT."""
    model = ARCHITECTURES["llama"].build()
    engine = TorchEngine(model, context=256, max_sequences=4)
    slots = start(engine, (SHORT + 20, 2 * SHORT + 30, 10, 5))
    with batches(model) as sizes:
        step(engine, slots, [0, 1, 2, 3])
    assert sizes == [2, 2]  # 158 and 84 positions, 10 and 5
    with batches(model) as sizes:
        step(engine, slots, [1, 2])
    assert sizes == [1, 1]


@pytest.mark.parametrize(
    "name, reason",
    [("gemma3", "more than keys and values, or windows"), ("qwen3_5", "more than keys and values"), ("lfm2", "more")],
)
def test_other_caches_run_one_after_another_and_the_banner_says_so(name: str, reason: str) -> None:
    model = FAMILIES[name].build()
    engine = TorchEngine(model, context=256, max_sequences=4)
    assert f"one sequence after another (the cache holds {reason}" in engine.banner
    assert "sequence" not in TorchEngine(model, context=256).banner
    slots = start(engine)
    with batches(model) as sizes:
        rows = step(engine, slots, [0, 1])
    assert sizes == [1, 1] and rows.shape == (2, 256)


def without(model: nn.Module, *names: str) -> nn.Module:
    """`model`, whose forward does not look at these arguments."""
    old = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return old(self, *args, **{name: value for name, value in kwargs.items() if name not in names})

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [("attention_mask",), ("position_ids",), ("attention_mask", "position_ids")])
def test_models_that_overlook_mask_or_positions_are_found_out(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    model = without(ARCHITECTURES["llama"].build().to(dtype), *names)
    engine = TorchEngine(model, context=256, max_sequences=2)
    assert "one sequence after another (the model takes no sequences of different lengths)" in engine.banner
    slots = start(engine, (9, 40))
    rows = step(engine, slots, [0, 1])
    expected = torch.stack([alone(model, i, slots[i].length) for i in (0, 1)])
    assert ((rows - expected).norm(dim=-1) <= WRONG * expected.norm(dim=-1)).all()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_int8_activations_are_exact_in_the_trial_and_only_there(tmp_path: Path) -> None:
    """They tell roundings apart by whole codes, which 30 blocks of random states make another text of."""
    folder = tiny_checkpoint(ARCHITECTURES["qwen3"].build(), tmp_path / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=AmqConfig(activations="int8"))
    linears, seen = [m for m in model.modules() if isinstance(m, StoredLinear)], []
    hook = linears[0].register_forward_pre_hook(
        lambda linear, inputs: seen.append((linear.activations, len(inputs[0])))
    )
    engine = TorchEngine(model, context=256, max_sequences=2)
    hook.remove()
    assert ("fp32", 2) in seen and ("int8", 2) not in seen
    assert "(int8 activations), sequences decode together" in engine.banner
    assert linears and all(linear.activations == "int8" for linear in linears)
    slots = start(engine, (9, 40))
    assert step(engine, slots, [0, 1]).isfinite().all()


def test_a_model_that_refuses_batches_is_found_out_and_a_broken_linear_is_not_hidden() -> None:
    def refusing(error: Exception) -> Callable[..., Tensor]:
        def forward(tokens: Tensor, cache: Any, every: bool = False, **more: Tensor) -> Tensor:
            if more:
                raise error
            return engine._forward(tokens, cache, every)

        return forward

    engine = TorchEngine(ARCHITECTURES["llama"].build())
    model = CachedModel(refusing(TypeError("unexpected keyword")), engine._new_cache, engine._device)
    assert not decodes_together(model)
    model = CachedModel(refusing(AmqError("model.layers.0 is broken")), engine._new_cache, engine._device)
    with pytest.raises(AmqError, match="layers.0 is broken"):
        decodes_together(model)
