"""amq_cuda_linear_call on a CPU (kernels/cuda/linear.cuh through the shim): norms in front, epilogues, experts, rows of
a weight, ranges of features that several blocks share. Against float64, and against itself to the bit where nothing may
differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_shim.build import chosen_build
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels import backends, cuda
from amq.kernels import cuda_calls as calls
from amq.kernels import gpu_layout as layout
from amq.packing import PackedWeight, PreparedWeight, dequantize, pack_codes
from amq.rotation import rotate

EPSILON = 1e-5
INT8 = pytest.mark.parametrize("int8", (False, True), ids=("exact", "int8"))
ACTIVATIONS = {
    "silu": lambda g, u, limit: torch.nn.functional.silu(g) * u,
    "gelu_tanh": lambda g, u, limit: torch.nn.functional.gelu(g, approximate="tanh") * u,
    "clamped_swiglu": lambda g, u, limit: (
        (g := g.clamp(max=limit)) * (1.702 * g).sigmoid() * (u.clamp(-limit, limit) + 1)
    ),
    "relu2": lambda g, u, limit: g.relu().square(),
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda.Library:
    return cuda.Library(chosen_build(tmp_path_factory.mktemp("shim")))


class Linear:
    """A random weight of a sane scale: outputs near 1 for x near 1. bias: float32 or None."""

    def __init__(self, name: str, rows: int, in_features: int, group_size: int = 128, bias: bool = False) -> None:
        fmt = FORMATS[name]
        codes = torch.randint(0, fmt.levels, (rows, in_features), dtype=torch.uint8)
        shape = (rows, -(-in_features // group_size))
        scale = (0.5 + torch.rand(shape)) * 3.5 / fmt.levels / in_features**0.5
        zero_point = fmt.max_code / 2 + torch.rand(shape)
        packed = PackedWeight(fmt, in_features, group_size, pack_codes(codes, fmt), scale.half(), zero_point.half())
        self.prepared = PreparedWeight.of(packed, "cuda", layout.prepare(packed))
        self.wide = dequantize(packed, torch.float64)
        self.bias = torch.randn(rows) if bias else None

    def fields(self, first: int = 0, rows: int | None = None) -> dict[str, Any]:
        every = self.wide.shape[0]
        bias = None if self.bias is None else self.bias[first:]
        return {
            "data": self.prepared.data, "bias": bias, "bits": self.prepared.format.bits,
            "all_rows": every, "first_row": first, "rows": rows or every - first,
        }  # fmt: skip

    def of(self, x: Tensor) -> Tensor:
        """float64."""
        y = x.double() @ self.wide.T
        return y if self.bias is None else y + self.bias.double()


def run(
    library: cuda.Library,
    weights: list[dict[str, Any]],
    x: Tensor,
    y: Tensor,
    /,
    scratch: bool = True,
    **more: Any,
) -> Tensor:
    """One LinearCall, with scratch whose counters must be zeros again behind it; `more`: fields. Returns y."""
    fields = {
        "weights": weights, "n_weights": len(weights), "rows": len(x), "in_features": x.shape[1], "group_size": 128,
        "dtype": 0, "x_kind": calls.KINDS[x.dtype], "x": x, "x_stride": x.stride(0), "epsilon": EPSILON, "scale": 1.0,
        "y": y, "y_stride": y.stride(0), "y_kind": calls.KINDS[y.dtype], **more,
    }  # fmt: skip
    call = calls.Call(calls.LinearCall, fields)
    size = library.calls.size("amq_cuda_linear_scratch", call)
    partials = torch.zeros(size // 4)
    if scratch and size:
        call.struct.partials = partials.data_ptr()
    library.calls.run(call, 0)
    assert not partials[:16384].any()
    return y


def normed(x: Tensor, norm: Tensor) -> Tensor:
    """float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * norm.double()


def seen(x: Tensor, int8: bool, dtype: torch.dtype = torch.float16, group_size: int = 128) -> Tensor:
    """What is multiplied in the place of x."""
    return backends.quantize_activations(x.float(), group_size) if int8 else x.to(dtype)


