"""Pages of the KV cache in a folder, so that what a server has read once is not read again after a restart.

A page is one file, named after its key, which tells nothing of its tokens: HEADER, then the page as it lies in memory.
The content is a form of users' texts, so folder and files are their owner's alone. One thread writes, whole files or
none; what is damaged is as good as not there. All that lies in the folder counts towards the limit, of whatever model
and process, and what was used longest ago goes first. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import threading
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.runtime.page_keys import Key
from amq.util.files import check_path, make_folder, reason
from amq.util.temporary import temporary_folder

HEADER = struct.Struct("<8sQ32s32s")
"""MAGIC, bytes of the page, its key, SHA-256 of its bytes. 2026-11, a processor with SHA instructions: 1.4 GB/s."""
MAGIC = b"amqpage\x01"
SUFFIX = ".page"
NAME_LENGTH = 2 * hashlib.sha256().digest_size + len(SUFFIX)
QUEUED_BYTES = 64 << 20
"""That may wait to be written; more are dropped, so that a slow disk never holds up the engine."""
SLACK = 16
"""A part of the limit: so much is freed at once, and after so much written the folder is looked at for what other
processes wrote."""

log = logging.getLogger(__name__)


class PageStore:
    """Pages of `page_bytes` in `folder`, which together take at most `limit` bytes.

    `read` and `keep` are called from one thread, and the writing is another's.
    hits, misses: pages looked for and found or not. written: pages. dropped: pages that were to be written and were
    not, because the disk is full or too slow. bytes: on disk, as far as this process knows.
    Raises AmqError where the folder cannot be used, is open to other users, or the limit is below one page.
    """

    def __init__(self, folder: Path, limit: int, page_bytes: int) -> None:
        self.folder, self.limit, self.page_bytes = folder, limit, page_bytes
        self.file_bytes = HEADER.size + page_bytes
        if limit < self.file_bytes:
            raise AmqError(
                f"a prompt cache of {limit} bytes holds no page of this model, which takes {self.file_bytes}: "
                "give a larger one"
            )
        self.hits = self.misses = self.written = self.dropped = self.bytes = 0
        _make_private(folder)
        self._open = ExitStack()
        try:
            self._temporary = self._open.enter_context(temporary_folder(folder / "page"))
            self._there: set[str] = set()  # names on disk, not exactly: what is missing of them is written once more
            self._unseen = limit  # bytes written since the folder was looked at: it never was
            self._make_room(0)
        except OSError as error:
            self._open.close()
            raise AmqError(f"the prompt cache {folder} cannot be used: {reason(error)}") from error
        self._jobs: dict[Key, bytes | None] = {}  # to be written; None: on disk, and used again
        self._queued = 0  # bytes of them
        self._working = self._stopping = self._warned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="amq-pages", daemon=True)
        self._thread.start()

    def read(self, key: Key, out: Any) -> bool:
        """Fills `out`, a writable buffer of `page_bytes`, if the page is there; else `out` may hold anything."""
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                found = file.readinto(header := bytearray(HEADER.size)) + file.readinto(out)
                whole = found == self.file_bytes and not file.read(1)
        except FileNotFoundError:
            self.misses += 1
            return False
        except OSError as error:
            self._warn("read", error)
            self.misses += 1
            return False
        if not whole or bytes(header) != _header(key, out):
            self.misses += 1
            self._remove_damaged(path)
            return False
        self.hits += 1
        self._there.add(path.name)
        return True

    def keep(self, key: Key, page: Any) -> None:
        """Writes a page, or notes that it was used again; `page`, a buffer of `page_bytes`, is copied where needed."""
        there = self._path(key).name in self._there
        with self._changed:
            if self._stopping or self._jobs.get(key) is not None:
                return
            if not there and self._queued and self._queued + self.page_bytes > QUEUED_BYTES:
                self.dropped += 1
                return
            self._jobs.pop(key, None)  # what was used last comes last
            self._jobs[key] = None if there else bytes(page)
            self._queued += 0 if there else self.page_bytes
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all is written that was kept."""
        with self._changed:
            while (self._jobs or self._working) and self._thread.is_alive():
                self._changed.wait(1.0)

    def close(self) -> None:
        """Writes what waits and ends the thread; once or more often."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._open.close()

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key.hex()}{SUFFIX}"

    def _remove_damaged(self, path: Path) -> None:
        log.warning("the page %s is damaged: it is removed", path)
        self._there.discard(path.name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._warn("remove", error)

    def _warn(self, verb: str, error: OSError) -> None:
        if not self._warned:
            log.warning("the prompt cache cannot %s a page: %s (said once)", verb, reason(error))
        self._warned = True

    # in the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._working = False
                self._changed.notify_all()
                while not self._jobs:
                    if self._stopping:
                        return
                    self._changed.wait()
                key = next(iter(self._jobs))
                page = self._jobs.pop(key)
                self._queued -= len(page or b"")
                self._working = True
            try:
                self._write(key, page)
            except OSError as error:
                with self._changed:
                    self.dropped += page is not None
                self._warn("write", error)

    def _write(self, key: Key, page: bytes | None) -> None:
        """The file is not synced: a power cut leaves at worst one whose hash differs."""
        path, now = self._path(key), time.time_ns()
        try:
            os.utime(path, ns=(now, now))  # what the clock ticks in may be longer than the writing of a page
            self._there.add(path.name)
            return
        except FileNotFoundError:
            self._there.discard(path.name)
        if page is None:
            return
        self._make_room(self.file_bytes)
        temporary = self._temporary / "page"  # one name: what a full disk cut short is written over
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
            for part in (_header(key, page), page):
                if file.write(part) != len(part):
                    raise OSError("the disk took part of the page only")
        os.utime(temporary, ns=(now, now))
        os.replace(temporary, path)
        self._there.add(path.name)
        self.written += 1
        self.bytes += self.file_bytes
        self._unseen += self.file_bytes

    def _make_room(self, size: int) -> None:
        """Removes what was used longest ago where `size` more bytes would be too many."""
        if self.bytes + size <= self.limit and self._unseen <= self.limit // SLACK:
            return
        files = self._files()
        total = sum(length for _, length, _ in files)
        if total + size > self.limit:
            while files and total + size > self.limit - self.limit // SLACK:
                _, length, path = files.popleft()
                path.unlink(missing_ok=True)
                total -= length
        self._there = {path.name for _, _, path in files}
        self.bytes, self._unseen = total, 0

    def _files(self) -> deque[tuple[int, int, Path]]:
        """(time of the last use, bytes, path) of all pages, what was used longest ago first."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if len(entry.name) == NAME_LENGTH and entry.name.endswith(SUFFIX):
                    try:
                        said = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # another process has removed it since
                        continue
                    found.append((said.st_mtime_ns, said.st_size, Path(entry.path)))
        return deque(sorted(found))


def _header(key: Key, page: Any) -> bytes:
    return HEADER.pack(MAGIC, len(page), key, hashlib.sha256(page).digest())


def _make_private(folder: Path) -> None:
    check_path(folder)
    make_folder(folder.parent)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise AmqError(f"the prompt cache {folder} cannot be made: {reason(error)}; give another place") from error
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise AmqError(
            f"the prompt cache {folder} is open to other users, and its pages hold users' texts in a form: "
            f"`chmod 700 {folder}`, or give another place"
        )
