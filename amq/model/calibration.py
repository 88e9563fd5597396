"""Moves calibration windows through a model block by block and collects E[x xᵀ] of its linears' inputs.

Hidden states at one block boundary are held for all windows; `measure` runs the next block and sums the second moments
of what its linears read, once per distinct tensor, since q, k and v read the same; `advance` runs it and goes on. What
the block holds at that moment counts: a bank leaves it in full precision, a sequential quantizer measures with what it
has quantized so far and advances with the finished block.

Experts read the tokens that are routed to them. Gate and up of a layer's experts are measured together, on all tokens
that enter the layer: so they share one matrix and its factor, and no expert is calibrated on a handful of tokens. What
down reads is its own expert's, so it is measured on the routed tokens, and on all of the layer's where these are few.
(Experts that a model holds as a list of modules of its own are measured like other linears, on their tokens alone.)

Positions that hold a window's prefix (BOS) are counted like any other: their predictions have no loss, but what a
linear makes of them is read by all tokens after them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.blocks import BlockRunner
from amq.model.experts import DOWN, Experts, expert_of
from amq.model.inventory import EXPERT, LinearSpec, embedding_weight, get_linear
from amq.model.paging import holding
from amq.model.states import StateStore
from amq.util.symmetric import add_gram, mirror

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SAMPLE = 32
"""Tokens of `CalibrationStream.sample`, and of the check that the model can be run block by block."""


ENOUGH = 4
"""An expert's down_proj is calibrated on the tokens that are routed to it where these are at least its input features
divided by this; else on all tokens of its layer: few tokens give a matrix that knows only the directions of these."""
GRAM_BYTES = 2 << 30
"""Most bytes of E[x xᵀ] held at once for the experts of a block, besides those of other linears: `in_parts`."""
STATE_BYTES = 1 << 30
"""Bytes of hidden states, and of what enters a layer of experts, that are held in memory; more goes to disk."""
FLOAT = 4


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one tensor x, in the order in which they ran.

    gram: float32 [in_features, in_features] where the model is, the mean of x xᵀ over tokens.
    """

    linears: tuple[LinearSpec, ...]
    gram: Tensor


class CalibrationStream:
    """Hidden states of `windows` (int64 [windows, length]) at the boundary before block `boundary`.

    memory: bytes of them that stay in memory.
    weights: {linear: how much each token counts, [windows, length]}, from `token_weights`; those of linears that it
    does not name count alike.
    notes: of the last `measure`: which experts saw few tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        memory: int = STATE_BYTES,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._model, self.runner, self._weights = model, BlockRunner(model), weights or {}
        device = embedding_weight(model).device
        self._windows = [w.unsqueeze(0).to(device) for w in windows]
        self._states = StateStore(memory)
        self.boundary = 0
        self.notes: tuple[str, ...] = ()
        self.runner.check(self._windows[0][:, :SAMPLE])

    def measure(self, linears: Sequence[LinearSpec], advance: bool = False) -> list[InputGroup]:
        """Runs the next block on every window and returns `linears`, all of that block, grouped by input.

        advance: keep the block's outputs as the new hidden states, as `advance` does.
        """
        grams = _Grams(self._model, [s for s in linears if not _of_experts(s)], self._weights)
        layers = [_ExpertGrams(self._model, *layer, self._states) for layer in _layers(self._model, linears)]
        with holding(self._model, self.boundary):
            with _hooked(grams, *layers):
                self._run(grams.end_of_window, advance)
            groups = grams.groups()
            for layer in layers:
                groups += layer.groups()
        self.notes = tuple(note for layer in layers for note in layer.notes)
        return groups

    def advance(self) -> None:
        """Moves the hidden states behind the next block."""
        with holding(self._model, self.boundary):
            self._run(lambda: None, True)

    def sample(self) -> Tensor:
        """The next block's output on the first tokens of the first window, with the weights of this moment."""
        start, hidden = self.boundary, self._hidden(0)
        hidden = None if hidden is None else hidden[:, :SAMPLE]
        with holding(self._model, start):
            return self.runner.hidden(self._windows[0][:, :SAMPLE], start + 1, start, hidden)

    def _run(self, after_window: Callable[[], None], advance: bool) -> None:
        start = self.boundary
        for i, tokens in enumerate(self._windows):
            hidden = self.runner.hidden(tokens, start + 1, start, self._hidden(i))
            if advance:
                self._states.put(i, hidden)
            after_window()
        self.boundary += advance

    def _hidden(self, window: int) -> Tensor | None:
        """None before the first block."""
        return self._states.get(window) if window in self._states else None


