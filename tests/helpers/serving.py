"""For tests of the server: an engine that needs no model, and a server in a thread.

    with serving(fake_runtime(delay=0.001), queue=4) as server:
        httpx.get(f"{server.url}/health")

The fake engine repeats the prompt: "abc" goes on "abcabc…", so every answer tells whose it is. A newline ends it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from amq.errors import AmqError
from amq.runtime.engine import Segment, Slot
from amq.runtime.tokenizer import Tokenizer
from amq.serve import Server, ServeSettings, bind, create_app
from amq.serve.server import url

SECONDS = 60.0
"""How long anything may take before a test fails; far above what it takes, because machines are busy at times."""

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"


class FakeSlot(Slot):
    def __init__(self, prompt: Sequence[int], new_tokens: int, length: int) -> None:
        super().__init__(len(prompt) + new_tokens, length)
        self.prompt = list(prompt)


class FakeEngine:
    """Repeats prompts. Everything may be changed while it runs.

    gate: a pass waits while it is clear, so that a test can hold a request where it is for as long as it takes.
    prompts: of all sequences opened so far, in tokens. delay: seconds of a pass. failing: an exception that the next
    passes raise. shared: positions that every prompt finds computed already. positions: of the KV cache, all slots
    together.
    """

    banner = "a fake engine"
    max_rows = 512

    def __init__(self, context: int = 512, max_sequences: int = 4, delay: float = 0.0, vocab_size: int = 256) -> None:
        self.context, self.max_sequences, self.delay, self.vocab_size = context, max_sequences, delay, vocab_size
        self.positions = context * max_sequences
        self.failing: Exception | None = None
        self.shared = 0
        self.slots: set[FakeSlot] = set()
        self.passes = 0
        self.prompts: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def open(self, prompt: Sequence[int], new_tokens: int) -> FakeSlot | None:
        needed = len(prompt) + new_tokens
        if needed > self.positions:
            raise AmqError(f"{needed} positions never fit the cache of {self.positions}")
        if len(self.slots) >= self.max_sequences or self.cached_tokens()[0] + needed > self.positions:
            return None
        self.prompts.append(list(prompt))
        slot = FakeSlot(prompt, new_tokens, min(self.shared, len(prompt) - 1))
        self.slots.add(slot)
        return slot

    def close(self, slot: FakeSlot) -> None:
        self.slots.remove(slot)

    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        self.passes += 1
        assert self.gate.wait(2 * SECONDS), "the test never opened the gate"
        if self.delay:
            time.sleep(self.delay)
        if self.failing is not None:
            raise self.failing
        for segment in segments:
            segment.slot.length += len(segment.tokens)
            assert segment.slot.length <= segment.slot.capacity
        wanted = [segment.slot for segment in segments if segment.logits]
        logits = torch.zeros(len(wanted), self.vocab_size)
        for row, slot in enumerate(wanted):
            logits[row, slot.prompt[slot.length % len(slot.prompt)]] = 30.0
        return logits

    def cached_tokens(self) -> tuple[int, int]:
        return sum(slot.capacity for slot in self.slots), self.positions


def hold_until_input(engine: FakeEngine) -> None:
    """Holds all passes until this process reads a line from its input: for servers in processes of their own."""
    engine.gate.clear()

    def open_gate() -> None:
        sys.stdin.readline()
        engine.gate.set()

    threading.Thread(target=open_gate, daemon=True).start()


def byte_tokenizer() -> Tokenizer:
    """One token per byte, built without transformers, whose import takes seconds."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Inner(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner, inner.encode("\n").ids, TEMPLATE)


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def fake_runtime(**options: Any) -> Any:
    """A Runtime around a FakeEngine; `options` are the engine's."""
    return SimpleNamespace(
        name="fake", engine=FakeEngine(**options), tokenizer=byte_tokenizer(), weight_bytes=1, banner="a fake engine"
    )


@contextmanager
def serving(runtime: Any = None, **settings: Any) -> Iterator[SimpleNamespace]:
    """A server on a free port, in a thread: `url`, `engine`, `app`, `service`, `worker`, `server`."""
    runtime = runtime or fake_runtime()
    how = ServeSettings(port=0, **settings)
    listener = bind(how)
    app = create_app(runtime, how)
    ready = threading.Event()
    server = Server(app, how, ready.set)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    address = url(listener)
    thread.start()
    assert ready.wait(SECONDS), "the server did not start"
    service = app.state.service
    try:
        yield SimpleNamespace(
            url=address,
            engine=runtime.engine,
            app=app,
            service=service,
            worker=service.worker,
            server=server,
            thread=thread,
        )
    finally:
        server.should_exit = True
        if isinstance(runtime.engine, FakeEngine):
            runtime.engine.delay = 0.0
            runtime.engine.gate.set()
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not stop"


def wait_for(condition: Any, seconds: float = SECONDS) -> None:
    """Until `condition()` holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not come true within {seconds} s"
        time.sleep(0.005)
