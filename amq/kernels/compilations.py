"""What Triton has compiled in this process, and for which widths: the memory of `amq.kernels.triton`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import torch


class Compilations:
    """count: kernels of ours that were compiled, or found in Triton's folder and loaded. warm_devices: on which the
    kernels of a model were compiled when it was loaded."""

    def __init__(self) -> None:
        self.count = 0
        self.warm_devices: set[torch.device] = set()
        self._widths: dict[tuple[int, int], list[tuple[int, ...]]] = {}

    def watch(self, ours: Sequence[Any]) -> None:
        """Counts the compilations of the kernels `ours` from now on; whoever watched before, watches on."""
        from triton import knobs

        before, lock = knobs.runtime.jit_post_compile_hook, Lock()

        def hook(**about: Any) -> Any:
            if any(about["fn"].jit_function is kernel for kernel in ours):
                with lock:
                    self.count += 1
            return before(**about) if before is not None else None

        knobs.runtime.jit_post_compile_hook = hook

    def join(self, in_features: int, group_size: int, widths: Iterable[int]) -> list[set[int]]:
        """Notes that weights of these widths are one model's: from now on they share kernels.

        Returns sets of these widths, one for each kernel that products of some of them take: more than one where models
        that were joined before have some of them.
        """
        known = self._widths.setdefault((in_features, group_size), [])
        wanted = set(widths)
        if not any(wanted.issubset(some) for some in known):
            known.append(tuple(sorted(wanted)))
        shared = ((wanted.intersection(some), some) for some in known)
        return [own for own, some in shared if own and self.widths(in_features, group_size, own) == some]

    def widths(self, in_features: int, group_size: int, widths: Iterable[int]) -> tuple[int, ...]:
        """What the kernel for weights of these widths reads, ascending: the widths of the first model that has all of
        them, whichever were joined later; else these. It makes no difference to results."""
        wanted = set(widths)
        for known in self._widths.get((in_features, group_size), ()):
            if wanted.issubset(known):
                return known
        return tuple(sorted(wanted))


compilations = Compilations()


def prime(kernel: Any) -> None:
    """Lets Triton make the tables of `kernel` for the current device. It does so at the first use, and threads that are
    first together would each make their own, of which one is kept."""
    from triton.runtime import driver

    device = driver.active.get_current_device()
    if device not in kernel.device_caches:
        kernel.device_caches[device] = kernel.create_binder()
