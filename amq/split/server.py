"""The serving side: holds the later blocks and, unless the client keeps its labels, the loss.

A thread accepts connections and reads each one's hello, in a thread of its own and within seconds; one client at a
time is served, and any other is told so. A client that sends what it must not is told why and loses its connection;
the server lives, and waits for it, or another with the same run, to come back.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.inventory import embedding_weight
from amq.split import hello
from amq.split.adapter import half_of, most_bytes
from amq.split.data import label_type
from amq.split.hello import ClientHello, ServerHello
from amq.split.link import Link
from amq.split.model import Part, targets_of
from amq.split.party import Party
from amq.split.state import States
from amq.split.terms import Terms, check_agreement
from amq.split.wire import BUSY, LOSS, Frame, LinkLost, NotFinite, PeerError, Type, WireError
from amq.util.progress import Progress

GREETING = 8
"""Connections that may be saying hello at a time."""
ACCEPT_AGAIN = 0.1
"""Seconds between tries to accept a connection when the system would not."""
FOREVER = 1e9
"""Seconds beyond which a wait has no end; a queue cannot wait for ten times as many."""
ENDED = "this server has ended"


class Door:
    """Accepts connections until it is closed; `clients` has those that said hello while nobody was served."""

    def __init__(self, listener: socket.socket, key: bytes, deadline: float) -> None:
        self._listener, self._key, self._deadline = listener, key, deadline
        self.clients: queue.Queue[tuple[Link, ClientHello]] = queue.Queue()
        self._lock, self._served = threading.Lock(), False
        self._greeting = threading.Semaphore(GREETING)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="amq-split-door", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed; or a connection that was gone at once, or too many open files for the moment
                self._closed.wait(ACCEPT_AGAIN)
                continue
            if not self._greeting.acquire(blocking=False):
                sock.close()
                continue
            try:
                threading.Thread(target=self._greet, args=(sock,), name="amq-split-hello", daemon=True).start()
            except RuntimeError:  # the system has no thread left for it
                self._greeting.release()
                sock.close()

    def _greet(self, sock: socket.socket) -> None:
        try:
            link = Link(sock, client=False, key=self._key, deadline=self._deadline)
            try:
                self._admit(link, hello.read_client(link.receive_now(hello.HELLO_SECONDS)))
            except AmqError as error:
                link.close(str(error))
        finally:
            self._greeting.release()

    def _admit(self, link: Link, client: ClientHello) -> None:
        with self._lock:
            refusal = ENDED if self._closed.is_set() else BUSY if self._served else ""
            if not refusal:
                self._served = True
                self.clients.put((link, client))
        if refusal:
            link.close(refusal)

    def free(self) -> None:
        """The next client may come."""
        with self._lock:
            self._served = False

    def close(self) -> None:
        """Nobody is let in any more, and who waits is told so."""
        with self._lock:
            self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._thread.join(timeout=1.0)
        with contextlib.suppress(queue.Empty):
            while True:
                self.clients.get_nowait()[0].close(ENDED)


class Server:
    """own: what this server's settings say of the terms. make_part: (terms) → the part of the model."""

    def __init__(
        self,
        own: Mapping[str, Any],
        channels: int,
        make_part: Callable[[Terms], Part],
        output: Path,
        progress: Progress,
    ) -> None:
        self._own, self._channels, self._make_part, self._progress = own, channels, make_part, progress
        self.states = States(output)
        self.party: Party | None = None

    def serve(self, door: Door, key: bytes, reconnect: float) -> None:
        """Serves one run to its end. Raises AmqError where its client does not come back."""
        lost_since: float | None = None
        while True:
            wait = None if lost_since is None else max(0.0, lost_since + min(reconnect, FOREVER) - time.monotonic())
            try:
                link, client = door.clients.get(timeout=wait)
            except queue.Empty:
                raise AmqError(
                    f"the client did not come back within {reconnect:g} s; the state of step {self.states.steps()[-1]} "
                    "is kept: go on with --resume"
                ) from None
            try:
                start = self._welcome(link, client, key)
                self._session(link, start)
            except (LinkLost, PeerError, WireError, NotFinite) as error:
                door.free()  # first: who was told may come again at once
                link.close("" if isinstance(error, LinkLost | PeerError) else str(error))
                self._say(f"{error}")
            except AmqError as error:  # of hello: the client is refused, of a step: nothing can go on
                if self.party is not None and self.party.link is link:
                    link.close(str(error))
                    raise
                door.free()
                link.close(str(error))
                self._say(f"refused a client: {error}")
            except BaseException as error:
                link.close(f"the server stopped: {str(error) or type(error).__name__}")
                raise
            else:
                link.close()
                return
            if self.party is not None and self.party.link is link:  # a client that was refused changes nothing
                lost_since = time.monotonic()
                self._say(
                    f"the state of step {self.states.steps()[-1]} is kept; waiting {reconnect:g} s for the client"
                )

    def _say(self, text: str) -> None:
        self._progress.say(text)

    def _welcome(self, link: Link, client: ClientHello, key: bytes) -> int:
        """Judges hello and answers it; returns the step to go on from. Raises AmqError where it is refused."""
        terms = client.terms
        check_agreement(self._own, terms, "this server's")
        if client.channels != self._channels:
            raise AmqError(f"channels differ: this server's are {self._channels}, the client's {client.channels}")
        hello.limits_of(terms, client.channels, 0, client=False)
        self.states.check(terms)
        start = hello.common_step(self.states.steps() or [0], client.durable)
        fresh = self.party is None
        if self.party is None:
            self.party = Party(self._make_part(terms), terms, client=False)
        if not self.states.steps():
            self.states.save(0, self.party.state(), terms)
        answer = ServerHello(start=start, adapter=most_bytes(self.party.part), nonce=hello.nonce())
        hello.send_hello(link, answer)
        hello.begin(link, key, client, answer, is_client=False)
        self.party.link = link
        self.party.load(self.states.load(start))
        self._say(f"{'training' if fresh else 'going on'} from step {start} of {terms.steps}: cut {terms.cut}, "
                  f"policy {terms.policy}, coder {terms.coder}, labels at the {terms.labels}")  # fmt: skip
        return start

    def _session(self, link: Link, start: int) -> None:
        party = self.party
        assert party is not None
        terms = party.terms
        for step in range(start, terms.steps):
            loss = _step(party, step)
            if step == start:  # not after hello: whoever recorded one and sends it again must not undo a step
                self.states.drop_after(step)
            spent = party.clock.take()
            link.send(Frame(Type.LOSS, LOSS.pack(loss, spent.compute, spent.encode, spent.wait), step))
            party.end(step)
            if (step + 1) % terms.save_every == 0 or step + 1 == terms.steps:
                self.states.save(step + 1, party.state(), terms)
        party.expect(Type.BYE, terms.steps)
        link.send(Frame(Type.ADAPTER, half_of(party.part), terms.steps))
        party.expect(Type.BYE, terms.steps)


