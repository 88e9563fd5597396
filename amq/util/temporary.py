"""Temporary folders beside what is being written, which a killed process does not leave for ever.

A folder is named after its target with a random part, so that no two writers share one, whatever their process ids
(containers that share a cache have equal ones). While its writer lives it holds an exclusive `flock` on the folder,
which the kernel drops when the process ends in any way. The next writer in the same place removes the folders whose
lock it can take: their writers are gone. On a file system without locks nothing is ever taken for dead.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

NAME = re.compile(r"\..+\.amq-[a-z0-9_]+\.tmp", re.DOTALL)
MOST_NAME = 200
"""Bytes of a target's name that stand in a temporary's; file systems allow 255 in all. Longer names are hashed."""
UNSYNCED = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)
"""What opening or syncing a folder says where that cannot be done: some network file systems, unreadable folders."""


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder beside `target`, on the same file system; gone at the end, unless it was renamed.

    Removes the folders first that killed processes left in the same place. Raises OSError where none can be made.
    """
    remove_stale_below(target.parent)
    folder, lock = _make(target)
    try:
        yield folder
    finally:  # what went wrong before is the error to see: a folder that cannot be removed is left to the next writer
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale_below(folder: Path) -> None:
    """Removes the temporary folders in `folder` whose writers are gone, whatever they were writing.

    A target that got its name just before its writer was killed is perhaps never written again.
    """
    try:
        found = [e.path for e in os.scandir(folder) if NAME.fullmatch(e.name)]
    except OSError:  # not there, or not readable: making a folder says so
        return
    for path in found:
        _remove_unless_held(path)


def _remove_unless_held(path: str) -> None:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # its writer has finished meanwhile, or it is no folder of ours
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return
    else:
        shutil.rmtree(path, ignore_errors=True)
        log.info("removed %s, which a killed process had left", path)
    finally:
        os.close(lock)


def _make(target: Path) -> tuple[Path, int]:
    """(new folder, descriptor that holds its lock)."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=".tmp", dir=target.parent))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # removed as stale before it was locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("%s cannot be locked: %s", folder, error)
        if folder.is_dir() and os.path.samestat(os.stat(folder), os.fstat(lock)):
            return folder, lock
        os.close(lock)


def _prefix(target: Path) -> str:
    name = target.name
    if len(os.fsencode(name)) > MOST_NAME:
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return f".{name}.amq-"


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries after a rename in it, to the disk."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not folder or error.errno not in UNSYNCED:
            raise
