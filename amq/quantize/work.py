"""The blocks that a quantization has finished, on disk, so that an interrupted run goes on after the last of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from amq.checkpoint import PARTS, QuantizationRecord, check_parts, open_file
from amq.errors import AmqError
from amq.files import read_json, write_atomic, write_json
from amq.quantize.methods import BlockResult
from amq.tensors import save_file


class WorkFolder:
    """`.NAME.partial` beside the output folder NAME; gone once that is written.

    identity: what a block depends on; a folder of another identity is refused.
    """

    def __init__(self, output: Path, identity: dict[str, Any], record: QuantizationRecord, resume: bool) -> None:
        self.folder = partial_folder(output)
        self._record = record
        identity = json.loads(json.dumps(identity))  # as it comes back from disk
        if (self.folder / "identity.json").is_file():
            if not resume:
                raise AmqError(f"{self.folder} holds an interrupted run: add --resume to go on with it, or delete it")
            before = read_json(self.folder / "identity.json")
            changed = sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k))
            if changed:
                raise AmqError(
                    f"--resume: {self.folder} was made with another {', '.join(changed)}: use the same settings and "
                    "model, or delete the folder"
                )
        write_json(self.folder / "identity.json", identity)

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


def partial_folder(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"
