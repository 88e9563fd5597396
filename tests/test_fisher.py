"""Fisher scores against one autograd pass through the whole model, and against the losses that they predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import Tensor, nn

from amq.formats import FORMATS
from amq.model.inventory import get_linear, take_inventory
from amq.model.open import LoadedModel
from amq.packing import dequantize
from amq.proxy import fisher
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import fisher_passes
from amq.quantize.bank import BankSettings, WeightBank, open_bank

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("int2", "int8")
WINDOWS = random_tokens(2, fisher.TOKENS + 22, seed=5)  # two chunks of head gradients per window


def rtn_bank(model: nn.Module, cache: Path) -> WeightBank:
    return open_bank(model, take_inventory(model), [FORMATS[n] for n in NAMES], BankSettings("rtn", 32), cache=cache)


def passes(model: nn.Module, bank: WeightBank, windows: Tensor = WINDOWS, seed: int = 3, start: int = 0) -> list[Any]:
    return list(fisher_passes(model, take_inventory(model), bank, windows, NAMES, seed, start))


def brute_force(
    model: nn.Module, bank: WeightBank, window: Tensor, generator: torch.Generator, unscored: int = 0
) -> dict[str, dict[str, float]]:
    """One graph through the whole model, every linear's input and output gradient kept, scores in float64.

    unscored: leading positions without a label; the mean is over the others.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, output: Tensor) -> None:
        inputs[name], outputs[name] = x.detach(), output
        output.retain_grad()

    model.requires_grad_(True)
    names = [s.name for s in take_inventory(model).linears]
    handles = [
        get_linear(model, n).register_forward_hook(lambda module, args, output, n=n: keep(n, args[0], output))
        for n in names
    ]
    log_probabilities = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, unscored:].log_softmax(-1)
    chunks = log_probabilities.detach().exp().split(fisher.TOKENS)
    labels = torch.cat([torch.multinomial(p, 1, generator=generator) for p in chunks])
    log_probabilities.gather(1, labels).sum().backward()
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    table: dict[str, dict[str, float]] = {}
    for n in names:
        x, g = inputs[n].flatten(0, -2).double(), outputs[n].grad.flatten(0, -2).double()
        table[n] = {}
        for fmt in NAMES:
            change = x @ (get_linear(model, n).weight.double() - dequantize(bank.get(n, fmt)).double()).T
            table[n][fmt] = float((g * change).sum(-1).square().sum()) / (len(window) - unscored) / 8
    return table


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "opt", "mixtral"])
def test_scores_are_the_whole_model_s(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].build()
    bank = rtn_bank(model, tmp_path)
    found = passes(model, bank)
    for index, table in enumerate(found):
        expected = brute_force(model, bank, WINDOWS[index], torch.Generator().manual_seed(3 * 1_000_003 + index))
        assert table.keys() == expected.keys()
        for linear, scores in table.items():
            assert scores == pytest.approx(expected[linear], rel=2e-3), linear  # float32 against float64 sums


@pytest.mark.parametrize("unscored", [1, 3])
def test_leading_positions_without_a_loss(tiny_llama: nn.Module, tmp_path: Path, unscored: int) -> None:
    """They have no label; what later tokens read there still counts."""
    bank = rtn_bank(tiny_llama, tmp_path)
    found = list(fisher_passes(tiny_llama, take_inventory(tiny_llama), bank, WINDOWS[:1], NAMES, 3, unscored=unscored))
    expected = brute_force(tiny_llama, bank, WINDOWS[0], torch.Generator().manual_seed(3 * 1_000_003), unscored)
    for linear, scores in found[0].items():
        assert scores == pytest.approx(expected[linear], rel=2e-3), linear
    assert found[0] != passes(tiny_llama, bank, WINDOWS[:1])[0]


def test_passes_depend_on_seed_and_index_only(tiny_llama: nn.Module, tmp_path: Path) -> None:
    bank = rtn_bank(tiny_llama, tmp_path)
    whole = passes(tiny_llama, bank)
    assert whole == passes(tiny_llama, bank)
    assert whole[1:] == passes(tiny_llama, bank, start=1)
    assert whole[:1] == passes(tiny_llama, bank, WINDOWS[:1])
    assert passes(tiny_llama, bank, start=2) == []
    assert whole[0] != passes(tiny_llama, bank, seed=4)[0]
    same_window = passes(tiny_llama, bank, WINDOWS[:1].expand(2, -1))
    assert same_window[0] == whole[0] and same_window[1] != whole[0], "labels must be drawn anew for each pass"


def test_model_is_left_as_it_was(tiny_llama: nn.Module, tmp_path: Path) -> None:
    bank = rtn_bank(tiny_llama, tmp_path)
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    blocks = list(tiny_llama.model.layers)
    iterator = fisher_passes(tiny_llama, take_inventory(tiny_llama), bank, WINDOWS, NAMES, 0)
    next(iterator)
    with pytest.raises(RuntimeError, match="stop here"):
        handle = tiny_llama.model.layers[0].mlp.register_forward_hook(stop_under_grad)
        next(iterator)
    handle.remove()
    assert all(torch.equal(p, before[n]) for n, p in tiny_llama.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in tiny_llama.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in tiny_llama.modules())
    assert all(a is b for a, b in zip(tiny_llama.model.layers, blocks, strict=True))


def stop_under_grad(*args: Any) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("stop here")


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_small_errors_are_predicted_by_the_sum(name: str, tmp_path: Path) -> None:
    """All linears at int8. Left out are terms between linears and, where attention mixes tokens, between tokens."""
    model = ARCHITECTURES[name].build()
    bank = rtn_bank(model, tmp_path)
    windows = random_tokens(8, 128, seed=7)
    tables = passes(model, bank, windows)
    predicted = sum(t[linear]["int8"] for t in tables for linear in t) / len(tables)
    evaluator = Evaluator(LoadedModel(model, None, name), take_inventory(model), bank, {"search": windows})
    assert 0.4 < predicted / evaluator.evaluate({s.name: "int8" for s in take_inventory(model).linears}) < 2


def test_one_linear_s_score_is_its_loss(tiny_llama: nn.Module, tmp_path: Path) -> None:
    """One linear at int8 behind the last mixing of tokens, all others exact: only label sampling is between the two."""
    bank = rtn_bank(tiny_llama, tmp_path)
    windows = random_tokens(16, 128, seed=8)
    tables = passes(tiny_llama, bank, windows)
    linears = take_inventory(tiny_llama).linears
    evaluator = Evaluator(LoadedModel(tiny_llama, None, "tiny"), take_inventory(tiny_llama), bank, {"search": windows})
    evaluator.apply({s.name: "int8" for s in linears})
    for role in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        chosen = f"model.layers.1.{role}"
        for name, full in evaluator._swap._full.items():
            buffer = get_linear(tiny_llama, name).weight
            buffer.copy_(dequantize(bank.get(name, "int8")) if name == chosen else full)
        predicted = sum(t[chosen]["int8"] for t in tables) / len(tables)
        # The mean of 2048 squared, nearly normal numbers is off by about sqrt(2 / 2048) = 3 %.
        assert predicted == pytest.approx(evaluator.evaluate({s.name: "int8" for s in linears}), rel=0.12), role
