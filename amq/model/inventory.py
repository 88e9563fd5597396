"""Finds what a causal LM is made of by walking its module tree: no model names, no role lists, no per-model tables.

The decoder blocks are the `nn.ModuleList` that holds the most linear weights; every `nn.Linear` inside it is a
`LinearSpec`, named by its module path, those of experts included (`amq.model.experts`). So is what stands outside the
blocks and can be quantized: the head and embeddings (`outer`). Every other parameter is listed too, as an `OtherWeight`
with a kind, so that a memory figure can be itemised and nothing is left out silently: norms and biases, and weights
that stay as they are because no format applies to them (routers, convolutions, linears outside the blocks). A parameter
that two modules share is counted once.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.model.auto import other_parts, text_part
from amq.model.experts import Layer, Routing, layers_of_experts, top_k_of
from amq.model.paging import named_weights
from amq.model.shape import size, text_config
from amq.util.records import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_PATTERN = 1000
"""Characters of a pattern, and the product of its counted repetitions, which compiling writes out one by one."""
MATCH_SECONDS = 5.0
"""For one pattern on all linears, which takes microseconds unless it backtracks without end."""


LINEAR, EXPERT, HEAD, EMBEDDING = "linear", "expert", "head", "embedding"
SCORES = "scores experts, which in few bits sends tokens to others"
KEPT_PART = "not part of the text model"
BEFORE = -1
"""The `block` of what is read before the first one; what follows the last has the number of blocks."""


@dataclass(frozen=True)
class LinearSpec:
    """One quantizable weight [out_features, in_features]: `name` is its module's path, `role` that path inside its
    block, without the number of an expert.

    kind: LINEAR, EXPERT (of `Experts`, or of a list of experts), HEAD, or EMBEDDING, whose rows are looked up.
    expert: its number. experts, top_k: how many there are in its layer, and to how many of them a token is routed.
    tied: of a head, the name of the embedding that has the same weight: one item with the costs of both.
    """

    name: str
    block: int
    role: str
    out_features: int
    in_features: int
    kind: str = LINEAR
    expert: int | None = None
    experts: int = 1
    top_k: int = 1
    tied: str = ""

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def read(self) -> float:
        """The share of its bytes that one token reads, on average."""
        if self.kind == EMBEDDING:
            return 1 / self.out_features
        return self.top_k / self.experts


@dataclass(frozen=True)
class OtherWeight:
    """A parameter that stays in 16 bits; kind: embedding, lm_head, norm_or_bias, not quantized."""

    name: str
    kind: str
    numel: int
    shape: tuple[int, ...]
    reason: str = ""


@dataclass(frozen=True)
class Inventory:
    """Every parameter of a model, each exactly once.

    linears: of the blocks. outer: head and embeddings that can be quantized; while they are not, they are among the
        `others` as well, so that a stage which leaves them alone need not know of them.
    """

    blocks_path: str
    n_blocks: int
    linears: tuple[LinearSpec, ...]
    others: tuple[OtherWeight, ...]
    head_is_tied: bool
    outer: tuple[LinearSpec, ...] = ()

    @property
    def numel(self) -> int:
        return sum(s.numel for s in self.linears) + sum(o.numel for o in self.others)

    @property
    def weights(self) -> tuple[LinearSpec, ...]:
        """Everything that a search can give a format: the blocks' linears, then what is outside of them."""
        return (*self.linears, *self.outer)

    def in_block(self, block: int) -> list[LinearSpec]:
        return [s for s in self.linears if s.block == block]

    def only(self, names: Container[str]) -> Inventory:
        """The same model, of whose weights a stage sees those called `names`: the ones that are quantized."""
        linears, outer = (tuple(s for s in some if s.name in names) for some in (self.linears, self.outer))
        return replace(self, linears=linears, outer=outer)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module of the decoder blocks: the outermost ModuleList with the most weights in linears; that of the
    text model where there is one."""
    best: tuple[int, str, nn.ModuleList] | None = None
    ours = set(text_part(model).modules())
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or module not in ours:
            continue
        weights = sum(_numel(m) for m in module.modules())
        if weights and (best is None or weights > best[0]):  # ties go to the outer list, which is walked first
            best = (weights, path, module)
    if best is None:
        raise AmqError(
            f"{type(model).__name__} has no list of decoder blocks that holds nn.Linear modules: nothing to quantize"
        )
    return best[1], best[2]


def _numel(module: Any) -> int:
    """Weights of an nn.Linear, or of what stands in for one (`amq.kernels.modules`) and says its size in the same way;
    0 of any other module."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features * module.out_features
    return 0


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """An nn.Linear with a weight of its own, which those of a quantized model do not have."""
    return isinstance(module, nn.Linear) and "weight" in module._parameters


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """That of the tokens; of a packed one an empty tensor, which still has the model's device and dtype."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def take_inventory(model: PreTrainedModel) -> Inventory:
    """Walks `model` (a Hugging Face causal LM, on any device, meta included) into an `Inventory`."""
    blocks_path, blocks = find_blocks(model)
    linears = tuple(_block_linears(model, blocks_path, blocks))
    if not linears:
        raise AmqError(f"no nn.Linear found in the blocks at {blocks_path!r}: nothing to quantize")
    taken = {f"{s.name}.weight" for s in linears}
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    embedding_weight = getattr(embedding, "weight", None)
    head_weight = getattr(head, "weight", None)
    tied = head_weight is not None and head_weight is embedding_weight
    outer = tuple(_outer(model, blocks_path, len(blocks), tied))
    embeddings = {f"{s.name}.weight" for s in outer if s.kind == EMBEDDING}
    others = []
    for name, parameter in model.named_parameters():  # yields a shared parameter once, under its first name
        if name in taken:
            continue
        if parameter is embedding_weight or name in embeddings:
            kind, reason = "embedding", ""
        elif parameter is head_weight:
            kind, reason = "lm_head", ""
        elif parameter.ndim < 2:
            kind, reason = "norm_or_bias", ""
        else:
            kind, reason = "not quantized", _reason_of(model, name, parameter, blocks_path)
        others.append(OtherWeight(name, kind, parameter.numel(), tuple(parameter.shape), reason))
    return Inventory(blocks_path, len(blocks), linears, tuple(others), tied, outer)


def _block_linears(model: PreTrainedModel, blocks_path: str, blocks: nn.ModuleList) -> Iterator[LinearSpec]:
    seen: set[int] = set()
    for index, block in enumerate(blocks):
        layers = layers_of_experts(block, model.config)
        routing = Routing.of(layers, block)
        for path, module in block.named_modules():
            if not _is_plain(module) or id(module.weight) in seen:
                continue
            layer, role, number = _as_expert(path, layers)
            if layer is None and routing.scores(path, module.out_features, module.in_features):
                continue
            seen.add(id(module.weight))
            spec = LinearSpec(f"{blocks_path}.{index}.{path}", index, role, module.out_features, module.in_features)
            if layer is not None:
                top_k = top_k_of(model.config, layer)
                spec = replace(spec, kind=EXPERT, expert=number, experts=layer.experts, top_k=top_k)
            yield spec


def _as_expert(path: str, layers: Mapping[str, Layer]) -> tuple[Layer | None, str, int | None]:
    """(layer of experts, role without the number, number) of the module at `path`; (None, path, None) of no expert."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if not part.isdigit():
            continue
        own = layers.get(".".join(parts[:i]))  # a list of experts: mlp.experts.3.gate_proj
        of_linears = layers.get(".".join(parts[: i - 1])) if i == len(parts) - 1 else None  # mlp.experts.gate_proj.3
        for layer in (own, of_linears):
            if layer is not None and (layer.fused is None) == (layer is own):
                return layer, ".".join(parts[:i] + parts[i + 1 :]), int(part)
    return None, path, None


