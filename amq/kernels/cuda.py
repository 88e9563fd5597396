"""Bindings of the compiled CUDA kernels (`amq/_cuda.so`, kernels/cuda): tensors in, addresses and a stream out.

The library links CUDA's runtime statically and knows no torch, so it loads on any machine, and is loaded when it is
first asked for. It multiplies up to `max_rows()` rows of x; `amq.kernels.backends` gives larger batches to Triton, on
the same weights.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import BitFormat
from amq.kernels import gpu_layout as layout
from amq.kernels.cuda_calls import REFUSALS, CallLibrary
from amq.packing import PreparedWeight

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
"""What x may be, with the number that the library knows it by."""
LOWEST_CAPABILITY = (8, 0)
INSUFFICIENT_DRIVER = 35
"""cudaErrorInsufficientDriver"""
ALIGNMENT = 16
"""Of rows of x, in bytes."""
MAX_WEIGHTS = 4

log = logging.getLogger(__name__)


class Library:
    """The C functions of kernels/cuda/*.cu in the shared library at `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self._library = path, ctypes.CDLL(str(path))
        integer, long, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        longs = ctypes.POINTER(long)
        self._declare("amq_cuda_has_bits", integer, integer)
        self._declare("amq_cuda_error", ctypes.c_char_p, integer)
        self._declare("amq_cuda_check", integer, *2 * (ctypes.POINTER(integer),))
        self._declare("amq_cuda_max_rows", integer)
        self._declare(
            *("amq_cuda_linear", integer, integer, longs, longs, longs, integer, integer, integer, integer),
            *(address, long, address, address, long, integer, address),
        )
        self.max_rows: int = self._library.amq_cuda_max_rows()
        self.calls = CallLibrary(self._library, str(path))

    def _declare(self, name: str, result: type, *arguments: type) -> None:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, arguments

    def has_bits(self, bits: int) -> bool:
        """Whether kernels for codes of so many bits are in the library."""
        return bool(self._library.amq_cuda_has_bits(bits))

    def unsupported_reason(self) -> str | None:
        """None if the kernels can run on CUDA's current device, else the reason and the remedy; launches nothing."""
        runtime, driver = ctypes.c_int(), ctypes.c_int()
        status = self._library.amq_cuda_check(ctypes.byref(runtime), ctypes.byref(driver))
        if status == 0:
            return None
        built, known = (f"{v.value // 1000}.{v.value % 1000 // 10}" for v in (runtime, driver))
        if status == INSUFFICIENT_DRIVER:
            return (
                f"{self.path} was built with CUDA {built}, and this machine's NVIDIA driver knows CUDA {known} only: "
                f"update the driver, or build amq again with a toolkit of CUDA {known.partition('.')[0]} "
                "(`pip install -e .` with its nvcc on PATH); --backend triton needs no library"
            )
        reason = self._library.amq_cuda_error(status).decode()
        return (
            f"{self.path}, built with CUDA {built}, cannot run on this device with a driver for CUDA {known}: error "
            f"{status}, {reason}; build amq again on this machine with `pip install -e .`"
        )

    def linear(
        self,
        x: Tensor,
        weights: Sequence[PreparedWeight],
        bias: Tensor | None,
        activations: str,
        stream: int,
    ) -> Tensor:
        """y [M, ΣN] = x [M, K] · Wᵀ + bias, in x's dtype; at most `max_rows` rows and MAX_WEIGHTS weights per launch.

        x: float16 or bfloat16, its rows contiguous; bias likewise, or None. All where `stream` can reach them. Rows
            that do not begin at multiples of 16 bytes are copied first.
        """
        rows, in_features = x.shape
        group_size = weights[0].group_size
        for weight in weights:
            layout.check_data(weight, "CUDA linear")
        if x.data_ptr() % ALIGNMENT or x.stride(0) % (ALIGNMENT // x.element_size()):
            x = _aligned(x)
        y = x.new_empty(rows, sum(w.out_features for w in weights))
        column = 0
        for start in range(0, len(weights), MAX_WEIGHTS):
            part = weights[start : start + MAX_WEIGHTS]
            array = ctypes.c_int64 * len(part)
            offset = column * x.element_size()
            status = self._library.amq_cuda_linear(
                len(part),
                array(*(w.data.data_ptr() for w in part)),
                array(*(w.format.bits for w in part)),
                array(*(w.out_features for w in part)),
                *(rows, in_features, group_size, DTYPES[x.dtype], x.data_ptr(), x.stride(0)),
                None if bias is None else bias.data_ptr() + offset,
                y.data_ptr() + offset,
                *(y.stride(0), activations == "int8", stream),
            )
            if status:
                raise AmqError(self._explain(status, x, part))
            column += sum(w.out_features for w in part)
        return y

    def _explain(self, status: int, x: Tensor, weights: Sequence[PreparedWeight]) -> str:
        parts = ", ".join(f"{w.format.name} [{w.out_features}, {w.in_features}]" for w in weights)
        what = f"CUDA linear of {len(x)} rows of {x.dtype} with {parts} at group {weights[0].group_size}"
        if status > 0:
            reason = self._library.amq_cuda_error(status).decode()
            return f"{what} failed with CUDA error {status}: {reason}"
        reason = REFUSALS.get(status, "unknown status")
        return f"{what} was refused ({status}): {reason}"


def _aligned(x: Tensor) -> Tensor:
    """A copy of x whose rows begin at multiples of ALIGNMENT."""
    _warn_of_copies(x.shape[1])
    columns = x.shape[1]
    return torch.nn.functional.pad(x, (0, -columns % (ALIGNMENT // x.element_size()))).clone()[:, :columns]


@lru_cache
def _warn_of_copies(in_features: int) -> None:
    """Once for each number of features."""
    log.warning(
        "CUDA linears of %d input features copy x before each product, one launch more: the kernels want rows that "
        "begin at multiples of %d bytes",
        *(in_features, ALIGNMENT),
    )


FAILURE = "_cuda_failed.txt"
"""Beside where the library would be: one line, what nvcc said when amq was installed (setup.py writes it)."""


@lru_cache(maxsize=1)
def library() -> Library:
    """`amq/_cuda.so`, or an error that says how to build it; AMQ_CUDA_LIBRARY names another file."""
    path = Path(os.environ.get("AMQ_CUDA_LIBRARY", Path(__file__).parents[1] / "_cuda.so"))
    if not path.exists():
        failure = path.with_name(FAILURE)
        reason = f"nvcc failed ({failure.read_text().strip()})" if failure.exists() else "amq was built without nvcc"
        raise AmqError(
            f"there is no {path}: {reason}; install the CUDA toolkit and build again with "
            "`pip install -e .` in a checkout of amq, or use --backend triton"
        )
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        raise AmqError(f"{path} cannot be loaded ({error}); build it again with `pip install -e .`") from error


def unsupported_reason(fmt: BitFormat) -> str | None:
    """None if this machine can run `fmt`, else the reason and the remedy."""
    if reason := layout.unsupported_reason(fmt):
        return reason
    try:
        if not library().has_bits(fmt.bits):
            return f"{library().path} was built without {fmt.bits}-bit codes; build it again with `pip install -e .`"
    except AmqError as error:
        return str(error)
    return _no_device() or _not_loadable(torch.cuda.current_device())


def _no_device() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU or driver; see nvidia-smi"
    return _too_old(torch.cuda.current_device())


@lru_cache
def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        has, wanted = (".".join(map(str, version)) for version in (capability, LOWEST_CAPABILITY))
        name = torch.cuda.get_device_name(device)
        return f"{name} (cuda:{device}) has compute capability {has}, and the kernels want {wanted} or newer"
    return None


@lru_cache
def _not_loadable(device: int) -> str | None:
    """For the current device, which is `device`."""
    return library().unsupported_reason()


def max_rows() -> int:
    """Rows of x that one launch takes."""
    return library().max_rows


def linear(x: Tensor, weights: Sequence[PreparedWeight], bias: Tensor | None, activations: str) -> Tensor:
    """`Library.linear` on torch's current stream of x's device; `amq.kernels.ops.linear` checks what it is given.

    On CPU tensors it runs where AMQ_CUDA_LIBRARY is a build of the kernels for a CPU, as tests have one.
    """
    if not x.is_cuda:
        return library().linear(x, weights, bias, activations, 0)
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return linear(x, weights, bias, activations)
    stream = torch.cuda.current_stream().cuda_stream
    return library().linear(x, weights, bias, activations, stream)
