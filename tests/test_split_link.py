"""Frames and links of a split run, in any state that a peer or a network may leave them in.

Each test has a reader of frames (`Link`, `Stream`, `hello`) before it and sends it what no honest peer sends: it must
say what was wrong, by name, and nothing else may come out of it: no other exception, no wait without end.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import ROOT
from helpers.split_parties import (
    DEADLINE,
    PATIENCE,
    Passing,
    Proxy,
    Said,
    Serving,
    left_of,
    make_client,
    make_model,
    make_terms,
    part_of,
    reach,
    read_exactly,
    read_frame,
    run_whole,
)
from helpers.tiny_models import HIDDEN

from amq.errors import AmqError
from amq.split import hello, quantizer
from amq.split.adapter import half_of, most_bytes, read_half
from amq.split.client import BUSY
from amq.split.hello import ClientHello, ServerHello, limits_of
from amq.split.link import WAITING, Link, Throttle
from amq.split.run import address, deadline_of, key_of, run_serve, run_train
from amq.split.settings import ServeSettings, SplitEvalSettings, SplitReportSettings, TrainSettings
from amq.split.stream import TABLE, Stream
from amq.split.wire import (
    CHECK_BYTES,
    FIRST,
    HEAD,
    HEAD_BYTES,
    MAGIC,
    MOST_HELLO,
    TO_CLIENT,
    TO_SERVER,
    VERSION,
    Frame,
    LinkLost,
    PeerError,
    Type,
    WireError,
    check_of,
    pack_head,
    secret,
    session_key,
)  # fmt: skip
from amq.util.settings import parse_command

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

KEY = secret(b"sixteen characters and more", "a test")
TERMS = make_terms(policy="amaq")
LIMITS = limits_of(TERMS, HIDDEN, 4096, client=True)
BACK = Frame(Type.BACKWARD, b"payload", 3, 1)


def raw(frame: Frame, key: bytes = b"", number: int = 0, direction: bytes = TO_CLIENT) -> bytes:
    """A frame as it is on the wire."""
    head = pack_head(frame)
    return head + check_of(key, direction, number, head, frame.payload) + frame.payload


@contextlib.contextmanager
def reading(
    data: bytes, *, key: bytes = b"", limits: Any = LIMITS, deadline: float = DEADLINE, end: bool = True
) -> Iterator[Link]:
    """A client's link to which these bytes have come, and, if wanted, the end of the connection."""
    ours, theirs = socket.socketpair()
    link = Link(ours, client=True, key=key, deadline=deadline)
    theirs.sendall(data)
    if end:
        theirs.shutdown(socket.SHUT_WR)
    link.start(limits, key)
    try:
        yield link
    finally:
        link.close()
        theirs.close()


def fault(data: bytes, **named: Any) -> str:
    """What a reader says of these bytes."""
    with reading(data, **named) as link, pytest.raises(WireError) as caught:
        link.receive()
    return str(caught.value)


def test_a_frame_arrives_as_it_was_sent() -> None:
    with reading(raw(Frame(Type.ACK)) + raw(BACK) + raw(Frame(Type.BYE, step=4))) as link:
        assert link.receive() == BACK and link.receive() == Frame(Type.BYE, step=4)
        for _ in range(2):  # whoever asks again is told again
            with pytest.raises(LinkLost, match=r"^the other party is gone \(it closed the connection\)$"):
                link.receive()
        with pytest.raises(LinkLost):
            link.send(BACK)


# What no peer may send.


def headed(**fields: Any) -> bytes:
    """A head alone, with a right check of an empty payload."""
    given = {"magic": MAGIC, "version": VERSION, "type": Type.BACKWARD, "cut": 0, "zero": 0, "micro_batch": 0,
             "step": 0, "length": 0, **fields}  # fmt: skip
    head = struct.pack("<4sBBBBHQI", *given.values())
    return head + check_of(b"", TO_CLIENT, 0, head, b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (headed(magic=b"HTTP"), r"expected a frame that begins with b'AMQS', got b'HTTP': the peer is no `amq split`"),
        (headed(version=2), "wire format version 2 came, this is version 1: use the same amq at both ends"),
        (headed(zero=1), "byte 7 of a frame's head must be 0, got 1"),
        (
            headed(type=77),
            "a frame of type 77 came where only widths, backward, loss, adapter, ack, bye, error may come",
        ),
        (headed(type=Type.LABELS), "a frame of labels came where only widths"),
        (headed(type=Type.HELLO), "a frame of hello came where only widths"),
        (headed(length=1 << 31), f"a frame of backward says 2147483648 bytes, at most {LIMITS[Type.BACKWARD]} are"),
        (headed(type=Type.ACK, length=1), "a frame of ack says 1 bytes, at most 0 are expected"),
    ],
)
def test_a_head_is_refused_before_its_payload_comes(data: bytes, message: str) -> None:
    """The connection stays open, and nothing follows the head: a reader that waited for a payload would time out."""
    assert fault(data, end=False).startswith(message)


