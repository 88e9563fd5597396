"""Evaluator: configurations → losses, mostly the mean divergence per token from the full-precision model.

Many configurations are measured together: they go through the blocks side by side (`amq.proxy.walk`), in a resident
model or in one whose blocks are in memory one at a time, and `LinearSwap` puts in the weights whose format changes; or
they are passes of the engine for CPUs (`amq.proxy.native`), one configuration after the other. What comes out behind
the last block is measured by a `Meter`.

A linear's sensitivity (this linear in another format, all others as they are) is the loss of such a configuration;
in the order of blocks, each shares with the others all that comes before its own block, unless passes are native: those
are whole ones, in the time of a walk through half the blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import KEPT
from amq.model.blocks import BlockRunner
from amq.model.inventory import HEAD, Inventory, embedding_weight
from amq.model.losses import LOSSES
from amq.model.open import LoadedModel
from amq.model.paging import pager_of
from amq.model.states import StateStore
from amq.proxy.answers import Agreement
from amq.proxy.meter import Divergence, Measure, Meter, chunk_tokens
from amq.proxy.native import NativeStates
from amq.proxy.resident import BankReader
from amq.proxy.swap import LinearSwap
from amq.proxy.walk import Formats, Walk

BATCH_TOKENS = 1024
"""Tokens run through the blocks at once."""
TOGETHER, TOGETHER_PAGED = 4, 64
"""Configurations that advance together at most: what a killed search measures again, and a `--time` overruns. More
where every walk reads the model from disk; their hidden states may go there too."""

Take = Callable[[int], Sequence[Tensor]]
"""Final hidden states of a configuration, [windows, length, hidden_size] of each batch."""


class Evaluator:
    """Losses of configurations on fixed sets of token windows.

    A configuration names every linear of the inventory's blocks; head and embeddings (`outer`) that it does not name
    are in full precision.

    windows: {name: int64 [windows, length]}, such as `search` and `confirm`.
    loss: one of `amq.model.losses.OBJECTIVES`.
    cache_memory: bytes that cached reference log-probabilities may take, over all window sets; and, each for itself,
        hidden states in memory (those of one configuration always are), and weights that are ready and not in use.
    backend, activations: what multiplies the candidates' linears; see `amq.proxy.swap`. The full-precision model is
        torch's, and so is what a configuration leaves in full precision.
    unscored: leading positions of every window that have no loss, `Corpus.unscored`; or those of each set's windows.
    answers: for the loss `answers`, what is measured instead of `windows`.
    native: what makes the candidates' hidden states in the place of the model; `backend` is the head's then.
    whole: whether all blocks of a resident model may hold a configuration's weights at once. If not, each gets its own
        back before the next one's are made, as in a model whose blocks are in memory one at a time.

    `seconds` is the time spent on losses since construction and `seconds_in_model` that part of it in the model's own
    forward (blocks, norm and head); the rest is dequantization and the loss itself, softmax included.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        inventory: Inventory,
        bank: BankReader,
        windows: Mapping[str, Tensor],
        loss: str = "jsd",
        cache_memory: int = 256 << 20,
        backend: str = "reference",
        activations: str = "fp32",
        unscored: int | Mapping[str, int] = 0,
        whole: bool = True,
        answers: Agreement | None = None,
        native: NativeStates | None = None,
    ) -> None:
        if answers is None:
            LOSSES[loss]  # noqa: B018 - raises on an unknown name
        self._bank, self._inventory, self._memory = bank, inventory, cache_memory
        self._runner, self._native = BlockRunner(loaded.model), native
        self._paged = pager_of(loaded.model) is not None
        self._whole = whole and not self._paged
        linears, outer = (s.name for s in inventory.linears), [s.name for s in inventory.outer]
        self._swap = LinearSwap(loaded.model, linears, backend, activations, outer, cache_memory)
        self._head = next((s.name for s in inventory.outer if s.kind == HEAD), None)
        self._blocks = {s.name: s.block for s in inventory.weights}
        device = embedding_weight(loaded.model).device
        vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
        tokens, rows = chunk_tokens(device, vocabulary)
        if answers is not None:
            windows, masks = answers.tokens, answers.scored
        else:
            before = dict.fromkeys(windows, unscored) if isinstance(unscored, int) else unscored
            masks = {name: _behind(w, before[name]) for name, w in windows.items()}
        self._windows = {name: w.to(device) for name, w in windows.items()}
        self._masks = {name: mask.to(device) for name, mask in masks.items()}
        self.seconds = self.seconds_in_model = 0.0
        with torch.no_grad():
            self._runner.check(next(iter(self._windows.values()))[:1, :32])
            measure: Measure = answers or Divergence(loss, device, rows)
            reference = self._reference_hidden()
            self._state_bytes = next(iter(reference.values()))[0].nbytes
            self._meter = Meter(self._logits, reference, measure, tokens, cache_memory)
        self.seconds = self.seconds_in_model = 0.0  # without the reference's forwards above

    def evaluate(self, formats: Formats, windows: str = "search") -> float:
        """Loss of a configuration {linear: format}, in the unit of the objective: mostly nats per scored token.

        NaN or infinity where the model overflows.
        """
        return next(self.evaluate_many([formats], windows))[0]

    @torch.no_grad()  # as a decorator it is off between the steps of this generator
    def evaluate_many(self, configurations: Sequence[Formats], windows: str = "search") -> Iterator[list[float]]:
        """The losses that `evaluate` gives, in order, those of several configurations at a time.

        Neighbours that agree in their first blocks share these. The caller may do anything between two steps.
        """
        for formats in configurations:
            self._swap.check(formats)
        start = time.perf_counter()
        batches = self._batches(self._windows[windows])
        size = self._windows[windows].numel() * self._state_bytes
        count = TOGETHER_PAGED if self._paged else max(1, min(TOGETHER, self._memory // size))
        states = self._computed if self._native is not None else self._walked
        for part, take in states(configurations, batches, count, size):
            losses = self._losses(take, part, windows)
            self._swap.trim(s.name for s in self._inventory.outer)
            self.seconds += time.perf_counter() - start
            yield losses
            start = time.perf_counter()

    @torch.no_grad()
    def evaluate_cached(self, formats: Formats, kinds: Sequence[str], windows: str) -> float:
        """As `evaluate`, natively, with what is kept of keys and values as `kinds` say, one for each layer that keeps
        any: every token's loss is that behind a prompt that was read into such a cache."""
        assert self._native is not None, "a cache is the engine's"
        states = self._native.final(formats, self._bank, self._batches(self._windows[windows]), kinds)
        return self._losses([states].__getitem__, [formats], windows)[0]

    def _walked(
        self, configurations: Sequence[Formats], batches: Sequence[Tensor], count: int, size: int
    ) -> Iterator[tuple[Sequence[Formats], Take]]:
        """`count` configurations at a time, with what gives the final states of each by its place among them, which
        are there until the next step. size: of the states of one, in bytes."""
        with StateStore(max(self._memory, 2 * size)) as store:
            walk = Walk(self._runner, self._swap, self._inventory, self._bank, batches, store, self._whole)
            ways = [walk.way(formats) for formats in configurations]
            junction = None
            for first in range(0, len(ways), count):
                part, following = slice(first, first + count), ways[first + count : first + 2 * count]
                keys, junction = walk.advance(ways[part], junction, following)
                self.seconds_in_model += walk.seconds
                walk.seconds = 0.0
                yield configurations[part], lambda i: walk.take(keys[i])  # noqa: B023 - used before the next step
                for key in set(keys) - {junction.key if junction else None}:
                    walk.drop(key)

    def _computed(
        self, configurations: Sequence[Formats], batches: Sequence[Tensor], count: int, size: int
    ) -> Iterator[tuple[Sequence[Formats], Take]]:
        """As `_walked`, natively."""
        assert self._native is not None
        for first in range(0, len(configurations), count):
            part = configurations[first : first + count]
            start = time.perf_counter()
            finals = [self._native.final(formats, self._bank, batches) for formats in part]
            self.seconds_in_model += time.perf_counter() - start
            yield part, finals.__getitem__

    def sensitivities(
        self, base: Formats, changes: Iterable[tuple[str, str]], windows: str = "search"
    ) -> Iterator[tuple[str, str, float]]:
        """(weight, format, loss) for each (weight, format) in `changes`, in the order of blocks: that weight so, all
        others as in `base`."""
        ordered = sorted(changes, key=lambda change: self._blocks[change[0]])
        losses = self.evaluate_many([{**base, name: fmt} for name, fmt in ordered], windows)
        for (name, fmt), loss in zip(ordered, (loss for some in losses for loss in some), strict=True):
            yield name, fmt, loss

    @torch.no_grad()
    def loss_as_it_is(self, windows: str = "search") -> float:
        """Loss of the resident model with whatever weights it holds, by torch: of those that no configuration names.

        No configuration is to be in it (`full_precision`).
        """
        states = [
            self._runner.hidden(tokens, self._runner.n_blocks) for tokens in self._batches(self._windows[windows])
        ]
        return self._meter.losses(windows, [self._scored(states, windows)], KEPT.name)[0]

    @contextmanager
    def by(self, loss: str) -> Iterator[None]:
        """Losses inside are those of another divergence of `amq.model.losses`; not of an evaluator of answers."""
        own = self._meter
        self._meter = own.by(loss)
        try:
            yield
        finally:
            self._meter = own

    def apply(self, formats: Formats) -> None:
        """Puts the configuration's weights into a resident model, touching only those whose format changes."""
        if not self._whole:
            raise AmqError("memory holds one block at a time: a configuration can be evaluated, not applied")
        self._swap.apply(formats, self._bank)

    def restore(self) -> None:
        """Puts the full-precision weights back."""
        self._swap.restore()

    def full_precision(self) -> AbstractContextManager[None]:
        """The full-precision model inside, what was in it before afterwards."""
        return self._swap.full_precision()

    def _batches(self, windows: Tensor) -> Sequence[Tensor]:
        return windows.split(max(1, BATCH_TOKENS // windows.shape[1]))

    def _reference_hidden(self) -> dict[str, Tensor]:
        """{windows: final hidden states of the full-precision model [scored tokens, hidden_size]}, from one walk."""
        batches = {name: self._batches(w) for name, w in self._windows.items()}
        with StateStore(self._memory) as store:
            flat = [tokens for some in batches.values() for tokens in some]
            walk = Walk(self._runner, self._swap, self._inventory, self._bank, flat, store, self._whole)
            keys, _ = walk.advance([walk.way({})])
            states = iter(walk.take(keys[0]))
            return {name: self._scored([next(states) for _ in some], name) for name, some in batches.items()}

    def _scored(self, batches: Sequence[Tensor], windows: str) -> Tensor:
        """Of hidden states [windows, length, hidden_size] those that have a loss, [tokens, hidden_size]."""
        pairs = zip(batches, self._batches(self._masks[windows]), strict=True)
        return torch.cat([batch[scored] for batch, scored in pairs])

    def _logits(self, hidden: Tensor, head: str = KEPT.name) -> Tensor:
        """float32 [tokens, vocabulary], contiguous, by the head in that format."""
        if self._head is not None:
            self._swap.put({self._head: head}, self._bank)
        begin = time.perf_counter()
        logits = self._runner.logits(hidden)
        self.seconds_in_model += time.perf_counter() - begin
        return logits.float().contiguous()

    def _losses(self, take: Take, configurations: Sequence[Formats], windows: str) -> list[float]:
        """take: gives the final states of each of `configurations`, by its place."""
        heads = [formats.get(self._head, KEPT.name) if self._head else KEPT.name for formats in configurations]
        losses = [0.0] * len(heads)
        for head in sorted(set(heads)):
            chosen = [index for index, own in enumerate(heads) if own == head]
            together = max(1, self._memory // self._meter.nbytes(windows))
            for first in range(0, len(chosen), together):
                part = chosen[first : first + together]
                found = self._meter.losses(windows, [self._scored(take(i), windows) for i in part], head)
                for index, loss in zip(part, found, strict=True):
                    losses[index] = loss
        return losses


def _behind(windows: Tensor, unscored: int) -> Tensor:
    """bool [windows, length]: all but the leading positions."""
    scored = torch.ones_like(windows, dtype=torch.bool)
    scored[:, :unscored] = False
    return scored
