"""What a model of transformers does with a KV cache, found by trying.

Signatures do not tell: transformers renamed `past_key_values` to `cache` behind a decorator that `inspect` does not
show, and **kwargs swallow a name that a model does not know, after which every token would be its first. So tokens are
run, and what counts is what the cache holds afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amq.errors import AmqError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFUSALS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError)
"""What a model raises for an argument that it does not take, or for a cache that it cannot use."""


@dataclass(frozen=True)
class CacheUse:
    """How a model takes its cache.

    argument: its name. options: what else its forward wants, of the arguments that save work.
    recurrent: whether it holds more than what grows with every token (states of Mamba and its like), so that a sequence
        cannot be taken apart anywhere. layers: of the cache.
    """

    argument: str
    options: dict[str, Any]
    recurrent: bool
    layers: int


@torch.inference_mode()
def try_cache(model: PreTrainedModel, arguments: Sequence[str]) -> CacheUse:
    """Runs two tokens through `model`, one after another, with its cache under each name until one is right.

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
                    return use
                reason = "not filled"
        refused.append(f"{argument}: {reason}")
    raise AmqError(f"{type(model).__name__} takes no KV cache that amq knows ({'; '.join(refused)})")


def _try(model: PreTrainedModel, argument: str, options: dict[str, Any]) -> CacheUse | None:
    """None where the cache stays empty."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    shapes = []
    for _ in range(2):
        model(input_ids=token, use_cache=True, **{argument: cache}, **options)
        shapes.append({path: tensor.shape for path, tensor in _states(cache)})
    first, second = shapes
    if not first:
        return None
    return CacheUse(argument, options, any(second.get(path) == shape for path, shape in first.items()), len(cache))


def _states(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a cache object with their places in it; numbers kept as tensors are none."""
    if isinstance(value, Tensor):
        if value.ndim > 1 and value.numel():
            yield path, value
        return
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif type(value).__module__.startswith(("transformers", "transformers_modules")):
        items = vars(value).items()
    else:
        return
    if id(value) not in seen:
        for key, item in items:
            yield from _states(item, f"{path}/{key}", seen | {id(value)})
