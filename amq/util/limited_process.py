"""`LimitedProcess`: a Python process of our own that answers requests, within limits of time and memory, or is ended.

For what a stranger may give us and no thread can be stopped in: a program such as a chat template, a grammar that takes
minutes to build or overflows the stack. The process sets its limits itself, so they hold where nobody is left to end
it, and the signal that ended it tells which it was. It ends with the process that started it, when its stdin does.

Requests and replies are JSON, each after its length in 8 bytes, on the process's stdin and stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from amq.errors import AmqError

WALL_SECONDS = 20.0
"""Only for what waits instead of working: a busy machine gives a process a fifth of the time."""
START_SECONDS = 60.0
"""Until the process is ready; a tenth of a second where the machine is not busy."""
STACK = 8 * 2**20
HEADER = 8
ENDINGS = (signal.SIGPROF, signal.SIGALRM)
"""Of the time of a processor, and by the clock."""
CHILD = (
    "import json, sys; sys.path[:] = sys.argv[2:]; "
    "from amq.util.limited_process import serve; serve(*json.loads(sys.argv[1]))"
)


class LimitedProcess:
    """Starts its process when it is first needed, and again after a request ended it.

    Any thread may ask; one request is answered at a time.
    make: a function of a module, called once in the process before the limits hold; what it returns answers requests.
    what: the work, for errors: "building it". seconds: of a processor, for a request, as on a machine that is not busy;
    wall: by the clock. memory: bytes of address space; Linux alone limits them. stack: bytes.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Any], Any]],
        what: str,
        seconds: float,
        memory: int,
        stack: int = STACK,
        wall: float = WALL_SECONDS,
    ) -> None:
        self._what = what
        self._arguments = json.dumps([stack, make.__module__, make.__name__, seconds, memory, wall])
        self._limits = {
            -signal.SIGPROF: f"{seconds:g} s of a processor",
            -signal.SIGALRM: f"{wall:g} s",
            -signal.SIGABRT: f"{memory / 2**20:g} MiB of memory",  # Rust aborts too where it gets none
            -signal.SIGSEGV: f"{stack / 2**20:g} MiB of stack",
        }
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Any) -> Any:
        """The answer; both are what JSON can spell.

        Raises AmqError: the answering function's own, one that names the limit, or why there is no process.
        """
        try:
            frame = _frame(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise AmqError(f"{self._what}: the request cannot be written as JSON ({error})") from error
        with self._lock:
            self._start()
            reply = self._exchange(frame)
        if "answer" in reply:
            return reply["answer"]
        if "error" in reply:
            raise AmqError(reply["error"])
        if (status := reply["status"]) in self._limits:
            raise AmqError(f"{self._what} takes more than {self._limits[status]}")
        raise AmqError(f"{self._what} ended its process (status {status})")

    def start(self) -> None:
        """So that the first request does not wait for it. Raises AmqError."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """Ends the process, once it has answered what it is at; there is no other after it."""
        with self._lock:
            self._closed = True
            self._end()

    def _start(self) -> None:
        if self._closed:
            raise AmqError(f"the process for {self._what} was closed")
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._end()  # somebody else killed it
        if not sys.executable:
            raise AmqError(f"{self._what} needs a process, and Python does not know its sys.executable")
        path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]  # what this process finds, it finds too
        command = [sys.executable, "-I", "-S", "-c", CHILD, self._arguments, *path]
        pipe = subprocess.PIPE
        try:  # a session of its own: an interrupt from the terminal is for this process, whose end is the other's
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        except OSError as error:
            raise AmqError(f"{self._what} needs a process: {sys.executable}: {error}") from error
        if "status" in (ready := self._exchange(b"")):
            raise AmqError(f"the process for {self._what} does not start (status {ready['status']})")

    def _exchange(self, frame: bytes) -> dict[str, Any]:
        """{"answer": …}, {"error": its text}, or {"status": of the process, which has ended}."""
        process, reply = self._process, None
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended: there is no reply either
                process.stdin.write(frame)
                process.stdin.flush()
            reply = _read(process.stdout)
        finally:
            if reply is None:  # or this thread was interrupted, and the reply would be taken for the next one's
                status = self._end()
        return {"status": status} if reply is None else json.loads(reply)

    def _end(self) -> int:
        """Returns the exit status, negative for a signal; 0 where there was no process."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        with suppress(BrokenPipeError), process:  # closes the pipes, and waits
            pass
        return process.returncode


def serve(stack: int, *arguments: Any) -> None:
    """The process itself: answers what comes on stdin until that ends. Arguments as of `LimitedProcess`."""
    for ending in ENDINGS:
        signal.signal(ending, signal.SIG_DFL)  # that it is ignored is inherited
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # they come to the other thread, in time or not at all
    threading.stack_size(stack)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_serve, *arguments).result()


def _serve(module: str, name: str, seconds: float, memory: int, wall: float) -> None:
    import resource

    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    _limit_time(0, START_SECONDS)
    answer = getattr(importlib.import_module(module), name)()
    limits = {resource.RLIMIT_CORE: 0, **({resource.RLIMIT_AS: memory} if sys.platform == "linux" else {})}
    for what, value in limits.items():
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    reply = _frame({"answer": "ready"})
    try:
        while True:
            _limit_time(0, 0)
            sys.stdout.buffer.write(reply)
            sys.stdout.buffer.flush()
            if (request := _read(sys.stdin.buffer)) is None:
                return
            _limit_time(seconds, wall)
            try:
                reply = _frame({"answer": answer(json.loads(request))})
            except AmqError as error:
                reply = _frame({"error": str(error)})
    except MemoryError:
        os.abort()


def _limit_time(seconds: float, wall: float) -> None:
    """From now on, of a processor and by the clock; 0: none. The signals end the process in the middle of anything."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, wall)


def _frame(value: Any) -> bytes:
    """JSON cannot spell half a character; Python's can, and it comes back as it was."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(data).to_bytes(HEADER, "big") + data


def _read(stream: IO[bytes]) -> str | None:
    """The next value's JSON; None where the stream ended."""
    length = int.from_bytes(header := stream.read(HEADER), "big")
    data = stream.read(length) if len(header) == HEADER else b""
    return data.decode("utf-8", "surrogatepass") if data and len(data) == length else None