def test_before_hello_only_hello_may_come() -> None:
    for frame in (BACK, Frame(Type.ACK), Frame(Type.BYE)):
        assert fault(raw(frame), limits=FIRST).endswith("came where only hello, error may come")
    assert fault(headed(type=Type.HELLO, length=MOST_HELLO + 1), limits=FIRST, end=False) == (
        "a frame of hello says 65537 bytes, at most 65536 are expected"
    )


def test_limits_fit_the_largest_tensor() -> None:
    """Of every policy: what its sender makes is let in at the other end."""
    for policy in ("none", "fixed", "aq-sgd", "amaq", "waterfill", "step"):
        for coder in ("none", "range") if policy != "none" else ("none",):
            terms = make_terms(policy=policy, coder=coder, labels="client", target_bits=8.0, start_bits=8.0)
            sender = Stream(terms, HIDDEN, 0, forward=True, sender=True)
            most = limits_of(terms, HIDDEN, 0, client=False)
            x = torch.randn(terms.windows, terms.window_length, HIDDEN, generator=torch.Generator().manual_seed(0))
            sender.begin(0)
            for frame in sender.frames(x * 1e4, 0, 0, [0]):
                assert len(frame.payload) <= most[frame.type], (policy, coder)
    with pytest.raises(WireError, match="at most 1073741824 are allowed: give a smaller --batch"):
        limits_of(make_terms(batch=1 << 20, window_length=1 << 10), HIDDEN, 0, client=True)


@pytest.mark.parametrize("bit", [0, 32, 40, 48, 80, 144, 184, 200, 250, 260])
def test_one_changed_bit_is_refused(bit: int) -> None:
    data = bytearray(raw(BACK))
    data[bit // 8] ^= 1 << bit % 8
    with reading(bytes(data)) as link, pytest.raises((WireError, LinkLost)):
        link.receive()


def test_a_wrong_check_is_named() -> None:
    data = bytearray(raw(BACK))
    data[-1] ^= 1
    assert fault(bytes(data)) == (
        "backward of step 3, micro-batch 1, cut 0: the check of the frame is wrong: it was damaged, or made with a key"
    )
    assert fault(bytes(data), key=KEY).endswith(
        "the check of the frame is wrong: its key is another, or it was changed"
    )


def test_an_error_is_the_peers_word_and_fit_for_a_terminal() -> None:
    with reading(raw(Frame(Type.ERROR, b"too \x1b[31mred\n\xff"))) as link, pytest.raises(PeerError) as caught:
        link.receive()
    assert str(caught.value) == "the other party ended the connection: too  [31mred \ufffd"


# Keys.


def test_a_frame_of_a_key_is_its_own_once_and_in_its_place() -> None:
    first, second = raw(BACK, KEY, 0), raw(Frame(Type.BYE, step=4), KEY, 1)
    with reading(first + second, key=KEY) as link:
        assert [link.receive(), link.receive()] == [BACK, Frame(Type.BYE, step=4)]
    for data in (
        raw(BACK),  # made without the key
        raw(BACK, secret(b"another sixteen characters", "a test")),
        raw(BACK, KEY, direction=TO_SERVER),  # thrown back
        second,  # one is missing
    ):
        assert "its key is another, or it was changed" in fault(data, key=KEY)
    with reading(first + first, key=KEY) as link:  # repeated
        assert link.receive() == BACK
        with pytest.raises(WireError, match="its key is another, or it was changed"):
            link.receive()


def test_a_session_has_a_key_of_its_own() -> None:
    assert len({session_key(KEY, a, b) for a in (b"0", b"1") for b in (b"0", b"1")}) == 4
    assert session_key(b"", b"0", b"1") == b""


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (KEY, b"", "made with a key"),
        (b"", KEY, "its key is another, or it was changed"),
        (KEY, secret(b"another sixteen characters", "a test"), "its key is another, or it was changed"),
    ],
)
def test_who_has_another_key_is_refused_at_hello(tmp_path: Path, ours: bytes, theirs: bytes, said: str) -> None:
    """theirs: the server's. It lives; nothing of the model has been made for a peer without the key."""
    terms = make_terms(steps=1)
    with Serving(tmp_path / "server", terms, key=theirs) as serving:
        with pytest.raises(AmqError, match="^the server sent what it must not: error .*: the check of the frame is wr"):
            make_client(tmp_path / "client", terms).train(reach(serving.port, key=ours))
        assert serving.server.party is None
        link = reach(serving.port, key=ours).connect()
        raised: list[str] = []
        hello.send_hello(link, client_hello())
        sock = link._socket
        raised.append(read_exactly(sock, 1 << 16).decode("utf-8", "replace"))
        link.close()
        assert said in raised[0]
        make_client(tmp_path / "client", terms).train(reach(serving.port, key=theirs))
        serving.join()


def client_hello(**changes: Any) -> ClientHello:
    return replace(ClientHello(terms=make_terms(steps=1), durable=(0,), channels=HIDDEN, nonce="0" * 32), **changes)


