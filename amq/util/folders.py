"""Folders that a command writes: whole or not at all, wherever the user points.

A folder that does not exist is written beside its place and renamed. One that exists and is empty may be a mount point,
the target of a link or somebody's working directory, none of which can be renamed onto: it is filled. Everything is
written into a temporary folder inside it and moved up, `config.json` last, so that who finds that file finds the rest.
Links are followed. `check_new_folder` does all of this with an empty file before a command spends hours on the content.

What a killed process leaves is removed by the next writer (`amq.util.temporary`), and does not count as content.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from amq.errors import AmqError
from amq.util.files import check_path, is_disk_full, make_folder, make_missing, reason
from amq.util.temporary import NAME, sync, temporary_folder

INSIDE = "content"
"""What the temporary folder in a folder that exists is named after."""
PARTIAL = ".amq.partial"
LOST_FOUND = "lost+found"
"""What a disk of Linux's ext kind holds when it is new."""
LAST = "config.json"
"""The file without which nobody takes a folder for a model."""
LOCK = "lock"
LONGEST = 200
"""Bytes of a folder's name that its work folder's name repeats; file systems hold 255."""
ATTEMPTS = 5


def real_folder(output: Path | str) -> Path:
    """The absolute path of an output folder, links followed; it need not exist."""
    check_path(output, "--output")
    return Path(os.path.realpath(output))


def work_folder(output: Path | str) -> Path:
    """Where unfinished work for `output` is kept: `.NAME.partial` beside a folder NAME that does not exist, and
    `.amq.partial` inside one that does, because what lies beside a mount point may not survive a container."""
    folder = real_folder(output)
    name = os.fsencode(folder.name)[:LONGEST].decode(errors="ignore")
    beside = folder.with_name(f".{name}.partial")
    return folder / PARTIAL if folder.is_dir() and not beside.is_dir() else beside


def check_new_folder(output: Path | str) -> Path:
    """Refuses an output folder that holds something or cannot be written, by writing and removing an empty file.

    Returns the real path. Raises AmqError; leaves everything as it was.
    """
    folder = real_folder(output)
    with _named_errors(output):
        _check_empty(output, folder)
        made = make_missing(folder.parent)
        try:
            _try(folder)
        finally:
            for path in made:
                path.rmdir()
    return folder


def write_folder(output: Path | str, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary folder)`; what it wrote becomes `output`, which must not exist or be empty.

    Raises AmqError where it cannot be written, or another process made it meanwhile; nothing is left then.
    """
    folder = check_new_folder(output)
    with _named_errors(output):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(_target(folder)) as temporary:
            whole = temporary / "whole"
            whole.mkdir()
            write(whole)
            _settle(whole)
            _check_empty(output, folder)
            if folder.is_dir():
                _fill(whole, folder)
            else:
                _rename(whole, folder)


def cache_folder(folder: Path, write: Callable[[Path], None], is_whole: Callable[[], bool]) -> None:
    """`write_folder` for what is kept to be used again: a damaged folder of that name makes room, and a whole one that
    another process made meanwhile stays, for it may be in use.

    Raises AmqError where it cannot be written; nothing is left then.
    """
    make_folder(folder.parent, "set AMQ_CACHE to a folder that can be written")
    with _named_errors(folder, "the folder"), temporary_folder(folder) as temporary:
        whole = temporary / "whole"
        whole.mkdir()
        write(whole)
        _settle(whole)
        if folder.exists():
            if is_whole():
                return
            os.rename(folder, temporary / "damaged")
        try:
            os.rename(whole, folder)
        except OSError:
            if not is_whole():
                raise
        sync(folder.parent)


class Lock:
    """A file that one process at a time holds; free again when that process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, open(path, "ab")  # noqa: SIM115

    def take(self) -> bool:
        """Whether this process has it now: nobody else does, and the file is still the one of that name."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: as before there were any
            return True
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        self._file.close()


@contextmanager
def _named_errors(output: Path | str, what: str = "--output") -> Iterator[None]:
    """Turns what the operating system says of `output`, which the user knows as `what`, into an AmqError."""
    try:
        yield
    except Exception as error:  # safetensors has an exception of its own for a full disk
        if is_disk_full(error):
            raise AmqError(f"the disk is full: could not write {output}; free some space and try again") from error
        if not isinstance(error, OSError):
            raise
        raise AmqError(f"{what} {output} cannot be written: {reason(error)}; give a folder that can") from error


def _check_empty(output: Path | str, folder: Path) -> None:
    if folder.is_symlink():  # links are followed already: this one leads to itself
        raise AmqError(f"--output {output} is a link that leads nowhere: give another folder")
    if folder.exists() and not folder.is_dir():
        raise AmqError(f"--output {output} is a file: expected a folder")
    if folder.is_dir() and any(not _is_ours(path) for path in folder.iterdir()):
        remedy = "give another folder"
        if (folder / PARTIAL).is_dir():  # its process may have been killed while it filled the folder
            remedy = f"remove all but {PARTIAL}, which holds finished blocks, and add --resume"
        raise AmqError(f"--output {output} is not empty: {remedy}")


def _try(folder: Path) -> None:
    """Makes, moves and removes a file where the temporary folder will be."""
    with temporary_folder(_target(folder)) as temporary:
        (temporary / "try").write_bytes(b"try")
        os.rename(temporary / "try", temporary / "tried")


def _is_ours(path: Path) -> bool:
    """Whether a folder that holds `path` is empty all the same."""
    name = path.name
    new_disk = name == LOST_FOUND and path.is_dir() and os.path.ismount(path.parent)
    return new_disk or name == PARTIAL or bool(NAME.fullmatch(name))


def _target(folder: Path) -> Path:
    """What the temporary folder is named after and lies beside: on the file system of the result."""
    return folder / INSIDE if folder.is_dir() else folder


def _settle(folder: Path) -> None:
    """Gives all files the modes of new ones (safetensors and mkdtemp write for their owner only), and the disk them."""
    mask = _umask()
    for path in (*folder.rglob("*"), folder):
        mode = (0o777 if path.is_dir() else 0o666) & ~mask
        if stat.S_IMODE(path.stat().st_mode) != mode:
            with suppress(PermissionError):  # of a file system that has no modes: nobody is locked out there
                path.chmod(mode)
        sync(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rename(whole: Path, folder: Path) -> None:
    """`whole` becomes `folder`, which another process may have made since it was looked for."""
    try:
        os.rename(whole, folder)
    except OSError as error:
        if not os.path.lexists(folder):
            raise
        raise AmqError(
            f"--output {folder} was made by another process meanwhile: it was left as it is; move it away and run the "
            "same command again"
        ) from error
    sync(folder.parent)


def _fill(whole: Path, folder: Path) -> None:
    """Moves what is in `whole` up into `folder`, `LAST` last; all of it or nothing."""
    moved: list[Path] = []
    try:
        for path in sorted(whole.iterdir(), key=lambda path: path.name == LAST):
            if path.name == LAST:
                sync(folder)
            if os.path.lexists(folder / path.name):
                raise AmqError(f"--output {folder}: another process made {path.name} in it meanwhile; empty it")
            os.rename(path, folder / path.name)
            moved.append(folder / path.name)
    except BaseException:  # an interrupt, too, must not leave half a checkpoint
        for path in moved:
            os.rename(path, whole / path.name)
        raise
    sync(folder)
