"""What a long stage shows: a rich bar with ETA on a terminal, plain lines elsewhere; nothing when silent.

Code that works takes a `Progress` and says `with progress.stage("bank", total) as step: ... step("note")`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Step(Protocol):
    """Marks one step of a stage done."""

    def __call__(self, note: str = "") -> None: ...


def _silent(note: str = "") -> None:
    """The step of a stage that is not shown."""


class Progress:
    """Silent: the base class, for library use and tests."""

    def say(self, text: str) -> None:
        """One line for the user."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Step]:
        """A stage of `total` steps; the yielded function marks one step done and shows its note."""
        yield _silent


class LineProgress(Progress):
    """Plain lines on stderr, at most one every `every` seconds per stage."""

    def __init__(self, every: float = 10.0) -> None:
        self._every = every

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Step]:
        start = shown = time.monotonic()
        done = 0

        def step(note: str = "") -> None:
            nonlocal done, shown
            done += 1
            now = time.monotonic()
            if now - shown >= self._every or done == total:
                shown = now
                left = (now - start) / done * (total - done)
                eta = f", {left:.0f} s left" if done < total else f" in {now - start:.1f} s"
                self.say(f"{name}: {done}/{total}{eta}  {note}".rstrip())

        yield step


class RichProgress(Progress):
    """A bar per stage on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Step]:
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description:<12}"), bars.BarColumn(), bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(), bars.TimeRemainingColumn(), bars.TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with bars.Progress(*columns, console=self._console) as bar:
            task = bar.add_task(name, total=total, note="")

            def step(note: str = "") -> None:
                bar.update(task, advance=1, note=note)

            yield step


def terminal_progress() -> Progress:
    """The right kind for this process's stderr."""
    return RichProgress() if sys.stderr.isatty() else LineProgress()