def test_a_bit_changed_on_the_way_ends_the_connection_alone(tmp_path: Path) -> None:
    """With a key, of which a network's attacker knows nothing: the run ends named, and goes on when it is let."""
    terms = make_terms(policy="fixed")

    def change(passing: Passing) -> bytes:
        data = bytearray(passing.data)
        if (passing.connection, passing.step, passing.type) == (0, 3, Type.FORWARD):
            data[-1] ^= 1
        return bytes(data)

    with Serving(tmp_path / "server", terms, key=KEY) as serving, Proxy(serving.port, change) as proxy:
        expected = (
            "the other party ended the connection: forward of step 3, .* its key is another, or it was changed; the"
        )
        with pytest.raises(AmqError, match=expected):
            make_client(tmp_path / "client", terms).train(reach(proxy.port, key=KEY))
        make_client(tmp_path / "client", terms).train(reach(proxy.port, key=KEY))
        serving.join()
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


def test_a_key_is_a_files_text(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(AmqError, match=rf"^--key {path} cannot be read: No such file or directory$"):
        key_of(ServeSettings(model="m", key=str(path)))
    path.write_text(" fifteen letters\n")
    with pytest.raises(AmqError, match=rf"^the key in {path} has 15 characters: expected at least 16 \(`openssl"):
        key_of(ServeSettings(model="m", key=str(path)))
    path.write_text(" sixteen characters and more\n")
    assert key_of(ServeSettings(model="m", key=str(path))) == KEY


# Deadlines.


def test_silence_is_named() -> None:
    for data in (b"", raw(BACK)[:10], raw(BACK)[:-1]):
        with reading(data, deadline=0.3, end=False) as link:
            with pytest.raises(LinkLost, match=r"^the other party has been silent for 0\.3 s$"):
                link.receive()


def test_a_peer_that_reads_nothing_is_named_and_close_does_not_wait() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours, client=True, deadline=1.0)
    link.start(LIMITS, b"")
    stop = threading.Event()

    def breathe() -> None:
        """It is not silent: it only reads nothing."""
        while not stop.wait(0.1):
            with contextlib.suppress(OSError):
                theirs.sendall(raw(Frame(Type.ACK)))

    thread = threading.Thread(target=breathe, name="test-breath")
    thread.start()
    for _ in range(32):
        link.send(Frame(Type.FORWARD, bytes(1 << 20)))
    with pytest.raises(LinkLost, match=r"^the other party has read nothing for 1 s$"):
        link.receive()
    link.close("it is over")
    stop.set()
    thread.join()
    theirs.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("amq-split")]


def test_a_frame_may_take_longer_than_the_deadline() -> None:
    """A network that carries a little at a time is slow, not silent: the deadline is each piece's."""
    ours, theirs = socket.socketpair()
    deadline, payload, got = 2.0, bytes(24 << 20), 0
    link = Link(ours, client=True, deadline=deadline)
    link.start({**LIMITS, Type.FORWARD: len(payload)}, b"")
    link.send(Frame(Type.FORWARD, payload))
    start = time.monotonic()
    while got < HEAD_BYTES + len(payload):
        theirs.sendall(raw(Frame(Type.ACK)))
        got += len(theirs.recv(1 << 20))
        if time.monotonic() - start < 2 * deadline:
            time.sleep(0.25)
    assert link._failed is None and time.monotonic() - start > deadline
    link.close()
    theirs.close()


def test_a_throttled_link_gives_signs_of_life() -> None:
    """A frame that takes three deadlines on the pretended network, at its sender."""
    ours, theirs = socket.socketpair()
    frame, deadline = Frame(Type.FORWARD, bytes(1000)), 1.5
    rate = 8 * frame.wire_bytes / (3 * deadline)
    sender = Link(ours, client=True, deadline=deadline, throttle=Throttle(rate, 0.0))
    reader = Link(theirs, client=False, deadline=deadline)
    sender.start(LIMITS, b"")
    reader.start({Type.FORWARD: 1000, Type.ACK: 0}, b"")
    start = time.monotonic()
    sender.send(frame)
    assert reader.receive() == frame and time.monotonic() - start >= 3 * deadline
    assert reader.received.by_type[Type.ACK] >= HEAD_BYTES
    sender.close()
    reader.close()


def test_throttled_frames_follow_each_other() -> None:
    """Two frames one after the other, and one latency: of the sender's side and of the receiver's."""
    for side in (True, False):
        ours, theirs = socket.socketpair()
        throttle = Throttle(8 * 1000 * 10, 0.2)  # 1000 bytes take 0.1 s
        sender = Link(ours, client=True, throttle=throttle if side else None)
        reader = Link(theirs, client=False, throttle=None if side else throttle)
        limits = {Type.FORWARD: 1000, Type.ACK: 0}
        sender.start(limits, b"")
        reader.start(limits, b"")
        start, frame = time.monotonic(), Frame(Type.FORWARD, bytes(1000 - HEAD_BYTES))
        for _ in range(3):
            sender.send(frame)
        for count in range(3):
            assert reader.receive() == frame
            assert time.monotonic() - start >= 0.2 + 0.1 * (count + 1) - 1e-3
        sender.close()
        reader.close()


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("", None),
        ("20mbit,30ms", Throttle(2e7, 0.03)),
        ("1.5Gbit", Throttle(1.5e9, 0.0)),
        ("9kbit, 1ms", Throttle(9e3, 0.001)),
    ],
)
def test_links_are_rates_and_latencies(text: str, made: Throttle | None) -> None:
    assert Throttle.parse(text) == made


