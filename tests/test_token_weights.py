"""What calibration tokens count for, against gradients of whole forwards, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.mixtures import mixture
from helpers.tiny_models import random_tokens
from torch import Tensor, nn

from amq.formats import FORMATS
from amq.model import token_weights as module
from amq.model.calibration import CalibrationStream
from amq.model.inventory import EXPERT, get_linear, take_inventory
from amq.model.token_weights import token_weights
from amq.packing import dequantize
from amq.quantize.bank import BankSettings, WeightBank, open_bank

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = random_tokens(3, 40)
SHARED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def whole(model: nn.Module, window: Tensor, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({linear: its inputs}, {linear: ‖g[t]‖²}) of one window in one forward and one backward pass, [length, …]."""
    inputs, outputs = dict[str, Tensor](), dict[str, Tensor]()

    def keep(name: str, x: Tensor, out: Tensor) -> None:
        inputs[name], outputs[name] = x[0].detach(), out if out.requires_grad else out.requires_grad_()

    names = [spec.name for spec in take_inventory(model).linears]
    hooks = [get_linear(model, n).register_forward_hook(lambda m, args, out, n=n: keep(n, args[0], out)) for n in names]
    with torch.enable_grad():
        log_probabilities = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(log_probabilities.gather(1, labels).sum(), list(outputs.values()))
    for hook in hooks:
        hook.remove()
    return inputs, {n: g[0].square().sum(-1) for n, g in zip(outputs, gradients, strict=True)}


@pytest.mark.parametrize("together", [1, 2, 4])
def test_the_gradients_of_whole_passes(tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Of each window with its own labels, whatever runs beside it, summed over linears that read one tensor."""
    monkeypatch.setattr(module, "TOGETHER", together)
    inventory = take_inventory(tiny_llama)
    found = token_weights(tiny_llama, inventory, WINDOWS, seed=5, memory=0)
    assert set(found) == {spec.name for spec in inventory.linears}
    energies = [whole(tiny_llama, window, 5 * 1_000_003 + i)[1] for i, window in enumerate(WINDOWS)]
    for name, weights in found.items():
        block, _, role = name.partition(".mlp.") if ".mlp." in name else name.partition(".self_attn.")
        readers = next((roles for roles in SHARED if any(r.endswith(f".{role}") for r in roles)), None)
        names = [f"{block}.{r}" for r in readers] if readers else [name]
        expected = torch.stack([sum(e[n] for n in names) for e in energies])
        torch.testing.assert_close(weights, expected / expected.mean(), rtol=1e-3, atol=1e-5)


def test_second_moments_take_them(tiny_llama: nn.Module) -> None:
    """Of the linears that are named; the others' tokens count alike, as everybody's do without any."""
    specs = take_inventory(tiny_llama).in_block(0)
    down = next(spec for spec in specs if spec.role == "mlp.down_proj")
    weights = torch.rand(WINDOWS.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = CalibrationStream(tiny_llama, WINDOWS, weights={down.name: weights}).measure(specs)
        plain = CalibrationStream(tiny_llama, WINDOWS).measure(specs)
    x = torch.stack([whole(tiny_llama, window, 0)[0][down.name] for window in WINDOWS]).flatten(0, 1).double()
    for ours, theirs in zip(found, plain, strict=True):
        if ours.linears != (down,):
            assert torch.equal(ours.gram, theirs.gram)
            continue
        w = weights.flatten().double()
        torch.testing.assert_close(ours.gram.double(), (x * w.unsqueeze(1)).T @ x / w.sum(), rtol=1e-4, atol=1e-7)
        assert not torch.allclose(ours.gram, theirs.gram, rtol=1e-2)


def test_experts_are_left_out() -> None:
    """Which tokens they read is not known where their moments are summed."""
    model = mixture("mixtral")
    inventory = take_inventory(model)
    found = token_weights(model, inventory, WINDOWS)
    assert set(found) == {spec.name for spec in inventory.linears if spec.kind != EXPERT}


def test_a_bank_of_them(tiny_llama: nn.Module, tmp_path: Path) -> None:
    """It is another bank than that of gptq, and better where they count: over all linears, on the same tokens."""
    inventory, fmt = take_inventory(tiny_llama), FORMATS["int2"]
    banks = [
        open_bank(tiny_llama, inventory, [fmt], BankSettings(proxy, 32, WINDOWS), cache=tmp_path)
        for proxy in ("guided", "gptq")
    ]
    weights = token_weights(tiny_llama, inventory, WINDOWS)

    def error(bank: WeightBank) -> float:
        total = 0.0
        for i, window in enumerate(WINDOWS):
            for name, x in whole(tiny_llama, window, 0)[0].items():
                plain = get_linear(tiny_llama, name).weight
                change = x @ (dequantize(bank.get(name, fmt.name)) - plain).T
                total += float((weights[name][i] * change.square().sum(-1)).sum() / (x @ plain.T).square().sum())
        return total

    guided, gptq = map(error, banks)
    assert banks[0].folder != banks[1].folder
    assert guided < 0.97 * gptq
