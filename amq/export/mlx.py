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
from amq.export.architecture import rotary, with_flat_rope
from amq.export.common import check_formats, formats_of, is_expert, outer_weights, plain_config, rows_of, stored_name
from amq.formats import FORMATS, n_groups
from amq.model.experts import COUNTS
from amq.model.shape import ModelShape, size
from amq.packing import PackedWeight
from amq.util.files import write_json

BITS = (2, 3, 4, 5, 6, 8)
"""Bits per code of MLX's affine mode."""
GROUP_SIZES = (32, 64, 128)
GROUP_BYTES = 8
"""Per group of MLX: scale and bias in float32."""
EXPERTS: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt_oss": (),
    "mixtral": ((".mlp.experts.", ".block_sparse_moe.switch_mlp."), (".mlp.gate.", ".block_sparse_moe.gate.")),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"), ((".mlp.experts.", ".mlp.switch_mlp."),)),
}
"""{model_type: (what, by what) in names}: of mixtures whose experts mlx-lm has in stacks of these names."""
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
    """See `amq.export`. Refused: formats that MLX lacks, input features that are not a multiple of 32, experts of a
    layer and role with several formats or of a class that mlx-lm has otherwise."""
    check_formats(checkpoint, [f.name for f in FORMATS.values() if f.is_dense and f.code_bits in BITS], "MLX")
    record, formats = checkpoint.record, formats_of(checkpoint)
    sizes = {linear: group_size(linear, shape[1], record.group_size) for linear, shape in record.shapes.items()}
    stacks = _stacks(checkpoint)
    modules = {
        name.removesuffix(".weight"): {"group_size": sizes[sources[0]], "bits": formats[sources[0]].bits}
        for name, sources in stacks.items()
        if sources[0] in formats
    }
    usual = Counter((m["group_size"], m["bits"]) for m in modules.values()).most_common(1)[0][0]
    config = _with_old_keys(with_flat_rope(plain_config(checkpoint)))
    config["quantization"] = {"group_size": usual[0], "bits": usual[1], **modules}
    write_tensors(folder, _tensors(checkpoint, stacks, sizes))
    write_json(folder / "config.json", config)
    return _facts(checkpoint, sizes, config)


def _with_old_keys(config: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's classes read two settings where they stood before transformers 5."""
    count, share = size(config, *COUNTS), rotary(config).parameters.get("partial_rotary_factor")
    found = ({"num_experts": count} if count else {}) | ({"partial_rotary_factor": share} if share else {})
    return {**found, **config}


def _stacks(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """{tensor as mlx-lm has it, experts without their number: its sources}: `amq.export.common.rows_of`."""
    record, rows, kind = checkpoint.record, rows_of(checkpoint), checkpoint.config.get("model_type")
    mixed = any(len(sources) > 1 for sources in rows.values())
    if mixed and kind not in EXPERTS:
        raise AmqError(
            f"the mlx export knows the experts of {', '.join(EXPERTS)}; of model type {kind!r} mlx-lm's names were not "
            "compared: use --to gguf"
        )
    for row, sources in rows.items():
        found = {record.formats.get(source, "16 bits") for source in sources}
        if len(found) > 1:
            raise AmqError(
                f"MLX has one tensor for all experts of {row.removesuffix('.weight')}, which have "
                f"{' and '.join(sorted(found))}: search and quantize again with `--tie experts`"
            )
    return {_renamed(row, EXPERTS.get(str(kind), ())): sources for row, sources in rows.items()}


def _renamed(name: str, changes: tuple[tuple[str, str], ...]) -> str:
    for what, by in changes:
        name = name.replace(what, by)
    return name


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


def _tensors(
    checkpoint: Checkpoint, stacks: dict[str, tuple[str, ...]], sizes: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for name, sources in stacks.items():
        expert = is_expert(sources[0])
        if sources[0] in checkpoint.record.formats:
            weights = [mlx_weight(checkpoint.packed(source), sizes[source]) for source in sources]
            for part in weights[0]:
                tensors = [weight[part] for weight in weights]
                yield f"{name.removesuffix('.weight')}.{part}", torch.stack(tensors) if expert else tensors[0]
            continue
        plain = [checkpoint.tensor(source) for source in sources]
        # a norm with 16-bit weights would round what it returns to them
        plain = [tensor.float() if tensor.ndim == 1 else tensor for tensor in plain]
        yield name, torch.stack(plain) if expert else plain[0]


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
    for name in outer_weights(checkpoint):
        facts[name] = f"{record.formats[name]}, exact like the others, as `{stored_name(checkpoint, name)}`"
    if cut := [linear for linear, size in sizes.items() if size != record.group_size]:
        facts["ragged groups"] = f"{len(cut)} linears, such as {cut[0]}, have groups of {sizes[cut[0]]} instead"
    if (kind := config.get("model_type")) not in CHECKED:
        facts["not checked"] = f"mlx-lm with model type {kind!r}: compare what it generates with `amq generate`"
    if window := ModelShape.of(config).window:
        facts["sliding window"] = (
            f"mlx-lm may read more than the {window} positions that this model was trained to read"
        )
    return facts
