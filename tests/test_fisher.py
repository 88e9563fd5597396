"""Fisher scores against one autograd pass through the whole model, and against the losses that they predict."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_bank import FakeBank
from helpers.mixtures import MIXTURES
from helpers.paging import PoisonPager, assert_only_held
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import Tensor, nn

from amq.model.experts import unfuse
from amq.model.inventory import EMBEDDING, EXPERT, HEAD, get_linear, get_weight, take_inventory
from amq.model.open import LoadedModel
from amq.packing import dequantize
from amq.proxy import fisher
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import fisher_passes

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("int2", "int8")
WINDOWS = random_tokens(2, fisher.TOKENS + 22, seed=5)  # two chunks of head gradients per window


def build(name: str, **options: Any) -> nn.Module:
    model = (ARCHITECTURES | MIXTURES)[name].build(**options)
    unfuse(model)
    return model


def passes(model: nn.Module, bank: Any, windows: Tensor = WINDOWS, seed: int = 3, start: int = 0, **more: Any) -> Any:
    return list(fisher_passes(model, take_inventory(model), bank, windows, NAMES, seed, start, **more))


def brute_force(
    model: nn.Module,
    bank: FakeBank,
    window: Tensor,
    generator: torch.Generator,
    unscored: int = 0,
    runs: tuple[int, ...] = fisher.RUNS,
) -> dict[str, dict[str, float]]:
    """One graph through the whole model, every linear's input and output gradient kept, scores in float64.

    unscored: leading positions without a label; the mean is over the others. runs: of positions; an expert's is 1.
    """
    ran: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str, x: Tensor, output: Tensor) -> None:
        output.retain_grad()
        ran.append((name, x.detach(), output))

    model.requires_grad_(True)
    inventory = take_inventory(model)
    names = {s.name: s.name for s in inventory.linears}
    names |= {s.tied or s.name: s.name for s in inventory.outer if s.tied or s.kind == EMBEDDING}
    handles = [
        model.get_submodule(m).register_forward_hook(lambda module, args, output, n=n: keep(n, args[0], output))
        for m, n in names.items()
    ]
    log_probabilities = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, unscored:].log_softmax(-1)
    chunks = log_probabilities.detach().exp().split(fisher.TOKENS)
    labels = torch.cat([torch.multinomial(p, 1, generator=generator) for p in chunks])
    log_probabilities.gather(1, labels).sum().backward()
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    table = {s.name: dict.fromkeys(NAMES, 0.0) for s in inventory.weights}
    (head,) = (s for s in inventory.outer if s.kind == HEAD)
    for fmt in NAMES:
        table[head.name][fmt] = head_by_differences(model, head.name, bank.error(head.name, fmt), window, unscored)
        for n, x, output in ran:
            error = bank.error(n, fmt)
            if x.is_floating_point():
                change = x.flatten(0, -2).double() @ error.T
            else:  # ids; the scale of the embedding is what its output is of its row
                weight = get_weight(model, n).double()
                change = error[x.flatten()] * (output.detach().flatten(0, -2) / weight[x.flatten()]).median()
            g = output.grad.flatten(0, -2).double()
            expert = next(s.kind == EXPERT for s in inventory.weights if s.name == n)
            table[n][fmt] += mean_of_runs((g * change).sum(-1), (1,) if expert else runs) / (len(window) - unscored) / 8
    return table


def mean_of_runs(change: Tensor, runs: tuple[int, ...]) -> float:
    """Geometric mean of the sums of squares over runs of each length."""
    sums = [sum(float(change[i : i + run].sum()) ** 2 for i in range(0, len(change), run)) for run in runs]
    return math.exp(sum(math.log(s) for s in sums) / len(sums)) if min(sums) > 0 else 0.0


def head_by_differences(model: nn.Module, name: str, error: Tensor, window: Tensor, unscored: int) -> float:
    """⅛ of the variance of the logits' error under the model's probabilities, by central differences in float64."""
    wide = copy.deepcopy(model).double()
    weight = get_weight(wide, name).detach().clone()
    logits = []
    for step in (0.0, 1e-4, -1e-4):
        wide.get_submodule(name).weight = nn.Parameter(weight + step * error, requires_grad=False)
        logits.append(wide(input_ids=window.unsqueeze(0), use_cache=False).logits[0, unscored:])
    p, change = logits[0].softmax(-1), (logits[1] - logits[2]) / 2e-4
    return float(((p * change.square()).sum(-1) - (p * change).sum(-1).square()).mean()) / 8


def assert_close(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    assert found.keys() == expected.keys()
    for linear, scores in found.items():
        assert scores == pytest.approx(expected[linear], rel=2e-3), linear  # float32 against float64 sums


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "phi3", "opt", *MIXTURES])
def test_scores_are_the_whole_model_s(name: str) -> None:
    """Of linears, experts, head and embeddings."""
    model = build(name)
    bank = FakeBank(model, NAMES)
    found = passes(model, bank)
    for index, table in enumerate(found):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + index)
        assert_close(table, brute_force(model, bank, WINDOWS[index], generator))
        assert all(score > 0 for s in take_inventory(model).outer for score in table[s.name].values())


def test_an_expert_that_no_token_reaches_costs_nothing() -> None:
    model = build("mixtral", num_local_experts=8, num_experts_per_tok=1)
    bank = FakeBank(model, NAMES)
    (table,) = passes(model, bank, random_tokens(1, 4, seed=1))
    experts = [s for s in take_inventory(model).linears if s.kind == EXPERT]
    quiet = {(s.block, s.expert) for s in experts if not any(table[s.name].values())}
    assert quiet and len(quiet) < 8 * 3
    assert all((s.block, s.expert) in quiet or all(table[s.name].values()) for s in experts)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
@pytest.mark.parametrize("memory", [0, 256 << 20])
def test_grouping_and_paging_change_nothing(
    monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, memory: int
) -> None:
    """To the bit, whatever is held together, and no block is touched that is not held."""
    model = build(name)
    bank, windows = FakeBank(model, NAMES), random_tokens(3, 40, seed=5)
    monkeypatch.setattr(fisher, "TOGETHER", 1)
    alone = passes(model, bank, windows)
    monkeypatch.setattr(fisher, "TOGETHER", 2)
    assert passes(model, bank, windows, memory=memory) == alone
    inventory = take_inventory(model)
    pager = PoisonPager(model)
    found = assert_only_held(
        pager, lambda: list(fisher_passes(model, inventory, bank, windows, NAMES, 3, memory=memory))
    )
    assert found == alone
    blocks = list(range(inventory.n_blocks))
    assert pager.held == blocks + blocks[::-1], "every block is brought in twice for all passes"


def test_errors_are_dequantized_once_for_a_group() -> None:
    model = build("mixtral", num_hidden_layers=2)
    bank = FakeBank(model, NAMES)
    passes(model, bank, random_tokens(3, 60, seed=5))
    linears = {s.name for s in take_inventory(model).linears}
    asked = [a for a in bank.asked if a[0] in linears]
    assert len(asked) == len(set(asked)) == len(linears) * len(NAMES)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_head_s_score_is_its_loss(name: str) -> None:
    """No label is sampled for it, and no token acts on another: what is left is the third order. Untied: a tied head's
    includes what the embedding costs."""
    model = build(name, tie_word_embeddings=False)
    inventory, bank, windows = take_inventory(model), FakeBank(model, NAMES), random_tokens(4, 64, seed=8)
    tables = passes(model, bank, windows)
    evaluator = Evaluator(LoadedModel(model, None, "tiny"), inventory, bank, {"search": windows})
    kept = dict.fromkeys((s.name for s in inventory.linears), "16bit")
    predicted = sum(t["lm_head"]["int8"] for t in tables) / len(tables)
    assert predicted == pytest.approx(evaluator.evaluate({**kept, "lm_head": "int8"}), rel=0.05)


def test_an_expert_s_score_is_its_loss() -> None:
    """In the last block, where no token acts on another any more: only label sampling is between the two."""
    model = build("qwen3_moe", num_hidden_layers=2, num_experts=4)
    inventory, bank, windows = take_inventory(model), FakeBank(model, NAMES), random_tokens(16, 128, seed=8)
    tables = passes(model, bank, windows)
    evaluator = Evaluator(LoadedModel(model, None, "tiny"), inventory, bank, {"search": windows})
    kept = dict.fromkeys((s.name for s in inventory.linears), "16bit")
    for role in ("gate_proj", "up_proj", "down_proj"):
        chosen = f"model.layers.1.mlp.experts.{role}.1"
        predicted = sum(t[chosen]["int8"] for t in tables) / len(tables)
        assert predicted == pytest.approx(evaluator.evaluate({**kept, chosen: "int8"}), rel=0.2), role


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_an_embedding_s_score_is_near_its_loss(name: str) -> None:
    """What its errors at one token do to others is left out."""
    model = build(name, tie_word_embeddings=False)
    inventory, bank, windows = take_inventory(model), FakeBank(model, NAMES), random_tokens(8, 128, seed=8)
    (embedding,) = (s.name for s in inventory.outer if s.kind == EMBEDDING)
    tables = passes(model, bank, windows)
    evaluator = Evaluator(LoadedModel(model, None, "tiny"), inventory, bank, {"search": windows})
    kept = dict.fromkeys((s.name for s in inventory.linears), "16bit")
    predicted = sum(t[embedding]["int8"] for t in tables) / len(tables)
    assert 0.4 < predicted / evaluator.evaluate({**kept, embedding: "int8"}) < 2


@pytest.mark.parametrize("unscored", [1, 3])
def test_leading_positions_without_a_loss(tiny_llama: nn.Module, unscored: int) -> None:
    """They have no label; what later tokens read there still counts."""
    bank = FakeBank(tiny_llama, NAMES)
    found = list(fisher_passes(tiny_llama, take_inventory(tiny_llama), bank, WINDOWS[:1], NAMES, 3, unscored=unscored))
    expected = brute_force(tiny_llama, bank, WINDOWS[0], torch.Generator().manual_seed(3 * 1_000_003), unscored)
    assert_close(found[0], expected)
    assert found[0] != passes(tiny_llama, bank, WINDOWS[:1])[0]


def test_runs_of_positions() -> None:
    """Each position for itself, all in one run, and runs that the window ends in the middle of."""
    change = torch.tensor([1.0, 2.0, -4.0, 8.0, 16.0])
    assert fisher.squares(change, (1,)) == 1 + 4 + 16 + 64 + 256
    assert fisher.squares(change, (64,)) == 23**2
    assert fisher.squares(change, (2,)) == 3**2 + 4**2 + 16**2
    assert fisher.squares(change, (1, 64)) == pytest.approx(math.sqrt(341 * 529))
    assert fisher.squares(torch.tensor([1.0, -1.0]), (1, 2)) == 0
    assert fisher.squares(torch.zeros(0), (1, 16)) == 0


def test_runs_see_what_attention_adds_up(tiny_llama: nn.Module) -> None:
    """Errors of many tokens' values meet in one output. A run as long as the window is what they cost in the end."""
    inventory, bank, windows = take_inventory(tiny_llama), FakeBank(tiny_llama, NAMES), random_tokens(64, 48, seed=8)
    name = "model.layers.1.self_attn.v_proj"
    found = {
        runs: sum(t[name]["int8"] for t in passes(tiny_llama, bank, windows, runs=runs)) / len(windows)
        for runs in ((1,), (48,), fisher.RUNS)
    }
    kept = dict.fromkeys((s.name for s in inventory.linears), "16bit")
    evaluator = Evaluator(LoadedModel(tiny_llama, None, "tiny"), inventory, bank, {"search": windows})
    loss = evaluator.evaluate({**kept, name: "int8"})
    found = {runs: score / loss for runs, score in found.items()}
    assert found[48,] == pytest.approx(1, abs=0.35)  # the mean of 64 squares of normal numbers is off by 18 %
    assert found[1,] < 0.3 and 1.5 * found[1,] < found[fisher.RUNS] < 1, found


