"""Head and embeddings, packed like any linear: `--head FORMAT`, `--embeddings FORMAT`, or as a configuration says.

The head of a small model is a large part of what it stores and of what every token reads, and in 8 bits it loses next
to nothing. It is rounded to nearest, without calibration: each group takes the grid of least squared error. Tied
embeddings are then read from the packed head (`amq.kernels.embedding`), so that one copy is left of both; one that is
not tied is packed by itself. A quantizer that sees calibration inputs sees those of the embedding as it will be.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.model.inventory import EMBEDDING, HEAD, Inventory, LinearSpec, get_weight
from amq.packing import PackedWeight
from amq.quantize.blocks import relative_error
from amq.quantize.pieces import put
from amq.quantize.quantizers.grid import out_of_range
from amq.quantize.quantizers.rtn import quantize_fitted
from amq.quantize.settings import NO_HEAD

FLAGS = {HEAD: "--head", EMBEDDING: "--embeddings"}
"""Which flag says what becomes of that kind of weight."""


def with_outer(
    formats: Mapping[str, str], inventory: Inventory, reasons: Mapping[str, str], given: Mapping[str, str]
) -> dict[str, str]:
    """`formats` of a configuration with what the command line says of head and embeddings.

    given: {kind: format name, `none` for 16 bits, or empty for what the configuration says}. reasons: {weight: why it
    has to stay as it is}. Raises AmqError where there is no such head or embedding.
    """
    result = dict(formats)
    for kind, value in given.items():
        names = [s.name for s in inventory.outer if s.kind == kind]
        if value == NO_HEAD:
            result = {name: fmt for name, fmt in result.items() if name not in names}
        elif value and not names:
            raise AmqError(f"{FLAGS[kind]} {value}: {_why_none(kind, inventory, reasons)}; use {FLAGS[kind]} {NO_HEAD}")
        elif value:
            result |= dict.fromkeys(names, value)
    return result


def _why_none(kind: str, inventory: Inventory, reasons: Mapping[str, str]) -> str:
    others = {o.name.removesuffix(".weight") for o in inventory.others if o.kind in ("embedding", "lm_head")}
    for name, reason in reasons.items():
        if name in others:
            return f"{name} stays in 16 bits: {reason}"
    if kind == EMBEDDING and inventory.head_is_tied:
        return f"the embedding is tied to the head, which {FLAGS[HEAD]} quantizes"
    return f"this model has no {'nn.Linear as its head' if kind == HEAD else 'nn.Embedding'} that can be packed"


def check_grid(spec: LinearSpec, weight: Tensor, fmt: BitFormat, group_size: int) -> None:
    """Raises AmqError where the scales that `weight` [rows, in_features] needs are beyond fp16."""
    if out_of_range(weight, fmt, group_size):
        flag = FLAGS[spec.kind]
        raise AmqError(
            f"{spec.name}: its weights reach {float(weight.abs().max()):.1e}, for which {fmt.name} needs scales beyond "
            f"fp16's range: use {flag} {NO_HEAD} (in a search {flag} 16bit), which leaves it in 16 bits"
        )


def quantize_outer(
    model: nn.Module, spec: LinearSpec, fmt: BitFormat, group_size: int, zero_points: str
) -> tuple[PackedWeight, float]:
    """Rounds a head or embedding, which `check_grid` has let pass, and leaves the result in `model`, what is tied to it
    included; it, on the CPU, and ‖W − Ŵ‖/‖W‖."""
    parameter = get_weight(model, spec.name)
    weight = parameter.detach()
    result = round_to_grid(weight, fmt, group_size, zero_points)
    error = relative_error(weight, result, None)
    put(parameter.data, result)
    return result.to("cpu"), error


def round_to_grid(weight: Tensor, fmt: BitFormat, group_size: int, zero_points: str) -> PackedWeight:
    """[rows, in_features] to nearest on the grid of least squared error, which is fitted to every group."""
    return quantize_fitted([weight], [fmt], group_size, zero_points)[0][fmt.name]
