"""Linear kernels at the borders: of memory, of float32, of threads and processes, and arguments that make no sense."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.packed import GUARD, assert_same_bits, guarded, random_packed
from helpers.reference import (
    ISAS,
    MODES,
    UNIT,
    assert_as_accurate_as_torch,
    at_page_edge,
    every_isa_and_mode,
    every_kernel,
    make_weight,
    prepare_into,
    product,
    random_x,
    run,
    run_raw,
    seen_by,
    torch_threads,
)

from amq.formats import FORMATS
from amq.kernels import cpu as native
from amq.kernels.backends import prepare
from amq.packing import PackedWeight, PreparedWeight, dequantize

ROOT = Path(__file__).resolve().parents[1]
LARGEST = torch.finfo(torch.float32).max


def strided(tensor: torch.Tensor, gap: int, fill: float, before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of a matrix whose rows lie `gap` elements apart, after `before` others; and all of its memory."""
    rows, columns = tensor.shape
    memory = torch.full((before + rows * (columns + gap),), fill)
    view = memory[before:].view(rows, columns + gap)[:, :columns]
    view.copy_(tensor)
    return view, memory


@every_kernel
def test_poison_guards_and_strides(name: str, isa: str, mode: str) -> None:
    """Weights at odd addresses, NaN around every row of x, outputs that start as NaN and end where they should."""
    weights = [make_weight(name, n, 161, 64) for n in (33, 100)]
    for rows in (1, 3, 4, 17):
        x, bias = random_x(rows, 161), torch.randn(133)
        parts = [(w.prepared, guarded(w.prepared.data, before=1 + 2 * i)) for i, w in enumerate(weights)]
        snapshots = [buffer.clone() for _, (_, buffer) in parts]
        far_x, _ = strided(x, gap=7, fill=torch.nan, before=3)
        far_bias, bias_memory = guarded(bias, before=4)
        y, y_memory = strided(torch.full((rows, 133), torch.nan), gap=5, fill=1234.5, before=1)
        run_raw(far_x, [(prepared, data) for prepared, (data, _) in parts], far_bias, y, mode, isa)
        assert_same_bits(y.contiguous(), run(x, weights, mode, isa, bias))
        assert y_memory[0] == 1234.5 and (y_memory[1:].view(rows, -1)[:, 133:] == 1234.5).all()
        assert (bias_memory[:4] == GUARD).all() and (bias_memory[-64:] == GUARD).all()
        for (_, (_, buffer)), snapshot in zip(parts, snapshots, strict=True):
            assert torch.equal(buffer, snapshot)


@every_kernel
def test_linear_never_reads_past_the_last_byte(name: str, isa: str, mode: str) -> None:
    """Weight, x, bias and y end where a page without access begins."""
    for rows, (out_features, in_features) in itertools.product((1, 3, 4, 17), ((1, 1), (33, 161), (16, 64), (125, 40))):
        weight = make_weight(name, out_features, in_features, 32)
        x, bias = random_x(rows, in_features), torch.randn(out_features)
        blank = torch.full((rows, out_features), torch.nan)
        with ExitStack() as stack:
            data, x_edge, bias_edge, y = (
                stack.enter_context(at_page_edge(t)) for t in (weight.prepared.data, x, bias, blank)
            )
            run_raw(x_edge, [(weight.prepared, data)], bias_edge, y, mode, isa)
            assert_same_bits(y, run(x, [weight], mode, isa, bias))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_prepare_never_reads_or_writes_past_the_last_byte(name: str, isa: str) -> None:
    for rows, in_features in itertools.product((1, 5, 17), (1, 3, 31, 33, 64, 100)):
        packed = random_packed(FORMATS[name], rows, in_features, 32)
        with ExitStack() as stack:
            parts = [stack.enter_context(at_page_edge(t)) for t in (packed.qweight, packed.scale, packed.zero_point)]
            expected = make_weight(name, rows, in_features, 32).prepared.data
            out = stack.enter_context(at_page_edge(torch.zeros_like(expected)))
            prepare_into(PackedWeight(packed.format, in_features, 32, *parts), out, isa)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_prepare_leaves_what_is_around_it(name: str) -> None:
    packed = random_packed(FORMATS[name], 21, 100, 64)
    moved = [guarded(t, before=b)[0] for t, b in ((packed.qweight, 3), (packed.scale, 2), (packed.zero_point, 6))]
    expected = make_weight(name, 21, 100, 64).prepared.data
    out, buffer = guarded(torch.zeros_like(expected), before=5)
    prepare_into(PackedWeight(packed.format, 100, 64, *moved), out, threads=3)
    assert torch.equal(out, expected)
    assert (buffer[:5] == GUARD).all() and (buffer[-64:] == GUARD).all()


