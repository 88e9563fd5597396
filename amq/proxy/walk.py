"""Walk: many configurations go through a model's blocks together.

Configurations that agree in all blocks so far share one hidden state; where they begin to differ their ways part. A
block's weights are brought into memory once, each distinct weight is dequantized once per block where memory allows,
and every configuration and batch goes through before the next block is looked at. So measuring what each linear costs
alone is the same walk as measuring the points of a front.

What comes out is bit for bit what each configuration gives alone: the same operations on the same batches.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from amq.formats import KEPT
from amq.model.blocks import BlockRunner
from amq.model.inventory import EMBEDDING, Inventory
from amq.model.paging import holding
from amq.model.states import StateStore
from amq.proxy.resident import BankReader
from amq.proxy.swap import LinearSwap

Formats = Mapping[str, str]
Part = tuple[str, ...]
"""Formats of the weights of one block (or of those before the first), in the inventory's order."""
Way = tuple[Part, ...]
"""What a configuration's hidden states depend on: the part before the first block, then one for each block."""


@dataclass(frozen=True)
class Junction:
    """Hidden states that the next configurations have in common: at boundary `block`, under `key` in the store."""

    block: int
    key: int
    way: Way


@dataclass
class Walk:
    """The way through one model; `batches` of tokens, int64 [windows, length] each, whose states `store` keeps.

    whole: whether weights that were put into a block may stay there while the next ones are walked through.
    seconds: spent in the model's own forward.
    """

    runner: BlockRunner
    swap: LinearSwap
    inventory: Inventory
    bank: BankReader
    batches: Sequence[Tensor]
    store: StateStore
    whole: bool
    seconds: float = 0.0
    _names: list[list[str]] = field(init=False)
    _keys: int = 0

    def __post_init__(self) -> None:
        blocks: list[list[str]] = [[] for _ in range(self.runner.n_blocks)]
        for spec in self.inventory.linears:
            blocks[spec.block].append(spec.name)
        before = [s.name for s in self.inventory.outer if s.kind == EMBEDDING or s.tied]
        self._names = [before, *blocks]

    def way(self, formats: Formats) -> Way:
        return tuple(tuple(formats.get(name, KEPT.name) for name in names) for names in self._names)

    def advance(
        self, ways: Sequence[Way], begin: Junction | None = None, following: Sequence[Way] = ()
    ) -> tuple[list[int], Junction | None]:
        """From the tokens, or from a junction that all of `ways` come through, to behind the last block.

        following: the ways that are walked next. Returns the key of each way's final states, which are in the store
        under (key, batch), and the junction from which `following` can go on, if there is one.
        """
        block = 0 if begin is None else begin.block
        keys = self._begin(ways, begin)
        leader, branch = _branch(ways, following)
        junction = None
        while True:
            if block == branch and block > 0:
                junction = Junction(block, keys[leader], ways[leader][: block + 1])
            if block == self.runner.n_blocks:
                return keys, junction
            stop = self._stop(ways, block, branch)
            keep = {junction.key} if junction is not None else set()
            keys = self._through(ways, keys, block, stop, keep)
            block = stop

    def _begin(self, ways: Sequence[Way], begin: Junction | None) -> list[int]:
        if begin is not None:
            assert all(way[: begin.block + 1] == begin.way for way in ways)
            return [begin.key] * len(ways)
        first: dict[Part, int] = {}
        return [first.setdefault(way[0], self._new_key()) for way in ways]

    def _new_key(self) -> int:
        self._keys += 1
        return self._keys

    def _stop(self, ways: Sequence[Way], block: int, branch: int) -> int:
        """The last boundary up to which one forward can go: further than a block where all ways are one."""
        stop = block + 1
        if not self.whole or any(way[0] != ways[0][0] for way in ways):
            return stop
        if any(way[1 : block + 2] != ways[0][1 : block + 2] for way in ways):
            return stop
        while stop < self.runner.n_blocks and stop != branch:
            if any(way[stop + 1] != ways[0][stop + 1] for way in ways):
                break
            stop += 1
        return stop

    def _through(self, ways: Sequence[Way], keys: Sequence[int], block: int, stop: int, keep: set[int]) -> list[int]:
        """One step of `advance`, from boundary `block` to `stop`; states of `keep` stay in the store."""
        parts = [(way[0], way[block + 1 : stop + 1], key) for way, key in zip(ways, keys, strict=True)]
        # forwards and backwards in turn: the first way of a block has what the last one of the block before it had
        order = sorted(set(parts), reverse=block % 2 == 1)
        reached = {part: self._new_key() for part in order}
        left = Counter(key for _, _, key in reached)
        names = [name for i in range(block, stop) for name in self._names[i + 1]]
        with holding(self.runner.model, block):
            try:
                for (before, formats, key), target in reached.items():
                    self._put(before, formats, block)
                    left[key] -= 1
                    self._run(block, stop, key, target, last=not left[key] and key not in keep)
            finally:
                (self.swap.trim if self.whole else self.swap.release)(names)
        return [reached[part] for part in parts]

    def _put(self, before: Part, formats: Sequence[Part], block: int) -> None:
        chosen = dict(zip(self._names[0], before, strict=True))
        for index, part in enumerate(formats):
            chosen.update(zip(self._names[block + 1 + index], part, strict=True))
        self.swap.put(chosen, self.bank)

    def _run(self, block: int, stop: int, key: int, target: int, last: bool) -> None:
        for index, tokens in enumerate(self.batches):
            hidden = None
            if block:
                hidden = self.store.pop((key, index)) if last else self.store.get((key, index))
            start = time.perf_counter()
            hidden = self.runner.hidden(tokens, stop, block, hidden)
            self.seconds += time.perf_counter() - start
            self.store.put((target, index), hidden)

    def take(self, key: int) -> list[Tensor]:
        """Final states of all batches, out of the store unless they are a junction's."""
        return [self.store.get((key, index)) for index in range(len(self.batches))]

    def drop(self, key: int) -> None:
        for index in range(len(self.batches)):
            self.store.drop((key, index))


def _branch(ways: Sequence[Way], following: Sequence[Way]) -> tuple[int, int]:
    """(index of the way that stays longest with all of `following`, boundary at which it leaves them).

    Boundary −1 where there is none.
    """
    if not following:
        return 0, -1
    common = _agree(following)
    lengths = [_agree([way[: len(common)], common]) for way in ways]
    longest = max(range(len(ways)), key=lambda i: len(lengths[i]))
    return longest, len(lengths[longest]) - 1


def _agree(ways: Sequence[Way]) -> Way:
    """What all of them begin with."""
    length = 0
    for parts in zip(*ways, strict=False):
        if any(part != parts[0] for part in parts):
            break
        length += 1
    return ways[0][:length]
