"""Experts as linears: every class of experts that transformers has computes the same, and its linears have names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import ARCHITECTURES, COMMON, random_tokens, randomized
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.experts import Experts, Layer, expert_of, experts_of, is_fused, top_k_of, unfuse
from amq.model.inventory import EXPERT, LINEAR, SCORES, LinearSpec, find_blocks, get_weight, take_inventory
from amq.model.routers import scoring_linears

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, HIDDEN, INNER, TOKENS = 4, 16, 12, 10
MIXTRAL = ARCHITECTURES["mixtral"]


class Sizes:
    """A config of any family that has the few sizes which experts ask for."""

    _experts_implementation = "eager"
    hidden_act = mlp_hidden_act = hidden_activation = "silu"

    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        if re.fullmatch(r"(moe_)?n(um)?_(\w+_)?experts", name):
            return EXPERTS
        return INNER if "intermediate" in name else HIDDEN


def classes() -> Iterator[type[nn.Module]]:
    """Every class that transformers describes as experts."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"@use_experts_implementation[^\n]*\nclass (\w+)\(", path.read_text(encoding="utf-8")):
            yield getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)


def build(kind: type[nn.Module]) -> nn.Module:
    fused = kind(Sizes()).float()
    for parameter in fused.parameters():
        parameter.data.normal_(0, 0.3)
    return fused.requires_grad_(False)


