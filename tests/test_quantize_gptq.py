"""The quantizing kernels of csrc against the torch code that specifies them, on every instruction set there is."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.quantizing import output_error, random_gram, random_weight
from helpers.reference import ISAS, torch_threads
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS, GROUP_SIZES, BitFormat, n_groups
from amq.kernels.cpu import NO_MEMORY, cpu_module, memory
from amq.kernels.rounding import GridSearch, quantize_rows
from amq.packing import PARTS, PackedWeight, dequantize, pack_codes, unpack_codes
from amq.quantize.quantizers import ZERO_POINTS
from amq.quantize.quantizers.gptq import SWEEPS, compensation_of, quantize, quantize_in_torch
from amq.quantize.quantizers.grid import REFITS, SHRINKS
from amq.quantize.quantizers.rtn import in_torch
from amq.quantize.quantizers.rtn import quantize as rtn

ALL = tuple(FORMATS.values())
SOME = (FORMATS["int2"], FORMATS["int4"], FORMATS["int8"])
by_isa = pytest.mark.parametrize("isa", ISAS)
by_zero_points = pytest.mark.parametrize("zero_points", ZERO_POINTS)
one_thread = pytest.mark.usefixtures("one_thread")


def on_isa(
    weights: list[Tensor], formats: tuple[BitFormat, ...], group_size: int, gram: Tensor, zero_points: str, isa: str,
    sweeps: int = SWEEPS,
) -> list[dict[str, PackedWeight]]:  # fmt: skip
    compensation = replace(compensation_of(gram), sweeps=sweeps)
    search = GridSearch(compensation.hessian.diagonal(), zero_points, SHRINKS, REFITS)
    return quantize_rows(weights, formats, group_size, search, compensation, isa)


def equal(a: PackedWeight, b: PackedWeight) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in PARTS)


@by_isa
@by_zero_points
@one_thread
@pytest.mark.parametrize(("in_features", "group_size"), [(100, 32), (256, 128), (320, 64)])
def test_as_good_as_the_torch_loop(isa: str, zero_points: str, in_features: int, group_size: int) -> None:
    """Codes are the same, save where float32 broke a tie the other way; the output error may then differ by chance.

    Rounding leaves Σ_k D[k] · step² · u², u uniform in ±½: of u², the deviation is 0.9 of the mean. A row that goes
    another way after a tie draws its terms anew, so that errors of `rows` such rows differ by √2 · 0.9 /
    √(rows · in_features) of themselves, one sigma, if all features weigh alike; here they weigh so unevenly that a
    fifth of them counts. Five sigma, of the at most 10 % of rows that may go another way. Rows with equal codes have
    one grid to find, the best.
    """
    rows = 64
    weight, gram = random_weight(rows, in_features), random_gram(in_features)
    found = on_isa([weight], ALL, group_size, gram, zero_points, isa)[0]
    expected = quantize_in_torch([weight], ALL, group_size, gram, zero_points)[0]
    bound = 5 * math.sqrt(2) * 0.9 / math.sqrt(0.1 * rows * in_features / 5) * 0.1
    for fmt in ALL:
        ours, theirs = (unpack_codes(r[fmt.name].qweight, fmt, in_features) for r in (found, expected))
        same = (ours == theirs).all(1)
        assert float(same.float().mean()) >= 0.9, fmt.name
        error, baseline = (output_error(weight, r[fmt.name], gram) for r in (found, expected))
        # One row's grid may be stored a last bit of fp16 off, or not be taken where the gain is nothing.
        assert float(error[same].sum()) <= 1.002 * float(baseline[same].sum()), fmt.name
        assert float(error.sum()) <= (1 + bound) * float(baseline.sum()), fmt.name


@by_isa
@one_thread
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_exact_where_integers_are(isa: str, fmt: BitFormat) -> None:
    """Weights that lie on a grid of a power of two: codes, scales and zero points come back to the bit."""
    rows, in_features, group_size = 37, 200, 64
    groups, generator = n_groups(in_features, group_size), torch.Generator().manual_seed(0)
    codes = torch.randint(0, fmt.levels, (rows, in_features), generator=generator)
    codes[:, ::group_size], codes[:, 1::group_size] = 0, fmt.max_code  # the range of every group
    zero = torch.randint(0, fmt.levels, (rows, groups), generator=generator).half()
    scale = (2.0 ** torch.randint(-8, 0, (rows, groups), generator=generator)).half()
    spread = torch.arange(in_features) // group_size
    weight = (codes - zero[:, spread].float()) * scale[:, spread].float()
    expected = PackedWeight(fmt, in_features, group_size, pack_codes(codes.to(torch.uint8), fmt), scale, zero)
    gram = random_gram(in_features)
    for found in (
        on_isa([weight], (fmt,), group_size, gram, "fractional", isa),
        on_isa([weight.bfloat16()], (fmt,), group_size, gram, "fractional", isa) if fmt.levels <= 128 else None,
        quantize_rows(
            [weight], (fmt,), group_size, GridSearch(torch.ones(in_features), "integer", (1.0,), 0), None, isa
        ),
    ):
        assert found is None or equal(found[0][fmt.name], expected)
    assert equal(quantize_in_torch([weight], (fmt,), group_size, gram)[0][fmt.name], expected)


@by_isa
@by_zero_points
@one_thread
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_to_nearest_as_in_torch(isa: str, zero_points: str, group_size: int) -> None:
    """On a group's range to the bit; on a fitted grid as good, since sums are added in another order."""
    weight = random_weight(45, 200)
    for shrinks, refits in (((1.0,), 0), (SHRINKS, REFITS)):
        search = GridSearch(torch.ones(200), zero_points, shrinks, refits)
        found = quantize_rows([weight], ALL, group_size, search, None, isa)[0]
        for fmt in ALL:
            expected = in_torch(weight, fmt, group_size, zero_points, shrinks, refits)
            if refits == 0:
                assert equal(found[fmt.name], expected), fmt.name
            else:
                assert float((found[fmt.name].scale != expected.scale).float().mean()) < 0.02, fmt.name
                error, baseline = (output_error(weight, p, torch.eye(200)).sum() for p in (found[fmt.name], expected))
                assert float(error) <= 1.001 * float(baseline), fmt.name


