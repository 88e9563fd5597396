"""Linear kernels against float64: every format, instruction set and activation mode; and what must be equal to the bit.

Shapes are a covering design: every number of rows, output rows, input features and every group size occurs, each
number of input features with each group size. What goes wrong at the borders of memory and of float32 is in
test_linear_faults.py.
"""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from helpers.packed import assert_same_bits, random_packed
from helpers.reference import (
    FLOOR,
    ISAS,
    MODES,
    UNIT,
    Weight,
    assert_as_accurate_as_torch,
    every_isa_and_mode,
    every_kernel,
    make_weight,
    prepare_into,
    product,
    random_x,
    rounding_bound,
    run,
    seen_by,
    torch_threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from amq.formats import FORMATS, GROUP_SIZES
from amq.kernels import backends
from amq.kernels import cpu as native
from amq.packing import PackedWeight, unpack_codes

pytestmark = pytest.mark.usefixtures("one_thread")

M = (1, 2, 3, 4, 5, 8, 16, 17, 33, 513)
N = (1, 15, 16, 17, 33, 100, 125)
K = (1, 31, 32, 33, 100, 129, 576, 1000, 1536)
SHAPES = [
    (M[i % len(M)], N[(i + i // len(M)) % len(N)], k, group_size)
    for i, (group_size, k) in enumerate(itertools.product(GROUP_SIZES, K))
] + [(513, 17, 200, 64), (300, 33, 100, 32), (140, 50, 161, 64), (4, 125, 576, 128), (3, 100, 129, 32)]
ELEMENTS = 64
"""An error is averaged over at least so many outputs, so that neither side's luck decides."""


def check_shape(name: str, isa: str, mode: str, shape: tuple[int, int, int, int], seed: int = 0) -> None:
    rows, out_features, in_features, group_size = shape
    weight = make_weight(name, out_features, in_features, group_size)
    calls = -(-ELEMENTS // (rows * out_features))
    x = random_x(calls * rows, in_features, seed)
    y = torch.cat([run(part, [weight], mode, isa) for part in x.split(rows)])
    seen = seen_by(mode, x, group_size)
    what = f"{name}-{isa}-{mode}-M{rows}-N{out_features}-K{in_features}-g{group_size}"
    assert_as_accurate_as_torch(y, seen, weight.dense, what)
    if mode == "int8":
        assert_within_stated_bound(y, x, weight, what)


def assert_within_stated_bound(y: torch.Tensor, x: torch.Tensor, weight: Weight, what: str) -> None:
    """|y − y_fp32| ≤ Σ_g a/2 · Σ|W|, a = max|x| / 127, and the roundings of float32."""
    group_size = weight.packed.group_size
    bound = rounding_bound(x, weight.dense)
    for first in range(0, x.shape[1], group_size):
        group = slice(first, first + group_size)
        largest = x[:, group].double().abs().amax(1)
        bound += largest[:, None] / 127 / 2 * weight.dense[:, group].double().abs().sum(1)
    excess = (y - product(x, weight.dense)[0]).abs() / bound.clamp_min(torch.finfo(torch.float32).tiny)
    assert excess.max() <= 1, f"{what}: {excess.max():.3f} times the bound of rounded activations"


@every_kernel
def test_as_accurate_as_torch(name: str, isa: str, mode: str) -> None:
    for shape in SHAPES:
        check_shape(name, isa, mode, shape)


def test_shapes_cover_what_they_should() -> None:
    for place, values in enumerate((M, N, K, GROUP_SIZES)):
        assert {shape[place] for shape in SHAPES} >= set(values)


@every_kernel
def test_any_shape(name: str, isa: str, mode: str) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.tuples(st.integers(1, 40), st.integers(1, 150), st.integers(1, 300), st.sampled_from(GROUP_SIZES)),
        seed=st.integers(0, 9),
    )
    def fuzz(shape: tuple[int, int, int, int], seed: int) -> None:
        check_shape(name, isa, mode, shape, seed)

    fuzz()


@pytest.mark.parametrize("rows", (1, 2, 4, 70), ids="M{}".format)
@every_kernel
def test_one_hot_returns_a_column(name: str, isa: str, mode: str, rows: int) -> None:
    """fp32: up to one rounding; int8 rounds the activation and its scale too."""
    weight = make_weight(name, 20, 70, 32)
    x = torch.eye(70)
    y = torch.cat([run(part.contiguous(), [weight], mode, isa) for part in x.split(rows)])
    expected = weight.dense.T
    allowed = (2 if mode == "fp32" else 2 * FLOOR) * UNIT * expected.abs()
    for k in range(70):
        wrong = ((y[k] - expected[k]).abs() > allowed[k]).nonzero().flatten().tolist()
        assert not wrong, f"x = e_{k}, output rows {wrong}: got {y[k, wrong]}, column {k} holds {expected[k, wrong]}"


def test_reference_backend_is_torch() -> None:
    """The specification itself, so that comparing against the backend `reference` means something."""
    for name, group_size, mode in itertools.product(FORMATS, GROUP_SIZES, MODES):
        packed = random_packed(FORMATS[name], 7, 201, group_size)
        x = random_x(5, 201)
        prepared = backends.prepare(packed, "reference")
        y = backends.get_backend("reference").linear(x, [prepared], None, mode)
        dense = make_weight(name, 7, 201, group_size).dense
        assert torch.equal(y, seen_by(mode, x, group_size) @ dense.T), (name, group_size, mode)


def test_quantize_activations_by_hand() -> None:
    """Largest 127 steps, ties to even, groups apart, a ragged last one."""
    x = torch.zeros(2, 40)
    x[0, :4] = torch.tensor([254.0, -3.0, 5.0, 2.9])  # a = 2: −1.5 → −2, 2.5 → 2, 1.45 → 1
    x[0, 32:34] = torch.tensor([-12.7, 0.26])  # a = 0.1: 2.6 → 3
    x[1, 7] = torch.inf
    seen = backends.quantize_activations(x, 32)
    assert seen[0, :5].tolist() == [254, -4, 4, 2, 0]
    torch.testing.assert_close(seen[0, 32:36], torch.tensor([-12.7, 0.3, 0, 0]), rtol=2 * UNIT, atol=0)
    assert seen[1, :32].isnan().all() and (seen[1, 32:] == 0).all()


@every_isa_and_mode
def test_thread_counts_and_repetition_change_no_bit(isa: str, mode: str) -> None:
    for name, rows in itertools.product(FORMATS, (1, 3, 16, 130)):
        weight, x = make_weight(name, 200, 576, 64), random_x(rows, 576)
        expected = run(x, [weight], mode, isa)
        for count in (1, 2, 3, 8):
            with torch_threads(count):
                assert_same_bits(run(x, [weight], mode, isa), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_int8_row_alone_equals_the_row_in_a_batch(name: str, isa: str) -> None:
    """Which kernel runs depends on the number of rows; a row's bits must not."""
    weight, x = make_weight(name, 33, 161, 32), random_x(40, 161)
    alone = torch.cat([run(row[None], [weight], "int8", isa) for row in x])
    for rows in range(1, 41):
        first = 40 - rows  # so that a row is met at every place of a panel
        assert_same_bits(run(x[first:].contiguous(), [weight], "int8", isa), alone[first:])
    many = x.repeat(13, 1)  # more rows than are handled at once
    assert_same_bits(run(many, [weight], "int8", isa), alone.repeat(13, 1))


@pytest.mark.parametrize("name", FORMATS)
def test_int8_fused_instruction_sets_agree(name: str) -> None:
    """All but portable fuse every multiply-add, in one order: no bit may differ."""
    fused = [isa for isa in ISAS if isa != "portable"]
    if len(fused) < 2:
        pytest.skip(f"this processor runs {', '.join(ISAS)}: there are no two to compare")
    for rows, shape in itertools.product((1, 2, 3, 4, 5, 16, 33), ((100, 576, 64), (17, 129, 32), (33, 1000, 128))):
        weight, x = make_weight(name, *shape), random_x(rows, shape[1])
        expected = run(x, [weight], "int8", fused[0])
        for isa in fused[1:]:
            assert_same_bits(run(x, [weight], "int8", isa), expected)


@every_isa_and_mode
def test_fused_equals_separate_calls(isa: str, mode: str) -> None:
    """One to four linears that share x: other formats, ragged ends, one without rows; bias included."""
    sizes = (33, 0, 16, 100)
    for count, rows, shift in itertools.product((1, 2, 3, 4), (1, 4, 18), (0, 2)):
        names = [list(FORMATS)[(i + shift) % len(FORMATS)] for i in range(count)]
        weights = [make_weight(name, n, 161, 64) for name, n in zip(names, sizes, strict=False)]
        x, bias = random_x(rows, 161), torch.randn(sum(sizes[:count]))
        for given_bias in (None, bias):
            parts = [None] * count if given_bias is None else given_bias.split(sizes[:count])
            separate = [run(x, [w], mode, isa, b) for w, b in zip(weights, parts, strict=True)]
            with torch_threads(3):
                assert_same_bits(run(x, weights, mode, isa, given_bias), torch.cat(separate, 1))


@every_isa_and_mode
def test_bias_is_added_once(isa: str, mode: str) -> None:
    weight, bias = make_weight("int4", 33, 100, 32), torch.randn(33)
    for rows in (1, 3, 20):
        x = random_x(rows, 100)
        assert_same_bits(run(x, [weight], mode, isa, bias), run(x, [weight], mode, isa) + bias)


def test_prepared_size() -> None:
    """Within 1.02 × packed where it matters, and equal wherever blocks are whole."""
    for name, group_size in itertools.product(FORMATS, GROUP_SIZES):
        for rows, in_features in ((576, 1536), (4096, 4096), (11008, 4096), (100, 96), (5, 32), (999, 1000), (3, 4000)):
            packed = FORMATS[name].stored_bytes(rows, in_features, group_size)
            prepared = native.cpu_module().prepared_bytes(name, rows, in_features, group_size)
            assert packed <= prepared <= 1.02 * packed or in_features < 1024, (name, group_size, rows, in_features)
            assert in_features % 32 or prepared == packed, (name, group_size, rows, in_features)
        weight = make_weight(name, 33, 100, group_size)
        assert weight.prepared.nbytes == native.cpu_module().prepared_bytes(name, 33, 100, group_size)


@pytest.mark.parametrize("name", FORMATS)
def test_prepare_on_any_instruction_set_and_threads(name: str) -> None:
    for in_features, group_size in itertools.product((1, 33, 129, 576), GROUP_SIZES):
        weight = make_weight(name, 37, in_features, group_size)
        for isa, threads in itertools.product(ISAS, (1, 3)):
            out = torch.full_like(weight.prepared.data, 0xA5)  # nothing of it may be left
            prepare_into(weight.packed, out, isa, threads)
            assert torch.equal(out, weight.prepared.data), (in_features, group_size, isa, threads)


@pytest.mark.parametrize("name", FORMATS)
def test_spare_bits_of_a_row_do_not_matter(name: str) -> None:
    """What a row's last byte holds beyond its last code is anyone's: GPTQ checkpoints need not zero it."""
    for in_features in (1, 3, 33, 101):
        packed = random_packed(FORMATS[name], 5, in_features, 32)
        dirty = packed.qweight.clone()
        for bit in range(8):
            changed = dirty.clone()
            changed[:, -1] |= 1 << bit
            if torch.equal(*(unpack_codes(q, packed.format, in_features) for q in (changed, packed.qweight))):
                dirty = changed
        soiled = PackedWeight(packed.format, in_features, 32, dirty, packed.scale, packed.zero_point)
        assert torch.equal(backends.prepare(soiled).data, backends.prepare(packed).data)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_the_packed_weight_can_go(backend: str) -> None:
    packed = random_packed(FORMATS["int3"], 33, 100, 32)
    watched = [weakref.ref(t.untyped_storage()) for t in (packed.qweight, packed.scale, packed.zero_point)]
    prepared = backends.prepare(packed, backend)
    before, x = prepared.data.clone(), random_x(2, 100)
    expected = backends.get_backend(backend).linear(x, [prepared], None, "fp32")
    packed.qweight.zero_()
    packed.scale.zero_()
    del packed
    assert not [ref for ref in watched if ref() is not None]
    assert torch.equal(prepared.data, before)
    assert torch.equal(backends.get_backend(backend).linear(x, [prepared], None, "fp32"), expected)
