"""Files written whole or not at all, and read with errors that name them."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amq.errors import AmqError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary)` and renames the result to `path`: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise AmqError(
                f"the disk is full: could not write {path}; free some space and run the same command again "
                "(what was finished before is kept)"
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` means no space left; safetensors reports it as text only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


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

    `amq.records.read_record` reads a file into a typed record.
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
