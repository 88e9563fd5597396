"""Two parties of a split run on one machine, and a proxy between them that counts, changes, holds and cuts.

with Serving(folder / "server") as serving, Proxy(serving.port) as proxy:
    client = make_client(folder / "client", make_terms(policy="amaq"))
    client.train(reach(proxy.port))

Each party is a thread with a tiny Llama of its own, or, where it is to be killed, a process (`started`).
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amq.split.adapter import WEIGHTS
from amq.split.client import Client, Reach
from amq.split.data import samples_of
from amq.split.link import Throttle
from amq.split.model import Part, parts_of, take_part, targets_of
from amq.split.party import Party
from amq.split.records import ADAPTER, STEPS, SplitRun, StepRecord, read_lines
from amq.split.records import WIDTHS as TABLES
from amq.split.run import listen
from amq.split.server import Door, Server
from amq.split.terms import Terms
from amq.split.wire import HEAD, HEAD_BYTES, Type
from amq.util.progress import Progress, Step
from helpers.processes import python_path
from helpers.tiny_models import HIDDEN, random_tokens, tiny_llama

BLOCKS, STEPS_IN_ALL, SAVE_EVERY = 3, 4, 2
DEADLINE, PATIENCE = 60.0, 120.0
"""Of tests in which nobody is silent or stays away: beyond what a busy machine takes."""
OWN = ("version", "dtype", "model", "cut", "lora", "lora_alpha")
"""Terms that a server has of its own."""


def make_terms(**changes: Any) -> Terms:
    """A run of four steps of two windows, whose five samples come again from step 2 on."""
    given: dict[str, Any] = {
        "policy": "none", "coder": "none", "start_bits": 6.0, "target_bits": 3.0, "backward_bits": None, "beta": 1.0,
        "range_tokens": 0, "half": False, "steps": STEPS_IN_ALL, "version": "test", "model": "tiny", "dtype": "float32",
        "cut": 1, "lora": 2, "lora_alpha": 8.0, "labels": "server", "seed": 0, "samples": 5, "window_length": 16,
        "unscored": 0, "batch": 2, "micro_batches": 2, "learning_rate": 1e-2, "clip": 1.0, "save_every": SAVE_EVERY,
        "text": "random",
    }  # fmt: skip
    return Terms(**{**given, **changes})


def make_model() -> nn.Module:
    return tiny_llama(num_hidden_layers=BLOCKS)


def make_windows(terms: Terms) -> Tensor:
    return random_tokens(terms.samples, terms.window_length, seed=1)


def part_of(terms: Terms, client: bool) -> Part:
    return take_part(make_model(), terms.cut, terms.lora, terms.lora_alpha, terms.seed, client=client)


def make_run(terms: Terms) -> SplitRun:
    return SplitRun(
        model="tiny", architecture="LlamaForCausalLM", blocks=BLOCKS, parameters=1, trainable=1, hidden_size=HIDDEN,
        terms=terms.json(),
    )  # fmt: skip


class Said(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Step]:
        self.stages.append((name, total))
        with super().stage(name, total) as step:
            yield step

    def say(self, text: str) -> None:
        self.lines.append(text)


def make_client(folder: Path, terms: Terms, progress: Progress | None = None) -> Client:
    folder.mkdir(parents=True, exist_ok=True)
    party = Party(part_of(terms, client=True), terms, client=True)
    return Client(party, make_windows(terms), folder, make_run(terms), progress or Progress())


def reach(
    port: int, key: bytes = b"", deadline: float = DEADLINE, reconnect: float = PATIENCE, link: str = ""
) -> Reach:
    return Reach("127.0.0.1", port, key, deadline, reconnect, Throttle.parse(link))


def alone(terms: Terms) -> list[float]:
    """The losses of a run in one process, without a link, a stream or a policy: plain torch over both parts."""
    first, second = parts_of(make_model(), terms.cut, terms.lora, terms.lora_alpha, terms.seed)
    windows, losses = make_windows(terms), []
    optimizers = [torch.optim.AdamW(p.parameters, lr=terms.learning_rate, weight_decay=0.0) for p in (first, second)]
    for step in range(terms.steps):
        whole, loss = samples_of(terms.seed, terms.samples, terms.batch, step), 0.0
        for index in range(terms.micro_batches):
            tokens = windows[whole[index * terms.windows : (index + 1) * terms.windows]]
            hidden = second.continued(first.embedded(tokens))
            one = second.loss(hidden, targets_of(tokens, terms.unscored), terms.predicted)
            one.backward()
            loss += float(one.detach())
        losses.append(loss)
        for part, optimizer in zip((first, second), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(part.parameters, terms.clip)
            optimizer.param_groups[0]["lr"] = terms.learning_rate * (1 - step / terms.steps)
            optimizer.step()
            optimizer.zero_grad()
    return losses


# The serving side, in a thread.


class _Stop(BaseException):
    """Ends a server's thread from outside."""


