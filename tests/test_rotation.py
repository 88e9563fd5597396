"""amq.rotation, and what packed weights, the op and the record make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.packed import assert_same_bits, random_packed

from amq.checkpoint.record import QuantizationRecord
from amq.errors import AmqError
from amq.formats import get_format
from amq.kernels import dense
from amq.kernels.backends import prepare, quantize_activations
from amq.kernels.dense import dequantize_into
from amq.kernels.ops import grouped_linear, linear
from amq.packing import PackedWeight, dequantize
from amq.rotation import WIDTH, check_width, rotate


def hadamard(width: int) -> torch.Tensor:
    """Sylvester's, by its definition: entry (i, j) is −1 to the number of bits that i and j share."""
    bits = torch.tensor([[bin(i & j).count("1") for j in range(width)] for i in range(width)])
    return (1 - 2 * (bits % 2)).double() / width**0.5


def rotated(packed: PackedWeight) -> PackedWeight:
    return replace(packed, rotation=WIDTH)


def test_it_is_the_normalised_hadamard_matrix_of_each_block():
    x = torch.randn(3, 5, 3 * WIDTH, dtype=torch.float64)
    expected = (x.unflatten(-1, (3, WIDTH)) @ hadamard(WIDTH)).flatten(-2)
    torch.testing.assert_close(rotate(x), expected, rtol=0, atol=1e-12)


def test_it_undoes_itself_and_keeps_products():
    x, w = torch.randn(4, 2 * WIDTH, dtype=torch.float64), torch.randn(7, 2 * WIDTH, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate(x) @ rotate(w).T, x @ w.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_it_computes_in_float32_and_keeps_dtype_and_input(dtype):
    x = torch.randn(2, WIDTH).to(dtype)
    before = x.clone()
    assert_same_bits(rotate(x), rotate(x.float()).to(dtype))
    assert_same_bits(x, before)


def test_it_takes_strided_and_empty_input():
    x = torch.randn(WIDTH, 6).t()
    assert_same_bits(rotate(x), rotate(x.contiguous()))
    assert rotate(torch.empty(0, WIDTH)).shape == (0, WIDTH)


@pytest.mark.parametrize("features", (1, 32, 96, WIDTH + 1))
def test_a_width_that_does_not_divide_is_refused(features):
    with pytest.raises(
        AmqError, match=f"{features} input features cannot be rotated {WIDTH} at a time.*--rotation auto"
    ):
        check_width(features)
    with pytest.raises(AmqError, match="does not divide"):
        rotated(random_packed(get_format("int4"), 2, features, 32))


def test_another_width_is_refused():
    packed = random_packed(get_format("int4"), 2, 2 * WIDTH, 32)
    with pytest.raises(AmqError, match="0 or 64 features wide, got 32"):
        replace(packed, rotation=32)


@pytest.mark.parametrize("group_size", (32, 64, 128))
@pytest.mark.parametrize("fmt", ("int2", "int3", "int8"))
def test_dequantizing_rotates_back(fmt, group_size):
    packed = random_packed(get_format(fmt), 5, 3 * WIDTH, group_size)
    assert_same_bits(dequantize(rotated(packed)), rotate(dequantize(packed)))
    out = torch.empty(5, 3 * WIDTH)
    dequantize_into(rotated(packed), out)
    assert_same_bits(out, dequantize(rotated(packed)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_gpu_rounds_what_is_rotated_back_once(monkeypatch, dtype):
    """In pieces, whose last has fewer rows; by Triton's kernel, which writes what is stored, in the dtype of `out`."""
    packed = rotated(random_packed(get_format("int3"), 5, 3 * WIDTH, 32))

    def dequantize_rows(part, out):
        out.copy_(dequantize(replace(part, rotation=0)))

    monkeypatch.setattr(dense, "PIECE", 2 * 3 * WIDTH)
    monkeypatch.setattr(dense.triton, "dequantize_rows", dequantize_rows)
    out = torch.full((5, 3 * WIDTH), torch.nan, dtype=dtype)
    dense._by_triton(packed, out)
    assert_same_bits(out, dequantize(packed, dtype))


def test_parts_of_a_weight_stay_rotated():
    packed = rotated(random_packed(get_format("int3"), 6, WIDTH, 64))
    assert packed.rows(1, 3).rotation == packed.to("cpu").rotation == prepare(packed).rotation == WIDTH


@pytest.mark.parametrize("activations", ("fp32", "int8"))
@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_linears_rotate_x_and_then_round_it(backend, activations):
    packed = random_packed(get_format("int4"), 24, 2 * WIDTH, 64)
    x = torch.randn(3, 2 * WIDTH)
    inner = rotate(x)
    expected = (quantize_activations(inner, 64) if activations == "int8" else inner) @ dequantize(packed).T
    weight = prepare(rotated(packed), backend)
    torch.testing.assert_close(linear(x, [weight], activations=activations), expected, rtol=1e-4, atol=1e-4)
    together = grouped_linear(x, [weight, weight], [1, 2], activations=activations)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_one_call_has_one_rotation():
    packed = random_packed(get_format("int4"), 8, WIDTH, 64)
    with pytest.raises(AmqError, match="fused linears must share rotation; expected 0, got 64"):
        linear(torch.randn(1, WIDTH), [prepare(packed), prepare(rotated(packed))])


def record(**changes):
    shapes = {"q": (8, WIDTH), "k": (8, WIDTH), "down": (8, 96), "head": (8, WIDTH)}
    found = dict(
        formats=dict.fromkeys(shapes, "int4"), shapes=shapes, group_size=64, shared_inputs=(("q", "k"),), head="head",
        rotation={"q": WIDTH, "k": WIDTH},
    )  # fmt: skip
    return QuantizationRecord(**{**found, **changes})


def test_the_record_comes_back_and_has_a_version_of_its_own():
    written = record().json()
    assert written["version"] == 4 and written["rotation"] == {"q": WIDTH, "k": WIDTH}
    assert QuantizationRecord.parse(written, "config.json") == record()
    assert "rotation" not in record(rotation={}).json()


@pytest.mark.parametrize(
    ("rotation", "message"),
    (
        ({"v": WIDTH}, "rotation names 'v', which has no format"),
        ({"head": WIDTH}, "rotation names 'head', a head or embedding, which is never rotated"),
        ({"down": WIDTH}, "down: 96 input features cannot be rotated"),
        ({"q": WIDTH}, "'q' and other linears that read its input are not rotated alike"),
        ({"q": 32, "k": 32}, "q: a rotation is 0 or 64 features wide, got 32"),
    ),
)
def test_a_record_that_cannot_be_is_refused(rotation, message):
    with pytest.raises(AmqError, match=message):
        QuantizationRecord.parse(record(rotation=rotation).json(), "config.json")


def test_an_earlier_version_has_no_rotation():
    with pytest.raises(AmqError, match="version 1 has no rotations"):
        QuantizationRecord.parse({**record().json(), "version": 1}, "config.json")
