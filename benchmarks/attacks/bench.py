"""What the attacks share: how large they are, the servers that they get, and what a row of the table says."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from serving import Launch, Served, launched, memory
from witness import Seen, Witness

MIB = 2**20
VICTIM, ATTACKER, SECOND = "127.0.0.1", "127.0.0.2", "127.0.0.3"
"""Loopback addresses: to the server they are three machines."""

MORE_PAUSE = 0.2
"""Seconds by which an attack may lengthen the longest pause of another's stream, or /health: issue 15's target."""

MORE_SECOND = 1.0
"""Seconds by which it may lengthen the small answer that a second client waits for."""

MORE_MEMORY = 256
"""MiB that it may make the server take."""


@dataclass(frozen=True)
class Size:
    """How much of each. body: bytes of a long prompt. patience: seconds until an answer counts as none."""

    quiet: float = 3.0
    body: int = 2**20 - 300
    prompts: int = 4
    messages: int = 34_000
    wrong: int = 520_000
    flood: int = 40
    medium: int = 1700
    """Words of the prompt that the second client sends into the flood."""
    uploads: int = 300
    idle: int = 1100
    open_files: int = 1024
    hold: float = 10.0
    slow: int = 20
    wait: float = 20.0
    patience: float = 12.0
    stall: float = 2.0
    stream: int = 1000
    bomb: int = 1_500_000_000
    loop: int = 99_999
    delay: float = 0.0


SMOKE = Size(
    quiet=0.2, body=2**14, prompts=1, messages=200, wrong=2000, flood=3, medium=50, uploads=3, idle=40, open_files=256,
    hold=0.2, slow=2, wait=0.3, patience=60.0, stall=0.4, stream=200, bomb=1000, loop=10, delay=0.002,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What came of an attack. quiet, seen: the witness's, before and during. good: None where it could not be tried.

    memory: the server's resident bytes before, at the peak, after.
    """

    attack: str
    did: str
    target: str
    happened: str
    good: bool | None
    quiet: Seen | None = None
    seen: Seen | None = None
    memory: tuple[int, int, int] | None = None

    @property
    def verdict(self) -> str:
        return {None: "left out", True: "held", False: "did not hold"}[self.good]

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Bench:
    """folder: the checkpoint; None for the engine that repeats prompts. arguments: for every server."""

    folder: Path | None
    arguments: Sequence[str]
    size: Size
    how: Launch
    note: Callable[[str], None] = print
    made: list[Path] = field(default_factory=list)

    @contextmanager
    def server(self, *arguments: str, folder: Path | None = None, **how: Any) -> Iterator[Served]:
        """A server with the bench's arguments and these; `how` as in Launch."""
        launch = replace(self.how, delay=self.size.delay, **how)
        with launched(folder or self.folder, [*self.arguments, *arguments], launch) as server:
            yield server

    @cached_property
    def help(self) -> str:
        """What `amq serve --help` says in the checkout that is attacked: which flags there are."""
        command = [self.how.python, "-m", "amq.serve", "--help"]
        environment = {**os.environ, "PYTHONPATH": str(self.how.source)}
        return subprocess.run(command, env=environment, cwd=self.how.source, capture_output=True, text=True).stdout

    def flags(self, *wanted: str) -> list[str]:
        """`wanted` (a flag and its value) where this amq has the flag, else nothing."""
        return list(wanted) if f"{wanted[0]} " in self.help else []

    @contextmanager
    def with_template(self, template: str) -> Iterator[Path]:
        """The model's folder with another chat template; the large files are links."""
        with tempfile.TemporaryDirectory(prefix="amq-template-") as temporary:
            folder = Path(temporary, "model")
            folder.mkdir()
            for path in self.folder.iterdir() if self.folder else ():
                if path.suffix == ".safetensors":
                    (folder / path.name).symlink_to(path.resolve())
                elif path.is_file():
                    shutil.copy(path, folder / path.name)
            (folder / "chat_template.jinja").write_text(template)
            yield folder

    def beside(self, server: Served, attack: str, did: str, act: Callable[[], str], most: int = MORE_MEMORY) -> Row:
        """Runs `act`, which says what it got, beside a stream, a second client and /health.

        most: MiB by which the server may grow.
        """
        client, second = server.client(VICTIM), server.client(SECOND)
        with Witness(server, client, second, self.size.stream) as witness:
            began = time.monotonic()
            time.sleep(self.size.quiet)
            start = time.monotonic()
            with Memory(server.process) as watched:
                said = act()
                time.sleep(self.size.quiet / 4)
            end = time.monotonic()
            witness.stop()
            quiet, seen = witness.seen(began, start), witness.seen(start, end)
        target = f"stream and /health {MORE_PAUSE} s, second client {MORE_SECOND} s above quiet; memory +{most} MiB"
        good = (
            seen.pause <= quiet.pause + MORE_PAUSE
            and seen.health <= quiet.health + MORE_PAUSE
            and seen.second <= quiet.second + MORE_SECOND
            and watched.peak - watched.before <= most * MIB
            and not (seen.refused or seen.unwell or seen.broken)
        )
        happened = f"{said}; it took {end - start:.1f} s" + trouble(seen)
        return Row(attack, did, target, happened, good, quiet, seen, (watched.before, watched.peak, watched.after))


def trouble(seen: Seen) -> str:
    """What went wrong for others, "" for nothing."""
    said = [f"second client got {', '.join(map(str, seen.refused))}"] if seen.refused else []
    said += [f"/health said {', '.join(map(str, seen.unwell))}"] if seen.unwell else []
    said += [f"the stream broke: {seen.broken[0]!r}"] if seen.broken else []
    return "".join(f"; {part}" for part in said)


class Memory:
    """Resident bytes of a server and its children: before, at most (looked at every 20 ms), after."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._done = process, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self.before = self.peak = memory(self._process)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.after = memory(self._process)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            with suppress(psutil.Error):
                self.peak = max(self.peak, memory(self._process))
