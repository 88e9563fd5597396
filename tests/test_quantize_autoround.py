"""`--method autoround`: the codes are those that auto-round chose, on the model that it was given a copy of."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.mixtures import mixture
from helpers.tiny_models import byte_tokenizer, random_tokens, tiny_llama
from torch import nn

from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import FORMATS, get_format
from amq.model.inventory import take_inventory
from amq.model.open import LoadedModel
from amq.packing import PackedWeight, dequantize
from amq.quantize import autoround, quantize
from amq.quantize.autoround import AutoRoundSource, read_off
from amq.quantize.quantizers.grid import symmetric_zero

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
Taken = dict[str, tuple[torch.Tensor, PackedWeight]]


@pytest.fixture
def package() -> Iterator[None]:
    """auto-round, which collects garbage after every step: what is there already is not to be looked at each time."""
    pytest.importorskip("auto_round", reason="auto-round is optional: pip install --no-deps auto-round py-cpuinfo")
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """{linear: the weight that auto-round left, what was read off it}; nothing may be downloaded meanwhile."""
    found: Taken = {}

    def recorded(module: nn.Module, name: str, *arguments: object) -> PackedWeight:
        packed = read_off(module, name, *arguments)
        found[name] = module.weight.detach().clone(), packed
        return packed

    def refuse(*arguments: object) -> None:
        raise AssertionError("auto-round opened a connection")

    monkeypatch.setattr(autoround, "read_off", recorded)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return found


def dealt(model: nn.Module) -> dict[str, str]:
    """All formats, dealt to the model's linears in turn."""
    return {s.name: list(FORMATS)[i % len(FORMATS)] for i, s in enumerate(take_inventory(model).linears)}


@pytest.mark.usefixtures("package")
def test_a_checkpoint_holds_the_weights_that_auto_round_chose(tiny_folder: Path, tmp_path: Path, taken: Taken) -> None:
    formats = dealt(tiny_llama())
    Configuration(formats, 32).save(tmp_path / "configuration.json")
    (tmp_path / "text").write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(2000)))
    quantize(
        str(tiny_folder),
        str(tmp_path / "out"),
        configuration=str(tmp_path / "configuration.json"),
        method="autoround",
        autoround_iterations=2,
        calibration=str(tmp_path / "text"),
        windows=3,
        window_length=48,
        perplexity="none",
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    assert set(taken) == set(formats)
    for name, (weight, _) in taken.items():
        packed = checkpoint.packed(name)
        assert packed.format.name == formats[name]
        assert torch.equal(dequantize(packed), weight), name
        assert torch.equal(packed.zero_point, packed.zero_point.round())
    log = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert log["notes"] == ["autoround makes whole zero points: --zero-points fractional was taken as integer"]
    assert all(0 < entry["relative_error"] < 1 for entry in log["linears"].values())


@pytest.mark.usefixtures("package")
def test_symmetric_ragged_groups_from_the_second_block_on(taken: Taken) -> None:
    """As after an interruption that left block 0 saved; group 128 is more than any linear here has."""
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = take_inventory(model)
    loaded = LoadedModel(model, byte_tokenizer(), "tiny")
    source = AutoRoundSource(loaded, parts, dealt(model), 128, random_tokens(3, 48), "symmetric", 2, 0)
    result = source.make(1)
    assert set(taken) == set(result.packed) == {s.name for s in parts.in_block(1)}
    assert result.notes == []
    for name, packed in result.packed.items():
        assert torch.equal(dequantize(packed), taken[name][0]), name
        assert (packed.zero_point == symmetric_zero(packed.format)).all()
        assert (packed.scale < 0).any() and (packed.scale > 0).any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.get_submodule(name), "scale")


def linear_on_a_grid(scale: float = 0.5, zero: float = 3.0) -> nn.Linear:
    """Codes 0…7 around `zero`, with what auto-round leaves beside a weight."""
    linear = nn.Linear(32, 8, bias=False)
    linear.weight.data = (torch.arange(256).view(8, 32) % 8 - zero) * scale
    linear.scale, linear.zp = torch.full((8, 1), scale).half(), torch.full((8, 1), zero)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_read_off_weights_of_any_dtype(dtype: torch.dtype) -> None:
    fmt = get_format("int3")
    for scale in (0.123, -0.123):
        linear = linear_on_a_grid(torch.tensor(scale).half().item())
        expected = linear.weight.data
        linear.weight.data = linear.weight.data.to(dtype)
        assert torch.equal(dequantize(read_off(linear, "q_proj", fmt, 32)), expected)


def test_what_is_not_on_its_grid_is_refused() -> None:
    fmt = get_format("int3")
    linear = linear_on_a_grid()
    linear.weight.data[3, 4] += 0.1
    with pytest.raises(AmqError, match="q_proj: the weight that auto-round left is not"):
        read_off(linear, "q_proj", fmt, 32)
    with pytest.raises(AmqError, match="q_proj: the weight that auto-round left is not"):
        read_off(linear_on_a_grid(), "q_proj", get_format("int2"), 32)
    with pytest.raises(AmqError, match="auto-round left q_proj unquantized"):
        read_off(nn.Linear(32, 8), "q_proj", fmt, 32)


def test_bad_input_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def source(model: nn.Module, iterations: int = 1) -> AutoRoundSource:
        loaded = LoadedModel(model, None, "tiny")
        return AutoRoundSource(
            loaded, take_inventory(model), dealt(model), 32, random_tokens(1, 8), "integer", iterations, 0
        )

    monkeypatch.setattr(autoround.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AmqError, match="needs the package auto-round: pip install"):
        source(tiny_llama())
    monkeypatch.setattr(autoround.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(AmqError, match=r"layers\.0\.mlp\.gate_proj is 80 x 64: auto-round takes .* multiples of 32"):
        source(tiny_llama(intermediate_size=80))
    with pytest.raises(AmqError, match="does not take experts, of which this model has 24 linears: .* use --method"):
        source(mixture("qwen3_moe"))
    with pytest.raises(AmqError, match="--autoround-iterations 0 is too small"):
        source(tiny_llama(), iterations=0)
