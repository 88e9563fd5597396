"""Memory on the device that passes share: rows on their way through the steps, what a pass is told, keys and values."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amq.kernels.cuda_calls import MOST_ROWS, AttentionCall, Call, CallLibrary, ExpertRows
from amq.runtime.decoder_spec import Attention, DecoderSpec, DeltaNet, Mixture, Mlp, PerLayerInput, ShortConv

PAGE = 64
"""Positions of a page."""
CACHES = {"float16": 0, "int8": 1}
"""What keys and values can be: `AttentionCall.cache_kind`."""


class Buffers:
    """Rows of up to `rows` tokens. spans: of all rows, that an attention is cut into at most. dtype: of what is
    multiplied, float16 or bfloat16; sums are float32.

    stream: the residual stream. input: norm(stream). wide: what an operator's first projection gives. wide_input: what
    its last one reads. token: a token's row of the per-layer embeddings. output: what is added to the stream, where
    that takes a call of its own. mixed: see DeltaCall. rotated: what `many` rows of rotated linears read (`rotates`).
    Those of mixtures have MOST_ROWS rows.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        rows: int,
        spans: int,
        dtype: torch.dtype,
        device: torch.device,
        rotates: bool = False,
    ) -> None:
        self.rows, self.dtype, self.device = rows, dtype, device
        attention, mixtures = spec.parts(Attention), spec.parts(Mixture)
        wide = [op.qkv for op in attention] + [op.in_ for kind in (DeltaNet, ShortConv, Mlp) for op in spec.parts(kind)]
        lasts = [op.o for op in attention] + [op.out for kind in (DeltaNet, ShortConv) for op in spec.parts(kind)]
        lasts += [op.down for op in spec.parts(Mlp)] + [op.out for op in spec.parts(PerLayerInput)]
        columns = spec.per_layer.table.columns if spec.per_layer else 0
        wide += [op.in_ for op in spec.parts(PerLayerInput)]
        widest = max([columns, *(projection.out_features for projection in wide)])
        mixed = max((_mixed(op) for op in spec.parts(DeltaNet)), default=0)
        self.stream, self.output = self._floats(rows, spec.hidden), self._floats(rows, spec.hidden)
        self.input = self._room(rows, spec.hidden, dtype)
        self.wide = self._floats(rows, widest)
        widest_input = max(last.in_features for last in lasts)
        self.wide_input = self._room(rows, widest_input, dtype)
        self.rotated = self._room(rows if rotates else 0, max(spec.hidden, widest_input), dtype)
        self.per_layer, self.token = (self._floats(rows, columns, False) for _ in range(2))
        self.mixed = self._floats(rows, mixed)
        heads = max((op.n_heads for op in attention), default=0)
        self.attention_counters = torch.zeros(rows * heads, dtype=torch.int32, device=device)
        most = max((op.n_heads * (op.head_dim + 2) for op in attention), default=0)
        self.attention_partials = torch.empty(spans * most, device=device)
        self._of_mixtures(spec.hidden, mixtures)

    def _of_mixtures(self, hidden: int, mixtures: list[Mixture]) -> None:
        few = MOST_ROWS if mixtures else 0
        entries = few * max((op.router.top_k for op in mixtures), default=0)
        inner = max((op.experts[0].down.in_features for op in mixtures), default=0)
        experts = max((op.router.weight.out_features for op in mixtures), default=0)
        self.input32, self.shared_output = self._floats(few, hidden), self._floats(few, hidden, False)
        self.scores, self.shared_gate = self._floats(few, experts), self._floats(few, 1)
        self.choice = torch.zeros(entries, dtype=torch.int32, device=self.device)
        self.choice_weights = torch.zeros(entries, device=self.device)
        self.expert_input = self._room(entries, inner, self.dtype)
        self.expert_output = self._floats(entries, hidden, False)
        self.expert_groups = torch.zeros(entries * ctypes.sizeof(ExpertRows), dtype=torch.uint8, device=self.device)
        self.n_groups = torch.zeros(1, dtype=torch.int32, device=self.device)

    def _floats(self, rows: int, features: int, padded: bool = True) -> Tensor:
        return self._room(rows, features, torch.float32, padded)

    def _room(self, rows: int, features: int, dtype: torch.dtype, padded: bool = True) -> Tensor:
        """[rows, features] whose rows begin at multiples of 128 bytes, or without gaps."""
        stride = -(-features // 64) * 64 if padded else features
        return torch.zeros(rows, stride, dtype=dtype, device=self.device)[:, :features]


def _mixed(op: DeltaNet) -> int:
    return 2 * op.n_key_heads * op.key_dim + op.n_value_heads * (op.value_dim + 2)


class Inputs:
    """What a pass is told, in the device's memory: int32 [rows] each, of segments, for recurrent models, too.

    tables: int32 [places, pages], the pages of every place for a sequence; other inputs may share it.

    The host writes them through `write`, one copy for all: of all rows, as rows of it alone would lie in pieces, which
    torch gathers in memory that is not pinned.
    """

    FIELDS = ("tokens", "positions", "slots", "long_text", "first", "count", "state", "begins")

    def __init__(self, rows: int, tables: Tensor) -> None:
        device = tables.device
        pinned = device.type == "cuda"
        self._host = torch.zeros(len(self.FIELDS), rows, dtype=torch.int32, pin_memory=pinned)
        self._host[1] = -1
        self._copied: torch.cuda.Event | None = None  # the latest copy out of `_host`
        self._all = self._host.to(device, copy=True)
        self.tokens, self.positions, self.slots, self.long_text = self._all[:4]
        self.first, self.count, self.state, self.begins = self._all[4:]
        self.tables = tables

    def write(self, rows: int, fields: dict[str, list[int]]) -> None:
        """Rows 0 … rows − 1 of every field; what `fields` leaves out, and is too short for, is 0, a position −1."""
        if self._copied is not None:
            self._copied.synchronize()
        host = self._host[:, :rows]
        host.zero_()
        host[1] = -1
        for name, values in fields.items():
            host[self.FIELDS.index(name), : len(values)] = torch.tensor(values, dtype=torch.int32)
        self._all.copy_(self._host, non_blocking=True)
        if self._host.is_pinned():
            self._copied = torch.cuda.current_stream(self._all.device).record_event()

    def attention_fields(self) -> dict[str, Any]:
        return {
            "positions": self.positions, "slots": self.slots, "long_text": self.long_text, "tables": self.tables,
            "table_stride": self.tables.stride(0),
        }  # fmt: skip

    def segment_fields(self, rows: int, decode: bool) -> dict[str, Any]:
        """A segment for each row of a decode pass; in a prompt at most one for each place for a sequence."""
        return {
            "n": rows if decode else min(rows, len(self.tables)), "longest": 1 if decode else rows, "first": self.first,
            "count": self.count, "state": self.state, "begins": self.begins,
        }  # fmt: skip


@dataclass(frozen=True)
class StepPlaces:
    """Where in a page, or in a sequence's state, each step that has a part there begins; and the sizes of the whole.

    kind: `AttentionCall.cache_kind` of each step with a part in a page.
    """

    page: dict[int, int]
    kind: dict[int, int]
    page_bytes: int
    state: dict[int, int]
    state_floats: int

    @classmethod
    def of(cls, spec: DecoderSpec, library: CallLibrary, cache: Sequence[str]) -> StepPlaces:
        """cache: of CACHES, one for each step with keys and values of its own."""
        kind: dict[int, int] = {}
        kinds = iter(cache)
        page: dict[int, int] = {}
        state: dict[int, int] = {}
        page_bytes = floats = 0
        for index, step in enumerate(spec.steps):
            op = step.op
            if isinstance(op, Attention) and op.cache_of is None:
                page[index], kind[index] = page_bytes, CACHES[next(kinds)]
                call = Call(AttentionCall, _heads(op) | {"cache_kind": kind[index]}, f"attention of step {index}")
                page_bytes += -(-library.size("amq_cuda_cache_bytes", call) // 16) * 16
            elif isinstance(op, (DeltaNet, ShortConv)):
                state[index] = floats
                floats += -(-_state_floats(op) // 4) * 4
        for index, step in enumerate(spec.steps):
            if isinstance(step.op, Attention) and step.op.cache_of is not None:
                page[index], kind[index] = page[step.op.cache_of], kind[step.op.cache_of]
        return cls(page, kind, page_bytes, state, floats)


def _heads(op: Attention) -> dict[str, Any]:
    return {
        "n_heads": op.n_heads, "n_kv_heads": op.n_kv_heads, "head_dim": op.head_dim, "gated": op.gated,
        "q_stride": (2 if op.gated else 1) * op.head_dim, "keys_are_values": op.keys_are_values,
        "own_keys": op.cache_of is None,
    }  # fmt: skip


def _state_floats(op: DeltaNet | ShortConv) -> int:
    if isinstance(op, ShortConv):
        return (op.kernel - 1) * op.out.in_features
    channels = 2 * op.n_key_heads * op.key_dim + op.n_value_heads * op.value_dim
    return (op.kernel - 1) * channels + op.n_value_heads * op.key_dim * op.value_dim


class KeyCache:
    """Keys and values in pages."""

    def __init__(self, places: StepPlaces, n_pages: int, device: torch.device) -> None:
        self._places = places
        self.memory = torch.zeros(n_pages, places.page_bytes, dtype=torch.uint8, device=device)

    def attention_fields(self, index: int, op: Attention) -> dict[str, Any]:
        return _heads(op) | {
            "cache_kind": self._places.kind[index], "cache": self.memory, "page_bytes": self._places.page_bytes,
            "cache_offset": self._places.page[index],
        }  # fmt: skip

    def state_fields(self, index: int, states: Tensor | None) -> dict[str, Any]:
        return {
            "states": states, "state_floats": self._places.state_floats, "state_offset": self._places.state[index],
        }  # fmt: skip
