"""Linear kernels of rotated weights: the bits of plain ones on `amq.rotation.rotate(x)`, whichever kernel runs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.packed import assert_same_bits, random_packed
from helpers.reference import Weight, every_isa_and_mode, make_weight, random_x, run, torch_threads

from amq.errors import AmqError
from amq.formats import FORMATS, GROUP_SIZES
from amq.kernels import backends, ops
from amq.kernels import cpu as native
from amq.packing import PreparedWeight, dequantize
from amq.rotation import rotate

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = (1, 2, 3, 4, 5, 17, 64, 513)
"""Panels of every kernel, some ragged, and more rows than are laid out at once."""
FEATURES = (64, 192, 576, 1600)
"""Blocks that span groups of 32, and groups of 128 whose last one is half filled."""


def rotated(weight: Weight) -> PreparedWeight:
    """What holds W H where the weight holds W."""
    return replace(weight.prepared, rotation=64)


@every_isa_and_mode
def test_x_is_rotated_to_the_bit(isa: str, mode: str) -> None:
    for i, (rows, features, group_size) in enumerate(itertools.product(ROWS, FEATURES, GROUP_SIZES)):
        weight = make_weight(list(FORMATS)[i % len(FORMATS)], 17, features, group_size)
        x = random_x(rows, features, i)
        before = x.clone()
        y = native.linear(x, [rotated(weight)], None, mode, isa)
        assert_same_bits(y, run(rotate(x), [weight], mode, isa))
        assert_same_bits(x, before)


@every_isa_and_mode
def test_nan_and_infinity_spread_over_their_block(isa: str, mode: str) -> None:
    for group_size, place, value in itertools.product(GROUP_SIZES, (0, 63, 64, 191), (torch.nan, torch.inf)):
        weight = make_weight("int4", 17, 192, group_size)
        x = random_x(6, 192)
        x[2, place] = value
        y = native.linear(x, [rotated(weight)], None, mode, isa)
        expected = run(rotate(x), [weight], mode, isa)
        assert y[2].isnan().all()
        assert torch.equal(y.isnan(), expected.isnan())
        others = torch.arange(6) != 2
        assert_same_bits(y[others], expected[others])


@every_isa_and_mode
def test_several_linears_and_grouped_ones(isa: str, mode: str) -> None:
    names, sizes = list(FORMATS)[:4], (2, 0, 5, 18)
    for group_size, threads in itertools.product(GROUP_SIZES, (1, 3)):
        weights = [make_weight(name, 33, 576, group_size) for name in names]
        several = [rotated(weight) for weight in weights]
        x, bias = random_x(sum(sizes), 576), torch.randn(33 * len(names))
        seen = rotate(x)
        with torch_threads(threads):
            assert_same_bits(native.linear(x, several, bias, mode, isa), run(seen, weights, mode, isa, bias))
            grouped = native.grouped_linear(x, several, sizes, bias.split(33), mode, isa)
            plain = native.grouped_linear(seen, [w.prepared for w in weights], sizes, bias.split(33), mode, isa)
            assert_same_bits(grouped, plain)
            each = native.linear_each(x[:3], several, mode, isa)
            assert_same_bits(each, run(seen[:3], weights[-1:], mode, isa))


def test_the_op_multiplies_by_the_weight_itself() -> None:
    """Rotated x on codes of W H is x on W."""
    for i, (name, group_size) in enumerate(itertools.product(FORMATS, GROUP_SIZES)):
        packed = replace(random_packed(FORMATS[name], 33, 576, group_size), rotation=64)
        x, weight = random_x(5, 576, i), dequantize(packed)
        y = ops.linear(x, [backends.prepare(packed)], activations="fp32")
        size = x.norm(dim=1)[:, None] * weight.norm(dim=1)
        assert ((y - x @ weight.T).abs() / size).max() < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    plain, other = make_weight("int4", 17, 192, 32), make_weight("int2", 17, 192, 32)
    with pytest.raises(AmqError, match="fused linears must share rotation; expected 64, got 0"):
        native.linear(random_x(2, 192), [rotated(plain), other.prepared], None, "int8")
    with pytest.raises(AmqError, match="fused linears must share rotation; expected 0, got 64"):
        native.grouped_linear(random_x(2, 192), [plain.prepared, rotated(other)], (1, 1), (None, None), "int8")
    ragged = make_weight("int4", 17, 100, 32)
    with pytest.raises(AmqError, match="in_features of a rotated weight: expected a multiple of 64, got 100"):
        native.linear(random_x(2, 100), [rotated(ragged)], None, "fp32")
    with pytest.raises(AmqError, match="in_features of a rotated weight: expected a multiple of 64, got 100"):
        native.grouped_linear(random_x(2, 100), [rotated(ragged)], (2,), (None,), "fp32")
