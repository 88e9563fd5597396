"""Many requests at once: turns, bounds, timeouts, clients that leave or do not read, failures, the server's end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="part of the test extra")
pytest.importorskip("starlette", reason="the server needs the extra `serve`")

from helpers.processes import python_path  # noqa: E402
from helpers.serving import SECONDS, fake_runtime, serving, tokens_of, wait_for  # noqa: E402

from amq.serve.queue import FairQueue  # noqa: E402

COMPLETIONS = "/v1/completions"


@dataclass(eq=False)
class Guest:
    client: str
    number: int

    def __repr__(self) -> str:
        return f"{self.client}{self.number}"


def guests(text: str) -> list[Guest]:
    return [Guest(name[0], int(name[1:])) for name in text.split()]


def filled(text: str) -> tuple[FairQueue[Guest], list[Guest]]:
    queue: FairQueue[Guest] = FairQueue()
    everyone = guests(text)
    assert [queue.push(guest, full=False) for guest in everyone] == [None] * len(everyone)
    return queue, everyone


def emptied(queue: FairQueue[Guest]) -> str:
    return " ".join(map(str, iter(queue.pop, None)))


def test_clients_take_turns():
    queue, _ = filled("a1 a2 a3 b1 c1 b2")
    assert len(queue) == 6
    assert emptied(queue) == "a1 b1 c1 a2 b2 a3" and len(queue) == 0


def test_a_newcomer_does_not_wait_for_a_busy_client():
    queue, _ = filled("a1 a2 a3 a4")
    assert str(queue.pop()) == "a1"
    queue.push(Guest("b", 1), full=False)
    assert emptied(queue) == "a2 b1 a3 a4"


def test_a_full_room_refuses_the_busiest_client():
    queue, everyone = filled("a1 a2 a3 b1")
    newcomer = Guest("c", 1)
    assert queue.push(newcomer, full=True) is everyone[2]
    again = Guest("a", 4)
    assert queue.push(again, full=True) is again  # it is the busiest itself
    more = Guest("c", 2)
    assert queue.push(more, full=True) is more  # none has more than one above it
    assert emptied(queue) == "a1 b1 c1 a2"
    alone = Guest("d", 1)
    assert queue.push(alone, full=True) is alone


def test_leaving_the_room():
    queue, everyone = filled("a1 b1 a2")
    assert queue.remove(everyone[1]) and not queue.remove(everyone[1])
    assert queue.remove(everyone[0])
    assert queue.clear() == [everyone[2]] and len(queue) == 0


def ask(server: SimpleNamespace, prompt: str = "abc", key: str = "none", **more: Any) -> Any:
    body = {"model": "fake", "prompt": prompt, "max_tokens": 5, **more}
    return httpx.post(server.url + COMPLETIONS, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=SECONDS)


@contextmanager
def connection(server: SimpleNamespace, **more: Any) -> Iterator[socket.socket]:
    """A request on a raw socket, whose answer the test reads, or not."""
    body = json.dumps({"model": "fake", "prompt": "abc", "stream": True, **more}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect((host, int(port)))
        link.sendall(head.encode() + b"\r\n\r\n" + body)
        yield link


def active(server: SimpleNamespace) -> int:
    return len(server.engine.slots)


def count(server: SimpleNamespace, metric: str, **labels: str) -> float:
    if metric.startswith("vllm:"):
        labels = {"model_name": "fake", "engine": "0", **labels}
    return server.service.metrics.registry.get_sample_value(metric, labels) or 0.0


def test_a_full_queue_answers_429_and_says_when_to_come_back():
    with serving(fake_runtime(max_sequences=1), queue=1) as server, ThreadPoolExecutor(3) as pool:
        server.engine.gate.clear()
        first = pool.submit(ask, server)
        wait_for(lambda: active(server) == 1)
        second = pool.submit(ask, server)
        wait_for(lambda: len(server.worker._waiting) == 1)
        third = ask(server)
        assert third.status_code == 429 and third.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(third.headers["retry-after"]) <= 120
        assert count(server, "amq_rejected_total") == 1 and count(server, "vllm:num_requests_waiting") == 1
        server.engine.gate.set()
        assert first.result().status_code == second.result().status_code == 200


def test_keys_take_turns_for_the_slots():
    """One key has sent three requests before another sends one: that is next but one, and evicts the newest of them."""
    with (
        serving(fake_runtime(max_sequences=1), queue=3, api_key=["a", "b"]) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        server.engine.gate.clear()
        answers = {}
        for number, name in enumerate(("a0", "a1", "a2", "a3", "b0")):
            answers[name] = pool.submit(ask, server, name, key=name[0])
            wait_for(lambda: active(server) == 1)
            wait_for(lambda n=number: len(server.worker._waiting) == min(n, 3))
        assert answers.pop("a3").result().status_code == 429  # b0 has come
        server.engine.gate.set()
        assert {name: answer.result().status_code for name, answer in answers.items()} == dict.fromkeys(answers, 200)
        assert server.engine.prompts == [tokens_of(name) for name in ("a0", "a1", "b0", "a2")]


def test_concurrent_answers_do_not_mix():
    with serving(fake_runtime(max_sequences=3, delay=0.001), queue=40) as server, ThreadPoolExecutor(16) as pool:
        prompts = [f"<{number:02}>" for number in range(24)]
        answers = list(pool.map(lambda p: ask(server, p, max_tokens=12), prompts))
        assert [a.json()["choices"][0]["text"] for a in answers] == [p * 3 for p in prompts]
        assert active(server) == 0 and server.worker.idle


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream):
    with serving(fake_runtime(max_sequences=1, delay=0.005, context=5000), max_new_tokens=4000) as server:
        with connection(server, stream=stream):
            wait_for(lambda: active(server) == 1)
            with connection(server, stream=stream):
                wait_for(lambda: len(server.worker._waiting) == 1)
            wait_for(lambda: len(server.worker._waiting) == 0)  # left while it waited
            assert active(server) == 1
        wait_for(lambda: active(server) == 0)
        assert count(server, "amq_cancelled_total", reason="client") == 2
        assert ask(server).status_code == 200


def test_a_timeout_ends_a_stream_with_an_event():
    for timeout in (0.5, 4.0, 32.0):  # the first that is enough for a token, whatever else the machine does
        with serving(fake_runtime(delay=timeout / 50), timeout=timeout) as server:
            answer = ask(server, max_tokens=400, stream=True)
            wait_for(lambda server=server: active(server) == 0)
        *texts, last = answer.text.strip().split("\n\n")
        if texts:
            break
    assert answer.status_code == 200 and texts
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_timeout_before_the_first_token_has_a_status():
    """Of one request that runs and one that waits."""
    with serving(fake_runtime(max_sequences=1), timeout=0.3) as server, ThreadPoolExecutor(2) as pool:
        server.engine.gate.clear()
        for answer in pool.map(lambda stream: ask(server, stream=stream), (False, True)):
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert count(server, "amq_cancelled_total", reason="timeout") == 2
        server.engine.gate.set()
        wait_for(lambda: server.worker.idle)


def test_a_slow_reader_is_dropped_and_holds_nobody_up():
    with serving(
        fake_runtime(max_sequences=2, context=200_000), max_new_tokens=190_000, write_timeout=0.3, timeout=60
    ) as server:
        with connection(server, max_tokens=190_000, logprobs=5) as link:
            wait_for(lambda: active(server) == 1)
            assert ask(server, "xyz").json()["choices"][0]["text"] == "xyzxy"
            wait_for(lambda: active(server) == 0 and server.worker.idle)
            link.settimeout(SECONDS)
            received = b""
            while part := link.recv(1 << 16):
                received = received[-100:] + part
            assert not received.endswith(b"0\r\n\r\n")  # what had been sent, but not the answer's end
            assert count(server, "amq_cancelled_total", reason="client") == 1
        assert ask(server).status_code == 200


def test_an_engine_failure_tells_nothing_and_passes():
    with serving(fake_runtime(delay=0.005, context=5000), max_new_tokens=4000) as server, ThreadPoolExecutor(2) as pool:
        stream = pool.submit(ask, server, stream=True, max_tokens=4000)
        wait_for(lambda: count(server, "vllm:generation_tokens_total") > 3)
        server.engine.failing = RuntimeError("secret path /weights")
        failed = ask(server)
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "engine_failure"
        assert '"engine_failure"' in stream.result().text
        assert "secret" not in failed.text + stream.result().text
        server.engine.failing = None
        assert ask(server).status_code == 200 and active(server) == 0


def test_a_scheduler_that_raises_ends_its_requests_only(monkeypatch):
    with serving(fake_runtime(delay=0.005)) as server:
        scheduler = server.worker._scheduler
        right = scheduler.step

        def wrong() -> bool:
            if not scheduler.running:
                return right()
            raise IndexError("a defect")

        monkeypatch.setattr(scheduler, "step", wrong)
        assert ask(server).status_code == 500
        monkeypatch.undo()
        assert ask(server).status_code == 200 and active(server) == 0


def test_draining_finishes_what_runs_and_refuses_the_rest():
    with serving(fake_runtime(max_sequences=1), drain=SECONDS) as server, ThreadPoolExecutor(2) as pool:
        server.engine.gate.clear()
        running = pool.submit(ask, server, max_tokens=80)
        wait_for(lambda: active(server) == 1)
        waiting = pool.submit(ask, server)
        wait_for(lambda: len(server.worker._waiting) == 1)
        server.server.drain()
        assert waiting.result().status_code == 503 and "retry-after" in waiting.result().headers
        assert ask(server).status_code == httpx.get(f"{server.url}/health").status_code == 503
        server.engine.gate.set()
        assert running.result().json()["usage"]["completion_tokens"] == 80
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_draining_has_an_end():
    with (
        serving(fake_runtime(delay=0.01, context=9000), max_new_tokens=8000, drain=0.2) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(ask, server, max_tokens=8000, stream=True)
        wait_for(lambda: count(server, "vllm:generation_tokens_total") > 3)
        server.server.drain()
        assert '"draining"' in running.result().text
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_the_worker_sleeps_when_there_is_nothing_to_do():
    with serving() as server:
        assert ask(server).status_code == 200
        passes = len(server.engine.passes)
        schedule = Path(f"/proc/self/task/{server.worker._thread.native_id}/status")
        if not schedule.exists():
            pytest.skip("needs Linux's /proc")

        def switches() -> str:
            return [line for line in schedule.read_text().splitlines() if line.startswith("voluntary")][0]

        def asleep() -> bool:
            before = switches()
            time.sleep(0.2)
            return switches() == before

        wait_for(asleep)
        assert len(server.engine.passes) == passes


PROCESS = """
import sys
from helpers.serving import fake_runtime, hold_until_input
from amq.serve import __main__
import amq.runtime
runtime = fake_runtime(context=9000)
hold_until_input(runtime.engine)
amq.runtime.load = lambda *args, **options: runtime
code = __main__.main(["DIR", "--port", "0", "--drain", "60", "--max-new-tokens", "8000", "--log-requests"])
heavy = {"hqq", "pymoo", "sklearn", "matplotlib", "transformers", "amq.search"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else code)
"""


def test_sigterm_lets_running_requests_finish():
    """A server as people start it, but for the model."""
    environment = {**os.environ, **python_path("tests"), "AMQ_API_KEY": "secret"}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", PROCESS], text=True, env=environment, **pipes)
    with process, ThreadPoolExecutor(1) as pool:
        try:
            line = next((line for line in process.stderr if " at http://127.0.0.1:" in line), "")
            assert line, "it ended before it listened"
            server = SimpleNamespace(url=line.split(" at ")[1].split(",")[0])
            metrics, key = f"{server.url}/metrics", {"Authorization": "Bearer secret"}
            assert ask(server).status_code == 401  # the key is the environment's
            running = pool.submit(ask, server, key="secret", max_tokens=200)
            runs = re.compile(r"^vllm:num_requests_running\S+ 1.0", re.M)
            wait_for(lambda: runs.search(httpx.get(metrics, headers=key).text))
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            assert ask(server, key="secret").status_code == 503
            print(file=process.stdin, flush=True)  # opens the gate
            assert running.result().json()["usage"]["completion_tokens"] == 200
            said = process.stderr.read()
            assert process.wait(SECONDS) == 0, said
            assert re.search(r"INFO request \w+ of \S+: /v1/completions 200, 3 prompt, 200 new", said), said
            assert "secret" not in said
        finally:
            process.kill()


def test_a_second_signal_ends_at_once(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with serving(fake_runtime(delay=0.01, context=9000), max_new_tokens=8000) as server, connection(server):
        wait_for(lambda: active(server) == 1)
        server.server.handle_exit(signal.SIGINT, None)
        wait_for(lambda: server.worker.draining)
        assert active(server) == 1 and not ended
        server.server.handle_exit(signal.SIGINT, None)
        assert ended == [128 + signal.SIGINT]


def test_a_taken_port_is_named_before_the_model_is_loaded(capsys):
    from amq.serve.__main__ import main
    from amq.util.settings import run_command

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run_command(main, ["no such model", "--port", port]) == 2
    assert f"port {port}" in capsys.readouterr().err


def test_settings_that_do_not_fit(capsys):
    from amq.serve.__main__ import main
    from amq.util.settings import run_command

    for flags in (
        ["--max-sequences", "0"],
        ["--timeout", "nan"],
        ["--queue", "-1"],
        ["--port", "70000"],
        ["--max-body", "big"],
        ["--api-key", ""],
    ):
        assert run_command(main, ["DIR", *flags]) == 2
        assert flags[0].removeprefix("--") in capsys.readouterr().err.replace("'big'", "max-body")
