"""Thousands of calls of `amq._cpu` with odd sizes and true lengths: each is refused, or stays inside what it was given.

Every array ends where a page without access begins, so that a byte too far is a crash and not a wrong number.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from amq.formats import FORMATS, n_groups
from amq.kernels import cpu as native

CALLS = 3000
LARGEST = 1 << 20
"""Bytes of an array; what would need more gets less, and has to be refused."""
SIZES = (*(0, 1, 2, 3, 5, 16, 17, 32, 33, 48, 64, 96, 100, 128, 161, -1), 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1)
LIBC = ctypes.CDLL(None, use_errno=True)

Memory = tuple[int, int]


class Arrays:
    """Makes arrays of one call, and keeps them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._kept = rng, []

    def strided(self, rows: int, columns: int, stride: int, itemsize: int) -> Memory:
        """Mostly as large as such a matrix is, else of any size."""
        wanted = ((rows - 1) * stride + columns) * itemsize if rows > 0 else 0
        fits = 0 <= wanted < LARGEST and self._rng.random() < 0.8
        return self.bytes(wanted if fits else self._rng.randrange(20_000))

    def bytes(self, size: int) -> Memory:
        length = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, length + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert LIBC.mprotect(ctypes.c_void_p(start + length), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self._kept.append(pages)
        return start + length - size, size


def odd_call(rng: random.Random, arrays: Arrays) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function of the module and arguments for it."""
    module = native.cpu_module()
    fmt, (n, k) = rng.choice(list(FORMATS.values())), rng.choices(SIZES, k=2)
    group_size = rng.choice((32, 32, 64, 128, 48, 0, -32))
    try:
        size = module.prepared_bytes(fmt.name, n, k, group_size)
    except ValueError:
        size = rng.randrange(5000)
    data = arrays.bytes(size if size < LARGEST else rng.randrange(5000))
    common = {"in_features": k, "group_size": group_size, "threads": 1}
    if rng.random() < 0.4:
        rows = rng.choice((1, 1, 2, 3, 5, 17, *SIZES))
        x_stride, y_stride = rng.choice((k, k, k + 3, rng.choice(SIZES))), rng.choice((n, n, n + 2, rng.choice(SIZES)))
        bias = rng.choice((native.NO_MEMORY, arrays.strided(1, n, n, 4)))
        x, y = arrays.strided(rows, k, x_stride, 4), arrays.strided(rows, n, y_stride, 4)
        own = {"parts": [(fmt.name, *data, n)], "x": x, "bias": bias, "y": y, "int8": rng.random() < 0.5}
        return module.linear, common | own | {"rows": rows, "x_stride": x_stride, "y_stride": y_stride}
    row_bytes, groups = (fmt.row_bytes(k), n_groups(k, group_size)) if k > 0 and group_size > 0 else (0, 1)
    strides = [rng.choice((least, least + 1, rng.choice(SIZES))) for least in (row_bytes, groups, k)]
    packed = {
        "format": fmt.name, "rows": n, "qweight_stride": strides[0], "group_stride": strides[1],
        "qweight": arrays.strided(n, row_bytes, strides[0], 1), "scale": arrays.strided(n, groups, strides[1], 2),
        "zero_point": arrays.strided(n, groups, strides[1], 2),
    }  # fmt: skip
    if rng.random() < 0.5:
        return module.prepare, common | packed | {"out": data}
    out = arrays.strided(n, k, strides[2], 4)
    return module.dequantize, common | packed | {"out": out, "out_stride": strides[2]}


@pytest.mark.parametrize("isa", native.cpu_module().isas())
def test_odd_calls_are_refused_or_stay_inside(isa: str) -> None:
    rng, came = random.Random(f"calls {isa}"), Counter()
    for _ in range(CALLS):
        arrays = Arrays(rng)
        call, arguments = odd_call(rng, arrays)
        try:
            call(**arguments, isa=isa)
        except (ValueError, TypeError):  # TypeError: a number beyond 64 bits
            came["refused"] += 1
        else:
            came[call.__name__] += 1
    assert all(came[name] > CALLS // 100 for name in ("refused", "linear", "prepare", "dequantize")), came
