"""The chat page in a real browser: sending, streaming, stopping, what the server refuses, and text that is no HTML.

The server is mostly a stand-in that does what the user's message says, so that every fault comes when it is wanted; the
last test is against amq's own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import chromium

PAGE = Path(__file__).parents[1] / "amq" / "serve" / "page.html"
MARKDOWN = """Some **bold** words and `x < y`:

```python
print("<b>1 & 2</b>")
```

1. one
2. two
   - inner

<img src=x onerror="document.title='hacked'"><script>document.title='hacked'</script>"""

pytestmark = pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs a Chromium browser on PATH")


class StandIn(ThreadingHTTPServer):
    """requests: the bodies that came. key: what clients must send. left: set when a client went while text came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.key = ""
        self.left = threading.Event()
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/v1/models"):
            if self.allowed():
                self.answer(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 2048}]})
        else:
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.allowed():
            self.server.requests.append(body)
            getattr(self, body["messages"][-1]["content"].split()[0])()

    def allowed(self) -> bool:
        if self.server.key in ("", self.headers.get("Authorization", "").removeprefix("Bearer ")):
            return True
        self.refuse(401, "wrong API key")
        return False

    def answer(self, status: int, body: Any, kind: str = "application/json", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.answer(status, {"error": {"message": message, "type": "x", "param": None, "code": None}}, **headers)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def send(self, text: str, **event: Any) -> None:
        choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": event.pop("finish", None)}
        self.wfile.write(f"data: {json.dumps({'choices': [choice], **event})}\n\n".encode())
        self.wfile.flush()

    def end(self) -> None:
        figures = {"prompt_tokens_per_second": 900.0, "tokens_per_second": 123.4, "first_token_seconds": 0.25}
        self.send("", finish="stop", timings=figures)
        usage = {"prompt_tokens": 20, "completion_tokens": 12, "total_tokens": 32}
        self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())

    def hello(self) -> None:
        """In two parts: the second when the test has seen the first."""
        self.begin()
        for word in ("Good ", "day ", "to ", "you ", "all"):
            self.send(word)
        self.server.go_on.wait(0.25)
        self.send("!")
        self.server.go_on.wait(10)
        self.send(" She said.")
        self.end()

    def markdown(self) -> None:
        self.begin()
        for at in range(0, len(MARKDOWN), 7):
            self.send(MARKDOWN[at : at + 7])
        self.end()

    def endless(self) -> None:
        self.begin()
        try:
            while not self.server.go_on.wait(0.01):
                self.send("and so on ")
        except ConnectionError:
            self.server.left.set()

    def busy(self) -> None:
        """Refuses once."""
        asked = [r["messages"][-1]["content"] for r in self.server.requests].count("busy")
        self.refuse(429, "the queue is full", Retry_After="1") if asked == 1 else self.markdown()

    def closing(self) -> None:
        self.refuse(503, "the server is shutting down")

    def cut(self) -> None:
        self.begin()
        self.send("It was a dark and stor")

    def failing(self) -> None:
        self.begin()
        self.send("Half ")
        self.wfile.write(b'data: {"error": {"message": "the engine failed", "type": "server_error"}}\n\n')

    def silent(self) -> None:
        """No answer, as when the server has died."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def server(page: chromium.Page) -> Iterator[StandIn]:
    """A fresh one, opened in the page; its port makes the page's storage a new one too."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    page.messages.clear()
    page.open(server.url)
    page.wait("document.title.startsWith('tiny')")
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    assert not [m for m in page.messages if "Uncaught" in m or "Security" in m], page.messages


def ask(page: chromium.Page, text: str) -> None:
    page.run("document.querySelector('#message').focus()")
    page.write(text)
    page.press("Enter")


def finished(page: chromium.Page) -> None:
    page.wait("document.querySelector('#stop').hidden")


def test_sends_streams_and_remembers(page, server):
    page.run("document.querySelector('#message').focus()")
    page.write("hello")
    page.press("Enter", shift=True)  # a new line, not yet sent
    page.write("there")
    assert server.requests == []
    page.press("Enter")
    page.wait("document.querySelector('.text')?.innerText.trim() === 'Good day to you all!'")
    assert page.run("document.querySelector('.rate').innerText").endswith("tokens/s")  # while it is written
    assert page.run("document.querySelector('#log').getAttribute('aria-busy')") == "true"
    server.go_on.set()
    finished(page)
    assert page.run("document.querySelector('.text').innerText.trim()") == "Good day to you all! She said."
    figures = page.run("document.querySelector('.figures').innerText")
    assert all(part in figures for part in ("123.4 tokens/s", "first token after 0.25 s", "12 tokens")), figures
    assert page.run("document.querySelector('#usage').innerText") == "32 of 2,048 tokens"
    assert page.run("document.activeElement.id") == "message"
    first = server.requests[0]
    assert first["messages"] == [{"role": "user", "content": "hello\nthere"}]
    assert first["model"] == "tiny" and first["stream"] and first["stream_options"] == {"include_usage": True}
    assert "temperature" not in first  # what is not set is the server's to choose

    page.open(server.url + "/?again")  # the conversation survives this
    ask(page, "hello again")
    finished(page)
    said = [("user", "hello\nthere"), ("assistant", "Good day to you all! She said."), ("user", "hello again")]
    assert [(m["role"], m["content"]) for m in server.requests[1]["messages"]] == said
    page.run("document.querySelector('#new').click()")
    assert page.run("document.querySelector('#log').childElementCount") == 0


