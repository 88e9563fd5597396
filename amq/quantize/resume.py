"""The blocks that a quantization has finished, on disk, so that an interrupted run goes on after the last of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from amq.checkpoint.record import QuantizationRecord, check_parts
from amq.errors import AmqError
from amq.packing import PARTS, PackedWeight
from amq.quantize.blocks import BlockResult
from amq.quantize.settings import QuantizeSettings
from amq.util.files import write_json
from amq.util.folders import ATTEMPTS, LOCK, Lock, work_folder
from amq.util.records import parse_record, read_record, shorten, to_json
from amq.util.tensors import hashes_metadata, open_file, save_tensors, verify_file

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Facts:
    """What a block's file says besides its tensors; errors: {linear: relative error}; rotation: {linear: width} where
    it is rotated."""

    linears: list[str]
    errors: dict[str, float]
    notes: list[str]
    rotation: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """identity.json: what a finished block depends on, which a resumed run must have the same.

    Before the model is loaded only settings are known; model (a fingerprint), formats, group_size and inputs follow.
    inputs: hashes of what names in the settings stand for, such as the calibration text. rotation: with what the
        configuration and the method say.
    """

    method: str
    zero_points: str
    calibration: str
    windows: int
    window_length: int
    seed: int
    dtype: str
    autoround_iterations: int | None = None
    model: str | None = None
    formats: dict[str, str] | None = None
    group_size: int | None = None
    rotation: str | None = None
    inputs: dict[str, str] | None = None

    @staticmethod
    def of(settings: QuantizeSettings) -> Identity:
        names = ("method", "zero_points", "calibration", "windows", "window_length", "seed", "dtype")
        iterations = settings.autoround_iterations if settings.method == "autoround" else None
        return Identity(**{name: getattr(settings, name) for name in names}, autoround_iterations=iterations)


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

    def __init__(self, output: Path, known: Identity, resume: bool) -> None:
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
                self._check(known)
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

    def _check(self, identity: Identity) -> None:
        """Refuses a run that was begun with another identity, as far as this one is known."""
        before, now = to_json(read_record(self.folder / IDENTITY, Identity)), to_json(identity)
        changed = _differences(before, now)
        if changed == ["inputs"]:  # every setting is the same: what does one stand for that has changed?
            changed = _differences(before.get("inputs", {}), now["inputs"])
        if changed:
            changed = [name for name in changed if name != "inputs"]
            raise AmqError(
                f"--resume: {self.folder} was made with another {', '.join(changed)}: use the same settings and "
                "model, or delete the folder"
            )

    def begin(self, identity: Identity, record: QuantizationRecord) -> None:
        """identity: what a block depends on, all of it. record: of the checkpoint that the blocks are for, which know
        their rotations themselves."""
        if self._begun:
            self._check(identity)
        write_json(self.folder / IDENTITY, to_json(identity))
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
        return sum(self.has(block) for block in range(count))

    def has(self, block: int) -> bool:
        return self._path(block).is_file()

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that are there."""
        return sum(path.stat().st_size for path in self.folder.glob("block-*"))

    def save(self, block: int, result: BlockResult) -> None:
        tensors = {
            f"packed/{n}.{p}": t.to("cpu", copy=True) for n, w in result.packed.items() for p, t in w.parts.items()
        }
        tensors |= {f"changed/{name}": value.to("cpu", copy=True) for name, value in result.changed.items()}
        rotation = {name: packed.rotation for name, packed in result.packed.items() if packed.rotation}
        facts = Facts(list(result.packed), result.errors, result.notes, rotation)
        save_tensors(self._path(block), tensors, {**hashes_metadata(tensors), "facts": json.dumps(to_json(facts))})
        self._saved.add(block)

    def load(self, block: int) -> BlockResult:
        """A finished block, its tensors mapped. Raises AmqError for a file that is not what was written."""
        path = self._path(block)
        try:
            return self._read(open_file(path) if block in self._saved else verify_file(path))
        except (AmqError, SafetensorError) as error:
            raise AmqError(f"{path} is damaged ({error}): delete it and run the same command with --resume") from error

    def _read(self, file: Any) -> BlockResult:
        facts, record = parse_facts((file.metadata() or {}).get("facts", "")), self._record
        if record is None:
            raise AmqError("a block was read before `begin` said what it is for")
        record = replace(record, rotation=facts.rotation)

        def packed(linear: str) -> PackedWeight:
            if linear not in record.formats:
                raise AmqError(f"it holds {shorten(linear)}, which has no format")
            return check_parts(linear, record, *(file.get_tensor(f"packed/{linear}.{part}") for part in PARTS))

        changed: dict[str, Tensor] = {
            name.removeprefix("changed/"): file.get_tensor(name) for name in file.keys() if name.startswith("changed/")
        }
        return BlockResult({n: packed(n) for n in facts.linears}, changed, facts.errors, facts.notes)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in now if before.get(name) != now[name])
