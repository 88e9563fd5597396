"""Two parties of a split run: equal to one process, and equal to themselves whatever ends their connections.

What two runs are compared by is `Left`: losses, bits, tables of widths, adapter and both parties' last states, byte for
byte. Cuts are made by a proxy, at every frame of a run; kills are of processes, at frames drawn from a seed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import split_parties as parties
from helpers.split_parties import (
    Cut,
    CutAtEach,
    Left,
    Passing,
    Proxy,
    Said,
    Serving,
    alone,
    left_of,
    make_client,
    make_terms,
    reach,
    run_whole,
)
from helpers.tiny_models import HIDDEN
from torch import Tensor

import amq.split.client as client_module
from amq.errors import AmqError
from amq.split import hello
from amq.split.hello import ClientHello
from amq.split.link import Link
from amq.split.records import ADAPTER, RUN, STEPS, PartySeconds, SplitRun, StepRecord, read_lines
from amq.split.settings import POLICIES
from amq.split.state import States
from amq.split.terms import Terms
from amq.split.wire import BUSY, LinkLost, NotFinite, PeerError, Type, secret

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

KEY = secret(b"sixteen characters and more", "a test")


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tries again at once; and no thread of a link or a door is left when a test ends."""
    monkeypatch.setattr(client_module, "RETRY_SECONDS", 0.02)
    yield
    end = time.monotonic() + parties.PATIENCE
    while left := [t.name for t in threading.enumerate() if t.name.startswith(("amq-split", "test-"))]:
        assert time.monotonic() < end, f"these threads go on: {left}"
        time.sleep(0.01)


# What a run gives.


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("labels", ["server", "client"])
def test_two_parties_give_the_losses_of_one_process(tmp_path: Path, labels: str, micro_batches: int) -> None:
    terms = make_terms(labels=labels, batch=6, samples=8, micro_batches=micro_batches)
    left = run_whole(tmp_path, terms)
    assert left.losses == pytest.approx(alone(terms), rel=1e-6)
    assert len(set(left.losses)) == len(left.losses) and left.bits == [(32.0, 32.0)] * terms.steps


def test_a_run_gives_the_same_again_and_another_seed_does_not(tmp_path: Path) -> None:
    terms = make_terms(policy="waterfill", coder="range")
    left = run_whole(tmp_path / "a", terms)
    assert run_whole(tmp_path / "b", terms) == left
    assert run_whole(tmp_path / "c", replace(terms, seed=1)).losses != left.losses


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize(("policy", "coder"), [("none", "none"), ("amaq", "none"), ("waterfill", "range")])
def test_bytes_are_those_on_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str, policy: str, coder: str
) -> None:
    """As a proxy counts them, in all and by type; only signs of life may come after the client has gone."""
    links: list[Link] = []
    real = Link

    def kept(*arguments: Any, **named: Any) -> Link:
        links.append(real(*arguments, **named))
        return links[-1]

    monkeypatch.setattr(client_module, "Link", kept)
    terms = make_terms(policy=policy, coder=coder, labels=labels)
    with Serving(tmp_path / "server", terms) as serving, Proxy(serving.port) as proxy:
        make_client(tmp_path / "client", terms).train(reach(proxy.port))
        serving.join()
        assert serving.server.party is not None and serving.server.party.link is not None
        ends = {False: links[0], True: serving.server.party.link}
    run = SplitRun.read(tmp_path / "client" / RUN)
    assert len(links) == 1 and run.sent == links[0].sent.total and run.status == "finished"
    assert run.sent == proxy.bytes[True] and run.received == links[0].received.total
    for server, link in ends.items():
        for sent, traffic in ((True, link.sent), (False, link.received)):
            assert sum(traffic.by_type.values()) == traffic.total
            for type in set(Type) - {Type.ACK}:
                assert traffic.by_type[type] == proxy.by_type[sent != server, type], (server, sent, type)
            quiet = proxy.bytes[sent != server] - proxy.by_type[sent != server, Type.ACK]
            assert traffic.total - traffic.by_type[Type.ACK] == quiet
    records = read_lines(tmp_path / "client" / STEPS, StepRecord)
    tensors = (Type.FORWARD, Type.BACKWARD, Type.WIDTHS, Type.LABELS)
    for field, to_server in (("forward_bytes", True), ("backward_bytes", False)):
        assert sum(getattr(r, field) for r in records) == sum(proxy.by_type[to_server, type] for type in tensors)


