"""Hidden states of many windows, configurations or passes between two blocks: in memory while they fit, else on disk.

What does not fit goes into one file under the cache directory that has no name: it was removed from its folder when it
was opened, so nothing of it stays behind, however the process ends. Bytes come back as they were put.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.util.files import cache_dir, make_folder, reason


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in the file: where, and what it is."""

    offset: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class StateStore:
    """Tensors by any hashable key; `memory` bytes of them stay in memory, what is put beyond that goes to disk.

    A tensor that is put must not be changed afterwards: one in memory is kept as it is, not copied. A context manager;
    `close` lets go of everything. `spilled` is what is on disk at the moment, in bytes.
    """

    def __init__(self, memory: int) -> None:
        self._left = memory
        self._kept: dict[Hashable, Tensor | _OnDisk] = {}
        self._file: IO[bytes] | None = None
        self._end = 0
        self._free: dict[int, list[int]] = {}  # bytes of a hole in the file → offsets of such holes
        self.spilled = 0

    def put(self, key: Hashable, state: Tensor) -> None:
        """Keeps `state` under `key`, in the place of what was there. Raises AmqError where the disk is full."""
        self.drop(key)
        state = state.detach()
        if state.nbytes <= self._left:
            if state.untyped_storage().nbytes() > state.nbytes:  # a view would keep all that it is a part of
                state = state.clone()
            self._left -= state.nbytes
            self._kept[key] = state
        else:
            self._kept[key] = self._write(state)

    def get(self, key: Hashable) -> Tensor:
        """What was put under `key`, which must be there; not to be changed."""
        found = self._kept[key]
        return found if isinstance(found, Tensor) else self._read(found)

    def pop(self, key: Hashable) -> Tensor:
        """`get`, and `drop`."""
        state = self.get(key)
        self.drop(key)
        return state

    def drop(self, key: Hashable) -> None:
        """Forgets what is under `key`, if anything is."""
        found = self._kept.pop(key, None)
        if isinstance(found, Tensor):
            self._left += found.nbytes
        elif found is not None:
            self._free.setdefault(found.nbytes, []).append(found.offset)
            self.spilled -= found.nbytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def close(self) -> None:
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> StateStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, state: Tensor) -> _OnDisk:
        """pwrite rather than a mapping: a full disk is an error there, and a signal that kills the process here."""
        holes = self._free.get(state.nbytes)
        offset = holes.pop() if holes else self._end
        data = state.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            if self._file is None:
                folder = cache_dir()
                make_folder(folder, "point AMQ_CACHE at a folder that can be written")
                self._file = tempfile.TemporaryFile(dir=folder)
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], offset + done)
        except OSError as error:
            raise AmqError(
                f"hidden states could not be written under {cache_dir()} ({self.spilled / 2**30:.2f} GiB are there): "
                f"{reason(error)}; free some space, point AMQ_CACHE at a larger disk, or raise --cache-memory"
            ) from error
        self._end = max(self._end, offset + state.nbytes)
        self.spilled += state.nbytes
        return _OnDisk(offset, state.nbytes, state.shape, state.dtype, state.device)

    def _read(self, found: _OnDisk) -> Tensor:
        state = torch.empty(math.prod(found.shape), dtype=found.dtype)
        data = state.view(torch.uint8).numpy().data
        assert self._file is not None
        done = 0
        while done < len(data):
            count = os.preadv(self._file.fileno(), [data[done:]], found.offset + done)
            if not count:
                raise AmqError("hidden states on disk end early: the file system lost what was written; run it again")
            done += count
        return state.view(found.shape).to(found.device)
