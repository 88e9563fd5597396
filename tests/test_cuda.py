"""The CUDA kernels on a CPU: the very sources of kernels/cuda, through amq/kernels/cuda.py, on the shim's fibers.

Fragment layouts, masks, shifts, tails, barriers and addresses are what runs here; speed, the compiler's SASS and the
hardware's own rounding inside a tensor-core product are not. AMQ_TEST_CUDA_LIBRARY names another build:
test_cuda_sanitizers.py runs parts of this file that way, under the address and the thread sanitizer.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch
from cuda_shim.build import chosen_build
from helpers.packed import random_packed
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat
from amq.kernels import backends, cuda
from amq.kernels import gpu_layout as layout
from amq.packing import PackedWeight, PreparedWeight, dequantize, unpack_codes

DTYPES = (torch.float16, torch.bfloat16)
SHAPES = ((24, 1100, 64, 1), (13, 577, 32, 3), (40, 512, 128, 8), (70, 2600, 128, 5), (9, 64, 32, 2))
"""out_features, in_features, group_size, rows."""

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp16", "bf16"))
every_mode = pytest.mark.parametrize("mode", backends.ACTIVATIONS)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda.Library:
    return cuda.Library(chosen_build(tmp_path_factory.mktemp("shim")))


def prepared(packed: PackedWeight) -> PreparedWeight:
    return PreparedWeight.of(packed, "cuda", layout.prepare(packed))


def rmse(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def reference(x: Tensor, packed: PackedWeight, bias: Tensor | None, mode: str) -> Tensor:
    """float64, of the activations that the mode computes with."""
    if mode == "int8":
        x = backends.quantize_activations(x.float(), packed.group_size)
    y = x.double() @ dequantize(packed, torch.float64).T
    return y if bias is None else y + bias.double()


@every_format
@every_dtype
@every_mode
def test_linear(library: cuda.Library, fmt, dtype: torch.dtype, mode: str) -> None:
    """Within twice the error of torch at the same dtype, and the output's own rounding, which a few outputs of torch
    may be lucky with; in every shape, with every group size and rows."""
    generator = torch.Generator().manual_seed(1)
    for out_features, in_features, group_size, rows in SHAPES:
        packed = random_packed(fmt, out_features, in_features, group_size)
        x = torch.randn(rows, in_features, generator=generator).to(dtype)
        bias = torch.randn(out_features, generator=generator).to(dtype)
        y = library.linear(x, [prepared(packed)], bias, mode, 0)
        assert y.dtype == dtype and y.shape == (rows, out_features)
        in_torch = x @ dequantize(packed, dtype).T + bias
        expected = reference(x, packed, bias, mode)
        bar = 2 * rmse(in_torch, reference(x, packed, bias, "fp32")) + rmse(expected.to(dtype), expected)
        assert rmse(y, expected) <= bar, (out_features, in_features, group_size, rows)


@every_dtype
@every_mode
def test_fused_is_separate(library: cuda.Library, dtype: torch.dtype, mode: str) -> None:
    """All formats in one call, more than one launch takes, equal what single calls give to the last bit."""
    sizes = [n for n, _ in zip(cycle((24, 7, 33, 16, 40, 8)), FORMATS, strict=False)]
    packed = [random_packed(fmt, n, 640, 64) for fmt, n in zip(FORMATS.values(), sizes, strict=True)]
    weights = [prepared(p) for p in packed]
    x, bias = torch.randn(3, 640).to(dtype), torch.randn(sum(sizes)).to(dtype)
    fused = library.linear(x, weights, bias, mode, 0)
    separate = [library.linear(x, [w], part, mode, 0) for w, part in zip(weights, bias.split(sizes), strict=True)]
    assert torch.equal(fused, torch.cat(separate, -1))


@every_format
@every_dtype
def test_one_hot_gives_the_column(library: cuda.Library, fmt, dtype: torch.dtype) -> None:
    packed = random_packed(fmt, 19, 704, 64)
    for column in (0, 33, 511, 512, 703):
        x = torch.zeros(1, 704, dtype=dtype)
        x[0, column] = 1
        y = library.linear(x, [prepared(packed)], None, "fp32", 0)
        assert torch.equal(y[0], dequantize(packed, dtype)[:, column])


@every_format
def test_layout_is_a_permutation(fmt) -> None:
    """Every code comes back from where the layout's text says it is, the spare bits included."""
    packed = random_packed(fmt, 13, 1100, 32)
    sizes = layout.layout_of(fmt, 13, 1100, 32)
    words = layout.prepare(packed)[: sizes.code_bytes].view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    words = words.view(sizes.tiles, sizes.planes, layout.TILE_ROWS, layout.COLUMNS)
    used = sizes.fields * sizes.bits
    codes = unpack_codes(packed.qweight, fmt, 1100).to(torch.int64)
    for k in (0, 1, 31, 32, 63, 64, 200, 447, 511, 512, 1023, 1024, 1099):
        slab, rest = divmod(k, layout.SLAB)
        unit, half, column, pair = rest // 64, rest // 32 % 2, rest % 32 // 2, rest % 2
        word, field = divmod(unit, sizes.fields)
        planes = words[:, slab * sizes.bits :][:, : sizes.bits, :, column]  # those of the slab that are there
        byte = planes >> 8 * (half + 2 * pair) & 0xFF
        if word < sizes.bits:
            code = byte[:, word] >> field * sizes.bits
        else:
            stream = sum((byte[:, plane] >> used) << plane * (8 - used) for plane in range(sizes.bits))
            code = stream >> (word - sizes.bits) * used + field * sizes.bits
        assert torch.equal((code & fmt.max_code).flatten()[:13], codes[:, k]), k


