"""What linear kernels are held against: float64 products, their natural rounding error, and memory that bites."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from amq.formats import FORMATS
from amq.kernels import backends
from amq.kernels import cpu as native
from amq.packing import PackedWeight, PreparedWeight, dequantize
from helpers.packed import random_packed

MODES = backends.ACTIVATIONS
ISAS = native.cpu_module().isas()
UNIT = 2.0**-24
"""The relative error of one rounding to float32."""
FLOOR = 4
"""Roundings that every term of a sum may take besides those of the sum: code − zero_point, the scale, the activation's
scale, and that of the float32 weight which stands for the truth."""

every_kernel = pytest.mark.parametrize(
    ("name", "isa", "mode"),
    [pytest.param(*case, id="-".join(case)) for case in itertools.product(FORMATS, ISAS, MODES)],
)
every_isa_and_mode = pytest.mark.parametrize(
    ("isa", "mode"), [pytest.param(*case, id="-".join(case)) for case in itertools.product(ISAS, MODES)]
)


@dataclass(frozen=True)
class Weight:
    """One random linear: packed, prepared for `cpu`, and dequantized [N, K]."""

    packed: PackedWeight
    prepared: PreparedWeight
    dense: Tensor


@cache
def make_weight(name: str, rows: int, in_features: int, group_size: int) -> Weight:
    """The same one for the same arguments; scales of a row differ by up to 8 orders of magnitude."""
    packed = random_packed(FORMATS[name], max(rows, 1), in_features, group_size).rows(0, rows)
    dense = dequantize(packed) if rows else torch.empty(0, in_features)
    return Weight(packed, backends.prepare(packed), dense)


def random_x(rows: int, in_features: int, seed: int = 0) -> Tensor:
    """float32 [rows, in_features]; rows differ by up to 6 orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** torch.randint(-3, 4, (rows, 1), generator=generator)
    return torch.randn(rows, in_features, generator=generator) * magnitude


def seen_by(mode: str, x: Tensor, group_size: int) -> Tensor:
    """The activations that a mode multiplies."""
    return backends.quantize_activations(x, group_size) if mode == "int8" else x


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """float64 x · Wᵀ, and for each element √Σ (x·W)²: times UNIT, what one rounding of every term adds up to."""
    x, weight = x.double(), weight.double()
    return x @ weight.T, (x.square() @ weight.square().T).sqrt()


def error(y: Tensor, truth: Tensor, size: Tensor) -> float:
    """Root mean square over all elements of (y − truth) / size; infinite where a sum of zeros is not 0, or y NaN."""
    difference = (y.double() - truth).abs()
    relative = torch.where(size > 0, difference / size, torch.where(difference > 0, torch.inf, 0.0))
    return float(relative.square().mean().sqrt().nan_to_num(nan=torch.inf))


def assert_as_accurate_as_torch(y: Tensor, x: Tensor, weight: Tensor, what: str) -> None:
    """y [M, N] misses the float64 product by at most twice as much as torch's float32 product, plus the floor."""
    truth, size = product(x, weight)
    found, allowed = error(y, truth, size), 2 * error(x @ weight.T, truth, size) + FLOOR * UNIT
    assert found <= allowed, f"{what}: RMSE {found / UNIT:.1f} units of rounding, allowed {allowed / UNIT:.1f}"


def rounding_bound(x: Tensor, weight: Tensor) -> Tensor:
    """What a float32 sum of these products may be off at worst, whatever its order; float64 [M, N]."""
    roundings = 2 * x.shape[1] + FLOOR  # each product joins its group's sum, each group the total
    return roundings * UNIT / (1 - roundings * UNIT) * (x.double().abs() @ weight.double().abs().T)


def run(x: Tensor, weights: Sequence[Weight], mode: str, isa: str, bias: Tensor | None = None) -> Tensor:
    """The kernel on x [M, K], with torch's number of threads."""
    return native.linear(x, [w.prepared for w in weights], bias, mode, isa)


def prepare_into(packed: PackedWeight, out: Tensor, isa: str = "", threads: int = 1) -> None:
    arguments = native._packed_arguments(packed) | {"threads": threads}
    native.cpu_module().prepare(**arguments, out=native.memory(out), isa=isa)


def strided_memory(matrix: Tensor) -> tuple[int, int]:
    """(address, bytes) up to the end of a matrix whose rows may lie apart."""
    elements = (len(matrix) - 1) * matrix.stride(0) + matrix.shape[1] if len(matrix) else 0
    return matrix.data_ptr(), elements * matrix.element_size()


def run_raw(
    x: Tensor, parts: Sequence[tuple[PreparedWeight, Tensor]], bias: Tensor | None, y: Tensor, mode: str, isa: str
) -> None:
    """Past the typed bindings: x and y may have row strides, and a weight is read from the bytes beside it."""
    weight = parts[0][0]
    native.cpu_module().linear(
        [(w.format.name, data.data_ptr(), data.numel(), w.out_features) for w, data in parts],
        strided_memory(x),
        native.NO_MEMORY if bias is None else native.memory(bias),
        strided_memory(y),
        rows=len(x),
        in_features=weight.in_features,
        group_size=weight.group_size,
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        int8=mode == "int8",
        threads=2,
        isa=isa,
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def at_page_edge(tensor: Tensor) -> Iterator[Tensor]:
    """A copy whose last byte is followed by a page without access: one byte too far is a crash, not a wrong number."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = tensor.numel() * tensor.element_size()
    length = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, length + mmap.PAGESIZE)
    forbidden = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)) + length)
    edge = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=length - size)
    edge = edge.view(tensor.dtype).view(tensor.shape)
    edge.copy_(tensor)
    assert libc.mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    try:
        yield edge
    finally:
        assert libc.mprotect(forbidden, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE) == 0
