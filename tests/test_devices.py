"""Bank, Hessians, quantizers, folds, swaps and losses on another device than the CPU: nothing is mixed up, results stay
where the weights are, and they are those of the CPU.

The device is a stand-in (tests/helpers/elsewhere.py) whose values are computed on the CPU, so that "as on the CPU" can
be compared to the bit where the same operations run in the same order, and within derived bounds where the CPU has
kernels of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.elsewhere import DEVICE, DeviceMixUp, Elsewhere, back, elsewhere, to_elsewhere
from helpers.fake_bank import FakeBank
from helpers.quantizing import output_error, random_gram, random_weight
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import Tensor, nn

from amq.configuration import Configuration
from amq.formats import FORMATS
from amq.kernels.dense import dequantize_into, dequantized
from amq.model.calibration import CalibrationStream
from amq.model.inventory import take_inventory
from amq.model.open import LoadedModel
from amq.packing import PARTS, PackedWeight, dequantize
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import fisher_passes
from amq.proxy.meter import chunk_tokens
from amq.proxy.resident import ResidentBank, near
from amq.quantize.bank import BankSettings, open_bank
from amq.quantize.blocks import BlockQuantizer
from amq.quantize.methods import METHODS
from amq.quantize.plan import working_bytes
from amq.quantize.quantizers import NEEDS_GRAM, QUANTIZERS, ZERO_POINTS, awq, clip, gptq, grid, rtn

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = tuple(FORMATS[name] for name in ("int2", "int3", "int8"))
IN_FEATURES, GROUP_SIZE = 100, 32


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in has a GiB."""
    monkeypatch.setattr("amq.proxy.meter.free_on", lambda device: 1 << 30)


def weights() -> list[Tensor]:
    return [random_weight(rows, IN_FEATURES, seed=rows) for rows in (5, 70)]


def there(packed: PackedWeight) -> PackedWeight:
    """`packed` on the CPU; it must have been on the stand-in."""
    return packed.map(back)


def same(a: PackedWeight, b: PackedWeight) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in PARTS)


def test_the_stand_in_refuses_what_a_gpu_does() -> None:
    with elsewhere() as device:
        x, y = to_elsewhere(torch.ones(3)), torch.ones(3)
        for mixed in (lambda: x + y, lambda: y.mul_(x), lambda: torch.cat([x, y]), lambda: torch.where(x > 0, y, 0.0)):
            with pytest.raises(DeviceMixUp):
                mixed()
        assert (x + y.to(device)).device == device and (2.0 * x).device == device
        assert x.cpu().device == y.copy_(x).device == torch.ones(3).device == torch.device("cpu")
        assert torch.zeros(3, device=device).device == x.new_empty(2).device == device


ROUNDED = [
    *((proxy, zero_points) for proxy in ("gptq", "clip", "rtn") for zero_points in ZERO_POINTS),
    ("hqq", "fractional"),  # what that library solves for
]


@pytest.mark.parametrize("proxy, zero_points", ROUNDED)
def test_quantizers_work_where_the_weights_are(proxy: str, zero_points: str) -> None:
    """As torch's code on a CPU to the bit: for gptq that is the specification of the CPU's kernels, and rtn's agree."""
    gram = random_gram(IN_FEATURES) if proxy in NEEDS_GRAM else None
    plain = gptq.quantize_in_torch if proxy == "gptq" else QUANTIZERS[proxy]
    expected = plain(weights(), SOME, GROUP_SIZE, gram, zero_points)
    with elsewhere():
        given = [to_elsewhere(weight.bfloat16() if proxy == "rtn" else weight) for weight in weights()]
        moved = None if gram is None else to_elsewhere(gram)
        found = QUANTIZERS[proxy](given, SOME, GROUP_SIZE, moved, zero_points)
    if proxy == "rtn":
        expected = rtn.quantize([weight.bfloat16() for weight in weights()], SOME, GROUP_SIZE, None, zero_points)
    for ours, theirs in zip(found, expected, strict=True):
        for name, packed in ours.items():
            if proxy == "gptq":  # its Cholesky factor is LAPACK's there
                assert float((there(packed).qweight == theirs[name].qweight).float().mean()) > 0.97
            else:
                assert same(there(packed), theirs[name]), name


@pytest.mark.parametrize("chunk", [1 << 15, 1 << 40])
def test_gptq_is_as_good_in_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not interact, so what a GPU's memory allows at once changes no more than float32 rounds."""
    monkeypatch.setattr(gptq, "ROUND_BYTES", chunk)
    monkeypatch.setattr(gptq, "ROWS", 40)
    monkeypatch.setattr(gptq, "REFIT_BYTES", chunk)
    gram = random_gram(IN_FEATURES)
    expected = gptq.quantize(weights(), SOME, GROUP_SIZE, gram)
    with elsewhere():
        found = gptq.quantize([to_elsewhere(w) for w in weights()], SOME, GROUP_SIZE, to_elsewhere(gram))
    for weight, ours, theirs in zip(weights(), found, expected, strict=True):
        for name in theirs:
            error, baseline = (output_error(weight, p, gram).sum() for p in (there(ours[name]), theirs[name]))
            assert float(error) == pytest.approx(float(baseline), rel=0.05), name


