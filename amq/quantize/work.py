"""The blocks that a quantization has finished, on disk, so that an interrupted run goes on after the last of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from amq.checkpoint import PARTS, QuantizationRecord, check_parts, hashes_metadata, open_file, verify_file
from amq.errors import AmqError
from amq.files import write_atomic, write_json
from amq.quantize.methods import BlockResult
from amq.records import parse_record, read_record, shorten
from amq.tensors import save_file


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
    """`.NAME.partial` beside the output folder NAME; gone once that is written.

    identity: what a block depends on; a folder of another identity is refused.
    Blocks of an earlier process are read back only as they were written: what a disk changed meanwhile must not get
    into a checkpoint under hashes of its own.
    """

    def __init__(self, output: Path, identity: dict[str, Any], record: QuantizationRecord, resume: bool) -> None:
        self.folder = partial_folder(output)
        self._record = record
        self._saved: set[int] = set()
        identity = json.loads(json.dumps(identity))  # as it comes back from disk
        if (self.folder / "identity.json").is_file():
            if not resume:
                raise AmqError(f"{self.folder} holds an interrupted run: add --resume to go on with it, or delete it")
            before = read_record(self.folder / "identity.json", dict[str, Any])
            changed = _differences(before, identity)
            if changed == ["inputs"]:  # every setting is the same: what does one stand for that has changed?
                inputs = before.get("inputs")
                changed = _differences(inputs if isinstance(inputs, dict) else {}, identity["inputs"])
            if changed:
                changed = [name for name in changed if name != "inputs"]
                raise AmqError(
                    f"--resume: {self.folder} was made with another {', '.join(changed)}: use the same settings and "
                    "model, or delete the folder"
                )
        write_json(self.folder / "identity.json", identity)

    def save(self, block: int, result: BlockResult) -> None:
        tensors = {f"packed/{n}.{p}": getattr(w, p).clone() for n, w in result.packed.items() for p in PARTS}
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
            if block not in self._saved:
                verify_file(path)
            return self._read(path)
        except (AmqError, SafetensorError) as error:
            raise AmqError(f"{path} is damaged ({error}): delete it and run the same command with --resume") from error

    def _read(self, path: Path) -> BlockResult:
        file = open_file(path)
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


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))


def partial_folder(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"
