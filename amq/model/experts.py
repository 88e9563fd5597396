"""Experts as linears: a mixture's fused 3-D parameters give way to one `nn.Linear` per expert and role.

transformers holds the experts of a layer in one parameter per role, gate and up in one of both, [experts, out, in] or
transposed, and describes the layout in attributes of the module that its decorator `use_experts_implementation` sets.
`unfuse` puts an `Experts` in the place of every such module. Its linears are views of the parameters, so nothing is
copied, and the model computes what it did. From then on an expert's linear is found, calibrated, scored, swapped and
stored like every other: `mlp.experts.gate_proj.3` is gate_proj of expert 3, and only tokens that are routed to it pass
through it. (The index comes last, so that these names are none that transformers fuses on loading.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from amq.model.shape import size, text_config

if TYPE_CHECKING:
    from collections.abc import Callable

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
FUSED = "gate_up_proj"
_EXPERT = re.compile(rf"(.+\.(?:{'|'.join((GATE, UP, DOWN))}))\.(0|[1-9][0-9]*)")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
"""Keys of config.json."""


class Experts(nn.Module):
    """The experts of one layer, `experts` of them; a child of linears per role, in the order of use.

    top_k: experts that a token is routed to, None before a token came.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.num_experts = self.experts = int(cast(int, fused.num_experts))
        self.top_k: int | None = None
        self.interleaved = not getattr(fused, "is_concatenated", True)
        self._with_norm = bool(getattr(fused, "has_post_expert_norm", False))
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.roles: tuple[str, ...] = ()
        for role, weight, bias in _weights(fused):
            self.roles = (*self.roles, role)
            biases = [None] * self.experts if bias is None else bias.unbind(0)
            self.add_module(role, nn.ModuleList(map(_linear, weight.unbind(0), biases)))
        for name in list(fused._parameters):
            del fused._parameters[name]
        object.__setattr__(self, "_fused", fused)  # not a submodule: it keeps the activation and its constants

    def linears(self, role: str) -> nn.ModuleList:
        return cast(nn.ModuleList, getattr(self, role))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]. top_k_index: int64 [tokens, top_k], `experts` for a place that is not taken.
        top_k_weights: [tokens, top_k]. Returns [tokens, hidden]."""
        self.top_k = top_k_index.shape[-1]
        expert, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(expert, minlength=self.experts + 1)[: self.experts].tolist()
        order = order[: sum(counts)]
        token = order // self.top_k
        out = torch.zeros_like(hidden_states)
        if len(order):
            result = self.run(hidden_states[token], counts) * top_k_weights.flatten()[order].unsqueeze(-1)
            out = out.index_add(0, token, result.to(hidden_states.dtype))
        return out

    def run(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """x: [rows ≥ 1, hidden]: `counts[e]` rows for expert e, in the order of experts. Returns [rows, hidden]."""
        hit = [index for index, count in enumerate(counts) if count]
        sizes = [counts[index] for index in hit]

        def product(role: str, rows: Tensor) -> Tensor:
            return _products([self.linears(role)[index] for index in hit], rows, sizes)

        up = product(UP, x)
        if GATE in self.roles:
            gate = product(GATE, x)
            both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
            inner = self._of_fused("_apply_gate")(both)
        else:
            inner = self._of_fused("act_fn")(up)
        result = product(DOWN, inner)
        return self._of_fused("post_expert_norm")(result) if self._with_norm else result

    def _of_fused(self, name: str) -> Callable[[Tensor], Tensor]:
        return cast("Callable[[Tensor], Tensor]", getattr(self._fused, name))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, roles={', '.join(self.roles)}"


def _products(linears: Sequence[nn.Module], x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[rows, out]: linear i times its `sizes[i]` rows of x. Linears whose class knows `grouped` go in one call."""
    grouped: Callable[..., Tensor] | None = getattr(type(linears[0]), "grouped", None)
    if grouped is not None and all(type(linear) is type(linears[0]) for linear in linears):
        return grouped(linears, x, sizes)
    return torch.cat([linear(part) for linear, part in zip(linears, x.split(list(sizes)), strict=True)])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Around `weight` [out, in] and `bias` themselves, not copies."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _weights(fused: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(role, weight [experts, out, in], bias [experts, out]) of the module's parameters, as views, in order of use."""
    for name in (FUSED, UP, DOWN):
        if name not in fused._parameters:
            continue
        weights = views_of(fused, name, cast(Tensor, getattr(fused, name)).detach())
        bias = getattr(fused, f"{name}_bias", None)
        biases = {} if bias is None else dict(views_of(fused, f"{name}_bias", bias.detach()))
        for role, weight in weights:
            yield role, weight, biases.get(role)


