"""Which linears score experts, found by what they feed: a score reaches the weights that experts' results are added
with, and never what the experts read.

A few tokens run through the model with autograd on, which notes who computed what from what; nothing is differentiated,
and no tensor is kept for it. Blocks of one make are alike in this, so one of each is followed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.model.experts import Experts, experts_of
from amq.model.inventory import LINEAR, Inventory, find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

INPUTS = inspect.signature(Experts.forward)


class _Enough(Exception):
    """Leaves the model's forward once every kind of block has run."""


def scoring_linears(model: PreTrainedModel, inventory: Inventory, tokens: Tensor) -> list[str]:
    """Names of those of `inventory.linears` that feed the `top_k_index` or `top_k_weights` of experts and not their
    `hidden_states`.

    tokens: int64 [1, n]. A model that autograd cannot follow is left to the look at shapes alone, and that is logged.
    """
    _, blocks = find_blocks(model)
    kinds: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        if any(experts_of(block)):
            kinds.setdefault(_make(block), []).append(index)
    if not kinds:
        return []
    firsts = {numbers[0]: numbers for numbers in kinds.values()}
    roles = {(s.block, s.role): s.name for s in inventory.linears if s.kind == LINEAR}
    found = []
    for first, scoring in _follow(model, blocks, firsts, roles, tokens).items():
        found += [roles[index, role] for index in firsts[first] for role in scoring if (index, role) in roles]
    return sorted(found)


def _make(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks whose modules are of the same classes and sizes."""
    return tuple(
        (name, type(module), tuple((key, tuple(p.shape)) for key, p in module._parameters.items() if p is not None))
        for name, module in block.named_modules()
    )


def _follow(
    model: PreTrainedModel, blocks: nn.ModuleList, which: Iterable[int], roles: dict[tuple[int, str], str],
    tokens: Tensor,
) -> dict[int, list[str]]:  # fmt: skip
    """{block: roles of its linears that score}, of the blocks `which`."""
    last = max(which)
    notes = {index: _Notes() for index in which}
    handles = [model.get_input_embeddings().register_forward_hook(_begin)]
    handles.append(blocks[last].register_forward_hook(_stop))
    try:
        for index, note in notes.items():
            for (block, role), name in roles.items():
                if block == index:
                    handles.append(model.get_submodule(name).register_forward_hook(note.linear(role)))
            for _, layer in experts_of(blocks[index]):
                handles.append(layer.register_forward_pre_hook(note.experts, with_kwargs=True))
        with torch.enable_grad(), _nothing_saved():
            model(input_ids=tokens, use_cache=False)
    except _Enough:
        pass
    except RuntimeError as error:  # autograd refuses what some code does in place
        log.warning("what scores experts is told by its shape alone: %s does not run with autograd: %s",
                    type(model).__name__, error)  # fmt: skip
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {index: note.scoring() for index, note in notes.items()}


def _begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Everything that is computed from the embedding has a history."""
    return output.detach().requires_grad_() * 1


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Enough


@contextmanager
def _nothing_saved() -> Iterator[None]:
    """The history alone: no weight or activation is held for a backward pass, which never comes."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: None):  # type: ignore[arg-type, return-value]
        yield


class _Notes:
    """Of one block: where in the history its linears stand, and its experts' inputs."""

    def __init__(self) -> None:
        self._linears: list[tuple[str, Any]] = []
        self._read: list[Any] = []
        self._routed: list[Any] = []

    def linear(self, role: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                self._linears.append((role, output.grad_fn))

        return hook

    def experts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = INPUTS.bind(module, *args, **kwargs).arguments
        self._read.append(given["hidden_states"].grad_fn)
        self._routed += [given[name].grad_fn for name in ("top_k_index", "top_k_weights")]

    def scoring(self) -> list[str]:
        read, routed = _before(self._read), _before(self._routed)
        feeding = {role for role, node in self._linears if node in routed}
        return sorted(feeding - {role for role, node in self._linears if node in read})


def _before(nodes: Iterable[Any]) -> set[Any]:
    """Every node of autograd's history that `nodes` come from, themselves included."""
    left, found = [node for node in nodes if node is not None], set()
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions if before is not None]
    return found
