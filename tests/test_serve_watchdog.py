"""An engine that hangs, exits, panics or fails for ever: clients and supervisors learn it at once."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="part of the test extra")
pytest.importorskip("starlette", reason="the server needs the extra `serve`")

from helpers.processes import python_path  # noqa: E402
from helpers.serving import SECONDS, fake_runtime, serving, wait_for  # noqa: E402

from amq.serve import Server, ServeSettings, bind, create_app  # noqa: E402
from amq.serve import server as server_module  # noqa: E402
from amq.serve.watchdog import Watchdog  # noqa: E402
from amq.serve.worker import FAILED_PASSES, EngineThread  # noqa: E402


class PanicException(BaseException):
    """As Python sees a panic of a Rust library."""


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Servers that have failed go on until the test has looked."""
    monkeypatch.setattr(server_module, "FAILED_SECONDS", SECONDS)


def ask(server: SimpleNamespace, **more: Any) -> Any:
    body = {"model": "fake", "prompt": "abc", "max_tokens": 5, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS)


def health(server: SimpleNamespace) -> Any:
    return httpx.get(f"{server.url}/health")


def failed(server: SimpleNamespace) -> str:
    """The reason, after everything says that the engine has failed."""
    answer = health(server)
    assert answer.status_code == 503 and answer.json()["status"] == "failed"
    later = ask(server)
    assert later.status_code == 503 and later.json()["error"]["code"] == "engine_failure"
    assert int(later.headers["retry-after"]) > 0
    assert "amq_engine_failed 1.0" in httpx.get(f"{server.url}/metrics").text
    return answer.json()["reason"]


def test_a_pass_that_does_not_end(caplog):
    """Who runs, who waits and who comes later are answered; the server ends without waiting for the pass."""
    with serving(fake_runtime(max_sequences=1), stall=0.3) as server, ThreadPoolExecutor(3) as pool:
        assert ask(server).status_code == 200
        server.engine.gate.clear()
        try:
            answers = [pool.submit(ask, server, stream=stream) for stream in (False, True, False)]
            for answer in answers:
                response = answer.result(SECONDS)
                assert response.status_code in (500, 503), response.text  # the first was running, some may come later
                assert response.json()["error"]["code"] == "engine_failure"
            assert "0.3 s" in failed(server)
            assert server.worker.alive and server.worker.idle
            assert [r.levelno for r in caplog.records if "engine has failed" in r.message] == [logging.CRITICAL]
            wait_for(lambda: server.server.status)  # of its next look, which also sets when it ends
            server.server._deadline = 0.0
            server.thread.join(SECONDS / 2)  # the pass goes on for longer
            assert not server.thread.is_alive() and server.worker.alive
            assert server.server.status == server_module.FAILED_STATUS
        finally:
            server.engine.gate.set()


@pytest.mark.parametrize(
    ("looks", "bites"),
    [
        ([(1, 7), (4, 7), (6, 7), (8, 7), (10, 7)], 1),
        ([(1, 7), (4, 7), (6, 7), (8, 7)], 0),  # not quite
        ([(t, t) for t in range(1, 40)], 0),  # slow, but another pass each time
        ([(t, 0) for t in range(1, 40)], 0),  # asleep
        ([(1, 7), (2, 7), (3602, 7), (3603, 7)], 0),  # the process was stopped for an hour in the middle of a pass
    ],
    ids=["hangs", "in time", "slow", "asleep", "stopped"],
)
def test_what_the_watchdog_takes_for_a_hang(monkeypatch, looks, bites):
    """looks: (when, the pass that runs then); a pass may take 8 s, a look comes each second."""
    clock = SimpleNamespace(now=0.0, number=0)
    monkeypatch.setattr("amq.serve.watchdog.time", SimpleNamespace(perf_counter=lambda: clock.now))
    bitten: list[str] = []

    async def watch() -> None:
        dog = Watchdog(lambda: clock.number, 8.0, bitten.append)
        dog.start()
        for clock.now, clock.number in looks:
            dog.stop()
            dog._look()
        dog.stop()

    asyncio.run(watch())
    assert len(bitten) == bites


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["SystemExit", "KeyboardInterrupt"])
def test_an_exit_in_the_thread(error):
    with serving(fake_runtime(max_sequences=1, delay=0.01), max_new_tokens=400) as server:
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(ask, server, max_tokens=400, stream=True)
            wait_for(lambda: len(server.engine.passes) > 2)
            server.engine.failing = error
            assert "engine_failure" in stream.result().text
        assert type(error).__name__ in failed(server)
        wait_for(lambda: not server.worker.alive)