def assert_near(y: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype = torch.float16) -> None:
    """Within what float32 sums and one rounding of each input to `dtype` may cost: |Σ e·x·w| ≤ 6 eps √Σ(x·w)² for
    independent e (six sigma), eps/2 the largest of them.

    size: √Σ(x·w)² of each output, or a bound of it.
    """
    allowed = 6 * torch.finfo(dtype).eps / 2 * size + torch.finfo(y.dtype).eps * expected.abs()
    worst = ((y.double() - expected).abs() / allowed).max().item()
    assert worst <= 1, f"{worst:.2f} of what is allowed"


def size_of(x: Tensor, linear: Linear) -> Tensor:
    return (x.double().square() @ linear.wide.square().T).sqrt()


@INT8
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
@pytest.mark.parametrize("in_features", (320, 1100, 4700))
def test_a_norm_and_several_weights(library: cuda.Library, int8: bool, dtype: torch.dtype, in_features: int) -> None:
    """x float32 and normed, three formats side by side, biases, a scale; with and without split ranges to the bit."""
    torch.manual_seed(0)
    linears = [
        Linear("int3", 40, in_features, bias=True),
        Linear("int4", 21, in_features),
        Linear("int8", 8, in_features, bias=True),
    ]
    norm, x = torch.randn(in_features), 30 * torch.randn(5, in_features)
    padded = torch.nn.functional.pad(x, (0, -in_features % 4))[:, :in_features]
    fields = [linear.fields() for linear in linears]
    more = {"norm": norm, "dtype": calls.KINDS[dtype], "int8": int8, "scale": 0.5}
    y = run(library, fields, padded, torch.full((5, 69), torch.nan), **more)
    row = normed(x, norm)
    expected = 0.5 * torch.cat([linear.of(seen(row.to(dtype), int8, dtype)) for linear in linears], -1)
    size = 0.5 * torch.cat([size_of(row, linear) for linear in linears], -1)
    # A code of int8 may be rounded the other way where the norm's last bit differs: a step of a group's largest / 127.
    assert_near(y, expected, size * (1 + 4 * int8), dtype)
    whole = run(library, fields, padded, torch.full((5, 69), torch.nan), scratch=False, **more)
    assert torch.equal(y, whole)


