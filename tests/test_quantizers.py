"""Every quantizer on every format, group size and ragged width: valid grids, derived error bounds, hard inputs."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.quantizing import output_error, random_gram, random_weight
from helpers.reference import torch_threads
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS, GROUP_SIZES, BitFormat, n_groups
from amq.packing import PackedWeight, dequantize, expand_groups, unpack_codes
from amq.quantize.quantizers import QUANTIZERS
from amq.quantize.quantizers.gptq import DAMPING, SWEEPS, damped
from amq.quantize.quantizers.grid import TINY, expand, fitted_grid, to_groups
from amq.util.threads import parallel_map

IN_FEATURES = (32, 100, 128, 200)
ALL = tuple(FORMATS.values())
one_thread = pytest.mark.usefixtures("one_thread")
by_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
by_group_size = pytest.mark.parametrize("group_size", GROUP_SIZES)


def quantize(
    name: str, weight: Tensor, formats: tuple[BitFormat, ...] = ALL, group_size: int = 64, gram: Tensor | None = None
) -> dict[str, PackedWeight]:
    gram = random_gram(weight.shape[1]) if gram is None else gram
    return QUANTIZERS[name]([weight], formats, group_size, gram)[0]


@by_quantizer
@one_thread
@by_group_size
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_valid_packed_weights(name: str, group_size: int, in_features: int) -> None:
    """Shapes are checked by PackedWeight; here: finite grids, positive scales, less error with every wider format."""
    weight = random_weight(24, in_features)
    result = quantize(name, weight, group_size=group_size)
    assert list(result) == list(FORMATS)
    errors = []
    for fmt in ALL:
        packed = result[fmt.name]
        assert packed.qweight.shape == (24, fmt.row_bytes(in_features))
        assert packed.scale.shape == (24, n_groups(in_features, group_size))
        assert torch.isfinite(packed.scale).all() and torch.isfinite(packed.zero_point).all()
        assert (packed.scale > 0).all()
        assert int(unpack_codes(packed.qweight, fmt, in_features).max()) == fmt.max_code  # the whole range is used
        errors.append(float((dequantize(packed) - weight).norm()))
    assert all(wide < narrow for narrow, wide in zip(errors, errors[1:], strict=False))


@one_thread
@by_group_size
@pytest.mark.parametrize("in_features", IN_FEATURES)
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_rtn_error_is_at_most_half_a_step(fmt: BitFormat, group_size: int, in_features: int) -> None:
    """fp16 rounding of scale and zero point moves the range's ends by at most 2·2⁻¹¹ of max_code steps more."""
    weight = random_weight(24, in_features)
    packed = quantize("rtn", weight, (fmt,), group_size)[fmt.name]
    steps = (dequantize(packed) - weight).abs() / expand_groups(packed.scale.float(), group_size, in_features)
    assert float(steps.max()) <= 0.5 + 2 * 2**-11 * fmt.max_code + 1e-3


@by_quantizer
def test_int8_is_nearly_exact(name: str) -> None:
    """With 255 steps over about ±3.5 sigma, uniform rounding leaves 7/255/√12 = 0.8 % of the norm."""
    weight = random_weight(64, 256)
    packed = quantize(name, weight, (FORMATS["int8"],), 128, torch.eye(256))["int8"]
    assert float((dequantize(packed) - weight).norm() / weight.norm()) < 0.012


@one_thread
@by_group_size
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_gptq_output_error_is_below_rtn_s(group_size: int, in_features: int) -> None:
    weight, gram = random_weight(48, in_features), random_gram(in_features)
    gptq, rtn = (quantize(n, weight, ALL, group_size, gram) for n in ("gptq", "rtn"))
    for fmt in ALL:
        ours, baseline = (float(output_error(weight, r[fmt.name], gram).sum()) for r in (gptq, rtn))
        assert ours < (0.75 if fmt.levels <= 16 else 1.0) * baseline, fmt.name


@one_thread
@pytest.mark.parametrize("in_features", [32, 100, 200])
def test_gptq_codes_are_optimal_brain_surgery_s(in_features: int) -> None:
    """The textbook algorithm in float64, feature by feature, H⁻¹ reduced by each: no factor, no blocks of features; and
    then what every code would be alone, from the errors of all others as they stand."""
    weight, gram, fmt = random_weight(20, in_features), random_gram(in_features), FORMATS["int3"]
    hessian = damped(gram)
    importance = to_groups(hessian.diagonal().unsqueeze(0), 64)[0]
    scale, zero = (t.double() for t in expand(fitted_grid(to_groups(weight, 64), importance, fmt), 64, in_features))
    inverse, work = torch.linalg.inv(hessian.double()), weight.double()
    expected = torch.empty(weight.shape)
    for k in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        codes = (work[:, k] / scale[:, k] + zero[:, k]).round().clamp(0, fmt.max_code)
        expected[:, k] = codes
        error = work[:, k] - (codes - zero[:, k]) * scale[:, k]
        work = work - error.unsqueeze(1) * inverse[k] / inverse[k, k]  # the features still open make up for it
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]  # and feature k is closed
    left = weight.double() - (expected.double() - zero) * scale
    for k in [*range(in_features)] * SWEEPS:
        others = left @ hessian[:, k].double() - left[:, k] * hessian[k, k]
        codes = ((weight[:, k] + others / hessian[k, k]) / scale[:, k] + zero[:, k]).round().clamp(0, fmt.max_code)
        expected[:, k], left[:, k] = codes, weight[:, k] - (codes - zero[:, k]) * scale[:, k]
    found = unpack_codes(quantize("gptq", weight, (fmt,), 64, gram)["int3"].qweight, fmt, in_features)
    # A tie that float32 breaks the other way changes what follows in its row, and in no other.
    assert float((found == expected).all(1).float().mean()) >= 0.9