@pytest.mark.parametrize("text", ["20", "fast", "20mbit,30", "0mbit", "-1mbit", "20mbit;30ms", "20mbit,30ms,1"])
def test_other_links_are_refused(text: str) -> None:
    with pytest.raises(AmqError, match=re.escape(f"--link {text!r} is not a rate and a latency such as 20mbit,30ms")):
        Throttle.parse(text)


def test_a_link_without_end_is_refused() -> None:
    with pytest.raises(AmqError, match="--link '1mbit,99999999999999ms': expected a latency of at most 60 s"):
        Throttle.parse("1mbit,99999999999999ms")


# Ends.


def test_the_reason_comes_before_the_end(tmp_path: Path) -> None:
    """The peer says why and closes while this end is still sending: the reason is raised, not the broken pipe."""
    for turn in range(20):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            link = Link(socket.create_connection(listener.getsockname()), client=True, deadline=DEADLINE)
            peer, _ = listener.accept()
        link.start(LIMITS, b"")
        peer.sendall(raw(Frame(Type.ERROR, b"you must not")))
        peer.close()
        with pytest.raises(PeerError, match="^the other party ended the connection: you must not$"):
            for _ in range(10_000):
                link.send(Frame(Type.FORWARD, bytes(1 << (turn % 20))))
            link.receive()
        link.close()


def test_a_flood_that_nobody_reads_ends_with_the_link() -> None:
    """More frames than are read ahead: the reading thread waits for room, and ends all the same."""
    ours, theirs = socket.socketpair()
    link = Link(ours, client=True, deadline=DEADLINE)
    link.start(LIMITS, b"")
    for _ in range(WAITING + 4):
        theirs.sendall(raw(BACK))
    end = time.monotonic() + PATIENCE
    while link._inbox.qsize() < WAITING:
        assert time.monotonic() < end
        time.sleep(0.01)
    threads = list(link._threads)
    link.close()
    theirs.close()
    assert not [thread for thread in threads if thread.is_alive()]


def test_signs_of_life_take_no_room() -> None:
    with reading(raw(Frame(Type.ACK)) * (3 * WAITING) + raw(BACK)) as link:
        end = time.monotonic() + PATIENCE
        while link.received.by_type[Type.BACKWARD] == 0:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert link.receive() == BACK


def test_closing_sends_what_is_queued_and_why() -> None:
    ours, theirs = socket.socketpair()
    link = Link(ours, client=False, deadline=DEADLINE)
    link.start(LIMITS, b"")
    link.send(Frame(Type.LOSS, b"12345678"))
    link.close("half of a pair: \ud800")
    got = read_exactly(theirs, 1 << 16)
    error = Frame(Type.ERROR, b"half of a pair: ?")
    assert got == raw(Frame(Type.LOSS, b"12345678")) + raw(error)
    theirs.close()


# Hello.

NESTED = b'{"terms":' + b"[" * 30_000
SURROGATE = json.dumps("\ud800" * 32)


def hello_bytes(**changes: Any) -> bytes:
    """A client's hello whose JSON has other values; None takes a field away."""
    from amq.util.records import to_json

    data: Any = {**to_json(client_hello()), **changes}  # type: ignore[dict-item]
    return json.dumps({name: value for name, value in data.items() if value is not None}).encode()


def terms_bytes(**changes: Any) -> bytes:
    data = {**make_terms(steps=1).json(), **changes}
    return hello_bytes(terms={name: value for name, value in data.items() if value != "gone"})


ODD_HELLOS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the client's hello is not JSON"),
    "no JSON": (b"hello", "the client's hello is not JSON"),
    "no text": (b"\xff\xfe\xff", "the client's hello is not JSON"),
    "deep": (NESTED, "the client's hello is not JSON"),
    "a list": (b"[]", "the client's hello"),
    "a number of thousands of digits": (b'{"channels": ' + b"9" * 5000 + b"}", "the client's hello is not JSON"),
    "no terms": (hello_bytes(terms=None), "terms"),
    "no nonce": (hello_bytes(nonce=None), "nonce"),
    "a short nonce": (hello_bytes(nonce="0"), "expected a nonce of 32 hexadecimal digits"),
    "a nonce that is no text": (hello_bytes(nonce="\ud800" * 32), "is not JSON"),
    "a nonce that is no number": (hello_bytes(nonce="x" * 32), "expected a nonce of 32 hexadecimal digits"),
    "a version that is no text": (terms_bytes(version="\ud800"), "is not JSON"),
    "an escape sequence": (terms_bytes(version="\x1b[31m"), r"version differs: this server's is 'test'"),
    "many states": (hello_bytes(durable=list(range(17))), "expected at most 16 durable steps"),
    "huge states": (hello_bytes(durable=[10**4000]), "expected at most 16 durable steps from 0 to 2147483647"),
    "text for a number": (hello_bytes(channels="64"), "channels"),
    "no channels": (hello_bytes(channels=0), "expected channels from 1"),
    "huge steps": (terms_bytes(steps=10**4000), "expected steps from 1 to 2147483647, got a number of"),
    "huge batch": (terms_bytes(batch=1 << 20, micro_batches=1), "at most 1073741824 are allowed"),
    "huge seed": (terms_bytes(seed=10**4000), "expected seed from 0"),
    "NaN": (terms_bytes(learning_rate=float("nan")), "expected learning_rate from 0"),
    "infinity": (terms_bytes(clip=float("inf")), "expected clip from 0"),
    "no policy": (terms_bytes(policy="gone"), "policy"),
    "another policy": (terms_bytes(policy="odd"), "expected a policy of none, fixed"),
    "negative": (terms_bytes(steps=-1), "expected steps from 1"),
    "true": (terms_bytes(steps=True), "steps"),
    "parts that do not divide": (terms_bytes(batch=3), "micro_batches that divide batch"),
    "null": (terms_bytes(cut=None), "cut"),
    "no common state": (hello_bytes(durable=[]), "no common state: the client has steps"),
}