def test_a_defect_in_the_thread(monkeypatch):
    with serving() as server:
        monkeypatch.setattr(server.worker._scheduler, "submit", lambda request: 1 / 0)
        assert ask(server).status_code == 500
        assert "ZeroDivisionError" in failed(server)


def test_a_panic_ends_the_requests_of_its_pass():
    with serving() as server:
        server.engine.failing = PanicException("regex")
        answer = ask(server)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_failure"
        assert "regex" not in answer.text
        server.engine.failing = None
        assert ask(server).status_code == 200 and health(server).status_code == 200 and not server.engine.slots


@pytest.mark.parametrize("error", [PanicException("poisoned"), RuntimeError("device-side assert")], ids=type)
def test_an_engine_whose_every_pass_fails(error):
    with serving() as server:
        for end in (200, 503):  # it counts from a pass that went well
            server.engine.failing = error
            for _ in range(FAILED_PASSES - 1):
                assert ask(server).status_code == 500
            assert health(server).status_code == 200
            server.engine.failing = None if end == 200 else error
            assert ask(server).status_code == (200 if end == 200 else 500)
        wait_for(lambda: health(server).status_code == 503)
        assert f"last {FAILED_PASSES} passes" in failed(server)


@pytest.mark.parametrize(
    "error", [PanicException("regex of /secret"), RuntimeError("/secret"), SystemExit(1)], ids=type
)
def test_a_panic_in_a_route(monkeypatch, caplog, error):
    """OpenAI's shape, named in the log, one request only."""

    def fail(*_: Any) -> None:
        raise error

    with serving() as server:
        monkeypatch.setattr(server.service, "check_model", fail)
        answer = httpx.get(f"{server.url}/v1/models/fake", headers={"X-Request-Id": "mine"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text and answer.headers["x-request-id"] == "mine"
        assert "request mine" in caplog.text
        monkeypatch.undo()
        assert ask(server).status_code == 200


PROCESS = """
import sys
from helpers.serving import fake_runtime
from amq.serve import __main__
import amq.runtime
runtime = fake_runtime()
amq.runtime.load = lambda *args, **options: runtime
{how}
sys.exit(__main__.main(["DIR", "--port", "0", "--stall", "0.5"]))
"""
HANG = "runtime.engine.gate.clear()"
EXIT = "runtime.engine.failing = SystemExit(3)"


@pytest.mark.parametrize("how", [HANG, EXIT], ids=["hangs", "exits"])
def test_the_process_ends_for_its_supervisor(how):
    environment = {**os.environ, **python_path("tests")}
    command = [sys.executable, "-c", PROCESS.format(how=how)]
    with subprocess.Popen(command, text=True, env=environment, stderr=subprocess.PIPE) as process:
        try:
            line = next((line for line in process.stderr if " at http://127.0.0.1:" in line), "")
            assert line, "it ended before it listened"
            server = SimpleNamespace(url=line.split(" at ")[1].split(",")[0])
            assert ask(server).status_code in (500, 503)
            start = time.monotonic()
            assert process.wait(SECONDS) == 70
            assert time.monotonic() - start < SECONDS / 2  # it does not wait for the thread that hangs
            assert "the engine has failed" in process.stderr.read()
        finally:
            process.kill()


def test_the_engine_is_closed_in_its_thread():
    import threading

    closed: list[str] = []
    runtime = fake_runtime()
    runtime.engine.shutdown = lambda: closed.append(threading.current_thread().name)
    with serving(runtime) as server:
        assert ask(server).status_code == 200 and not closed
    assert closed == ["amq-engine"]


def test_a_server_that_does_not_start_says_so(monkeypatch):
    monkeypatch.setattr(EngineThread, "start", lambda self: 1 / 0)
    settings = ServeSettings(port=0)
    listener = bind(settings)
    ready: list[bool] = []
    server = Server(create_app(fake_runtime(), settings), settings, lambda: ready.append(True))
    with pytest.raises(SystemExit) as end:
        server.run([listener])
        raise SystemExit(server.status)  # an older uvicorn leaves it to us
    assert end.value.code == 3 and not ready
