"""Caches of transformers as data: the tensors in them, copies, and what is left when their end is cut off.

Nothing here knows a kind of cache: what holds tensors is walked, whatever its class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def states(value: Any, path: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Tensor]]:
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
            yield from states(item, f"{path}/{key}", seen | {id(value)})


def stored_bytes(cache: Any) -> int:
    """Of the memory that its tensors keep from being freed: a view's is all that it was cut from."""
    storages = {s.data_ptr(): s.nbytes() for _, tensor in states(cache) if (s := tensor.untyped_storage())}
    return sum(storages.values())


def copied(cache: Any) -> Any:
    """A copy that shares nothing, and has no more memory than its tensors take (deepcopy copies all behind a view)."""
    return copy.deepcopy(cache, {id(tensor): tensor.clone() for _, tensor in states(cache)})


def is_whole(cache: Any, length: int) -> bool:
    """Whether all its tensors hold `length` positions: no state that stands for many, no window that is full."""
    found = [tensor for _, tensor in states(cache)]
    return bool(found) and all(tensor.shape[-2] == length for tensor in found)


def cropped(cache: Any, removed: int) -> Any:
    """A copy of a cache without its last `removed` positions, which it must be able to do without (`is_whole`)."""
    shared = copy.deepcopy(cache, {id(tensor): tensor for _, tensor in states(cache)})
    if removed:
        shared.crop(-removed)  # makes views; transformers 5.24 takes no length
    return copied(shared)