def test_nearest_takes_weights_of_any_widths() -> None:
    """What rounds without a gram is given all linears of a block at once."""
    weights = [random_weight(5, width) for width in (64, 100, 64, 33)]
    for weight, result in zip(weights, rtn(weights, SOME, 32), strict=True):
        assert all(equal(result[fmt.name], in_torch(weight, fmt, 32, "fractional", (1.0,), 0)) for fmt in SOME)


@one_thread
def test_more_groups_than_columns_at_once() -> None:
    """66 groups: products with their ones come in two blocks."""
    weight, gram, fmt = random_weight(8, 2112), random_gram(2112, tokens=4224), FORMATS["int3"]
    ours, theirs = (f([weight], (fmt,), 32, gram)[0]["int3"] for f in (quantize, quantize_in_torch))
    error, baseline = (float(output_error(weight, p, gram).sum()) for p in (ours, theirs))
    assert error == pytest.approx(baseline, rel=0.03)


def test_the_same_bits_on_any_threads_and_in_any_company() -> None:
    """Experts that share their input, of few rows and many, in one call or each alone."""
    weights, gram = [random_weight(rows, 160, seed=rows) for rows in (1, 31, 32, 33, 200, 7)], random_gram(160)
    results = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            results.append(quantize(weights, SOME, 64, gram))
            results.append([quantize([weight], SOME, 64, gram)[0] for weight in weights])
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert all(equal(ours[fmt.name], first[fmt.name]) for fmt in SOME)


@one_thread
def test_refits_lower_the_output_error() -> None:
    """What is stored is better than the grid that codes were found on, on every row or it is that grid."""
    weight, gram, fmt = random_weight(64, 256), random_gram(256), FORMATS["int2"]
    packed = quantize([weight], (fmt,), 64, gram)[0][fmt.name]
    hessian = compensation_of(gram).hessian
    search = GridSearch(hessian.diagonal(), "fractional", SHRINKS, REFITS)
    fitted = quantize_rows([weight], (fmt,), 64, search, None)[0][fmt.name]
    before = PackedWeight(fmt, 256, 64, packed.qweight, fitted.scale, fitted.zero_point)
    ours, old = (output_error(weight, p, hessian) for p in (packed, before))
    assert bool((ours <= old * (1 + 1e-5)).all()) and float(ours.sum()) < 0.98 * float(old.sum())