def answer_to(port: int, payload: bytes) -> str:
    """To a hello; asked again while the server is still busy with the end of the last one."""
    end, said = time.monotonic() + PATIENCE, BUSY
    while BUSY in said:
        assert time.monotonic() < end
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.settimeout(DEADLINE)
            sock.sendall(raw(Frame(Type.HELLO, payload), direction=TO_SERVER))
            said = read_frame(sock)[HEAD_BYTES:].decode("utf-8", "replace")
    return said


def test_odd_hellos_are_refused_by_name_and_the_server_lives(tmp_path: Path) -> None:
    terms = make_terms(steps=1)
    with Serving(tmp_path / "server", terms) as serving:
        for name, (payload, message) in ODD_HELLOS.items():
            said = answer_to(serving.port, payload)
            assert message in said, f"{name}: {said}"
            assert serving.thread.is_alive(), name
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
    assert serving.server.party is not None and serving.server.party.terms == terms


def server_hello(start: int, adapter: int) -> Frame:
    return Frame(Type.HELLO, json.dumps({"start": start, "adapter": adapter, "nonce": "0" * 32}).encode())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Frame(Type.HELLO, b"{}"), "the server's hello"),
        (server_hello(1, 1), "from step 1, which is none of"),
        (server_hello(0, -1), "expected adapter from 0"),
        (Frame(Type.HELLO, b'{"start": 0, "adapter": 9, "nonce": "\\ud800"}'), "is not JSON"),
        (server_hello(0, 2 * 10**9), "at most 1073741824"),
        (Frame(Type.BYE), "a frame of bye came where only hello, error may come"),
    ],
)  # fmt: skip
def test_odd_answers_end_a_client_by_name(tmp_path: Path, answer: Frame, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answering() -> None:
            sock, _ = listener.accept()
            sock.sendall(raw(answer))
            read_exactly(sock, 1 << 20)
            sock.close()

        thread = threading.Thread(target=answering, name="test-answer")
        thread.start()
        with pytest.raises(
            AmqError, match=f"^the server sent what it must not: .*{message}.*; nothing was trained yet$"
        ):
            make_client(tmp_path, make_terms()).train(reach(listener.getsockname()[1]))
        thread.join()
    assert ServerHello(start=0, adapter=0, nonce="0" * 32).start == 0


# Order, and what payloads hold, within a run.


def broken(
    tmp_path: Path, change: Callable[[Passing], Frame | None], at: Type, to_server: bool = True, **terms: Any
) -> str:
    """What ends a client whose first frame of a type in step 1 was exchanged for another; the run then goes on."""
    made = make_terms(**{"policy": "fixed", "micro_batches": 1, "steps": 2, "save_every": 1, **terms})
    done = threading.Event()

    def exchange(passing: Passing) -> bytes:
        here = passing.to_server == to_server and passing.type == at and passing.step >= 1
        if not here or done.is_set():
            return passing.data
        done.set()
        frame = change(passing)
        direction = TO_SERVER if to_server else TO_CLIENT
        return b"" if frame is None else raw(frame, direction=direction)

    with Serving(tmp_path / "server", made) as serving, Proxy(serving.port, exchange) as proxy:
        with pytest.raises(AmqError) as caught:
            make_client(tmp_path / "client", made).train(reach(proxy.port))
        assert serving.thread.is_alive()
        make_client(tmp_path / "client", made).train(reach(proxy.port))
        serving.join()
        assert serving.error is None
    left_of(tmp_path, 2)
    return str(caught.value)


def frame_of(passing: Passing, **changes: Any) -> Frame:
    frame = Frame(Type(passing.type), passing.data[HEAD_BYTES:], passing.step, passing.micro_batch, passing.cut)
    return replace(frame, **changes)


def with_value(passing: Passing, value: float) -> bytes:
    """The raw payload of a tensor with another last value."""
    return passing.data[HEAD_BYTES:-4] + struct.pack("<f", value)


KEPT = "; the state of step 1 is kept: go on with --resume"


@pytest.mark.parametrize(
    ("at", "changes", "message"),
    [
        (Type.LABELS, {"step": 0}, "expected labels of step 1, micro-batch 0, cut 0, got labels of step 0, micro-b"),
        (
            Type.LABELS,
            {"micro_batch": 7},
            "expected labels of step 1, micro-batch 0, cut 0, got labels of step 1, micro-b",
        ),
        (Type.LABELS, {"payload": bytes(6)}, "labels of step 1, micro-batch 0, cut 0 has 6 bytes, expected 64"),
        (Type.LABELS, {"payload": b"\xff\xff" * 32}, "cut 0: token 65535 is none of the model's 256"),
        (Type.LABELS, {"type": Type.BYE, "payload": b""}, "expected labels of step 1, .*, got bye of step 1"),
        (
            Type.LABELS,
            {"type": Type.WIDTHS, "payload": bytes(24)},
            "expected labels of step 1, .*, got widths of step 1",
        ),
        (Type.FORWARD, {"cut": 1}, "expected forward of step 1, micro-batch 0, cut 0, got .* cut 1"),
        (Type.FORWARD, {"cut": 255}, "expected forward of step 1, micro-batch 0, cut 0, got .* cut 255"),
        (Type.FORWARD, {"payload": b""}, "the payload ends after 0 bytes, 3 are needed"),
        (Type.FORWARD, {"type": Type.WIDTHS, "payload": bytes(9)}, "a table of 64 widths has 24 bytes, 9 came"),
        (Type.FORWARD, {"type": Type.WIDTHS, "payload": bytes(24), "step": 0}, "no table of widths is due here"),
        (Type.FORWARD, {"type": Type.WIDTHS, "payload": bytes(24), "cut": 1}, "no table of widths is due here"),
        (Type.FORWARD, {"payload": bytes(9000)}, "805 bytes follow the payload"),
        (Type.BYE, {"step": 1}, "expected bye of step 2, .*, got bye of step 1"),
    ],
)
def test_a_server_names_what_is_out_of_order(tmp_path: Path, at: Type, changes: dict[str, Any], message: str) -> None:
    said = broken(tmp_path, lambda passing: frame_of(passing, **changes), at)
    assert re.search(f"^the other party ended the connection: .*({message})", said), said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("at", "to_server", "start"),
    [
        (Type.FORWARD, True, "the other party ended the connection: "),
        (Type.BACKWARD, False, "the server sent what it must not: "),
    ],
)
def test_what_is_not_finite_is_refused(tmp_path: Path, at: Type, to_server: bool, start: str, value: float) -> None:
    said = broken(tmp_path, lambda p: frame_of(p, payload=with_value(p, value)), at, to_server, policy="none")
    assert said == f"{start}{at.name.lower()} of step 1, micro-batch 0, cut 0 holds NaN or infinity{KEPT}"


