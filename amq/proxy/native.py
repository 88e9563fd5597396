"""Configurations on the engine for CPUs: final hidden states, with no module of the model in between.

Where `amq.runtime.families` knows a model, a pass of `amq._cpu.Decoder` takes its place: a configuration is a decoder
of its own, which takes a millisecond to make, because weights are handed over by address. Each weight is prepared once
per format and kept as far as memory for it reaches; what a configuration leaves in 16 bits is read where the model has
it. Products are made as in the deployed model: with activations of 8 bits, unless exact ones are asked for.

Head and final norm are not part of it: `amq.proxy.meter` wants logits of many tokens against a matrix of 16 bits as
often as of a packed one, which torch multiplies faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.record import QuantizationRecord
from amq.errors import AmqError
from amq.formats import KEPT
from amq.kernels.cpu import NO_MEMORY, cpu_module, empty_bytes, memory, prepare
from amq.model.blocks import BlockRunner
from amq.model.inventory import EMBEDDING, HEAD, Inventory
from amq.model.open import LoadedModel
from amq.model.paging import pager_of
from amq.packing import PackedWeight
from amq.proxy.resident import BankReader
from amq.quantize.output import config_as_found, other_tensors
from amq.runtime.decoder_spec import DecoderSpec, Linear, Table
from amq.runtime.families import Unsupported, read_spec
from amq.runtime.native_weights import Held, NativeWeights

MAX_ROWS = 512
"""Tokens of a pass: what the kernels lay out at once."""
CHECKED, TOLERANCE = 32, 0.02
"""Tokens whose states are compared with those of the model's own forward, and the relative difference that half of them
may exceed: rounding in 16 bits stays well below it, another computation is far above."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""As safetensors spells them."""


