"""A connection: frames in and out, with limits, deadlines, counters and signs of life.

One thread writes and one reads, so that neither party's computing waits for the network. The writer sends an empty ACK
whenever it has had nothing to send for a while; a party from which nothing at all comes within the deadline is lost.
What is read is judged head first (`wire.read_head`); the first fault ends the connection, and the peer is told why.
Where writing fails, what the peer has sent is read to its end first: it may say why.

`Throttle` holds frames back as a slower network would: each waits until the link has carried what came before it and
itself, and one latency more. It is the receiving and the sending side of one party, so the other knows nothing of it.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from amq.errors import AmqError
from amq.split.wire import (
    CHECK_BYTES,
    FIRST,
    HEAD,
    TO_CLIENT,
    TO_SERVER,
    Frame,
    Limits,
    LinkLost,
    PeerError,
    Type,
    WireError,
    check_of,
    pack_head,
    read_head,
    reason_in,
)

WAITING = 16
"""Frames that are read ahead; a peer that sends more waits."""
MOST_REASON = 1000
"""Bytes of an error's text that are sent."""
PIECE = 1 << 20
"""Bytes that are handed to the network at a time."""
LAST_SECONDS = 2.0
"""For a peer that is told why to end the connection itself."""
MOST_LATENCY = 60.0
RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Throttle:
    """rate: bits per second; latency: seconds, one way."""

    rate: float
    latency: float

    @classmethod
    def parse(cls, text: str) -> Throttle | None:
        """`20mbit,30ms` → a throttle; empty → None."""
        if not text:
            return None
        match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([kmg]bit)\s*(?:,\s*(\d+\.?\d*)\s*ms)?\s*", text, re.IGNORECASE)
        if not match or float(match[1]) <= 0:
            raise AmqError(f"--link {text!r} is not a rate and a latency such as 20mbit,30ms")
        made = cls(float(match[1]) * RATES[match[2].lower()], float(match[3] or 0) / 1000)
        if made.latency > MOST_LATENCY:
            raise AmqError(f"--link {text!r}: expected a latency of at most {MOST_LATENCY:g} s")
        return made


class _Lane:
    """When a frame that enters a throttled link at some time comes out at its end."""

    def __init__(self, throttle: Throttle | None) -> None:
        self._throttle, self._free = throttle, 0.0

    def left(self, entered: float, size: int) -> Iterator[float]:
        """Counts a frame in; the seconds until it is out, asked again and again, until there are none."""
        if self._throttle is None:
            return
        self._free = max(entered, self._free) + 8 * size / self._throttle.rate
        while (left := self._free + self._throttle.latency - time.monotonic()) > 0:
            yield left


@dataclass
class Traffic:
    """What went over a socket in one direction: bytes in all, and bytes by type of frame, heads included."""

    total: int = 0
    by_type: Counter[Type] = field(default_factory=Counter)

    def count(self, type: Type, size: int) -> None:
        self.by_type[type] += size


