"""The prompt cache on disk: found after a restart, by the same model, computed the same way, for the same owner."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engines import text
from helpers.tiny_models import ARCHITECTURES
from torch import Tensor

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.runtime import families, load, page_store
from amq.runtime.engine import Segment
from amq.runtime.native_engine import NativeEngine, PagedSlot, open_native
from amq.runtime.page_keys import model_root
from amq.runtime.page_store import PageStore

BYTES = 1000
FILE = page_store.HEADER.size + BYTES


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def page(number: int) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(BYTES)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.page")}


def names(*numbers: int) -> set[str]:
    return {f"{key(number).hex()}.page" for number in numbers}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., PageStore]]:
    """Stores in one folder, closed at the end of the test."""
    made: list[PageStore] = []

    def make(limit: int = 100 * FILE, page_bytes: int = BYTES) -> PageStore:
        made.append(PageStore(tmp_path / "pages", limit, page_bytes))
        return made[-1]

    yield make
    for store in made:
        store.close()


def found(store: PageStore, number: int) -> bool:
    out = bytearray(b"?" * store.page_bytes)
    there = store.read(key(number), out)
    assert not there or out == page(number)
    return there


def test_pages_are_there_for_the_next(make: Callable[..., PageStore], tmp_path: Path) -> None:
    store = make()
    for number in (1, 2, 1):
        store.keep(key(number), page(number))
    store.flush()
    assert files(store.folder) == names(1, 2) and found(store, 1) and not found(store, 3)
    assert (store.hits, store.misses, store.written, store.dropped, store.bytes) == (1, 1, 2, 0, 2 * FILE)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in store.folder.glob("*.page")} == {0o600}
    store.keep(key(4), page(4))
    store.close()
    store.close()
    store.keep(key(5), page(5))  # too late
    assert [path.name for path in store.folder.iterdir() if path.is_dir()] == []
    second = make()
    assert second.bytes == 3 * FILE and found(second, 4) and found(second, 2) and not found(second, 5)
    second.keep(key(4), page(4))
    second.flush()
    assert second.written == 0


@pytest.mark.parametrize("damage", ["flipped", "header", "short", "long", "empty", "renamed"])
def test_damaged_pages_are_not_there(
    make: Callable[..., PageStore], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    store.keep(key(1), page(1))
    store.flush()
    path = store.folder / names(1).pop()
    whole = path.read_bytes()
    flip = {"flipped": FILE - 7, "header": 3}.get(damage)
    if flip is not None:
        path.write_bytes(whole[:flip] + bytes([whole[flip] ^ 4]) + whole[flip + 1 :])
    elif damage == "renamed":
        path.rename(store.folder / names(2).pop())
    else:
        path.write_bytes({"short": whole[:-1], "long": whole + b"x", "empty": b""}[damage])
    number = 2 if damage == "renamed" else 1
    assert not found(store, number) and store.misses == 1 and not files(store.folder)
    assert "is damaged: it is removed" in caplog.text
    for _ in range(2):  # the first time it may still be thought to be there
        store.keep(key(1), page(1))
        store.flush()
    assert found(store, 1)


def test_pages_of_another_size_are_foreign(make: Callable[..., PageStore]) -> None:
    store = make()
    store.keep(key(1), page(1))
    store.flush()
    assert not found(make(page_bytes=BYTES // 2), 1)


def test_what_was_used_longest_ago_gives_way(make: Callable[..., PageStore]) -> None:
    store = make(limit=9 * FILE // 2)
    stranger = store.folder / "notes.txt"
    stranger.write_text("not ours")
    for number in (1, 2, 3, 4):
        store.keep(key(number), page(number))
    store.flush()
    store.keep(key(1), page(1))
    store.flush()
    store.keep(key(5), page(5))
    store.flush()
    assert files(store.folder) == names(1, 3, 4, 5) and store.bytes == 4 * FILE
    for number in range(6, 40):
        store.keep(key(number), page(number))
        store.flush()
        assert len(files(store.folder)) <= 4
    assert stranger.exists() and store.dropped == 0 and store.written == 39
    smaller = make(limit=5 * FILE // 2)
    assert files(smaller.folder) == names(39) | names(38) and smaller.bytes == 2 * FILE
    with pytest.raises(AmqError, match=f"holds no page of this model, which takes {FILE}"):
        make(limit=FILE - 1)


def test_two_stores_keep_one_limit(make: Callable[..., PageStore]) -> None:
    stores = [make(limit=20 * FILE), make(limit=20 * FILE)]
    for number in range(60):
        store = stores[number % 2]
        store.keep(key(number), page(number))
        store.flush()
        assert found(stores[1 - number % 2], number)
        assert len(files(store.folder)) <= 20 + 20 // page_store.SLACK + 1
    shutil.rmtree(stores[0].folder)
    assert not found(stores[0], 59)


def test_a_full_disk_costs_pages_only(
    make: Callable[..., PageStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make()
    replace = os.replace

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    for number in (1, 2):
        store.keep(key(number), page(number))
    store.flush()
    assert (store.written, store.dropped, files(store.folder)) == (0, 2, set())
    assert caplog.text.count("No space left on device") == 1
    monkeypatch.setattr(os, "replace", replace)
    store.keep(key(2), page(2))
    store.flush()
    assert found(store, 2)


def test_a_slow_disk_holds_up_nobody(make: Callable[..., PageStore], monkeypatch: pytest.MonkeyPatch) -> None:
    gate, begun, replace = threading.Event(), threading.Event(), os.replace

    def slow(*arguments: Any) -> None:
        begun.set()
        assert gate.wait(60)
        replace(*arguments)

    monkeypatch.setattr(os, "replace", slow)
    monkeypatch.setattr(page_store, "QUEUED_BYTES", 3 * BYTES)
    store = make()
    store.keep(key(0), page(0))
    assert begun.wait(60)
    for number in (1, 2, 3, 4, 1):
        store.keep(key(number), page(number))
    assert store.dropped == 1
    gate.set()
    store.flush()
    assert files(store.folder) == names(0, 1, 2, 3)


def test_a_killed_writer_leaves_nothing_for_ever(make: Callable[..., PageStore]) -> None:
    folder = make().folder
    left = folder / ".page.amq-abc.tmp"
    left.mkdir()
    (left / "page").write_bytes(b"half")
    make()
    assert not left.exists()


def test_a_folder_that_others_may_enter_is_refused(make: Callable[..., PageStore], tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.raises(AmqError, match=f"is open to other users.*`chmod 700 {folder}`"):
        make()
    folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(AmqError, match="cannot be made: File exists"):
        make()


# --- engines --------------------------------------------------------------------------------------------------------

TOKENS = text(300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("store")
    made = {"llama": tiny_checkpoint(ARCHITECTURES["llama"].build(num_hidden_layers=2), base / "llama")}
    model = ARCHITECTURES["llama"].build(num_hidden_layers=2)
    with torch.no_grad():
        model.model.norm.weight[0] += 1  # the least that makes it another
    return made | {"other": tiny_checkpoint(model, base / "other")}


@pytest.fixture
def start(folders: dict[str, Path], tmp_path: Path) -> Iterator[Callable[..., NativeEngine]]:
    """Engines with one prompt cache."""
    made: list[NativeEngine] = []

    def start(model: str = "llama", activations: str = "int8", **options: Any) -> NativeEngine:
        options = {"context": 512, "max_sequences": 2, "prompt_cache": 1 << 30, **options}
        place = options.pop("prompt_cache_folder", tmp_path / "prompts")
        made.append(open_native(folders[model], activations, prompt_cache_folder=place, **options))
        return made[-1]

    yield start
    for engine in made:
        engine.shutdown()


def run(engine: NativeEngine, tokens: list[int] = TOKENS, owner: str = "") -> tuple[int, Tensor]:
    """How many tokens were found, and the logits after the last."""
    slot = engine.open(tokens, 0, owner)
    assert slot is not None
    while slot.catch_up():
        pass
    length = slot.length
    logits = engine.forward([Segment(slot, tokens[length:])])[0].clone()
    engine.close(slot)
    return length, logits


def counters(engine: NativeEngine) -> tuple[int, int, int, int]:
    store = engine.prompt_cache
    assert store is not None
    store.flush()
    return store.hits, store.misses, store.written, store.dropped


@pytest.mark.parametrize("activations", ["int8", "fp32"])
def test_a_restart_finds_what_was_read(start: Callable[..., NativeEngine], activations: str) -> None:
    first = start(activations=activations)
    found, expected = run(first)
    assert found == 0 and run(first)[0] == 256
    assert counters(first) == (0, 1, 4, 0)
    first.shutdown()
    again = start(activations=activations, context=300, threads=2)  # neither is of consequence
    found, logits = run(again)
    assert found == 256 and torch.equal(logits, expected)
    assert counters(again) == (4, 0, 0, 0)
    other = TOKENS[:150] + text(150, seed=1)
    assert run(again, other)[0] == 128 and counters(again)[:2] == (4, 1)  # in memory by now


def test_pages_of_a_sequence_that_runs_are_kept(start: Callable[..., NativeEngine]) -> None:
    """The server may be killed; and two engines share a folder."""
    first, second = start(), start()
    slot = first.open(TOKENS, 0)
    assert slot is not None
    first.forward([Segment(slot, TOKENS[:140])])
    assert counters(first) == (0, 1, 2, 0)
    found, logits = run(second)
    assert found == 128 and counters(second) == (2, 1, 2, 0)
    assert torch.equal(first.forward([Segment(slot, TOKENS[140:])])[0], logits)
    first.close(slot)
    assert counters(first)[2:] == (2, 0)  # the other had written the rest


def test_a_page_in_memory_follows_one_on_disk(start: Callable[..., NativeEngine]) -> None:
    run(start())
    second = start()
    path = next(iter(sorted(second.prompt_cache.folder.glob("*.page"))))  # type: ignore[union-attr]
    run(second)
    path.unlink()
    assert run(second)[0] == 256


def test_long_prompts_are_read_a_little_at_a_time(
    start: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    _, expected = run(first)
    counters(first)
    monkeypatch.setattr("amq.runtime.paged_engine.READ_BYTES", 1)
    engine = start()
    slot = engine.open(TOKENS, 0)
    beside = engine.open(TOKENS, 0)
    assert isinstance(slot, PagedSlot) and isinstance(beside, PagedSlot)
    lengths = [(slot.length, beside.length)]
    while slot.catch_up() | beside.catch_up():
        lengths.append((slot.length, beside.length))
    assert lengths == [(64, 128), (192, 256)] and (slot.length, beside.length) == (256, 256)
    assert counters(engine) == (4, 0, 0, 0)
    assert torch.equal(engine.forward([Segment(slot, TOKENS[256:])])[0], expected)
    engine.close(slot)
    engine.close(beside)
    slot = start().open(TOKENS, 0)
    assert slot is not None and slot.length == 64
    slot._engine.forward([Segment(slot, TOKENS[64:100])])  # who does not wait computes the rest
    assert not slot.catch_up() and slot.length == 100
    assert torch.equal(slot._engine.forward([Segment(slot, TOKENS[100:])])[0], expected)


def test_nobody_else_finds_it(
    start: Callable[..., NativeEngine], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    run(first, owner="a")
    assert run(first, owner="b")[0] == 0 and run(first)[0] == 0
    counters(first)
    for options in ({"activations": "fp32"}, {"cache": "float32"}, {"model": "other"}):
        assert run(start(**options), owner="a")[0] == 0, options
    second = start()
    assert run(second, owner="c")[0] == 0 and run(second, owner="a")[0] == 256


def test_everything_that_decides_the_bits_is_in_the_root(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folders["llama"])
    tables = [torch.ones(100, 4), torch.zeros(100, 4)]
    same = model_root(checkpoint, [torch.ones(80, 4), torch.zeros(80, 4)], {"cache": "float16"})
    roots = {same, model_root(checkpoint, tables, {"cache": "float16"})}
    assert len(roots) == 1
    roots.add(model_root(checkpoint, [tables[0], tables[0]], {"cache": "float16"}))
    roots.add(model_root(checkpoint, tables, {"cache": "float32"}))
    module, other = cpu_module(), tmp_path / "_cpu.so"
    other.write_bytes(b"another build")
    for isa, file in (("another", module.__file__), (module.isa(), str(other))):
        machine = SimpleNamespace(PAGE=module.PAGE, isa=lambda isa=isa: isa, __file__=file)
        monkeypatch.setattr("amq.runtime.page_keys.cpu_module", lambda machine=machine: machine)
        roots.add(model_root(checkpoint, tables, {"cache": "float16"}))
    monkeypatch.setattr("amq.__version__", "0.0.0")
    roots.add(model_root(checkpoint, tables, {"cache": "float16"}))
    edited = Path(shutil.copytree(Path(families.__file__).parents[0], tmp_path / "families"))
    for beside in ("decoder_spec.py", "weights.py"):
        shutil.copy(Path(families.__file__).parents[1] / beside, tmp_path)
    monkeypatch.setattr("amq.runtime.page_keys.FAMILIES", edited)
    unchanged = model_root(checkpoint, tables, {"cache": "float16"})
    assert unchanged in roots
    (edited / "llama.py").write_text("another scale")
    roots.add(model_root(checkpoint, tables, {"cache": "float16"}))
    checkpoint.config["rms_norm_eps"] = 1e-3
    roots.add(model_root(checkpoint, tables, {"cache": "float16"}))
    assert len(roots) == 8


def test_a_damaged_page_is_computed_again(start: Callable[..., NativeEngine], caplog: pytest.LogCaptureFixture) -> None:
    first = start()
    _, expected = run(first)
    counters(first)
    for path in first.prompt_cache.folder.glob("*.page"):  # type: ignore[union-attr]
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    again = start()
    found, logits = run(again)
    assert found == 0 and torch.equal(logits, expected)
    counters(again)
    assert run(start())[0] == 64  # the others were damaged still


def test_loading(folders: dict[str, Path], tiny_folder: Path, cache: Path) -> None:
    runtime = load(folders["llama"], prompt_cache=1 << 30, context=512)
    run(runtime.engine)  # type: ignore[arg-type]
    runtime.engine.shutdown()  # type: ignore[attr-defined]
    assert len(files(cache / "prompts")) == 4
    again = load(folders["llama"], prompt_cache=1 << 30, prompt_cache_folder=cache / "prompts")
    assert run(again.engine)[0] == 256  # type: ignore[arg-type]
    again.engine.shutdown()  # type: ignore[attr-defined]
    plain = load(folders["llama"]).engine
    assert plain.prompt_cache is None  # type: ignore[attr-defined]
    plain.shutdown()  # type: ignore[attr-defined]
    with pytest.raises(AmqError, match="for engines of our own, .* runs in transformers .it is not quantized"):
        load(tiny_folder, prompt_cache=1 << 30)
    with pytest.raises(AmqError, match="runs in transformers .the native engine is for device cpu"):
        load(folders["llama"], prompt_cache=1 << 30, dtype="bfloat16")
    with pytest.raises(AmqError, match="prompt_cache must be at least 1, got 0"):
        load(folders["llama"], prompt_cache=0)
    with pytest.raises(AmqError, match="a prompt cache of 100 bytes holds no page"):
        load(folders["llama"], prompt_cache=100)