@INT8
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
@pytest.mark.parametrize("in_features", (37, 1100, 4096))
def test_a_norm_in_front_is_the_call_of_its_own(
    library: cuda.Library, int8: bool, dtype: torch.dtype, in_features: int
) -> None:
    """To the bit: which of the two norms a row depends on how many rows its pass has."""
    torch.manual_seed(5)
    linear, norm, kind = Linear("int4", 24, in_features), torch.randn(in_features), calls.KINDS[dtype]
    stride = -(-in_features // 8) * 8
    x = (30 * torch.randn(8, stride))[:, :in_features]
    before = torch.zeros(8, stride, dtype=dtype)[:, :in_features]
    fields = {
        "rows": 8, "features": in_features, "parts": 1, "y_kind": kind, "x": x, "x_stride": stride, "weight": norm,
        "epsilon": EPSILON, "factor": 1.0, "y": before, "y_stride": stride,
    }  # fmt: skip
    library.calls.run(calls.Call(calls.NormCall, fields), 0)
    more = {"dtype": kind, "int8": int8}
    expected = run(library, [linear.fields()], before, torch.empty(8, 24), **more)
    assert torch.equal(run(library, [linear.fields()], x, torch.empty(8, 24), norm=norm, **more), expected)


@INT8
@pytest.mark.parametrize("group_size", (32, 64, 128))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
@pytest.mark.parametrize("in_features", (64, 1088, 4672))
def test_rotated_inputs(
    library: cuda.Library, int8: bool, dtype: torch.dtype, group_size: int, in_features: int
) -> None:
    """Rounded to 16 bits behind the norm, rotated in float32, then rounded to what is multiplied."""
    torch.manual_seed(6)
    linear, norm = Linear("int4", 24, in_features, group_size), torch.randn(in_features)
    x, kind = 30 * torch.randn(8, in_features), calls.KINDS[dtype]
    more = {"dtype": kind, "int8": int8, "group_size": group_size}
    before = normed(x, norm).to(dtype)
    inner = rotate(before.float())
    expected = run(library, [linear.fields()], inner if int8 else inner.to(dtype), torch.empty(8, 24), **more)
    for rows in (before, before.float()):
        assert torch.equal(run(library, [linear.fields()], rows, torch.empty(8, 24), rotated=1, **more), expected)
    y = run(library, [linear.fields()], x, torch.empty(8, 24), rotated=1, norm=norm, **more)
    # A normed number may be rounded to 16 bits the other way, which then moves 64 of them.
    size = size_of(inner, linear)
    assert_near(y, linear.of(seen(inner, int8, dtype, group_size)), size * (2 + 4 * int8), dtype)


@INT8
def test_fused_rows_and_blocks_change_no_bit(
    library: cuda.Library, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of eight, one weight of several, any number of blocks, any order of threads, with scratch or without."""
    torch.manual_seed(1)
    linears = [Linear("int2", 70, 4700), Linear("int5", 40, 4700), Linear("int6", 16, 4700)]
    norm, x = torch.randn(4700), torch.randn(8, 4700)
    more = {"norm": norm, "int8": int8}
    y = run(library, [w.fields() for w in linears], x, torch.empty(8, 126), **more)
    for row in (0, 7):
        one = run(library, [w.fields() for w in linears], x[row : row + 1], torch.empty(1, 126), **more)
        assert torch.equal(one[0], y[row])
    for start, linear in zip((0, 70, 110), linears, strict=True):
        alone = run(library, [linear.fields()], x, torch.empty(8, linear.wide.shape[0]), **more)
        assert torch.equal(alone, y[:, start : start + linear.wide.shape[0]])
    for multiprocessors, order in ((1, "reverse"), (64, "random:7")):
        monkeypatch.setenv("AMQ_SHIM_MULTIPROCESSORS", str(multiprocessors))
        monkeypatch.setenv("AMQ_SHIM_ORDER", order)
        assert torch.equal(run(library, [w.fields() for w in linears], x, torch.empty(8, 126), **more), y)


def test_rows_of_a_weight(library: cuda.Library) -> None:
    """A window of rows equals those rows of the whole, to the bit."""
    torch.manual_seed(2)
    linear, x = Linear("int3", 77, 640, bias=True), torch.randn(2, 640).half()
    y = run(library, [linear.fields()], x, torch.empty(2, 77))
    for first, rows in ((0, 8), (24, 53), (40, 13), (72, 5)):
        part = run(library, [linear.fields(first, rows)], x, torch.empty(2, rows))
        assert torch.equal(part, y[:, first : first + rows])


@pytest.mark.parametrize("kind", (torch.float16, torch.bfloat16, torch.float32), ids=("fp16", "bf16", "fp32"))
def test_kinds_of_outputs_and_nothing_beside_them(library: cuda.Library, kind: torch.dtype) -> None:
    torch.manual_seed(3)
    linear, x = Linear("int4", 37, 640, bias=True), torch.randn(3, 640).half()
    whole = torch.full((5, 64), 7.0, dtype=kind)
    run(library, [linear.fields()], x, whole[1:4, 8:45])
    assert_near(whole[1:4, 8:45], linear.of(x), size_of(x, linear))
    whole[1:4, 8:45] = 7.0
    assert (whole == 7).all()


@pytest.mark.parametrize("in_features", (640, 4700))
def test_adding_to_the_stream(library: cuda.Library, in_features: int) -> None:
    torch.manual_seed(4)
    linear, x, stream = Linear("int3", 70, in_features, bias=True), torch.randn(6, in_features), torch.randn(6, 70)
    y = run(library, [linear.fields()], x, stream.clone(), epilogue=calls.ADD, scale=0.25)
    assert_near(y, stream + 0.25 * linear.of(x.half()), 0.25 * size_of(x, linear) + stream.abs())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("formats", (("int4", "int4"), ("int3", "int8")), ids="-".join)
def test_activations(library: cuda.Library, activation: str, formats: tuple[str, str]) -> None:
    """Gate and up in formats that differ in how many rows they take at once, over several ranges, split or not."""
    torch.manual_seed(5)
    gate, up = (Linear(name, 70, 2600, bias=True) for name in formats)
    weights = [up] if activation == "relu2" else [gate, up]
    x, norm = torch.randn(5, 2600), torch.rand(2600)
    more = {"epilogue": calls.ACTIVATE, "activation": calls.ACTIVATIONS[activation], "limit": 0.75, "norm": norm}
    fields = [linear.fields() for linear in weights]
    y = run(library, fields, x, torch.empty(5, 70, dtype=torch.float16), **more)
    row = normed(x, norm)
    parts = [linear.of(row.half()) for linear in weights]
    expected = ACTIVATIONS[activation](parts[0], parts[-1], 0.75)
    # Neither factor's derivative exceeds 2 here but by the other factor.
    size = 2 * sum(size_of(row, linear) for linear in weights) * (1 + sum(part.abs() for part in parts))
    assert_near(y, expected, size)
    assert torch.equal(run(library, fields, x, torch.empty(5, 70, dtype=torch.float16), scratch=False, **more), y)


def experts_of(linears: list[list[Linear]]) -> Tensor:
    """The table of calls.h, [experts, weights]."""
    structs = [
        calls.ExpertWeight(
            w.prepared.data.data_ptr(), None if w.bias is None else w.bias.data_ptr(), w.prepared.format.bits
        )
        for expert in linears
        for w in expert
    ]
    return calls.device_structs(structs, torch.device("cpu"))


@pytest.mark.parametrize("in_features", (320, 4704))
@INT8
def test_experts(library: cuda.Library, int8: bool, in_features: int) -> None:
    """Formats differ from expert to expert; gathered rows; entries that no group names stay as they were."""
    torch.manual_seed(6)
    names = (("int2", "int3"), ("int4", "int4"), ("int8", "int2"))
    linears = [[Linear(name, 40, in_features, bias=True) for name in pair] for pair in names]
    groups = [(0, [0, 3, 6]), (2, [1, 2, 4, 5, 8, 9, 10, 11])]
    structs = [calls.ExpertRows(e, len(entries), tuple(entries)) for e, entries in groups]
    structs += [calls.ExpertRows(1, 8, tuple(range(8)))] * 2  # behind n_groups: not to be read
    x = torch.randn(6, in_features).half()
    shape = {"all_rows": 40, "rows": 40, "first_row": 0}
    y = run(
        library, [shape, shape], x, torch.full((12, 40), 7.0), epilogue=calls.ACTIVATE, int8=int8, most_groups=4,
        n_experts=3, experts=experts_of(linears), groups=calls.device_structs(structs, torch.device("cpu")),
        n_groups=torch.tensor([2], dtype=torch.int32), x_share=2,
    )  # fmt: skip
    done = set()
    for expert, entries in groups:
        row = seen(x, int8)[[entry // 2 for entry in entries]]
        gate, up = (linear.of(row) for linear in linears[expert])
        size = 2 * sum(size_of(row, w) for w in linears[expert]) * (1 + gate.abs() + up.abs())
        assert_near(y[entries], torch.nn.functional.silu(gate) * up, size)
        done.update(entries)
    assert (y[[e for e in range(12) if e not in done]] == 7).all()


def test_refusals(library: cuda.Library) -> None:
    torch.manual_seed(7)
    linear, x, y = Linear("int4", 24, 64, 64), torch.randn(2, 64), torch.empty(2, 24)
    weight = linear.fields()

    def refused(status: int, weights: list[dict[str, Any]] | None = None, rows: Tensor = x, **more: Any) -> None:
        with pytest.raises(AmqError, match=rf"LinearCall: the kernels refuse the call \({status}:"):
            run(library, weights or [weight], rows, y, **{"group_size": 64, **more})

    refused(-1, rows=torch.randn(9, 64))
    refused(-2, n_weights=5)
    refused(-2, [weight, weight], epilogue=calls.ADD)
    refused(-2, epilogue=calls.ACTIVATE)
    refused(-3, [{**weight, "bits": 7}])
    refused(-4, group_size=48)
    refused(-5, dtype=2)
    refused(-5, x_kind=1)
    refused(-5, rows=x.half(), norm=torch.ones(64))
    refused(-6, [linear.fields(4, 8)])
    refused(-6, [linear.fields(16, 16)])
    refused(-6, [weight, linear.fields(8)], epilogue=calls.ACTIVATE)
    refused(-6, rows=torch.randn(2, 65)[:, 1:])
    refused(-6, x=0)
    refused(-6, n_experts=2)
    refused(-6, rows=torch.randn(2, 96), rotated=1)
    assert run(library, [weight], x[:0], y, group_size=64, x=x) is y  # no rows, nothing to do
