"""A stand-in for the server behind the chat page: what it answers follows from the first word that the user writes.

    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()

So every fault and every kind of answer comes when it is wanted. `Handler` has a method for each word.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECONDS = 60.0
PAGE = Path(__file__).parents[2] / "amq" / "serve" / "page.html"
MARKDOWN = """Some **bold** words and `x < y`:

```python
print("<b>1 & 2</b>")
```

1. one
2. two
   - inner

<img src=x onerror="document.title='hacked'"><script>document.title='hacked'</script>"""
JSON = '{"city": "Paris", "big": 12345678901234567890, "none": [], "list": [1, {"deep": "a, \\"b\\": {"}]}'
ARGUMENTS = ('{"city": "Paris", "days": 3}', '{"terms": [17, 25.50]}')


class StandIn(ThreadingHTTPServer):
    """requests: the bodies that came. key: what clients must send. capabilities: what the model can do. half, go_on:
    what some answers wait for in the middle. left: set when a client went while text came."""

    daemon_threads = True

    def __init__(self, handler: type[Handler] | None = None, model: str = "tiny") -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.model = model
        self.requests: list[dict[str, Any]] = []
        self.key = ""
        self.capabilities: dict[str, Any] = {"tools": "hermes", "thinking": True, "json": True}
        self.left = threading.Event()
        self.half = threading.Event()
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
                card = {"id": self.server.model, "object": "model", "max_model_len": 2048}
                self.answer(200, {"data": [{**card, "capabilities": self.server.capabilities}]})
        else:
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.allowed():
            self.server.requests.append(body)
            self.reply(body["messages"][-1])

    def reply(self, last: dict[str, Any]) -> None:
        name = {"tool": "told", "assistant": "more"}.get(last["role"]) or last["content"].split()[0]
        getattr(self, name)()

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

    def refuse(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        self.answer(status, {"error": {"message": message, "type": "x", "param": param, "code": code}}, **headers)

    def begin(self, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, text: str, size: int = 0) -> None:
        """size: of the pieces in which it goes, characters; 0: as a whole."""
        for at in range(0, len(text), size or len(text)):
            self.delta({"content": text[at : at + (size or len(text))]})

    def delta(self, delta: dict[str, Any], finish: str | None = None, **event: Any) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self.wfile.write(f"data: {json.dumps({'choices': [choice], **event})}\n\n".encode())
        self.wfile.flush()

    def end(self, finish: str = "stop") -> None:
        figures = {"prompt_tokens_per_second": 900.0, "tokens_per_second": 123.4, "first_token_seconds": 0.25}
        self.delta({}, finish, timings=figures)
        usage = {"prompt_tokens": 20, "completion_tokens": 12, "total_tokens": 32}
        self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())

    def hello(self) -> None:
        """In three parts: the next when the test has seen the last."""
        self.begin()
        for word in ("Good ", "day ", "to ", "you ", "all"):
            self.send(word)
        self.server.half.wait(SECONDS)
        self.send("!")
        self.server.go_on.wait(SECONDS)
        self.send(" She said.")
        self.end()

    def markdown(self) -> None:
        self.begin()
        self.send(MARKDOWN, 7)
        self.end()

    def call(self) -> None:
        """Two tools, the arguments in pieces."""
        self.begin()
        self.send("I look it up.")
        for index, (name, arguments) in enumerate(zip(("get_weather", "add"), ARGUMENTS, strict=True)):
            head = {"index": index, "id": f"call_{name}", "type": "function"}
            self.delta({"tool_calls": [{**head, "function": {"name": name, "arguments": ""}}]})
            for at in range(0, len(arguments), 5):
                self.delta({"tool_calls": [{"index": index, "function": {"arguments": arguments[at : at + 5]}}]})
        self.server.go_on.wait(SECONDS)
        self.end("tool_calls")

    def told(self) -> None:
        self.begin()
        self.send("The tools have spoken.")
        self.end()

    def think(self) -> None:
        self.begin()
        self.delta({"reasoning_content": "First this, "})
        self.delta({"reasoning_content": "then that."})
        self.server.go_on.wait(SECONDS)
        self.send("So be it.")
        self.end()

    def inline(self) -> None:
        """As a server that leaves the thinking in the text."""
        self.begin()
        self.send("<think>\nFirst this, then that.\n</think>\n\nSo be it.", 3)
        self.end()

    def muse(self) -> None:
        """Thinks until it is cut."""
        self.begin()
        self.delta({"reasoning_content": "On the other hand,"})
        self.end("length")

    def record(self) -> None:
        self.begin()
        self.send(JSON, 3)
        self.end()

    def long(self) -> None:
        self.begin()
        self.send("It was a dark and stor")
        self.end("length")

    def more(self) -> None:
        self.begin()
        self.send("my night.")
        self.end()

    def brackets(self) -> None:
        """What would be quadratic work if each level were indented by its depth."""
        self.begin()
        self.send("[" * 20_000, 5_000)
        self.end()

    def arabic(self) -> None:
        self.begin()
        self.send("مرحبا بكم\n\nGood day\n\n- واحد\n- اثنان")
        self.end()

    def odd(self) -> None:
        """Refused for a reason that can be looked up."""
        self.refuse(400, "temperature is 9: at most 2", "temperature", "invalid_value", X_Request_Id="req-7")

    def part(self) -> None:
        """Leaves out what was asked for."""
        self.begin(X_Amq_Ignored="seed, logit_bias")
        self.send("Well.")
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
        self.refuse(429, "the queue is full", Retry_After="300") if asked == 1 else self.markdown()

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