def test_passes_depend_on_seed_and_index_only(tiny_llama: nn.Module) -> None:
    bank = FakeBank(tiny_llama, NAMES)
    whole = passes(tiny_llama, bank)
    assert whole == passes(tiny_llama, bank)
    assert whole[1:] == passes(tiny_llama, bank, start=1)
    assert whole[:1] == passes(tiny_llama, bank, WINDOWS[:1])
    assert passes(tiny_llama, bank, start=2) == []
    assert whole[0] != passes(tiny_llama, bank, seed=4)[0]
    same_window = passes(tiny_llama, bank, WINDOWS[:1].expand(2, -1))
    assert same_window[0] == whole[0] and same_window[1] != whole[0], "labels must be drawn anew for each pass"


def test_model_is_left_as_it_was(tiny_llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "TOGETHER", 1)
    bank = FakeBank(tiny_llama, NAMES)
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
def test_small_errors_are_predicted_by_the_sum(name: str) -> None:
    """All linears at int8. Left out are terms between linears and, where attention mixes tokens, between tokens."""
    model = build(name)
    bank = FakeBank(model, NAMES)
    windows = random_tokens(8, 128, seed=7)
    tables = passes(model, bank, windows)
    predicted = sum(t[s.name]["int8"] for t in tables for s in take_inventory(model).linears) / len(tables)
    evaluator = Evaluator(LoadedModel(model, None, name), take_inventory(model), bank, {"search": windows})
    assert 0.4 < predicted / evaluator.evaluate({s.name: "int8" for s in take_inventory(model).linears}) < 2


def test_one_linear_s_score_is_its_loss(tiny_llama: nn.Module) -> None:
    """One linear at int8 behind the last mixing of tokens, all others exact: only label sampling is between the two.
    Position by position, where there is least of it."""
    bank = FakeBank(tiny_llama, NAMES)
    windows = random_tokens(16, 128, seed=8)
    tables = passes(tiny_llama, bank, windows, runs=(1,))
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
