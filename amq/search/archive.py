"""The archive: one true evaluation per line of `archive.jsonl`, appended and fsynced before the search goes on.

It is also the memo that makes resuming exact: a resumed search runs from its beginning, and every evaluation it asks
for that is already in the archive is answered from it, so the lines that follow are those of an uninterrupted run. A
line cut short by a crash is dropped with a warning and evaluated again.

`Archive` is the search's own, open for writing and locked against a second search in the folder; whoever else reads
the file, perhaps while a search appends to it, does so by `read_archive` and changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from sys import intern

from amq.configuration import compact, configuration_key, expand
from amq.errors import AmqError
from amq.search.space import SearchSpace
from amq.util.files import check_path, is_disk_full, make_folder, reason
from amq.util.records import check_range, parse_record, to_json

log = logging.getLogger(__name__)

ROUNDING = 1e-4
"""Nearly equal distributions come out this far below a divergence of 0 at most; no loss was measured further down."""
BITS_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Record:
    """One evaluation, a line of an archive; loss: in the unit of the run's objective, None where the
    candidate was infeasible."""

    index: int
    solver: str
    phase: str
    windows: str
    bits_per_weight: float
    loss: float | None
    seconds: float
    seed: int
    iteration: int | None = None
    configuration: dict[str, str]

    def __post_init__(self) -> None:
        check_range(self, "index", "seconds", "bits_per_weight", least=0)
        check_range(self, "loss", least=-ROUNDING)

    @property
    def key(self) -> str:
        """Equal for records of equal configurations."""
        return configuration_key(self.configuration)

    @property
    def ranked(self) -> float:
        """The loss to compare by: an infeasible candidate's is infinite."""
        return math.inf if self.loss is None else self.loss


def read_archive(path: Path, space: SearchSpace | None = None) -> Iterator[Record]:
    """The records of an archive that may be another process's; a last line without its end is left out.

    space: every configuration must be one of it, with its bits per weight. Raises AmqError naming the line at fault.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):  # its rest may come at any moment
                    return
                yield _record(line, number, path, space)
    except OSError as error:
        raise AmqError(f"{path} cannot be read: {reason(error)}") from error


def _record(line: bytes, index: int, path: Path, space: SearchSpace | None) -> Record:
    try:
        record = parse_record(json.loads(line), Record, "the record")
        record = replace(record, configuration=expand(record.configuration))
        if record.index != index:
            raise ValueError(f"expected record {index}, got {record.index}")
        if space is not None:
            space.check(record.configuration)
            bits = space.bits_of(record.configuration)
            if abs(record.bits_per_weight - bits) > 10**-BITS_DIGITS:
                raise ValueError(f"expected {bits:.6f} bits per weight, got {record.bits_per_weight}")
    except (ValueError, RecursionError) as error:
        why = str(error).partition("; the file is damaged")[0]
        raise AmqError(f"{path} line {index + 1} is damaged ({why[:300]}): restore it or start a new run") from None
    # each name once: 10,000 lines of 224 linears take 73 MiB instead of 415
    once = {intern(linear): intern(fmt) for linear, fmt in record.configuration.items()}
    return replace(record, configuration=once)


class Archive:
    """Append-only list of records; `path` may exist (resume) or not. One at a time: a second one is refused."""

    def __init__(self, path: Path, space: SearchSpace | None = None) -> None:
        """space: as for `read_archive`. Raises AmqError for a damaged file, and where another process writes it."""
        check_path(path)
        make_folder(path.parent)
        self._path = path
        self.records: list[Record] = []
        self._by_key: dict[tuple[str, str], Record] = {}
        self._descriptor = self._open()
        try:
            for record in read_archive(path, space):
                self._remember(record)
            self._size = self._drop_rest()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            full = "the disk is full: " * is_disk_full(error)
            raise AmqError(f"{full}{self._path} cannot be opened: {reason(error)}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise AmqError(
                f"{self._path} is being written by another search: wait for it, or give another --output"
            ) from None
        except OSError as error:  # a file system without locks
            log.debug("%s cannot be locked: %s", self._path, error)
        return descriptor

    def _drop_rest(self) -> int:
        """Cuts a line that a crash left without its end; returns the size of the whole lines."""
        data = self._path.read_bytes()
        size = data.rfind(b"\n") + 1
        if len(data) > size:
            log.warning(
                "%s ends in a truncated line (%d bytes): dropped, it will be evaluated again",
                self._path, len(data) - size,
            )  # fmt: skip
            os.ftruncate(self._descriptor, size)
        return size

    def _remember(self, record: Record) -> None:
        self.records.append(record)
        self._by_key[record.key, record.windows] = record

    def find(self, configuration: Mapping[str, str], windows: str = "search") -> Record | None:
        """The record of a configuration on a window set, if it was evaluated."""
        return self._by_key.get((configuration_key(configuration), windows))

    def append(
        self,
        configuration: Mapping[str, str],
        loss: float,
        bits_per_weight: float,
        seconds: float,
        *,
        solver: str,
        phase: str,
        windows: str,
        seed: int,
        iteration: int | None = None,
    ) -> Record:
        """Adds one evaluation, on disk before it returns. A loss that is not finite is stored as null: infeasible.

        Where that fails nothing is added, and it may be tried again.
        """
        record = Record(
            index=len(self.records), solver=solver, phase=phase, windows=windows,
            bits_per_weight=round(bits_per_weight, BITS_DIGITS), loss=loss if math.isfinite(loss) else None,
            seconds=round(seconds, 3), seed=seed, iteration=iteration, configuration=dict(configuration),
        )  # fmt: skip
        try:
            short = replace(record, configuration=compact(record.configuration))
            self._write(json.dumps(to_json(short), separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            if is_disk_full(error):
                raise AmqError(
                    f"the disk is full: could not append to {self._path}; free space and use --resume"
                ) from error
            raise AmqError(f"could not append to {self._path}: {reason(error)}; use --resume") from error
        self._remember(record)
        return record

    def _write(self, line: bytes) -> None:
        """Unbuffered, so that a line that does not fit is not tried again by `close`, over the error that it caused."""
        if os.fstat(self._descriptor).st_size != self._size:  # part of a line that failed
            os.ftruncate(self._descriptor, self._size)
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)
        self._size += len(line)

    def evaluated(self, windows: str = "search") -> list[Record]:
        """Feasible records on a window set, in order."""
        return [r for r in self.records if r.windows == windows and r.loss is not None]

    def close(self) -> None:
        """Lets go of the file. Every line is synced, so nothing is lost where that fails, and no error is hidden."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1