def with_value(x: torch.Tensor, value: float, row: int, feature: int) -> torch.Tensor:
    x = x.clone()
    x[row, feature] = value
    return x


@pytest.mark.parametrize("rows", (1, 4, 16, 33), ids="M{}".format)
@pytest.mark.parametrize("isa", ISAS)
def test_fp32_nan_and_infinity_are_torchs(isa: str, rows: int) -> None:
    """NaN, infinities and both signs of one in a row: the same NaN and the same infinities; other rows untouched."""
    for name in FORMATS:
        weight, clean = make_weight(name, 33, 100, 32), random_x(rows, 100)
        for values in ((torch.nan,), (torch.inf,), (-torch.inf,), (torch.inf, -torch.inf)):
            x = clean
            for i, value in enumerate(values):
                x = with_value(x, value, rows // 2, 99 - 40 * i)
            y, expected = run(x, [weight], "fp32", isa), x @ weight.dense.T
            assert torch.equal(y.isnan(), expected.isnan()), (name, values)
            assert torch.equal(y.isposinf(), expected.isposinf()), (name, values)
            assert torch.equal(y.isneginf(), expected.isneginf()), (name, values)
            others = torch.arange(rows) != rows // 2
            assert_same_bits(y[others], run(clean, [weight], "fp32", isa)[others])


@pytest.mark.parametrize("rows", (1, 4, 16, 33), ids="M{}".format)
@pytest.mark.parametrize("isa", ISAS)
def test_int8_non_finite_rows_become_nan(isa: str, rows: int) -> None:
    for name, value, feature in itertools.product(FORMATS, (torch.nan, torch.inf, -torch.inf), (0, 31, 64, 99)):
        weight, clean = make_weight(name, 33, 100, 32), random_x(rows, 100)
        y = run(with_value(clean, value, rows // 2, feature), [weight], "int8", isa)
        assert y[rows // 2].isnan().all(), (name, value, feature)
        others = torch.arange(rows) != rows // 2
        assert_same_bits(y[others], run(clean, [weight], "int8", isa)[others])


@every_isa_and_mode
def test_groups_of_zeros(isa: str, mode: str) -> None:
    for name, rows in itertools.product(FORMATS, (1, 4, 16)):
        weight, x = make_weight(name, 33, 100, 32), random_x(rows, 100)
        x[:, 32:64] = 0
        assert_as_accurate_as_torch(run(x, [weight], mode, isa), seen_by(mode, x, 32), weight.dense, name)
        assert (run(torch.zeros(rows, 100), [weight], mode, isa) == 0).all()


@every_isa_and_mode
def test_tiny_activations(isa: str, mode: str) -> None:
    """1e-38: fp32 is off by what subnormal numbers round; int8 counts such a group as zero."""
    smallest = 2.0**-149
    for name, rows in itertools.product(FORMATS, (1, 4, 16)):
        weight = make_weight(name, 33, 100, 32)
        x = torch.randn(rows, 100) * 1e-38
        y = run(x, [weight], mode, isa)
        if mode == "int8":
            assert (y == 0).all()
            continue
        truth, size = product(x, weight.dense)
        # Every product is rounded to a multiple of `smallest` before the scale is applied, and the scaled sum again.
        largest_scale = weight.packed.scale.abs().max().double()
        allowed = 100 * (8 * UNIT * size + smallest * (largest_scale + 1))
        assert ((y - truth).abs() <= allowed).all(), name


@every_isa_and_mode
def test_huge_activations(isa: str, mode: str) -> None:
    """fp32: as large as lets a group's sum of codes times x stay a number. int8: up to the end of float32."""
    for name, rows in itertools.product(FORMATS, (1, 4, 16)):
        packed = random_packed(FORMATS[name], 33, 100, 32)
        packed = replace(packed, scale=torch.full_like(packed.scale, 1e-6))
        dense = dequantize(packed)
        largest = LARGEST / (FORMATS[name].max_code * 32) if mode == "fp32" else LARGEST
        x = largest * torch.randn(rows, 100).clamp(-1, 1)
        y = native.linear(x, [prepare(packed)], None, mode, isa)
        assert y.isfinite().all(), name
        assert_as_accurate_as_torch(y, seen_by(mode, x, 32), dense, name)


@pytest.mark.parametrize("field", ("scale", "zero_point"))
@every_isa_and_mode
def test_damaged_scales_reach_the_output(isa: str, mode: str, field: str) -> None:
    """A NaN or an infinity in a group of output row 17 makes its outputs non-finite, and no other output changes."""
    for name, value, rows in itertools.product(FORMATS, (torch.nan, torch.inf), (1, 4, 16)):
        weight, x = make_weight(name, 33, 100, 32), random_x(rows, 100)
        values = getattr(weight.packed, field).clone()
        values[17, 2] = value
        damaged = prepare(replace(weight.packed, **{field: values}))
        y = native.linear(x, [damaged], None, mode, isa)
        assert not y[:, 17].isfinite().any(), (name, value)
        others = torch.arange(33) != 17
        assert_same_bits(y[:, others], run(x, [weight], mode, isa)[:, others])


@every_isa_and_mode
def test_more_threads_than_rows(isa: str, mode: str) -> None:
    for n in (1, 16, 17):
        weight, x = make_weight("int3", n, 100, 32), random_x(2, 100)
        expected = run(x, [weight], mode, isa)
        with torch_threads(16):
            assert_same_bits(run(x, [weight], mode, isa), expected)


@every_isa_and_mode
def test_many_python_threads_at_once(isa: str, mode: str) -> None:
    """Threads that began before the first kernel ran may use AMX too; none sees another's activations."""
    cases = [(make_weight(name, 100, 576, 64), random_x(rows, 576)) for name in FORMATS for rows in (1, 4, 33)]
    with torch_threads(2):
        expected = [run(x, [weight], mode, isa) for weight, x in cases]
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(run, x, [w], mode, isa) for _ in range(5) for w, x in cases]
            for future, wanted in zip(futures, itertools.cycle(expected), strict=False):
                assert_same_bits(future.result(timeout=600), wanted)


def test_the_gil_is_free_during_a_call() -> None:
    """While a worker is inside one long call, this thread goes on: in one of many, as a busy machine may not let it."""
    weight, x = make_weight("int3", 1024, 1024, 64), random_x(512, 1024)
    x = x.repeat(16, 1)

    def ticks_inside() -> tuple[int, float]:
        """Of this thread in the middle half of a call; seconds that the call took."""
        span, ticks = [], []

        def work() -> None:
            start = time.perf_counter()
            run(x, [weight], "fp32", "portable")
            span.extend((start, time.perf_counter()))

        worker = threading.Thread(target=work)
        worker.start()
        while worker.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(0.001)
        worker.join()
        start, end = span
        quarter = (end - start) / 4
        return sum(start + quarter < t < end - quarter for t in ticks), end - start

    for _ in range(20):
        inside, seconds = ticks_inside()
        assert seconds > 0.05, "the call is too short to tell"
        if inside:
            return
    pytest.fail(f"no tick in the middle of any of 20 calls of {seconds:.2f} s")


@pytest.fixture
def parent_with_a_pool() -> Iterator[None]:
    """Threads of the pool exist before the fork; the warning of Python 3.12 about that is the point of the test."""
    with torch_threads(4):
        run(random_x(600, 576), [make_weight("int4", 200, 576, 64)], "int8", "")
        yield


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork")
@pytest.mark.parametrize("mode", MODES)
def test_a_forked_child_computes_the_same(parent_with_a_pool: None, mode: str) -> None:
    weight, x = make_weight("int4", 200, 576, 64), random_x(600, 576)
    inputs = [x[:rows].contiguous() for rows in (1, 600)]
    expected = [run(x, [weight], mode, "") for x in inputs]
    wanted = [y.numpy().tobytes() for y in expected]
    child = os.fork()
    if child == 0:  # no exception may travel into this copy of pytest; torch's own parallel loops would hang here
        same = False
        try:
            same = [run(x, [weight], mode, "").numpy().tobytes() for x in inputs] == wanted
        finally:
            os._exit(0 if same else 1)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the child's results differ, or it failed"
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert_same_bits(run(x, [weight], mode, ""), expected[1])


def good_arguments() -> dict:
    """For int3, 3 × 64 at group 32 and 2 rows of x; with addresses that would crash if they were used."""
    size = native.cpu_module().prepared_bytes("int3", 3, 64, 32)
    sizes = dict(rows=2, in_features=64, group_size=32, x_stride=64, y_stride=3)
    memory = dict(x=(1, 2 * 64 * 4), bias=(0, 0), y=(1, 2 * 3 * 4))
    return dict(parts=[("int3", 1, size, 3)], int8=True, threads=1) | memory | sizes


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"parts": [("int99", 1, 1, 3)]}, "format: expected a compiled dense bitstream, got 'int99'"),
        ({"parts": [("int3", 1, 77, 3)]}, "bytes of a weight: expected 96, got 77"),
        ({"parts": [("int3", 0, 96, 3)]}, "address of a weight: expected not null"),
        ({"parts": [("int3", 1, 0, -1)]}, "out_features: expected at least 0, got -1"),
        ({"isa": "sse9"}, "isa: expected one of isas.*got 'sse9'"),
        ({"rows": -1}, "rows: expected at least 0, got -1"),
        ({"in_features": 0}, "in_features: expected at least 1, got 0"),
        ({"group_size": 0}, "group_size: expected a multiple of 32 up to 128, got 0"),
        ({"group_size": 48}, "group_size: expected a multiple of 32 up to 128, got 48"),
        ({"group_size": 256}, "group_size: expected a multiple of 32 up to 128, got 256"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"x_stride": 63}, "x_stride: expected at least 64, got 63"),
        ({"y_stride": 2}, "y_stride: expected at least 3, got 2"),
        ({"x": (0, 512)}, "x: expected an address"),
        ({"y": (0, 24)}, "y: expected an address"),
        ({"x": (1, 511)}, "x: expected at least 512 bytes, got 511"),
        ({"y": (1, 23)}, "y: expected at least 24 bytes, got 23"),
        ({"bias": (1, 4)}, "bias: expected 12 bytes, got 4"),
        ({"bias": (0, 12)}, "bias: expected an address"),
        ({"rows": 1 << 31}, "rows: expected at most 2147483647, got 2147483648"),
        ({"in_features": 1 << 40}, "in_features: expected at most 2147483647"),
        ({"parts": [("int3", 1, 96, 3 + (1 << 59))]}, "out_features: expected at most 2147483647"),
        ({"x_stride": 1 << 62}, "x: its size does not fit 64 bits"),
    ),
)
def test_module_checks_its_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.cpu_module().linear(**(good_arguments() | change))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"format": "int99"}, "format: expected a compiled dense bitstream, got 'int99'"),
        ({"rows": -1}, "rows: expected at least 0, got -1"),
        ({"group_size": 8}, "group_size: expected a multiple of 32 up to 128, got 8"),
        ({"qweight_stride": 23}, "qweight_stride: expected at least 24, got 23"),
        ({"group_stride": 1}, "group_stride: expected at least 2, got 1"),
        ({"out": (1, 95)}, "out: expected 96 bytes, got 95"),
        ({"scale": (0, 12)}, "scale: expected an address"),
        ({"scale": (1, 11)}, "scale: expected at least 12 bytes, got 11"),
        ({"zero_point": (1, 11)}, "zero_point: expected at least 12 bytes, got 11"),
        ({"qweight": (1, 71)}, "qweight: expected at least 72 bytes, got 71"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
    ),
)
def test_prepare_checks_its_arguments(change: dict, message: str) -> None:
    addresses = dict(qweight=(1, 72), scale=(1, 12), zero_point=(1, 12), out=(1, 96))
    sizes = dict(qweight_stride=24, group_stride=2, rows=3, in_features=64, group_size=32)
    with pytest.raises(ValueError, match=message):
        native.cpu_module().prepare(**(dict(format="int3", threads=1) | addresses | sizes | change))