def routed(top_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [TOKENS, HIDDEN], the experts of each, and their weights, both [TOKENS, top_k]."""
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(EXPERTS)[:top_k] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN), index, torch.rand(TOKENS, top_k)


def storages(module: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def test_every_class_of_experts_computes_what_it_did_with_the_same_memory() -> None:
    layouts, wrong = set(), {}
    for kind in classes():
        fused = build(kind)
        assert is_fused(fused), kind.__name__
        expected, memory = fused(*routed()), storages(fused)
        experts = Experts(fused)
        difference = float((experts(*routed()) - expected).abs().max() / expected.abs().max())
        if not difference <= 1e-6:
            wrong[kind.__name__] = difference
        assert storages(experts) == memory and not list(fused.parameters(recurse=False)), kind.__name__
        down = experts.linears("down_proj")[0]
        layouts.add((experts.roles, experts.interleaved, down.bias is None, down.weight.is_contiguous()))
    assert not wrong
    gated, plain = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")
    assert layouts >= {(gated, False, True, True), (gated, True, False, False)}
    assert all(roles in (gated, plain) for roles, *_ in layouts)


def mixtral() -> Experts:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return Experts(build(MixtralExperts))


def by_hand(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for token, place in index.lt(EXPERTS).nonzero().tolist():
        gate, up, down = (experts.linears(role)[int(index[token, place])] for role in experts.roles)
        out[token] += weights[token, place] * down(nn.functional.silu(gate(x[token])) * up(x[token]))
    return out


def test_places_that_are_not_taken_add_nothing() -> None:
    experts, (x, index, weights) = mixtral(), routed()
    index[::2, 1] = EXPERTS
    torch.testing.assert_close(experts(x, index, weights), by_hand(experts, x, index, weights))
    assert experts(x, torch.full_like(index, EXPERTS), weights).count_nonzero() == 0
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


def test_hooks_see_the_tokens_of_their_expert() -> None:
    experts, (x, index, weights) = mixtral(), routed(top_k=1)
    index[:] = 0
    index[3] = 2
    seen: dict[int, list[Tensor]] = {}
    for number, linear in enumerate(experts.linears("up_proj")):
        linear.register_forward_hook(lambda m, args, out, number=number: seen.setdefault(number, []).append(args[0]))
    experts(x, index, weights)
    assert {number: [len(part) for part in parts] for number, parts in seen.items()} == {0: [9], 2: [1]}


class Together(nn.Linear):
    """Counts how often all experts of a role are multiplied in one call."""

    calls: list[tuple[int, list[int]]] = []

    @staticmethod
    def grouped(linears: list[Together], x: Tensor, sizes: list[int]) -> Tensor:
        Together.calls.append((len(linears), list(sizes)))
        parts = zip(linears, x.split(list(sizes)), strict=True)
        return torch.cat([nn.functional.linear(part, linear.weight) for linear, part in parts])


def test_linears_that_can_be_grouped_are_one_call_per_role() -> None:
    experts, inputs = mixtral(), routed()
    expected = experts(*inputs)
    for role in experts.roles:
        for linear in experts.linears(role):
            linear.__class__ = Together
    torch.testing.assert_close(experts(*inputs), expected)
    assert len(Together.calls) == 3 and all(n == len(sizes) and sum(sizes) == 20 for n, sizes in Together.calls)
    experts.linears("up_proj")[1].__class__ = nn.Linear  # left in 16 bits: its role is multiplied one by one
    torch.testing.assert_close(experts(*inputs), expected)
    assert len(Together.calls) == 5


def test_a_model_names_its_experts_and_computes_what_it_did() -> None:
    model, tokens = MIXTRAL.build(), random_tokens(2, 12)
    expected, parameters = model(tokens).logits, sum(p.numel() for p in model.parameters())
    unfuse(model)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-6, atol=1e-6)
    found = take_inventory(model)
    assert found.numel == parameters == sum(p.numel() for p in model.parameters())
    specs = {s.name: s for s in found.linears}
    name = "model.layers.2.mlp.experts.down_proj.3"
    assert specs[name] == LinearSpec(name, 2, "mlp.experts.down_proj", 64, 96, EXPERT, expert=3, experts=4, top_k=2)
    assert specs[name].read == 0.5 and len([s for s in found.linears if s.kind == EXPERT]) == 3 * 3 * 4
    assert expert_of(model, name) == ("model.layers.2.mlp.experts", 3)
    assert expert_of(model, "model.layers.2.self_attn.q_proj") is None
    assert {o.name for o in found.others if o.reason == SCORES} == {
        f"model.layers.{block}.mlp.gate.weight" for block in range(3)
    }
    unfuse(model)  # there is nothing left to do
    assert take_inventory(model) == found


def test_how_many_experts_a_token_is_routed_to() -> None:
    model = MIXTRAL.build()
    unfuse(model)
    (_, experts), *_ = experts_of(model)
    layer = Layer(EXPERTS, experts)
    assert top_k_of(model.config, layer) == 2  # config.json says so
    experts.top_k = 3
    assert top_k_of(model.config, layer) == 3  # so a token was seen to be
    assert top_k_of(transformers.LlamaConfig(), Layer(EXPERTS)) == EXPERTS


class OneByOne(nn.Module):
    """A mixture as remote code has it: a list of MLPs, a linear that scores them, and one that scores a shared MLP."""

    def __init__(self, mlp: type[nn.Module], config: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(config) for _ in range(EXPERTS))
        self.gate = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.shared, self.shared_gate = mlp(config), nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.gate(x).softmax(-1).topk(2)
        every = torch.stack([expert(x) for expert in self.experts], -2)
        chosen = every.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
        return (chosen * weights.unsqueeze(-1)).sum(-2) + self.shared_gate(x).sigmoid() * self.shared(x)


def test_a_list_of_experts_is_known_by_its_length() -> None:
    model = ARCHITECTURES["llama"].build()
    kind = type(model.model.layers[0].mlp)
    for block in model.model.layers[1:]:
        block.mlp = OneByOne(kind, model.config)
    names = {s.name: s for s in take_inventory(model).linears}
    assert names["model.layers.1.mlp.experts.3.up_proj"].kind == LINEAR  # until config.json tells their number
    model.config.num_experts, model.config.num_experts_per_tok = EXPERTS, 2
    found = take_inventory(randomized(model, 0))
    specs = {s.name: s for s in found.linears}
    assert find_blocks(model)[0] == "model.layers"
    name = "model.layers.1.mlp.experts.3.up_proj"
    assert specs[name] == LinearSpec(name, 1, "mlp.experts.up_proj", 96, 64, EXPERT, expert=3, experts=4, top_k=2)
    assert specs["model.layers.1.mlp.shared.up_proj"].kind == LINEAR
    assert {o.name for o in found.others if o.reason == SCORES} == {
        f"model.layers.{block}.mlp.{gate}.weight" for block in (1, 2) for gate in ("gate", "shared_gate")
    }


def llama4() -> nn.Module:
    options = {**COMMON, "num_local_experts": EXPERTS, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1,
               "head_dim": 16}  # fmt: skip
    return randomized(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**options)).float(), 0)


def test_experts_in_an_unknown_layout_stay_and_say_so() -> None:
    model = llama4()
    unfuse(model)
    found = take_inventory(model)
    rest = {o.name: o.reason for o in found.others if o.kind == "not quantized"}
    assert rest["model.layers.0.feed_forward.experts.down_proj"] == (
        "3-D parameter of Llama4TextExperts, experts in a layout that is not known"
    )
    assert rest["model.layers.0.feed_forward.router.weight"] == SCORES
    assert "feed_forward.shared_expert.up_proj" in {s.role for s in found.linears}


def test_a_shared_expert_as_wide_as_there_are_experts_does_not_score() -> None:
    """As Qwen3-Next has it: 512 experts, and one that every token passes, of 512 features."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.Qwen2MoeConfig(**COMMON | sizes, shared_expert_intermediate_size=4)
    found = take_inventory(transformers.Qwen2MoeForCausalLM(config))
    shared = {s.role for s in found.linears if "shared_expert" in s.role}
    assert shared == {f"mlp.shared_expert.{role}" for role in ("gate_proj", "up_proj", "down_proj")}
    assert {o.name.removeprefix("model.layers.0.") for o in found.others if o.reason == SCORES} == {
        "mlp.gate.weight", "mlp.shared_expert_gate.weight",
    }  # fmt: skip


def zaya() -> nn.Module:
    if not hasattr(transformers, "ZayaConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no ZayaConfig")
    options = {"num_experts": EXPERTS, "moe_intermediate_size": 32, "router_hidden_size": 24, "head_dim": 16}
    model = transformers.ZayaForCausalLM(transformers.ZayaConfig(**{**COMMON, **options})).float()
    unfuse(randomized(model, 0))
    return model


def test_whatever_feeds_the_scores_alone_scores() -> None:
    """Zaya's router is four linears, and only the last has a row per expert."""
    model = zaya()
    found = take_inventory(model)
    scoring = scoring_linears(model, found, random_tokens(1, 8))
    parts = ("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj")
    by_hand = {f"model.layers.{block}.mlp.gate.{part}" for block in range(3) for part in parts}
    assert set(scoring) == by_hand & {s.name for s in found.linears} and len(scoring) >= 9
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_feeds_the_experts_as_well_does_not_score() -> None:
    model = MIXTRAL.build()
    unfuse(model)
    assert scoring_linears(model, take_inventory(model), random_tokens(1, 8)) == []


def test_a_model_that_autograd_refuses_is_left_to_shapes(caplog: pytest.LogCaptureFixture) -> None:
    model = MIXTRAL.build()
    unfuse(model)
    norm = model.model.layers[0].input_layernorm
    norm.forward = lambda x: torch.relu_(x.detach().requires_grad_())  # a leaf, in place
    assert scoring_linears(model, take_inventory(model), random_tokens(1, 8)) == []
    assert "told by its shape alone: MixtralForCausalLM does not run with autograd" in caplog.text


def test_weights_of_experts_by_name() -> None:
    model = MIXTRAL.build()
    unfuse(model)
    assert get_weight(model, "model.layers.0.mlp.experts.up_proj.1").shape == (96, 64)
    with pytest.raises(AmqError, match="'model.layers.0.mlp.experts' is a Experts, expected an nn.Linear or"):
        get_weight(model, "model.layers.0.mlp.experts")
