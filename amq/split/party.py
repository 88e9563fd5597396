"""What both parties do alike: their optimizer, their streams, their state, and reading what must come next.

A step has `micro_batches` parts. While the server works on one, the client works on the next: it sends part i before
it waits for part i − 1, so two are on their way at a time. The order of all computing is fixed all the same, and with
it every sum: a run gives the same losses again, over any network.

Each party clips its own gradient and steps its own AdamW; nothing of the weights goes over the wire until the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.split.data import samples_of
from amq.split.link import Link
from amq.split.model import Part
from amq.split.policy import below, named
from amq.split.records import PartySeconds
from amq.split.stream import Stream
from amq.split.terms import Terms
from amq.split.wire import Frame, NotFinite, Type, WireError


class Clock:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(("compute", "encode", "wait"), 0.0)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[what] += time.perf_counter() - start

    def take(self) -> PartySeconds:
        """What was spent since the last call."""
        spent, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return PartySeconds(**spent)


class Party:
    """One side of a run: its part of the model, and the streams at its cuts by (cut, forward)."""

    def __init__(self, part: Part, terms: Terms, *, client: bool) -> None:
        self.part, self.terms, self.clock = part, terms, Clock()
        self.channels = part.model.config.get_text_config().hidden_size
        self._client = client
        self.streams = self._new_streams()
        self.optimizer = torch.optim.AdamW(part.parameters, lr=terms.learning_rate, weight_decay=0.0)
        self.link: Link | None = None

    def _new_streams(self) -> dict[tuple[int, bool], Stream]:
        terms = self.terms
        made: dict[tuple[int, bool], Stream] = {}
        for cut in range(2 if terms.labels == "client" else 1):
            sends = self._client == (cut == 0)  # hidden states go to the server at the first cut, back at the second
            hidden = Stream(terms, self.channels, cut, forward=True, sender=sends)
            gradients = Stream(terms, self.channels, cut, forward=False, sender=not sends, partner=hidden)
            made |= {(cut, True): hidden, (cut, False): gradients}
        return made

    def samples(self, step: int, micro_batch: int) -> list[int]:
        """The samples of one part of a step."""
        whole = samples_of(self.terms.seed, self.terms.samples, self.terms.batch, step)
        return whole[micro_batch * self.terms.windows : (micro_batch + 1) * self.terms.windows]

    def begin(self, step: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for stream in self.streams.values():
            stream.begin(step)

    def end(self, step: int) -> None:
        """The optimizer's step, at a rate that falls linearly to 0, and what the policies learn."""
        with self.clock("compute"):
            norm = torch.nn.utils.clip_grad_norm_(self.part.parameters, self.terms.clip)
            if not bool(norm.isfinite()):
                raise NotFinite(f"the gradient of step {step} is not finite: {NotFinite.REMEDY}")
            for group in self.optimizer.param_groups:
                group["lr"] = self.terms.learning_rate * (1 - step / self.terms.steps)
            self.optimizer.step()
        with self.clock("encode"):
            for stream in self.streams.values():
                stream.end(step)

    def send(self, cut: int, forward: bool, x: Tensor, step: int, micro_batch: int) -> None:
        """Hidden states or their gradients at a cut, [batch, length, channels]."""
        assert self.link is not None
        with self.clock("encode"):
            for frame in self.streams[cut, forward].frames(x, step, micro_batch, self.samples(step, micro_batch)):
                self.link.send(frame)

    def expect(self, type: Type, step: int, micro_batch: int = 0, cut: int = 0) -> Frame:
        """The next frame, which must be this one; tables of widths before it are taken in."""
        assert self.link is not None
        while True:
            with self.clock("wait"):
                frame = self.link.receive()
            if frame.type is Type.WIDTHS and type in (Type.FORWARD, Type.BACKWARD):
                self._widths(frame, step, type is Type.FORWARD)
                continue
            if (frame.type, frame.step, frame.micro_batch, frame.cut) == (type, step, micro_batch, cut):
                return frame
            raise WireError(f"expected {Frame(type, b'', step, micro_batch, cut).place}, got {frame.place}")

    def _widths(self, frame: Frame, step: int, forward: bool) -> None:
        stream = self.streams.get((frame.cut, forward))
        if stream is None or stream.policy is not None or frame.step != step:
            raise WireError(f"{frame.place}: no table of widths is due here")
        stream.take_widths(frame)

    def receive(self, cut: int, forward: bool, step: int, micro_batch: int) -> Tensor:
        """What the other party sends at a cut, float32 [channels, tokens]."""
        stream = self.streams[cut, forward]
        frame = self.expect(stream.type, step, micro_batch, cut)
        with self.clock("encode"):
            return stream.tensor(frame, self.samples(step, micro_batch))

    def hidden(self, cut: int, step: int, micro_batch: int) -> Tensor:
        """The hidden states that come at a cut, [batch, length, channels], a leaf that keeps its gradient."""
        came = self.streams[cut, True].shaped(self.receive(cut, True, step, micro_batch))
        return came.to(self.part.device, self.part.model.dtype).requires_grad_()

    def backward(self, cut: int, step: int, micro_batch: int, hidden: Tensor) -> None:
        """The gradient of hidden states that were sent at a cut: for the policy, and on through what they are of."""
        gradient, stream = self.receive(cut, False, step, micro_batch), self.streams[cut, True]
        assert stream.policy is not None
        with self.clock("encode"):
            stream.policy.returned(gradient)
        with self.clock("compute"):
            hidden.backward(stream.shaped(gradient).to(hidden.device, hidden.dtype))

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        kept = named("lora", self.part.trainable)
        for index, moments in self.optimizer.state_dict()["state"].items():
            kept |= named(f"adam.{index}", moments)
        for key, stream in self.streams.items():
            kept |= named(stream_name(*key), stream.state())
        return dict(sorted(kept.items()))  # equal states are equal files, whatever was loaded before

    def load(self, state: dict[str, Tensor]) -> None:
        """Goes back to a state. Raises AmqError where it is not this party's."""
        with torch.no_grad():
            for name, parameter in self.part.trainable.items():
                found = state.get(f"lora.{name}")
                if found is None or found.shape != parameter.shape:
                    got = "none" if found is None else list(found.shape)
                    raise AmqError(
                        f"the state has for {name}: {got}, expected {list(parameter.shape)}: it is of another run"
                    )
                parameter.copy_(found)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in below(state, "adam").items():
            index, _, field = name.partition(".")
            moments.setdefault(int(index), {})[field] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.streams = self._new_streams()  # what a step left behind in which the connection ended is not of the state
        self.clock.take()  # nor are its seconds
        for key, stream in self.streams.items():
            stream.load(below(state, stream_name(*key)))


def stream_name(cut: int, forward: bool) -> str:
    """Of a stream's entries in a state."""
    return f"stream.{cut}.{int(forward)}"
