"""What a smaller cache costs each layer, to first order: keys and values as the engine keeps them, and gradients.

`watch_keys` hands over what a block gives its attention; `change` is what rounding it would do to the likelihood, from
the gradients there. Rounded as csrc/cpu/vector_attention.h and docs/cpu.md say, with two simplifications: what biases
give all keys alike is the mean of the window's keys, and a query counts the codes of its own page, too, which the
engine still has in 16 bits. So keys of less than 8 bits are priced a little too high, in short windows most.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.shape import CACHE_BYTES, CACHES, PAGE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = "eager_attention_forward"
"""What transformers' files call the function of a model that has no other."""
HALF = 8 * CACHE_BYTES
"""Bits of a number that is in no code."""
CODED = tuple(kind for kind, (_, values) in CACHES.items() if values < HALF)
"""Kinds that a layer's cost is known of; the others cost nothing."""
WIDEST = 64
"""Features that are spread over each other at most."""
FIRST_BITS = 8
"""Of the first page of a layer whose keys are rounded by the page."""
Kept = tuple[int, Tensor, Tensor, bool]
"""(layer, its keys and values, float [1, heads, length, head_dim], with a graph; whether biases went into the keys)."""


def attention_of(model: PreTrainedModel) -> Callable[..., Any]:
    """What its layers attend with: one of transformers' functions, or the plain one beside the model's classes; raises
    AmqError where it has none of these."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as INTERFACE

    name = _attention_name(model)
    plain = getattr(sys.modules[type(model).__module__], PLAIN, None) if name == "eager" else None
    if name not in INTERFACE and plain is None:
        raise AmqError(
            f"--cache auto prices keys and values by gradients at transformers' attention functions, and "
            f"{type(model).__name__} has its own ({name}): give one kind as --cache"
        )
    return cast("Callable[..., Any]", plain or INTERFACE[name])


def _attention_name(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


@contextmanager
def watch_keys(model: PreTrainedModel) -> Iterator[list[Kept]]:
    """What attention is given inside, in the order in which layers run; a layer that reads another's has none. Raises
    AmqError as `attention_of` does."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as INTERFACE

    attend, name, seen = attention_of(model), _attention_name(model), list[Kept]()

    def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not any(key is known for _, known, *_ in seen):
            for tensor in (key, value):
                tensor.requires_grad_()  # leaves in block 0, where nothing before has a gradient
            seen.append((int(module.layer_idx), key, value, _has_biases(module)))  # type: ignore[arg-type]
        return attend(module, query, key, value, *args, **kwargs)

    known = INTERFACE.get(name)
    INTERFACE[name] = watched  # which layers ask for by name; `eager` is only the plain one while nobody says otherwise
    try:
        yield seen
    finally:
        del INTERFACE[name]  # of this very object; what stands behind it is every object's
        if known is not None and INTERFACE.get(name) is not known:
            INTERFACE[name] = known


def _has_biases(module: nn.Module) -> bool:
    """Whether keys have a bias that is still in them when they are kept: behind a norm of their own it is not."""
    if getattr(module, "k_norm", None) is not None:
        return False
    names = ("k_proj", "qkv_proj", "query_key_value", "c_attn")
    return any(getattr(getattr(module, name, None), "bias", None) is not None for name in names)


def change(kind: str, key: Tensor, value: Tensor, gradients: Sequence[Tensor], has_biases: bool) -> Tensor:
    """Of the log-likelihood, to first order, by each position's rounding: float32 [length].

    kind: of CACHES. key, value and their gradients: [1, heads, length, head_dim].
    """
    pairs = zip((key, value), cached(kind, key.float(), value.float(), has_biases), gradients, strict=True)
    return torch.stack([((kept - exact.float()) * g.float()).sum((0, 1, 3)) for exact, kept, g in pairs]).sum(0)


def cached(kind: str, key: Tensor, value: Tensor, has_biases: bool = False) -> tuple[Tensor, Tensor]:
    """Keys and values of positions 0 … as a query of a later page reads them: float32 as given, [.., length,
    head_dim]."""
    keys, values = CACHES[kind]
    common = key.mean(-2, keepdim=True) if has_biases and keys < HALF else 0.0
    key = key - common
    if keys >= FIRST_BITS:
        key = _turned(key, keys) if keys < HALF else rounded(key, keys)
        return key + common, rounded(value, values) if values >= FIRST_BITS else _turned(value, values)
    first, values_first = (_turned(x[..., :PAGE, :], FIRST_BITS) for x in (key, value))
    key = torch.cat([first, _by_page(key[..., PAGE:, :], keys)], -2)
    return key + common, torch.cat([values_first, _turned(value[..., PAGE:, :], values)], -2)


def _by_page(key: Tensor, bits: int) -> Tensor:
    """Full pages feature by feature, what is behind them in 16 bits."""
    full = key.shape[-2] // PAGE * PAGE
    pages = key[..., :full, :].unflatten(-2, (-1, PAGE)).mT
    return torch.cat([rounded(pages, bits).mT.flatten(-3, -2), rounded(key[..., full:, :], HALF)], -2)


def _turned(x: Tensor, bits: int) -> Tensor:
    """Each position by itself, its features spread over each other for it."""
    return spread(rounded(spread(x), bits))


def spread(x: Tensor) -> Tensor:
    """x [.., head_dim] times the Walsh–Hadamard matrix of the largest power of two that divides its width, up to
    WIDEST, block by block; undone by itself."""
    width = min(x.shape[-1] & -x.shape[-1], WIDEST)
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return (x.unflatten(-1, (-1, width)) @ matrix.to(x.device) / width**0.5).flatten(-2)


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 x [.., n] in codes of each row between its least and largest number, or in fp16 or as it is."""
    if bits > HALF or not x.numel():
        return x
    if bits >= HALF:
        return x.half().float()
    least = _half_below(x.amin(-1, keepdim=True))
    scale = -_half_below((least - x.amax(-1, keepdim=True)) / (2**bits - 1))
    codes = torch.where(scale > 0, (x - least) / scale, 0).round().clamp(0, 2**bits - 1)
    return codes * scale + least


def _half_below(x: Tensor) -> Tensor:
    """The largest fp16 number that is no larger, as float32."""
    near = x.half()
    below = torch.nextafter(near, near.new_tensor(-torch.inf))
    return torch.where(near.float() <= x, near, below).float()
