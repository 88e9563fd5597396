"""The grouped linear op, for weights with rows of x of their own: against float64, and against single calls."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.packed import assert_same_bits
from helpers.reference import (
    MODES,
    assert_as_accurate_as_torch,
    every_isa_and_mode,
    every_kernel,
    make_weight,
    random_x,
    run,
    seen_by,
    torch_threads,
)

from amq.errors import AmqError
from amq.formats import FORMATS, GROUP_SIZES
from amq.kernels import backends, ops
from amq.kernels import cpu as native
from amq.kernels.backends import BACKENDS
from amq.kernels.modules import QuantizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ((1,), (0, 3), (2, 1, 4, 1), (0, 5, 0, 17, 1), (1,) * 8, (600, 1, 530, 3), (0, 0))
SHAPES = tuple(itertools.product((1, 17, 33), (31, 100, 192)))
HOST = [backend.name for backend in BACKENDS.values() if backend.device != "cuda"]


def group(name: str, count: int, shape: tuple[int, int], group_size: int, mixed: bool = False) -> list:
    """`count` weights, all of one format or of each in turn."""
    names = list(FORMATS) if mixed else [name]
    start = names.index(name)
    chosen = (names[(start + i) % len(names)] for i in range(count))
    return [make_weight(fmt, shape[0], shape[1], group_size) for fmt in chosen]


def call(x: torch.Tensor, weights: list, sizes: tuple[int, ...], mode: str, isa: str, biases=None) -> torch.Tensor:
    prepared = [w.prepared for w in weights]
    return native.grouped_linear(x, prepared, sizes, biases or [None] * len(weights), mode, isa)


@every_kernel
def test_as_accurate_as_torch_and_equal_to_single_calls(name: str, isa: str, mode: str) -> None:
    """Each weight's rows are, to the bit, what a call of that weight alone makes of them."""
    for i, (sizes, shape) in enumerate(itertools.product(SIZES, SHAPES)):
        group_size = GROUP_SIZES[i % len(GROUP_SIZES)]
        weights = group(name, len(sizes), shape, group_size, mixed=i % 2 == 1)
        x = random_x(sum(sizes), shape[1], i)
        biases = [torch.randn(shape[0]) if j % 3 else None for j in range(len(sizes))]
        y = call(x, weights, sizes, mode, isa, biases if i % 3 == 0 else None)
        assert y.shape == (sum(sizes), shape[0])
        for weight, rows, part, bias in zip(weights, x.split(sizes), y.split(sizes), biases, strict=True):
            bias = bias if i % 3 == 0 else None
            assert_same_bits(part, run(rows, [weight], mode, isa, bias))
            if len(rows) * shape[0] >= 64 and len(rows) < 100 and bias is None:  # of many, an activation may be halfway
                seen = seen_by(mode, rows, group_size)
                assert_as_accurate_as_torch(part, seen, weight.dense, f"{name}-{isa}-{mode}-{sizes}-{shape}")


@pytest.mark.parametrize("mode", MODES)
def test_every_thread_count_gives_the_same_bits(mode: str) -> None:
    sizes = (1, 0, 7, 1, 40)
    weights = group("int2", len(sizes), (125, 576), 64, mixed=True)
    x = random_x(sum(sizes), 576)
    one = call(x, weights, sizes, mode, "")
    for threads in (2, 3, 16):
        with torch_threads(threads):
            assert_same_bits(call(x, weights, sizes, mode, ""), one)


@every_isa_and_mode
def test_nan_stays_in_its_rows(isa: str, mode: str) -> None:
    sizes = (2, 3, 1)
    weights = group("int4", 3, (33, 100), 32)
    x = random_x(6, 100)
    clean = call(x, weights, sizes, mode, isa)
    for row in range(6):
        poisoned = x.clone()
        poisoned[row, 57] = torch.nan
        y = call(poisoned, weights, sizes, mode, isa)
        assert y[row].isnan().all()
        others = torch.arange(6) != row
        assert_same_bits(y[others], clean[others])


@every_isa_and_mode
def test_writes_all_of_y_and_nothing_beside(isa: str, mode: str) -> None:
    sizes, guard = (1, 0, 6), 64
    weights = group("int5", 3, (17, 100), 32)
    x = random_x(7, 100)
    expected = call(x, weights, sizes, mode, isa)
    memory = torch.full((guard + 7 * 17 + guard,), torch.nan)
    y = memory[guard:-guard].view(7, 17)
    native.cpu_module().linear_grouped(
        [(w.packed.format.name, *native.memory(w.prepared.data), 17) for w in weights],
        list(sizes), native.memory(x), [], native.memory(y), 100, 32, mode == "int8", 1, isa,
    )  # fmt: skip
    assert_same_bits(y.clone(), expected)
    assert memory[:guard].isnan().all() and memory[-guard:].isnan().all()


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_op_is_single_calls_on_every_backend(backend: str, dtype: torch.dtype) -> None:
    """Through torch's dispatcher and without it, with biases of other dtypes."""
    sizes = (2, 0, 1, 5)
    weights = [backends.prepare(w.packed, backend) for w in group("int3", 4, (33, 100), 32, mixed=True)]
    x = random_x(8, 100).clamp(-10, 10).to(dtype)
    biases = [torch.randn(33).to(dtype), None, torch.randn(33), None]
    y = ops.grouped_linear(x, weights, sizes, biases)
    expected = torch.cat(
        [ops.linear(rows, [w], bias) for rows, w, bias in zip(x.split(sizes), weights, biases, strict=True)]
    )
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    parts = [w.data for w in weights], [w.format.name for w in weights]
    mode = backends.default_activations(backend)
    assert torch.equal(torch.ops.amq.grouped_linear(x, *parts, sizes, 33, 32, biases, mode, backend), y)
    fake = torch.ops.amq.grouped_linear(x.to("meta"), [p.to("meta") for p in parts[0]], parts[1], sizes, 33, 32,
                                        [None] * 4, mode, backend)  # fmt: skip
    assert fake.shape == y.shape and fake.dtype == dtype