def test_fitted_grids_and_scales_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, weight), fmt = weights(), FORMATS["int3"]
    expected = rtn.in_torch(weight, fmt, GROUP_SIZE, "fractional", grid.SHRINKS, grid.REFITS)
    monkeypatch.setattr(rtn, "PIECE", 10 * IN_FEATURES)
    with elsewhere():
        found = rtn.quantize_fitted([to_elsewhere(weight)], [fmt], GROUP_SIZE)[0][fmt.name]
        scales = grid.group_scales(to_elsewhere(weight), fmt, GROUP_SIZE)
        grid.check_scales("linear", to_elsewhere(weight), fmt, GROUP_SIZE)
    assert same(there(found), expected)
    assert torch.equal(back(scales), grid.group_scales(weight, fmt, GROUP_SIZE))


def test_scales_of_awq() -> None:
    gram, formats = random_gram(IN_FEATURES), [FORMATS["int3"], FORMATS["int2"]]
    tie = torch.arange(IN_FEATURES) // 2
    expected, alpha = awq.search_scale(weights(), formats, GROUP_SIZE, gram, tie=tie)
    with elsewhere():
        given = [to_elsewhere(weight) for weight in weights()]
        scale, found = awq.search_scale(given, formats, GROUP_SIZE, to_elsewhere(gram), tie=tie)
    assert found == alpha and torch.equal(back(scale), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("from_cpu", [True, False])
def test_dense_where_the_buffer_is(dtype: torch.dtype, from_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amq.kernels.dense.PIECE", 7 * IN_FEATURES)
    packed = rtn.quantize(weights(), SOME, GROUP_SIZE)[1]["int3"]
    with elsewhere() as device:
        out = torch.empty(70, IN_FEATURES, dtype=dtype, device=device)
        dequantize_into(packed if from_cpu else packed.map(to_elsewhere), out)
        whole = dequantized(packed.map(to_elsewhere))
    assert torch.equal(back(out), dequantize(packed, dtype)) and torch.equal(back(whole), dequantize(packed))


class Models:
    """One tiny model twice: on the CPU and on the stand-in."""

    def __init__(self, model: nn.Module) -> None:
        self.here = model
        with elsewhere() as device:
            self.there = copy.deepcopy(model).to(device)
        self.inventory = take_inventory(model)
        self.formats = dict.fromkeys((s.name for s in self.inventory.linears), "int3")


@pytest.fixture(params=["llama", "gemma2"])
def models(request: pytest.FixtureRequest) -> Models:
    return Models(ARCHITECTURES[request.param].build())


def test_second_moments_stay_on_the_device(models: Models) -> None:
    """Σ x xᵀ by the CPU's kernel, which adds in another order than torch: within n·u of the sums of magnitudes."""
    tokens, linears = random_tokens(3, 40), models.inventory.in_block(0)
    with torch.no_grad():
        expected = CalibrationStream(models.here, tokens).measure(linears)
        with elsewhere():
            found = CalibrationStream(models.there, tokens).measure(linears)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.linears == theirs.linears
        size = theirs.gram.diagonal().sqrt()  # |E[x y]| ≤ rms(x) rms(y)
        bound = 2 * tokens.numel() * 2.0**-24 * size.unsqueeze(1) * size
        assert bool(((back(ours.gram) - theirs.gram).abs() <= bound + 1e-30).all())


@pytest.mark.parametrize("proxy", ["gptq", "rtn"])
def test_a_bank_of_a_model_on_the_device(models: Models, proxy: str, tmp_path: Path) -> None:
    settings = BankSettings(proxy, 32, random_tokens(3, 40))
    outer = {s.name: [FORMATS["int8"]] for s in models.inventory.outer}
    names = [FORMATS[name] for name in ("int3", "int8")]
    expected = open_bank(models.here, models.inventory, names, settings, cache=tmp_path / "a", outer=outer)
    with elsewhere():
        made = open_bank(
            models.there, models.inventory, names, settings, cache=tmp_path / "b", fingerprint="there", outer=outer
        )
    ours, theirs = made.weight_errors(), expected.weight_errors()
    for name in models.inventory.linears:
        for fmt in ("int3", "int8"):
            assert made.get(name.name, fmt).qweight.device.type == "cpu"
            assert ours[name.name][fmt] == pytest.approx(theirs[name.name][fmt], rel=1e-6 if proxy == "rtn" else 0.1)


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
def test_a_model_is_quantized_on_its_device(models: Models, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponents, folds, rounding, errors, and the dequantized weights that stay behind."""
    monkeypatch.setattr(clip, "SHRINKS", (1.0, 0.8))
    monkeypatch.setattr(awq, "EXPONENTS", (0.0, 0.25, 0.5))
    windows = random_tokens(2, 40)
    results = []
    for model, where in ((models.here, None), (models.there, elsewhere())):
        with where or torch.no_grad():
            source = BlockQuantizer(model, models.inventory, models.formats, 32, METHODS[method], windows)
            for block in range(models.inventory.n_blocks):
                results.append(source.make(block))
                source.finish(results[-1])
    half = len(results) // 2
    for ours, theirs in zip(results[half:], results[:half], strict=True):
        assert ours.errors.keys() == theirs.errors.keys() and ours.notes == theirs.notes
        for name, packed in ours.packed.items():
            assert isinstance(packed.qweight, Elsewhere)
            assert ours.errors[name] == pytest.approx(theirs.errors[name], rel=0.1)
        assert all(isinstance(value, Elsewhere) for value in ours.changed.values())
    assert all(isinstance(parameter.data, Elsewhere) for parameter in models.there.parameters())


@pytest.mark.parametrize("loss", ["jsd", "kl"])
def test_losses_and_swaps_on_the_device(models: Models, loss: str) -> None:
    """The CPU's fused divergence sums in float64, torch's in float32 over the vocabulary: within its rounding."""
    bank, windows = FakeBank(models.here, ["int2", "int8"]), {"search": random_tokens(4, 30, seed=1)}
    configurations = [{**models.formats, next(iter(models.formats)): "int8"}, dict.fromkeys(models.formats, "int2")]
    configurations[0] = {name: "int8" if i % 2 else "int2" for i, name in enumerate(models.formats)}

    def measured(model: nn.Module) -> list[float]:
        evaluator = Evaluator(LoadedModel(model, None, "tiny"), models.inventory, bank, windows, loss, 50_000)
        losses = [evaluator.evaluate(formats) for formats in configurations]
        evaluator.restore()
        return losses

    expected = measured(models.here)
    with elsewhere():
        assert measured(models.there) == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert all(isinstance(parameter.data, Elsewhere) for parameter in models.there.parameters())


def test_a_plan_counts_what_a_gpu_takes_besides(tiny_llama: nn.Module) -> None:
    models = Models(tiny_llama)
    configuration = Configuration.uniform(models.inventory.linears, FORMATS["int4"], 32)
    needed = [
        working_bytes(model, models.inventory, configuration, (), random_tokens(1, 8), calibrated=True)
        for model in (models.here, models.there)
    ]
    widest = max(s.in_features for s in models.inventory.linears)
    assert needed[1] - needed[0] == 2 * 4 * widest**2 + gptq.ROUND_BYTES + gptq.REFIT_BYTES


def test_fisher_scores_on_the_device(tiny_llama: nn.Module) -> None:
    """Labels are drawn from the device's generator, so scores are finite and positive, not the CPU's."""
    models = Models(tiny_llama)
    bank = FakeBank(models.here, ["int2"])
    with elsewhere(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", lambda device="cpu": CpuGenerator())
        (table,) = fisher_passes(models.there, models.inventory, bank, random_tokens(1, 30), ["int2"], 0)
    assert all(0 < row["int2"] < 10 for row in table.values())


class CpuGenerator(torch.Generator):
    """The stand-in has none of its own."""


def test_chunks_of_a_loss_follow_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free: Callable[[int], Any] = lambda size: monkeypatch.setattr("amq.proxy.meter.free_on", lambda device: size)  # noqa: E731
    cpu = torch.device("cpu")
    free(1)
    assert chunk_tokens(DEVICE, 128_256) == (1, 1)
    assert chunk_tokens(cpu, 128_256) == chunk_tokens(cpu, 10)
    free(4 << 30)
    tokens, rows = chunk_tokens(DEVICE, 128_256)
    assert tokens == 256 and rows == 64
    assert 16 * tokens * 128_256 <= (4 << 30) // 8 and 48 * rows * 128_256 <= (4 << 30) // 8
    free(1 << 45)
    assert chunk_tokens(DEVICE, 1000) == (4096, 4096)


def test_weights_of_a_bank_stay_on_the_device_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amq.proxy.resident.free_memory", lambda: 2 * packed.nbytes + 1)
    packed = rtn.quantize([random_weight(8, 64)], [FORMATS["int3"]], 32)[0]["int3"]

    class Counting:
        asked = 0

        def formats_of(self, name: str) -> tuple[Any, ...]:
            return (FORMATS["int3"],)

        def get(self, linear: str, fmt: str) -> PackedWeight:
            self.asked += 1
            return packed

    with elsewhere() as device:
        bank = Counting()
        close = near(bank, device, 2 * packed.nbytes)
        assert isinstance(close, ResidentBank) and close.formats_of("a") == (FORMATS["int3"],)
        for _ in range(3):
            for name in "abcd":
                assert same(there(close.get(name, "int3")), packed)
        assert (close.on_device, close.on_host) == (2 * packed.nbytes, packed.nbytes)
        assert bank.asked == 3 + 3, "each of three once, the fourth every time: there is no more room on the host"
        assert close.get("a", "int3").qweight.inner is close.get("a", "int3").qweight.inner
        monkeypatch.setattr("amq.proxy.resident.free_on", lambda device: 4 * packed.nbytes)
        share = near(bank, device)
        share.get("a", "int3"), share.get("b", "int3")
        assert share.on_device == packed.nbytes
    assert near(bank, torch.device("cpu"), 0) is bank
