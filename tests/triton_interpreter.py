"""The Triton kernels in Triton's interpreter, on CPU tensors: every format against float64, and every address; and the
backend that divides rows between them and the CUDA kernels.

The interpreter runs the kernels' Python in numpy: it shows that the arithmetic and the addresses are right, not that a
compiler takes the code (tests/test_triton_compile.py). Its bfloat16 is wrong, which `bfloat16` mends for these tests.

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter.py

in a process of its own, which tests/test_triton.py starts: Triton decides when it is imported, and other packages
import it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from types import SimpleNamespace

import numpy
import pytest
import torch
from cuda_shim.build import build_shim
from helpers.packed import SYNTHETIC, random_packed
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels import cuda
from amq.kernels import gpu_layout as layout
from amq.kernels import triton as launcher
from amq.kernels.backends import Backend, get_backend, quantize_activations
from amq.kernels.compilations import compilations
from amq.kernels.triton import (
    Launch,
    choose,
    dequantize,
    dequantize_rows,
    linear,
    linear_into,
    unsupported_reason,
)
from amq.packing import PackedWeight, PreparedWeight
from amq.packing import dequantize as reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter wants TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

CASES = ((24, 1100, 64), (13, 577, 32), (40, 512, 128), (8, 64, 32))
"""out_features, in_features, group_size: ragged last slab, odd everything, exact, less than a slab."""

GEMV = Launch(block_m=0, block_n=64, slabs_per_step=2, num_warps=1, num_stages=1)
GEMM = Launch(block_m=64, block_n=64, slabs_per_step=1, num_warps=2, num_stages=1)
GEMM_SPLIT = Launch(block_m=64, block_n=64, slabs_per_step=2, num_warps=2, num_stages=1)


def prepared(packed: PackedWeight) -> PreparedWeight:
    return PreparedWeight.of(packed, "triton", layout.prepare(packed))


def inputs(rows: int, in_features: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows + in_features)).to(dtype)


def run(
    x: Tensor,
    weights: list[PreparedWeight],
    launch: Launch,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear_into` an output full of NaN between guard elements; `dtype` of y, x's if None."""
    columns, guard = sum(w.out_features for w in weights), 64
    buffer = torch.full((x.shape[0] * columns + 2 * guard,), torch.nan, dtype=dtype or x.dtype)
    y = buffer[guard:-guard].view(x.shape[0], columns)
    linear_into(y, x, weights, bias, lambda *_: launch)
    assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
    return y


def assert_close(y: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor | None, unit: float) -> None:
    """Against float64: an error of at most `unit` times the sum of magnitudes, in every element.

    A group counts with the magnitudes of code and zero point both, which is how the gemv sums it.
    """
    w = reference(packed, torch.float64)
    expected = x.double() @ w.T + (0 if bias is None else bias.double())
    codes = PackedWeight(*(getattr(packed, f) for f in ("format", "in_features", "group_size", "qweight")),
                         packed.scale.abs(), -packed.zero_point)  # fmt: skip
    largest = x.double().abs() @ reference(codes, torch.float64).T + (0 if bias is None else bias.double().abs())
    assert not y.isnan().any()
    assert ((y.double() - expected).abs() <= unit * largest).all(), ((y.double() - expected).abs() / largest).max()


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as uint16: it multiplies those as integers, and truncates float32 to them."""
    builder = interpreter.InterpreterBuilder

    def dot(self, a, b, d, *_):
        both = (
            (t.data.astype(numpy.uint32) << 16).view(numpy.float32) if t.dtype.scalar == tl.bfloat16 else t.data
            for t in (a, b)
        )
        return interpreter.TensorHandle(numpy.matmul(*both, dtype=numpy.float32) + d.data, d.dtype.scalar)

    def cast(self, source, to, original=builder.cast_impl):
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(numpy.array(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(data, tl.bfloat16)
        return original(self, source, to)

    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "cast_impl", cast)


@contextmanager
def checked_memory(reads: list[Tensor], writes: list[Tensor]) -> Iterator[list[str]]:
    """Lists every load outside `reads`, store outside `writes`, and address that is stored twice."""
    builder, faults, stored = interpreter.InterpreterBuilder, [], set()
    load, store = builder.create_masked_load, builder.create_masked_store

    def outside(pointers, mask, tensors: list[Tensor]) -> numpy.ndarray:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = numpy.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(numpy.int64)
        inside = numpy.zeros(addresses.shape, dtype=bool)
        for tensor in tensors:
            start, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            inside |= (addresses >= start) & (addresses + size <= start + nbytes)
        if not inside.all():
            faults.append(f"{(~inside).sum()} lanes out of bounds")
        return addresses

    def checked_load(self, pointers, mask, other, *rest):
        outside(pointers, mask, reads)
        return load(self, pointers, mask, other, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        addresses = outside(pointers, mask, writes).tolist()
        if len(set(addresses)) < len(addresses) or stored.intersection(addresses):
            faults.append("an address stored twice")
        stored.update(addresses)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield faults
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_gemv(name: str, case: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Float32 out shows the arithmetic, x's dtype out that it is rounded once."""
    packed = random_packed(FORMATS[name], *case)
    x, bias = inputs(1, case[1], dtype), torch.randn(case[0])
    y = run(x, [prepared(packed)], GEMV, bias, torch.float32)
    assert_close(y, x, packed, bias, 2.0**-20)
    if case[1] <= 512:
        assert torch.equal(run(x, [prepared(packed)], GEMV, bias), y.to(dtype))