def _step(party: Party, step: int) -> float:
    """All parts of a step, forward and backward; its loss, where the labels come along."""
    terms, loss = party.terms, 0.0
    party.begin(step)
    waiting: list[tuple[Tensor, Tensor]] = []
    for index in range(terms.micro_batches + 1):
        if index < terms.micro_batches:
            if terms.labels == "server":
                loss += _whole(party, step, index)
            else:
                waiting.append(_forward(party, step, index))
        if index and terms.labels == "client":
            hidden, after = waiting.pop(0)
            party.backward(1, step, index - 1, after)
            _send_gradient(party, step, index - 1, hidden)
    return loss


def _whole(party: Party, step: int, index: int) -> float:
    """A part of a step whose labels came along: forward, loss and backward at once."""
    targets = _targets(party, party.expect(Type.LABELS, step, index))
    hidden = party.hidden(0, step, index)
    with party.clock("compute"):
        loss = party.part.loss(party.part.continued(hidden), targets, party.terms.predicted)
        loss.backward()
    _send_gradient(party, step, index, hidden)
    return float(loss.detach())


def _targets(party: Party, frame: Frame) -> Tensor:
    terms, rows = party.terms, embedding_weight(party.part.model).shape[0]
    kind = label_type(rows)
    if len(frame.payload) != kind.itemsize * terms.tokens:
        raise WireError(f"{frame.place} has {len(frame.payload)} bytes, expected {kind.itemsize * terms.tokens}")
    tokens = torch.from_numpy(np.frombuffer(frame.payload, kind).astype(np.int64))
    if bool((tokens >= rows).any()):
        raise WireError(f"{frame.place}: token {int(tokens.max())} is none of the model's {rows}")
    return targets_of(tokens.view(terms.windows, terms.window_length), terms.unscored).to(party.part.device)


def _forward(party: Party, step: int, index: int) -> tuple[Tensor, Tensor]:
    """U-shape: sends the hidden states behind the last block; (what came, what went), for the way back."""
    hidden = party.hidden(0, step, index)
    with party.clock("compute"):
        after = party.part.continued(hidden)
    party.send(1, True, after, step, index)
    return hidden, after


def _send_gradient(party: Party, step: int, index: int, hidden: Tensor) -> None:
    """Of what came at the first cut, once the backward pass is through."""
    assert hidden.grad is not None
    party.send(0, False, hidden.grad, step, index)