class NativeStates:
    """Final hidden states of configurations of one model, by `amq._cpu.Decoder`.

    activations: `int8`, with keys and values of 16 bits, or `fp32`, exact.
    memory: bytes of prepared weights that are kept; `room` is what is left of it.

    Raises Unsupported where the engine does not know the model, or computes something else than it does.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        inventory: Inventory,
        group_size: int,
        activations: str = "int8",
        memory: int = 1 << 30,
    ) -> None:
        self._model, self._group_size, self.room = loaded.model, group_size, memory
        self.activations, self._int8 = activations, activations == "int8"
        self._source = _InMemory(loaded, group_size)
        with _unsupported():
            config = config_as_found(loaded.config.to_dict(), inventory.head_is_tied)
            self._spec = read_spec(config, f"the config of {loaded.name}", self._source.other_names)
        self._places = _places(self._spec, inventory)
        # what nothing multiplies by: embeddings whose rows are read as the bank has them
        self._looked_up = {table.name for table in self._spec.parts(Table)} - {self._spec.head.name}
        self._border = max((rope.border for rope in self._spec.ropes), default=0)
        self._bank: BankReader | None = None
        self._kept: dict[tuple[str, str], tuple[Held, list[Tensor]]] = {}
        self._length = 0
        with _unsupported():
            self._fit(CHECKED)
        self._check()

    def _fit(self, length: int) -> None:
        """Makes what depends on the longest window: angles, and the cache of as many sequences as a pass has."""
        if length <= self._length:
            return
        self._length, self._sequences = length, max(1, MAX_ROWS // length)
        self._weights = NativeWeights(self._source, self._spec, length)
        self._cache = empty_bytes(0)

    def _make_room(self, decoder: Any) -> None:
        """Pages of as many sequences as a pass has, with what they have beside those of their positions."""
        pages = -(-self._length // cpu_module().PAGE) + decoder.spare_pages + decoder.first_pages
        self._pages = torch.arange(self._sequences * pages, dtype=torch.int32).view(self._sequences, pages)
        if len(self._cache) < (size := self._pages.numel() * decoder.page_bytes):
            self._cache = empty_bytes(size)
        self._states = torch.empty(self._sequences * decoder.state_floats)

    @property
    def own_caches(self) -> int:
        """Layers with keys and values of their own."""
        return self._spec.own_caches

    def final(
        self,
        formats: Mapping[str, str],
        bank: BankReader,
        batches: Sequence[Tensor],
        kinds: Sequence[str] | None = None,
    ) -> list[Tensor]:
        """Of a configuration, behind its last block: [windows, length, hidden_size] in the model's dtype for each of
        `batches`, int64 [windows, length].

        kinds: what each of `own_caches` layers keeps keys and values as, which every query reads as in a deployed
            model; by default what `activations` says for all.
        """
        self._fit(max(tokens.shape[1] for tokens in batches))
        if bank is not self._bank:
            self.room += sum(_nbytes(parts) for _, parts in self._kept.values())
            self._kept.clear()
            self._bank = bank
        held, used = dict(self._weights.held), list[list[Tensor]]()
        for name, place in self._places.items():
            if (fmt := formats.get(name, KEPT.name)) != KEPT.name:
                held[place], parts = self._hold(name, fmt, bank)
                used.append(parts)  # until the passes are over, whether it is kept or not
        decoder = self._decoder(held, kinds=kinds)
        return [self._run(decoder, tokens).to(self._model.dtype) for tokens in batches]

    def _hold(self, name: str, fmt: str, bank: BankReader) -> tuple[Held, list[Tensor]]:
        """A weight in a format, with the tensors that it consists of."""
        found = self._kept.get((name, fmt))
        if found is None:
            found = self._new(name, bank.get(name, fmt))
            if (size := _nbytes(found[1])) <= self.room:
                self.room -= size
                self._kept[name, fmt] = found
        return found

    def _new(self, name: str, packed: PackedWeight) -> tuple[Held, list[Tensor]]:
        if name in self._looked_up:
            parts = [part.contiguous() for part in packed.parts.values()]
            scales, zero_points = map(memory, parts[1:])
        else:
            parts, scales, zero_points = [prepare(packed)], NO_MEMORY, NO_MEMORY
        return (packed.format.name, memory(parts[0]), scales, zero_points, packed.rotation), parts

    def _decoder(self, held: Mapping[str, Held], exact: bool = False, kinds: Sequence[str] | None = None) -> Any:
        """exact: with activations of float32 in any case."""
        made = cpu_module().Decoder(
            spec=self._spec, weights=held, context=self._length, group_size=self._group_size,
            int8=self._int8 and not exact, cache=kinds or ("float16" if self._int8 else "float32"), max_rows=MAX_ROWS,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        self._make_room(made)
        return made

    def _run(self, decoder: Any, tokens: Tensor) -> Tensor:
        """float32 [windows, length, hidden_size] of int64 [windows, length]: whole windows in one pass where they are
        short, else one window in several."""
        states = torch.empty(*tokens.shape, self._spec.hidden)
        ids, is_long = tokens.to(torch.int32), 0 < self._border < tokens.shape[1]
        for first in range(0, len(tokens), self._sequences):
            windows = slice(first, first + self._sequences)
            for begin in range(0, tokens.shape[1], MAX_ROWS):
                rows = slice(begin, begin + MAX_ROWS)
                states[windows, rows] = self._pass(decoder, ids[windows, rows].contiguous(), begin, is_long)
        return states

    def _pass(self, decoder: Any, ids: Tensor, begin: int, is_long: bool) -> Tensor:
        """ids: int32 [windows, tokens] of windows whose first `begin` positions are in the cache."""
        states = torch.empty(*ids.shape, self._spec.hidden)
        plan: list[tuple[int, int]] = []  # no snapshots of recurrent states
        segments = [
            (ids.shape[1], begin, memory(self._pages[number]), is_long, number, plan) for number in range(len(ids))
        ]
        decoder.forward(
            memory(ids), segments, list(range(ids.numel())), memory(states), memory(self._cache), memory(self._states),
            torch.get_num_threads(), final=True,
        )  # fmt: skip
        return states

    def _check(self) -> None:
        """Raises Unsupported unless the full-precision model's states are what transformers computes."""
        tokens = (torch.arange(CHECKED) * self._spec.vocabulary // CHECKED).unsqueeze(0)
        runner = BlockRunner(self._model)
        with torch.no_grad():
            expected = runner.hidden(tokens, runner.n_blocks)[0].float()
            found = self._run(self._decoder(self._weights.held, exact=True), tokens)[0]
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        if not float(errors.median()) <= TOLERANCE:
            raise Unsupported(
                f"the native engine's hidden states differ from those of {type(self._model).__name__} by "
                f"{float(errors.median()):.1e} relative"
            )


class _InMemory:
    """A model in memory as `NativeWeights` reads a checkpoint, of which nothing is packed."""

    def __init__(self, loaded: LoadedModel, group_size: int) -> None:
        if pager_of(loaded.model) is not None:
            raise Unsupported("the native engine wants a whole model in memory, this one is read block by block")
        self.folder = Path(loaded.name)
        self.record = QuantizationRecord({}, {}, group_size)
        self._tensors = other_tensors(loaded.model, (), {})

    @property
    def other_names(self) -> list[str]:
        return list(self._tensors)

    def described(self, name: str) -> tuple[str, list[int]]:
        tensor = self._tensors[name]
        return DTYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def packed(self, linear: str) -> PackedWeight:
        raise AssertionError(f"{linear} is not packed")


@contextmanager
def _unsupported() -> Iterator[None]:
    """What would be damage of a checkpoint: here the model runs, and is another one than the engine knows."""
    try:
        yield
    except Unsupported:
        raise
    except AmqError as error:
        raise Unsupported(str(error)) from error


def _places(spec: DecoderSpec, inventory: Inventory) -> dict[str, str]:
    """{what a configuration names: what that is called in the spec}, in the order of a pass; without a head that is not
    tied, which has no part in hidden states."""
    tables = {table.name for table in spec.parts(Table)}
    linears = {linear.name for linear in spec.parts(Linear)}
    places = {}
    for item in inventory.weights:
        if item.kind == HEAD and not item.tied:
            continue
        places[item.name] = item.tied or item.name
        if places[item.name] not in (tables if item.tied or item.kind == EMBEDDING else linears):
            raise Unsupported(f"the native engine has no place for {item.name}")
    return places


def _nbytes(parts: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in parts)
