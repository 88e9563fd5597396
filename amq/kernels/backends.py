"""Backends: which of them runs which format on this machine, why not where one does not, and the layout each wants.

A backend repacks a `PackedWeight` once at load (`prepare`) and multiplies with what came out (`linear`); the file on
disk never changes for a kernel's sake.

- `reference` dequantizes and multiplies in plain torch. It runs everywhere and is what the others are tested against.
- `cpu` is `amq._cpu`: tiles of 16 output rows (csrc/cpu/tiles.h), AVX-512 VNNI and AMX down to portable C++.
- `triton` runs on NVIDIA and AMD GPUs (kernels/triton).
- `cuda` runs on NVIDIA GPUs: kernels/cuda for the few rows of a decode step, Triton for more, on the same weights.

Nothing here falls back on its own: `choose_backend` takes a slower one when asked, or logs why it had to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat, get_format, n_groups
from amq.kernels import cpu, cuda, names, triton
from amq.kernels import gpu_layout as layout
from amq.kernels.names import ACTIVATIONS
from amq.packing import PackedWeight, PreparedWeight, dequantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """What a backend can do.

    unsupported_reason: format → None if it runs here (on torch's current GPU), else the reason.
    prepare: packed weight → uint8 data on its device.
    rows: (weight, ids [n] on its device, dtype) → those rows of W in dtype, [n, K], for an embedding that shares the
        weight; each bit-equal to that of `amq.packing.dequantize`. None where the packed weight is read instead.
    linear: (x [M, K], weights, bias [ΣN] or None, activations) → y [M, ΣN]; x and bias contiguous, y of x's dtype, the
        bias of any in DTYPES, all on one device.
    grouped: (x [M, K], weights, sizes, biases, activations) → y [M, N] for weights of one shape, weight i times its
        sizes[i] rows of x, in one call; None where `group` makes a call for each weight: on GPUs, and `reference`.
    dtypes, activations: what x may be, and what may be done to it.
    device: the type of device that it multiplies on, None for any.
    rotates: whether `linear` and `grouped` rotate x themselves where the weights are rotated; if not, they are given it
        rotated.
    """

    name: str
    unsupported_reason: Callable[[BitFormat], str | None]
    prepare: Callable[[PackedWeight], Tensor]
    linear: Callable[[Tensor, Sequence[PreparedWeight], Tensor | None, str], Tensor]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    activations: tuple[str, ...] = ACTIVATIONS
    device: str | None = None
    grouped: Callable[..., Tensor] | None = None
    rows: Callable[[PreparedWeight, Tensor, torch.dtype], Tensor] | None = None
    rotates: bool = False

    def group(
        self,
        x: Tensor,
        weights: Sequence[PreparedWeight],
        sizes: Sequence[int],
        biases: Sequence[Tensor | None],
        activations: str,
    ) -> Tensor:
        """See `grouped`."""
        if self.grouped is not None:
            return self.grouped(x, weights, sizes, biases, activations)
        each = zip(x.split(list(sizes)), weights, biases, strict=True)
        parts = [self.linear(rows, [weight], bias, activations) for rows, weight, bias in each if len(rows)]
        return torch.cat(parts) if parts else x.new_empty(0, weights[0].out_features)


def prepare(packed: PackedWeight, backend: str = "cpu") -> PreparedWeight:
    """`packed` in the layout of `backend`; the caller may drop `packed` afterwards.

    It takes the packed size where its blocks divide the shape: on the CPU 32 input features (else at most 1.02 × it for
    real linears), on a GPU 512 input features and 8 output rows (1.00 to 1.02 × it for 11008 features, 1.02 to 1.4 ×
    for 576).
    """
    chosen = get_backend(backend)
    with current(packed.qweight.device):
        reason = chosen.unsupported_reason(packed.format)
    if reason is not None:
        raise AmqError(
            f"backend {backend} cannot run {packed.format.name}: {reason}; take backend reference, or another format"
        )
    return PreparedWeight.of(packed, backend, chosen.prepare(packed))


def current(device: torch.device) -> torch.cuda.device | nullcontext:
    """Makes `device` torch's current GPU, where it is one that torch can reach."""
    reachable = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if reachable else nullcontext()


def get_backend(name: str) -> Backend:
    """The backend called `name`, or an error that lists the known ones."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise AmqError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}") from None


def check_activations(backend: str, activations: str) -> None:
    """Refuses unknown names, a mode that the backend lacks, and int8 on `reference`, which a model's evaluation runs as
    plain torch linears."""
    chosen = get_backend(backend)
    if activations not in ACTIVATIONS:
        raise AmqError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if activations not in chosen.activations or (backend == "reference" and activations != "fp32"):
        able = [b.name for b in BACKENDS.values() if activations in b.activations and b.name != "reference"]
        raise AmqError(
            f"--activations {activations} does not go with backend {backend}: take --backend {' or '.join(able)}"
        )


def default_activations(backend: str) -> str:
    """What `backend` runs with where nobody says: int8 on the CPU, where it is several times faster; exact on a GPU,
    where memory is the limit and exact products take no longer (and Triton has no int8), and on `reference`."""
    return "int8" if backend == "cpu" else "fp32"


def choose_backend(formats: Iterable[str], device: str = "cpu", among: Sequence[Backend] = ()) -> str:
    """The first backend of `device` ("cpu", "cuda" or "cuda:1") that runs all of `formats` there, of `among` or of all
    there are; what it passes over, it logs as a warning."""
    records, where = [get_format(name) for name in formats], torch.device(device)
    for backend in among or BACKENDS.values():
        if backend.device not in (where.type, None):
            continue
        with current(where):
            reasons = [(fmt.name, reason) for fmt in records if (reason := backend.unsupported_reason(fmt)) is not None]
        if not reasons:
            return backend.name
        log.warning("backend %s is passed over: %s: %s", backend.name, *reasons[0])
    raise AssertionError("unreachable: `reference` runs everything everywhere")


def _reference_prepare(packed: PackedWeight) -> Tensor:
    """qweight, scale and zero_point one after another."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in packed.parts.values()])


def _reference_packed(weight: PreparedWeight) -> PackedWeight:
    rows, groups = weight.out_features, n_groups(weight.in_features, weight.group_size)
    sizes = (rows * weight.format.row_bytes(weight.in_features), 2 * rows * groups, 2 * rows * groups)
    if weight.data.numel() != sum(sizes):
        raise AmqError(f"bytes of a {weight.format.name} weight: expected {sum(sizes)}, got {weight.data.numel()}")
    qweight, scale, zero_point = (part.clone() for part in weight.data.split(sizes))  # fp16 wants an even address
    return PackedWeight(
        weight.format,
        weight.in_features,
        weight.group_size,
        qweight.view(rows, weight.format.row_bytes(weight.in_features)),
        scale.view(torch.float16).view(rows, groups),
        zero_point.view(torch.float16).view(rows, groups),
        rotation=weight.rotation,
    )


def _reference_rows(weight: PreparedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes are gathered, and seen as fp16 in their own memory: in the weight's they may begin at an odd address."""
    rows, pairs = weight.out_features, 2 * n_groups(weight.in_features, weight.group_size)
    sizes = (rows * weight.format.row_bytes(weight.in_features), rows * pairs, rows * pairs)
    qweight, *scales = (part.view(rows, -1).index_select(0, ids) for part in weight.data.split(sizes))
    halves = (part.view(torch.float16) for part in scales)
    return dequantize(
        PackedWeight(weight.format, weight.in_features, weight.group_size, qweight, *halves, rotation=weight.rotation),
        dtype,
    )


def _gpu_rows(weight: PreparedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.data.is_cuda and not torch.compiler.is_compiling():
        return triton.rows(weight, ids, dtype)
    return layout.rows(weight, ids).to(dtype)


def quantize_activations(x: Tensor, group_size: int, fmt: BitFormat = FORMATS["int8"]) -> Tensor:
    """What the int8 mode computes with in place of x: float32 [M, K] → float32 [M, K].

    Per row and group a = max|x|/127 and x becomes a · round(x/a), ties to even. A group with a NaN or an infinity
    becomes NaN; one whose magnitudes are all below 2^-100 becomes 0. Another format, which no kernel rounds to, has
    levels/2 − 1 in the place of 127.
    """
    most = fmt.levels // 2 - 1
    rows, in_features = x.shape
    padded = torch.nn.functional.pad(x, (0, -in_features % group_size))
    groups = padded.view(rows, n_groups(in_features, group_size), group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (most / largest)).round()
    rounded = torch.where(largest < 2.0**-100, 0.0, codes * (largest / most))
    rounded = torch.where(largest.isfinite(), rounded, torch.nan)
    return rounded.view(padded.shape)[:, :in_features]


def _reference_linear(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str) -> Tensor:
    """Multiplies with what is stored: of rotated weights W H, whose x comes rotated."""
    rows = x.float()
    if activations == "int8":
        rows = quantize_activations(rows, weights[0].group_size)
    stored = [dequantize(_reference_packed(replace(weight, rotation=0))) for weight in weights]
    y = torch.cat([rows @ weight.T for weight in stored], dim=-1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _cpu_linear(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str) -> Tensor:
    return cpu.linear(x.float(), weights, None if bias is None else bias.float(), activations).to(x.dtype)


def _cpu_grouped(
    x: Tensor,
    weights: Sequence[PreparedWeight],
    sizes: Sequence[int],
    biases: Sequence[Tensor | None],
    activations: str,
) -> Tensor:
    floats = [None if bias is None else bias.float() for bias in biases]
    return cpu.grouped_linear(x.float(), weights, sizes, floats, activations).to(x.dtype)


def _triton_linear(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str) -> Tensor:
    return triton.linear(x, weights, bias)


def _cuda_linear(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str) -> Tensor:
    if x.shape[0] <= cuda.max_rows():
        return cuda.linear(x, weights, None if bias is None else bias.to(x.dtype), activations)
    if activations == "int8":  # what a small batch computes with, so that a row does not depend on how many there are
        x = quantize_activations(x.float(), weights[0].group_size).to(x.dtype)
    return triton.linear(x, weights, bias)


def _cpu_unsupported_reason(fmt: BitFormat) -> str | None:
    try:
        cpu.check_compiled(fmt)
    except AmqError as error:
        return str(error)
    return None if fmt.is_dense else f"tiles hold dense bitstreams only, not {fmt.levels} levels in {fmt.unit_bytes} B"


def _cuda_unsupported_reason(fmt: BitFormat) -> str | None:
    return cuda.unsupported_reason(fmt) or triton.unsupported_reason(fmt)


_GPU: dict[str, Any] = dict(device="cuda", rows=_gpu_rows)
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu", _cpu_unsupported_reason, cpu.prepare, _cpu_linear, device="cpu", grouped=_cpu_grouped, rotates=True
        ),
        Backend("cuda", _cuda_unsupported_reason, layout.prepare, _cuda_linear, tuple(cuda.DTYPES), **_GPU),
        Backend("triton", triton.unsupported_reason, layout.prepare, _triton_linear, triton.DTYPES, ("fp32",), **_GPU),
        Backend("reference", lambda fmt: None, _reference_prepare, _reference_linear, rows=_reference_rows),
    )
}
"""Every backend by name; of those for one device, the fastest first."""
assert tuple(BACKENDS) == names.BACKENDS, "amq.kernels.names lists other backends"


def availability() -> list[tuple[str, str, dict[str, str | None]]]:
    """(backend, instruction set, {format: None or the reason why not}) for everything compiled, missing or not."""
    rows = _cpu_availability()
    for backend in BACKENDS.values():
        if backend.name != "cpu":
            where = "torch" if backend.device is None else "gpu"
            rows.append((backend.name, where, {name: backend.unsupported_reason(fmt) for name, fmt in FORMATS.items()}))
    return rows


def _cpu_availability() -> list[tuple[str, str, dict[str, str | None]]]:
    try:
        module = cpu.cpu_module()
    except AmqError as error:
        return [("cpu", "none", dict.fromkeys(FORMATS, str(error)))]
    missing = module.missing()
    return [
        ("cpu", isa, {name: missing.get(isa) or _cpu_unsupported_reason(fmt) for name, fmt in FORMATS.items()})
        for isa in (*module.isas(), *missing)
    ]