def test_importance_directs_gptq() -> None:
    """Inputs that hardly ever fire may be wrong; those that do must not be."""
    weight, strong = random_weight(32, 128), torch.arange(128) % 4 == 0
    gram = torch.where(strong, 100.0, 0.01).diag()
    packed = quantize("gptq", weight, (FORMATS["int3"],), 128, gram)["int3"]
    plain = quantize("gptq", weight, (FORMATS["int3"],), 128, torch.eye(128))["int3"]
    error, even = ((dequantize(p) - weight).square().mean(0) for p in (packed, plain))
    assert float(error[strong].mean()) < 0.85 * float(even[strong].mean())
    assert float(error[~strong].mean()) > float(even[~strong].mean())


@one_thread
@by_quantizer
@pytest.mark.parametrize("in_features", [100, 128])
@pytest.mark.parametrize("value", [0.0, 0.03, -0.7, 1e-6, 200.0])
def test_constant_rows(name: str, value: float, in_features: int) -> None:
    """Every constant is representable up to fp16's rounding, since grids include zero; tiny ones round to zero."""
    weight = torch.full((4, in_features), value)
    for fmt_name, packed in quantize(name, weight, group_size=32).items():
        restored = dequantize(packed)
        assert torch.isfinite(restored).all(), fmt_name
        assert float((restored - weight).abs().max()) <= 2**-10 * abs(value) + TINY / 2, fmt_name
        if value == 0.0:
            assert not restored.any(), fmt_name


@by_quantizer
def test_single_outlier(name: str) -> None:
    """One weight a thousand times the others spoils its group and no other."""
    weight = random_weight(8, 128)
    clean = {f: dequantize(p) for f, p in quantize(name, weight, group_size=32, gram=torch.eye(128)).items()}
    weight[3, 70] = 50.0
    for fmt_name, packed in quantize(name, weight, group_size=32, gram=torch.eye(128)).items():
        restored = dequantize(packed)
        assert torch.isfinite(restored).all()
        assert float(restored[3, 70]) == pytest.approx(50.0, rel=0.02), fmt_name
        elsewhere = torch.ones(8, 128, dtype=torch.bool)
        elsewhere[3, 64:96] = False
        error, before = ((r - weight)[elsewhere].norm() for r in (restored, clean[fmt_name]))
        assert float(error) <= 1.1 * float(before), fmt_name


@one_thread
@by_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_float_dtype(name: str, dtype: torch.dtype) -> None:
    weight = random_weight(8, 96).to(dtype)
    for fmt_name, packed in quantize(name, weight).items():
        expected = quantize(name, weight.float())[fmt_name]
        assert all(torch.equal(getattr(packed, f), getattr(expected, f)) for f in ("qweight", "scale", "zero_point"))


@one_thread
@by_quantizer
def test_stacked_linears_are_quantized_as_if_alone(name: str) -> None:
    """Several linears that share an input, more than one chunk of rows; rows do not see each other."""
    weights = [random_weight(rows, 100, seed=rows) for rows in (300, 7, 290)]
    gram = random_gram(100)
    formats = (FORMATS["int2"], FORMATS["int4"])
    together = QUANTIZERS[name](weights, formats, 32, gram)
    for weight, result in zip(weights, together, strict=True):
        alone = quantize(name, weight, formats, 32, gram)
        for fmt in formats:
            assert result[fmt.name].out_features == len(weight)
            a, b = (output_error(weight, r[fmt.name], gram) for r in (alone, result))
            # A matrix product over another number of rows may round differently and flip a code, in few rows.
            same = (a - b).abs() <= 1e-3 * a
            assert float(same.float().mean()) > 0.95, fmt.name
            assert float(b.sum()) == pytest.approx(float(a.sum()), rel=1e-2)


