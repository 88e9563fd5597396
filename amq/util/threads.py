"""Independent pieces of tensor work on Python threads, each piece single-threaded inside.

For long loops of small torch operations this beats torch's own threads twice: there is no barrier per operation, and
on a shared machine a stolen core delays one piece instead of every operation (measured 2026-11 on a busy 2-core
machine: a GPTQ block took up to 37 s with torch's threads and 1.9 s on a quiet one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[function(i) for i in items]` on as many threads as torch may use; gradients are off in `function`."""
    threads = torch.get_num_threads()

    def call(item: Item) -> Result:
        with torch.no_grad():
            return function(item)

    if threads == 1 or len(items) < 2:
        return [call(item) for item in items]
    # The thread count of torch is per thread for its operations, but the last value set is what new threads start from.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(call, items))
        finally:
            torch.set_num_threads(threads)


def each(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """`parallel_map` where the tensors are on a CPU; on another device one piece after the other, for each fills it."""
    if device.type == "cpu":
        return parallel_map(function, items)
    with torch.no_grad():
        return [function(item) for item in items]
