"""GGUF, for llama.cpp: every linear in the smallest type that takes its codes as they are (`amq/export/gguf_types.py`).

llama.cpp's rotary positions of the llama family turn pairs of neighbouring rows where transformers turns rows half a
head apart, so that the rows of q and k are written in another order; rows of a packed weight move without rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.export.common import is_expert, plain_config
from amq.export.gguf_plans import Plan, make_plans, text_config
from amq.export.gguf_tokenizer import read_tokenizer
from amq.export.gguf_types import TYPES, decode, encode
from amq.model.gguf.families import Family, find_family, keys_of
from amq.model.gguf.rope_keys import rope_of, rope_tensors
from amq.model.shape import ModelShape
from amq.packing import PackedWeight, dequantize

FILE = "model.gguf"
NUMBERS_AT_ONCE = 1 << 22
"""Of a tensor: a head of 10⁹ weights takes 20 GB when it is encoded, and its error told, as a whole."""
LOADING = f"""
## Loading

Run `{FILE}` with [llama.cpp](https://github.com/ggml-org/llama.cpp) or what is built on it:

```
llama-cli -m {{folder}}/{FILE} -p "The capital of France is"
```

or in Python (`pip install llama-cpp-python`, which compiles it):

```python
from llama_cpp import Llama

print(Llama("{{folder}}/{FILE}")("The capital of France is", max_tokens=20)["choices"][0]["text"])
```"""


@dataclass
class Tally:
    """What became of the tensors of one format: bits per weight and the error that was added."""

    tensors: int = 0
    numel: int = 0
    bits: int = 0
    own_bits: int = 0
    error: float = 0.0
    norm: float = 0.0

    def add(self, plan: Plan, exact: np.ndarray, data: np.ndarray) -> None:
        """Counts rows of a tensor. exact: float32 weights of the checkpoint. data: their bytes in the file."""
        error = float(np.square(decode(data, plan.type) - exact, dtype=np.float64).sum())
        if not np.isfinite(error):
            raise AmqError(f"{plan.source} has numbers beyond the range of fp16, which GGUF's {plan.type} needs")
        self.numel += exact.size
        self.bits += 8 * data.nbytes
        self.error += error
        self.norm += float(np.square(exact, dtype=np.float64).sum())

    def phrase(self, note: str) -> str:
        bits, own_bits = self.bits / self.numel, self.own_bits / self.numel
        size = f"{self.tensors} tensors, {bits:.3f} bits per weight ({own_bits:.3f} in the checkpoint)"
        error = f"relative error added {(self.error / self.norm) ** 0.5:.1e}, {note}" if self.error else "exact"
        return f"{size}, {error}"


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """See `amq.export`; of a model that also reads images, the text model.

    Refused: other families of models, rows that are not a multiple of 32, unknown tokenizers.
    """
    import gguf

    config = text_config(plain_config(checkpoint))
    family = find_family(config)
    plans = make_plans(checkpoint, config, family)
    tokenizer = read_tokenizer(checkpoint.folder, config["vocab_size"])
    tallies: dict[tuple[str, str, bool], Tally] = {}
    writer = gguf.GGUFWriter(folder / FILE, family.arch)
    _add_metadata(writer, config, family, checkpoint.folder.resolve().name, plans)
    tokenizer.add_to(writer)
    factors = rope_tensors(config)
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for plan in plans:
        kind = gguf.GGMLQuantizationType[plan.type]
        shape = gguf.quant_shape_to_byte_shape(plan.shape, kind)
        writer.add_tensor_info(plan.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in factors.values():
        writer.write_tensor_data(values)
    for plan in plans:
        writer.write_tensor_data(_data(checkpoint, plan, tallies))
    writer.close()
    _check_written(folder / FILE, plans, list(factors))
    facts = _facts(tallies, config, family, (folder / FILE).stat().st_size)
    taken = {source for plan in plans for source in plan.sources}
    if left := len({*checkpoint.record.formats, *checkpoint.other_names} - taken):
        facts["left out"] = f"{left} tensors that are not of the text model: encoders of images, heads of later tokens"
    return facts


def _check_written(path: Path, plans: list[Plan], more: list[str]) -> None:
    """Reads the file's header with gguf's own reader; raises AmqError unless it has all tensors, in their shapes."""
    import gguf

    expected = {plan.name: plan.shape for plan in plans}
    found = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in gguf.GGUFReader(path).tensors}
    odd = sorted(found.keys() ^ {*expected, *more}) + [n for n in expected if found.get(n, expected[n]) != expected[n]]
    if odd:
        raise AmqError(f"{path.name} was written with a wrong or missing tensor, {odd[0]}: report this")


def _add_metadata(writer: Any, config: Mapping[str, Any], family: Family, name: str, plans: list[Plan]) -> None:
    import gguf

    writer.add_name(name)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys_of(config, family).items():
        add = writer.add_array if isinstance(value, list) else adders[type(value)]
        add(f"{family.arch}.{key}", value)
    usual = Counter(plan.type for plan in plans if len(plan.shape) > 1).most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if usual == "F32" else f"MOSTLY_{usual}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _data(checkpoint: Checkpoint, plan: Plan, tallies: dict[tuple[str, str, bool], Tally]) -> np.ndarray:
    """The bytes of a tensor, uint8; matrices are counted in `tallies` {(format, type, codes kept): …}."""
    parts = [_part(checkpoint, plan, source, tallies) for source in plan.sources]
    return np.stack(parts) if is_expert(plan.source) else parts[0]


def _part(checkpoint: Checkpoint, plan: Plan, source: str, tallies: dict[tuple[str, str, bool], Tally]) -> np.ndarray:
    """Those of one source, made of NUMBERS_AT_ONCE of its numbers at a time."""
    rows = slice(None) if plan.order is None else plan.order
    weight: PackedWeight | Tensor
    shape: tuple[int, ...]
    if plan.packed:
        weight = checkpoint.packed(source).map(lambda part: part[rows])
        shape, own_bytes = (weight.out_features, weight.in_features), weight.nbytes
        key = (checkpoint.record.formats[source], plan.type, plan.kind is not None)
    else:
        weight = checkpoint.tensor(source)[rows]
        weight = plan.make(weight) if plan.make else weight
        shape, own_bytes = tuple(weight.shape), weight.numel() * weight.element_size()
        key = (str(weight.dtype).removeprefix("torch."), plan.type, True)
    parts = []
    step = max(1, NUMBERS_AT_ONCE * shape[0] // math.prod(shape))
    for start in range(0, shape[0], step):
        exact, data = _encoded(weight, plan, slice(start, start + step))
        if len(shape) > 1:
            tallies.setdefault(key, Tally()).add(plan, exact, data)
        parts.append(data if plan.blocks is None else _moved(data, plan.blocks))
    if len(shape) > 1:
        tallies[key].tensors += 1
        tallies[key].own_bits += 8 * own_bytes
    return np.ascontiguousarray(np.concatenate(parts) if len(parts) > 1 else parts[0])


def _encoded(weight: PackedWeight | Tensor, plan: Plan, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """(float32 weights, their bytes in the file) of some rows."""
    import gguf

    if isinstance(weight, PackedWeight):
        packed = weight.map(lambda part: part[rows])
        return dequantize(packed).numpy(), encode(packed, plan.kind)
    exact = weight[rows].float().numpy()
    return exact, gguf.quantize(exact, gguf.GGMLQuantizationType[plan.type]).view(np.uint8)


def _moved(rows: np.ndarray, order: Tensor) -> np.ndarray:
    """Blocks of every row, of numbers or of bytes, in another order."""
    return np.ascontiguousarray(rows.reshape(len(rows), len(order), -1)[:, order.numpy()].reshape(rows.shape))


def _facts(
    tallies: Mapping[tuple[str, str, bool], Tally], config: Mapping[str, Any], family: Family, size: int
) -> dict[str, Any]:
    facts: dict[str, Any] = {FILE: f"{size / 1e6:.1f} MB"}
    for (fmt, type_, kept), tally in sorted(tallies.items()):
        note = "rounding to fp16" if kept else "quantized again"
        facts[f"{fmt} → {type_}" + ("" if kept else " (no type holds its codes)")] = tally.phrase(note)
    with_minimum = {kind.name for kind in TYPES if kind.offset is None}
    if any(type_ in with_minimum for _, type_, _ in tallies):
        facts["smaller and exact"] = (
            "with `amq quantize --zero-points symmetric`: Q4_0 and Q5_0 instead of Q4_1 and Q5_1"
        )
    if not family.windows and (window := ModelShape.of(config).window):
        facts["context"] = f"{window} positions, the model's sliding window, which llama.cpp's {family.arch} has not"
    if rope_of(config).parameters.get("truncate") is False:
        facts["rotary positions"] = (
            "yarn with whole bounds in llama.cpp, which this model has not: slightly other angles"
        )
    return facts