def in_parts(linears: Sequence[LinearSpec], limit: int = GRAM_BYTES) -> list[list[LinearSpec]]:
    """`linears` of one block in parts to measure one after the other.

    limit: bytes that the matrices of the experts' down_proj take at once, at least one of them. All others come first:
    some of them share an input.
    """
    parts: list[list[LinearSpec]] = [[s for s in linears if not _is_down(s)]]
    held = 0
    for spec in (s for s in linears if _is_down(s)):
        size = FLOAT * spec.in_features**2
        if held and held + size > limit:
            parts.append([])
            held = 0
        parts[-1].append(spec)
        held += size
    return [part for part in parts if part]


def gram_bytes(linears: Sequence[LinearSpec], followers: Container[str]) -> int:
    """Bytes of the matrices of `linears`, all of one block. followers: names of those that read another one's input."""
    total, shared = 0, set()
    for spec in linears:
        if _of_experts(spec) and not _is_down(spec):
            layer = spec.role.rpartition(".")[0]
            total += FLOAT * spec.in_features**2 * (layer not in shared)
            shared.add(layer)
        elif spec.name not in followers:
            total += FLOAT * spec.in_features**2
    return total


def shared_inputs(model: PreTrainedModel, linears: Sequence[LinearSpec], tokens: Tensor) -> tuple[tuple[str, ...], ...]:
    """Names of linears that read one tensor, in groups of two or more; tokens: int64 [1, length] to look with.

    Experts are left out: which of their tokens they share is the layer's own matter.
    """
    readers: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # alive, so that an id stays one tensor's

    def note(spec: LinearSpec, x: Tensor) -> None:
        kept.append(x)
        readers.setdefault(id(x), []).append(spec.name)

    handles = [
        get_linear(model, s.name).register_forward_pre_hook(lambda module, args, s=s: note(s, args[0]))
        for s in linears
        if s.kind != EXPERT
    ]
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(tuple(names) for names in readers.values() if len(names) > 1)


def _of_experts(spec: LinearSpec) -> bool:
    """Whether it is one of an `Experts`, whose names end in the expert's number."""
    return spec.kind == EXPERT and spec.name.endswith(f".{spec.role}.{spec.expert}")


def _is_down(spec: LinearSpec) -> bool:
    """Of an `Experts`, reading what nobody else does."""
    return _of_experts(spec) and spec.role.rpartition(".")[2] == DOWN


def _layers(model: nn.Module, linears: Sequence[LinearSpec]) -> Iterator[tuple[str, list[LinearSpec]]]:
    """(name of the `Experts`, those of its linears) of every layer of experts."""
    layers: dict[str, list[LinearSpec]] = {}
    for spec in (s for s in linears if _of_experts(s)):
        owner = expert_of(model, spec.name)
        assert owner is not None
        layers.setdefault(owner[0], []).append(spec)
    yield from layers.items()


