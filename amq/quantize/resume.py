"""The blocks that a quantization has finished, on disk, so that an interrupted run goes on after the last of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from amq.checkpoint.record import QuantizationRecord, check_parts
from amq.errors import AmqError
from amq.packing import PARTS
from amq.quantize.blocks import BlockResult
from amq.util.files import write_atomic, write_json
from amq.util.folders import ATTEMPTS, LOCK, Lock, work_folder
from amq.util.records import parse_record, read_record, shorten
from amq.util.tensors import hashes_metadata, open_file, save_file, verify_file

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Facts:
    """What a block's file says besides its tensors; errors: {linear: relative error}."""

    linears: list[str]
    errors: dict[str, float]
    notes: list[str]


def parse_facts(text: str) -> Facts:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AmqError(f"its facts are no JSON: {error}") from None
    return parse_record(data, Facts, "its facts")


class WorkFolder:
    """Finished blocks of the run that writes `output`, in `amq.util.folders.work_folder`; gone once that is written.

    Opened before the model is loaded, as a context: an interrupted run, another process or other settings are found
    then. `begin` follows when the model is known; blocks are saved and loaded after it.

    known: the part of the run's identity that the settings tell. A folder of another identity is refused.
    Blocks of an earlier process are read back only as they were written: what a disk changed meanwhile must not get
    into a checkpoint under hashes of its own.
    """

    def __init__(self, output: Path, known: Mapping[str, Any], resume: bool) -> None:
        self.folder = work_folder(output)
        self._record: QuantizationRecord | None = None
        self._saved: set[int] = set()
        self._lock = self._take(output)
        try:
            if self._begun:
                if not resume:
                    raise AmqError(
                        f"{self.folder} holds an interrupted run: add --resume to go on with it, or delete it"
                    )
                self._check(known, known.keys())
        except BaseException:
            self.close()
            raise

    def _take(self, output: Path) -> Lock:
        """The lock of the folder, which is made if it is not there."""
        for _ in range(ATTEMPTS):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = Lock(self.folder / LOCK)
            except FileNotFoundError:  # another process finished and removed it
                continue
            except OSError as error:
                raise AmqError(f"{self.folder} cannot be written: {error.strerror}; give another --output") from error
            if lock.take():
                return lock
            lock.release()
        raise AmqError(f"another process is writing --output {output} ({self.folder} is in use): wait for its end")

    def _check(self, identity: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
        """Refuses a run that was begun with another identity, as far as `names` go; None: all of them."""
        identity = json.loads(json.dumps(identity))  # as it comes back from disk
        before = read_record(self.folder / IDENTITY, dict[str, Any])
        changed = _differences(before, identity, names)
        if changed == ["inputs"]:  # every setting is the same: what does one stand for that has changed?
            inputs = before.get("inputs")
            changed = _differences(inputs if isinstance(inputs, dict) else {}, identity["inputs"])
        if changed:
            changed = [name for name in changed if name != "inputs"]
            raise AmqError(
                f"--resume: {self.folder} was made with another {', '.join(changed)}: use the same settings and "
                "model, or delete the folder"
            )

    def begin(self, identity: Mapping[str, Any], record: QuantizationRecord) -> None:
        """identity: what a block depends on, all of it. record: of the checkpoint that the blocks are for."""
        if self._begun:
            self._check(identity)
        write_json(self.folder / IDENTITY, identity)
        self._record = record

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the folder for other processes; without a finished block nothing is kept."""
        if self.folder.is_dir() and not self._begun:
            self.remove()
        self._lock.release()

    @property
    def _begun(self) -> bool:
        """Whether a run finished a block."""
        return any(self.folder.glob("block-*"))

    def finished(self, count: int) -> int:
        """How many of the blocks 0 to `count` − 1 are there."""
        return sum(self._path(block).is_file() for block in range(count))

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that are there."""
        return sum(path.stat().st_size for path in self.folder.glob("block-*"))

    def save(self, block: int, result: BlockResult) -> None:
        tensors = {f"packed/{n}.{p}": t.clone() for n, w in result.packed.items() for p, t in w.parts.items()}
        tensors |= {f"changed/{name}": value.cpu().clone() for name, value in result.changed.items()}
        facts = {"linears": list(result.packed), "errors": result.errors, "notes": result.notes}
        path, metadata = self._path(block), {**hashes_metadata(tensors), "facts": json.dumps(facts)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        self._saved.add(block)

    def load(self, block: int) -> BlockResult | None:
        """A finished block, its tensors mapped, or None. Raises AmqError for a file that is not what was written."""
        path = self._path(block)
        if not path.is_file():
            return None
        try:
            return self._read(open_file(path) if block in self._saved else verify_file(path))
        except (AmqError, SafetensorError) as error:
            raise AmqError(f"{path} is damaged ({error}): delete it and run the same command with --resume") from error

    def _read(self, file: Any) -> BlockResult:
        facts = parse_facts((file.metadata() or {}).get("facts", ""))

        def packed(linear: str) -> Any:
            if linear not in self._record.formats:
                raise AmqError(f"it holds {shorten(linear)}, which has no format")
            return check_parts(linear, self._record, *(file.get_tensor(f"packed/{linear}.{part}") for part in PARTS))

        changed: dict[str, Tensor] = {
            name.removeprefix("changed/"): file.get_tensor(name) for name in file.keys() if name.startswith("changed/")
        }
        return BlockResult({n: packed(n) for n in facts.linears}, changed, facts.errors, facts.notes)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    return sorted(k for k in names or before.keys() | now.keys() if before.get(k) != now.get(k))