@by_isa
@by_zero_points
@one_thread
@pytest.mark.parametrize(("in_features", "group_size"), [(200, 32), (256, 128)])
def test_sweeps_lower_the_output_error(isa: str, zero_points: str, in_features: int, group_size: int) -> None:
    """On the grid that codes are found on no row's error rises, and in the end no code alone can be better."""
    weight, gram, fmt = random_weight(40, in_features), random_gram(in_features), FORMATS["int3"]
    hessian = compensation_of(gram).hessian
    search = GridSearch(hessian.diagonal(), zero_points, SHRINKS, REFITS)
    grid = quantize_rows([weight], (fmt,), group_size, search, None, isa)[0][fmt.name]
    errors = []
    for sweeps in (0, 1, 2, 40):
        packed = on_isa([weight], (fmt,), group_size, gram, zero_points, isa, sweeps)[0][fmt.name]
        before = replace(packed, scale=grid.scale, zero_point=grid.zero_point)
        errors.append(output_error(weight, before, hessian))
    for earlier, later in pairwise(errors):
        assert bool((later <= earlier * (1 + 1e-5)).all())
    assert float(errors[1].sum()) < 0.985 * float(errors[0].sum())
    spread = torch.arange(in_features) // group_size
    scale, zero = (part[:, spread].double() for part in (before.scale, before.zero_point))
    codes, rounded = unpack_codes(before.qweight, fmt, in_features), dequantize(before).double()
    best = rounded + (weight.double() - rounded) @ hessian.double() / hessian.diagonal()
    aim = (best / scale + zero).clamp(0, fmt.max_code)
    assert float((aim - codes).abs().max()) < 0.501


def test_nothing_to_do() -> None:
    empty = quantize([torch.empty(0, 64), random_weight(3, 64)], SOME, 64, random_gram(64))
    assert [r["int2"].out_features for r in empty] == [0, 3]
    assert quantize([], SOME, 64, random_gram(64)) == []


def arguments(**changed: object) -> dict[str, object]:
    """Of a call that rounds nothing, in 64 features."""
    keep = [torch.ones(64), torch.ones(1)]
    given = {
        "weights": [], "formats": [(4, 4, 1)], "in_features": 64, "group_size": 64, "zero_points": "fractional",
        "importance": memory(keep[0]), "shrinks": memory(keep[1]), "refits": 3, "sweeps": 1, "threads": 1,
        **dict.fromkeys(("hessian", "factor", "order", "sums", "totals"), NO_MEMORY),
    }  # fmt: skip
    return given | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"in_features": 0}, "in_features: expected at least 1, got 0"),
        ({"group_size": 96}, "group_size: expected at most 128, in whole blocks, got 96"),
        ({"group_size": 256}, "group_size: expected at most 128"),
        ({"formats": []}, "formats: expected at least one"),
        ({"formats": [(257, 1, 2)]}, "levels: expected 2 to 256, got 257"),
        ({"formats": [(4, 64, 16)]}, "unit_codes: expected 1 to 56, got 64"),
        ({"zero_points": "none"}, "zero_points: expected fractional, integer or symmetric, got 'none'"),
        ({"importance": (8, 12)}, "importance: expected 256 bytes, got 12"),
        ({"shrinks": (8, 0)}, "shrinks: expected 1 to 1000 numbers, got 0"),
        ({"refits": -1}, "refits: expected 0 to 1000, got -1"),
        ({"sweeps": -1}, "sweeps: expected 0 to 1000, got -1"),
        ({"hessian": (8, 4)}, "hessian: expected 16384 bytes, got 4"),
        ({"weights": [((8, 4), "float32", 1, [])]}, "results: expected 1, got 0"),
        ({"weights": [((8, 4), "int8", 1, [])]}, "weight: expected float32, float16 or bfloat16, got 'int8'"),
        ({"isa": "sse9"}, "isa: expected one of isas"),
    ],
)
def test_the_module_refuses(changed: dict[str, object], message: str) -> None:
    cpu_module().quantize(**arguments())
    with pytest.raises(ValueError, match=message):
        cpu_module().quantize(**arguments(**changed))


def test_an_order_that_is_none_is_refused() -> None:
    square, order = torch.eye(64), torch.arange(64)
    order[3] = 5
    given = {"hessian": square, "factor": square, "order": order}
    given |= {"sums": torch.ones(64, 1), "totals": torch.ones(1, 1, dtype=torch.float64)}
    with pytest.raises(ValueError, match="order: expected every feature once, got 5"):
        cpu_module().quantize(**arguments(**{name: memory(tensor) for name, tensor in given.items()}))


def test_weights_of_another_width_are_refused() -> None:
    with pytest.raises(AmqError, match="quantizing weights of 64 input features at group 64: weight: expected"):
        quantize([random_weight(4, 64), random_weight(4, 32)], SOME, 64, random_gram(64))
