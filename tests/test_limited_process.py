"""amq.util.limited_process: each limit ends the process, and nothing else does. The functions on top run in it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from helpers.processes import python_path

from amq.errors import AmqError
from amq.util import limited_process
from amq.util.limited_process import LimitedProcess

MEMORY = 512 * 2**20
LONG_SECONDS = 60.0
"""Beyond what anything takes here on a busy machine."""


def answers() -> Callable[[list[Any]], Any]:
    return lambda request: {
        "same": lambda value: value,
        "refuse": refuse,
        "spin": lambda: all(itertools.repeat(True)),
        "sleep": lambda: time.sleep(1e6),
        "allocate": lambda: bytearray(2**40) and None,
        "signal": signal.raise_signal,
        "fail": lambda: {}["nothing"],
        "facts": lambda: [os.getpid(), os.getsid(0), threading.stack_size()],
    }[request[0]](*request[1:])


def refuse(text: str) -> None:
    raise AmqError(text)


def broken() -> Callable[[Any], Any]:
    raise RuntimeError("as where a package is missing")


def make(seconds: float = LONG_SECONDS, **limits: Any) -> LimitedProcess:
    return LimitedProcess(answers, "the work", seconds, MEMORY, **limits)


@pytest.fixture(scope="module")
def process() -> Iterator[LimitedProcess]:
    with closing(make(wall=600.0)) as process:
        yield process


def inner(process: LimitedProcess) -> subprocess.Popen[bytes]:
    assert process._process is not None
    return process._process


def test_it_answers_in_json_and_the_same_process_again(process: LimitedProcess) -> None:
    for value in (None, "", "hi <日本> \ud800", [1, {"a": True}], "é" * 2**21):
        assert process.ask(["same", value]) == value
    first = inner(process)
    with pytest.raises(AmqError, match="^no, not \ud800$"):
        process.ask(["refuse", "no, not \ud800"])
    with pytest.raises(AmqError, match="the work: the request cannot be written as JSON"):
        process.ask(object())
    assert process.ask(["same", 1]) == 1 and inner(process) is first


def test_every_thread_gets_its_own_answer(process: LimitedProcess) -> None:
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = process.ask(["same", number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(8)}


ENDINGS = {
    "allocate": (["allocate"], "the work takes more than 512 MiB of memory"),
    "abort": (["signal", signal.SIGABRT], "the work takes more than 512 MiB of memory"),  # as of Rust without memory
    "overflow": (["signal", signal.SIGSEGV], "the work takes more than 8 MiB of stack"),
    "kill": (["signal", signal.SIGKILL], r"the work ended its process \(status -9\)"),
    "fail": (["fail"], r"the work ended its process \(status 1\)"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_a_request_that_ends_the_process_is_an_error(process: LimitedProcess, name: str) -> None:
    request, message = ENDINGS[name]
    with pytest.raises(AmqError, match=message):
        process.ask(request)
    assert process._process is None and process.ask(["same", 1]) == 1  # another one


def test_a_request_may_take_so_much_of_a_processor() -> None:
    with closing(make(0.3, wall=600.0)) as process:
        with pytest.raises(AmqError, match=r"the work takes more than 0\.3 s of a processor"):
            process.ask(["spin"])
        for number in range(50):  # each has its own time
            assert process.ask(["same", number]) == number


def test_a_request_may_take_so_long() -> None:
    with closing(make(wall=0.3)) as process, pytest.raises(AmqError, match=r"the work takes more than 0\.3 s$"):
        process.ask(["sleep"])


def test_time_that_nobody_asks_in_does_not_count() -> None:
    with closing(make(wall=2.0)) as process:
        assert process.ask(["same", 1]) == 1
        with pytest.raises(subprocess.TimeoutExpired):
            inner(process).wait(2.5)


def test_what_this_process_does_with_signals_does_not_matter() -> None:
    """Both are inherited."""
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF, signal.SIGALRM])
    try:
        for process, request in ((make(0.1), ["spin"]), (make(wall=0.1), ["sleep"])):
            with closing(process), pytest.raises(AmqError, match=r"takes more than 0\.1 s"):
                process.ask(request)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGALRM])
        signal.signal(signal.SIGPROF, before)


def test_its_stack_and_its_session_are_its_own() -> None:
    with closing(make(stack=2**20)) as process:
        assert process.ask(["facts"]) == [inner(process).pid, inner(process).pid, 2**20]


def test_one_that_somebody_kills_is_started_again(process: LimitedProcess) -> None:
    process.start()
    first = inner(process)
    first.kill()
    first.wait()
    assert process.ask(["same", 1]) == 1 and inner(process) is not first


def test_an_interrupt_does_not_leave_an_answer_for_the_next_one(
    process: LimitedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(stream: object) -> None:
        raise KeyboardInterrupt

    process.start()
    with monkeypatch.context() as patch:
        patch.setattr(limited_process, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.ask(["same", 1])
    assert process.ask(["same", 2]) == 2


def test_close_ends_it() -> None:
    process = make()
    process.close()  # before it was started
    for use in (process.start, lambda: process.ask(["same", 1])):
        with pytest.raises(AmqError, match="the process for the work was closed"):
            use()
    with closing(make()) as process:
        process.start()
        first = inner(process)
    assert first.returncode is not None
    process.close()


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(LimitedProcess(broken, "the work", 1.0, MEMORY)) as process:
        with pytest.raises(AmqError, match=r"the process for the work does not start \(status 1\)"):
            process.start()
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(AmqError, match="the work needs a process: /no/python"):
        make().start()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(AmqError, match=r"does not know its sys\.executable"):
        make().start()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(AmqError, match="does not start"):
        make().start()


def test_systems_without_limits_of_resources_can_import_it() -> None:
    code = "import sys; sys.modules['resource'] = None; import amq.runtime.templates, amq.runtime.grammar_check"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **python_path()})


def test_it_ends_with_the_process_that_started_it(process: LimitedProcess) -> None:
    process.start()
    first = inner(process)
    assert first.stdin is not None
    first.stdin.close()
    assert first.wait(LONG_SECONDS) == 0
    code = (  # killed, so that nothing tells the other to end but its stdin's end
        "import os, signal; from test_limited_process import make; process = make(); process.start()\n"
        "print(process._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, **python_path("tests")}
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment).stdout)
    until = time.monotonic() + 60
    while running(child):
        assert time.monotonic() < until, "it outlived its parent"
        time.sleep(0.05)


def running(process: int) -> bool:
    """A zombie, which nobody has waited for yet, has ended."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
