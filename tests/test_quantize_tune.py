"""`--tune`: gradients of what is tuned, what is kept, what is never touched, and what the log says of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.mixtures import mixture
from helpers.quantizing import random_weight
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import Tensor, nn

from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import FORMATS, get_format
from amq.model.inventory import get_weight, take_inventory
from amq.model.opened import open_model
from amq.packing import PackedWeight, dequantize, expand_groups, unpack_codes
from amq.quantize import quantize, tune
from amq.quantize.distill import Distillation, activation_bytes
from amq.quantize.pieces import put
from amq.quantize.quantizers import ZERO_POINTS
from amq.quantize.quantizers.rtn import quantize_fitted
from amq.quantize.settings import QuantizeSettings
from amq.quantize.tunable import Tunable
from amq.quantize.tune import HELD_OUT, Tuner, rate
from amq.rotation import rotate
from amq.util.folders import work_folder

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
SMALL = {"windows": 3, "window_length": 48, "calibration": "self", "perplexity": "none", "group_size": 32}
TWO = FORMATS["int2"]


def rounded(weight: Tensor, fmt: str = "int2", group_size: int = 32, rotation: int = 0) -> PackedWeight:
    weight = rotate(weight) if rotation else weight
    packed = quantize_fitted([weight], [get_format(fmt)], group_size, "fractional")[0][fmt]
    return replace(packed, rotation=rotation)


def vectors(model: nn.Module) -> list[str]:
    return [o.name for o in take_inventory(model).others if o.kind == "norm_or_bias"]


def quantized(model: nn.Module, group_size: int = 32) -> dict[str, PackedWeight]:
    """All linears in two bits, which the model then holds."""
    names = [spec.name for spec in take_inventory(model).linears]
    packed = {name: rounded(get_weight(model, name).detach(), "int2", group_size) for name in names}
    for name, weight in packed.items():
        put(get_weight(model, name).data, weight)
    return packed


@pytest.mark.parametrize(
    ("group_size", "in_features", "rotation"),
    [(32, 128, 0), (128, 100, 0), (128, 192, 0), (32, 128, 64), (64, 192, 64), (128, 192, 64)],
)
def test_gradients_are_those_of_the_dequantized_weight(group_size: int, in_features: int, rotation: int) -> None:
    """Those of factors on the scales and of shifts of the zero points, by autograd through the formula in float32."""
    packed = rounded(random_weight(24, in_features), "int3", group_size, rotation)
    model = nn.Sequential(nn.Linear(in_features, 24, bias=False)).requires_grad_(False)
    model[0].weight.data = dequantize(packed)
    x, wanted = torch.randn(40, in_features), torch.randn(40, 24)
    factor = torch.zeros(packed.scale.shape, requires_grad=True)
    shift = torch.zeros(packed.scale.shape, requires_grad=True)
    codes = unpack_codes(packed.qweight, packed.format, in_features).float()
    zero = expand_groups(packed.zero_point.float() + shift, group_size, in_features)
    scale = packed.scale.float() * (2 / packed.format.max_code * factor).exp()
    weight = (codes - zero) * expand_groups(scale, group_size, in_features)
    ((x @ (rotate(weight) if rotation else weight).t()) * wanted).sum().backward()
    tunable = Tunable(model, {"0": packed}, [], torch.float32)
    with tunable.tracked():
        (model(x) * wanted).sum().backward()
    found = tunable._grids["0"].gradients
    torch.testing.assert_close(found[0], factor.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], shift.grad, rtol=1e-3, atol=1e-3)
    assert model[0].weight.grad is None and not model[0].weight.requires_grad


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_the_model_holds_what_would_be_stored(family: str) -> None:
    """After steps: its weights are the dequantized ones of `packed`, bit for bit, and norms are numbers of 16 bits."""
    model = ARCHITECTURES[family].build()
    distillation = Distillation(model, [], 0)
    window = distillation.learn(random_tokens(1, 32)[0])
    packed, names = quantized(model), vectors(model)
    before = {name: model.get_parameter(name).clone() for name in names}
    tunable = Tunable(model, packed, names, torch.bfloat16)
    for _ in range(3):
        with tunable.tracked():
            distillation.backward(window)
        tunable.step(0.02)
    for name, weight in tunable.packed().items():
        assert torch.equal(weight.qweight, packed[name].qweight), name
        assert not torch.equal(weight.scale, packed[name].scale), name
        assert torch.equal(get_weight(model, name).detach(), dequantize(weight)), name
    changed = {name for name in names if not torch.equal(model.get_parameter(name), before[name].bfloat16().float())}
    assert any("norm" in name for name in changed) and any("bias" in name for name in changed) == (family == "qwen2")
    for name in names:
        value = model.get_parameter(name)
        assert torch.equal(value, value.bfloat16().float()) and not value.requires_grad and value.grad is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral"])
def test_segments_change_nothing(family: str) -> None:
    """Losses and gradients are those of one backward pass through all blocks."""
    found = []
    for segments in (1, 2, 3):
        model = mixture(family) if family == "mixtral" else ARCHITECTURES[family].build()
        outside = [name for name in vectors(model) if not name.startswith("model.layers")]
        distillation = Distillation(model, outside, 1, min(segments, len(model.model.layers)))
        window = distillation.learn(random_tokens(1, 40)[0])
        tunable = Tunable(model, quantized(model), vectors(model), torch.float32)
        with tunable.tracked():
            loss = distillation.backward(window)
        assert loss == pytest.approx(distillation.loss([window]), rel=1e-5) and loss > 1e-4
        found.append((loss, [value.grad.clone() for value in tunable._values]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for gradient, wanted in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-7)


@pytest.fixture
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


def ticking(seconds: float = 1.0) -> Callable[[], float]:
    """A clock that says `seconds` more each time."""
    times = itertools.count(0.0, seconds)
    return lambda: next(times)


def tuner(folder: Path, minutes: float, **settings: object) -> tuple[Tuner, nn.Module, dict[str, PackedWeight]]:
    """One that has learned, and the model, quantized since."""
    made = QuantizeSettings.make(
        model=str(folder), output="unused", uniform="int2", tune=minutes, **{**SMALL, **settings}
    )
    opened = open_model(made.model)
    configuration = Configuration.uniform(opened.inventory.linears, TWO, 32)
    found = Tuner(made, opened, configuration, torch.float16, clock=ticking())
    assert found.kept_bytes > 0 and found.working_bytes > 0 and f"{minutes:g} minutes" in found.plan()
    found.learn()
    return found, opened.model, quantized(opened.model)


def same(found: dict[str, PackedWeight], wanted: dict[str, PackedWeight]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(part, found[name].parts[key]) for name in wanted for key, part in wanted[name].parts.items()
    )


def test_the_loss_falls_and_codes_stay(folder: Path) -> None:
    found, model, packed = tuner(folder, 8)
    tuned, log = found.run(packed)
    assert log.best < 0.9 * log.start and 0 < log.best_step <= log.steps and log.end == "the time was over"
    assert log.windows == 3 and log.held_out == HELD_OUT and log.text == "self" and 240 < log.seconds < 490
    assert found._distillation.loss(found._measured) == log.best
    for name, weight in tuned.items():
        assert torch.equal(weight.qweight, packed[name].qweight)
        assert torch.equal(get_weight(model, name).detach(), dequantize(weight)), name


@pytest.mark.parametrize("rate", [3.0, 1e30])
def test_what_diverges_ends_and_the_best_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """At an absurd rate every check is worse than the start, or no loss is a number: nothing has changed then."""
    monkeypatch.setattr(tune, "RATE", rate)
    found, model, packed = tuner(folder, 8)
    norm = model.model.norm.weight.clone()
    tuned, log = found.run(packed)
    assert log.end.startswith("it diverged") and log.best == log.start and log.best_step == 0 < log.steps < 100
    assert same(tuned, packed) and torch.equal(model.model.norm.weight, norm.half().float())
    assert found._distillation.loss(found._measured) == log.start


def test_too_few_minutes_change_nothing(folder: Path) -> None:
    found, _, packed = tuner(folder, 0.05)
    tuned, log = found.run(packed)
    assert log.steps == log.best_step == 0 and log.best == log.start and same(tuned, packed)


@pytest.mark.parametrize("zero_points", ZERO_POINTS)
def test_only_fractional_zero_points_change(folder: Path, zero_points: str) -> None:
    found, _, packed = tuner(folder, 4, zero_points=zero_points)
    tuned, log = found.run(packed)
    moved = [n for n, weight in tuned.items() if not torch.equal(weight.zero_point, packed[n].zero_point)]
    assert bool(moved) == (zero_points == "fractional") and log.best < log.start


def test_the_rate_rises_and_falls() -> None:
    shares = [rate(share / 100) for share in range(1, 101)]
    assert shares[0] < shares[5] < max(shares) <= tune.RATE and shares.index(max(shares)) < 12
    assert shares[-1] == pytest.approx(0, abs=1e-12) and all(a > b for a, b in itertools.pairwise(shares[12:]))


def test_activations_are_counted_and_not_kept(tiny_llama: nn.Module) -> None:
    """Twice as many tokens take twice as much, and no parameter is left with a gradient."""
    weights = [get_weight(tiny_llama, spec.name) for spec in take_inventory(tiny_llama).linears]
    sizes = [activation_bytes(tiny_llama, random_tokens(1, length), weights) for length in (16, 32)]
    assert 1.5 * sizes[0] < sizes[1] < 3 * sizes[0]
    assert not any(p.requires_grad or p.grad is not None for p in tiny_llama.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tuned_checkpoint_holds_what_was_measured(
    make_folder: Callable[[nn.Module], Path], tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded again, it has the divergence that the log says was kept; the head is tuned, with what is tied to it."""
    monkeypatch.setattr("amq.quantize.run.Tuner", partial(Tuner, clock=ticking()))  # the same steps on every machine
    monkeypatch.setattr(tune, "RATE", tune.RATE / 10)  # at which none of them diverges
    source = make_folder(ARCHITECTURES["llama"].build(tie_word_embeddings=tied))
    options = {**SMALL, "uniform": "int2", "head": "int3", "perplexity": "pydoc", "perplexity_tokens": 96, "tune": 8}
    result = quantize(str(source), str(tmp_path / "out"), **options)
    log = json.loads((result.output / "quantization.json").read_text())
    tuning = log["tuning"]
    assert tuning["best"] < tuning["start"] and tuning["steps"] and tuning["end"] == "the time was over"
    assert list(log["perplexity"]["rows"]) == ["full", "gptq", "gptq, tuned"]
    assert log["settings"]["tune"] == 8 and "tuned for 8 minutes" in (result.output / "README.md").read_text()
    checkpoint, opened = open_checkpoint(result.output), open_model(str(source))
    sampler = opened.sampler("self", 48, 0, 3 + HELD_OUT)
    sampler.take(3)
    distillation = Distillation(opened.model, ["model.norm.weight", "lm_head.weight"], sampler.corpus.unscored)
    held_out = [distillation.learn(window) for window in sampler.take(HELD_OUT)]
    opened.model.load_state_dict({n: checkpoint.tensor(n).float() for n in checkpoint.other_names}, strict=False)
    for name in checkpoint.record.formats:
        get_weight(opened.model, name).data.copy_(dequantize(checkpoint.packed(name)))
    assert distillation.loss(held_out) == pytest.approx(tuning["best"], rel=1e-4)


