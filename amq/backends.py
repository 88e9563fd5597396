"""Backends: which of them runs which format on this machine, why not where one does not, and the layout each wants.

A backend repacks a `PackedWeight` once at load (`prepare`) and multiplies with what came out (`linear`); the file on
disk never changes for a kernel's sake. Two exist:

- `reference` dequantizes and multiplies in plain torch. It runs everywhere and is what the others are tested against.
- `cpu` is `amq._cpu`: tiles of 16 output rows (csrc/cpu/tiles.h), AVX-512 VNNI and AMX down to portable C++.

Nothing here falls back on its own: `choose_backend` takes `reference` when asked, or logs why it had to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from amq import native
from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat, get_format, n_groups
from amq.packing import PackedWeight, PreparedWeight, dequantize

ACTIVATIONS = ("fp32", "int8")
"""fp32: exact products. int8: x is rounded to 8 bits per row and group at run time; see `amq.ops.linear`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """What a backend can do.

    why_not: format → None if it runs here, else the reason.
    prepare: packed weight → uint8 data.
    linear: (x [M, K], weights, bias [ΣN] or None, activations) → y [M, ΣN]; x and y float32, all on one device.
    """

    name: str
    why_not: Callable[[BitFormat], str | None]
    prepare: Callable[[PackedWeight], Tensor]
    linear: Callable[[Tensor, Sequence[PreparedWeight], Tensor | None, str], Tensor]


def prepare(packed: PackedWeight, backend: str = "cpu") -> PreparedWeight:
    """`packed` in the layout of `backend`, within 1.02 × its size; the caller may drop `packed` afterwards."""
    chosen = get_backend(backend)
    reason = chosen.why_not(packed.format)
    if reason is not None:
        raise AmqError(f"backend {backend} cannot run {packed.format.name}: {reason}")
    fields = (packed.format, packed.out_features, packed.in_features, packed.group_size)
    return PreparedWeight(backend, *fields, chosen.prepare(packed))


def get_backend(name: str) -> Backend:
    """The backend called `name`, or an error that lists the known ones."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise AmqError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}") from None


def check_activations(backend: str, activations: str) -> None:
    """Refuses unknown names, and int8 on `reference`, which a model's evaluation runs as plain torch linears."""
    get_backend(backend)
    if activations not in ACTIVATIONS:
        raise AmqError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if backend == "reference" and activations != "fp32":
        raise AmqError(f"--activations {activations} needs a kernel backend: add --backend cpu")


def choose_backend(formats: Iterable[str]) -> str:
    """`cpu` where it runs all of `formats`, else `reference`, with the reason logged as a warning."""
    for name in formats:
        reason = BACKENDS["cpu"].why_not(get_format(name))
        if reason is not None:
            log.warning("backend reference instead of cpu: %s: %s", name, reason)
            return "reference"
    return "cpu"


def _reference_prepare(packed: PackedWeight) -> Tensor:
    """qweight, scale and zero_point one after another."""
    parts = (packed.qweight, packed.scale, packed.zero_point)
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def _reference_packed(weight: PreparedWeight) -> PackedWeight:
    rows, groups = weight.out_features, n_groups(weight.in_features, weight.group_size)
    sizes = (rows * weight.format.row_bytes(weight.in_features), 2 * rows * groups, 2 * rows * groups)
    qweight, scale, zero_point = (part.clone() for part in weight.data.split(sizes))  # fp16 wants an even address
    return PackedWeight(
        weight.format,
        weight.in_features,
        weight.group_size,
        qweight.view(rows, weight.format.row_bytes(weight.in_features)),
        scale.view(torch.float16).view(rows, groups),
        zero_point.view(torch.float16).view(rows, groups),
    )


def quantize_activations(x: Tensor, group_size: int) -> Tensor:
    """What the int8 mode computes with in place of x: float32 [M, K] → float32 [M, K].

    Per row and group a = max|x|/127 and x becomes a · round(x/a), ties to even. A group with a NaN or an infinity
    becomes NaN; one whose magnitudes are all below 2^-100 becomes 0.
    """
    rows, in_features = x.shape
    padded = torch.nn.functional.pad(x, (0, -in_features % group_size))
    groups = padded.view(rows, n_groups(in_features, group_size), group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (127 / largest)).round()
    rounded = torch.where(largest < 2.0**-100, 0.0, codes * (largest / 127))
    rounded = torch.where(largest.isfinite(), rounded, torch.nan)
    return rounded.view(padded.shape)[:, :in_features]


def _reference_linear(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str) -> Tensor:
    if activations == "int8":
        x = quantize_activations(x, weights[0].group_size)
    y = torch.cat([x @ dequantize(_reference_packed(weight)).T for weight in weights], dim=-1)
    return y if bias is None else y + bias


def _cpu_why_not(fmt: BitFormat) -> str | None:
    try:
        native.check_compiled(fmt)
    except AmqError as error:
        return str(error)
    return None if fmt.is_dense else f"tiles hold dense bitstreams only, not {fmt.levels} levels in {fmt.unit_bytes} B"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpu", _cpu_why_not, native.prepare, native.linear),
        Backend("reference", lambda fmt: None, _reference_prepare, _reference_linear),
    )
}


def availability() -> list[tuple[str, str, dict[str, str | None]]]:
    """(backend, instruction set, {format: None or the reason why not}) for everything compiled, missing or not."""
    rows = []
    module = native.cpu_module()
    for isa in (*module.isas(), *module.missing()):
        missing = module.missing().get(isa)
        rows.append(("cpu", isa, {name: missing or _cpu_why_not(fmt) for name, fmt in FORMATS.items()}))
    rows.append(("reference", "torch", {name: None for name in FORMATS}))
    return rows
