"""What kernels/cuda computes row by row (rows.cu, rows_dense.cu), on a CPU through the shim, against torch in float64.

Bounds are first-order rounding errors: u is half a unit in the last place of float32, and a float32 sum is off by at
most the additions that a term goes through times u times the sum of magnitudes. expf and tanhf are taken to be off by
2 units, CUDA's documented most. AMQ_TEST_CUDA_LIBRARY names another build, as in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_shim.build import chosen_build
from helpers.packed import SYNTHETIC, assert_same_bits, guarded, random_packed
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat
from amq.kernels import cuda, cuda_calls, gpu_layout
from amq.kernels.cuda_calls import ACTIVATIONS, KINDS, PACKED_ROWS, PREPARED, Call
from amq.packing import dequantize
from amq.rotation import rotate

U = 2.0**-24
ROUNDING = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0), torch.float32: (0.0, 2.0**-126)}
"""Of a last conversion: relative to the result, and of its subnormal numbers; float32's may be zeros."""
MARGIN = 1.05
"""For products of errors, which the bounds leave out."""
DENSE = [*(fmt for fmt in (*FORMATS.values(), *SYNTHETIC) if fmt.is_dense)]

every_kind = pytest.mark.parametrize("dtype", KINDS, ids=("fp16", "bf16", "fp32"))


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda_calls.CallLibrary:
    return cuda.Library(chosen_build(tmp_path_factory.mktemp("shim"))).calls


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def run(library: cuda_calls.CallLibrary, struct: type, **fields: Any) -> None:
    library.run(Call(struct, fields), 0)


