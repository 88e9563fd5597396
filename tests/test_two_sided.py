"""Rows that make up for each other's errors: the quantizer, and the second moments of gradients that it goes by."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
import torch
from helpers.mixtures import mixture
from helpers.tiny_models import random_tokens
from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.model import token_weights as module
from amq.model.inventory import EXPERT, get_linear, take_inventory
from amq.model.token_weights import OutputMoments, token_weights
from amq.packing import PackedWeight, dequantize
from amq.quantize.bank import BankSettings, open_bank
from amq.quantize.quantizers import gptq, two_sided

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, FEATURES, GROUP = 72, 128, 64
WINDOWS = random_tokens(3, 40)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMQ_CACHE", str(tmp_path / "cache"))


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(W, H, G): inputs that depend on each other, and gradients that lie near a space of few dimensions."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x = normal(2000, FEATURES) @ normal(FEATURES, FEATURES) / 10
    g = normal(2000, 9) @ normal(9, ROWS) + 0.3 * normal(2000, ROWS)
    return normal(ROWS, FEATURES), x.T @ x / len(x), g.T @ g / len(g)


def cost(packed: PackedWeight, weight: Tensor, gram: Tensor, moments: Tensor) -> float:
    error = (dequantize(packed) - weight).double()
    return float(((moments.double() @ error) * (error @ gram.double())).sum())


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("zero_points", ["fractional", "symmetric"])
def test_errors_cost_less_where_rows_depend_on_each_other(name: str, zero_points: str) -> None:
    weight, gram, moments = problem()
    formats = [FORMATS[name]]
    (plain,) = gptq.quantize([weight], formats, GROUP, gram, zero_points)
    (ours,) = two_sided.quantize([weight], formats, GROUP, gram, zero_points, outputs=[moments])
    assert cost(ours[name], weight, gram, moments) < 0.5 * cost(plain[name], weight, gram, moments)
    near = (dequantize(ours[name]) - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(near.max()) < 1, "every row is in its own place"


def test_rows_that_do_not_interact_are_rounded_as_by_gptq() -> None:
    """To the bit: G a multiple of the identity, none, or of an output that no gradient reaches."""
    weight, gram, _ = problem(1)
    formats = [FORMATS["int2"], FORMATS["int4"]]
    (plain,) = gptq.quantize([weight], formats, GROUP, gram)
    for moments in (3.0 * torch.eye(ROWS), None, torch.zeros(ROWS, ROWS)):
        (ours,) = two_sided.quantize([weight], formats, GROUP, gram, outputs=[moments])
        for name, packed in plain.items():
            assert all(torch.equal(ours[name].parts[part], tensor) for part, tensor in packed.parts.items())
    assert two_sided.quantize([weight], formats, GROUP, gram)[0].keys() == plain.keys()


@pytest.mark.parametrize("rows", [1, 5])
def test_fewer_rows_than_parts(rows: int) -> None:
    weight, gram, moments = problem()
    (found,) = two_sided.quantize([weight[:rows]], [FORMATS["int3"]], GROUP, gram, outputs=[moments[:rows, :rows]])
    assert found["int3"].out_features == rows


def test_unusable_moments_are_refused() -> None:
    weight, gram, moments = problem()
    with pytest.raises(AmqError, match="two_sided quantizer needs calibration inputs"):
        two_sided.quantize([weight], [FORMATS["int3"]], GROUP, None)
    moments[0, 0] = torch.nan
    with pytest.raises(AmqError, match=r"the gradients are not finite .* wider --dtype"):
        two_sided.quantize([weight], [FORMATS["int3"]], GROUP, gram, outputs=[moments])


def test_moments_are_those_of_whole_passes(tiny_llama: nn.Module, tmp_path: Path) -> None:
    """Of all windows, each with labels of its own; their files go with what holds them."""
    inventory, found = take_inventory(tiny_llama), OutputMoments(take_inventory(tiny_llama).linears)
    plain = token_weights(tiny_llama, inventory, WINDOWS, seed=5)
    weights = token_weights(tiny_llama, inventory, WINDOWS, seed=5, outputs=found)
    outputs: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> None:
        outputs[name] = out if out.requires_grad else out.requires_grad_()

    names = [spec.name for spec in inventory.linears]
    hooks = [get_linear(tiny_llama, n).register_forward_hook(lambda m, a, out, n=n: keep(n, out)) for n in names]
    expected = dict.fromkeys(names, 0.0)
    for i, window in enumerate(WINDOWS):
        log_probabilities = tiny_llama(input_ids=window.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
        generator = torch.Generator().manual_seed(5 * 1_000_003 + i)
        labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_probabilities.gather(1, labels).sum(), list(outputs.values()))
        for name, g in zip(outputs, gradients, strict=True):
            expected[name] = expected[name] + g[0].double().T @ g[0].double()
    for hook in hooks:
        hook.remove()
    for name in names:
        torch.testing.assert_close(found.get(name).double(), expected[name], rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(weights[name], plain[name], rtol=1e-4, atol=1e-6)
    assert list((tmp_path / "cache").glob(".output_moments*"))
    del found
    gc.collect()
    assert not list((tmp_path / "cache").glob(".output_moments*"))


def test_what_has_no_moments(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = mixture("mixtral")
    inventory = take_inventory(model)
    monkeypatch.setattr(module, "MOST_OUTPUTS", 32)
    found = OutputMoments(inventory.linears)
    token_weights(model, inventory, WINDOWS, outputs=found)
    for spec in inventory.linears:
        has = spec.kind != EXPERT and spec.out_features <= 32
        assert (found.get(spec.name) is not None) == has, spec.name
    assert "linears have more than 32 outputs: their rows are rounded each by itself" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(AmqError, match=r"second moments of gradients take .* free some space, or point AMQ_CACHE"):
        OutputMoments(inventory.linears)


def test_a_bank_of_them(tiny_llama: nn.Module, tmp_path: Path) -> None:
    """Another bank than `guided` makes, and better where rows interact: by the second moments of its own windows."""
    inventory, fmt = take_inventory(tiny_llama), FORMATS["int2"]
    made = [BankSettings(proxy, 32, WINDOWS) for proxy in ("two_sided", "guided")]
    banks = [open_bank(tiny_llama, inventory, [fmt], settings, cache=tmp_path) for settings in made]
    assert banks[0].folder != banks[1].folder
    moments = OutputMoments(inventory.linears)
    token_weights(tiny_llama, inventory, WINDOWS, outputs=moments)
    ours = theirs = 0.0
    for spec in inventory.linears:
        weight, own = get_linear(tiny_llama, spec.name).weight.detach(), moments.get(spec.name)
        gram = torch.eye(spec.in_features)
        ours += cost(banks[0].get(spec.name, "int2"), weight, gram, own) / float(own.trace())
        theirs += cost(banks[1].get(spec.name, "int2"), weight, gram, own) / float(own.trace())
    assert ours < 0.9 * theirs