# A connection that ends, at every frame.

EVERYTHING = os.environ.get("AMQ_SWEEPS") == "all"
ALL = [
    (p, c, at)
    for p in POLICIES
    for c in ("none", "range")
    for at in ("server", "client")
    if (p, c) != ("none", "range")
]
SWEEP = [one for one in ALL if EVERYTHING or one[0] == "none" or (one[1] == "range") == (one[2] == "client")]
"""Every policy with either coder and either place of labels; with AMQ_SWEEPS=all, every combination."""


@pytest.mark.parametrize(("policy", "coder", "labels"), SWEEP)
def test_a_cut_at_every_frame_changes_nothing(tmp_path: Path, policy: str, coder: str, labels: str) -> None:
    """One sample, seen in every step: aq-sgd sends differences from the second on."""
    terms = make_terms(policy=policy, coder=coder, labels=labels, batch=1, micro_batches=1, samples=1, steps=3)
    whole = run_whole(tmp_path / "whole", terms)
    cut = CutAtEach(terms, first=SWEEP.index((policy, coder, labels)))
    assert run_whole(tmp_path / "cut", terms, cut) == whole
    types = {type for _, type, *_ in cut.seen}
    least = {Type.HELLO, Type.FORWARD, Type.BACKWARD, Type.LOSS, Type.ADAPTER, Type.BYE}
    assert types >= least | ({Type.LABELS} if labels == "server" else set())
    assert (Type.WIDTHS in types) == (policy not in ("none", "step"))
    cuts = 2 if labels == "client" else 1
    assert sum(type == Type.FORWARD for _, type, *_ in cut.seen) == terms.steps * cuts


def test_a_cut_at_every_frame_of_two_parts_in_flight_changes_nothing(tmp_path: Path) -> None:
    terms = make_terms(policy="amaq", coder="range", labels="client")
    whole = run_whole(tmp_path / "whole", terms)
    cut = CutAtEach(terms)
    assert run_whole(tmp_path / "cut", terms, cut) == whole and len(cut.seen) > 10 * terms.steps


def cut_at(step: int, type: Type, micro_batch: int = 0) -> Callable[[Passing], bytes]:
    """Ends the first connection before this frame."""

    def change(passing: Passing) -> bytes:
        if (passing.connection, passing.step, passing.type) == (0, step, type) and passing.micro_batch == micro_batch:
            raise Cut
        return passing.data

    return change


# Parties that are started again.


@pytest.mark.parametrize("restarted", ["client", "server", "both"])
def test_a_party_that_gave_up_goes_on(tmp_path: Path, restarted: str) -> None:
    terms = make_terms(policy="waterfill", coder="range")
    whole = run_whole(tmp_path / "whole", terms)
    patience = {"client": 0.0 if restarted != "server" else parties.PATIENCE,
                "server": 0.0 if restarted != "client" else parties.PATIENCE}  # fmt: skip
    errors: list[str] = []

    def train(port: int, reconnect: float) -> None:
        try:
            make_client(tmp_path / "client", terms).train(reach(port, reconnect=reconnect))
        except AmqError as error:
            errors.append(str(error))

    with Proxy(0, cut_at(3, Type.LABELS, 1)) as proxy:
        with Serving(tmp_path / "server", terms, reconnect=patience["server"]) as serving:
            proxy.target = serving.port
            thread = threading.Thread(target=train, args=(proxy.port, patience["client"]), name="test-client")
            thread.start()
            if restarted == "client":
                thread.join()
                train(proxy.port, parties.PATIENCE)
            serving.join()
        if restarted != "client":
            assert str(serving.error) == (
                "the client did not come back within 0 s; the state of step 2 is kept: go on with --resume"
            )
            with Serving(tmp_path / "server", terms) as serving:
                proxy.target = serving.port
                if restarted == "both":
                    thread.join()
                    train(proxy.port, parties.PATIENCE)
                serving.join()
        thread.join()
    assert serving.error is None and left_of(tmp_path) == whole
    gone = "the other party is gone ("
    assert len(errors) == (restarted != "server") and all(
        error.startswith(gone) and error.endswith("the state of step 2 is kept: go on with --resume")
        for error in errors
    )


