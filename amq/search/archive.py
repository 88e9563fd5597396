"""The archive: one true evaluation per line of `archive.jsonl`, appended and fsynced before the search goes on.

It is also the memo that makes resuming exact: a resumed search runs from its beginning, and every evaluation it asks
for that is already in the archive is answered from it, so the lines that follow are those of an uninterrupted run. A
line cut short by a crash is dropped with a warning and evaluated again.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amq.configuration import configuration_key
from amq.errors import AmqError
from amq.files import is_disk_full

log = logging.getLogger(__name__)

Record = dict[str, Any]
FIELDS = ("index", "solver", "phase", "windows", "configuration", "bits_per_weight", "loss", "seconds", "seed")


class Archive:
    """Append-only list of records; `path` may exist (resume) or not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[Record] = []
        self._by_key: dict[tuple[str, str], Record] = {}
        if path.exists():
            self._load()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 - kept open for the life of the archive

    def _load(self) -> None:
        data = self._path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        if rest:
            log.warning(
                "%s ends in a truncated line (%d bytes): dropped, it will be evaluated again", self._path, len(rest)
            )
            with open(self._path, "r+b") as file:
                file.truncate(len(data) - len(rest))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if record["index"] != len(self.records) or any(field not in record for field in FIELDS):
                    raise ValueError(f"expected record {len(self.records)} with fields {', '.join(FIELDS)}")
            except (ValueError, KeyError, TypeError) as error:
                raise AmqError(
                    f"{self._path} line {number} is damaged ({error}): restore it or start a new run"
                ) from None
            self._remember(record)

    def _remember(self, record: Record) -> None:
        self.records.append(record)
        self._by_key[configuration_key(record["configuration"]), record["windows"]] = record

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
        **extra: Any,
    ) -> Record:
        """Adds one evaluation, on disk before it returns. A loss that is not finite is stored as null: infeasible."""
        record = {
            "index": len(self.records), "solver": solver, "phase": phase, "windows": windows,
            "bits_per_weight": round(bits_per_weight, 6), "loss": loss if math.isfinite(loss) else None,
            "seconds": round(seconds, 3), "seed": seed, **extra, "configuration": dict(configuration),
        }  # fmt: skip
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            if is_disk_full(error):
                raise AmqError(
                    f"the disk is full: could not append to {self._path}; free space and use --resume"
                ) from error
            raise
        self._remember(record)
        return record

    def evaluated(self, windows: str = "search") -> list[Record]:
        """Feasible records on a window set, in order."""
        return [r for r in self.records if r["windows"] == windows and r["loss"] is not None]

    def close(self) -> None:
        self._file.close()