class _Stopping:
    """A client whose coming ends the server."""

    def close(self, why: str = "") -> None:
        """As a link's."""

    @property
    def terms(self) -> Terms:
        raise _Stop


class Serving:
    """A server in a thread, from the state in `folder` on. `error`: what ended it, if it was not the run's end."""

    def __init__(
        self, folder: Path, terms: Terms | None = None, *, key: bytes = b"", deadline: float = DEADLINE,
        reconnect: float = PATIENCE, own: Mapping[str, Any] | None = None,
        make_part: Callable[[Terms], Part] = lambda terms: part_of(terms, client=False),
    ) -> None:  # fmt: skip
        terms = terms or make_terms()
        given = {name: getattr(terms, name) for name in OWN} if own is None else own
        self.progress, self.error, self._key, self._reconnect = Said(), None, key, reconnect  # type: ignore[var-annotated]
        self.error: BaseException | None
        self.server = Server(given, HIDDEN, make_part, folder, self.progress)
        listener = listen("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        self.door = Door(listener, key, deadline)
        self.thread = threading.Thread(target=self._serve, name="test-server", daemon=True)

    def _serve(self) -> None:
        try:
            self.server.serve(self.door, self._key, self._reconnect)
        except _Stop:
            pass
        except BaseException as error:  # noqa: BLE001  # whatever it is, a test looks at it
            self.error = error
        finally:
            self.door.close()

    def __enter__(self) -> Serving:
        self.thread.start()
        return self

    def join(self) -> None:
        """Waits for the end of the run."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), f"the server goes on: {self.progress.lines}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        stopping: Any = _Stopping()
        self.door.clients.put((stopping, stopping))
        party = self.server.party
        if party is not None and party.link is not None and self.thread.is_alive():
            party.link.close()
        self.thread.join(PATIENCE)


# What lies between.


@dataclass(frozen=True)
class Passing:
    """A frame on its way. connection: from 0 on. data: head and payload."""

    connection: int
    to_server: bool
    type: int
    step: int
    micro_batch: int
    cut: int
    data: bytes

    @property
    def name(self) -> tuple[Any, ...]:
        """Of the frame, whichever connection it is on."""
        return self.to_server, self.type, self.step, self.micro_batch, self.cut


class Cut(Exception):
    """Raised by a proxy's `change`: the connection ends after these bytes."""

    def __init__(self, after: bytes = b"") -> None:
        super().__init__()
        self.after = after


def unchanged(passing: Passing) -> bytes:
    return passing.data


@dataclass
class Proxy:
    """Between parties. port: its own; target: the server's. bytes: by whether to the server, of all connections.

    change: what becomes of a frame; raises `Cut` to end the connection there.
    silent: while it is set nothing passes in either direction, not even the end of a connection.
    """

    target: int
    change: Callable[[Passing], bytes] = unchanged
    bytes: Counter[bool] = field(default_factory=Counter)
    by_type: Counter[tuple[bool, int]] = field(default_factory=Counter)
    connections: int = 0
    silent: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Proxy:
        self._ended = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="test-proxy", daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended = True
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(timeout=10.0)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # no server there, for now
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            for source, sink, to_server in ((near, far, True), (far, near, False)):
                arguments = source, sink, to_server, self.connections
                self._threads.append(
                    threading.Thread(target=self._pump, args=arguments, name="test-proxy", daemon=True)
                )
                self._threads[-1].start()
            self.connections += 1

    def _pump(self, source: socket.socket, sink: socket.socket, to_server: bool, connection: int) -> None:
        with contextlib.suppress(OSError):
            while data := read_frame(source):
                _, _, kind, cut, micro_batch, step, _ = HEAD.unpack(data[: HEAD.size])
                passing = Passing(connection, to_server, kind, step, micro_batch, cut, data)
                try:
                    self._pass(sink, passing, self.change(passing))
                except Cut as end:
                    self._pass(sink, passing, end.after)
                    break
        self._wait()
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _wait(self) -> None:
        while self.silent.is_set() and not self._ended:
            time.sleep(0.01)

    def _pass(self, sink: socket.socket, passing: Passing, data: bytes) -> None:
        self._wait()
        self.bytes[passing.to_server] += len(data)
        self.by_type[passing.to_server, passing.type] += len(data)
        sink.sendall(data)


def read_frame(sock: socket.socket) -> bytes:
    """A frame's head and payload as they come, unjudged; empty at the end."""
    head = read_exactly(sock, HEAD_BYTES)
    if len(head) < HEAD_BYTES:
        return b""
    return head + read_exactly(sock, HEAD.unpack(head[: HEAD.size])[-1])


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


class CutAtEach:
    """Cuts once at every frame of a run: before it, in its middle or behind it, in turns; signs of life aside.

    The last BYE goes through, and what ends at the adapter ends before it is whole: who has it does not come back.
    """

    def __init__(self, terms: Terms, first: int = 0) -> None:
        self._steps, self._turn = terms.steps, first
        self.seen: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()

    def __call__(self, passing: Passing) -> bytes:
        with self._lock:
            last = passing.type == Type.BYE and any(name[1] == Type.ADAPTER for name in self.seen)
            if passing.type == Type.ACK or passing.name in self.seen or last:
                return passing.data
            self.seen.append(passing.name)
            self._turn += 1
        data = passing.data
        ends = b"", data[: len(data) // 2], data
        raise Cut(ends[self._turn % (2 if passing.type == Type.ADAPTER else 3)])


# What is left of a run.


@dataclass(frozen=True)
class Left:
    """What two runs must have in common, byte for byte."""

    losses: list[float]
    bits: list[tuple[float, float]]
    tables: bytes
    adapter: bytes
    states: tuple[bytes, ...]


def left_of(folder: Path, steps: int = STEPS_IN_ALL) -> Left:
    """Of a finished run with its parties' folders `client` and `server`."""
    client = folder / "client"
    records = read_lines(client / STEPS, StepRecord)
    assert [record.step for record in records] == list(range(steps))
    name = f"state/step-{steps:08d}.safetensors"
    tables = client / TABLES
    return Left(
        [record.loss for record in records],
        [(record.forward_bits, record.backward_bits) for record in records],
        tables.read_bytes() if tables.exists() else b"",
        (client / ADAPTER / WEIGHTS).read_bytes(),
        tuple((folder / party / name).read_bytes() for party in ("client", "server")),
    )


def run_whole(folder: Path, terms: Terms, change: Callable[[Passing], bytes] | None = None) -> Left:
    """A run from beginning to end, through a proxy if something is to be changed on its way."""
    with Serving(folder / "server", terms) as serving, contextlib.ExitStack() as stack:
        port = serving.port
        if change is not None:
            port = stack.enter_context(Proxy(port, change)).port
        make_client(folder / "client", terms).train(reach(port))
        serving.join()
        assert serving.error is None, serving.error
    return left_of(folder, terms.steps)


# Processes, where a party is to be killed.


def _start_context() -> ForkServerContext:
    """Children that have imported everything when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.split_parties", "transformers.models.llama.modeling_llama", "peft"])
    return context


@contextlib.contextmanager
def started(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[BaseProcess, Any]]:
    """(A process that runs `target(pipe, *arguments)`, this end of the pipe); killed at the end."""
    context = _start_context()
    ours, theirs = context.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**python_path("tests"), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def serve_process(pipe: Any, folder: str, terms: str) -> None:
    """Sends its port, serves, and sends what ended it: empty for the end of the run."""
    torch.set_num_threads(1)
    with Serving(Path(folder), Terms.parse(json.loads(terms), "terms")) as serving:
        pipe.send(serving.port)
        serving.thread.join()
        pipe.send(str(serving.error or ""))


def train_process(pipe: Any, folder: str, terms: str, port: int) -> None:
    """Trains, and sends an empty text, or what was wrong."""
    torch.set_num_threads(1)
    try:
        make_client(Path(folder), Terms.parse(json.loads(terms), "terms")).train(reach(port))
    except Exception as error:  # noqa: BLE001  # whatever it is, the test says so
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send("")