def test_who_gave_up_left_a_run_that_says_so(tmp_path: Path) -> None:
    terms = make_terms()
    with (
        Serving(tmp_path / "server", terms) as serving,
        Proxy(serving.port, cut_at(1, Type.LABELS)) as proxy,
        pytest.raises(AmqError, match=r"the other party is gone .*; nothing was trained yet$"),
    ):
        make_client(tmp_path / "client", terms).train(reach(proxy.port, reconnect=0.0))
    run = SplitRun.read(tmp_path / "client" / RUN)
    assert run.status == "interrupted" and run.sent > 0


def test_no_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        AmqError, match=rf"^no server at 127.0.0.1:{port} \(Connection refused\); nothing was trained yet$"
    ):
        make_client(tmp_path, make_terms()).train(reach(port, reconnect=0.0))


def test_a_server_that_lost_its_states(tmp_path: Path) -> None:
    terms = make_terms(steps=8)
    with (
        Serving(tmp_path / "server", terms) as serving,
        Proxy(serving.port, cut_at(7, Type.BACKWARD)) as proxy,
        pytest.raises(AmqError, match="the state of step 6 is kept"),
    ):
        make_client(tmp_path / "client", terms).train(reach(proxy.port, reconnect=0.0))
    shutil.move(tmp_path / "server", tmp_path / "elsewhere")
    expected = (
        r"the server refuses: no common state: the client has steps \[2, 4, 6\], the server \[0\]; start both anew"
    )
    with Serving(tmp_path / "server", terms) as serving:
        with pytest.raises(AmqError, match=expected):
            make_client(tmp_path / "client", terms).train(reach(serving.port))
        assert serving.thread.is_alive()
    shutil.move(tmp_path / "elsewhere" / "state", tmp_path / "server" / "state")
    with Serving(tmp_path / "server", terms) as serving:
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
    assert left_of(tmp_path, 8) == run_whole(tmp_path / "whole", terms)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    terms = make_terms()
    run_whole(tmp_path, terms)
    path = States(tmp_path / "server").path(4)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with Serving(tmp_path / "server", terms) as serving:
        with pytest.raises(AmqError, match=rf"the other party ended the connection: {path}"):
            make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
    assert str(serving.error).startswith(f"{path}")


def test_steps_of_an_earlier_start_are_not_counted(tmp_path: Path) -> None:
    """A run that ended before its first state is begun anew without --resume: its bytes are not this run's."""
    terms = make_terms()
    with (
        Serving(tmp_path / "a", terms) as serving,
        Proxy(serving.port, cut_at(1, Type.LABELS)) as proxy,
        pytest.raises(AmqError),
    ):
        make_client(tmp_path / "client", terms).train(reach(proxy.port, reconnect=0.0))
    assert len(read_lines(tmp_path / "client" / STEPS, StepRecord)) == 1
    States(tmp_path / "client").check_new(resume=False)
    with Serving(tmp_path / "server", terms) as serving, Proxy(serving.port) as proxy:
        make_client(tmp_path / "client", terms).train(reach(proxy.port))
        serving.join()
    assert SplitRun.read(tmp_path / "client" / RUN).sent == proxy.bytes[True]


def test_bytes_of_all_connections_are_counted(tmp_path: Path) -> None:
    """Those after an interrupted process's last step, too. The server would wait for three centuries."""
    terms = make_terms(micro_batches=1)

    def change(passing: Passing) -> bytes:
        if (passing.connection, passing.step, passing.type) == (0, 3, Type.FORWARD):
            raise Cut(passing.data)
        return passing.data

    with Serving(tmp_path / "server", terms, reconnect=1e10) as serving, Proxy(serving.port, change) as proxy:
        with pytest.raises(AmqError, match="the state of step 2 is kept"):
            make_client(tmp_path / "client", terms).train(reach(proxy.port, reconnect=0.0))
        said = Said()
        make_client(tmp_path / "client", terms, said).train(reach(proxy.port))
        serving.join()
        assert said.stages == [("split", terms.steps - 2)]  # what is left of it
        run = SplitRun.read(tmp_path / "client" / RUN)
        assert (run.sent, run.received) == (proxy.bytes[True], proxy.bytes[False]) and proxy.connections == 2


def test_seconds_of_a_lost_step_are_not_the_nexts(tmp_path: Path) -> None:
    party = make_client(tmp_path / "client", make_terms()).party
    state = {name: tensor.clone() for name, tensor in party.state().items()}
    with party.clock("wait"):
        time.sleep(0.01)
    party.load(state)
    assert party.clock.take() == PartySeconds(compute=0.0, encode=0.0, wait=0.0)


