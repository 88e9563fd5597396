"""Mixtures of experts that are a dense Llama: its MLPs cut by intermediate features into experts.

With all experts routed to, in equal parts, a mixture is the same function exactly: every router's scores are equal, so
each of E experts weighs 1 / E, and its down_proj is E times the slice. With fewer, it is a real and damaged model:
features that are active together form an expert, and a router fitted to a text picks those with most to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
TEMPERATURE = 1e-3
"""Of a fitted router's scores: they pick experts, whose weights then are as good as equal."""
ROUNDS = 8


@dataclass(frozen=True)
class Cut:
    """How each of a model's MLPs is cut.

    features: per layer int64 [experts, features each]: which are whose. routers: per layer [experts, hidden].
    top_k: experts that a token is routed to.
    """

    features: tuple[Tensor, ...]
    routers: tuple[Tensor, ...]
    top_k: int

    @property
    def experts(self) -> int:
        return len(self.routers[0])


def equal_parts(dense: nn.Module, experts: int) -> Cut:
    """Every token goes to all experts; a slice of features in their order each."""
    config = dense.config
    features = torch.arange(config.intermediate_size).view(experts, -1)
    router = torch.zeros(experts, config.hidden_size)
    return Cut((features,) * config.num_hidden_layers, (router,) * config.num_hidden_layers, experts)


def fitted(dense: nn.Module, experts: int, top_k: int, windows: Tensor) -> Cut:
    """Experts of features with alike gates, and routers fitted to `windows` int64 [n, length]."""
    features = tuple(_clusters(block.mlp.gate_proj.weight, experts) for block in dense.model.layers)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in features]
    with _watching(dense, features, seen), torch.no_grad():
        for window in windows:
            dense(window.unsqueeze(0), use_cache=False)
    routers = tuple(_router(torch.cat([x for x, _ in parts]), torch.cat([t for _, t in parts])) for parts in seen)
    return Cut(features, routers, top_k)