@pytest.mark.parametrize(
    ("at", "changes", "message"),
    [
        (Type.LOSS, {"step": 0}, "expected loss of step 1, .*, got loss of step 0"),
        (Type.LOSS, {"payload": bytes(8)}, "loss of step 1, .* has 8 bytes, expected 32"),
        (Type.BACKWARD, {"micro_batch": 1}, "expected backward of step 1, micro-batch 0, .*, got .* micro-batch 1"),
        (
            Type.BACKWARD,
            {"type": Type.LOSS, "payload": bytes(32)},
            "expected backward of step 1, .*, got loss of step 1",
        ),
        (Type.ADAPTER, {"payload": b"no safetensors"}, "the server's half of the adapter is no safetensors file"),
        (Type.ADAPTER, {"step": 1}, "expected adapter of step 2"),
    ],
)
def test_a_client_names_what_is_out_of_order(tmp_path: Path, at: Type, changes: dict[str, Any], message: str) -> None:
    said = broken(tmp_path, lambda passing: frame_of(passing, **changes), at, to_server=False)
    assert re.search(f"^the server sent what it must not: .*({message}).*go on with --resume$", said), said


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    nan = struct.pack("<d3d", float("nan"), 0.0, 0.0, 0.0)
    said = broken(tmp_path, lambda passing: frame_of(passing, payload=nan), Type.LOSS, to_server=False)
    assert said.startswith("the loss of step 1 is nan: lower --learning-rate")


def test_halves_of_another_adapter_are_refused() -> None:
    from safetensors.torch import save

    server, client = part_of(TERMS, client=False), part_of(TERMS, client=True)
    data = half_of(server)
    assert len(data) <= most_bytes(server)
    half = read_half(data, client)
    (name, tensor), own = next(iter(half.items())), next(iter(client.trainable))
    assert torch.equal(tensor, server.trainable[name])
    odd: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "missing": ({n: t for n, t in half.items() if n != name}, f"{name} is missing"),
        "one more": ({**half, "zzz": tensor.clone()}, "zzz is not of it"),
        "the client's own": ({**half, own: tensor.clone()}, f"{own} is not of it"),
        "shape": ({**half, name: tensor.t().contiguous()}, f"{name} must be finite float32 {list(tensor.shape)}, got"),
        "dtype": ({**half, name: tensor.half()}, f"{name} must be finite float32"),
        "NaN": ({**half, name: tensor * float("nan")}, f"{name} must be finite float32"),
    }
    for tensors, message in odd.values():
        with pytest.raises(WireError, match=re.escape(f"the server's half of the adapter: {message}")):
            read_half(save(tensors), client)
    generator = random.Random(0)
    for _ in range(300):
        with contextlib.suppress(WireError):
            made = read_half(mutated(data, [data], generator), client)
            assert made.keys() == half.keys() and all(bool(t.isfinite().all()) for t in made.values())