def test_an_adapter_that_cannot_be_written_is_fetched_again(tmp_path: Path) -> None:
    terms = make_terms()
    adapter = tmp_path / "client" / ADAPTER
    with Serving(tmp_path / "server", terms) as serving:
        client = make_client(tmp_path / "client", terms)
        adapter.write_text("in the way")
        with pytest.raises(AmqError, match="adapter is a file: expected a folder"):
            client.train(reach(serving.port))
        assert SplitRun.read(tmp_path / "client" / RUN).status == "interrupted"
        adapter.unlink()
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
        assert any("the client stopped: " in line and "is a file" in line for line in serving.progress.lines)
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


# Processes that are killed and stopped.


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


@pytest.mark.parametrize("victim", ["client", "server", "both"])
def test_kill_9_at_a_frame_changes_nothing(tmp_path: Path, victim: str) -> None:
    """At two frames of one run, drawn from a seed."""
    terms = make_terms(policy="amaq", coder="range", steps=6)
    whole = run_whole(tmp_path / "whole", terms)
    places = random.Random(victim).sample(range(8, 40), 2)
    points = {index: threading.Event() for index in sorted(places)}
    counted, lock = [0], threading.Lock()
    alive: dict[str, BaseProcess] = {}

    def change(passing: Passing) -> bytes:
        with lock:
            counted[0] += passing.type != Type.ACK
            event = points.get(counted[0])
            if event is not None and not event.is_set():
                for name in ("client", "server"):
                    if victim in (name, "both"):
                        kill(alive[name])
                event.set()
                raise Cut(passing.data[: len(passing.data) // 2])
        return passing.data

    said = json.dumps(terms.json())
    with Proxy(0, change) as proxy, contextlib.ExitStack() as stack:

        def start(name: str) -> Any:
            target, more = (parties.serve_process, ()) if name == "server" else (parties.train_process, (proxy.port,))
            arguments = str(tmp_path / name), said, *more
            alive[name], pipe = stack.enter_context(parties.started(target, *arguments))
            if name == "server":
                proxy.target = pipe.recv()
            return pipe

        pipes = {name: start(name) for name in ("server", "client")}
        for event in points.values():
            assert event.wait(parties.PATIENCE), "the frame never came"
            for name in ("server", "client"):
                if victim in (name, "both"):
                    pipes[name] = start(name)
        for name in ("client", "server"):
            assert pipes[name].poll(parties.PATIENCE) and pipes[name].recv() == "", name
    assert left_of(tmp_path, 6) == whole


class Watch(Said):
    """Calls `act` at the first line with a text."""

    def __init__(self, text: str, act: Callable[[], None]) -> None:
        super().__init__()
        self._text, self._act = text, act

    def say(self, text: str) -> None:
        super().say(text)
        if self._text in text and sum(self._text in line for line in self.lines) == 1:
            self._act()


def test_a_stopped_server_is_missed_and_goes_on(tmp_path: Path) -> None:
    """SIGSTOP: the kernel holds the connection open, and nothing comes."""
    terms = make_terms(policy="waterfill", steps=6)
    whole = run_whole(tmp_path / "whole", terms)
    arguments = str(tmp_path / "server"), json.dumps(terms.json())
    with parties.started(parties.serve_process, *arguments) as (server, pipe):
        pid = server.pid
        assert pid is not None

        def change(passing: Passing) -> bytes:
            if (passing.connection, passing.step, passing.type) == (0, 3, Type.FORWARD):
                os.kill(pid, signal.SIGSTOP)
            return passing.data

        watch = Watch("has been silent for 2 s", lambda: os.kill(pid, signal.SIGCONT))
        with Proxy(pipe.recv(), change) as proxy:
            client = make_client(tmp_path / "client", terms, watch)
            client.train(reach(proxy.port, deadline=2.0))
        assert pipe.poll(parties.PATIENCE) and pipe.recv() == ""
    assert "the other party has been silent for 2 s; the state of step 2 is in" in watch.lines[0]
    assert left_of(tmp_path, 6) == whole


# Silence, and signs of life.


def test_a_silent_party_is_named_within_the_deadline(tmp_path: Path) -> None:
    """A network that carries nothing any more, in either direction, and says nothing of it."""
    terms = make_terms()

    def change(passing: Passing) -> bytes:
        if passing.step == 3:
            proxy.silent.set()
        return passing.data

    with (
        Serving(tmp_path / "server", terms, deadline=1.5, reconnect=0.0) as serving,
        Proxy(serving.port, change) as proxy,
    ):
        start = time.monotonic()
        expected = "the other party has been silent for 1.5 s; the state of step 2 is kept: go on with --resume"
        with pytest.raises(AmqError, match=f"^{expected}$"):
            make_client(tmp_path / "client", terms).train(reach(proxy.port, deadline=1.5, reconnect=0.0))
        serving.join()
        assert time.monotonic() - start < parties.PATIENCE
        assert "the other party has been silent for 1.5 s" in serving.progress.lines
    with Serving(tmp_path / "server", terms) as serving:
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


@pytest.mark.parametrize("slow", ["client", "server"])
def test_a_slow_party_is_not_lost(tmp_path: Path, slow: str) -> None:
    """It computes for more than twice the deadline, and its link gives signs of life."""
    terms, deadline = make_terms(steps=2), 2.5
    serving = Serving(tmp_path / "server", terms, deadline=deadline, make_part=lambda t: sleepy(t, False, slow))
    with serving, Proxy(serving.port) as proxy:
        client = make_client(tmp_path / "client", terms)
        client.party.part = sleepy(terms, True, slow, client.party.part)
        client.train(reach(proxy.port, deadline=deadline))
        serving.join()
        assert proxy.connections == 1 and serving.error is None
        assert proxy.by_type[slow == "client", Type.ACK] > 0


def sleepy(terms: Terms, client: bool, slow: str, part: Any = None) -> Any:
    part = part or parties.part_of(terms, client)
    name = "embedded" if client else "continued"
    compute, slept = getattr(part, name), []

    def slowly(x: Tensor) -> Tensor:
        if slow == ("client" if client else "server") and not slept:
            slept.append(True)
            time.sleep(5.5)
        return compute(x)  # type: ignore[no-any-return]

    setattr(part, name, slowly)
    return part


# Who is served.


def greet(port: int, terms: Terms, durable: tuple[int, ...] = (0,), channels: int = HIDDEN, key: bytes = b"") -> Link:
    """A connection on which a client has said hello."""
    link = Link(socket.create_connection(("127.0.0.1", port)), client=True, key=key, deadline=parties.DEADLINE)
    hello.send_hello(link, ClientHello(terms=terms, durable=durable, channels=channels, nonce=hello.nonce()))
    return link


def refusal(port: int, terms: Terms, *, busy: bool = False, **named: Any) -> str:
    """What a server says to a hello. busy: that it serves another is the answer, and not the end of the last one's."""
    end = time.monotonic() + parties.PATIENCE
    while True:
        link = greet(port, terms, **named)
        try:
            with pytest.raises(PeerError) as caught:
                hello.read_server(link, parties.DEADLINE)
        finally:
            link.close()
        said = str(caught.value)
        if busy or BUSY not in said:
            return said
        assert time.monotonic() < end


def test_a_second_client_is_told_so_and_the_first_undisturbed(tmp_path: Path) -> None:
    terms = make_terms(policy="waterfill")
    whole = run_whole(tmp_path / "whole", terms)
    reached, go_on = threading.Event(), threading.Event()

    def change(passing: Passing) -> bytes:
        if (passing.step, passing.type) == (3, Type.BACKWARD):
            reached.set()
            assert go_on.wait(parties.PATIENCE)
        return passing.data

    with Serving(tmp_path / "server", terms) as serving, Proxy(serving.port, change) as proxy:
        client = make_client(tmp_path / "client", terms)
        first = threading.Thread(target=client.train, args=(reach(proxy.port),), name="test-client")
        first.start()
        assert reached.wait(parties.PATIENCE)
        assert refusal(serving.port, terms, busy=True) == f"the server refuses: {BUSY}"
        with pytest.raises(AmqError, match=f"^the server refuses: {BUSY}; nothing was trained yet$"):
            make_client(tmp_path / "second", terms).train(reach(serving.port))
        go_on.set()
        first.join()
        serving.join()
        assert proxy.connections == 1
    assert left_of(tmp_path) == whole


def test_a_client_that_goes_on_waits_for_its_own_last_connection_to_end(tmp_path: Path) -> None:
    """Killed and started again at once, it may find that the server has not yet noticed."""
    terms = make_terms()
    cut = cut_at(3, Type.LABELS)
    with Serving(tmp_path / "server", terms) as serving:
        with Proxy(serving.port, cut) as proxy, pytest.raises(AmqError, match="step 2 is kept"):
            make_client(tmp_path / "client", terms).train(reach(proxy.port, reconnect=0.0))
        end = time.monotonic() + parties.PATIENCE
        while not serving.progress.lines[-1].endswith("for the client"):
            assert time.monotonic() < end
            time.sleep(0.01)
        other = greet(serving.port, terms, durable=(0, 2))
        hello.read_server(other, parties.DEADLINE)  # served, and silent
        watch = Watch(BUSY, other.close)
        make_client(tmp_path / "client", terms, watch).train(reach(serving.port))
        serving.join()
        assert len(watch.lines) == 1
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


OTHER: dict[str, Any] = {
    "version": "0.0", "dtype": "bfloat16", "model": "another", "cut": 2, "lora": 4, "lora_alpha": 2.0, "policy": "step",
    "coder": "range", "seed": 7, "text": "another", "window_length": 8, "samples": 6, "batch": 4, "micro_batches": 1,
    "steps": 9, "learning_rate": 0.5, "clip": 2.0, "save_every": 3, "labels": "client", "half": True,
    "target_bits": 2.0, "start_bits": 5.0, "backward_bits": 4.0, "beta": 0.0, "range_tokens": 8, "unscored": 1,
}  # fmt: skip


def test_whatever_differs_is_named_and_the_right_client_served(tmp_path: Path) -> None:
    """First by what the server's own settings say, then by the run that it has begun."""
    terms = make_terms(policy="fixed")
    assert set(OTHER) == set(terms.json())
    own = {name: getattr(terms, name) for name in (*parties.OWN, "policy", "seed")}
    with Serving(tmp_path / "server", terms, own=own) as serving:
        for name in own:
            said = refusal(serving.port, replace(terms, **{name: OTHER[name]}))
            assert said.startswith(f"the server refuses: {name} differs: this server's is {own[name]!r}, the other")
        assert refusal(serving.port, terms, channels=32).startswith("the server refuses: channels differ")
        with Proxy(serving.port, cut_at(3, Type.LABELS)) as proxy, pytest.raises(AmqError, match="step 2 is kept"):
            make_client(tmp_path / "client", terms).train(reach(proxy.port, reconnect=0.0))
        for name in set(OTHER) - set(own):
            said = refusal(serving.port, replace(terms, **{name: OTHER[name]}))
            assert f"the server refuses: {name} differs: that of the run in {tmp_path / 'server'} is" in said
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)
    with pytest.raises(AmqError, match="text differs: that of the run in .* is 'random', the other party's 'another'"):
        States(tmp_path / "client").check(replace(terms, text="another"))
    with pytest.raises(AmqError, match=r"has the states of an earlier run: add --resume, or give another --output"):
        States(tmp_path / "client").check_new(resume=False)


def test_slow_and_half_open_hellos_do_not_keep_a_client_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than may greet at a time: the client comes in when their time is over."""
    monkeypatch.setattr(hello, "HELLO_SECONDS", 1.0)
    terms, stop = make_terms(steps=1), threading.Event()
    with Serving(tmp_path / "server", terms) as serving:
        idle = [socket.create_connection(("127.0.0.1", serving.port)) for _ in range(12)]

        def trickle() -> None:
            while not stop.wait(0.05):
                try:
                    idle[0].sendall(b"A")
                except OSError:
                    return

        thread = threading.Thread(target=trickle, name="test-trickle")
        thread.start()
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
        stop.set()
        thread.join()
        for sock in idle:
            sock.settimeout(parties.DEADLINE)
            said = parties.read_exactly(sock, 1 << 16)
            assert not said or b"did not say hello in time" in said
            sock.close()


def test_a_thousand_connections_leave_nothing(tmp_path: Path) -> None:
    terms = make_terms(steps=1)
    with Serving(tmp_path / "server", terms) as serving:
        before = len(os.listdir("/dev/fd"))
        for turn in range(1000):
            sock = socket.create_connection(("127.0.0.1", serving.port))
            if turn % 3 == 1:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 2)
            sock.close()
        end = time.monotonic() + parties.PATIENCE
        while any(t.name == "amq-split-hello" for t in threading.enumerate()) or len(os.listdir("/dev/fd")) > before:
            assert time.monotonic() < end
            time.sleep(0.01)
        for _ in range(20):
            greet(serving.port, terms).close()  # says hello and is gone, served or not
        end = time.monotonic() + parties.PATIENCE
        while True:
            try:
                make_client(tmp_path / "client", terms).train(reach(serving.port))
                break
            except AmqError as error:
                assert BUSY in str(error) and time.monotonic() < end
        serving.join()
        assert serving.error is None


def test_a_door_goes_on_when_the_system_would_not(tmp_path: Path) -> None:
    """Too many open files for a moment, which `accept` raises."""
    terms = make_terms(steps=1)
    serving = Serving(tmp_path / "server", terms)
    serving.door.close()

    class Failing:
        def __init__(self, real: socket.socket) -> None:
            self.real, self.failed = real, 0

        def accept(self) -> Any:
            if self.failed < 2:
                self.failed += 1
                raise OSError(24, "Too many open files")
            return self.real.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

    failing: Any = Failing(socket.create_server(("127.0.0.1", 0)))
    serving.door = type(serving.door)(failing, b"", parties.DEADLINE)
    with serving:
        make_client(tmp_path / "client", terms).train(reach(failing.getsockname()[1]))
        serving.join()
    assert failing.failed == 2 and serving.error is None


# What ends a party from within.


def test_an_interrupted_client_says_so(tmp_path: Path) -> None:
    terms = make_terms()
    with Serving(tmp_path / "server", terms) as serving:
        client = make_client(tmp_path / "client", terms)
        interrupt(client.party.part, "embedded", at=7)
        with pytest.raises(KeyboardInterrupt):
            client.train(reach(serving.port))
        assert SplitRun.read(tmp_path / "client" / RUN).status == "interrupted"
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
        said = "the other party ended the connection: the client stopped: KeyboardInterrupt"
        assert said in serving.progress.lines
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


def interrupt(part: Any, name: str, at: int) -> None:
    compute, count = getattr(part, name), iter(range(at))

    def limited(x: Tensor) -> Tensor:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return compute(x)  # type: ignore[no-any-return]

    setattr(part, name, limited)


def test_an_interrupted_server_says_so(tmp_path: Path) -> None:
    terms = make_terms()

    def make(terms: Terms) -> Any:
        part = parties.part_of(terms, client=False)
        interrupt(part, "continued", at=7)
        return part

    with Serving(tmp_path / "server", terms, make_part=make) as serving:
        expected = "the other party ended the connection: the server stopped: KeyboardInterrupt; the state of step 2 is"
        with pytest.raises(AmqError, match=expected):
            make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
        assert isinstance(serving.error, KeyboardInterrupt)
        with pytest.raises(LinkLost, match="no server at"):
            reach(serving.port).connect()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("party", ["client", "server"])
def test_nothing_that_is_not_finite_is_sent(tmp_path: Path, party: str, value: float) -> None:
    """Whoever has it says so to both, the server lives, and the run can go on from its last state."""
    terms = make_terms(policy="amaq")

    def spoil(part: Any, name: str) -> Any:
        compute, calls = getattr(part, name), itertools.count()

        def spoiled(x: Tensor) -> Tensor:
            made: Tensor = compute(x)
            return made * value if next(calls) == 5 else made

        setattr(part, name, spoiled)
        return part

    def make(terms: Terms) -> Any:
        part = parties.part_of(terms, client=False)
        return spoil(part, "continued") if party == "server" else part

    with Serving(tmp_path / "server", terms, make_part=make) as serving:
        client = make_client(tmp_path / "client", terms)
        if party == "client":
            spoil(client.party.part, "embedded")
        with pytest.raises(
            AmqError, match=r"cut 0 in step 2 holds NaN or infinity in channel \d+: nothing was sent"
        ) as e:
            client.train(reach(serving.port))
        assert str(e.value).startswith("the other party ended the connection: ") == (party == "server")
        make_client(tmp_path / "client", terms).train(reach(serving.port))
        serving.join()
        assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


def test_a_gradient_that_is_not_finite_is_no_step(tmp_path: Path) -> None:
    client = make_client(tmp_path / "client", make_terms())
    party = client.party
    party.begin(0)
    before = {name: tensor.clone() for name, tensor in party.state().items()}
    for parameter in party.part.parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(NotFinite, match="step 0 is not finite: lower --learning-rate .* begin anew with"):
        party.end(0)
    client.states.save(2, party.state(), client.terms)
    with pytest.raises(AmqError, match="learning_rate differs"):  # so to go on is no remedy
        client.states.check(replace(client.terms, learning_rate=1e-3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in party.state().items())


def test_a_server_that_misses_the_last_word_says_what_it_has(tmp_path: Path) -> None:
    """The client has the adapter and goes; that it has, the server cannot know."""
    terms = make_terms()

    def change(passing: Passing) -> bytes:
        if passing.type == Type.ADAPTER:
            raise Cut(passing.data)
        return passing.data

    with Serving(tmp_path / "server", terms, reconnect=0.0) as serving, Proxy(serving.port, change) as proxy:
        make_client(tmp_path / "client", terms).train(reach(proxy.port))
        serving.join()
    assert "the client did not come back within 0 s; the state of step 4 is kept" in str(serving.error)
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)
    (tmp_path / "client" / ADAPTER / "adapter_model.safetensors").unlink()
    with Serving(tmp_path / "server", terms) as serving:
        make_client(tmp_path / "client", terms).train(reach(serving.port))  # fetched again
        serving.join()
    assert left_of(tmp_path) == run_whole(tmp_path / "again", terms)


def test_a_recorded_session_cannot_go_on_and_undoes_nothing(tmp_path: Path) -> None:
    terms, recorded = make_terms(), bytearray()

    def change(passing: Passing) -> bytes:
        if passing.to_server and passing.connection == 0:
            recorded.extend(passing.data)
        return cut_at(3, Type.LABELS)(passing)

    with Serving(tmp_path / "server", terms, key=KEY) as serving, Proxy(serving.port, change) as proxy:
        with pytest.raises(AmqError, match="the state of step 2 is kept"):
            make_client(tmp_path / "client", terms).train(reach(proxy.port, key=KEY, reconnect=0.0))
        end = time.monotonic() + parties.PATIENCE
        while not serving.progress.lines[-1].endswith("for the client"):
            assert time.monotonic() < end
            time.sleep(0.01)
        states = States(tmp_path / "server").steps()
        assert states == [0, 2]
        with socket.create_connection(("127.0.0.1", serving.port)) as sock:
            sock.settimeout(parties.DEADLINE)
            sock.sendall(recorded)
            sock.shutdown(socket.SHUT_WR)
            parties.read_exactly(sock, 1 << 20)
        while not any("the check of the frame is wrong" in line for line in serving.progress.lines):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert States(tmp_path / "server").steps() == states
        make_client(tmp_path / "client", terms).train(reach(serving.port, key=KEY))
        serving.join()
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


def test_a_recorded_answer_undoes_nothing(tmp_path: Path) -> None:
    """What a server once said of step 0 comes again: the client drops nothing before a frame of this connection."""
    terms, recorded = make_terms(), bytearray()

    def change(passing: Passing) -> bytes:
        if passing.type == Type.HELLO and not passing.to_server:
            recorded.extend(passing.data)
        return cut_at(3, Type.LABELS)(passing)

    with Serving(tmp_path / "server", terms, key=KEY) as serving, Proxy(serving.port, change) as proxy:
        with pytest.raises(AmqError, match="the state of step 2 is kept"):
            make_client(tmp_path / "client", terms).train(reach(proxy.port, key=KEY, reconnect=0.0))
        kept = (tmp_path / "client" / STEPS).read_bytes()
        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

            def answer() -> None:
                with listener.accept()[0] as sock:
                    sock.sendall(recorded)
                    sock.shutdown(socket.SHUT_WR)
                    parties.read_exactly(sock, 1 << 20)

            answered = pool.submit(answer)
            with pytest.raises(AmqError, match="the state of step 2 is kept"):
                make_client(tmp_path / "client", terms).train(reach(listener.getsockname()[1], key=KEY, reconnect=0.0))
            answered.result(parties.PATIENCE)
        assert States(tmp_path / "client").steps() == [0, 2] and (tmp_path / "client" / STEPS).read_bytes() == kept
        make_client(tmp_path / "client", terms).train(reach(serving.port, key=KEY))
        serving.join()
    assert left_of(tmp_path) == run_whole(tmp_path / "whole", terms)


def test_left_tells_runs_apart() -> None:
    one = Left([1.0], [(1.0, 1.0)], b"", b"", (b"",))
    assert one != replace(one, states=(b"x",)) and one == replace(one) and torch.get_num_threads() == 1
