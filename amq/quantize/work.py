"""The blocks that a quantization has finished, on disk, so that an interrupted run goes on after the last of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from amq.checkpoint import PARTS, QuantizationRecord, check_parts, open_file
from amq.errors import AmqError
from amq.files import read_json, write_atomic, write_json
from amq.folders import ATTEMPTS, LOCK, Lock, work_folder
from amq.quantize.methods import BlockResult
from amq.tensors import save_file

IDENTITY = "identity.json"


class WorkFolder:
    """Finished blocks of the run that writes `output`, in `amq.folders.work_folder`; gone once that is written.

    Opened before the model is loaded, as a context: an interrupted run, another process or other settings are found
    then. `begin` follows when the model is known; blocks are saved and loaded after it.

    known: the part of the run's identity that the settings tell. A folder of another identity is refused.
    """

    def __init__(self, output: Path, known: Mapping[str, Any], resume: bool) -> None:
        self.folder = work_folder(output)
        self._record: QuantizationRecord | None = None
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

    def _check(self, identity: Mapping[str, Any], names: Iterable[str]) -> None:
        """Refuses a run that was begun with another identity, as far as `names` go."""
        identity = json.loads(json.dumps(identity))  # as it comes back from disk
        before = read_json(self.folder / IDENTITY)
        changed = sorted(k for k in names if before.get(k) != identity.get(k))
        if changed:
            raise AmqError(
                f"--resume: {self.folder} was made with another {', '.join(changed)}: use the same settings and "
                "model, or delete the folder"
            )

    def begin(self, identity: Mapping[str, Any], record: QuantizationRecord) -> None:
        """identity: what a block depends on, all of it. record: of the checkpoint that the blocks are for."""
        if self._begun:
            self._check(identity, read_json(self.folder / IDENTITY).keys() | identity.keys())
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
        tensors = {f"packed/{n}.{p}": getattr(w, p).clone() for n, w in result.packed.items() for p in PARTS}
        tensors |= {f"changed/{name}": value.cpu().clone() for name, value in result.changed.items()}
        facts = {"linears": list(result.packed), "errors": result.errors, "notes": result.notes}
        path = self._path(block)
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"facts": json.dumps(facts)}))

    def load(self, block: int) -> BlockResult | None:
        """A finished block, its tensors mapped, or None."""
        if not self._path(block).is_file():
            return None
        file = open_file(self._path(block))
        facts = json.loads(file.metadata()["facts"])

        def packed(linear: str) -> Any:
            return check_parts(linear, self._record, *(file.get_tensor(f"packed/{linear}.{part}") for part in PARTS))

        changed: dict[str, Tensor] = {
            name.removeprefix("changed/"): file.get_tensor(name) for name in file.keys() if name.startswith("changed/")
        }
        return BlockResult({n: packed(n) for n in facts["linears"]}, changed, facts["errors"], facts["notes"])

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:03d}.safetensors"
