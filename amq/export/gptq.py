"""GPTQ checkpoints: bits per module through `dynamic` rules, for gptqmodel; uniform ones also load in transformers.

Our codes are GPTQ's bitstream already: a linear's `qweight` is the same bytes as 32-bit words, transposed. Zero points
are whole numbers there. Format `gptq_v2` stores them as they are; `gptq`, the older one that more programs read, stores
them less one and is used where every group is symmetric.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint, write_tensors
from amq.errors import AmqError
from amq.export.common import (
    check_formats,
    check_full_groups,
    is_symmetric,
    other_tensors,
    packed_linears,
    plain_config,
    whole_zero_points,
)
from amq.formats import FORMATS, KEPT, get_format, get_stored
from amq.packing import PackedWeight, pack_codes
from amq.util.files import write_json

WORD_BITS = 32
BITS = (2, 3, 4, 8)
"""Bits per code of GPTQ's bitstream. GPTQModel keeps 5 and 6 bits too, but in planes, which nothing else reads."""

LOADING = """
## Loading

GPTQModel (`pip install gptqmodel`; on a machine without a GPU: `pip install --no-deps gptqmodel`, then
`pip install --no-deps pypcre tokenicer logbar device-smi defuser torchao`):

```python
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoTokenizer

model = GPTQModel.load("{folder}", backend=BACKEND.AUTO)  # BACKEND.GPTQ_TORCH on a CPU
tokenizer = AutoTokenizer.from_pretrained("{folder}")
ids = model.generate(**tokenizer("The capital of France is", return_tensors="pt").to(model.device), max_new_tokens=20)
print(tokenizer.decode(ids[0]))
```

transformers' own GPTQ path (through optimum) ignores `dynamic`: it loads this folder only where all linears have one
format.
"""


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """See `amq.export`. Refused: formats that are not of `BITS`, ragged groups, fractional zero points."""
    symmetric = check(checkpoint, BITS, "GPTQ")
    formats = checkpoint.record.formats
    base = commonest(formats)
    rules = dynamic_rules({**formats, **checkpoint.configuration.formats}, base)
    group_size = checkpoint.record.group_size
    settings = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "format": "gptq" if symmetric else "gptq_v2",
        "bits": bits(base),
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": rules,
    }
    write_tensors(folder, tensors(checkpoint, "GPTQ", less_one=symmetric))
    write_json(folder / "config.json", {**plain_config(checkpoint), "quantization_config": settings})
    write_json(folder / "quantize_config.json", settings)
    return {
        "zero points": "symmetric, format gptq" if symmetric else "asymmetric, format gptq_v2",
        "bits": f"{bits(base)} by default, {len(rules)} `dynamic` rules for the others",
        "extra error": "none: codes, scales and zero points are the same numbers",
    }


def check(checkpoint: Checkpoint, known: Collection[int], target: str) -> bool:
    """Refuses what GPTQ's layout cannot hold; returns whether every group of every linear is symmetric.

    known: the bits per code that `target` has.
    """
    check_formats(checkpoint, [f.name for f in FORMATS.values() if f.is_dense and f.code_bits in known], target)
    check_full_groups(checkpoint, target)
    for linear, (out_features, _) in checkpoint.record.shapes.items():
        if out_features % WORD_BITS:
            raise AmqError(
                f"{target} cannot hold {linear}: its {out_features} output features are not a multiple of "
                f"{WORD_BITS}, in which it packs zero points; use another export"
            )
    symmetric = True
    for linear, packed in packed_linears(checkpoint):
        whole_zero_points(linear, packed, target)
        symmetric = symmetric and is_symmetric(packed)
    return symmetric


def tensors(checkpoint: Checkpoint, target: str, less_one: bool, g_idx: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the export by name. less_one: zero points are stored less one. g_idx: with each input's group."""
    yield from other_tensors(checkpoint)
    for linear, packed in packed_linears(checkpoint):
        zero_point = whole_zero_points(linear, packed, target) - int(less_one)
        yield f"{linear}.qweight", words(packed.qweight).T
        yield f"{linear}.qzeros", words(pack_codes(zero_point.T.to(torch.uint8).contiguous(), packed.format))
        yield f"{linear}.scales", packed.scale.T
        if g_idx:
            yield f"{linear}.g_idx", group_index(packed)


def words(rows: Tensor) -> Tensor:
    """uint8 [rows, n] → the same bytes as little-endian int32 [rows, n/4]."""
    return torch.from_numpy(rows.contiguous().numpy().view("<i4").astype("i4", copy=False))


def group_index(packed: PackedWeight) -> Tensor:
    """int32 [in_features]: the group of every input feature."""
    return torch.arange(packed.in_features, dtype=torch.int32) // packed.group_size


def bits(fmt: str) -> int:
    """Bits per code of a dense format, by its name."""
    return get_format(fmt).bits


def commonest(formats: Mapping[str, str]) -> str:
    """The format that most linears have; the cheaper one of two."""
    counts = Counter(formats.values())
    return max(sorted(counts, key=lambda name: get_format(name).levels), key=counts.__getitem__)


def dynamic_rules(formats: Mapping[str, str], base: str) -> dict[str, dict[str, Any]]:
    """GPTQModel's `dynamic`: {`+:` and a regular expression of names: {"bits": n}} for all linears that are not `base`.

    Linears that are kept have `-:` and {}: GPTQModel leaves them alone. One rule holds the blocks whose linears of the
    same roles have one format.
    """
    blocks: dict[tuple[str, str, str], list[str]] = defaultdict(list)  # (format, before the number, after it) → numbers
    for name, fmt in formats.items():
        before, number, after = split_block(name)
        if fmt != base:
            blocks[fmt, before, after].append(number)
    roles: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (fmt, before, after), numbers in blocks.items():
        roles[fmt, before, tuple(numbers)].append(after)
    rules = {}
    for (fmt, before, among), afters in sorted(roles.items(), key=lambda item: get_stored(item[0][0]).code_bits):
        sign, settings = ("-", {}) if fmt == KEPT.name else ("+", {"bits": bits(fmt)})
        rules[f"{sign}:^{re.escape(before)}{_any(among)}{_any(afters)}$"] = settings
    return rules


def split_block(name: str) -> tuple[str, str, str]:
    """`model.layers.3.mlp.up_proj` → `model.layers.`, `3`, `.mlp.up_proj`; a name without a number → name, "", ""."""
    match = re.match(r"(.*?\.)(\d+)(\..*)", name)
    return (match[1], match[2], match[3]) if match else (name, "", "")


def _any(parts: Iterable[str]) -> str:
    escaped = [re.escape(part) for part in parts]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"