# Mutations.


def mutated(data: bytes, others: list[bytes], generator: random.Random) -> bytes:
    """One to four of: a bit flipped, bytes overwritten, cut out, put in or repeated, the end cut off or another's."""
    made = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(made) + 1)
        size = generator.choice([1, 1, 2, 4, 8, 40])
        kind = generator.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            made[at : at + size] = generator.randbytes(min(size, len(made) - at))
        elif kind == 2:
            del made[at : at + size]
        elif kind == 3:
            made[at:at] = generator.randbytes(size)
        elif kind == 4:
            made[at:at] = made[at : at + size]
        elif kind == 5:
            del made[at:]
        else:
            other = generator.choice(others)
            made[at:] = other[generator.randrange(len(other) + 1) :]
    return bytes(made)


def test_ten_thousand_mutated_frames() -> None:
    """Each is read by a link with limits: what comes out of it is a frame that was sent, or a named end."""
    generator = random.Random(0)
    sent = [
        Frame(Type.BACKWARD, generator.randbytes(50), 3, 1), Frame(Type.WIDTHS, generator.randbytes(24), 3),
        Frame(Type.LOSS, generator.randbytes(32), 3), Frame(Type.ACK), Frame(Type.BYE, step=4),
        Frame(Type.ADAPTER, generator.randbytes(300), 4), Frame(Type.ERROR, b"a reason"), Frame(Type.BACKWARD, b"", 4),
    ]  # fmt: skip
    frames, ends = [raw(frame) for frame in sent], {"WireError": 0, "LinkLost": 0, "none": 0}
    for _ in range(10_000):
        data = mutated(generator.choice(frames), frames, generator)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            link = Link(ours, client=True, deadline=DEADLINE)
            link._limits = LIMITS
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            try:
                frame = link.receive_now(DEADLINE)
            except (WireError, LinkLost) as error:
                ends[type(error).__name__] += 1
                assert str(error)
            else:
                ends["none"] += 1
                assert frame in sent
    assert all(count > 100 for count in ends.values()), ends


@pytest.mark.parametrize("policy", ["none", "fixed", "aq-sgd", "amaq", "step"])
@pytest.mark.parametrize("coder", ["none", "range"])
def test_mutated_payloads_give_finite_tensors_or_a_named_error(policy: str, coder: str) -> None:
    """Their check is right, as a malicious peer's is."""
    if (policy, coder) == ("none", "range"):
        coder = "none"
    terms, generator = make_terms(policy=policy, coder=coder, range_tokens=8), random.Random(policy + coder)
    x = torch.randn(terms.windows, terms.window_length, HIDDEN, generator=torch.Generator().manual_seed(0))
    sender, samples = Stream(terms, HIDDEN, 0, forward=True, sender=True), list(range(terms.windows))
    sender.begin(0)
    frames = [f for turn in range(2) for f in sender.frames(x + turn, 0, turn, samples)]
    refused = 0
    for _ in range(300):
        reader = Stream(terms, HIDDEN, 0, forward=True, sender=False)
        try:
            for frame in frames:
                changed = generator.random() < 0.6
                payload = mutated(frame.payload, [f.payload for f in frames], generator) if changed else frame.payload
                came = replace(frame, payload=payload)
                if frame.type is Type.WIDTHS:
                    reader.take_widths(came)
                else:
                    tensor = reader.tensor(came, samples)
                    assert tensor.shape == (HIDDEN, terms.tokens) and bool(tensor.isfinite().all())
        except WireError as error:
            refused += 1
            assert f"of step 0, micro-batch {frame.micro_batch}, cut 0" in str(error)
    assert refused > 50


def test_tables_are_three_bits_a_channel() -> None:
    reader = Stream(TERMS, HIDDEN, 0, forward=True, sender=False)
    with pytest.raises(WireError, match="a quantized tensor came before the widths of its channels"):
        payload = quantizer.pack(quantizer.ranged(torch.ones(HIDDEN, 16), torch.full((HIDDEN,), 4), 16), False)
        reader.tensor(Frame(Type.FORWARD, payload), [0])
    reader.take_widths(Frame(Type.WIDTHS, bytes(TABLE.row_bytes(HIDDEN))))
    assert reader.widths is not None and reader.widths.tolist() == [1] * HIDDEN
    assert HEAD.size + CHECK_BYTES == HEAD_BYTES


# Settings.

