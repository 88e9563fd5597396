"""Damages the files of a checkpoint by a seeded generator, and says what loading and running each one came to.

Run as a program by test_damaged_files.py, in a process of its own, because what it looks for are crashes:

    python tests/helpers/damaged_files.py FOLDER SEED COUNT

One JSON line per case: its group, what was done, and `ok`, `named` (an AmqError) or the traceback of anything else.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GIB = 1 << 30
VALUES = (
    *(None, True, False, -1, 0, 1, 3, 1.5, -0.0, 17, 10**6, 2**31, 2**40, 2**63, 2**70, 10**400, 1e308, -1e308),
    *(math.nan, math.inf, "", "x", "0", "int4", "../x", "a\0b", "\ud800", [], {}, [None], [[]], {"content": 5}, [1, 2]),
)
"""What a value may become. Numbers may also move a little, or by 2^60 and more, where products wrap round 2^64."""

Damage = Callable[[Path], str]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def change(data: Any, rng: random.Random) -> str:
    """Changes one place of `data`; returns what it did."""
    found = list(places(data))
    top = [path for path in found if len(path) == 1]
    *parents, last = path = rng.choice(top if rng.random() < 0.5 else found)
    parent = data
    for key in parents:
        parent = parent[key]
    old, name = parent[last], ".".join(map(str, path))
    kind = rng.randrange(6)
    if kind == 0:
        del parent[last]
        return f"{name} deleted"
    if kind == 1 and isinstance(old, int) and not isinstance(old, bool):
        parent[last] = old + rng.choice((-1, 1, 1 << 31, 1 << 32, 1 << 58, 3 << 58, 1 << 60, 1 << 62))
    elif kind == 2 and isinstance(old, (list, str)):
        parent[last] = old[: len(old) // 2] if rng.random() < 0.5 else old + old
    else:
        parent[last] = rng.choice(VALUES)
    return f"{name}: {old!r:.40} became {parent[last]!r:.40}"


def damage_json(rng: random.Random) -> Damage:
    def damage(path: Path) -> str:
        data = json.loads(path.read_text())
        done = change(data, rng)
        path.write_text(json.dumps(data))
        return done

    return damage


def damage_text(rng: random.Random) -> Damage:
    def damage(path: Path) -> str:
        data = bytearray(path.read_bytes())
        at, kind = rng.randrange(len(data)), rng.randrange(4)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = b"[" * 50_000
        else:
            data[:] = rng.choice((b"", b"[]", b"1", b"null", b"{}", b"\xff", b"\0" * 50, b'"x"'))
        path.write_bytes(data)
        return f"bytes: kind {kind} at {at}"

    return damage


def damage_header(rng: random.Random) -> Damage:
    """Of a safetensors file, JSON after a length of 8 bytes."""

    def damage(path: Path) -> str:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        kind = rng.randrange(8)
        if kind == 0:
            path.write_bytes(struct.pack("<Q", rng.choice((0, 1, 2**40, 2**63, 2**64 - 1))) + data[8:])
            return "length of the header"
        if kind == 1:  # the hashes, whose JSON is a text in the header
            header["__metadata__"]["amq_hashes"] = rng.choice(("[]", "1", "{", "{}", '{"a": 1}', "[" * 50_000, "null"))
            done = "hashes"
        else:
            done = change(header, rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        return done

    return damage


def damage_tensors(rng: random.Random) -> Damage:
    """A tensor of another shape or dtype, with the hash of what it is: its maker lies, not the disk."""

    def damage(path: Path) -> str:
        import torch
        from safetensors.torch import load_file, save_file

        from amq.util.tensors import hashes_metadata

        tensors = load_file(path)
        name = rng.choice([n for n in sorted(tensors) if not n.endswith(("weight", "scale")) or rng.random() < 0.7])
        old, kind = tensors[name], rng.randrange(6)
        others = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.int8, torch.uint8, torch.float8_e5m2)
        made = [
            lambda: old.flatten(), lambda: old[:1], lambda: old[:0], lambda: torch.cat([old, old]),
            lambda: old.to(rng.choice(others)), lambda: old.unsqueeze(-1),
        ][kind]()  # fmt: skip
        tensors[name] = made.contiguous()
        save_file(tensors, path, metadata=hashes_metadata(tensors))
        return f"{name}: {list(old.shape)} became {made.dtype} {list(made.shape)}"

    return damage


INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
GROUPS: dict[str, tuple[tuple[str, ...], tuple[Callable[[random.Random], Damage], ...]]] = {
    "config": (("config.json",), (damage_json, damage_json, damage_json, damage_text)),
    "index": ((INDEX,), (damage_json, damage_text)),
    "tokenizer": (
        ("tokenizer_config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"),
        (damage_json, damage_json, damage_text),
    ),
    "weights": (("model.safetensors",), (damage_header, damage_tensors, damage_text)),
}
"""{group: (files, how they are damaged)}."""


def make(folder: Path, name: str) -> None:
    """Gives `folder`, whose files are links, a `name` of its own."""
    if name == INDEX:
        (folder / "model.safetensors").rename(folder / SHARD)
        header = (folder / SHARD).read_bytes()
        tensors = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
        weight_map = dict.fromkeys((n for n in tensors if n != "__metadata__"), SHARD)
        (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    elif name == "chat_template.jinja":
        (folder / name).write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    else:
        shutil.copy(folder / name, folder / "copy")
        os.replace(folder / "copy", folder / name)


def attempt(folder: Path) -> str:
    """Loads `folder` and runs it for two tokens, as a user's command does."""
    from amq.errors import AmqError
    from amq.runtime import Sampling, generate, load

    try:
        runtime = load(folder)
        return "ok " + repr("".join(generate(runtime, "hi", Sampling(max_new_tokens=2))))
    except AmqError as error:
        message = str(error)
        return f"named {message[:300]}" if message else "an AmqError without a message"
    except Exception:  # noqa: BLE001 (it is what the test looks for)
        return traceback.format_exc()[-1500:]


def main(source: Path, seed: int, count: int) -> None:
    """`count` cases of each group."""
    resource.setrlimit(resource.RLIMIT_AS, (12 * GIB, 12 * GIB))  # what asks for more than a model needs is an error
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as base:
        for group, (names, kinds) in GROUPS.items():
            for i in range(count):
                rng = random.Random(f"{seed} {group} {i}")
                folder = Path(base, f"{group}-{i}")
                folder.mkdir()
                for path in source.iterdir():
                    os.link(path, folder / path.name)
                name = rng.choice(names)
                make(folder, name)
                kind = rng.choice(kinds if name.endswith(".json") or group == "weights" else (damage_text,))
                done = kind(rng)(folder / name)
                print(json.dumps({"group": group, "case": i, "file": name, "done": done}), end="\t", flush=True)
                print(json.dumps(attempt(folder)), flush=True)
                shutil.rmtree(folder)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
