"""A run folder: one reader that changes nothing, and the search's own writer.

`RunFolder.open(path)` reads run.json; every other file is read when it is first asked for, and is None where the run
has none (a search that goes on, a solver without a cost table). Nothing is written, not even a lock, so a run may be
read while a search appends to it. `RunFolder.create(path, space)` is for that search: it makes the folder or takes it
up again, and holds the lock on its archive until `close`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import TracebackType

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.model.inventory import Inventory
from amq.model.speed_table import SpeedTable
from amq.search.archive import Archive, Record, read_archive
from amq.search.front_file import Front
from amq.search.records import Cost, RunFile, SurrogateScores
from amq.search.sensitivity import Sensitivity
from amq.search.settings import SearchSettings
from amq.search.share import Shares
from amq.search.space import SearchSpace
from amq.util.files import write_json
from amq.util.records import read_record, to_json

ARCHIVE = "archive.jsonl"
CONFIGURATION = "configuration.json"
SURROGATE = "surrogate.json"
NAMES: dict[type, str] = {
    RunFile: "run.json", Front: "front.json", Cost: "cost.json", Sensitivity: "sensitivity.json",
    SpeedTable: "speed.json", Shares: "context.json",
}  # fmt: skip


class RunFolder:
    """What the run in the folder `path` says; every property raises AmqError for a file that is damaged."""

    def __init__(self, path: Path, run: RunFile) -> None:
        self.path, self.run = path, run

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Raises AmqError for a folder that is none of a search's, or whose run.json is damaged."""
        if not (path / NAMES[RunFile]).is_file():
            raise AmqError(
                f"{path} is not a run folder, it holds no {NAMES[RunFile]}: give the folder that "
                "`python -m amq.search MODEL --output RUN` wrote"
            )
        return RunFolder(path, RunFile.read(path / NAMES[RunFile]))

    @staticmethod
    def create(path: Path, space: SearchSpace) -> RunWriter:
        """For the search itself: raises AmqError where another one is writing, or where the archive is damaged."""
        return RunWriter(path, Archive(path / ARCHIVE, space))

    @property
    def settings(self) -> SearchSettings:
        return self.run.settings

    @cached_property
    def inventory(self) -> Inventory:
        return self.run.inventory

    @cached_property
    def space(self) -> SearchSpace:
        return SearchSpace.of(self.inventory, self.settings)

    @cached_property
    def archive(self) -> tuple[Record, ...]:
        """All evaluations so far, each of a configuration of `space`; empty before the first."""
        path = self.path / ARCHIVE
        return tuple(read_archive(path, self.space)) if path.is_file() else ()

    @cached_property
    def front(self) -> Front | None:
        path = self._file(NAMES[Front])
        return Front.read(path) if path else None

    @cached_property
    def cost(self) -> Cost | None:
        return read_cost(self.path, self.space)

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        path = self._file(NAMES[Sensitivity])
        return Sensitivity.read(path) if path else None

    @cached_property
    def speed(self) -> SpeedTable | None:
        """Of a search that asked how long a token takes."""
        path = self._file(NAMES[SpeedTable])
        return SpeedTable.read(path) if path else None

    @cached_property
    def shares(self) -> Shares | None:
        """Of a search that shared its memory between weights and cache."""
        path = self._file(NAMES[Shares])
        return Shares.read(path) if path else None

    @cached_property
    def surrogate(self) -> tuple[SurrogateScores, ...] | None:
        """One entry per iteration of the paper's solver."""
        path = self._file(SURROGATE)
        return read_record(path, tuple[SurrogateScores, ...]) if path else None

    @cached_property
    def configuration(self) -> Configuration | None:
        """What the search chose."""
        path = self._file(CONFIGURATION)
        return Configuration.load(path) if path else None

    def _file(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None


def read_cost(folder: Path, space: SearchSpace) -> Cost | None:
    """The cost table of a run over `space`, None where it has none (yet)."""
    path = folder / NAMES[Cost]
    if not path.is_file():
        return None
    cost = Cost.read(path)
    cost.check(space, path)
    return cost


class RunWriter:
    """A run folder that a search writes: `archive` is open and locked until `close`."""

    def __init__(self, path: Path, archive: Archive) -> None:
        self.path, self.archive = path, archive

    def write(self, record: RunFile | Front | Cost | Sensitivity | SpeedTable | Shares) -> None:
        record.write(self.path / NAMES[type(record)])

    def write_configuration(self, configuration: Configuration) -> None:
        configuration.save(self.path / CONFIGURATION)

    def write_surrogate(self, scores: list[SurrogateScores]) -> None:
        write_json(self.path / SURROGATE, to_json(scores))

    def close(self) -> None:
        self.archive.close()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