def views_of(fused: nn.Module, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """(role, part) of `tensor`, which lies as the parameter `name` of `fused` does: weights, [experts, out, in] or
    transposed, become views [experts, out, in], biases [experts, out]."""
    role = name.removesuffix("_bias")
    if tensor.ndim == 3 and fused.is_transposed:
        tensor = tensor.mT
    if role != FUSED:
        return [(role, tensor)]
    half = tensor.shape[1] // 2
    if fused.is_concatenated:
        return [(GATE, tensor[:, :half]), (UP, tensor[:, half:])]
    return [(GATE, tensor[:, 0::2]), (UP, tensor[:, 1::2])]


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds experts in the layouts that `Experts` knows, and nothing else of its own."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    up = FUSED if FUSED in own else UP
    expected = {up, DOWN, f"{up}_bias", f"{DOWN}_bias"}
    described = all(hasattr(module, name) for name in ("num_experts", "is_transposed", "is_concatenated"))
    gated = up == UP or hasattr(module, "_apply_gate")
    sizes = {p.shape[0] for p in own.values()}
    return (
        described and gated and {up, DOWN} <= own.keys() <= expected and all(own[n].ndim == 3 for n in (up, DOWN))
        and sizes == {module.num_experts} and own.keys() in ({up, DOWN}, expected)
    )  # fmt: skip


def unfuse(model: nn.Module) -> None:
    """Puts an `Experts` in the place of every module of `model` that `is_fused`, on any device, meta included."""
    for name, module in list(model.named_modules()):
        if is_fused(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Experts(module))


def experts_of(module: nn.Module) -> Iterator[tuple[str, Experts]]:
    """(name, experts) of every layer of experts inside `module`."""
    return ((name, found) for name, found in module.named_modules() if isinstance(found, Experts))


@dataclass(frozen=True)
class Layer:
    """A layer of experts as an inventory sees it, by any of the three ways of holding them.

    experts: how many. fused: the `Experts`, None of a list with a module per expert and of a layout that is not known.
    """

    experts: int
    fused: Experts | None = None


def layers_of_experts(block: nn.Module, config: Any) -> dict[str, Layer]:
    """{path in `block`: layer of experts}. What is no `Experts` is told by its length, which config.json names: a list
    of modules, as remote code has it, or parameters in more than two dimensions."""
    count = size(text_config(config), *COUNTS)
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            found[path] = Layer(module.experts, module)
        elif count and count > 1 and _has_experts(module, count):
            found[path] = Layer(count)
    return found


def _has_experts(module: nn.Module, count: int) -> bool:
    if isinstance(module, nn.ModuleList):
        kinds = {type(child) for child in module}
        return len(module) == count and len(kinds) == 1 and bool(list(module[0].children()))
    own = () if hasattr(module, "kernel_size") else module._parameters.values()  # a convolution's is 3-D, too
    return any(p is not None and p.ndim > 2 and p.shape[0] == count for p in own)


@dataclass(frozen=True)
class Routing:
    """Where in a block something that scores experts can stand, by shape.

    places: (path of the module that a layer of experts stands in, how many experts).
    read: (path of a module, in_features of a linear directly in it): a shared expert may be as wide as there are
        experts (Qwen3-Next: 512), but what its gate gives is read beside it, and scores are not.
    """

    places: tuple[tuple[str, int], ...]
    read: frozenset[tuple[str, int]]

    @staticmethod
    def of(layers: Mapping[str, Layer], block: nn.Module) -> Routing:
        places = tuple((path.rpartition(".")[0], layer.experts) for path, layer in layers.items())
        linears = ((path, module) for path, module in block.named_modules() if isinstance(module, nn.Linear))
        return Routing(places, frozenset((path.rpartition(".")[0], linear.in_features) for path, linear in linears))

    def scores(self, path: str, rows: int, columns: int) -> bool:
        """Whether the weight [rows, columns] of the module at `path` scores experts, or the shared ones (one row)."""
        if rows != columns and (path.rpartition(".")[0], rows) in self.read:
            return False
        return any(rows in (1, experts) and path.startswith(place and f"{place}.") for place, experts in self.places)


def top_k_of(config: Any, layer: Layer) -> int:
    """Experts that a token is routed to: as seen, or as config.json says before a token came; all where it does not."""
    if layer.fused is not None and layer.fused.top_k is not None:
        return layer.fused.top_k
    found = size(text_config(config), *TOP_K)
    return min(found or layer.experts, layer.experts)


def split_expert(linear: str) -> tuple[str, int] | None:
    """(name of the experts of one role, number of the expert) of the linear of that name; None where it is no
    expert's."""
    found = _EXPERT.fullmatch(linear)
    return None if found is None else (found[1], int(found[2]))


def expert_of(model: Any, linear: str) -> tuple[str, int] | None:
    """(name of the `Experts`, index) of the linear of that name; None where it is no expert's."""
    if (found := split_expert(linear)) is None:
        return None
    owner = found[0].rpartition(".")[0]
    return (owner, found[1]) if isinstance(model.get_submodule(owner), Experts) else None
