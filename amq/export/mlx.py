"""MLX safetensors, for mlx-lm: our packed rows are MLX's, so the codes are copied and nothing is rounded again.

MLX has w = code·scale + bias. With bias = −zero_point·scale and both in float32 that is our weight: a product of two
fp16 numbers has at most 22 significant bits, so that a fractional zero point stays exact. In fp16 the bias would be
rounded, which costs up to 2^−11 of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint, write_tensors
from amq.errors import AmqError
from amq.export.architecture import with_flat_rope
from amq.export.common import check_formats, formats_of, other_tensors, packed_linears, plain_config, stored_name
from amq.formats import FORMATS, n_groups
from amq.model.shape import ModelShape
from amq.packing import PackedWeight
from amq.util.files import write_json

BITS = (2, 3, 4, 5, 6, 8)
"""Bits per code of MLX's affine mode."""
GROUP_SIZES = (32, 64, 128)
GROUP_BYTES = 8
"""Per group of MLX: scale and bias in float32."""
CHECKED = ("gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Model types whose export was loaded with mlx-lm and compared (benchmarks/export_matrix.py)."""

LOADING = """
## Loading

With [mlx-lm](https://pypi.org/project/mlx-lm) (`pip install mlx-lm`; on Linux also `mlx-cpu`):

```python
from mlx_lm import generate, load

model, tokenizer = load("{folder}")
print(generate(model, tokenizer, prompt="The capital of France is"))
```

Scales and biases are float32, which makes the weights exact, and activations float32 too."""


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """See `amq.export`. Refused: formats that MLX lacks, input features that are not a multiple of 32."""
    check_formats(checkpoint, [f.name for f in FORMATS.values() if f.is_dense and f.code_bits in BITS], "MLX")
    record, formats = checkpoint.record, formats_of(checkpoint)
    sizes = {linear: group_size(linear, shape[1], record.group_size) for linear, shape in record.shapes.items()}
    modules = {stored_name(checkpoint, n): {"group_size": sizes[n], "bits": fmt.bits} for n, fmt in formats.items()}
    usual = Counter((m["group_size"], m["bits"]) for m in modules.values()).most_common(1)[0][0]
    config = with_flat_rope(plain_config(checkpoint))
    config["quantization"] = {"group_size": usual[0], "bits": usual[1], **modules}
    write_tensors(folder, _tensors(checkpoint, sizes))
    write_json(folder / "config.json", config)
    return _facts(checkpoint, sizes, config)


def group_size(linear: str, in_features: int, ours: int) -> int:
    """The largest group that divides ours and the row: where the last group is ragged, groups are cut into smaller ones
    that repeat its scale and bias."""
    size = gcd(in_features, ours)
    if size not in GROUP_SIZES:
        raise AmqError(
            f"MLX cannot hold {linear}: its {in_features} input features are not a multiple of {min(GROUP_SIZES)}; "
            "no group size of MLX fits them"
        )
    return size


def mlx_weight(packed: PackedWeight, size: int) -> dict[str, Tensor]:
    """`weight` uint32 [out_features, in_features·bits/32], `scales` and `biases` float32 [out_features, groups]."""
    repeats, groups = packed.group_size // size, packed.in_features // size
    scale, zero_point = (
        t.float().repeat_interleave(repeats, dim=1)[:, :groups] for t in (packed.scale, packed.zero_point)
    )
    words = packed.qweight.contiguous().view(torch.int32).view(torch.uint32)
    return {"weight": words, "scales": scale, "biases": -zero_point * scale}


def _tensors(checkpoint: Checkpoint, sizes: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    for linear, packed in packed_linears(checkpoint):
        for part, tensor in mlx_weight(packed, sizes[linear]).items():
            yield f"{stored_name(checkpoint, linear)}.{part}", tensor
    for name, tensor in other_tensors(checkpoint):  # a norm with 16-bit weights would round what it returns to them
        yield name, tensor.float() if tensor.ndim == 1 else tensor


def _facts(checkpoint: Checkpoint, sizes: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    record, formats = checkpoint.record, formats_of(checkpoint)
    numel = theirs = ours = 0
    for linear, (rows, columns) in record.block_shapes.items():
        numel += rows * columns
        ours += formats[linear].stored_bytes(rows, columns, record.group_size)
        theirs += rows * (formats[linear].row_bytes(columns) + n_groups(columns, sizes[linear]) * GROUP_BYTES)
    facts = {
        "weights": "the checkpoint's own, exact: codes copied, bias = −zero_point·scale in float32",
        "bits per weight": f"{8 * theirs / numel:.3f} ({8 * ours / numel:.3f} in the checkpoint, with fp16 scales)",
    }
    if record.head:
        facts[record.head] = (
            f"{record.formats[record.head]}, exact like the others, as `{stored_name(checkpoint, record.head)}`"
        )
    if cut := [linear for linear, size in sizes.items() if size != record.group_size]:
        facts["ragged groups"] = f"{len(cut)} linears, such as {cut[0]}, have groups of {sizes[cut[0]]} instead"
    if (kind := config.get("model_type")) not in CHECKED:
        facts["not checked"] = f"mlx-lm with model type {kind!r}: compare what it generates with `amq generate`"
    if window := ModelShape.of(config).window:
        facts["sliding window"] = (
            f"mlx-lm may read more than the {window} positions that this model was trained to read"
        )
    return facts
