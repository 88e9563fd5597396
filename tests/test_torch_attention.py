"""The attention of captured steps against torch's, and which attention models run with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amq.runtime import torch_attention
from amq.runtime.engine import Segment
from amq.runtime.torch_attention import (
    CHUNK,
    NAME,
    attention_of,
    bias,
    choose_attention,
    decode_attention,
    flash_decode,
)
from amq.runtime.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = random_tokens(1, 30)
SHAPES = ((1, 8, 2, 1), (1, 4, 4, 4), (3, 6, 1, 3), (4, 8, 2, 5))
"""Sequences, heads, heads of keys, chunks."""


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, features: int = 64) -> tuple[Tensor, ...]:
    """Query, keys, values and what each sequence sees, the cache as it lies in its store: with more rows and positions
    than are used, of which the first position is seen by all and the last by none."""
    sequences, heads, shared, chunks = shape
    generator = torch.Generator().manual_seed(1)
    store = torch.randn(2, chunks * CHUNK + 7, sequences + 1, shared, features, generator=generator).to(dtype)
    query = torch.randn(sequences, heads, 1, features, generator=generator).to(dtype)
    keys, values = store[:, : chunks * CHUNK, :sequences].permute(0, 2, 3, 1, 4)
    lengths = torch.randint(1, chunks * CHUNK, (sequences,), generator=generator)
    return query, keys, values, (torch.arange(chunks * CHUNK) < lengths[:, None])[:, None, None]


def plain(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    """In float64, with every head's own copy."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (keys, values))
    return scaled_dot_product_attention(query.double(), keys, values, attn_mask=seen, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_one_token_is_that_of_torch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """What is rounded to the dtype is each chunk's mean of values, the result, and the softmax's terms inside torch's
    kernel; scores of float32 add their own, of sums of 64 products."""
    query, keys, values, seen = inputs(shape, dtype)
    found = flash_decode(query, keys, values, bias(seen, dtype), 0.2)
    expected = plain(query, keys, values, seen, 0.2)
    allowed = (3 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * float(values.abs().max())
    assert found.dtype == dtype and found.shape == query.shape
    assert float((found - expected).abs().max()) <= allowed


class Sizes(TorchDispatchMode):
    """Notes the largest result that is not a view, and how many there are: each is a launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.launches = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [t.numel() for t in found if t.untyped_storage().data_ptr() not in held]
        self.largest = max(self.largest, *made, 0)
        self.launches += bool(made)
        return result


@pytest.mark.parametrize("shape, launches", list(zip(SHAPES, (1, 5, 1, 6), strict=True)))
def test_keys_and_values_are_not_copied(shape: tuple[int, int, int, int], launches: int) -> None:
    """Beside the attention itself, four launches weigh the parts of what is split; masks of several sequences are
    copied for every head of keys, if there is more than one, which makes 1/64 of the keys."""
    query, keys, values, seen = inputs(shape, torch.float16)
    added = bias(seen, torch.float16)
    with Sizes() as sizes:
        flash_decode(query, keys, values, added, 0.2)
    assert sizes.largest < keys.numel() / 16
    assert sizes.launches == launches


def test_the_kernel_of_cuda_takes_these_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has its shapes but not its numbers: it pads rows of the logarithms."""
    monkeypatch.setitem(torch_attention.KERNELS, "meta", torch_attention.KERNELS["cuda"])
    for shape in SHAPES:
        query, keys, values, seen = inputs(shape, torch.float16)
        parts = (t.to("meta") for t in (query, keys, values, bias(seen, torch.float16)))
        assert flash_decode(*parts, 0.2).shape == query.shape


class Attention(nn.Module):
    num_key_value_groups = 4
    is_causal = True


@pytest.mark.parametrize("case", ["rows", "no mask", "softcap", "sinks", "values of other size", "bool"])
def test_everything_else_is_left_to_transformers(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values, seen = inputs((2, 8, 2, 1), torch.float32)
    mask, options = bias(seen, torch.float32), {}
    if case == "rows":
        query, mask = query.expand(-1, -1, 3, -1), mask.expand(-1, -1, 3, -1)
    elif case == "no mask":
        mask = None
    elif case == "softcap":
        options = {"softcap": 30.0}
    elif case == "sinks":
        options = {"s_aux": torch.zeros(8)}
    elif case == "values of other size":
        values = values[..., :32]
    else:
        mask = seen
    called = []
    monkeypatch.setattr(torch_attention, "flash_decode", lambda *a: called.append(a))
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward", lambda *a, **k: ("theirs", k)
    )
    found, given = decode_attention(Attention(), query, keys, values, mask, scaling=0.2, **options)
    assert found == "theirs" and given == {"dropout": 0.0, "scaling": 0.2, **options} and not called


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "qwen3"])
def test_models_that_came_with_eager_attention_get_sdpa_where_they_have_it(name: str) -> None:
    model, tokens = ARCHITECTURES[name].build(attn_implementation="eager"), TOKENS
    with torch.no_grad():
        expected = model(tokens).logits
        choose_attention(model)
        assert attention_of(model) == "sdpa"
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert "float32, sdpa attention, not quantized" in TorchEngine(model, context=64).banner


def test_models_with_a_reason_for_eager_attention_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    capped = ARCHITECTURES["gemma2"].build(attn_implementation="eager")
    assert capped.config.attn_logit_softcapping
    lacking = ARCHITECTURES["llama"].build(attn_implementation="eager")
    monkeypatch.setattr(type(lacking), "_supports_sdpa", False)
    for model in (capped, lacking):
        choose_attention(model)
        assert attention_of(model) == "eager" and "eager attention" in TorchEngine(model, context=64).banner


def test_sdpa_that_would_leave_out_a_cap_of_the_scores_is_not_used() -> None:
    """transformers 5.14 chooses it for Gemma 2."""
    model, tokens = ARCHITECTURES["gemma2"].build(attn_implementation="eager", attn_logit_softcapping=0.05), TOKENS
    with torch.no_grad():
        expected = model(tokens).logits
        model.config._attn_implementation_internal = "sdpa"
        engine = TorchEngine(model, context=64)
        assert "eager attention" in engine.banner
        slot = engine.open(tokens[0].tolist(), 1)
        found = engine.forward([Segment(slot, tokens[0].tolist())])
    torch.testing.assert_close(found[0], expected[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fault", ["other logits", "refused"])
def test_sdpa_that_gives_other_logits_or_refuses_is_taken_back(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    def wrong(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        if fault == "refused":
            raise ValueError("`sdpa` attention does not support this")
        return query.transpose(1, 2).contiguous() * 100, None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", wrong)
    model, tokens = ARCHITECTURES["llama"].build(attn_implementation="eager"), TOKENS
    with torch.no_grad():
        expected = model(tokens).logits
        choose_attention(model)
        assert attention_of(model) == "eager"
        torch.testing.assert_close(model(tokens).logits, expected, atol=0, rtol=0)


def test_our_attention_is_used_where_the_model_has_sdpa_and_its_steps_are_captured() -> None:
    model = ARCHITECTURES["llama"].build(attn_implementation="sdpa")
    assert attention_of(model) == "sdpa" and TorchEngine(model, context=64) and attention_of(model) == "sdpa"
    engine = TorchEngine(model, context=64, capture=lambda step: step)
    assert attention_of(model) == NAME and f"{NAME} attention" in engine.banner