@pytest.mark.parametrize("rows", (3, 16))
def test_gemv_of_some_rows_is_each_row_alone(rows: int) -> None:
    packed = random_packed(FORMATS["int3"], 13, 100, 64)
    x, weight = inputs(rows, 100), prepared(packed)
    y = run(x, [weight], GEMV, dtype=torch.float32)
    assert_close(y, x, packed, None, 2.0**-20)
    for row in (0, rows - 1):
        assert torch.equal(y[row : row + 1], run(x[row : row + 1], [weight], GEMV, dtype=torch.float32))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("case", "rows", "launch"), [*zip(CASES, (33, 5, 5, 33), (GEMM, GEMM_SPLIT) * 2, strict=True)])
@pytest.mark.parametrize("name", FORMATS)
def test_gemm(name: str, case: tuple[int, int, int], rows: int, launch: Launch, dtype: torch.dtype) -> None:
    """Weights are rounded to x's dtype, so the bar is plain torch on weights of that dtype."""
    packed = random_packed(FORMATS[name], *case)
    x, bias = inputs(rows, case[1], dtype), torch.randn(case[0]).to(dtype)
    y = run(x, [prepared(packed)], launch, bias, torch.float32)
    exact = x.double() @ reference(packed, torch.float64).T + bias.double()
    plain = x.float() @ reference(packed, dtype).float().T + bias.float()
    assert (y - exact).square().mean() <= 4 * (plain - exact).square().mean()  # 2 × its RMSE
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("launch", (GEMV, GEMM, GEMM_SPLIT), ids=("gemv", "gemm", "gemm-split"))
def test_fused_weights_give_the_bits_of_separate_ones(launch: Launch) -> None:
    """More formats than one launch takes, with a weight of one row and rows that fill no block among them."""
    shapes = dict(zip(FORMATS, cycle((40, 1, 24, 13, 70, 8)), strict=False))
    weights = [prepared(random_packed(FORMATS[name], rows, 600, 64)) for name, rows in shapes.items()]
    x, bias = inputs(2, 600), torch.randn(sum(shapes.values()))
    parts = bias.split(list(shapes.values()))
    separate = [run(x, [weight], launch, part) for weight, part in zip(weights, parts, strict=True)]
    assert torch.equal(run(x, weights, launch, bias), torch.cat(separate, 1))
    some = (0, 2, 0)  # one width for two weights
    y = run(x, [weights[i] for i in some], launch, torch.cat([parts[i] for i in some]))
    assert torch.equal(y, torch.cat([separate[i] for i in some], 1))


