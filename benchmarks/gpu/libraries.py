"""Other libraries' kernels on the same shapes, where they can be imported: gemlite, humming-kernels and exllamav3.

Never run by us so far: neither was installed on a machine with a GPU that we had. So a result counts only if its
product agrees with what its weights stand for, and whatever goes wrong is recorded as the reason.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from common import Failure, attempt, dense, now, random_packed, ratio

from amq.formats import get_format
from amq.packing import unpack_codes

FORMATS = {
    "gemlite": ("int2", "int4"),
    "humming": ("int2", "int3", "int4"),
    "exllamav3": ("int2", "int3", "int4"),
}
ROWS = (1, 8)
AGREES = 0.01
LARGEST = 3
"""Shapes: those of one weight with the most of them."""


def gemlite_layer(name: str, n: int, k: int, group_size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A layer, and the weight that it stands for, fp16."""
    from gemlite.core import DType, GemLiteLinear

    packed = random_packed(get_format(name), n, k, group_size, torch.device("cuda"))
    bits = packed.format.bits
    layer = GemLiteLinear(
        bits, group_size=group_size, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = unpack_codes(packed.qweight, packed.format, k)
    layer.pack(codes, packed.scale.reshape(-1, 1), packed.zero_point.reshape(-1, 1), None)
    return layer, dense(packed, torch.float16)


def humming_layer(name: str, n: int, k: int, group_size: int) -> tuple[torch.nn.Module, torch.Tensor | None]:
    """Likewise; it rounds a random weight itself and does not say to what, so that only the correlation is checked."""
    from humming.layer import HummingLayer

    config = {"dtype": f"u{name}", "group_size": group_size, "scale_dtype": "float16", "has_zero_point": True}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16).cuda()
    layer.load_from_unquantized(0.02 * torch.randn(n, k, dtype=torch.float16, device="cuda"))
    layer.transform()
    return layer, None


class ExllamaLayer(torch.nn.Module):
    """A trellis-coded linear of exllamav3 with random codes: as many bits as the format, 16 × 16 weights a tile."""

    def __init__(self, tensors: dict[str, torch.Tensor], in_features: int, out_features: int) -> None:
        from exllamav3.modules.quant.exl3 import LinearEXL3

        super().__init__()
        self._made = tensors, in_features, out_features
        self.linear = LinearEXL3(None, in_features, out_features, **tensors, out_dtype=torch.float16)

    def __deepcopy__(self, memo: dict) -> ExllamaLayer:
        """Elsewhere in memory; what its C++ half holds cannot be copied."""
        tensors, *shape = self._made
        return ExllamaLayer({name: tensor.clone() for name, tensor in tensors.items()}, *shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear.forward(x, {})


def exllamav3_layer(name: str, n: int, k: int, group_size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """Likewise; the weight is what the library itself makes of its codes. It has no groups."""
    bits = get_format(name).bits

    def signs(count: int) -> torch.Tensor:
        return torch.randint(0, 2, (count,), device="cuda").mul(2).sub(1).half()

    trellis = torch.randint(-(2**15), 2**15, (k // 16, n // 16, 16 * bits), dtype=torch.int16, device="cuda")
    layer = ExllamaLayer({"suh": signs(k), "svh": 0.02 * signs(n), "trellis": trellis}, k, n)
    return layer, layer.linear.get_weight_tensor().T.contiguous()


LAYERS: dict[str, Callable] = {"gemlite": gemlite_layer, "humming": humming_layer, "exllamav3": exllamav3_layer}


def measure(bench, shapes: list, group_size: int) -> dict:
    """{library: {"rows": [...]}, or {"left_out": the reason}}."""
    found = {}
    plain = sorted((s for s in shapes if len(s.out_features) == 1), key=lambda s: -s.out_features[0] * s.in_features)
    for name in LAYERS:
        if importlib.util.find_spec(name) is None:
            found[name] = {"left_out": "not installed"}
        elif bench.device.smoke:
            found[name] = {"left_out": "a smoke run has no GPU for it"}
        else:
            cases = [(fmt, shape) for shape in plain[:LARGEST] for fmt in FORMATS[name]]
            found[name] = {"rows": [r for fmt, shape in cases for r in rows(bench, name, fmt, shape, group_size)]}
    return found


def rows(bench, library: str, name: str, shape, group_size: int) -> list[dict]:
    """Times of one library, format and shape; a failure of any kind is its row."""
    case = {"shape": str(shape), "format": name}
    if bench.clock.left() < 0:
        return [{**case, "left_out": "no time left"}]
    found = attempt(bench.device, times, bench, library, name, shape, group_size)
    if isinstance(found, Failure):
        if found.broken:
            raise SystemExit(f"{library} took the GPU context along: {found.reason}")
        return [{**case, "left_out": found.reason}]
    return [{**case, **figures, "at": now()} for figures in found]


def times(bench, library: str, name: str, shape, group_size: int) -> list[dict]:
    n, k = shape.out_features[0], shape.in_features
    layer, weight = LAYERS[library](name, n, k, group_size)
    nbytes = get_format(name).stored_bytes(n, k, group_size)
    copies = [layer, *(copy.deepcopy(layer) for _ in range(bench.copies(nbytes) - 1))]
    found = []
    for m in ROWS:
        x = torch.randn(m, k, device="cuda").half()
        error = None
        if weight is not None:
            expected = torch.nn.functional.linear(x, weight).float()
            error = float((layer(x).float() - expected).norm() / expected.norm())
            if not error <= AGREES:
                found.append({"rows": m, "left_out": f"its product is wrong: relative error {error:.3g}"})
                continue
        timing = bench.device.time([lambda one=one, x=x: one(x) for one in copies], bench.launches(len(copies), m))
        gbps = ratio(nbytes / 1e3, timing.us, 1)
        base = bench.time_torch(shape, m).us
        found.append({"rows": m, **timing.fields(), "gbps": gbps, "share_of_copy": ratio(gbps, bench.copy),
                      "times_torch_fp16": ratio(base, timing.us), "error": error})  # fmt: skip
    return found
