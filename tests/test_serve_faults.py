"""What clients do wrong, on purpose or not: defined status codes in OpenAI's shape, nothing hangs, nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from helpers import serving as servers
from helpers.serving import fake_runtime, serving

HERE = Path(__file__).parent
CLIENT = httpx.Client(timeout=120.0, verify=False, limits=httpx.Limits(max_connections=None))
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SECONDS = 120.0
"""Bounds what hangs; generous, because machines that run tests are busy."""

wait_for = partial(servers.wait_for, seconds=SECONDS)


@pytest.fixture(scope="module")
def shared() -> Iterator[SimpleNamespace]:
    """A server for tests that leave it as it was."""
    with serving(fake_runtime(), max_body="64KiB") as server:
        yield server


def completion(prompt: str = "abc", **options: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": prompt, "max_tokens": 6, "temperature": 0, **options}


def post(server: Any, path: str, body: Any = None, content: Any = None, **headers: str) -> httpx.Response:
    content = json.dumps(body) if content is None else content
    return CLIENT.post(server.url + path, content=content, headers={"Content-Type": "application/json", **headers})


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, which must have OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert "Traceback" not in response.text and "/site-packages/" not in response.text
    return error


def metric(server: Any, name: str) -> float:
    text = CLIENT.get(f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))


def idle(server: Any) -> bool:
    waiting, running = (metric(server, f"vllm:num_requests_{which}") for which in ("waiting", "running"))
    return waiting == running == 0 and not server.engine.slots


def works(server: Any) -> None:
    """A request after the fault is answered as ever."""
    response = post(server, TEXT, completion("xyz"))
    assert response.status_code == 200 and response.json()["choices"][0]["text"] == "xyzxyz"


MALFORMED = {
    "empty": b"",
    "cut": b'{"model": "fake", "prompt": "a',
    "two": b"{}{}",
    "list": b"[1, 2]",
    "text": b'"hello"',
    "invalid UTF-8": b'{"model": "fake", "prompt": "\xff\xfe"}',
    "half a surrogate": b'{"model": "fake", "prompt": "\\ud83d"}',
    "UTF-16": '{"model": "fake", "prompt": "a"}'.encode("utf-16"),
    "deep": b'{"model": "fake", "prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "bare NaN": b'{"model": "fake", "prompt": "a", "temperature": NaN}',
    "overflow": b'{"model": "fake", "prompt": "a", "temperature": 1e999}',
    "minus infinity": b'{"model": "fake", "prompt": "a", "presence_penalty": -Infinity}',
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_malformed_bodies(shared, path, content):
    response = post(shared, path, content=content)
    assert response.status_code == 400, response.text
    error_of(response)


BAD_VALUES = [
    *(("temperature", v) for v in (-0.1, 1e300, "hot", True, [], {})),
    *(("top_p", v) for v in (1.5, -1, "0.5")),
    *(("top_k", v) for v in (-2, 1.5, "all", 10**400)),
    *(("min_p", v) for v in (-1, 2)),
    *(("max_tokens", v) for v in (-2, 1.5, "9")),
    *(("seed", v) for v in (2**64, 0.5, "x")),
    *(("repetition_penalty", v) for v in (0, -1, 1e9)),
    *(("presence_penalty", v) for v in (3, -3, "a")),
    *(("frequency_penalty", v) for v in (3, [])),
    *(("stop", v) for v in ("", [""], ["a"] * 65, [1], 7)),
    *(("n", v) for v in (0, 33, "1")),
    *(("logit_bias", v) for v in ({"256": 1}, {"5": 101}, {"x": 1}, {"-1": 1})),
    *(("stream", v) for v in ("yes", 1)),
    ("stream_options", {"include_usage": True}),  # without stream
    ("prompt", None), ("prompt", ""), ("prompt", []), ("prompt", 5), ("prompt", [1.5]), ("prompt", [256]),
    ("prompt", [-1]), ("prompt", [10**40]), ("prompt", ["a"] * 33), ("prompt", {"a": 1}), ("prompt", [True]),
    ("logprobs", 1000), ("logprobs", -1), ("model", 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=[f"{n}={str(v)[:20]}" for n, v in BAD_VALUES])
def test_bad_values_are_named(shared, name, value):
    response = post(shared, TEXT, completion(**{name: value}))
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").split(".")[0] == name and name in error["message"], error


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hello", [{}], [{"role": "user"}], [{"role": "nobody", "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    ],
)  # fmt: skip
def test_bad_messages(shared, messages):
    response = post(shared, CHAT, {"model": "fake", "messages": messages})
    assert response.status_code == 400, response.text
    assert error_of(response)["param"].startswith("messages")


def test_giant_prompts_and_bodies(shared):
    response = post(shared, TEXT, completion("a" * 5000))
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"
    assert "511" in response.text  # what it takes
    response = post(shared, CHAT, {"model": "fake", "messages": [{"role": "user", "content": "a" * 5000}]})
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"
    assert error_of(post(shared, TEXT, completion("a" * 70_000)))["code"] == "request_too_large"

    def endless() -> Iterator[bytes]:
        """No Content-Length: the size is known only when it has come."""
        yield b'{"model": "fake", "prompt": "'
        with contextlib.suppress(GeneratorExit):
            for _ in range(1000):
                yield b"a" * 1000

    with contextlib.suppress(httpx.WriteError):  # the server may close before all is sent
        response = post(shared, TEXT, content=endless())
        assert response.status_code == 413
        error_of(response)
    works(shared)


def test_unknown_models_paths_and_methods(shared):
    response = post(shared, TEXT, completion(model="gpt-5"))
    assert response.status_code == 404 and error_of(response)["code"] == "model_not_found"
    assert error_of(CLIENT.get(f"{shared.url}/v1/models/other"))["code"] == "model_not_found"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("GET", "/../../etc/passwd", 404)):
        response = CLIENT.request(method, shared.url + path)
        assert response.status_code == status, path
        error_of(response)
    response = post(shared, TEXT, completion(), **{"Content-Type": "text/plain"})  # what a foreign web page can send
    assert response.status_code in (400, 415)
    error_of(response)


def test_wrong_keys_learn_nothing():
    with serving(fake_runtime(), api_key=["secret"]) as server:
        for value in ("", "Bearer", "Bearer wrong", "Bearer secre", "Bearer secrets", "Basic secret", "secret"):
            for path in (TEXT, CHAT, "/v1/models"):
                response = post(server, path, content=b"not even JSON", Authorization=value)
                assert response.status_code == 401, (value, path)
                assert error_of(response)["code"] == "invalid_api_key" and "secret" not in response.text
        raw = exchange(
            server,
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
            b"Authorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n",
        )
        assert raw.startswith(b"HTTP/1.1 401")
        assert CLIENT.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert CLIENT.get(f"{server.url}/", headers={}).status_code == 200  # the page asks for the key


def connect(server: Any, receive_buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(SECONDS)
    address = urlsplit(server.url)
    connection.connect((address.hostname, address.port))
    return connection


def exchange(server: Any, data: bytes) -> bytes:
    """Sends bytes as they are; all that comes back until the server closes."""
    with connect(server) as connection:
        connection.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                parts.append(part)
    return b"".join(parts)


def request_bytes(body: dict[str, Any], path: str = TEXT) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # somebody speaks TLS
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["TLS", "long header", "negative length", "bad chunk"],
)
def test_what_is_no_http(shared, data):
    status = exchange(shared, data).partition(b"\r\n")[0]
    assert status == b"" or re.match(rb"HTTP/1.1 4\d\d ", status), status
    works(shared)


def test_a_body_that_does_not_come(monkeypatch):
    import amq.serve.gate

    monkeypatch.setattr(amq.serve.gate, "BODY_SECONDS", 0.2)
    with serving(fake_runtime()) as server:
        with connect(server) as connection:
            connection.sendall(request_bytes(completion())[:-5])
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        with connect(server) as connection:
            connection.sendall(request_bytes(completion())[:-5])
        wait_for(lambda: idle(server))
        works(server)


def test_a_client_that_leaves_frees_its_slot():
    runtime = fake_runtime(context=20_000, delay=0.005, max_sequences=1)
    with serving(runtime, max_new_tokens=15_000, queue=8) as server:
        for streamed in (True, False):
            with connect(server) as connection:
                connection.sendall(request_bytes(completion(max_tokens=15_000, stream=streamed)))
                wait_for(lambda: metric(server, "vllm:num_requests_running") == 1)
                if streamed:
                    assert connection.recv(10)
            wait_for(lambda: idle(server))
        assert metric(server, "vllm:generation_tokens_total") < 15_000
        waiting = [connect(server) for _ in range(4)]
        for connection in waiting:
            connection.sendall(request_bytes(completion(max_tokens=15_000)))
        wait_for(lambda: metric(server, "vllm:num_requests_waiting") == 3)
        for connection in waiting[1:]:
            connection.close()
        wait_for(lambda: metric(server, "vllm:num_requests_waiting") == 0)  # who waits may leave too
        waiting[0].close()
        wait_for(lambda: idle(server))
        assert metric(server, "amq_cancelled_total") == 6
        works(server)
        from amq.serve.worker import Job

        def jobs() -> int:
            gc.collect()
            return sum(type(thing) is Job for thing in gc.get_objects())

        wait_for(lambda: jobs() <= 2)  # of seven: only variables of loops that wait hold one


def test_a_slow_reader_holds_up_nobody():
    runtime = fake_runtime(context=20_000, max_sequences=2, delay=0.001)
    with serving(runtime, max_new_tokens=15_000, write_timeout=1.0) as server, connect(server, 2048) as slow:
        slow.sendall(request_bytes(completion(max_tokens=15_000, stream=True, logprobs=20)))
        wait_for(lambda: metric(server, "vllm:num_requests_running") == 1)
        works(server)
        assert metric(server, "vllm:num_requests_running") == 1  # meanwhile
        wait_for(lambda: idle(server))
        assert metric(server, "vllm:generation_tokens_total") < 15_000  # it was ended, not served
        works(server)


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=2 * SECONDS) for future in [pool.submit(job) for job in jobs]]


def test_many_clients_against_a_short_queue():
    with serving(fake_runtime(delay=0.004, max_sequences=2), queue=4) as server:
        server.engine.gate.clear()

        def open_gate() -> None:
            wait_for(lambda: metric(server, "amq_rejected_total") > 0)
            server.engine.gate.set()

        def ask(n: int) -> tuple[int, str]:
            response = CLIENT.post(server.url + TEXT, json=completion(f"{n:02}", max_tokens=20, stream=n % 2 == 0))
            if response.status_code == 200:
                return 200, text_of(response)
            error_of(response)
            return response.status_code, response.headers["Retry-After"]

        *results, _ = at_once([*(lambda n=n: ask(n) for n in range(32)), open_gate])
        statuses = Counter(status for status, _ in results)
        assert set(statuses) == {200, 429} and statuses[200] >= 6, statuses
        for n, (status, said) in enumerate(results):
            assert said == f"{n:02}" * 10 if status == 200 else 1 <= int(said) <= 120
        assert metric(server, "amq_rejected_total") == statuses[429]
        wait_for(lambda: idle(server))


def text_of(response: httpx.Response) -> str:
    if not response.headers["Content-Type"].startswith("text/event-stream"):
        return response.json()["choices"][0]["text"]
    assert response.text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events if event["choices"])


def test_nobody_gets_anothers_text():
    """Prompts of many lengths, streamed or not, while others come and leave: each text is what it is alone."""
    with serving(fake_runtime(delay=0.001, max_sequences=5), queue=64) as server:
        bodies = [
            completion(chr(65 + n) * (1 + 17 * n % 200) + "é→", max_tokens=30, stream=n % 3 > 0) for n in range(24)
        ]
        alone = [text_of(CLIENT.post(server.url + TEXT, json=body)) for body in bodies]
        stop = threading.Event()

        def leave() -> None:
            while not stop.is_set():
                with connect(server) as connection:
                    connection.sendall(request_bytes(completion("SECRET", max_tokens=200, stream=True)))
                    connection.recv(400)

        visitor = threading.Thread(target=leave)
        visitor.start()
        try:
            together = at_once(
                [lambda body=body: text_of(CLIENT.post(server.url + TEXT, json=body)) for body in bodies]
            )
        finally:
            stop.set()
            visitor.join()
        assert together == alone
        assert alone[1].startswith("B" * 18 + "é→B") or alone[1] == ("B" * 18 + "é→")[:30]
        wait_for(lambda: idle(server))


SERVER = """
from helpers.serving import fake_runtime, hold_until_input
from amq.serve import Server, ServeSettings, bind, create_app
from amq.serve.server import url
settings = ServeSettings(port=0, queue=1, drain=120.0)
listener = bind(settings)
runtime = fake_runtime(max_sequences=1)
hold_until_input(runtime.engine)
app = create_app(runtime, settings)
Server(app, settings, lambda: print(url(listener), flush=True)).run([listener])
"""


@pytest.mark.parametrize("stream", [True, False])
def test_sigterm_under_load(stream):
    """Who runs is finished, who waits or comes is sent away, the process ends with 0."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SERVER], text=True, cwd=HERE, **pipes)
    try:
        server = SimpleNamespace(url=process.stdout.readline().strip())
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(post, server, TEXT, completion(max_tokens=50, stream=stream))
            wait_for(lambda: metric(server, "vllm:num_requests_running") == 1)
            waiting = pool.submit(post, server, TEXT, completion(max_tokens=50))
            wait_for(lambda: metric(server, "vllm:num_requests_waiting") == 1)
            process.send_signal(signal.SIGTERM)
            assert waiting.result(SECONDS).status_code == 503
            error_of(waiting.result())
            try:
                response = post(server, TEXT, completion())
            except httpx.ConnectError:
                pass
            else:
                assert response.status_code == 503
                error_of(response)
            print(file=process.stdin, flush=True)  # opens the gate
            assert text_of(running.result(SECONDS)) == ("abc" * 17)[:50]
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def test_the_load_tool_sees_it_too(tmp_path, monkeypatch, capsys):
    """benchmarks/serve_load.py: more clients than a short queue takes; what it counts; speeds of users."""
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))
    import serve_load

    figures = tmp_path / "load.json"
    with serving(fake_runtime(delay=0.002, max_sequences=2), queue=1, write_timeout=SECONDS) as server:
        assert serve_load.main([server.url, "--smoke", "--json", str(figures)]) == 0
        measured = json.loads(figures.read_text())
        assert set(measured["ends"]) <= {"200", "429", "left by the client"} and measured["ends"]["429"] > 0
        assert measured["memory"]["most"] > 0 and measured["between_tokens"]["p99"] > 0.001
        assert "to the first token" in capsys.readouterr().out
        assert serve_load.main([server.url, "--smoke", "--concurrency", "1,2", "--json", str(figures)]) == 0
        together = json.loads(figures.read_text())["together"]
        assert 0 < together["1"]["median"] < 500 and set(together) == {"1", "2"}
    with serving(fake_runtime(context=8)) as server:  # every request is refused: not what a good server does
        assert serve_load.main([server.url, "--smoke"]) == 1
