"""One direction at one cut, at either end: the sender's policy makes payloads, the receiver's copy reads them.

Widths travel when they change, before the first tensor of a step: three bits each, packed as codes are. amaq's
gradients have the widths that the hidden states at their cut have in the same step, which both ends know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amq.packing import pack_codes, unpack_codes
from amq.split import quantizer
from amq.split.policy import (
    BACKWARD,
    FORWARD,
    AqSgd,
    Policy,
    Shared,
    State,
    below,
    cache_state,
    load_cache,
    named,
    recall,
    remember,
)
from amq.split.quantizer import WIDTHS, WIRE_FORMATS
from amq.split.terms import Terms
from amq.split.wire import Frame, Type, WireError

TABLE = WIRE_FORMATS[(len(WIDTHS) - 1).bit_length()]
"""How widths − 1 are packed."""


class Stream:
    """forward: hidden states, which the client sends at cut 0 and the server at cut 1; else their gradients.

    sender: whether this end sends. partner: the stream of hidden states at the same cut, of a stream of gradients.
    """

    def __init__(
        self, terms: Terms, channels: int, cut: int, *, forward: bool, sender: bool, partner: Stream | None = None
    ) -> None:
        self.terms, self.channels, self.cut, self.forward = terms, channels, cut, forward
        kind = (FORWARD if forward else BACKWARD)[terms.policy]
        self.policy: Policy | None = kind(terms, channels, terms.group, forward) if sender else None
        self._partner = partner if kind is Shared else None
        self._differences = kind is AqSgd
        self._widths: Tensor | None = None  # the table that was sent, or that came
        self._cache: dict[int, Tensor] = {}
        self.bytes = 0
        self._sent: list[float] = []  # bits per value of this step's tensors

    @property
    def bits(self) -> float:
        """Mean bits per value of the step's tensors: of the table; where there is none, of what was sent."""
        return sum(self._sent) / len(self._sent) if self._sent else 0.0

    @property
    def name(self) -> str:
        return ("forward" if self.forward else "backward") + (f".{self.cut}" if self.cut else "")

    @property
    def widths(self) -> Tensor | None:
        """In force at this end, int64 [channels]; None where nothing has widths."""
        if self._partner is not None:
            return self._partner.widths
        return self._widths if self.policy is None else self.policy.widths

    @property
    def type(self) -> Type:
        return Type.FORWARD if self.forward else Type.BACKWARD

    # The sender's end.

    def begin(self, step: int) -> None:
        self._sent = []
        if self.policy is not None:
            self.policy.begin(step)

    def frames(self, x: Tensor, step: int, micro_batch: int, samples: Sequence[int]) -> Iterator[Frame]:
        """What has to be sent for x, [batch, length, channels]. Raises AmqError where it is not finite."""
        assert self.policy is not None
        flat = quantizer.by_channel(x)
        what = "what enters" if self.forward else "the gradient before"
        quantizer.check_finite(flat, f"{what} cut {self.cut} in step {step}")
        if self._partner is not None:
            self.policy.widths = self._partner.widths
        payload = self.policy.encode(flat, samples)
        self._note(payload)
        table = self.policy.widths if self._partner is None else None
        if table is not None and (self._widths is None or not torch.equal(table, self._widths)):
            self._widths = table.clone()
            packed = pack_codes((table - WIDTHS[0]).to(torch.uint8).unsqueeze(0), TABLE)
            yield self._counted(Frame(Type.WIDTHS, packed.numpy().tobytes(), step, micro_batch, self.cut))
        yield self._counted(Frame(self.type, payload, step, micro_batch, self.cut))

    # The receiver's end.

    def take_widths(self, frame: Frame) -> None:
        """A table that came. Raises WireError where it cannot be one."""
        self.bytes += frame.wire_bytes
        expected = TABLE.row_bytes(self.channels)
        if len(frame.payload) != expected:
            raise WireError(
                f"{frame.place}: a table of {self.channels} widths has {expected} bytes, {len(frame.payload)} came"
            )
        packed = torch.frombuffer(bytearray(frame.payload), dtype=torch.uint8).unsqueeze(0)
        self._widths = unpack_codes(packed, TABLE, self.channels)[0].to(torch.int64) + WIDTHS[0]

    def tensor(self, frame: Frame, samples: Sequence[int]) -> Tensor:
        """The tensor that came, float32 [channels, tokens]. Raises WireError where the payload is damaged."""
        self.bytes += frame.wire_bytes
        widths = self.widths
        levels = None if widths is None else quantizer.levels_of(widths)
        tokens = self.terms.tokens
        x = quantizer.unpack(frame.payload, levels, tokens, self.channels, self.terms.group, frame.place)
        self._note(frame.payload)
        if self._differences:
            if frame.payload[0] == quantizer.RANGED:
                before = recall(self._cache, samples)
                if before is None:
                    raise WireError(f"{frame.place}: a difference came for samples that were never sent whole")
                x = before + x
            remember(self._cache, samples, x)
        return x

    def shaped(self, x: Tensor) -> Tensor:
        """[channels, tokens] → [batch, length, channels]."""
        return quantizer.by_window(x, self.terms.window_length)

    # Both ends.

    def end(self, step: int) -> None:
        if self.policy is not None:
            self.policy.end(step)

    def _note(self, payload: bytes) -> None:
        kind, widths = payload[0], self.widths
        fixed = {quantizer.RAW32: 32.0, quantizer.RAW16: 16.0}
        if kind == quantizer.RANGED and widths is not None:
            self._sent.append(float(widths.double().mean()))
        else:
            self._sent.append(fixed.get(kind, 8 * len(payload) / (self.terms.tokens * self.channels)))

    def _counted(self, frame: Frame) -> Frame:
        self.bytes += frame.wire_bytes
        return frame

    def state(self) -> State:
        kept = {} if self._widths is None else {"table": self._widths}
        if self.policy is not None:
            return kept | named("policy", self.policy.state())
        return kept | cache_state(self._cache)

    def load(self, state: State) -> None:
        self._widths = state.get("table")
        if self.policy is not None:
            self.policy.load(below(state, "policy"))
        else:
            self._cache = load_cache(state)


def payload_limit(terms: Terms, channels: int) -> int:
    """Bytes that a tensor's payload has at most: raw, in float32; codes and their side information are less."""
    groups = -(-terms.tokens // terms.group)
    raw = 4 * terms.tokens * channels
    side = channels * (8 * groups + 8) + 64
    return quantizer.HEAD.size + raw + side
