"""Decode steps of `TorchEngine` that are captured once, at load, and run again without Python.

The sequences of an engine are rows of one static cache. A step reads its tokens and their positions from the device,
for so many rows and so many positions of the cache: powers of two of both, so that at most twice the positions in use
are attended to. All are captured at load: a capture takes two passes through Python, for which every sequence of a
server would wait, and may fail, which a running request should not be the first to find out. Eight sequences of 8192
positions have (rows: 1, 2, 4, 8) · (positions: 256 … 8192) = 24 of them, which share their memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.runtime.cuda_graphs import Capture, Step
from amq.runtime.torch_attention import bias
from amq.runtime.torch_places import CachedModel, Growing
from amq.runtime.torch_static import ReadLayer, StepLayer, Store, cache_of
from amq.runtime.trial import REFUSALS, differ, stir

WARM_UPS = 3
"""Steps before the first capture of so many rows: they prepare weights, and compile what is compiled when used."""
SMALLEST = 256
"""Positions that a step attends to, at least: fewer are no faster, where each block of threads reads so many."""
TRIED = (5, 2)
"""Tokens of the two sequences that steps are tried with."""

log = logging.getLogger(__name__)


def buckets(context: int) -> list[int]:
    """The numbers of positions that steps attend to: powers of two, and `context` rounded up to SMALLEST."""
    most = -(-context // SMALLEST) * SMALLEST
    found = [SMALLEST]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def sizes(rows: int) -> list[int]:
    """The numbers of rows that steps have."""
    return [1 << i for i in range((rows - 1).bit_length())] + [rows]


@dataclass(frozen=True)
class Shape:
    """Of a step: `rows` from `first` on, `positions` of the cache."""

    first: int
    rows: int
    positions: int

    def holds(self, rows: Sequence[int], positions: int) -> bool:
        return self.first <= min(rows) and max(rows) < self.first + self.rows and positions <= self.positions


class Captured:
    """A place for sequences, one after another: a row of the cache of `steps`.

    tokens, owner: what its cache holds, and whose that is, also after the sequence has ended.
    """

    def __init__(self, steps: CapturedSteps, row: int) -> None:
        self._steps, self.row = steps, row
        self.owner = ""
        self.tokens: list[int] = []
        self.sound = True
        """As of `Growing`."""
        self.reach = 0
        """Positions that something has been written to: what lies beyond is zero."""

    @torch.inference_mode()
    def reset(self) -> None:
        self.crop(0)
        self.sound = True

    @torch.inference_mode()
    def crop(self, length: int) -> None:
        """Keeps the first `length` positions. The others are cleared: a mask hides them, but not a NaN in them, which
        another sequence may have left."""
        for store in self._steps.stores:
            for tensor in store.allocated():
                tensor[length : self.reach, self.row] = 0
        self.reach = length
        del self.tokens[length:]

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor:
        """As of `Growing`."""
        if len(tokens) == 1:
            return self._steps.run([self], tokens)
        self.expect(len(tokens))
        rows = self._steps.read(self, tokens, every)
        self.add(tokens)
        return rows

    def expect(self, count: int) -> None:
        """So many positions are being written."""
        self.sound = False
        self.reach = max(self.reach, len(self.tokens) + count)

    def add(self, tokens: Sequence[int]) -> None:
        """They have been computed."""
        self.tokens += tokens
        self.sound = True


class CapturedSteps:
    """`rows` places over one cache of `context` positions each, and their steps.

    layers: of the cache. dtype: of the model's scores.
    together: whether several rows share a step; it takes a model that is right with a mask and positions of each row.
        Else every row has steps of its own, and the model makes the mask, also that of a window.
    """

    def __init__(self, model: CachedModel, layers: int, context: int, rows: int, dtype: torch.dtype) -> None:
        self._model, self._rows, self._dtype = model, rows, dtype
        self._buckets = buckets(context)
        self._spare = self._buckets[-1]
        self.together = rows > 1
        self.stores = [Store(self._spare, rows) for _ in range(layers)]
        self.places = [Captured(self, row) for row in range(rows)]
        self._host = torch.zeros(3, rows, dtype=torch.int64)  # tokens, their positions, where they are written
        self._host[2] = self._spare
        self._inputs = self._host.to(model.device)
        self._numbers = torch.arange(rows, device=model.device)
        self._positions = torch.arange(self._spare, device=model.device)
        self._steps: dict[Shape, Step] = {}

    def capture(self, capture: Capture) -> None:
        """Captures the steps, the largest first, whose memory the others share.

        Raises what stood in the way of the first. A later one that fails is said in a warning: the next larger one
        that there is runs in its place.
        """
        wide = [(0, size) for size in reversed(sizes(self._rows))]
        blocks = wide if self.together else [(row, 1) for row in range(self._rows)]
        for first, size in blocks:
            for positions in reversed(self._buckets):
                shape = Shape(first, size, positions)
                step = self._step(shape)
                try:
                    for _ in range(WARM_UPS if positions == self._spare else 0):
                        step()
                    self._steps[shape] = capture(step)
                except AmqError:
                    raise
                except REFUSALS as error:
                    if not any(s.holds(range(first, first + size), positions) for s in self._steps):
                        raise
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    log.warning(
                        "the decode step of %d sequences over %d positions is not captured, a larger one runs in its "
                        "place, which is slower: %s", size, positions, reason,
                    )  # fmt: skip
        for place in self.places:
            place.reach = self._spare
            place.reset()

    def _step(self, shape: Shape) -> Step:
        rows = slice(shape.first, shape.first + shape.rows)
        tokens, positions, writes = self._inputs[:, rows]
        numbers, seen = self._numbers[rows], self._positions[: shape.positions]
        cache = cache_of([StepLayer(s, rows, shape.positions, positions, writes, numbers) for s in self.stores])
        if not self.together:
            return lambda: self._model.forward(tokens[:, None], cache)

        def step() -> Tensor:
            mask = bias(seen <= positions[:, None], self._dtype)[:, None, None]
            return self._model.forward(tokens[:, None], cache, attention_mask=mask, position_ids=positions[:, None])

        return step

    def run(self, places: Sequence[Captured], tokens: Sequence[int]) -> Tensor:
        """The next token of each of `places` → logits float32 [places, vocabulary], on the CPU."""
        for place in places:
            place.expect(1)
        self._move_down(places)
        self._fill(places, tokens)
        shape = self._choose(places)
        rows = self._steps[shape]().float().cpu()[[place.row - shape.first for place in places]]
        for place, token in zip(places, tokens, strict=True):
            place.add([token])
        return rows

    def _fill(self, places: Sequence[Captured], tokens: Sequence[int]) -> None:
        """Says what the next step runs. Rows that take no part compute a token 0 at position 0, for nobody."""
        self._host.zero_()
        self._host[2] = self._spare
        for place, token in zip(places, tokens, strict=True):
            length = len(place.tokens)
            self._host[:, place.row] = torch.tensor((token, length, length))
        self._inputs.copy_(self._host)

    def _choose(self, places: Sequence[Captured]) -> Shape:
        """The smallest step that there is."""
        rows, positions = [place.row for place in places], max(len(place.tokens) for place in places) + 1
        fitting = [shape for shape in self._steps if shape.holds(rows, positions)]
        return min(fitting, key=lambda shape: shape.rows * shape.positions)

    def _move_down(self, places: Sequence[Captured]) -> None:
        """Gives `places` the first rows where a step of fewer rows then does.

        Every row of a step reads its keys and values, whether it takes part or not. A move takes as long as reading a
        row some six times, and comes where sequences have ended, not in every pass.
        """
        if not self.together:
            return
        size = next(size for size in sizes(self._rows) if size >= len(places))
        low = [place for place in self.places if place.row < size and place not in places]
        for place in places:
            if place.row >= size:
                other = low.pop()
                sound, other.sound = other.sound, False  # a move that fails has moved some layers and others not
                for store in self.stores:
                    store.exchange(place.row, other.row, max(place.reach, other.reach))
                place.row, other.row = other.row, place.row
                other.sound = sound

    def read(self, place: Captured, tokens: Sequence[int], every: bool) -> Tensor:
        """Several tokens of one sequence, as `Forward`."""
        cache = cache_of([ReadLayer(store, place.row, len(place.tokens)) for store in self.stores])
        return self._model.forward(torch.tensor([list(tokens)], device=self._model.device), cache, every)

    def agree(self) -> bool:
        """Whether the steps give the logits of caches that grow, found by trying the largest, not captured.

        Raises torch.OutOfMemoryError where there is no room for the cache.
        """
        places, growing = self.places[: len(TRIED) if self.together else 1], []
        try:
            for place, length in zip(places, TRIED, strict=False):
                other = Growing(self._model)
                other.run(range(length), True)
                stir(other.cache)
                self.read(place, range(length), False)  # allocates
                place.tokens = list(range(length))
                place.reach = length
                for store, layer in zip(self.stores, other.cache.layers, strict=False):
                    for tensor, name in zip(store.allocated(), ("keys", "values"), strict=False):
                        tensor[:length, place.row] = getattr(layer, name)[0].transpose(0, 1)
                growing.append(other)
            for _ in range(2):
                expected = [other.run([1], True) for other in growing]
                self._fill(places, [1] * len(places))
                found = self._step(Shape(0, self._rows if self.together else 1, self._spare))()
                for place in places:
                    place.expect(1)
                    place.add([1])
                if any(row is None or differ(found[i], row[0]) for i, row in enumerate(expected)):
                    return False
        except (AmqError, torch.OutOfMemoryError):
            raise
        except REFUSALS:
            return False
        finally:
            for place in self.places:
                place.reset()
        return True