@pytest.mark.parametrize(("name", "rows"), [("gptq", 40), ("gptq", 1100), ("hqq", 40), ("rtn", 1100)])
def test_threads_do_not_matter(name: str, rows: int) -> None:
    """Nor does their order: the same bytes every time."""
    weight, gram = random_weight(rows, 160), random_gram(160)
    formats = (FORMATS["int3"], FORMATS["int8"])
    results = {}
    for count in (1, 2, 3, 1, 2, 3):
        with torch_threads(count):
            found = quantize(name, weight, formats, 64, gram)
            assert torch.get_num_threads() == count
        for fmt in formats:
            codes = unpack_codes(found[fmt.name].qweight, fmt, 160)
            assert torch.equal(codes, results.setdefault(fmt, codes))


def test_parallel_map_keeps_order_errors_and_threads() -> None:
    with torch_threads(3):
        assert parallel_map(lambda i: (i, torch.get_num_threads()), list(range(20))) == [(i, 1) for i in range(20)]
        with ThreadPoolExecutor(1) as pool:  # new threads start from the last count that any thread set
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3

        def fail(i: int) -> int:
            if i == 7:
                raise KeyError(i)
            return i

        with pytest.raises(KeyError, match="7"):
            parallel_map(fail, list(range(20)))
        assert torch.get_num_threads() == 3 and parallel_map(fail, []) == []
        assert parallel_map(lambda i: torch.is_grad_enabled(), [0, 1, 2]) == [False] * 3


@pytest.mark.parametrize("rank", [0, 1, 10])
def test_singular_hessian(rank: int) -> None:
    """Fewer calibration tokens than features, or none that fire: damped, it is solvable and no worse than rounding."""
    weight = random_weight(16, 128)
    x = torch.randn(rank, 128, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x / max(rank, 1)
    formats = (FORMATS["int2"], FORMATS["int4"])
    gptq, rtn = (quantize(n, weight, formats, 64, gram) for n in ("gptq", "rtn"))
    for fmt in formats:
        assert torch.isfinite(dequantize(gptq[fmt.name])).all()
        ours, baseline = (output_error(weight, r[fmt.name], gram).sum() for r in (gptq, rtn))
        assert float(ours) <= float(baseline)
        assert float((dequantize(gptq[fmt.name]) - weight).norm()) < float(weight.norm())


def test_dead_features_do_not_matter() -> None:
    """Features that never fire have zero rows in H, which damping fills."""
    weight, gram = random_weight(16, 128), random_gram(128)
    dead = torch.arange(128) % 3 == 0
    gram[dead] = 0.0
    gram[:, dead] = 0.0
    gptq, rtn = (quantize(n, weight, (FORMATS["int3"],), 64, gram)["int3"] for n in ("gptq", "rtn"))
    assert float(output_error(weight, gptq, gram).sum()) < float(output_error(weight, rtn, gram).sum())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_of_the_inputs_does_not_matter(scale: float) -> None:
    weight, gram = random_weight(16, 128), random_gram(128)
    expected = output_error(weight, quantize("gptq", weight, (FORMATS["int3"],), 64, gram)["int3"], gram).sum()
    found = output_error(weight, quantize("gptq", weight, (FORMATS["int3"],), 64, gram * scale)["int3"], gram).sum()
    assert float(found) == pytest.approx(float(expected), rel=0.05)


def test_damping_is_a_share_of_the_mean() -> None:
    gram = random_gram(32)
    torch.testing.assert_close(damped(gram), gram + DAMPING * gram.diagonal().mean() * torch.eye(32))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gptq_refuses_what_it_cannot_use(value: float) -> None:
    weight, gram = random_weight(4, 64), random_gram(64)
    with pytest.raises(AmqError, match=r"needs calibration inputs \(gram\); rtn and hqq do not"):
        QUANTIZERS["gptq"]([weight], ALL, 64, None)
    gram[3, 5] = value
    with pytest.raises(AmqError, match="calibration inputs are not finite"):
        quantize("gptq", weight, gram=gram)


def test_hqq_refuses_a_format_without_a_solver() -> None:
    ternary = BitFormat("ternary", levels=3, unit_codes=5, unit_bytes=1)
    with pytest.raises(AmqError, match="hqq library has no solver for format ternary: use --proxy rtn or gptq"):
        quantize("hqq", random_weight(4, 64), (ternary,))
    for name in ("rtn", "gptq"):
        packed = quantize(name, random_weight(4, 64), (ternary,))["ternary"]
        assert int(unpack_codes(packed.qweight, ternary, 64).max()) == 2


def test_hqq_is_better_than_rtn_where_it_should_be() -> None:
    """The half-quadratic solver minimises a sparse norm of the error: at low bits its median error beats rounding's."""
    weight = random_weight(64, 256)
    for fmt in (FORMATS["int2"], FORMATS["int3"]):
        hqq, rtn = (quantize(n, weight, (fmt,), 64)[fmt.name] for n in ("hqq", "rtn"))
        ours, baseline = ((dequantize(p) - weight).abs().sqrt().mean() for p in (hqq, rtn))
        assert float(ours) < float(baseline)


def test_unknown_quantizer() -> None:
    with pytest.raises(AmqError, match="unknown quantizer 'awq': expected one of gptq, guided, two_sided"):
        QUANTIZERS["awq"]
