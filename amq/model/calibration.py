"""Moves calibration windows through a model block by block and collects E[x xᵀ] of its linears' inputs.

Hidden states at one block boundary are held for all windows; `measure` runs the next block and sums the second moments
of what its linears read, once per distinct tensor, since q, k and v read the same; `advance` runs it and goes on. What
the block holds at that moment counts: a bank leaves it in full precision, a sequential quantizer measures with what it
has quantized so far and advances with the finished block.

Positions that hold a window's prefix (BOS) are counted like any other: their predictions have no loss, but what a
linear makes of them is read by all tokens after them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.blocks import BlockRunner
from amq.model.inventory import LinearSpec, embedding_weight, get_linear
from amq.util.symmetric import add_gram, mirror

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SAMPLE = 32
"""Tokens of `CalibrationStream.sample`, and of the check that the model can be run block by block."""


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one tensor x, in the order in which they ran.

    gram: float32 [in_features, in_features] on the CPU, the mean of x xᵀ over tokens.
    """

    linears: tuple[LinearSpec, ...]
    gram: Tensor


class CalibrationStream:
    """Hidden states of `windows` (int64 [windows, length]) at the boundary before block `boundary`."""

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self._model, self.runner = model, BlockRunner(model)
        device = embedding_weight(model).device
        self._windows = [w.unsqueeze(0).to(device) for w in windows]
        self._hidden: list[Tensor | None] = [None] * len(windows)
        self.boundary = 0
        self.runner.check(self._windows[0][:, :SAMPLE])

    def measure(self, linears: Sequence[LinearSpec], advance: bool = False) -> list[InputGroup]:
        """Runs the next block on every window and returns `linears`, all of that block, grouped by input.

        advance: keep the block's outputs as the new hidden states, as `advance` does.
        """
        grams = _Grams(self._model, linears)
        with grams:
            self._run(grams.end_of_window, advance)
        return grams.groups()

    def advance(self) -> None:
        """Moves the hidden states behind the next block."""
        self._run(lambda: None, True)

    def sample(self) -> Tensor:
        """The next block's output on the first tokens of the first window, with the weights of this moment."""
        start, hidden = self.boundary, self._hidden[0]
        hidden = None if hidden is None else hidden[:, :SAMPLE]
        return self.runner.hidden(self._windows[0][:, :SAMPLE], start + 1, start, hidden)

    def _run(self, after_window: Callable[[], None], advance: bool) -> None:
        start = self.boundary
        for i, tokens in enumerate(self._windows):
            hidden = self.runner.hidden(tokens, start + 1, start, self._hidden[i])
            if advance:
                self._hidden[i] = hidden
            after_window()
        self.boundary += advance


def shared_inputs(model: PreTrainedModel, linears: Sequence[LinearSpec], tokens: Tensor) -> tuple[tuple[str, ...], ...]:
    """Names of linears that read one tensor, in groups of two or more; tokens: int64 [1, length] to look with."""
    readers: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # alive, so that an id stays one tensor's

    def note(spec: LinearSpec, x: Tensor) -> None:
        kept.append(x)
        readers.setdefault(id(x), []).append(spec.name)

    handles = [
        get_linear(model, s.name).register_forward_pre_hook(lambda module, args, s=s: note(s, args[0])) for s in linears
    ]
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(tuple(names) for names in readers.values() if len(names) > 1)


class _Grams:
    """Forward hooks that sum x xᵀ per distinct input tensor of a set of linears."""

    def __init__(self, model: nn.Module, linears: Sequence[LinearSpec]) -> None:
        self._modules = {s: get_linear(model, s.name) for s in linears}
        self._leaders: dict[LinearSpec, LinearSpec] = {}  # linear → the first linear that read the same tensor
        self._sums: dict[LinearSpec, Tensor] = {}
        self._counts: dict[LinearSpec, int] = {}
        self._seen: dict[tuple[Any, ...], tuple[LinearSpec, Tensor]] = {}  # holds inputs alive, so pointers stay unique

    def __enter__(self) -> _Grams:
        self._handles = [
            m.register_forward_hook(lambda module, args, output, s=s: self._add(s, args[0]))
            for s, m in self._modules.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, spec: LinearSpec, x: Tensor) -> None:
        leader, _ = self._seen.setdefault((x.data_ptr(), x.shape, x.stride()), (spec, x))
        if self._leaders.setdefault(spec, leader) != leader:
            raise AmqError(f"{spec.name} shared its input with {self._leaders[spec].name} once and not another time")
        if leader is not spec:
            return
        rows = x.reshape(-1, x.shape[-1]).float()
        gram = self._sums.setdefault(spec, torch.zeros(rows.shape[1], rows.shape[1], device=x.device))
        if x.device.type == "cpu":
            add_gram(gram, rows.contiguous())
        else:
            gram.addmm_(rows.t(), rows)
        self._counts[spec] = self._counts.get(spec, 0) + len(rows)

    def end_of_window(self) -> None:
        self._seen.clear()

    def groups(self) -> list[InputGroup]:
        result = []
        for leader, total in self._sums.items():
            gram = total.div_(self._counts[leader]).cpu()
            if total.device.type == "cpu":
                mirror(gram)
            if not bool(torch.isfinite(gram).all()):
                raise AmqError(
                    f"the inputs of {leader.name} are not finite (NaN or infinity) on the calibration text: "
                    "load the model in a wider --dtype"
                )
            members = tuple(s for s in self._leaders if self._leaders[s] == leader)
            result.append(InputGroup(members, gram))
        for spec in (s for s in self._modules if s not in self._leaders):
            log.warning("%s saw no calibration token: rounded as if its inputs were white noise", spec.name)
            result.append(InputGroup((spec,), torch.eye(spec.in_features)))
        return result