def _outer(model: PreTrainedModel, blocks_path: str, n_blocks: int, tied: bool) -> Iterator[LinearSpec]:
    """Head and embeddings outside the blocks: the head after the last block, embeddings before the first.

    An embedding beside that of the tokens counts where it is of the same class and about as long, as Gemma's per layer
    are, which are looked up by tokens too; one of positions is neither.
    """
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    positions = size(text_config(model.config), "max_position_embeddings", "n_positions")
    for name, module in model.named_modules():
        if type(module) is not type(embedding) or not isinstance(module, nn.Embedding):
            continue
        if name.startswith(f"{blocks_path}.") or "weight" not in module._parameters or (tied and module is embedding):
            continue
        rows, tokens = module.num_embeddings, int(cast(Any, embedding).num_embeddings)
        if module is embedding or (rows != positions and 2 * rows >= tokens):
            yield LinearSpec(name, BEFORE, name, rows, module.embedding_dim, EMBEDDING)
    if _is_plain(head):
        name = names[id(head)]
        shared = names[id(embedding)] if tied else ""
        yield LinearSpec(name, n_blocks, name, head.out_features, head.in_features, HEAD, tied=shared)


def _reason_of(model: PreTrainedModel, name: str, parameter: Tensor, blocks_path: str) -> str:
    owner_name = name.rpartition(".")[0]
    owner = model.get_submodule(owner_name)
    if any(name.startswith(f"{path}.") for path in other_parts(model)):
        return KEPT_PART
    if not name.startswith(blocks_path + "."):
        return f"{type(owner).__name__} outside the decoder blocks"
    number, _, path = owner_name.removeprefix(blocks_path + ".").partition(".")
    block = model.get_submodule(f"{blocks_path}.{number}")
    layers = layers_of_experts(block, model.config)
    if parameter.ndim == 2 and Routing.of(layers, block).scores(path, *parameter.shape):
        return SCORES
    if parameter.ndim > 2 and path in layers:
        return f"{parameter.ndim}-D parameter of {type(owner).__name__}, experts in a layout that is not known"
    if parameter.ndim > 2:
        return f"{parameter.ndim}-D parameter of {type(owner).__name__}, not an nn.Linear"
    return f"{type(owner).__name__} is not an nn.Linear"