@contextmanager
def _hooked(*measured: _Grams | _ExpertGrams) -> Iterator[None]:
    handles = [handle for part in measured for handle in part.hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sum:
    """Σ w x xᵀ and Σ w; every w is 1, and so the sum how many x there were, unless weights are given."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self.count: float = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x: [..., in_features]; weights: of each of them, at least 0."""
        rows = x.reshape(-1, x.shape[-1]).float()
        count = float(len(rows))
        if weights is not None:
            rows, count = rows * weights.sqrt().unsqueeze(1), float(weights.sum())
        if self._total is None:
            self._total = torch.zeros(rows.shape[1], rows.shape[1], device=x.device)
        if x.device.type == "cpu":
            add_gram(self._total, rows.contiguous())
        else:
            self._total.addmm_(rows.t(), rows)
        self.count += count

    def mean(self, linear: str) -> Tensor:
        """Once. linear: whose inputs these were, for the error."""
        assert self._total is not None
        mean, self._total = self._total.div_(self.count), None
        if mean.device.type == "cpu":
            mirror(mean)
        if not bool(torch.isfinite(mean).all()):
            raise AmqError(
                f"the inputs of {linear} are not finite (NaN or infinity) on the calibration text: "
                "load the model in a wider --dtype"
            )
        return mean


class _Grams:
    """Sums x xᵀ per distinct input tensor of a set of linears."""

    def __init__(self, model: nn.Module, linears: Sequence[LinearSpec], weights: Mapping[str, Tensor]) -> None:
        self._modules = {s: get_linear(model, s.name) for s in linears}
        self._weights, self._window = weights, 0
        self._leaders: dict[LinearSpec, LinearSpec] = {}  # linear → the first linear that read the same tensor
        self._sums: dict[LinearSpec, _Sum] = {}
        self._seen: dict[tuple[Any, ...], tuple[LinearSpec, Tensor]] = {}  # holds inputs alive, so pointers stay unique

    def hooks(self) -> list[RemovableHandle]:
        return [
            m.register_forward_hook(lambda module, args, output, s=s: self._add(s, args[0]))
            for s, m in self._modules.items()
        ]

    def _add(self, spec: LinearSpec, x: Tensor) -> None:
        leader, _ = self._seen.setdefault((x.data_ptr(), x.shape, x.stride()), (spec, x))
        if self._leaders.setdefault(spec, leader) != leader:
            raise AmqError(f"{spec.name} shared its input with {self._leaders[spec].name} once and not another time")
        if leader is spec:
            weights = self._weights.get(spec.name)
            self._sums.setdefault(spec, _Sum()).add(x, None if weights is None else weights[self._window])

    def end_of_window(self) -> None:
        self._seen.clear()
        self._window += 1

    def groups(self) -> list[InputGroup]:
        result = []
        for leader, found in self._sums.items():
            members = tuple(s for s in self._leaders if self._leaders[s] == leader)
            result.append(InputGroup(members, found.mean(leader.name)))
        unseen = [s for s in self._modules if s not in self._leaders]
        if unseen:
            more = f" and {len(unseen) - 1} more linears" if len(unseen) > 1 else ""
            log.warning(
                "%s%s saw no calibration token: rounded as if their inputs were white noise", unseen[0].name, more
            )
        for spec in unseen:
            eye = torch.eye(spec.in_features, device=self._modules[spec].weight.device)
            result.append(InputGroup((spec,), eye))
        return result


class _ExpertGrams:
    """The same for linears of one layer of experts, `name`: see the head of this file.

    The layer's inputs of all windows are kept in `states` until `groups`, for experts that too few of them were routed
    to.
    """

    def __init__(self, model: nn.Module, name: str, linears: Sequence[LinearSpec], states: StateStore) -> None:
        layer = model.get_submodule(name)
        assert isinstance(layer, Experts)
        self._layer, self._name = layer, name
        self._readers = tuple(s for s in linears if not _is_down(s))
        self._downs = {s: get_linear(model, s.name) for s in linears if _is_down(s)}
        self._shared, self._own = _Sum(), {s: _Sum() for s in self._downs}
        self._states, self._calls, self._tokens = states, 0, 0
        self.notes: list[str] = []

    def hooks(self) -> list[RemovableHandle]:
        return [
            self._layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            *(self._hook(spec, self._own[spec]) for spec in self._downs),
        ]

    def _hook(self, down: LinearSpec, target: _Sum) -> RemovableHandle:
        return self._downs[down].register_forward_pre_hook(lambda module, args: target.add(args[0]))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if self._readers:
            self._shared.add(x)
        if self._downs:
            rows = x.reshape(-1, x.shape[-1])
            self._states.put((self._name, self._calls), rows)
            self._calls, self._tokens = self._calls + 1, self._tokens + len(rows)

    def groups(self) -> list[InputGroup]:
        result = []
        if self._readers:
            result.append(InputGroup(self._readers, self._shared.mean(self._readers[0].name)))
        self._measure_again()
        return [*result, *(InputGroup((spec,), own.mean(spec.name)) for spec, own in self._own.items())]

    def _measure_again(self) -> None:
        """Experts that saw few tokens, on all of the layer's; says which."""
        few = [s for s, own in self._own.items() if own.count < _least(s, self._tokens)]
        if few:
            self.notes.append(self._note(few))
        for spec in few:
            self._own[spec] = _Sum()
        handles = [self._hook(spec, self._own[spec]) for spec in few]
        try:
            for call in range(self._calls):
                x = self._states.pop((self._name, call))
                for spec in few:
                    self._layer.run(x, [len(x) * (i == spec.expert) for i in range(self._layer.experts)])
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, few: Sequence[LinearSpec]) -> str:
        tokens = self._tokens
        untouched = [s for s in few if not self._own[s].count]
        text = f"{self._name}: {len(few)} of {self._layer.experts} experts saw fewer than {_least(few[0], tokens)} of "
        text += f"{tokens} calibration tokens ({_numbers(few)}): their {DOWN} is calibrated with all of them"
        return text + (f"; no token reached {_numbers(untouched)}" if untouched else "")


def _least(down: LinearSpec, tokens: int) -> int:
    """How many of its layer's `tokens` an expert's down_proj must have seen to be calibrated on these alone."""
    return min(tokens, down.in_features // ENOUGH)


def _numbers(experts: Sequence[LinearSpec], most: int = 16) -> str:
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return ", ".join(str(s.expert) for s in experts[:most]) + more