TRAIN: dict[str, Any] = {"model": "m", "server": "127.0.0.1:7000"}


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (ServeSettings, {"model": "m", "host": "0.0.0.0"}, "--host 0.0.0.0 lets other machines in, which needs --key"),
        (ServeSettings, {"model": "m", "host": "::"}, "--host :: lets other machines in, which needs --key"),
        (TrainSettings, {**TRAIN, "batch": 3}, "--batch 3 windows do not divide into --micro-batches 2"),
        (TrainSettings, {**TRAIN, "policy": "none", "coder": "range"}, "--coder codes quantized values: --policy none"),
        (TrainSettings, {**TRAIN, "half": True}, "--half is of --policy none; --policy waterfill quantizes"),
        (TrainSettings, {**TRAIN, "target_bits": 0.5}, "--target-bits must be 1 or more, got 0.5"),
        (TrainSettings, {**TRAIN, "deadline": "soon"}, "'soon' is not a time such as 10min or 90s"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(AmqError, match=re.escape(message)):
        kind(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"server": "10.0.0.2:7000"},
            "--server 10.0.0.2:7000 is another machine, which needs --key FILE: a secret that",
        ),
        ({"server": "example.org:7000"}, "--server example.org:7000 is another machine, which needs --key FILE"),
        ({"server": "7000"}, "--server '7000' is not HOST:PORT, such as 127.0.0.1:7000"),
        ({"server": "127.0.0.1:0"}, "--server '127.0.0.1:0' is not HOST:PORT"),
        ({"server": "127.0.0.1:70000"}, "--server '127.0.0.1:70000' is not HOST:PORT"),
        ({"link": "fast"}, "--link 'fast' is not a rate and a latency such as 20mbit,30ms"),
        ({"deadline": "0s"}, "--deadline 0s: expected 1 s to 24 h"),
        ({"deadline": "3000h"}, "--deadline 3000h: expected 1 s to 24 h"),
    ],
)
def test_a_client_is_refused_before_a_model_is_loaded(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = TrainSettings(**{**TRAIN, "model": str(tmp_path / "none"), "output": str(tmp_path / "run"), **changes})
    with pytest.raises(AmqError, match=re.escape(message)):
        run_train(settings, Said())


def test_addresses() -> None:
    assert address("127.0.0.1:7000") == ("127.0.0.1", 7000) and address("[::1]:80") == ("::1", 80)
    assert deadline_of(ServeSettings(model="m", deadline="2min")) == 120.0


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = ServeSettings(model="m", port=port, output=str(tmp_path / "run"))
        with pytest.raises(
            AmqError, match=f"^cannot listen at --host 127.0.0.1 --port {port}: Address already in use$"
        ):
            run_serve(settings, Said())


ACTIONS = {"serve": ServeSettings, "train": TrainSettings, "eval": SplitEvalSettings, "report": SplitReportSettings}


@pytest.mark.parametrize("action", ACTIONS)
def test_help_of_each_action_loads_nothing_heavy_and_its_examples_parse(action: str) -> None:
    code = (
        "import sys; from amq.cli import main\n"
        f"try: main(['split', {action!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kind = ACTIONS[action]
    assert result.stdout.startswith(f"usage: amq split {action}") and len(kind.EXAMPLES) == 2
    assert result.stdout.endswith("examples:\n" + "".join(f"  {line}\n" for line in kind.EXAMPLES))
    for line in kind.EXAMPLES:
        words = shlex.split(line)
        assert words[:3] == ["amq", "split", action]
        kind(**parse_command(words[3:], kind))


# The commands.


def test_the_commands_make_a_run(tmp_path: Path, make_folder: Callable[..., Path], cache: Path) -> None:
    """`serve` in a thread and `train` over a text of one's own, with a key; a second run over the first is refused."""
    folder, text, key = make_folder(make_model()), tmp_path / "text.txt", tmp_path / "key"
    text.write_text("".join(f"line {number} of a text\n" for number in range(200)))
    key.write_text("a secret of more than sixteen characters")
    said = Said()
    serve = ServeSettings(model=str(folder), port=0, lora=2, key=str(key), output=str(tmp_path / "server"))
    serving = threading.Thread(target=run_serve, args=(serve, said), name="test-serve")
    serving.start()
    end = time.monotonic() + PATIENCE
    while not said.lines:
        assert time.monotonic() < end and serving.is_alive()
        time.sleep(0.01)
    match = re.fullmatch(rf"{folder} behind block 0, at 127\.0\.0\.1:(\d+), with a key", said.lines[0])
    assert match
    train = TrainSettings(
        model=str(folder), server=f"127.0.0.1:{match[1]}", key=str(key), lora=2, text=str(text), window_length=32,
        steps=4, batch=2, save_every=2, output=str(tmp_path / "client"),
    )  # fmt: skip
    assert run_train(train, Said()) == tmp_path / "client" / "adapter"
    serving.join(PATIENCE)
    assert not serving.is_alive()
    assert (
        said.lines[-1] == f"finished: the adapter is with the client, this party's states are in {tmp_path / 'server'}"
    )
    left = left_of(tmp_path)
    assert len(set(left.losses)) == 4
    with pytest.raises(AmqError, match="has the states of an earlier run: add --resume, or give another --output"):
        run_train(train, Said())
    with pytest.raises(AmqError, match="has the states of an earlier run: add --resume, or give another --output"):
        run_serve(serve, Said())
    with pytest.raises(AmqError, match="learning_rate differs: that of the run in .* is 0.0002, the other party's 0.1"):
        run_train(replace(train, resume=True, learning_rate=0.1), Said())