def test_a_backend_of_single_calls_is_not_asked_for_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA library refuses an empty x."""
    reference = BACKENDS["reference"]

    def linear(x: torch.Tensor, *rest: object) -> torch.Tensor:
        assert len(x)
        return reference.linear(x, *rest)

    monkeypatch.setitem(BACKENDS, "reference", replace(reference, linear=linear))
    weights = [backends.prepare(w.packed, "reference") for w in group("int3", 3, (33, 100), 32)]
    x = random_x(3, 100)
    y = ops.grouped_linear(x, weights, (0, 3, 0))
    assert torch.equal(y, ops.linear(x, [weights[1]]))
    assert ops.grouped_linear(x[:0], weights, (0, 0, 0)).shape == (0, 33)


def test_the_op_says_what_does_not_fit() -> None:
    weights = [w.prepared for w in group("int3", 2, (33, 100), 32)]
    x = random_x(3, 100)
    wide = make_weight("int3", 34, 100, 32).prepared
    cases = [
        (lambda: ops.grouped_linear(x, [], []), "expected at least one weight"),
        (lambda: ops.grouped_linear(x, [weights[0], wide], [1, 2], name="up"), "up: .* must share out_features"),
        (lambda: ops.grouped_linear(x, weights, [1, 1]), r"which make up those of x; got x \[3, 100\]"),
        (lambda: ops.grouped_linear(x, weights, [-1, 4]), "which make up those of x"),
        (lambda: ops.grouped_linear(x, weights, [3]), "for each of 2 weights"),
        (lambda: ops.grouped_linear(x, weights, [1, 2], [None]), "1 biases"),
        (lambda: ops.grouped_linear(x[:, :99], weights, [1, 2]), r"must be \[..., 100\]"),
        (lambda: ops.grouped_linear(x, weights, [1, 2], [torch.zeros(32), None]), "bias must be"),
        (lambda: ops.grouped_linear(x.double(), weights, [1, 2]), "must be float32"),
        (lambda: ops.grouped_linear(x, weights, [1, 2], activations="int4"), "activations must be one of"),
    ]
    for make, message in cases:
        with pytest.raises(AmqError, match=message):
            make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [1, 3]}, "x: expected at least"),
        ({"sizes": [1]}, "sizes: expected one for each weight"),
        ({"sizes": [1, -1]}, "rows of a weight: expected at least 0"),
        ({"sizes": [2**31 - 1, 2**31 - 1]}, "rows: expected at most"),
        ({"biases": [(0, 0)]}, "biases: expected one for each weight"),
        ({"biases": [(0, 0), (8, 4)]}, "bias: expected 68 bytes"),
        ({"y": (64, 8)}, "y: expected at least"),
        ({"group_size": 33}, "group_size: expected"),
        ({"threads": 0}, "threads: expected"),
        ({"parts": []}, "sizes: expected one for each weight"),
        ({"isa": "z80"}, "isa: expected one of"),
    ],
)
def test_the_module_checks_its_arguments(change: dict, message: str) -> None:
    weights, x, y = group("int4", 2, (17, 100), 32), random_x(3, 100), torch.empty(3, 17)
    arguments = {
        "parts": [("int4", *native.memory(w.prepared.data), 17) for w in weights], "sizes": [1, 2],
        "x": native.memory(x), "biases": [], "y": native.memory(y), "in_features": 100, "group_size": 32,
        "int8": False, "threads": 1,
    }  # fmt: skip
    native.cpu_module().linear_grouped(**arguments)
    with pytest.raises(ValueError, match=message):
        native.cpu_module().linear_grouped(**{**arguments, **change})


def test_weights_of_other_shapes_are_refused_by_the_module() -> None:
    x, y = random_x(2, 100), torch.empty(2, 17)
    parts = [("int4", *native.memory(make_weight("int4", n, 100, 32).prepared.data), n) for n in (17, 18)]
    with pytest.raises(ValueError, match="rows of a weight in a group: expected 17, got 18"):
        native.cpu_module().linear_grouped(parts, [1, 1], native.memory(x), [], native.memory(y), 100, 32, False, 1)


def test_linears_go_in_one_call() -> None:
    """`QuantizedLinear.grouped`, biases included, is what the linears make one by one."""
    weights = group("int6", 3, (33, 100), 32, mixed=True)
    linears = [QuantizedLinear(w.prepared, torch.randn(33) if i else None) for i, w in enumerate(weights)]
    x = random_x(6, 100)
    y = QuantizedLinear.grouped(linears, x, [1, 2, 3])
    assert_same_bits(y, torch.cat([m(rows) for m, rows in zip(linears, x.split([1, 2, 3]), strict=True)]))
