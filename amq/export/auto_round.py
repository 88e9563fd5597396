"""AutoRound checkpoints: bits per linear in `extra_config`, loaded by transformers through the auto-round package.

The tensors are GPTQ's (`amq/export/gptq.py`). Symmetric checkpoints are written as `auto_round:auto_gptq`, the packing
that vLLM reads too; asymmetric ones as `auto_round`, which keeps whole zero points as they are.

vLLM multiplies q, k, v and gate, up in one call and wants one format within each such group; transformers does not
care. So a checkpoint whose groups mix formats is written, and said to be out of vLLM's reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amq.checkpoint.store import Checkpoint, write_tensors
from amq.export.common import plain_config
from amq.export.gptq import bits, check, commonest, split_block, tensors
from amq.formats import KEPT
from amq.util.files import write_json

BITS = (2, 3, 4, 5, 6, 8)
"""Bits per code of auto-round's torch kernel."""
VLLM_BITS = (4, 8)
"""Bits per code that vLLM loads, symmetric, on CUDA (its `inc_wna16_linear.py` of 2026; earlier ones had 2 and 3)."""

LEFT_ALONE = {"bits": int(KEPT.code_bits), "data_type": "float"}
"""What AutoRound says of a linear that is not quantized."""

LOADING = """
## Loading

transformers with auto-round (`pip install auto-round`; into an environment that has torch and transformers:
`pip install --no-deps auto-round py-cpuinfo`):

```python
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer

settings = AutoRoundConfig(backend="torch")  # exact; without it auto-round chooses
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="bfloat16", quantization_config=settings)
tokenizer = AutoTokenizer.from_pretrained("{folder}")
ids = model.generate(**tokenizer("The capital of France is", return_tensors="pt").to(model.device), max_new_tokens=20)
print(tokenizer.decode(ids[0]))
```

Where the package auto-round-lib is installed, auto-round takes its CPU kernels by itself. They are less
exact: 0.6 % off in each linear's output (version 0.16.0, at 2 and 4 bits), which a model at 2 bits amplifies. The torch
backend multiplies by the very weights of the checkpoint.
"""


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """See `amq.export`. Refused: formats that are not of `BITS`, ragged groups, fractional zero points."""
    symmetric = check(checkpoint, BITS, "AutoRound")
    record = checkpoint.record
    base = commonest(record.formats)
    blocks = sorted({split_block(name)[0].rstrip(".") for name in record.formats})
    others: dict[str, Mapping[str, object]] = {
        name: {"bits": bits(fmt)} for name, fmt in record.formats.items() if fmt != base
    }
    others |= dict.fromkeys(record.kept, LEFT_ALONE)
    settings = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round",
        "bits": bits(base),
        "group_size": record.group_size,
        "sym": symmetric,
        "data_type": "int",
        "block_name_to_quantize": ",".join(blocks),
        "extra_config": others,
    }
    write_tensors(folder, tensors(checkpoint, "AutoRound", less_one=symmetric, g_idx=False))
    write_json(folder / "config.json", {**plain_config(checkpoint), "quantization_config": settings})
    write_json(folder / "quantization_config.json", settings)
    obstacles = vllm_obstacles(checkpoint, symmetric)
    return {
        "zero points": f"{'symmetric' if symmetric else 'asymmetric'}, packing {settings['packing_format']}",
        "bits": f"{bits(base)} by default, {len(others)} linears in `extra_config`",
        "extra error": "none: codes, scales and zero points are the same numbers",
        "vLLM": "not possible: " + "; ".join(obstacles) if obstacles else "nothing in the folder stands against it",
    }


def vllm_obstacles(checkpoint: Checkpoint, symmetric: bool) -> list[str]:
    """Why vLLM cannot load the export, each with the remedy; empty when it can."""
    record = checkpoint.record
    reasons = [] if symmetric else ["it wants symmetric groups (`python -m amq.quantize … --zero-points symmetric`)"]
    odd = sorted({fmt for fmt in record.formats.values() if bits(fmt) not in VLLM_BITS})
    if odd:
        known = " and ".join(map(str, VLLM_BITS))
        reasons.append(f"its AutoRound loader has kernels for {known} bits only, and not for {', '.join(odd)}")
    mixed = [group for group in record.shared_inputs if len({record.formats[name] for name in group}) > 1]
    if mixed:
        group = ", ".join(f"{name} {record.formats[name]}" for name in mixed[0])
        reasons.append(
            f"it multiplies linears with one input in one call, and {len(mixed)} such groups mix formats ({group}): "
            "search with `amq.search --tie qkv,gate_up`"
        )
    return reasons
