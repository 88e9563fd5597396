"""Keys of pages of the KV cache: hashes that name all that a page's content depends on.

A page's keys and values follow from the model, how it is computed, and all tokens up to the page's end. So its key is
SHA-256(key of the page before, its tokens), and that of the page before the first is SHA-256(root, owner): the root
stands for the model and for how it is computed here, the owner for whom pages are shared with. Equal keys mean equal
bytes, in one process and in any other, and a key tells neither tokens nor owner.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import amq
from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.kernels.cpu import cpu_module

Key = bytes
"""Of 32 bytes."""
FAMILIES = Path(__file__).with_name("families")


def owner_root(root: Key, owner: str) -> Key:
    """What stands before the first page of this owner's sequences."""
    return hashlib.sha256(root + hashlib.sha256(owner.encode()).digest()).digest()


def page_key(before: Key, tokens: Sequence[int]) -> Key:
    """Of the page that holds `tokens`, after the one of key `before`. Raises AmqError for a token beyond 64 bits."""
    try:
        return hashlib.sha256(before + array("q", tokens).tobytes()).digest()
    except OverflowError as error:
        raise AmqError(f"a token id is beyond every vocabulary: {error}") from None


def page_keys(root: Key, tokens: Sequence[int], page: int) -> Iterator[Key]:
    """Of the full pages of a sequence that begins with `tokens`."""
    key = root
    for start in range(0, len(tokens) - len(tokens) % page, page):
        key = page_key(key, tokens[start : start + page])
        yield key


def model_root(checkpoint: Checkpoint, tables: Sequence[Tensor], how: Mapping[str, Any]) -> Key:
    """Stands for everything but the tokens that decides what the native engine writes into a page.

    tables: cos and sin of the rotary embedding, [positions, features / 2]; a longer context only adds rows.
    how: settings, as plain data.
    Results are equal to the last bit for one instruction set of one build only, so the compiled module counts as a
    whole, and so does what makes a model of config.json. Raises AmqError where the checkpoint has no hashes of its
    tensors.
    """
    module = cpu_module()
    page = module.PAGE
    code = [*sorted(FAMILIES.glob("*.py")), FAMILIES.with_name("decoder_spec.py"), FAMILIES.with_name("weights.py")]
    said = {
        "amq": amq.__version__,
        "module": _file_hash(Path(str(module.__file__))),
        "families": {path.name: _file_hash(path) for path in code},
        "isa": module.isa(),
        "tables": [hashlib.sha256(table[:page].contiguous().numpy().tobytes()).hexdigest() for table in tables],
        "config": checkpoint.config,
        "tensors": checkpoint.hashes(),
        **how,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
