"""What a party keeps on disk to go on from: one file per durable step, written whole, of which the last few are kept.

    OUTPUT/state/step-00000040.safetensors     tensors of the party, a hash of each, and the terms of the run

Step n is the state before step n. Both parties write at the same steps and are at most one such step apart, so two
files are enough to have one in common; three are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from amq.errors import AmqError
from amq.split.terms import Terms, check_agreement
from amq.util.files import make_folder
from amq.util.folders import Lock
from amq.util.tensors import hashes_metadata, open_file, save_tensors, verify_file

KEPT = 3
TERMS = "amq_split_terms"
FOLDER, LOCK = "state", "lock"


class States:
    """The states in the folder of one party's run."""

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER

    def hold(self) -> None:
        """Keeps the folder for this process while it lives. Raises AmqError where another one is at work in it."""
        make_folder(self.folder)
        self._lock = Lock(self.folder / LOCK)
        if not self._lock.take():
            raise AmqError(f"another process is at work in {self.folder.parent}: end it, or give another --output")

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """Durable steps, rising."""
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"step-(\d{8,})\.safetensors", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def check_new(self, resume: bool) -> None:
        """Raises AmqError where a run would overwrite another that has got beyond its start."""
        if resume:
            return
        if any(self.steps()):
            raise AmqError(
                f"{self.folder.parent} has the states of an earlier run: add --resume, or give another --output"
            )
        self.drop_after(-1)

    def save(self, step: int, tensors: Mapping[str, Tensor], terms: Terms) -> None:
        make_folder(self.folder)
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_tensors(self.path(step), plain, {**hashes_metadata(plain), TERMS: json.dumps(terms.json())})
        for old in self.steps()[:-KEPT]:
            self.path(old).unlink(missing_ok=True)

    def terms(self) -> Terms | None:
        """Of the run that the newest state is of."""
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        text = (open_file(path).metadata() or {}).get(TERMS, "")
        try:
            data = json.loads(text)
        except ValueError:
            raise AmqError(f"{path} does not say which run it is of: it was not written by amq split") from None
        return Terms.parse(data, str(path))

    def check(self, terms: Terms) -> None:
        """Raises AmqError where the states are of a run with other terms."""
        kept = self.terms()
        if kept is not None:
            check_agreement(kept.json(), terms, f"that of the run in {self.folder.parent}")

    def load(self, step: int) -> dict[str, Tensor]:
        """Raises AmqError for a file that is damaged."""
        file = verify_file(self.path(step), whole=True)
        return {name: file.get_tensor(name) for name in file.keys()}

    def drop_after(self, step: int) -> None:
        """Removes states of later steps: they are made again."""
        for later in self.steps():
            if later > step:
                self.path(later).unlink(missing_ok=True)