def _clusters(gate: Tensor, experts: int) -> Tensor:
    """int64 [experts, features / experts]: features whose gates [features, hidden] point the same way, equally many
    in each expert."""
    points = nn.functional.normalize(gate, dim=1)
    size = len(points) // experts
    centres = points[:: len(points) // experts][:experts]
    for _ in range(ROUNDS):
        near = points @ centres.T
        whose = torch.full((len(points),), -1)
        left = [size] * experts
        order = near.flatten().argsort(descending=True).tolist()
        for feature, expert in (divmod(place, experts) for place in order):
            if whose[feature] < 0 and left[expert]:
                whose[feature] = expert
                left[expert] -= 1
        centres = torch.stack([points[whose == expert].mean(0) for expert in range(experts)])
        centres = nn.functional.normalize(centres, dim=1)
    return torch.stack([(whose == expert).nonzero().flatten() for expert in range(experts)])


@contextmanager
def _watching(
    dense: nn.Module, features: tuple[Tensor, ...], seen: list[list[tuple[Tensor, Tensor]]]
) -> Iterator[None]:
    """Inside, `seen` gets per layer what its MLP read [tokens, hidden] and what each expert had to say [tokens,
    experts]: the share of the output's squares that its features would have alone."""

    def watch(index: int) -> Any:
        def hook(mlp: nn.Module, args: Any, output: Tensor) -> None:
            x = args[0][0]
            inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            said = inner.square() * mlp.down_proj.weight.square().sum(0)
            energy = said[:, features[index]].sum(-1)
            seen[index].append((x, energy / energy.sum(-1, keepdim=True)))

        return hook

    handles = [block.mlp.register_forward_hook(watch(i)) for i, block in enumerate(dense.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _router(x: Tensor, target: Tensor) -> Tensor:
    """[experts, hidden]: ridge regression of `target` [tokens, experts] on x [tokens, hidden]."""
    products = (x.T @ x).double()
    ridge = 1e-2 * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)
    return TEMPERATURE * torch.linalg.solve(products + ridge, (x.T @ target).double()).T.float()


def mixtral(dense: nn.Module, cut: Cut) -> nn.Module:
    """The mixture as a Mixtral, whose attention is Llama's."""
    config = transformers.MixtralConfig(
        **_sizes(dense), intermediate_size=cut.features[0].shape[1], num_local_experts=cut.experts,
        num_experts_per_tok=cut.top_k, sliding_window=None,
    )  # fmt: skip
    return _fill(transformers.MixtralForCausalLM(config), _with_experts(dense, cut))


def qwen2_moe(dense: nn.Module, cut: Cut) -> nn.Module:
    """The mixture as a Qwen2-MoE: the last expert of the cut is its shared one, whose gate lets half of it through."""
    shared = [features[-1] for features in cut.features]
    rest = Cut(tuple(f[:-1] for f in cut.features), tuple(r[:-1] for r in cut.routers), cut.top_k - 1)
    size = cut.features[0].shape[1]
    config = transformers.Qwen2MoeConfig(
        **_sizes(dense), intermediate_size=size, moe_intermediate_size=size, shared_expert_intermediate_size=size,
        num_experts=rest.experts, num_experts_per_tok=rest.top_k, norm_topk_prob=True, decoder_sparse_step=1,
        use_sliding_window=False,
    )  # fmt: skip
    tensors = _with_experts(dense, rest)
    for index, (block, features) in enumerate(zip(dense.model.layers, shared, strict=True)):
        name, attention = f"model.layers.{index}.mlp", f"model.layers.{index}.self_attn"
        tensors[f"{name}.shared_expert.gate_proj.weight"] = block.mlp.gate_proj.weight[features]
        tensors[f"{name}.shared_expert.up_proj.weight"] = block.mlp.up_proj.weight[features]
        tensors[f"{name}.shared_expert.down_proj.weight"] = 2 * block.mlp.down_proj.weight[:, features]
        tensors[f"{name}.shared_expert_gate.weight"] = torch.zeros(1, dense.config.hidden_size)
        for part in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{attention}.{part}.bias"] = torch.zeros(getattr(block.self_attn, part).out_features)
    return _fill(transformers.Qwen2MoeForCausalLM(config), tensors)


def qwen3(dense: nn.Module, norms: Mapping[str, Tensor]) -> nn.Module:
    """`dense` with Qwen3's norms of queries and keys, which a Llama has not: another function, and a dense one."""
    config = transformers.Qwen3Config(
        **_sizes(dense), intermediate_size=dense.config.intermediate_size, use_sliding_window=False
    )
    return _fill(transformers.Qwen3ForCausalLM(config), dict(dense.state_dict()) | dict(norms))


def qwen3_moe(dense: nn.Module, cut: Cut) -> nn.Module:
    """The mixture of a `qwen3` as a Qwen3-MoE."""
    size = cut.features[0].shape[1]
    config = transformers.Qwen3MoeConfig(
        **_sizes(dense), intermediate_size=size, moe_intermediate_size=size, num_experts=cut.experts,
        num_experts_per_tok=cut.top_k, norm_topk_prob=True, decoder_sparse_step=1, use_sliding_window=False,
    )  # fmt: skip
    return _fill(transformers.Qwen3MoeForCausalLM(config), _with_experts(dense, cut))


def fitted_norms(dense: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """For `qwen3`: norms that give queries and keys the mean size they have in `windows`."""
    sums: dict[str, list[Tensor]] = {}
    head = dense.model.layers[0].self_attn.head_dim

    def watch(name: str) -> Any:
        return lambda module, args, output: sums.setdefault(name, []).append(
            output.unflatten(-1, (-1, head)).square().mean((0, 1, 2))
        )

    handles = [
        getattr(block.self_attn, f"{part}_proj").register_forward_hook(
            watch(f"model.layers.{i}.self_attn.{part}_norm.weight")
        )
        for i, block in enumerate(dense.model.layers)
        for part in ("q", "k")
    ]
    with torch.no_grad():
        for window in windows:
            dense(window.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(parts).mean(0).mean().sqrt().expand(head) for name, parts in sums.items()}


def _sizes(dense: nn.Module) -> dict[str, Any]:
    return {name: getattr(dense.config, name) for name in SIZES if hasattr(dense.config, name)}


def _with_experts(dense: nn.Module, cut: Cut) -> dict[str, Tensor]:
    """The tensors of `dense` with experts, as transformers holds them, in the place of its MLPs' linears."""
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    for index, (block, features) in enumerate(zip(dense.model.layers, cut.features, strict=True)):
        mlp, name = block.mlp, f"model.layers.{index}.mlp"
        gate, up = mlp.gate_proj.weight[features], mlp.up_proj.weight[features]
        tensors[f"{name}.experts.gate_up_proj"] = torch.cat((gate, up), 1)
        tensors[f"{name}.experts.down_proj"] = cut.top_k * mlp.down_proj.weight[:, features].transpose(0, 1)
        tensors[f"{name}.gate.weight"] = cut.routers[index]
    return tensors


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    model.load_state_dict(dict(tensors))
    model.tie_weights()
    return model.eval().requires_grad_(False)