def get_weight(model: nn.Module, name: str) -> nn.Parameter:
    """The weight [out_features, in_features] of the linear or embedding `name`."""
    module = model.get_submodule(name) if name else model
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear | nn.Embedding) or weight is None:
        raise AmqError(f"{name!r} is a {type(module).__name__}, expected an nn.Linear or an nn.Embedding")
    return weight


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear at the dotted `name`, or an error that says what is there instead."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise AmqError(f"linear {name!r} is not in this {type(model).__name__}") from None
    if not _is_plain(module):
        raise AmqError(f"{name!r} is a {type(module).__name__}, expected an nn.Linear")
    return module


def check_weights(model: nn.Module, linears: tuple[LinearSpec, ...]) -> None:
    """Refuses linears that cannot be quantized, which are empty, and any weight with NaN or infinity.

    Norms, embeddings and heads count: what is written with them is a broken model, too.
    """
    for spec in linears:
        if not spec.numel:
            raise AmqError(
                f"linear {spec.name} is empty ({spec.out_features} x {spec.in_features}): cannot be quantized"
            )
    names = {f"{spec.name}.weight": f"linear {spec.name}" for spec in linears}
    for part in named_weights(model):
        for name, tensor in part:
            if not tensor.is_floating_point() or tensor.is_meta or is_finite(tensor):
                continue
            raise AmqError(
                f"{names.get(name, name)} holds {int((~torch.isfinite(tensor)).sum())} non-finite weights: "
                "the checkpoint is damaged or was cast to too narrow a dtype; load it again or with another --dtype"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether it has neither NaN nor infinity; without a mask of its size: the extremes show both."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as `dtype`; raises AmqError naming it where a finite value would become infinity."""
    result = tensor.to(dtype)
    if dtype.is_floating_point and not is_finite(result) and is_finite(tensor):
        largest = float(tensor.abs().max())
        raise AmqError(
            f"{name} holds {largest:.4g}, beyond the range of {str(dtype).removeprefix('torch.')}: say "
            "--dtype bfloat16, or correct the dtype in the model's config.json"
        )
    return result


def match_linears(linears: tuple[LinearSpec, ...], pattern: str) -> list[LinearSpec]:
    """The linears whose name contains a match of the regular expression `pattern`; none is an error.

    `regex` instead of `re`, which knows no time limit: a pattern from a file must not be able to hang whoever reads it.
    """
    import regex

    counts = [int(n) for braces in re.findall(r"\{([0-9, ]*)\}", pattern) for n in re.findall("[0-9]{1,9}", braces)]
    if len(pattern) > MOST_PATTERN or math.prod(max(1, n) for n in counts) > MOST_PATTERN:
        raise AmqError(
            f"the pattern {shorten(pattern)} is too large: expected at most {MOST_PATTERN} characters and repetitions"
        )
    found = []
    try:
        expression, left = regex.compile(pattern), MATCH_SECONDS
        for spec in linears:
            start = time.monotonic()
            if expression.search(spec.name, timeout=left):
                found.append(spec)
            left = max(left - (time.monotonic() - start), 0.001)
    except (regex.error, RecursionError, OverflowError) as error:
        raise AmqError(f"{shorten(pattern)} is not a regular expression: {error}") from None
    except TimeoutError:
        raise AmqError(
            f"the pattern {shorten(pattern)} takes longer than {MATCH_SECONDS:g} s to match: write it without "
            "repetitions inside repetitions, such as (.+)+"
        ) from None
    if not found:
        raise AmqError(f"no linear matches {pattern!r}; names look like {linears[0].name}")
    return found
