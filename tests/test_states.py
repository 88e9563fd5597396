"""States come back bit for bit, from memory and from disk, and nothing of them stays behind."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from amq.errors import AmqError
from amq.model.states import StateStore


def state(seed: int, rows: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [0, 250, 1 << 20])
def test_what_is_put_comes_back(cache: Path, memory: int, dtype: torch.dtype) -> None:
    """Replaced, dropped and put again in any order, with sizes that differ."""
    expected: dict[tuple[str, int], torch.Tensor] = {}
    rng = random.Random(0)
    with StateStore(memory) as store:
        for step in range(200):
            key = ("pass", rng.randrange(8))
            if rng.random() < 0.3:
                store.drop(key)
                expected.pop(key, None)
            else:
                expected[key] = state(step, rng.choice((1, 3, 4)), dtype)
                store.put(key, expected[key])
            assert all(torch.equal(store.get(k), v) and store.get(k).dtype == dtype for k, v in expected.items())
            assert all((("pass", i) in store) == (("pass", i) in expected) for i in range(8))
        assert store.spilled <= sum(v.nbytes for v in expected.values())
        assert store.spilled == {0: sum(v.nbytes for v in expected.values()), 1 << 20: 0}.get(memory, store.spilled)
        for key, value in expected.items():
            assert torch.equal(store.pop(key), value)
        assert store.spilled == 0


def test_memory_is_a_limit_and_holes_are_used_again(cache: Path) -> None:
    size = state(0).nbytes
    with StateStore(2 * size) as store:
        for key in range(5):
            store.put(key, state(key))
        assert store.spilled == 3 * size
        for _ in range(10):
            store.put(4, state(9))
        assert os.fstat(store._file.fileno()).st_size == 3 * size
        store.drop(0)
        store.put(5, state(5))
        assert store.spilled == 3 * size, "what was dropped made room in memory"


def test_a_part_does_not_keep_the_whole(cache: Path) -> None:
    whole = torch.zeros(1, 1000, 8)
    with StateStore(1 << 20) as store:
        store.put(0, whole[:, :2])
        assert store.get(0).untyped_storage().nbytes() == 64


def test_nothing_stays_behind(cache: Path) -> None:
    """The file has no name: even a process that is killed leaves nothing."""
    store = StateStore(0)
    store.put(0, state(0))
    assert list(cache.iterdir()) == []
    store.close()


def test_a_full_disk_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with StateStore(0) as store, pytest.raises(AmqError, match=r"could not be written under .*cache.*No space left"):
        store.put(0, state(0))