class Link:
    """One end of a connection. client: whether this end is the client's.

    deadline: seconds of silence after which the peer is lost. key: of hello, as `wire.check_of`. Until `start`, which
    gives the connection its own key and limits and lets the threads run, only hello or an error may come.
    """

    def __init__(
        self, sock: socket.socket, *, client: bool, key: bytes = b"", deadline: float = 30.0,
        throttle: Throttle | None = None,
    ) -> None:  # fmt: skip
        self._socket, self._key, self._deadline = sock, key, deadline
        self._out, self._in = (TO_SERVER, TO_CLIENT) if client else (TO_CLIENT, TO_SERVER)
        self._limits: Limits = FIRST
        self._numbers = {self._out: 0, self._in: 0}
        self.sent, self.received = Traffic(), Traffic()
        self._lanes = _Lane(throttle), _Lane(throttle)
        self._outbox: queue.Queue[tuple[float, Frame] | None] = queue.Queue()
        self._inbox: queue.Queue[tuple[float, Frame] | AmqError] = queue.Queue(WAITING)
        self._failed: AmqError | None = None  # what ended the connection: set by the reader alone
        self._unwritten: AmqError | None = None  # what ended the writer
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) if sock.family != socket.AF_UNIX else None

    # Before the threads run: hello, with a deadline for the whole of it.

    def send_now(self, frame: Frame) -> None:
        """Sends within the caller's thread."""
        self._write(frame)

    def receive_now(self, seconds: float) -> Frame:
        """One frame within `seconds`, however slowly its bytes come."""
        return self._read(time.monotonic() + seconds)

    def start(self, limits: Limits, key: bytes) -> None:
        """From now on `key` is the key, `limits` may come, and both threads run."""
        self._key, self._limits = key, limits
        for work in (self._write_all, self._read_all):
            thread = threading.Thread(target=work, name=f"amq-split-{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def send(self, frame: Frame) -> None:
        """Queues a frame; raises what has ended the connection, if something has."""
        if self._failed is not None:
            raise self._failed
        self._outbox.put((time.monotonic(), frame))

    def receive(self) -> Frame:
        """The next frame that is no sign of life. Raises LinkLost, WireError or PeerError, after which all is over."""
        found = self._inbox.get()
        if isinstance(found, AmqError):
            self._inbox.put(found)  # for whoever asks again
            raise found
        entered, frame = found
        for left in self._lanes[1].left(entered, frame.wire_bytes):
            time.sleep(left)
        return frame

    def close(self, why: str = "") -> None:
        """Sends what is queued and, if something was wrong, why; then ends the connection. At once if it is lost."""
        last = Frame(Type.ERROR, why.encode("utf-8", "replace")[:MOST_REASON])
        self._closing.set()
        if not self._threads:
            with contextlib.suppress(AmqError):
                if why:
                    self._write(last)
        elif not isinstance(self._failed, LinkLost):
            if why:
                self._outbox.put((time.monotonic(), last))
            self._outbox.put(None)
            self._threads[0].join(timeout=self._deadline)
        else:
            self._outbox.put(None)
        if why:
            self._drain()
        self._shut()
        for thread in self._threads:
            thread.join(timeout=1.0)
        self._socket.close()

    def _drain(self) -> None:
        """Drops what still comes until the peer has read why and ends, too: a system that closes a socket over bytes
        that nobody has read resets the connection, and the reason is lost."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            until = time.monotonic() + LAST_SECONDS
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(PIECE):
                    return

    def _shut(self) -> None:
        """Ends the connection both ways; what has come can still be read."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _write_all(self) -> None:
        idle = min(5.0, self._deadline / 4)
        try:
            while True:
                try:
                    found = self._outbox.get(timeout=idle)
                except queue.Empty:
                    self._write(Frame(Type.ACK))
                    continue
                if found is None:
                    return
                entered, frame = found
                for left in self._lanes[0].left(entered, frame.wire_bytes):
                    time.sleep(min(left, idle))
                    if left > idle:
                        self._write(Frame(Type.ACK))
                self._write(frame)
        except AmqError as error:
            self._unwritten = error
            self._shut()  # the reader comes to the end of what was sent

    def _read_all(self) -> None:
        try:
            while True:
                frame = self._read(None)
                if frame.type is Type.ERROR:
                    raise PeerError(f"the other party ended the connection: {reason_in(frame)}")
                if frame.type is not Type.ACK:
                    self._put((time.monotonic(), frame))
        except LinkLost as error:
            self._failed = self._unwritten or error
        except AmqError as error:
            self._failed = error
        except MemoryError:
            self._failed = AmqError("out of memory while a frame was read: use a larger machine or a smaller --batch")
        self._put(self._failed)

    def _put(self, found: tuple[float, Frame] | AmqError) -> None:
        """Leaves a frame, or what ended the connection, for `receive`: when there is room or nobody reads any more."""
        while not self._closing.is_set():
            with contextlib.suppress(queue.Full):
                return self._inbox.put(found, timeout=0.2)
        with contextlib.suppress(queue.Full):
            self._inbox.put_nowait(found)

    def _write(self, frame: Frame) -> None:
        head, number = pack_head(frame), self._numbers[self._out]
        check = check_of(self._key, self._out, number, head, frame.payload)
        self._numbers[self._out] += 1
        left = memoryview(head + check + frame.payload)
        try:
            while left:  # the deadline is each piece's: a large frame may take longer on a slow network
                self._socket.settimeout(self._deadline)
                left = left[self._socket.send(left[:PIECE]) :]
        except TimeoutError:
            raise LinkLost(f"the other party has read nothing for {self._deadline:g} s") from None
        except OSError as error:
            raise LinkLost(f"the other party is gone ({error.strerror or error})") from None
        self.sent.total += frame.wire_bytes
        self.sent.count(frame.type, frame.wire_bytes)

    def _read(self, until: float | None) -> Frame:
        """until: when the whole frame must be there; None where every part of it has the deadline anew."""
        data = self._read_bytes(HEAD.size + CHECK_BYTES, until)
        head = read_head(data[: HEAD.size], self._limits)
        payload = self._read_bytes(head.length, until)
        number = self._numbers[self._in]
        check = check_of(self._key, self._in, number, data[: HEAD.size], payload)
        frame = Frame(head.type, payload, head.step, head.micro_batch, head.cut)
        if not hmac.compare_digest(check, data[HEAD.size :]):
            why = "its key is another, or it was changed" if self._key else "it was damaged, or made with a key"
            raise WireError(f"{frame.place}: the check of the frame is wrong: {why}")
        self._numbers[self._in] += 1
        self.received.count(frame.type, frame.wire_bytes)
        return frame

    def _read_bytes(self, count: int, until: float | None) -> bytes:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            left = self._deadline if until is None else until - time.monotonic()
            if left <= 0:
                raise LinkLost("the other party did not say hello in time")
            try:
                self._socket.settimeout(left)
                read = self._socket.recv_into(view[done:], min(count - done, PIECE))
            except TimeoutError:
                if until is not None:
                    continue
                raise LinkLost(f"the other party has been silent for {self._deadline:g} s") from None
            except OSError as error:
                raise LinkLost(f"the other party is gone ({error.strerror or error})") from None
            if not read:
                raise LinkLost("the other party is gone (it closed the connection)")
            done += read
            self.received.total += read
        return bytes(data)
