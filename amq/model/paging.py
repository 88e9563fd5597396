"""Which blocks of a model have their weights in memory.

A model that was loaded whole has all of them, always. One that is larger than memory has a `Pager`: its blocks are
empty (on meta) until they run or are held, and few are in memory at once. Every stage that reads or writes weights of a
block does so while it is `holding` that block, and loops block by block: hold it, run everything through it, go on.

What is changed in a block counts until the block is let go; the next time it is as the files have it. `after_reading`
names changes to make again whenever that happens, such as the quantized weights of finished blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError

ATTRIBUTE = "_amq_pager"
Slot = tuple[nn.Module, str, Any]
"""(module, name of a parameter or persistent buffer in it, what is there while the block is empty)."""


class Absent(torch.Tensor):
    """Stands for a weight that is not in memory: has a shape and a dtype, and refuses to be computed with.

    A tensor on meta would not do: torch multiplies by it without a word, and what is copied into it is lost.
    """

    _name: str

    @staticmethod
    def of(name: str, like: Tensor) -> Absent:
        absent = torch.empty_like(like, device="meta").as_subclass(Absent)
        absent._name = name
        return absent

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            given = [*args, *(kwargs or {}).values()]
            given += [x for several in given if isinstance(several, list | tuple) for x in several]
            tensors = [x for x in given if isinstance(x, torch.Tensor)]
            name = next(x._name for x in tensors if isinstance(x, Absent))
            if func == _DATA or not all(x.is_meta for x in tensors):
                raise AmqError(f"{name} is not in memory: its block has to be held (amq.model.paging.holding)")
            result = func(*args, **(kwargs or {}))
            return Absent.of(name, result) if func is torch.Tensor.detach else result  # nn.Parameter wants its type


_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Pager:
    """Brings weights of `parts`, {path: module}, into memory, by `read(path)`, and empties them again.

    parts: the first `n_blocks` are the decoder blocks; the others, which text does not pass through, are never there
        unless they are held or run.
    checked: whether it was shown that the model can be run block by block.
    """

    def __init__(self, parts: Mapping[str, nn.Module], n_blocks: int, read: Callable[[str], None]) -> None:
        self.paths, self.parts, self.n_blocks = tuple(parts), tuple(parts.values()), n_blocks
        self._read = read
        self._slots = [_slots(path, part) for path, part in parts.items()]
        self.sizes = [sum(empty.numel() * empty.element_size() for _, _, empty in slots) for slots in self._slots]
        self._held: Counter[int] = Counter()
        self._there: set[int] = set()
        self._changes: dict[int, list[Callable[[], object]]] = {}
        self.reads = 0
        self.checked = False
        for index, part in enumerate(self.parts):
            self._empty(index, True)
            part.register_forward_pre_hook(lambda module, args, index=index: self._visit(index))

    def part_of(self, name: str) -> int | None:
        """The part that the parameter `name` lies in; None outside of all."""
        return next((index for index, path in enumerate(self.paths) if name.startswith(f"{path}.")), None)

    def outside(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The parameters of `model` that lie in none of the parts, each once: they are always in memory."""
        prefixes = tuple(f"{path}." for path in self.paths)
        return [(name, value) for name, value in model.named_parameters() if not name.startswith(prefixes)]

    @contextmanager
    def holding(self, block: int) -> Iterator[None]:
        self._visit(block)
        self._held[block] += 1
        try:
            yield
        finally:
            self._held[block] -= 1
            if not self._held[block]:
                self._empty(block)

    def after_reading(self, block: int, change: Callable[[], object]) -> None:
        """Calls `change` every time that the block's weights have been read, from the next time on."""
        self._changes.setdefault(block, []).append(change)
        if not self._held[block]:
            self._empty(block)

    def forget_changes(self) -> None:
        """From now on blocks are as the files have them."""
        for block in self._changes:
            if not self._held[block]:
                self._empty(block)
        self._changes.clear()

    def _visit(self, block: int) -> None:
        """Makes sure that the block's weights are in memory."""
        if block in self._there:
            return
        for other in [b for b in self._there if not self._held[b]]:
            self._empty(other)
        self._there.add(block)
        try:
            self._read(self.paths[block])
            self.reads += 1
            for change in self._changes.get(block, ()):
                change()
        except BaseException:
            self._empty(block)
            raise

    def _empty(self, block: int, always: bool = False) -> None:
        if block in self._there or always:
            self._there.discard(block)
            for module, name, empty in self._slots[block]:
                (module._parameters if name in module._parameters else module._buffers)[name] = empty


def _slots(path: str, block: nn.Module) -> list[Slot]:
    slots: list[Slot] = []
    for name, module in block.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                empty = Absent.of(".".join(filter(None, (path, name, key))), value)
                slots.append((module, key, nn.Parameter(empty, requires_grad=False)))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                slots.append((module, key, Absent.of(".".join(filter(None, (path, name, key))), buffer)))
    return slots


def pager_of(model: nn.Module) -> Pager | None:
    """None of a model whose weights are all in memory."""
    return getattr(model, ATTRIBUTE, None)


def block_bytes(model: nn.Module) -> int:
    """Most bytes that weights of a block will take besides what is in memory: none of a model that is there."""
    pager = pager_of(model)
    return 0 if pager is None else max(pager.sizes)


def memory_text(model: nn.Module) -> str:
    """A line for a plan: what a model that is read block by block has in memory; empty for any other."""
    pager = pager_of(model)
    if pager is None:
        return ""
    always = sum(value.numel() * value.element_size() for _, value in pager.outside(model))
    return (
        f"plan: weights are read block by block: {always / 2**30:.2f} GiB outside of the blocks stay in memory "
        f"(embedding, head), and one of {pager.n_blocks} blocks at a time, at most {max(pager.sizes) / 2**30:.2f} GiB; "
        f"all blocks would take {sum(pager.sizes[: pager.n_blocks]) / 2**30:.2f} GiB"
    )


def holding(model: nn.Module, block: int) -> AbstractContextManager[None]:
    """Inside, the weights of that block are in memory, and what is changed in them counts."""
    pager = pager_of(model)
    return nullcontext() if pager is None else pager.holding(block)


def after_reading(model: nn.Module, block: int, change: Callable[[], object]) -> None:
    """`change`, which was made to the weights of that block, is made again whenever they are read again."""
    if (pager := pager_of(model)) is not None:
        pager.after_reading(block, change)


def named_weights(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """All parameters, each once and under its first name, as named_parameters gives them, in parts: all at once of a
    model that is in memory, else what is outside of the blocks and then block after block, held meanwhile."""
    pager = pager_of(model)
    if pager is None:
        yield list(model.named_parameters())
        return
    yield list(pager.outside(model))
    for index, (path, part) in enumerate(zip(pager.paths, pager.parts, strict=True)):
        with pager.holding(index):
            listed: list[tuple[str, Tensor]] = [(f"{path}.{n}", value) for n, value in part.named_parameters()]
            yield listed
            listed.clear()  # the caller still has the list while the next block is read: two would be there


def in_turn(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """`names` of parameters or buffers as they come, each while the block that it lies in is held; those of a block
    should follow each other."""
    pager = pager_of(model)
    if pager is None:
        yield from names
        return
    for block, group in groupby(names, pager.part_of):
        with nullcontext() if block is None else pager.holding(block):
            yield from group
