"""Finds what makes the input of a group of linears, so that a factor per channel can move from one into the other.

W·x = (W·s)·(x/s), and x/s is made by scaling the rows of what produces x: the weight of a norm, or the linear before
(up → down, v → o, fc1 → relu → fc2). Which module that is, and which of its channels feeds which input feature (under
grouped-query attention one channel of v feeds several of o), differs between architectures and is not written down
anywhere. So it is tried out: a candidate's channels are multiplied by random powers of two, the linears' input
features are divided by them, and where the block's output stays as it was, the candidate is the producer. Powers of two
change no rounding, so the output stays equal to the last bit or moves a lot. A norm that multiplies by 1 + weight
(Gemma) is tried as such. What feeds the experts' gate and up often feeds a router too, which the trial finds: then
nothing is folded. An expert's down is tried by itself, on random inputs, because few tokens reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amq.model.experts import DOWN, UP, Experts, expert_of
from amq.model.inventory import EXPERT, LinearSpec, get_linear

TOLERANCE = 1e-3
"""Largest change of an output, relative to its largest value: rounding of 1 + weight, nothing else."""
TRIED, WIDE = 32, 8.0
"""Random inputs of an expert, and their size: large, so that an activation that clips shows itself."""


@dataclass(frozen=True)
class Fold:
    """Input feature k of the linears in a group is channel `index[k]` of the module `producer`.

    offset: 1 where the module multiplies by 1 + weight, else 0.
    """

    producer: str
    index: Tensor
    offset: float = 0.0


def find_fold(
    model: nn.Module,
    block: str,
    group: Sequence[LinearSpec],
    head_dim: int | None,
    run: Callable[[], Tensor],
) -> Fold | None:
    """The producer of `group`'s input inside the module `block`, or None where no candidate passes.

    head_dim: features per attention head, for v → o with fewer key-value heads.
    run: the block's output on some tokens, with the weights that the model has at that moment.
    """
    run = _expert_alone(model, group) or run
    before = _outputs(model, group, run)
    if len(before) == 1:  # experts that no token of the sample reached: any candidate would pass
        return None
    generator = torch.Generator().manual_seed(0)
    for fold in _candidates(model, block, group, head_dim):
        channels = int(fold.index.max()) + 1
        factors = 2.0 ** torch.randint(-1, 2, (channels,), generator=generator)
        if float(factors.max()) == float(factors.min()):
            factors[0] *= 2
        undo = [(t, t.data.clone()) for t in _touched(model, fold, group)]
        try:
            apply_fold(model, fold, group, factors)
            after = _outputs(model, group, run)
        finally:
            for parameter, saved in undo:
                parameter.data.copy_(saved)
        if len(after) == len(before) and all(map(_alike, after, before)):
            return fold
    return None


def _down_of(model: nn.Module, group: Sequence[LinearSpec]) -> tuple[str, int] | None:
    """(name of the `Experts`, number of the expert) where `group` is the down_proj of one; else None."""
    if group[0].kind != EXPERT or group[0].role.rpartition(".")[2] != DOWN:
        return None
    return expert_of(model, group[0].name)


def _expert_alone(model: nn.Module, group: Sequence[LinearSpec]) -> Callable[[], Tensor] | None:
    """What an expert makes of random inputs, where `group` is its down_proj; else None."""
    if (owner := _down_of(model, group)) is None:
        return None
    layer = model.get_submodule(owner[0])
    assert isinstance(layer, Experts)
    weight = get_linear(model, f"{owner[0]}.{UP}.{owner[1]}").weight
    x = WIDE * torch.randn(TRIED, weight.shape[1], generator=torch.Generator().manual_seed(1))
    x = x.to(weight.device, weight.dtype)
    return lambda: layer.run(x, [len(x) * (i == owner[1]) for i in range(layer.experts)])


def _outputs(model: nn.Module, group: Sequence[LinearSpec], run: Callable[[], Tensor]) -> list[Tensor]:
    """The block's output, and those of the linears themselves, which may be lost in it."""
    found: list[Tensor] = []
    handles = [
        get_linear(model, s.name).register_forward_hook(lambda module, args, output: found.append(output.clone()))
        for s in group
    ]
    try:
        return [run(), *found]
    finally:
        for handle in handles:
            handle.remove()


def _alike(after: Tensor, before: Tensor) -> bool:
    return after.shape == before.shape and float((after - before).abs().max()) <= TOLERANCE * float(before.abs().max())


def apply_fold(
    model: nn.Module, fold: Fold, group: Sequence[LinearSpec], factors: Tensor, stored: torch.dtype = torch.float32
) -> Tensor:
    """Multiplies the producer's channels by `factors` [channels] and divides the group's input features by them.

    stored: what a norm's weight will be rounded to in the checkpoint; the factors become those that rounding leaves.
    Returns the factors.
    """
    own = model.get_parameter(f"{fold.producer}.weight")
    before = own.data.float() + fold.offset
    factors = factors.to(before.device, torch.float32)
    scaled = before * (factors.unsqueeze(-1) if before.ndim == 2 else factors) - fold.offset
    if before.ndim == 1:
        scaled = scaled.to(stored).float()
        factors = torch.where(before == 0, factors, (scaled + fold.offset) / before)
    own.data.copy_(scaled)
    bias = getattr(model.get_submodule(fold.producer), "bias", None)
    if bias is not None:
        bias.data.copy_(bias.data.float() * factors)
    for spec in group:
        weight = get_linear(model, spec.name).weight
        weight.data.copy_(weight.data.float() / factors[fold.index.to(weight.device)])
    return factors


def _touched(model: nn.Module, fold: Fold, group: Sequence[LinearSpec]) -> list[Tensor]:
    producer = model.get_submodule(fold.producer)
    own = [part for name, part in producer.named_parameters(recurse=False) if name in ("weight", "bias")]
    return [*own, *(get_linear(model, s.name).weight for s in group)]


def _candidates(model: nn.Module, block: str, group: Sequence[LinearSpec], head_dim: int | None) -> Iterator[Fold]:
    """Modules of the block whose channels could be the input features: vectors of weights first, then linears."""
    features = group[0].in_features
    members = {spec.name for spec in group}
    straight = torch.arange(features)
    owner = _down_of(model, group)
    named = ((f"{block}.{n}", m) for n, m in model.get_submodule(block).named_modules() if n)
    modules = [(n, m) for n, m in named if expert_of(model, n) == owner]  # an expert makes its own down's input alone
    for name, module in modules:
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and tuple(weight.shape) == (features,):
            yield Fold(name, straight)
            yield Fold(name, straight, 1.0)
    for name, module in modules:
        if not isinstance(module, nn.Linear) or name in members or features % module.out_features:
            continue
        if module.out_features == features:
            yield Fold(name, straight)
        elif head_dim and module.out_features % head_dim == 0:
            heads = torch.arange(module.out_features).view(-1, head_dim)
            yield Fold(name, heads.repeat_interleave(features // module.out_features, dim=0).flatten())