def written(
    library: cuda_calls.CallLibrary, struct: type, fields: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """What the call puts into y [rows, columns], whose rows are 3 elements further apart: all of it, nothing beside."""
    whole, around = guarded(torch.full((shape[0], shape[1] + 3), torch.nan, dtype=dtype))
    before = around.clone()
    run(library, struct, **fields, y=whole, y_stride=whole.stride(0))
    result = whole[:, : shape[1]].clone()
    whole[:, : shape[1]] = torch.nan
    assert torch.equal(around, before)
    assert not result.isnan().any()
    return result


def check(actual: Tensor, expected: Tensor, error: Tensor) -> None:
    """Within `error`, that of the float32 computation, and the rounding to actual's dtype."""
    relative, subnormal = ROUNDING[actual.dtype]
    bound = MARGIN * (error + (expected.abs() + error) * relative + subnormal)
    beyond = ((actual.double() - expected).abs() - bound).max().item()
    assert beyond <= 0, f"{beyond} beyond the bound"


def rms_norm(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """float64, along the last dimension, and the relative error of rows.cuh's."""
    features = x.shape[-1]
    additions = -(-features // (512 if features >= 512 else 32)) + 9
    factor = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return x * factor, torch.full_like(x, (additions / 2 + 6) * U)


NORMS = ((1, 4096, 1, 0), (3, 511, 1, 1), (2, 512, 1, 3), (2, 513, 3, 0), (3, 128, 5, 4), (9, 33, 2, 0), (2, 1, 1, 0))
"""rows, features, parts, elements between rows."""


@every_kind
def test_norm(library, dtype: torch.dtype) -> None:
    for rows, features, parts, extra in NORMS:
        columns = features * parts
        x = 3 * torch.randn(rows, columns + extra)
        weight = torch.randn(features)
        fields = {"rows": rows, "features": features, "parts": parts, "x": x, "x_stride": columns + extra}
        fields |= {"epsilon": 0.5, "factor": 0.3, "y_kind": KINDS[dtype]}
        factor = torch.tensor(0.3).double()
        scaled = (factor * x[:, :columns].double()).unflatten(1, (parts, features))
        norm, relative = rms_norm(scaled, 0.5)
        for given in (weight, None):
            y = written(library, cuda_calls.NormCall, fields | {"weight": given}, (rows, columns), dtype)
            expected = (norm * given.double() if given is not None else scaled).flatten(1)
            check(y, expected, expected.abs() * (relative.flatten(1) if given is not None else U))
    in_place = x.clone()
    run(
        library,
        cuda_calls.NormCall,
        **fields | {"y_kind": 2, "y": in_place, "x": in_place, "y_stride": columns + extra},
    )
    assert torch.equal(in_place[:, :columns], (torch.tensor(0.3) * x)[:, :columns])


def test_norm_of_zeros_and_nan(library) -> None:
    x = torch.zeros(3, 600)
    x[1, 599] = torch.nan
    x[2] = 1
    y = torch.empty(3, 600)
    run(
        library, cuda_calls.NormCall, rows=3, features=600, parts=1, y_kind=2, x=x, x_stride=600, factor=1.0,
        weight=torch.ones(600), epsilon=1e-6, y=y, y_stride=600,
    )  # fmt: skip
    assert not y[0].any() and y[1].isnan().all() and (y[2] - 1).abs().max() < 1e-5


@every_kind
@pytest.mark.parametrize(("rows", "features"), ((1, 64), (3, 576), (2, 2112)))
def test_rotation_is_that_of_the_definition(library, dtype: torch.dtype, rows: int, features: int) -> None:
    """To the bit, into other memory and in place."""
    x = (10 * torch.randn(rows, features + 5)).to(dtype)[:, :features]
    expected = rotate(x)
    fields = {"rows": rows, "features": features, "kind": KINDS[dtype], "x": x, "x_stride": x.stride(0)}
    found = written(library, cuda_calls.RotateCall, fields, (rows, features), dtype)
    assert_same_bits(found.float(), expected.float())
    run(library, cuda_calls.RotateCall, **fields, y=x, y_stride=x.stride(0))
    assert_same_bits(x.float(), expected.float())


@every_kind
def test_embed_elements(library, dtype: torch.dtype) -> None:
    table = torch.randn(37, 70).to(dtype)
    tokens = torch.tensor([0, 36, 5, 5, 37, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    fields = {"rows": 8, "columns": 70, "tokens": tokens, "kind": KINDS[dtype], "table_rows": 37, "data": table}
    y = written(library, cuda_calls.EmbedCall, fields | {"scale": 3.3}, (8, 70), torch.float32)
    assert_same_bits(y, table[[0, 36, 5, 5, 36, 0, 36, 0]].float() * torch.tensor(3.3))


@pytest.mark.parametrize("fmt", DENSE, ids=lambda fmt: fmt.name)
def test_embed_quantized_rows(library, fmt: BitFormat) -> None:
    """To the bit what amq.packing gives, times the scale; rows of every place in a tile, ends of groups and slabs."""
    for rows, columns, group_size in ((19, 1100, 64), (8, 577, 32), (3, 31, 128), (17, 1664, 128)):
        packed = random_packed(fmt, rows, columns, group_size)
        tokens = torch.randperm(rows).to(torch.int32)
        expected = dequantize(packed)[tokens.long()] * torch.tensor(1.7)
        fields = {"rows": rows, "columns": columns, "tokens": tokens, "bits": fmt.bits, "group_size": group_size}
        fields |= {"table_rows": rows, "scale": 1.7}
        stored = {"kind": PACKED_ROWS, "data": packed.qweight, "scales": packed.scale, "zero_points": packed.zero_point}
        stored["row_bytes"] = packed.qweight.shape[1]
        for table in (stored, {"kind": PREPARED, "data": gpu_layout.prepare(packed)}):
            y = written(library, cuda_calls.EmbedCall, fields | table, (rows, columns), torch.float32)
            assert_same_bits(y, expected)


def dense_fields(
    rows: int, n: int, k: int, element: torch.dtype, x_dtype: torch.dtype, extra: int = 0
) -> dict[str, Any]:
    """A call without y."""
    fields = {"rows": rows, "in_features": k, "out_features": n, "element": KINDS[element], "x_kind": KINDS[x_dtype]}
    fields |= {"weight": torch.randn(n, k).to(element), "bias": torch.randn(n), "scale": 0.7, "x_stride": k + extra}
    return fields | {"x": torch.randn(rows, k + extra).to(x_dtype)}


def dense_reference(fields: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y in float64 and the bound of its error."""
    weight, k = fields["weight"].double(), fields["in_features"]
    x = fields["x"].double()[:, :k]
    bias = torch.zeros(len(weight)).double() if fields["bias"] is None else fields["bias"].double()
    scale = torch.tensor(fields["scale"]).double()
    additions = (
        -(-k // 32) + 8 + 5 + 8 + 2
    )  # of a lane (up to a vector more than its share), lanes, warps, bias and scale
    return scale * (x @ weight.T + bias), scale.abs() * additions * U * (x.abs() @ weight.abs().T + bias.abs())


def dense(library: cuda_calls.CallLibrary, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (fields["rows"], fields["out_features"])
    return written(library, cuda_calls.DenseCall, fields | {"y_kind": KINDS[dtype]}, shape, dtype)


DENSE_SHAPES = ((1, 1, 8, 0), (1, 37, 4096, 0), (3, 5, 264, 8), (8, 600, 520, 0), (2, 2050, 136, 4), (9, 33, 1288, 0))
RAGGED_SHAPES = ((1, 1, 1, 0), (2, 37, 515, 1), (5, 3, 1026, 2), (11, 35, 260, 3))
"""rows, out_features, in_features, elements between rows of x."""


@every_kind
@pytest.mark.parametrize("x_dtype", KINDS, ids=("x16", "xbf16", "x32"))
def test_dense(library, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    for rows, n, k, extra in (*DENSE_SHAPES, *RAGGED_SHAPES):
        fields = dense_fields(rows, n, k, dtype, x_dtype, extra)
        check(dense(library, fields), *dense_reference(fields))
    for y_dtype in KINDS:
        check(dense(library, fields, y_dtype), *dense_reference(fields))
    fields |= {"bias": None, "scale": 1.0}
    check(dense(library, fields), *dense_reference(fields))


def test_dense_of_many_outputs(library) -> None:
    """As a head is: a warp to itself for its rows, and an end that fills neither warp nor block."""
    fields = dense_fields(2, 8195, 64, torch.bfloat16, torch.bfloat16)
    check(dense(library, fields), *dense_reference(fields))


@every_kind
def test_dense_rows_do_not_depend_on_each_other(library, dtype: torch.dtype) -> None:
    """Nor on how many there are, on what they are aligned to, or on what is not a number in another one."""
    for n, k in ((37, 1032), (515, 72)):
        fields = dense_fields(11, n, k, dtype, torch.float32) | {"y_kind": 2, "y_stride": n}
        fields["x"][3] = torch.nan
        together = torch.empty(11, n)
        run(library, cuda_calls.DenseCall, **fields, y=together)
        assert together[3].isnan().all() and not together[4].isnan().any()
        moved = torch.empty(n * k + 1, dtype=dtype)[1:].view(n, k).copy_(fields["weight"])
        assert moved.data_ptr() % 16
        for first, rows, weight in ((0, 1, fields["weight"]), (7, 4, fields["weight"]), (4, 7, moved), (10, 1, moved)):
            y = torch.empty(rows, n)
            part = {"rows": rows, "x": fields["x"][first:], "weight": weight, "y": y}
            run(library, cuda_calls.DenseCall, **fields | part)
            assert_same_bits(y, together[first : first + rows])


def activation_reference(kind: str, gate: Tensor, up: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """y, and its error: of e^z relative to |error of z| + 2 units, and of products and a quotient beside it."""
    if kind == "relu2":
        return gate.clamp(min=0).square(), U * gate.square()
    if kind == "silu":
        inner, steps = gate, 0
    elif kind == "gelu_tanh":
        inner, steps = 2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3), 7
    else:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
        inner, steps = torch.tensor(1.702).double() * gate, 1
    y = gate * inner.sigmoid() * up
    return y, y.abs() * U * (9 + steps * inner.abs()) + 2.0**-126 * (gate * up).abs()


@every_kind
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activate(library, kind: str, dtype: torch.dtype) -> None:
    for rows, features, extra in ((1, 1000, 0), (3, 257, 3), (2, 1, 1)):
        both = 8 * torch.randn(rows, 2 * features + extra)
        gate, up = both[:, :features], both[:, features:]
        fields = {"rows": rows, "features": features, "activation": ACTIVATIONS[kind], "limit": 7.0, "gate": gate}
        fields |= {"gate_stride": both.stride(0), "up_stride": both.stride(0), "up": None if kind == "relu2" else up}
        y = written(library, cuda_calls.ActivateCall, fields | {"y_kind": KINDS[dtype]}, (rows, features), dtype)
        check(y, *activation_reference(kind, gate.double(), up[:, :features].double(), 7.0))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activate_keeps_what_is_not_a_number(library, kind: str) -> None:
    """And numbers so large that e^x is none give what torch does."""
    gate = torch.tensor([[torch.nan, 1.0, 1e4, -1e4, 3e38, -3e38]])
    up = torch.tensor([[1.0, torch.nan, 1.0, 1.0, 1e-30, 1e-30]])
    fields = {"rows": 1, "features": 6, "activation": ACTIVATIONS[kind], "limit": 7.0, "y_kind": 2, "y": gate}
    fields |= {"gate": gate, "gate_stride": 6, "up": None if kind == "relu2" else up, "up_stride": 6, "y_stride": 6}
    expected, error = activation_reference(kind, gate.double(), up.double(), 7.0)
    run(library, cuda_calls.ActivateCall, **fields)
    assert gate[0, 0].isnan() and (kind == "relu2" or gate[0, 1].isnan())
    if kind != "relu2":
        check(gate[:, 2:], expected[:, 2:].nan_to_num(), error[:, 2:].nan_to_num())


@pytest.mark.parametrize("normed", (True, False))
def test_finish(library, normed: bool) -> None:
    for rows, features, extra in ((1, 4096, 0), (3, 511, 2), (2, 513, 0), (9, 31, 1)):
        stream, y = torch.randn(rows, features + extra), 3 * torch.randn(rows, features + 1)
        weight = torch.randn(features) if normed else None
        fields = {"rows": rows, "features": features, "stream_stride": features + extra, "y": y, "epsilon": 1e-5}
        fields |= {"y_stride": features + 1, "post_norm": weight}
        added, relative = y[:, :features].double(), 0.0
        if weight is not None:
            added, relative = rms_norm(added, 1e-5)
            added = added * weight.double()
        for scale, after in ((1.0, 1.0), (0.3, 1.6)):
            out = stream.clone()
            run(library, cuda_calls.FinishCall, **fields, stream=out, scale=scale, after=after)
            assert torch.equal(out[:, features:], stream[:, features:])
            scale_, after_ = torch.tensor(scale).double(), torch.tensor(after).double()
            expected = (stream[:, :features].double() + scale_ * added) * after_
            check(out[:, :features], expected, 2 * U * expected.abs() + (scale_ * after_ * added).abs() * relative)


def test_per_layer(library) -> None:
    for rows, width, parts in ((1, 256, 7), (3, 33, 2), (2, 600, 2)):
        start, token, norm = (torch.randn(*s) for s in ((rows, parts * width), (rows, parts * width), (width,)))
        fields = {"rows": rows, "columns": parts * width, "width": width, "token": token, "norm": norm, "epsilon": 0.1}
        scales = {"table_scale": 16.3, "projection_scale": 0.2, "sum_scale": 0.7}
        out = start.clone()
        run(library, cuda_calls.PerLayerCall, **fields, **scales, sum=out)
        by = {name: torch.tensor(value).double() for name, value in scales.items()}
        normed, relative = rms_norm((by["projection_scale"] * start.double()).unflatten(1, (parts, width)), 0.1)
        normed = (normed * norm.double()).flatten(1)
        expected = by["sum_scale"] * (normed + by["table_scale"] * token.double())
        check(out, expected, 2 * U * expected.abs() + by["sum_scale"] * normed.abs() * relative.flatten(1))


def test_softcap(library) -> None:
    x = torch.cat([torch.randn(1000) * 40, torch.tensor([0.0, 1e-6, 1e30, -torch.inf])])
    for count in (1, 255, 1004):
        out = x.clone()
        run(library, cuda_calls.SoftcapCall, count=count, x=out, cap=30.0)
        expected = 30 * (x[:count].double() / 30).tanh()
        check(out[:count], expected, 6 * U * expected.abs())
        assert torch.equal(out[count:], x[count:])
    out[5] = torch.nan
    run(library, cuda_calls.SoftcapCall, count=1004, x=out, cap=30.0)
    assert out[5].isnan() and not out[6].isnan()


def some_calls() -> Iterator[tuple[type, dict[str, Any], Tensor]]:
    """A call of each kind that has an order of sums, and where it writes."""
    x, weight = torch.randn(5, 1034), torch.randn(517)
    common = {"rows": 5, "epsilon": 1e-5}
    y = torch.empty(5, 1034)
    strides = {"x_stride": 1034, "y_stride": 1034}
    norm = {"features": 517, "parts": 2, "factor": 1.0, "x": x, "weight": weight, "y_kind": 2, "y": y}
    yield cuda_calls.NormCall, common | strides | norm, y
    stream = torch.randn(5, 517)
    finish = {"features": 517, "stream": stream, "stream_stride": 517, "y": x, "y_stride": 1034, "post_norm": weight}
    yield cuda_calls.FinishCall, common | finish | {"scale": 0.5, "after": 1.1}, stream
    total = torch.randn(5, 1034)
    scales = {"table_scale": 1.0, "projection_scale": 2.0, "sum_scale": 3.0}
    layers = {"columns": 1034, "width": 517, "token": x, "norm": weight, "sum": total}
    yield cuda_calls.PerLayerCall, common | scales | layers, total
    y = torch.empty(5, 37)
    yield (
        cuda_calls.DenseCall,
        dense_fields(5, 37, 1544, torch.float16, torch.float32) | {"y_kind": 2, "y": y, "y_stride": 37},
        y,
    )


def test_orders_of_threads_and_rows(library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread comes first, and with fewer rows: the same to the bit."""
    for struct, fields, out in some_calls():
        start, results = out.clone(), []
        for order, rows in (("forward", 5), ("reverse", 5), ("random:7", 5), ("forward", 1)):
            monkeypatch.setenv("AMQ_SHIM_ORDER", order)
            out.copy_(start)
            run(library, struct, **fields | {"rows": rows})
            results.append(out.clone())
        assert all(torch.equal(result, results[0]) for result in results[:-1])
        assert torch.equal(results[-1][0], results[0][0])


def test_refusals(library) -> None:
    x = torch.zeros(64)
    odd = torch.zeros(9, dtype=torch.uint8)[1:].data_ptr()
    norm = {
        "rows": 1,
        "features": 8,
        "parts": 1,
        "y_kind": 2,
        "x": x,
        "x_stride": 8,
        "y": x,
        "y_stride": 8,
        "factor": 1.0,
    }
    embed = {"rows": 1, "columns": 8, "tokens": torch.zeros(1, dtype=torch.int32), "table_rows": 2, "data": x, "y": x}
    embed |= {"bits": 4, "group_size": 32, "scales": x, "zero_points": x, "row_bytes": 4}
    small = dense_fields(1, 4, 8, torch.float32, torch.float32) | {"y_kind": 2, "y": x, "y_stride": 4}
    gated = {"rows": 1, "features": 8, "activation": 0, "y_kind": 2, "gate": x, "up": x, "y": x}
    finish = {"rows": 1, "features": 8, "stream": x, "y": x}
    layers = {"rows": 1, "columns": 8, "width": 4, "sum": x, "token": x, "norm": x}
    turn = {"rows": 1, "features": 64, "kind": 2, "x": x, "x_stride": 64, "y": x, "y_stride": 64}
    kinds = (cuda_calls.NormCall, norm), (cuda_calls.EmbedCall, embed), (cuda_calls.DenseCall, small)
    kinds += ((cuda_calls.RotateCall, turn),)
    kinds += (cuda_calls.ActivateCall, gated), (cuda_calls.FinishCall, finish), (cuda_calls.PerLayerCall, layers)
    for struct, fields in kinds:
        run(library, struct, **fields)
        run(library, struct, rows=0)
        with pytest.raises(AmqError, match=r"-1: the number of rows"):
            run(library, struct, **fields | {"rows": -1})
    refused = [
        *(
            (cuda_calls.NormCall, norm | changed, -6)
            for changed in ({"x": None}, {"y": odd}, {"parts": 0}, {"weight": odd})
        ),
        (cuda_calls.NormCall, norm | {"y_kind": 3}, -5),
        (cuda_calls.RotateCall, turn | {"kind": 3}, -5),
        *(
            (cuda_calls.RotateCall, turn | changed, -6)
            for changed in ({"features": 96}, {"x": odd}, {"y": None}, {"y_stride": 72})
        ),
        (cuda_calls.NormCall, norm | {"y_kind": 0}, -6),
        (cuda_calls.NormCall, norm | {"y_stride": 9}, -6),
        *(
            (cuda_calls.EmbedCall, embed | changed, -6)
            for changed in ({"data": None}, {"table_rows": 0}, {"tokens": odd})
        ),
        (cuda_calls.EmbedCall, embed | {"kind": 5}, -5),
        *((cuda_calls.EmbedCall, embed | {"kind": kind, "bits": 9}, -3) for kind in (PACKED_ROWS, PREPARED)),
        *((cuda_calls.EmbedCall, embed | {"kind": kind, "group_size": 48}, -4) for kind in (PACKED_ROWS, PREPARED)),
        (cuda_calls.EmbedCall, embed | {"kind": PACKED_ROWS, "row_bytes": 3}, -6),
        (cuda_calls.EmbedCall, embed | {"kind": PREPARED, "data": x[1:]}, -6),
        *((cuda_calls.DenseCall, small | {name: 4}, -5) for name in ("element", "x_kind", "y_kind")),
        *(
            (cuda_calls.DenseCall, small | changed, -6)
            for changed in ({"weight": odd}, {"x": None}, {"in_features": 0})
        ),
        *(
            (cuda_calls.ActivateCall, gated | changed, -6)
            for changed in ({"activation": 4}, {"up": None}, {"features": 0})
        ),
        (cuda_calls.FinishCall, finish | {"post_norm": odd}, -6),
        (cuda_calls.PerLayerCall, layers | {"width": 3}, -6),
        *((cuda_calls.SoftcapCall, {"count": 1, "x": x} | changed, -6) for changed in ({}, {"cap": 1.0, "x": None})),
    ]
    for struct, fields, status in refused:
        with pytest.raises(AmqError, match=rf"{struct.__name__}: the kernels refuse the call \({status}: "):
            run(library, struct, **fields)
