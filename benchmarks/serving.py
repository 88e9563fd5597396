"""Servers in processes of their own, and plain HTTP to them: for the benchmarks that look at a server from outside.

    with launched(folder, ["--queue", "8"]) as server:
        server.post("/v1/completions", {"model": server.model, "prompt": "The sea"}).json

`folder` None is a server around the tests' engine that repeats prompts, forked from this process: it is there in a
moment, for `--smoke`. `source` is the checkout whose amq is run (an older commit's worktree, to compare with it).
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 180.0
FAKE_NAME = "fake"


@dataclass(frozen=True)
class Answer:
    """status 0: the server did not answer, `body` says why. seconds: from sending to the last byte."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def __str__(self) -> str:
        if not self.status:
            return f"no answer ({self.body.decode()})"
        return f"{self.status} after {self.seconds:.2f} s"


@dataclass(frozen=True)
class Client:
    """Somebody who sends requests: from an address of this machine's own (127.0.0.0/8), with a key or without."""

    port: int
    address: str = "127.0.0.1"
    key: str = ""

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 120.0,
    ) -> Answer:
        """body: bytes as they are, anything else as JSON."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        start = time.monotonic()
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=timeout, source_address=(self.address, 0)
        )
        try:
            wanted = {"Content-Type": "application/json", "Connection": "close", **self.headers(), **(headers or {})}
            connection.request(method, path, content, wanted)
            response = connection.getresponse()
            body = response.read()
            return Answer(response.status, dict(response.getheaders()), body, time.monotonic() - start)
        except (OSError, http.client.HTTPException) as error:
            return Answer(0, {}, repr(error).encode(), time.monotonic() - start)
        finally:
            connection.close()

    def connect(self, timeout: float = 20.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout, source_address=(self.address, 0))

    def head(self, path: str, length: int) -> bytes:
        """The head of a POST whose body will have `length` bytes."""
        lines = ["Host: localhost", "Content-Type: application/json", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in self.headers().items()]
        return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode()


@dataclass(frozen=True)
class Served:
    """A server that runs. log: its stderr, where it is kept."""

    url: str
    port: int
    model: str
    process: psutil.Process
    log: Path | None = None

    def client(self, address: str = "127.0.0.1", key: str = "") -> Client:
        return Client(self.port, address, key)

    def words(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace") if self.log else ""


@dataclass(frozen=True)
class Launch:
    """How a server is started. python, source: whose amq runs. fault: of `serve_process.FAULTS`, after so many passes.

    open_files: its limit of descriptors. template: a chat template instead of the model's own.
    """

    python: str = sys.executable
    source: Path = ROOT
    fault: str = ""
    after: int = 0
    delay: float = 0.0
    open_files: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, folder: Path | None, arguments: Sequence[str], log: Any = None) -> psutil.Process:
        if folder is None:
            return self._forked(arguments, log)
        command = [self.python, "-m", "amq.serve"]
        if self.fault:
            how = ["--fault", self.fault, "--after", str(self.after)]
            command = [self.python, str(Path(__file__).with_name("serve_process.py")), *how]
        environment = {**os.environ, "PYTHONPATH": str(self.source), **self.environment}
        return psutil.Popen(  # in `source`: with -m, Python looks where it runs before anywhere else
            [*command, str(folder.resolve()), *arguments],
            env=environment, cwd=self.source, stderr=log, preexec_fn=self._limit if self.open_files else None,
        )  # fmt: skip

    def _forked(self, arguments: Sequence[str], log: Any) -> psutil.Process:
        from serve_process import preload, serve

        preload()
        if pid := os.fork():
            return psutil.Process(pid)
        code = 1
        try:
            if log is not None:
                os.dup2(log.fileno(), 2)
            if self.open_files:
                self._limit()
            os.environ.update(self.environment)
            code = serve([FAKE_NAME, *arguments], fake=True, fault=self.fault, after=self.after, delay=self.delay)
        except Exception:  # noqa: BLE001 (the child must not go on as a copy of this process)
            traceback.print_exc()
        finally:
            os._exit(code)

    def _limit(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (self.open_files, self.open_files))


@contextmanager
def launched(folder: Path | None, arguments: Sequence[str] = (), how: Launch | None = None) -> Iterator[Served]:
    """A server that answers; it is ended at the end, whatever state it is in."""
    how = how or Launch()
    port = free_port()
    with tempfile.NamedTemporaryFile("w+", prefix="amq-serve-", suffix=".log") as log:
        process = how.start(folder, ["--port", str(port), *arguments], log)
        try:
            wait_until_it_answers(process, port, [str(folder), *arguments], Path(log.name))
            name = folder.resolve().name if folder else FAKE_NAME
            yield Served(f"http://127.0.0.1:{port}", port, name, process, Path(log.name))
        except Exception:
            print(Path(log.name).read_text(errors="replace")[-4000:], file=sys.stderr)  # what the server said of it
            raise
        finally:
            end(process)


@contextmanager
def serving(folder: Path, arguments: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """A server on `folder` that answers, its words on stderr; ended at the end, with status 0 or else RuntimeError."""
    port = free_port()
    process = Launch().start(folder, ["--port", str(port), *arguments])
    try:
        wait_until_it_answers(process, port, [str(folder), *arguments])
        yield f"http://127.0.0.1:{port}", process
        process.terminate()
        if status := process.wait(START_SECONDS):
            raise RuntimeError(f"the server ended with status {status}")
    finally:
        end(process)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_it_answers(
    process: psutil.Process, port: int, arguments: Sequence[str], log: Path | None = None
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while Client(port).call("GET", "/health", timeout=5).status != 200:
        if not running(process) or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-2000:] if log else ""
            raise RuntimeError(f"the server did not start: amq serve {shlex.join(arguments)}\n{said}")
        time.sleep(0.05)


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def end(process: psutil.Process) -> int | None:
    """Kills it where it still runs; its status."""
    if running(process):
        process.kill()
    return process.wait(START_SECONDS)


def memory(process: psutil.Process) -> int:
    """Resident bytes of it and of the processes that it started; 0 where it has ended."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        return total
    return total


def completion(model: str, prompt: str = "The sea", **options: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, **options}


def chat(model: str, text: str = "Hi", **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0, **options}


def tiny_folder(folder: Path) -> Path:
    """A tiny random Llama with a tokenizer of bytes."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.tiny_models import byte_tokenizer, tiny_llama

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
