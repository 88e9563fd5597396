"""Which linears of a model can be quantized at all, found by running the model a little.

A checkpoint puts a module without a plain `weight` in the place of each quantized linear. That serves a model that
calls its linears, and no other: Mamba multiplies by `dt_proj.weight` itself, RWKV divides weights while it runs, Zamba
lets several blocks share a weight. Which models do so is written down nowhere, so it is tried out: stand-ins that
multiply like the linears, and note whoever asks them for their weight, take their places while the model reads a few
tokens and writes one more. An expert that sees none of these tokens is not asked for anything, and stays quantizable.

What scores experts is left alone as well: by its shape, which the inventory goes by, or by what it feeds
(`amq.model.routers`).

What cannot be quantized moves from the inventory's linears to its other weights, with the reason: every stage leaves it
in 16 bits, and no configuration names it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.inventory import SCORES, Inventory, OtherWeight, embedding_weight, get_linear, take_inventory
from amq.model.paging import holding
from amq.model.routers import scoring_linears

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

log = logging.getLogger(__name__)

TOKENS = 8
"""Tokens of the trial."""
USED = "the model uses its weight other than by calling it"
REDEFINED = "a {} multiplies in a way of its own"
SHARED = "its weight is also {}"


@dataclass(frozen=True)
class Usable:
    """What of a model can be quantized.

    inventory: the inventory; its linears are those that can.
    reasons: {linear: why it stays in 16 bits}, of those that cannot.
    loaded: {parameter: value}: weights that the model changed while it ran, as they were loaded; a checkpoint must hold
        these, because the model will change them again.
    """

    inventory: Inventory
    reasons: dict[str, str]
    loaded: dict[str, Tensor]


def find_usable(model: PreTrainedModel) -> Usable:
    """Tries `model`, which was just loaded with its weights; logs what has to stay in 16 bits.

    Raises AmqError where no linear is left.
    """
    inventory = take_inventory(model)
    reasons = _shared(model, inventory)
    for spec in inventory.linears:
        linear = get_linear(model, spec.name)
        if type(linear).forward is not nn.Linear.forward:
            reasons.setdefault(spec.name, REDEFINED.format(type(linear).__name__))
    uses = _weights_used(model, [s.name for s in inventory.linears if s.name not in reasons])
    reasons |= dict.fromkeys(sorted(uses), USED)
    scoring = _scoring(model, inventory)
    reasons |= dict.fromkeys(scoring, SCORES)
    if reasons.keys() >= {s.name for s in inventory.linears}:
        name, reason = next(iter(reasons.items()))
        raise AmqError(f"no linear of this {type(model).__name__} can be quantized: {name}: {reason}")
    for name, reason in reasons.items():
        if reason != SCORES:
            log.warning("%s stays in 16 bits: %s", name, reason)
    if scoring:
        log.info("%d linears that score experts stay in 16 bits, such as %s", len(scoring), scoring[0])
    blocks = {spec.name: spec.block for spec in inventory.linears}
    loaded = {f"{name}.weight": weight for name, weight in uses.items() if _changed(model, blocks[name], name, weight)}
    return Usable(_without(inventory, reasons), reasons, loaded)


def _changed(model: nn.Module, block: int, linear: str, before: Tensor) -> bool:
    """Whether running has changed the weight of `linear`."""
    with holding(model, block):
        return not torch.equal(before, model.get_parameter(f"{linear}.weight"))


def _scoring(model: PreTrainedModel, inventory: Inventory) -> list[str]:
    """Linears that score experts: those that the inventory has left out by their shape, and those found by a run."""
    left_out = [o.name.removesuffix(".weight") for o in inventory.others if o.reason == SCORES]
    by_shape = [name for name in left_out if isinstance(model.get_submodule(name), nn.Linear)]
    tokens = _tokens(model)
    return by_shape + scoring_linears(model, inventory, tokens)


def _without(inventory: Inventory, reasons: Mapping[str, str]) -> Inventory:
    """`inventory` with the linears of `reasons` among the other weights."""
    moved = [
        OtherWeight(f"{s.name}.weight", "not quantized", s.numel, (s.out_features, s.in_features), reasons[s.name])
        for s in inventory.linears
        if s.name in reasons
    ]
    left = tuple(s for s in inventory.linears if s.name not in reasons)
    return replace(inventory, linears=left, others=(*inventory.others, *moved))


def _shared(model: nn.Module, inventory: Inventory) -> dict[str, str]:
    """{linear: reason} where the model has the same weight, or the whole module, in another place too."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    found = {}
    for spec in inventory.linears:
        name = f"{spec.name}.weight"
        others = [other for other in places[id(model.get_parameter(name))] if other != name]
        if others:
            found[spec.name] = SHARED.format(others[0])
    return found


class _StandIn(nn.Module):
    """Multiplies as the linear does whose place it takes; when someone asks for its weight, `uses` gets a copy."""

    def __init__(self, linear: nn.Linear, name: str, uses: dict[str, Tensor]) -> None:
        super().__init__()
        self._linear: nn.Linear
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        object.__setattr__(self, "_linear", linear)  # not a submodule: the model's parameters stay what they are
        self._name, self._uses = name, uses

    @property
    def weight(self) -> Tensor:
        if self._name not in self._uses:
            self._uses[self._name] = self._linear.weight.detach().clone()
        return self._linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x)


def _weights_used(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """{linear: weight as it was} of those of the linears `names` whose weight the model asks for as it runs."""
    uses: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            with _replaced(model, names, uses):
                _run(model)
        except Exception as error:  # whatever the model's code raises
            _run(model)  # with its own linears; where it fails again, that error says why
            raise AmqError(
                f"{type(model).__name__} runs, but not with other modules in place of its linears "
                f"({type(error).__name__}: {error}): this architecture is not supported"
            ) from error
    return uses


@contextmanager
def _replaced(model: nn.Module, names: list[str], uses: dict[str, Tensor]) -> Iterator[None]:
    linears = {name: get_linear(model, name) for name in names}
    try:
        for name, linear in linears.items():
            _put(model, name, _StandIn(linear, name, uses))
        yield
    finally:
        for name, linear in linears.items():
            _put(model, name, linear)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _run(model: PreTrainedModel) -> Any:
    """Reads some tokens and writes two, so that the code for a single token with a cache runs too."""
    tokens = _tokens(model)[0]
    how: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    how |= {"eos_token_id": None, "attention_mask": torch.ones_like(tokens).unsqueeze(0)}
    return cast("GenerationMixin", model).generate(tokens.unsqueeze(0), **how)


def _tokens(model: PreTrainedModel) -> Tensor:
    """int64 [1, TOKENS]."""
    embedding = embedding_weight(model)
    return (torch.arange(TOKENS, device=embedding.device) % embedding.shape[0]).unsqueeze(0)