@every_dtype
def test_activations_that_are_not_finite(library: cuda.Library, dtype: torch.dtype) -> None:
    """A NaN or an infinity makes its row's outputs non-finite, and no other row's; int8 makes them NaN."""
    weight = prepared(random_packed(FORMATS["int3"], 24, 640, 64))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, 640).to(dtype)
        x[1, 600] = bad
        for mode in backends.ACTIVATIONS:
            y = library.linear(x, [weight], None, mode, 0)
            assert y[[0, 2]].isfinite().all()
            assert not y[1].isfinite().any()
            assert mode == "fp32" or y[1].isnan().all()


@every_mode
def test_rows_do_not_depend_on_each_other(library: cuda.Library, mode: str) -> None:
    weight = prepared(random_packed(FORMATS["int4"], 24, 640, 128))
    x = torch.randn(8, 640).half()
    x[3] = 0
    y = library.linear(x, [weight], None, mode, 0)
    assert not y[3].any()
    for row in range(8):
        assert torch.equal(library.linear(x[row : row + 1], [weight], None, mode, 0)[0], y[row])


@every_mode
def test_outputs_are_all_written_and_nothing_else(
    library: cuda.Library, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, real, made = 64, Tensor.new_empty, []

    def poisoned(self: Tensor, *size: int, **options: torch.dtype) -> Tensor:
        count = torch.Size(size).numel()
        whole = real(self, count + 2 * guard, **options)
        whole.fill_(torch.nan if whole.is_floating_point() else 0xCB)
        made.append((whole, whole.clone()))
        return whole[guard : guard + count].view(size)

    packed = random_packed(FORMATS["int3"], 37, 640, 64)
    weight, x = prepared(packed), torch.randn(3, 640).half()
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    y = library.linear(x, [weight], None, mode, 0)
    assert y.isfinite().all()
    for whole, before in made:
        for part in (slice(None, guard), slice(-guard, None)):
            assert torch.equal(whole[part].view(torch.uint8), before[part].view(torch.uint8))


def test_odd_addresses_are_copied(library: cuda.Library, caplog: pytest.LogCaptureFixture) -> None:
    """x that the kernels cannot read as it is gives the same outputs, and one warning."""
    cuda._warn_of_copies.cache_clear()
    weight = prepared(random_packed(FORMATS["int4"], 24, 640, 64))
    x = torch.randn(3, 640).half()
    shifted = torch.cat([torch.zeros(1).half(), x.flatten()])[1:].view(3, 640)
    strided = torch.nn.functional.pad(x, (0, 3))[:, :640]
    expected = library.linear(x, [weight], None, "fp32", 0)
    assert shifted.data_ptr() % 16 and strided.stride(0) % 8
    for odd in (shifted, strided):
        assert torch.equal(library.linear(odd, [weight], None, "fp32", 0), expected)
    (message,) = caplog.messages
    assert "CUDA linears of 640 input features copy x before each product" in message


def test_refusals(library: cuda.Library) -> None:
    weight = prepared(random_packed(FORMATS["int4"], 24, 64, 64))
    x = torch.randn(9, 64).half()
    with pytest.raises(AmqError, match=r"CUDA linear of 9 rows of .* int4 \[24, 64\] at group 64 was refused \(-1\)"):
        library.linear(x, [weight], None, "fp32", 0)
    moved = PreparedWeight("cuda", weight.format, 24, 64, 64, torch.zeros(weight.nbytes + 1, dtype=torch.uint8)[1:])
    with pytest.raises(AmqError, match=r"\(-6\)"):
        library.linear(x[:1], [moved], None, "fp32", 0)
    with pytest.raises(
        AmqError, match=r"int4 weight \[24, 64\] at group 64 must be uint8 \[\d+\], got torch.uint8 .*prepare"
    ):
        library.linear(x[:1], [PreparedWeight("cuda", weight.format, 24, 64, 64, weight.data[16:])], None, "fp32", 0)
    size = layout.layout_of(weight.format, 24, 64, 48).nbytes
    odd = PreparedWeight("cuda", weight.format, 24, 64, 48, torch.zeros(size, dtype=torch.uint8))
    with pytest.raises(AmqError, match=r"\(-4\): a group size other than"):
        library.linear(x[:1], [odd], None, "fp32", 0)


def test_unsupported_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: cuda.Library) -> None:
    """Each missing piece is named, with what to do."""
    cuda.library.cache_clear()
    monkeypatch.setenv("AMQ_CUDA_LIBRARY", str(tmp_path / "none.so"))
    assert "none.so: amq was built without nvcc; install the CUDA toolkit" in cuda.unsupported_reason(FORMATS["int3"])
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("AMQ_CUDA_LIBRARY", str(broken))
    assert "broken.so cannot be loaded" in cuda.unsupported_reason(FORMATS["int3"])
    monkeypatch.setattr(cuda, "library", lambda: library)
    if not torch.cuda.is_available():
        assert (
            "install a CUDA build of torch" in cuda.unsupported_reason(FORMATS["int3"])
            or "no NVIDIA GPU" in cuda._no_device()
        )
    widths = {fmt.bits for fmt in FORMATS.values() if fmt.is_dense}
    assert {bits for bits in range(-1, 12) if library.has_bits(bits)} == widths
    missing = BitFormat("binary", levels=2, unit_codes=8, unit_bytes=1)
    assert "was built without 1-bit codes; build it again with `pip install -e .`" in cuda.unsupported_reason(missing)


