"""An engine in a process of its own: its memory is its own, and its crash ends nothing but itself."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from amq.errors import AmqError

PATIENCE = 900.0
"""Seconds that an answer may take before the process is given up."""


class ChildFailed(RuntimeError):
    """The process died, hung, or raised something that was no AmqError; the message says which."""


class ChildProcess:
    """Makes `make(*arguments)` in a new process; `call` calls its methods there. A context manager.

    make, arguments, and what methods take and return must be picklable. Both raise the
    process's AmqErrors, and ChildFailed.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads and memory
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        try:
            self._connection.send((method, arguments))
        except BrokenPipeError:
            raise self._death() from None
        return self._answer()

    def _answer(self) -> Any:
        if not self._connection.poll(PATIENCE):
            raise ChildFailed(f"no answer within {PATIENCE:.0f} s")
        try:
            value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(value, (AmqError, ChildFailed)):
            raise value
        return value

    def _death(self) -> ChildFailed:
        self._process.join(10)
        code = self._process.exitcode
        if code is not None and code < 0:
            return ChildFailed(f"its process was ended by {signal.Signals(-code).name}")
        return ChildFailed(f"its process ended with status {code}")

    def close(self) -> None:
        self._connection.close()  # the process ends when it finds nobody there
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    thing: Any = None
    while True:
        try:
            if thing is None:
                thing = make(*arguments)
                answer = None
            else:
                method, given = connection.recv()
                answer = getattr(thing, method)(*given)
        except EOFError:
            return
        except AmqError as error:
            answer = error
        except Exception:  # noqa: BLE001 (whatever it is, the other process is told)
            answer = ChildFailed(traceback.format_exc().strip())
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        if thing is None:
            return
