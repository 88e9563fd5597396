"""Sequences of a `CudaEngine` that decode on their own: the GPU chooses each token and feeds it back, pass after pass,
and the host reads tokens one pass late, while the next one runs.

They share passes, up to 8 in one. When one begins or ends, the next `step` reads what is under way first, and deals the
rows anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.kernels.cuda_calls import Call, SampleCall
from amq.runtime.cuda_buffers import Inputs
from amq.runtime.cuda_pass import PassBuilder
from amq.runtime.paged_engine import PagedSlot
from amq.runtime.sampling import follows_from_logits
from amq.runtime.settings import Sampling

if TYPE_CHECKING:
    from amq.runtime.cuda_engine import CudaEngine

LATE = 2
"""Passes whose tokens are kept on the device: the one that runs and the one that is read."""


@dataclass(eq=False)
class OwnRow:
    """token: the newest that the host knows. passes: that are left to it. drawn: tokens so far that the GPU chose."""

    slot: PagedSlot
    token: int
    how: Sampling
    seed: int
    passes: int
    drawn: int = 0
    ended: bool = False


class OwnPass:
    """Rows that share a pass: their inputs, and how they are sampled, in the device's memory."""

    def __init__(self, engine: CudaEngine, builder: Callable[[Inputs], PassBuilder], sizes: Sequence[int]) -> None:
        self._engine, device = engine, engine._device
        most = max(sizes)
        self.inputs = Inputs(most, engine.inputs.tables)
        self._floats = {name: torch.zeros(most, device=device) for name in ("temperature", "top_p", "min_p")}
        self._top_k, self._drawn = (torch.zeros(most, dtype=torch.int32, device=device) for _ in range(2))
        self._seed = torch.zeros(most, dtype=torch.int64, device=device)
        self._out = torch.zeros(LATE, most, dtype=torch.int32, device=device)
        self._step = torch.zeros(1, dtype=torch.int32, device=device)
        self._host = torch.zeros(LATE, most, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._builder = builder(self.inputs)
        self._runs = {rows: self._make(rows) for rows in sizes}
        self.rows: list[OwnRow] = []
        self._launched = self._unread = 0
        self._events: list[Any] = [None] * LATE

    def _make(self, rows: int) -> Callable[[], Tensor]:
        engine = self._engine
        body, head, logits = engine.decode_calls(self._builder, rows)
        fields = {
            "rows": rows, "vocabulary": engine.vocab_size, "logits": logits, "tokens": self.inputs.tokens,
            "positions": self.inputs.positions, **self._floats, "top_k": self._top_k, "seed": self._seed,
            "drawn": self._drawn, "out": self._out, "step": self._step, "steps": LATE,
        }  # fmt: skip
        call = Call(SampleCall, fields, "next tokens")
        scratch = torch.zeros(
            engine._library.size("amq_cuda_sample_scratch", call), dtype=torch.uint8, device=engine._device
        )
        call.struct.scratch = scratch.data_ptr()
        call.keep.append(scratch)
        head.parts.append(call)
        return engine.decode_run(body, head, logits)

    def deal(self, rows: list[OwnRow]) -> None:
        """The rows of the passes from now on; nothing may be unread."""
        self.rows, self._launched = rows, 0
        if not rows:
            return
        engine, slots = self._engine, [row.slot for row in rows]
        fields = engine.row_fields(slots, [slot.length for slot in slots])
        self.inputs.write(self._size(), fields | {"tokens": [row.token for row in rows]})
        how = [row.how for row in rows]
        for name, tensor in self._floats.items():
            _fill(tensor, [getattr(each, name) for each in how])
        _fill(self._top_k, [each.top_k for each in how])
        _fill(self._drawn, [row.drawn for row in rows])
        _fill(self._seed, [_signed(row.seed) for row in rows])
        self._step.zero_()

    def forget(self) -> None:
        """After a pass that failed: nothing is under way any more."""
        self.rows, self._launched, self._unread = [], 0, 0

    def launch(self) -> None:
        """The next pass; what it chooses is read by `read`, at most LATE passes later."""
        if not self.rows:
            return
        self._runs[self._size()]()
        for row in self.rows:
            if not self._unread:  # else it is fed what the pass before chooses, which `read` will find
                self._engine.fed(row.slot, row.token)
            row.slot.length += 1
            row.passes -= 1
        place, count = self._launched % LATE, len(self.rows)
        begin = place * self._size()
        self._host[place, :count].copy_(self._out.view(-1)[begin : begin + count], non_blocking=True)
        if self._engine._device.type == "cuda":
            self._events[place] = torch.cuda.current_stream(self._engine._device).record_event()
        self._launched += 1
        self._unread += 1

    def read(self, most: int) -> dict[PagedSlot, int]:
        """The tokens of the oldest pass, where more than `most` are unread."""
        if self._unread <= most:
            return {}
        place = (self._launched - self._unread) % LATE
        if self._events[place] is not None:
            self._events[place].synchronize()
        self._unread -= 1
        found: dict[PagedSlot, int] = {}
        for row, token in zip(self.rows, self._host[place].tolist(), strict=False):
            if row.ended:
                continue
            found[row.slot] = token
            row.token = max(token, 0)  # as the GPU feeds it
            row.drawn += 1
            if self._unread:
                self._engine.fed(row.slot, row.token)
        return found

    def _size(self) -> int:
        return min(size for size in self._runs if size >= len(self.rows))


def _fill(tensor: Tensor, values: Sequence[float]) -> None:
    tensor[: len(values)] = torch.tensor(values, dtype=tensor.dtype)


def _signed(seed: int) -> int:
    """The 64 bits of a seed as int64."""
    seed %= 2**64
    return seed - 2**64 if seed >= 2**63 else seed


class OwnRows:
    """All sequences of `engine` that decode on their own."""

    def __init__(self, engine: CudaEngine, builder: Callable[[Inputs], PassBuilder], sizes: Sequence[int]) -> None:
        self._passes = [OwnPass(engine, builder, sizes) for _ in range(-(-engine.max_sequences // max(sizes)))]
        self._most, self._vocabulary = max(sizes), engine.vocab_size
        self._rows: dict[PagedSlot, OwnRow] = {}
        self._changed = False

    def __contains__(self, slot: PagedSlot) -> bool:
        return slot in self._rows

    def can_sample(self, how: Sampling) -> bool:
        return follows_from_logits(how)

    def begin(self, slot: PagedSlot, token: int, how: Sampling, seed: int, passes: int) -> None:
        if slot in self._rows:
            raise AmqError("the sequence decodes on its own already")
        if not self.can_sample(how):
            raise AmqError("the GPU cannot choose the tokens of this text: ask can_sample first")
        if not slot.length:  # every pass would begin its state anew
            raise AmqError("a sequence cannot begin to decode on its own: read its first token with forward")
        if not 0 <= token < self._vocabulary:
            raise AmqError(f"token {token}: a token id is outside the model's vocabulary of {self._vocabulary}")
        if not 1 <= passes <= slot.capacity - slot.length:
            raise AmqError(
                f"{passes} passes of a sequence that has room for {slot.capacity - slot.length} positions more"
            )
        self._rows[slot] = OwnRow(slot, token, how, seed, passes)
        self._changed = True

    def end(self, slot: PagedSlot) -> None:
        if (row := self._rows.pop(slot, None)) is not None:
            row.ended = self._changed = True

    def step(self) -> dict[PagedSlot, int]:
        try:
            return self._step()
        except BaseException:  # passes are launched and not read, or neither: rows are dealt anew
            for each in self._passes:
                each.forget()
            self._changed = True
            raise

    def _step(self) -> dict[PagedSlot, int]:
        found: dict[PagedSlot, int] = {}
        if self._changed:
            for each in self._passes:
                found |= each.read(0)
            going = [row for row in self._rows.values() if row.passes]
            for number, each in enumerate(self._passes):
                each.deal(going[number * self._most : (number + 1) * self._most])
        for each in self._passes:
            each.launch()
        self._changed = any(not row.passes for each in self._passes for row in each.rows)
        for each in self._passes:
            found |= each.read(LATE - 1)
        return found
