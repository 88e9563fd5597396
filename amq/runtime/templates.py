"""`BoundedRenderer`: chat templates in a process of their own, which may take so much time and memory and no more.

A template comes with a model, and is a program: two loops can keep a thread busy for a year, one expression take all
memory. Neither can be stopped in a thread. The process has jinja2 and nothing else, starts in a tenth of a second, is
killed where it takes too long, and started again for the next conversation. It ends with the process that started it.

Requests and replies are JSON, each after its length in 8 bytes, on the process's stdin and stdout.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from amq.errors import AmqError
from amq.runtime.chat import PLAIN, ChatOptions, Messages, render_chat

SECONDS = 2.0
MEMORY = 512 * 2**20
TEXT = 64 * 2**20
"""Characters that a rendered conversation may have."""
START_SECONDS = 60.0
"""Until the process answers for the first time; a tenth of a second where the machine is not busy."""

HEADER = 8
CHILD = "import sys; sys.path[:] = sys.argv[2:]; from amq.runtime.templates import serve; serve(int(sys.argv[1]))"


class BoundedRenderer:
    """`render_chat`, but with limits. Any thread may call it; one renders at a time.

    seconds: for a conversation, compiling the template included. memory: bytes of address space, on Linux; elsewhere
    time alone is limited.
    Raises AmqError for a conversation that goes beyond a limit, naming it, and where no Python can be started.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._seconds, self._memory = seconds, memory
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(
        self, template: str, messages: Messages, names: Mapping[str, Any], options: ChatOptions = PLAIN
    ) -> str:
        """As `render_chat`. The first call starts the process."""
        given = {name: getattr(options, name) for name in ("tools", "add_generation_prompt", "continue_final_message")}
        try:
            request = _frame([template, messages, names, {**given, "names": options.names}, self._seconds])
        except (TypeError, ValueError, RecursionError) as error:
            raise AmqError(f"the conversation cannot be written as JSON ({error})") from error
        with self._lock:
            if self._closed:
                raise AmqError("the chat template's process was closed")
            if self._process is not None and self._process.poll() is not None:
                self._end()  # somebody else killed it
            if self._process is None:
                self._start()
            reply = self._exchange(request, self._seconds)
        if "text" not in reply:
            raise AmqError(reply["error"])
        return str(reply["text"])

    def close(self) -> None:
        """Ends the process, once it has rendered what it is at."""
        with self._lock:
            self._closed = True
            self._end()

    def __enter__(self) -> BoundedRenderer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        if not sys.executable:
            raise AmqError("chat templates need a process of their own, and Python does not know its sys.executable")
        path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
        command = [sys.executable, "-I", "-S", "-c", CHILD, str(self._memory), *path]
        pipe = subprocess.PIPE
        try:  # a session of its own: an interrupt from the terminal is for the server, which ends this process
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        except OSError as error:
            raise AmqError(f"chat templates need a process of their own: {sys.executable}: {error}") from error
        if "error" in (ready := self._exchange(b"", START_SECONDS)):
            raise AmqError(f"the process for chat templates does not start: {ready['error']}")

    def _exchange(self, request: bytes, seconds: float) -> dict[str, Any]:
        """The reply, {"text": …} or {"error": …}; the process is gone where it did not come."""
        process, late = self._process, threading.Event()
        assert process is not None and process.stdin is not None and process.stdout is not None

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        reply = None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: there is no reply either
                process.stdin.write(request)
                process.stdin.flush()
            reply = _read(process.stdout)
        finally:
            timer.cancel()
            timer.join()  # from here on it kills nothing
            if reply is None or late.is_set():
                status = self._end()
        if reply is not None:
            return reply
        if late.is_set() or status == -signal.SIGXCPU:
            return {"error": f"the model's chat template took longer than {seconds:g} s on this conversation"}
        return {"error": f"the model's chat template ended its process (status {status}), as it does out of memory"}

    def _end(self) -> int:
        """Returns the exit status, negative for a signal; 0 where there was no process."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        process.kill()
        with contextlib.suppress(BrokenPipeError):  # what was not written yet
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def serve(memory: int) -> None:
    """The process itself: renders what comes on stdin until that ends. memory: bytes, as in `BoundedRenderer`."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    render_chat("", [], {})  # imports jinja2
    if sys.platform == "linux":
        import resource

        _limit(resource.RLIMIT_AS, memory)
        _limit(resource.RLIMIT_CORE, 0)
    replies.write(_frame({"text": ""}))
    replies.flush()
    while (request := _read(requests)) is not None:
        try:
            reply = _frame(_rendered(*request))
        except MemoryError:
            reply = _frame({"error": f"the model's chat template needs more than {memory / 2**20:g} MiB of memory"})
        replies.write(reply)
        replies.flush()


def _rendered(
    template: str, messages: Messages, names: Mapping[str, Any], options: dict[str, Any], seconds: float
) -> dict[str, str]:
    if sys.platform == "linux":  # it ends by itself even where nobody is left to kill it
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds) + 1)
    try:
        text = render_chat(template, messages, names, ChatOptions(**options))
    except AmqError as error:
        return {"error": str(error)}
    if len(text) > TEXT:
        return {"error": f"the model's chat template makes {len(text)} characters of this conversation, at most {TEXT}"}
    return {"text": text}


def _limit(what: int, value: int) -> None:
    import resource

    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _frame(value: Any) -> bytes:
    """JSON cannot spell half a character; Python's can, and it comes back as it was."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(data).to_bytes(HEADER, "big") + data


def _read(stream: IO[bytes]) -> Any:
    """The next value; None where the stream ended."""
    header = stream.read(HEADER)
    data = stream.read(int.from_bytes(header, "big")) if len(header) == HEADER else b""
    if len(header) < HEADER or len(data) < int.from_bytes(header, "big"):
        return None
    return json.loads(data.decode("utf-8", "surrogatepass"))