def test_an_interrupted_tuning_begins_again_behind_the_blocks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    output, options = tmp_path / "out", {**SMALL, "uniform": "int2"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tuner, "_descend", interrupted)
        quantize(str(folder), str(output), tune=0.02, **options)
    assert len(list(work_folder(output).glob("block-*"))) == 2 and not output.exists()
    log = quantize(str(folder), str(output), tune=0.03, resume=True, **options).log
    assert log.tuning is not None and log.tuning.best <= log.tuning.start and log.settings.tune == 0.03
    assert not work_folder(output).exists() and open_checkpoint(output).record.formats


@pytest.mark.parametrize("minutes", [0, -1.0, "ten", float("nan")])
def test_minutes_must_be_more_than_none(folder: Path, tmp_path: Path, minutes: object) -> None:
    with pytest.raises(AmqError, match="tune must be .*above 0"):
        quantize(str(folder), str(tmp_path / "out"), uniform="int2", tune=minutes, **SMALL)


def test_a_model_on_disk_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    options = {**SMALL, "calibration": "docstrings", "load": "disk"}
    with pytest.raises(AmqError, match="--tune takes all weights of .* in memory at once"):
        quantize(str(folder), str(tmp_path / "out"), uniform="int2", tune=1.0, **options)
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_cannot_write_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amq.model.own_text.CACHE_NAMES", ("state",))
    options = {**SMALL, "calibration": "docstrings"}
    with pytest.raises(AmqError, match="--tune takes text that the model writes itself: .* writes without a cache"):
        quantize(str(folder), str(tmp_path / "out"), uniform="int2", tune=1.0, **options)