@pytest.mark.parametrize("name", FORMATS)
def test_one_hot_inputs_give_the_columns(name: str) -> None:
    """To the rounding of the float32 sum: code and zero point meet after each is scaled."""
    packed = random_packed(FORMATS[name], 8, 512, 128)
    columns = [0, 1, 30, 31, 32, 63, 64, 129, 300, 511]
    x = torch.zeros(len(columns), 512, dtype=torch.float16)
    x[range(len(columns)), columns] = 1
    y = run(x, [prepared(packed)], GEMV, dtype=torch.float32)
    assert_close(y, x, packed, None, 2.0**-23)
    y = run(x, [prepared(packed)], GEMM, dtype=torch.float32)
    assert torch.equal(y, reference(packed, torch.float16)[:, columns].T.float())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_gives_the_bits_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    for case in CASES[: 3 if dtype == torch.float32 else 1]:
        packed = random_packed(FORMATS[name], *case)
        assert torch.equal(dequantize(prepared(packed), dtype), reference(packed, dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_the_whole(name: str) -> None:
    """In any order and again, more than one program has; what is no row is NaN, and nothing is read for it."""
    for case in CASES[:3]:
        packed = random_packed(FORMATS[name], *case)
        weight, whole = prepared(packed), reference(packed, torch.float16)
        ids = torch.tensor([*range(case[0]), 3, 0, -1, case[0], 1 << 40])
        with checked_memory([ids, weight.data], [out := torch.empty(len(ids), case[1], dtype=torch.float16)]) as faults:
            launcher._launch(launcher.dequantize_call(out, weight, ids), len(ids), out)
        assert not faults and torch.equal(out[:-3], whole[ids[:-3]]) and out[-3:].isnan().all()
        assert torch.equal(launcher.rows(weight, ids[:-3], torch.float16), whole[ids[:-3]])
    with pytest.raises(AmqError, match=r"rows: ids must be int64 of one dimension on cpu, got torch.int32 \[1\]"):
        launcher.rows(weight, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("launch", (GEMV, GEMM, GEMM_SPLIT), ids=("gemv", "gemm", "gemm-split"))
def test_a_kernel_for_more_widths_gives_the_same_bits(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [prepared(random_packed(FORMATS[name], 24, 600, 64)) for name in ("int3", "int2")]
    x, bias = inputs(2, 600), torch.randn(48)
    monkeypatch.setattr(compilations, "_widths", {})
    expected = run(x, weights, launch, bias)
    assert compilations.join(600, 64, (2, 3, 5, 8)) == [{2, 3, 5, 8}]
    assert torch.equal(run(x, weights, launch, bias), expected)
    assert torch.equal(run(x, weights[1:], launch, bias[24:]), expected[:, 24:])


def test_x_may_begin_anywhere() -> None:
    """What is not aligned is copied: Triton would compile another kernel for it."""
    weight, x = prepared(random_packed(FORMATS["int4"], 13, 128, 64)), inputs(5, 128)
    shifted = torch.cat([torch.zeros(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape)
    assert shifted.data_ptr() % launcher.ALIGNMENT and torch.equal(linear(shifted, [weight]), linear(x, [weight]))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("name", FORMATS)
def test_packed_rows_become_the_bits_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    """From rows as a bank stores them, several blocks of rows and features, between guard elements."""
    for case in (*CASES[: 3 if dtype == torch.float32 else 1], (5, 1030, 128)):
        packed, guard = random_packed(FORMATS[name], *case), 64
        buffer = torch.full((case[0] * case[1] + 2 * guard,), torch.nan, dtype=dtype)
        dequantize_rows(packed, buffer[guard:-guard].view(case[0], case[1]))
        assert torch.equal(buffer[guard:-guard].view(case[0], case[1]), reference(packed, dtype))
        assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
    packed = random_packed(FORMATS[name], 9, 100, 32)
    out = torch.empty(4, 100)
    dequantize_rows(packed.rows(3, 7), out)  # views, as pieces of a weight are
    assert torch.equal(out, reference(packed)[3:7])


@pytest.mark.parametrize("launch", (GEMV, GEMM, GEMM_SPLIT), ids=("gemv", "gemm", "gemm-split"))
def test_memory(launch: Launch) -> None:
    """No lane reads outside x, the weights and the bias, or writes outside y or twice, at shapes that fill nothing."""
    small = Launch(launch.block_m and 16, 32, launch.slabs_per_step, launch.num_warps, 1)
    for (rows, in_features, group_size), names in (((13, 577, 32), ("int3", "int8")), ((9, 1030, 128), ("int5",))):
        weights = [prepared(random_packed(FORMATS[name], rows, in_features, group_size)) for name in names]
        x, bias = inputs(3, in_features), torch.randn(len(names) * rows)
        y = torch.empty(3, len(names) * rows, dtype=torch.float16)
        with checked_memory([x, bias, *(w.data for w in weights)], [y]) as faults:
            linear_into(y, x, weights, bias, lambda *_: small)
        assert not faults


def test_memory_checker_bites() -> None:
    """x one row short, and a y whose second weight starts where the first has not ended."""
    weight = prepared(random_packed(FORMATS["int4"], 13, 64, 32))
    x, y = inputs(2, 64), torch.empty(2, 13, dtype=torch.float16)
    with checked_memory([x[:1], weight.data], [y]) as faults:
        linear_into(y, x, [weight], None, lambda *_: GEMV)
    assert faults and all("out of bounds" in fault for fault in faults)
    with checked_memory([x, weight.data], [y]) as faults:
        linear_into(y.as_strided((2, 13), (7, 1)), x, [weight], None, lambda *_: GEMV)
    assert faults == ["an address stored twice"]


def test_default_launches_are_right() -> None:
    """The launch parameters that a GPU gets, on small weights."""
    for rows in (1, 2, 5, 17, 40):
        packed = random_packed(FORMATS["int4"], 40, 600, 128)
        x = inputs(rows, 600)
        exact = x.double() @ reference(packed, torch.float64).T
        y = linear(x, [prepared(packed)])
        assert y.dtype == x.dtype and (y - exact).norm() < 1e-3 * exact.norm()
    assert linear(inputs(0, 600), [prepared(packed)]).shape == (0, 40)
    assert linear(inputs(3, 600), [prepared(packed.rows(0, 0))]).shape == (3, 0)


@pytest.mark.parametrize("rows", (1, 2, 3, 16, 17, 33, 4096))
@pytest.mark.parametrize("in_features", (64, 577, 1100, 2048, 4096, 11008, 14336, 18944))
def test_choice_is_possible_and_sums_in_one_order(rows: int, in_features: int) -> None:
    assert len({choose(rows, in_features, bits).slabs_per_step for bits in (2, 5, 8)}) == 1
    for bits in (2, 5, 8):
        launch = choose(rows, in_features, bits)
        lane_rows = 8 * launch.num_warps // launch.slabs_per_step
        assert launch.block_n % (lane_rows if launch.block_m == 0 else 2 * lane_rows) == 0


def test_many_rows_are_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From `dense_rows` rows on: the dequantized weights and one product each, bias included."""
    monkeypatch.setattr(launcher, "DENSE_ROWS", 4)
    weights = [prepared(random_packed(FORMATS[name], 24, 640, 64)) for name in ("int2", "int5")]
    x, bias = inputs(4, 640), torch.randn(48).half()
    dense = torch.cat([dequantize(weight, torch.float16) for weight in weights])
    assert torch.equal(linear(x, weights, bias), torch.nn.functional.linear(x, dense) + bias)
    assert not torch.equal(linear(x[:3], weights, bias), linear(x, weights, bias)[:3])  # another way, other roundings


def test_extreme_inputs() -> None:
    """The whole range of fp16 and most of bf16's; NaN and infinity reach their row and no other."""
    packed = random_packed(FORMATS["int4"], 13, 128, 64)
    fp16, bf16 = torch.float16, torch.bfloat16
    for value, dtype in ((65504.0, fp16), (2.0**-24, fp16), (1e19, bf16), (1e-12, bf16)):
        x = inputs(2, 128).sign().to(dtype) * value
        assert_close(run(x, [prepared(packed)], GEMV, dtype=torch.float32), x, packed, None, 2.0**-19)
    for value in (torch.nan, torch.inf):
        x = inputs(2, 128)
        x[0, 77] = value
        y = run(x, [prepared(packed)], GEMV, dtype=torch.float32)
        assert not y[0].isfinite().any() and y[1].isfinite().all()


def test_errors_name_the_linear_and_the_remedy() -> None:
    weight = prepared(random_packed(FORMATS["int4"], 8, 64, 32))
    wide = prepared(random_packed(FORMATS["int4"], 8, 128, 32))
    x, cut = inputs(2, 64), PreparedWeight("triton", weight.format, 8, 64, 32, weight.data[:-4])
    for message, change in (
        ("q: expected at least one weight", {"weights": []}),
        ("q: the Triton kernels have activations fp32 only, got 'int8'; use backend cuda", {"activations": "int8"}),
        ("q: fused linears must share in_features; expected 64, got 128", {"weights": [weight, wide]}),
        (r"q: x must be \[rows, 64\] and contiguous, got \[2, 128\]", {"x": inputs(2, 128)}),
        (r"contiguous, got \[64, 64\] with strides \[1, 64\]", {"x": inputs(64, 64).T}),
        ("q: x must be float16 or bfloat16, got torch.float32; convert it", {"x": x.float()}),
        (r"q: bias must be .* \[8\], .* got torch.float16 \[7\]", {"bias": x[0, :7]}),
        (r"data of an int4 weight \[8, 64\] at group 32 must be uint8 .*layout.prepare", {"weights": [cut]}),
        ("q: x is on meta, its weight on cpu; move one of them", {"x": x.to("meta")}),
    ):
        with pytest.raises(AmqError, match=message):
            linear(**({"x": x, "weights": [weight], "name": "q"} | change))
    with pytest.raises(AmqError, match="a gemv of 17 rows cannot take"):
        linear(inputs(17, 64), [weight], choose=lambda *_: GEMV)
    with pytest.raises(AmqError, match="a gemm cannot take"):
        linear(x, [weight], choose=lambda *_: Launch(16, 16, 1, 2, 1))


def test_unsupported_reason_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(unsupported_reason(fmt) is None for fmt in FORMATS.values())
    assert "dense bitstreams only" in unsupported_reason(SYNTHETIC[0])
    monkeypatch.setattr(launcher, "_kernels", lambda: SimpleNamespace(interpreted=False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "torch finds no GPU" in unsupported_reason(FORMATS["int2"])


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Backend `cuda` with both of its kernels: Triton's in the interpreter, CUDA's through the shim."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMQ_CUDA_LIBRARY", str(build_shim(tmp_path_factory.mktemp("shim"))))
        cuda.library.cache_clear()
        yield get_backend("cuda")
    cuda.library.cache_clear()


def test_few_rows_go_to_cuda_and_more_to_triton(on_cpu: Backend) -> None:
    """Triton's gemm rounds weights to x's dtype and CUDA's does not, which tells who made a product."""
    weights = [prepared(random_packed(FORMATS["int3"], 24, 640, 64))]
    for rows in (cuda.max_rows(), cuda.max_rows() + 1):
        x = inputs(rows, 640)
        ours, theirs = cuda.linear(x[: cuda.max_rows()], weights, None, "fp32"), linear(x, weights)
        expected = ours if rows <= cuda.max_rows() else theirs
        assert torch.equal(on_cpu.linear(x, weights, None, "fp32"), expected)
        assert not torch.equal(ours, theirs[: len(ours)])


def test_int8_with_many_rows_computes_with_the_same_activations(on_cpu: Backend) -> None:
    packed = random_packed(FORMATS["int3"], 24, 640, 64)
    x = inputs(cuda.max_rows() + 1, 640)
    rounded = quantize_activations(x.float(), 64)
    y = on_cpu.linear(x, [prepared(packed)], None, "int8")
    assert torch.equal(y, linear(rounded.half(), [prepared(packed)]))
    truth = rounded.double() @ reference(packed, torch.float64).T
    few = torch.cat([on_cpu.linear(row[None], [prepared(packed)], None, "int8") for row in x])
    assert (y - truth).abs().max() <= 0.01 * truth.abs().max() >= (few - truth).abs().max()


def test_a_bias_of_another_dtype_is_added(on_cpu: Backend) -> None:
    weights, x, bias = [prepared(random_packed(FORMATS["int3"], 24, 640, 64))], inputs(1, 640), torch.arange(24.0)
    for dtype in (torch.float16, torch.bfloat16):
        few = x.to(dtype)
        expected = cuda.linear(few, weights, bias.to(dtype), "fp32")
        assert torch.equal(on_cpu.linear(few, weights, bias, "fp32"), expected)
        assert not torch.equal(on_cpu.linear(few, weights, None, "fp32"), expected)
