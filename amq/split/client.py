"""The training side: holds the text and the first blocks, leads the run and writes its folder.

`train` connects, trains to the last step, fetches the server's half of the adapter and writes the whole. Whatever ends
the connection, the run goes on from the last state that both have, as soon as the server can be reached again.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from amq.errors import AmqError
from amq.model.inventory import embedding_weight
from amq.split import hello
from amq.split.adapter import read_half, write_adapter
from amq.split.data import label_type
from amq.split.hello import ClientHello
from amq.split.link import Link, Throttle
from amq.split.model import targets_of
from amq.split.party import Party
from amq.split.records import (
    ADAPTER,
    RUN,
    STEPS,
    WIDTHS,
    PartySeconds,
    SplitRun,
    StepRecord,
    WidthsRecord,
    append_line,
    read_lines,
    write_lines,
)
from amq.split.state import States
from amq.split.wire import BUSY, LOSS, Frame, LinkLost, NotFinite, PeerError, Type, WireError
from amq.util.progress import Progress, Step

RETRY_SECONDS = 1.0
ANSWER_SECONDS = 120.0
"""For a server to answer the first hello in, upon which it makes its part of the model."""


@dataclass(frozen=True)
class Reach:
    """How the server is reached. key: as `wire.secret` makes it, or empty; seconds."""

    host: str
    port: int
    key: bytes
    deadline: float
    reconnect: float
    throttle: Throttle | None = None

    def connect(self) -> Link:
        try:
            sock = socket.create_connection((self.host, self.port), timeout=self.deadline)
        except OSError as error:
            raise LinkLost(f"no server at {self.host}:{self.port} ({error.strerror or error})") from None
        return Link(sock, client=True, key=self.key, deadline=self.deadline, throttle=self.throttle)


class Client:
    """One run. windows: int64 [samples, length], what is trained on. output: the run's folder."""

    def __init__(self, party: Party, windows: Tensor, output: Path, run: SplitRun, progress: Progress) -> None:
        self.party, self.terms, self._windows = party, party.terms, windows
        self.output, self._run, self._progress = output, run, progress
        self.states = States(output)
        self._records: list[StepRecord] = read_lines(output / STEPS, StepRecord)
        self._widths: dict[str, tuple[int, ...]] = {}
        self._before = (0, 0)  # bytes of earlier connections

    # The run.

    def train(self, reach: Reach) -> Path:
        """Trains to the end; returns the folder of the adapter."""
        if not self.states.steps():
            self._records = []  # an earlier run's, which got no further than its first steps
            self.states.save(0, self.party.state(), self.terms)
        else:
            self._before = self._counted()
        self._write_run("running")
        with self._progress.stage("split", self.terms.steps - self.states.steps()[-1]) as step:
            self._until_done(reach, step)
        self._finish()
        self._write_run("finished")
        return self.output / ADAPTER

    def _counted(self) -> tuple[int, int]:
        """Bytes of earlier processes: as the last one wrote at its end or, where it was killed, at its last step."""
        path = self.output / RUN
        counted = [(record.sent, record.received) for record in self._records[-1:]]
        if path.is_file():
            run = SplitRun.read(path)
            counted.append((run.sent, run.received))
        return max(counted, default=(0, 0))

    def _until_done(self, reach: Reach, step: Step) -> None:
        lost_since: float | None = None
        reached = bool(self.states.steps()[-1])
        while True:
            try:
                link = self._greet(reach)
                reached, lost_since = True, None
                return self._session(link, step)
            except (LinkLost, PeerError) as error:
                # a server that has not yet noticed the end of this run's own last connection says that it is busy, too
                known = reached or lost_since is not None
                retry = isinstance(error, LinkLost) or (known and BUSY in str(error))
                now = time.monotonic()
                if lost_since is None:
                    lost_since = now
                    if retry and reach.reconnect:
                        self._progress.say(f"{error}; the state of step {self.states.steps()[-1]} is in {self.output}; "
                                           f"trying again for {reach.reconnect:g} s")  # fmt: skip
                if not retry or now - lost_since >= reach.reconnect:
                    self._close()
                    self._write_run("interrupted")
                    raise AmqError(f"{error}; {self._kept()}") from None
                time.sleep(min(RETRY_SECONDS, reach.reconnect))
            except WireError as error:
                self._close(str(error))
                self._write_run("interrupted")
                raise AmqError(f"the server sent what it must not: {error}; {self._kept()}") from None
            except BaseException as error:
                self._close(f"the client stopped: {str(error) or type(error).__name__}")
                self._write_run("interrupted")
                raise

    def _kept(self) -> str:
        """What an error ends with."""
        step = self.states.steps()[-1]
        return f"the state of step {step} is kept: go on with --resume" if step else "nothing was trained yet"

    def _close(self, why: str = "") -> None:
        link, self.party.link = self.party.link, None
        if link is not None:
            link.close(why)
            self._before = (self._before[0] + link.sent.total, self._before[1] + link.received.total)

    def _greet(self, reach: Reach) -> Link:
        """A connection over which both have said hello, and both stand before the same step."""
        self._close()
        link = self.party.link = reach.connect()
        ours = ClientHello(
            terms=self.terms, durable=tuple(self.states.steps()), channels=self.party.channels, nonce=hello.nonce()
        )
        hello.send_hello(link, ours)
        theirs = hello.read_server(link, max(reach.deadline, ANSWER_SECONDS))
        if theirs.start not in ours.durable:
            raise WireError(
                f"the server wants to go on from step {theirs.start}, which is none of {list(ours.durable)}"
            )
        hello.begin(link, reach.key, ours, theirs, is_client=True)
        self._go_back(theirs.start)
        return link

    def _go_back(self, start: int) -> None:
        """To the state before step `start`."""
        self.party.load(self.states.load(start))
        self.start = start

    def _cut_back(self, start: int) -> None:
        """The run's files to that state. Not after hello: whoever recorded a server's and sends it again must not undo
        a step; the first loss is authenticated by a key that is this connection's own."""
        self.states.drop_after(start)
        self._records = [record for record in self._records if record.step < start]
        write_lines(self.output / STEPS, self._records)
        kept = [r for r in read_lines(self.output / WIDTHS, WidthsRecord) if r.step < start]
        write_lines(self.output / WIDTHS, kept)
        self._widths = {record.stream: record.widths for record in kept}

    def _session(self, link: Link, step: Step) -> None:
        for index in range(self.start, self.terms.steps):
            record = self._step(index, link)
            self._records.append(record)
            append_line(self.output / STEPS, record)
            if (index + 1) % self.terms.save_every == 0 or index + 1 == self.terms.steps:
                self.states.save(index + 1, self.party.state(), self.terms)
            step(f"loss {record.loss:.4f}, {record.forward_bits:.2f} + {record.backward_bits:.2f} bits, "
                 f"{(record.sent + record.received) / 2**20:.1f} MiB")  # fmt: skip
        link.send(Frame(Type.BYE, step=self.terms.steps))
        frame = self.party.expect(Type.ADAPTER, self.terms.steps)
        write_adapter(self.output / ADAPTER, self.party.part, read_half(frame.payload, self.party.part))

    def _finish(self) -> None:
        """The adapter is on disk: the server may go."""
        link = self.party.link
        assert link is not None
        with suppress(AmqError):  # the server has given all that it has, and may be gone already
            link.send(Frame(Type.BYE, step=self.terms.steps))
        self._close()

    # One step.

    def _step(self, step: int, link: Link) -> StepRecord:
        start, party = time.perf_counter(), self.party
        counted = {key: stream.bytes for key, stream in party.streams.items()}
        labels, own_loss = 0, 0.0
        party.begin(step)
        waiting: dict[int, tuple[Tensor, Tensor]] = {}
        parts, u_shape = self.terms.micro_batches, self.terms.labels == "client"
        behind = 2 if u_shape else 1  # a U-shaped run's server sends the next part's hidden states before a gradient
        for index in range(parts + behind):
            if index < parts:
                tokens = self._windows[party.samples(step, index)]
                with party.clock("compute"):
                    hidden = party.part.embedded(tokens)
                if self.terms.labels == "server":
                    labels += self._send_labels(tokens, step, index, link)
                party.send(0, True, hidden, step, index)
                waiting[index] = tokens, hidden
            if u_shape and 1 <= index <= parts:
                own_loss += self._head(step, index - 1, waiting[index - 1][0])
            if index >= behind:
                party.backward(0, step, index - behind, waiting.pop(index - behind)[1])
        loss, server = self._loss(party.expect(Type.LOSS, step), own_loss)
        if step == self.start:
            self._cut_back(step)
        self._note_widths(step)
        party.end(step)
        sent, received = 0, 0
        for (cut, forward), stream in party.streams.items():
            if (cut == 0) == forward:  # hidden states of the first cut, gradients of the second
                sent += stream.bytes - counted[cut, forward]
            else:
                received += stream.bytes - counted[cut, forward]
        return StepRecord(
            step=step, loss=loss, forward_bits=self._bits(True), backward_bits=self._bits(False),
            forward_bytes=sent + labels, backward_bytes=received, sent=self._before[0] + link.sent.total,
            received=self._before[1] + link.received.total, seconds=time.perf_counter() - start,
            client=party.clock.take(), server=server,
        )  # fmt: skip

    def _bits(self, forward: bool) -> float:
        """Mean bits per value of the step's hidden states or gradients, over the cuts."""
        bits = [stream.bits for (_, way), stream in self.party.streams.items() if way == forward]
        return sum(bits) / len(bits)

    def _send_labels(self, tokens: Tensor, step: int, index: int, link: Link) -> int:
        """The tokens themselves, of which the server makes what each position predicts; returns their bytes."""
        kind = label_type(embedding_weight(self.party.part.model).shape[0])
        frame = Frame(Type.LABELS, tokens.numpy().astype(kind).tobytes(), step, index)
        link.send(frame)
        return frame.wire_bytes

    def _head(self, step: int, index: int, tokens: Tensor) -> float:
        """U-shape: the loss of one part, whose gradient at the second cut goes to the server."""
        party = self.party
        hidden = party.hidden(1, step, index)
        with party.clock("compute"):
            targets = targets_of(tokens, self.terms.unscored).to(party.part.device)
            loss = party.part.loss(hidden, targets, self.terms.predicted)
            loss.backward()
        assert hidden.grad is not None
        party.send(1, False, hidden.grad, step, index)
        return float(loss.detach())

    def _loss(self, frame: Frame, own: float) -> tuple[float, PartySeconds]:
        if len(frame.payload) != LOSS.size:
            raise WireError(f"{frame.place} has {len(frame.payload)} bytes, expected {LOSS.size}")
        loss, compute, encode, wait = LOSS.unpack(frame.payload)
        loss = own if self.terms.labels == "client" else loss
        if not abs(loss) < float("inf"):
            raise NotFinite(f"the loss of step {frame.step} is {loss}: {NotFinite.REMEDY}")
        return loss, PartySeconds(compute=compute, encode=encode, wait=wait)

    # The run's folder.

    def _note_widths(self, step: int) -> None:
        for stream in self.party.streams.values():
            if (widths := stream.widths) is None:
                continue
            table = tuple(widths.tolist())
            if self._widths.get(stream.name) != table:
                self._widths[stream.name] = table
                append_line(self.output / WIDTHS, WidthsRecord(step=step, stream=stream.name, widths=table))

    def _write_run(self, status: str) -> None:
        link = self.party.link
        sent, received = (link.sent.total, link.received.total) if link else (0, 0)
        sent, received = self._before[0] + sent, self._before[1] + received
        self._run = replace(self._run, status=status, sent=sent, received=received)
        self._run.write(self.output / RUN)
