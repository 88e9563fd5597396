"""For tests of the server: one in a thread, around the engine of `helpers.engines`, which repeats prompts.

    with serving(fake_runtime(delay=0.001), queue=4) as server:
        httpx.get(f"{server.url}/health")

A newline ends every text.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from amq.runtime.tokenizer import Tokenizer
from amq.serve import Server, ServeSettings, bind, create_app
from amq.serve.server import url
from helpers.engines import SECONDS, FakeEngine, FakeSlot
from helpers.small_tokenizers import bytes_alone

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"


def hold_until_input(engine: FakeEngine) -> None:
    """Holds all passes until this process reads a line from its input: for servers in processes of their own."""
    engine.gate.clear()

    def open_gate() -> None:
        sys.stdin.readline()
        engine.gate.set()

    threading.Thread(target=open_gate, daemon=True).start()


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """One token per byte, built without transformers, whose import takes seconds."""
    inner = bytes_alone()
    return Tokenizer(inner, inner.encode("\n").ids, template)


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text)


def fake_runtime(template: str | None = TEMPLATE, **options: Any) -> Any:
    """A Runtime around a FakeEngine; `options` are the engine's."""
    engine, tokenizer = FakeEngine(**options), byte_tokenizer(template)
    return SimpleNamespace(name="fake", engine=engine, tokenizer=tokenizer, weight_bytes=1, record=None)


def scripted(*answers: str) -> Callable[[FakeSlot], int]:
    """For FakeEngine's `following`: the n-th prompt that comes is answered with the n-th text, and the end."""
    tokens, known = [tokens_of(answer + "\n") for answer in answers], list[FakeSlot]()

    def following(slot: FakeSlot) -> int:
        if slot not in known:
            known.append(slot)
        return tokens[known.index(slot)][slot.length - len(slot.prompt)]

    return following


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
