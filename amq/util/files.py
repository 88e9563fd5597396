"""Files written whole or not at all, and read with errors that name them."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.util.temporary import sync, temporary_folder


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the result to `path`: a reader sees the old file or the whole new one.

    `temporary` is there already, empty, and has `path`'s name. Raises AmqError naming `path` if it cannot be written.
    """
    check_path(path)
    make_folder(path.parent)
    try:
        with temporary_folder(path) as folder:
            temporary = folder / path.name
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors writes for its owner only
            sync(temporary)
            os.replace(temporary, path)
        sync(path.parent)
    except AmqError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise AmqError(
                f"the disk is full: could not write {path}; free some space and run the same command again "
                "(what was finished before is kept)"
            ) from error
        if isinstance(error, OSError):
            raise AmqError(f"could not write {path}: {reason(error)}") from error
        raise


def make_folder(path: Path, remedy: str = "give another place") -> None:
    """Makes the folder `path` and those above it, where they are missing; raises AmqError where that cannot be."""
    check_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        full = "the disk is full: " * is_disk_full(error)
        raise AmqError(f"{full}the folder {path} cannot be made: {reason(error)}; {remedy}") from error


def check_path(path: Path | str, what: str = "the path") -> None:
    """Raises AmqError for a path that no system call takes; what: whose it is, such as `--output`."""
    if "\0" in str(path):
        raise AmqError(f"{what} {str(path)!r} holds a NUL character, which no file name can: give another")


def check_place(path: Path, what: str) -> None:
    """Raises AmqError unless `path` is a folder that this process can write to, or one that it can make.

    For the beginning of a command: it is made, with something in it, and removed again, which no look at permissions
    can stand in for. what: whose it is, such as `--output`.
    """
    check_path(path, what)
    made: list[Path | str] = []
    try:
        there = next(p for p in (path, *path.parents) if p.exists())  # the name itself may be too long
        if not there.is_dir():
            below = "is a file: expected a folder" if there == path else f"lies below {there}, which is a file"
            raise AmqError(f"{what} {path} {below}")
        made += make_missing(path)
        made.insert(0, tempfile.mkdtemp(prefix=".amq-", dir=path))
    except OSError as error:
        raise AmqError(f"{what} {path} cannot be written: {reason(error)}; give another place") from error
    finally:
        for one in made:
            with contextlib.suppress(OSError):  # another process has put something there
                os.rmdir(one)


def make_missing(folder: Path) -> list[Path]:
    """Makes `folder` and the folders above it; returns those that were not there, the lowest first, or none at all.

    Raises OSError where one cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            made.insert(0, path)
    except OSError:
        for path in made:
            path.rmdir()
        raise
    return made


def check_file(path: Path | None, what: str, or_folder: bool = False) -> None:
    """`check_place` for a file that is written at the end of a command, if one is; or_folder: or in that folder."""
    if path is None:
        return
    check_path(path, what)
    try:
        folder = path.is_dir()
    except OSError as error:
        raise AmqError(f"{what} {path} cannot be written: {reason(error)}; give another place") from error
    if folder and not or_folder:
        raise AmqError(f"{what} {path} is a folder: expected a file")
    check_place(path if folder else path.parent, what)


def reason(error: OSError) -> str:
    """The system's words for an error and the file that it is about: `Permission denied (/path)`."""
    if not error.strerror:
        return str(error) or type(error).__name__
    return f"{error.strerror} ({error.filename})" if error.filename else error.strerror


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` means no space left; safetensors reports it as text only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory or address space ran out; libraries below us report it as text only."""
    known = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    said = ("Cannot allocate memory", "can't allocate memory", "out of memory")  # mmap, torch on a CPU, torch on a GPU
    return known or any(text in str(error) for text in said)


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def json_floats(data: Any) -> Any:
    """`data` with infinity and NaN as {"__float__": "Infinity"}, which is how transformers 5 writes them in
    config.json: JSON has no such numbers, and readers outside Python refuse a file that holds them."""
    if isinstance(data, float) and not math.isfinite(data):
        return {"__float__": "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"}
    if isinstance(data, dict):
        return {key: json_floats(value) for key, value in data.items()}
    return [json_floats(value) for value in data] if isinstance(data, (list, tuple)) else data


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def read_json(path: Path, floats: bool = False) -> Any:
    """What a JSON file holds; floats: NaN and infinity are allowed. Raises AmqError naming the file.

    `amq.util.records.read_record` reads a file into a typed record.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"it holds {constant}, which is no JSON number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=None if floats else refuse)
    except FileNotFoundError:
        raise AmqError(f"{path} does not exist") from None
    except RecursionError:
        raise AmqError(f"{path} is not valid JSON: it is nested too deeply; the file is damaged") from None
    except ValueError as error:  # of the JSON, of its encoding, or an integer of thousands of digits
        raise AmqError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise AmqError(f"{path} cannot be read: {error}") from None


def cache_dir() -> Path:
    """Where models and banks are cached: `$AMQ_CACHE`, else `amq` under the user's cache directory."""
    if chosen := os.environ.get("AMQ_CACHE"):
        return Path(chosen)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("amq"))