def test_a_library_newer_than_the_driver_is_noticed(library: cuda.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any product: any minor version of the driver's own CUDA runs, another major one does not."""
    for driver, runs in (("13000", True), ("13010", True), ("14000", True), ("12090", False), ("0", False)):
        monkeypatch.setenv("AMQ_SHIM_DRIVER", driver)
        assert (library.unsupported_reason() is None) == runs, driver
    monkeypatch.setenv("AMQ_SHIM_DRIVER", "12040")
    monkeypatch.setattr(cuda, "library", lambda: library)
    monkeypatch.setattr(cuda, "_no_device", lambda: None)  # as if torch had a GPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda._not_loadable.cache_clear()
    reason = cuda.unsupported_reason(FORMATS["int3"])
    cuda._not_loadable.cache_clear()
    assert "was built with CUDA 13.0, and this machine's NVIDIA driver knows CUDA 12.4 only: update the " in reason
    assert "a toolkit of CUDA 12 " in reason
    with pytest.raises(AmqError, match="backend cuda cannot run int3: .*knows CUDA 12.4 only"):
        backends.prepare(random_packed(FORMATS["int3"], 24, 64, 64), "cuda")
    cuda._not_loadable.cache_clear()
    monkeypatch.delenv("AMQ_SHIM_DRIVER")
    monkeypatch.setenv("AMQ_SHIM_NO_IMAGE", "1")
    assert "error 209, no kernel image is available" in library.unsupported_reason()


def test_a_failed_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What setup.py leaves where the library would be: the install went on without it."""
    (tmp_path / cuda.FAILURE).write_text("gemv.cuh(288): error: unknown attribute\n")
    monkeypatch.setenv("AMQ_CUDA_LIBRARY", str(tmp_path / "_cuda.so"))
    cuda.library.cache_clear()
    reason = cuda.unsupported_reason(FORMATS["int3"])
    cuda.library.cache_clear()
    assert "_cuda.so: nvcc failed (gemv.cuh(288): error: unknown attribute); install the CUDA toolkit" in reason
