"""What a model of transformers does with a KV cache, found by trying.

Signatures do not tell: transformers renamed `past_key_values` to `cache` behind a decorator that `inspect` does not
show, and **kwargs swallow a name that a model does not know, after which every token would be its first. So tokens are
run, and what counts is what the cache holds afterwards.

Where two ways to the same logits are compared, the cache is filled with large random numbers before (`stir`): whoever
leaves it out, or reads it at other positions, is then wrong by about the logits' own size. Rounding, also bfloat16's,
stays far below, so that one bound (`WRONG`) serves all. int8 activations would not: two codes that a rounding tells
apart become other texts after thirty blocks. They are exact meanwhile (`exact_activations`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.kernels.modules import QuantizedLinear
from amq.runtime.torch_cache import copied, states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFUSALS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
"""What a model raises for an argument that it does not take, or for a cache that it cannot use."""
STIRRED = 4.0
"""Standard deviation of what `stir` writes: it outweighs what a few tokens leave in a cache."""
WRONG = 0.05
"""Relative distance of logits or states from which on two ways are not the same."""
BEFORE, AFTER = 5, 3
"""Tokens before and after the place at which a state is gone on from."""


@dataclass(frozen=True)
class CacheUse:
    """How a model takes its cache.

    argument: its name. options: what else its forward wants, of the arguments that save work. layers: of the cache.
    recurrent: whether it holds more than what grows with every token (states of Mamba and its like), so that a sequence
        cannot be taken apart anywhere.
    plain: whether it holds keys and values of all positions and nothing else, also no window.
    token_bytes: of it, after one token.
    crops: whether its end can be cut off, as long as it `is_whole`.
    continues: whether the model goes on from it with several tokens at once.
    """

    argument: str
    options: dict[str, Any]
    recurrent: bool
    layers: int
    plain: bool
    token_bytes: int
    crops: bool
    continues: bool = True


@torch.inference_mode()
def try_cache(model: PreTrainedModel, arguments: Sequence[str]) -> CacheUse:
    """Runs two tokens through `model`, one after another, with its cache under each name until one is right; a few more
    where the cache holds a recurrent state.

    Raises AmqError where none of them makes it fill a cache.
    """
    refused = []
    for argument in arguments:
        for options in ({"logits_to_keep": 1}, {}):
            try:
                use = _try(model, argument, options)
            except AmqError:  # of a quantized linear, which no other name would mend
                raise
            except REFUSALS as error:
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            else:
                if use is not None:
                    if not use.recurrent:
                        return use
                    with exact_activations(model):
                        return replace(use, continues=_continues(model, use))
                reason = "not filled"
        refused.append(f"{argument}: {reason}")
    raise AmqError(f"{type(model).__name__} takes no KV cache that amq knows ({'; '.join(refused)})")


@contextmanager
def exact_activations(model: nn.Module) -> Iterator[None]:
    """The quantized linears of `model` do not round their inputs inside."""
    before = {m: m.activations for m in model.modules() if isinstance(m, QuantizedLinear)}
    try:
        for linear in before:
            linear.activations = "fp32"
        yield
    finally:
        for linear, activations in before.items():
            linear.activations = activations


def stir(cache: Any) -> None:
    """Fills the tensors of a cache with random numbers, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    for _, tensor in states(cache):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * STIRRED)


def differ(found: Tensor, expected: Tensor) -> bool:
    """Whether one of the two ways that made them is wrong."""
    found, expected = found.float(), expected.float()
    return not float((found - expected).norm()) <= WRONG * float(expected.norm())  # NaN is wrong too


def _new_cache(model: PreTrainedModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _try(model: PreTrainedModel, argument: str, options: dict[str, Any]) -> CacheUse | None:
    """None where the cache stays empty."""
    from transformers.cache_utils import DynamicLayer

    cache = _new_cache(model)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    found = []
    for _ in range(2):
        model(input_ids=token, use_cache=True, **{argument: cache}, **options)
        found.append({path: tensor.clone() for path, tensor in states(cache)})
    first, second = found
    if not first:
        return None
    recurrent = any(path in second and second[path].shape == tensor.shape for path, tensor in first.items())
    crops = not recurrent and _crops(cache, first)
    plain = crops and all(type(layer) is DynamicLayer for layer in cache.layers if any(states(layer)))
    size = sum(tensor.nbytes for tensor in first.values())
    return CacheUse(argument, options, recurrent, len(cache), plain, size, crops)


def _crops(cache: Any, before: dict[str, Tensor]) -> bool:
    """Whether cutting off a token leaves what was there `before` it."""
    try:
        cache.crop(-1)
    except REFUSALS:
        return False
    after = dict(states(cache))
    return after.keys() == before.keys() and all(torch.equal(after[path], before[path]) for path in before)


def _continues(model: PreTrainedModel, use: CacheUse) -> bool:
    """Whether several tokens at once give the logits, and leave the states, of one after another."""

    def read(cache: Any, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=True, **{use.argument: cache}, **use.options).logits[0, -1]

    text = torch.arange(BEFORE + AFTER, device=model.device)[None]
    cache = _new_cache(model)
    read(cache, text[:, :BEFORE])
    stir(cache)
    other = copied(cache)
    try:
        found = read(other, text[:, BEFORE:])
    except AmqError:
        raise
    except REFUSALS:
        return False
    for token in text[0, BEFORE:]:
        expected = read(cache, token.view(1, 1))
    left = dict(states(other))
    return not differ(found, expected) and all(
        path in left and left[path].shape == tensor.shape and not differ(left[path], tensor)
        for path, tensor in states(cache)
    )