def test_nothing_to_do_touches_nothing() -> None:
    """No rows, no parts, no output rows: with addresses that would crash."""
    for change in ({"rows": 0}, {"parts": []}, {"parts": [("int3", 1, 0, 0)]}):
        native.cpu_module().linear(**(good_arguments() | change))


def in_process_with(isa: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "AMQ_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", f"import torch, amq._cpu as m\n{code}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("isa", [*ISAS[:2], ""])
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    result = in_process_with(isa, "print(m.isa())")
    assert result.stdout.strip() == (isa or ISAS[-1]), result.stderr


def test_environment_names_no_known_instruction_set() -> None:
    code = "m.linear([], (0, 0), (0, 0), (0, 0), 1, 32, 32, 32, 0, True, 1)"
    result = in_process_with("sse9", code)
    assert result.returncode == 1
    assert "AMQ_CPU_ISA=sse9: expected one of portable" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(not native.cpu_module().missing(), reason="this processor runs every instruction set")
def test_environment_names_an_instruction_set_that_is_missing() -> None:
    isa, reason = next(iter(native.cpu_module().missing().items()))
    result = in_process_with(isa, "print(m.isa())")
    assert f"AMQ_CPU_ISA={isa}: {reason}; this machine can run portable" in result.stderr.splitlines()[-1]


def test_a_weight_of_the_wrong_size_is_refused() -> None:
    good = make_weight("int3", 33, 100, 32).prepared
    fields = (good.format, good.out_features, good.in_features, good.group_size)
    with pytest.raises(ValueError, match=f"bytes of a weight: expected {good.nbytes}, got {good.nbytes - 1}"):
        native.linear(random_x(1, 100), [PreparedWeight("cpu", *fields, good.data[1:])], None, "int8")