def test_a_models_text_is_never_html(page, server):
    ask(page, "markdown")
    finished(page)
    assert page.run("document.querySelector('.text strong').innerText") == "bold"
    assert page.run("document.querySelector('.text p code').innerText") == "x < y"
    assert page.run("document.querySelector('.text pre').textContent") == 'print("<b>1 & 2</b>")'
    assert page.run("document.querySelector('.text ol > li:nth-child(2) > ul > li').innerText") == "inner"
    assert page.run("document.querySelectorAll('.text img, .text script, .text b').length") == 0
    assert MARKDOWN.rpartition("\n")[2] in page.run("document.querySelector('.text').innerText")
    assert page.run("document.title").startswith("tiny")
    refused = "try { document.body.innerHTML = '<p>'; 'written' } catch (error) { error.name }"
    assert page.run(refused) == "TypeError"  # the page's policy: scripts cannot write markup
    page.messages.clear()  # which the browser mentions


@pytest.mark.parametrize("way", ["escape", "button"])
def test_stopping_ends_the_request_and_keeps_the_text(page, server, way):
    ask(page, "endless")
    page.wait("document.querySelector('.text')?.innerText.includes('and so on')")
    if way == "escape":
        page.press("Escape")
    else:
        page.run("document.querySelector('#stop').click()")
    finished(page)
    assert server.left.wait(5)
    assert "stopped" in page.run("document.querySelector('.figures').innerText")
    assert "and so on" in page.run("document.querySelector('.text').innerText")


def test_a_busy_server_is_asked_again_when_it_says(page, server):
    ask(page, "busy")
    message = page.wait("document.querySelector('.problem')?.innerText")
    assert "busy" in message and "Retry in 1 s" in message
    assert page.run("document.querySelector('.problem button').disabled")
    page.wait("!document.querySelector('.problem button').disabled", 3)
    page.run("document.querySelector('.problem button').click()")
    finished(page)
    assert page.run("document.querySelector('.problem')") is None
    assert "bold" in page.run("document.querySelector('.text').innerText")
    assert [len(r["messages"]) for r in server.requests] == [1, 1]


@pytest.mark.parametrize(
    ("message", "said", "kept"),
    [
        ("closing", "not taking requests: the server is shutting down", ""),
        ("cut", "The answer was cut off", "It was a dark and stor"),
        ("failing", "the engine failed", "Half"),
        ("silent", "cannot be reached", ""),
    ],
)
def test_failures_are_told(page, server, message, said, kept):
    ask(page, message)
    assert said in page.wait("document.querySelector('.problem span')?.innerText")
    assert page.run("document.querySelector('.problem button').innerText") == "Retry"
    assert page.run("document.querySelector('.text').innerText.trim()") == kept


def test_key_and_settings(page, server):
    server.key = "secret"
    page.open(server.url + "/?locked")
    page.wait("document.querySelector('#dialog').open && document.activeElement.name === 'key'")
    page.write("secret")
    page.run("document.querySelector('[name=system]').value = 'Be brief.'")
    page.run("document.querySelector('[name=temperature]').value = '0.5'")
    page.run("document.querySelector('[name=max_tokens]').value = '64'")
    page.press("Enter")
    page.wait("document.title.startsWith('tiny')")
    server.go_on.set()
    ask(page, "hello")
    finished(page)
    sent = server.requests[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"]) == (0.5, 64) and "seed" not in sent
    assert "secret" not in page.run("JSON.stringify(localStorage)")


def test_a_phones_width(page, server):
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
    try:
        ask(page, "markdown")
        finished(page)
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert page.run("document.querySelector('#message').getBoundingClientRect().bottom") <= 640
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_against_the_real_server(page):
    from helpers.serving import fake_runtime, serving, wait_for

    with serving(fake_runtime(delay=0.002, context=2000), max_new_tokens=1500, api_key=["secret"]) as real:
        page.open(real.url)
        page.wait("document.querySelector('#dialog').open && document.activeElement.name === 'key'")
        page.write("secret")
        page.press("Enter")
        page.wait("document.title.startsWith('fake')")
        assert page.run("document.querySelector('#usage').innerText") == "0 of 2,000 tokens"
        page.run("settings.max_tokens = '39'")
        ask(page, "guten Tag")
        finished(page)
        assert page.run("turns[0].answer") == "user: guten Tag|" * 2 + "user: g"  # what this engine says
        figures = page.run("document.querySelector('.figures').innerText")
        assert "tokens/s" in figures and "39 tokens" in figures and "ended at the limit of tokens" in figures
        page.run("settings.max_tokens = ''")
        ask(page, "again")
        page.wait("turns[1].answer")
        assert len(real.engine.slots) == 1
        page.press("Escape")
        wait_for(lambda: not real.engine.slots)
        finished(page)
        real.worker.draining = True
        ask(page, "more")
        assert "not taking requests" in page.wait("document.querySelector('.problem span')?.innerText")
