"""GGUF, for llama.cpp: every linear in the smallest type that takes its codes as they are (`amq/export/gguf_types.py`).

llama.cpp's rotary positions of the llama family turn pairs of neighbouring rows where transformers turns rows half a
head apart, so that the rows of q and k are written in another order; rows of a packed weight move without rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.export.architecture import rotary, with_flat_rope
from amq.export.common import plain_config, stored_name
from amq.export.gguf_tokenizer import read_tokenizer
from amq.export.gguf_types import BLOCK, REQUANTIZED, TYPES, BlockType, decode, encode, find_type
from amq.model.shape import ModelShape, head_dim, kv_heads
from amq.packing import dequantize

FILE = "model.gguf"
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

FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
"""model_type → llama.cpp's name, and whether it wants the rows of q and k in its own order."""
ROPE_TYPES = ("default", "linear", "llama3")
FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class Plan:
    """A tensor of the file.

    source: its name in the checkpoint; a linear's without `.weight`. shape: of the weights, in transformers' order.
    type: in `gguf.GGMLQuantizationType`. kind: of a linear's codes, None where they cannot stay.
    order: int64 [rows], which row of the source comes next; None leaves them as they are.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: str
    kind: BlockType | None = None
    order: Tensor | None = None


@dataclass
class Tally:
    """What became of the tensors of one format: bits per weight and the error that was added."""

    tensors: int = 0
    numel: int = 0
    bits: int = 0
    own_bits: int = 0
    error: float = 0.0
    norm: float = 0.0

    def add(self, plan: Plan, exact: np.ndarray, data: np.ndarray, own_bytes: int) -> None:
        """exact: float32 weights of the checkpoint. data: their bytes in the file."""
        error = float(np.square(decode(data, plan.type) - exact, dtype=np.float64).sum())
        if not np.isfinite(error):
            raise AmqError(f"{plan.source} has numbers beyond the range of fp16, which GGUF's {plan.type} needs")
        self.tensors += 1
        self.numel += exact.size
        self.bits += 8 * data.nbytes
        self.own_bits += 8 * own_bytes
        self.error += error
        self.norm += float(np.square(exact, dtype=np.float64).sum())

    def phrase(self, note: str) -> str:
        bits, own_bits = self.bits / self.numel, self.own_bits / self.numel
        size = f"{self.tensors} tensors, {bits:.3f} bits per weight ({own_bits:.3f} in the checkpoint)"
        error = f"relative error added {(self.error / self.norm) ** 0.5:.1e}, {note}" if self.error else "exact"
        return f"{size}, {error}"


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """See `amq.export`. Refused: other families of models, rows that are not a multiple of 32, unknown tokenizers."""
    import gguf

    config = with_flat_rope(plain_config(checkpoint))
    check_family(config)
    plans = make_plans(checkpoint, config)
    tokenizer = read_tokenizer(checkpoint.folder, config["vocab_size"])
    tallies: dict[tuple[str, str, bool], Tally] = {}
    writer = gguf.GGUFWriter(folder / FILE, FAMILIES[config["model_type"]][0])
    _add_metadata(writer, config, checkpoint.folder.resolve().name, plans)
    tokenizer.add_to(writer)
    frequencies = rope_frequencies(config)
    if frequencies is not None:
        writer.add_tensor_info(FREQUENCIES, frequencies.shape, frequencies.dtype, frequencies.nbytes)
    for plan in plans:
        kind = gguf.GGMLQuantizationType[plan.type]
        shape = gguf.quant_shape_to_byte_shape(plan.shape, kind)
        writer.add_tensor_info(plan.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if frequencies is not None:
        writer.write_tensor_data(frequencies)
    for plan in plans:
        writer.write_tensor_data(_data(checkpoint, plan, tallies))
    writer.close()
    _check_written(folder / FILE, plans, [FREQUENCIES] if frequencies is not None else [])
    return _facts(tallies, config, (folder / FILE).stat().st_size)


def _check_written(path: Path, plans: list[Plan], more: list[str]) -> None:
    """Reads the file's header with gguf's own reader; raises AmqError unless it has all tensors, in their shapes."""
    import gguf

    expected = {plan.name: plan.shape for plan in plans}
    found = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in gguf.GGUFReader(path).tensors}
    odd = sorted(found.keys() ^ {*expected, *more}) + [n for n in expected if found.get(n, expected[n]) != expected[n]]
    if odd:
        raise AmqError(f"{path.name} was written with a wrong or missing tensor, {odd[0]}: report this")


def check_family(config: Mapping[str, Any]) -> None:
    """Raises AmqError for a model that llama.cpp would compute otherwise than transformers, or that we cannot name."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise AmqError(f"the gguf export knows the model types {', '.join(FAMILIES)}; this model is {kind!r}")
    if (rope := rotary(config).kind) not in ROPE_TYPES or (rope == "llama3" and not FAMILIES[kind][1]):
        raise AmqError(f"the gguf export cannot write rotary positions of type {rope!r} for {kind}")
    if (activation := config.get("hidden_act")) != "silu":
        raise AmqError(f"llama.cpp computes {kind} with the activation silu; this model has {activation!r}")


def make_plans(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[Plan]:
    """Every tensor of the file; reads zero points only. Raises AmqError for one that GGUF cannot hold."""
    import gguf

    family, reordered = FAMILIES[config["model_type"]]
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])

    def plan(source: str, full: str, shape: tuple[int, ...], type_: str, kind: BlockType | None = None) -> Plan:
        name = names.get_name(full, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise AmqError(f"llama.cpp's {family} has no place for {full}")
        return Plan(name, source, shape, type_, kind, row_order(full, shape[0], config) if reordered else None)

    plans = []
    for linear, (rows, columns) in checkpoint.record.shapes.items():
        if columns % BLOCK:
            raise AmqError(f"GGUF cannot hold {linear}: its {columns} input features are not a multiple of {BLOCK}")
        kind = find_type(checkpoint.packed(linear))
        full = f"{stored_name(checkpoint, linear)}.weight"
        plans.append(plan(linear, full, (rows, columns), kind.name if kind else REQUANTIZED, kind))
    for name in checkpoint.other_names:
        tensor = checkpoint.tensor(name)
        type_ = "F32" if tensor.ndim < 2 else "BF16" if tensor.dtype == torch.bfloat16 else "F16"
        plans.append(plan(name, name, tuple(tensor.shape), type_))
    return plans


def row_order(name: str, rows: int, config: Mapping[str, Any]) -> Tensor | None:
    """For q and k: within each head, row i of the first half and row i of the second half become neighbours."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": kv_heads(config)}.get(name.split(".")[-2])
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1) if heads else None


def rope_frequencies(config: Mapping[str, Any]) -> np.ndarray | None:
    """float32 [head_dim / 2]: what llama.cpp divides the rotary frequencies by, for Llama 3; None for other types."""
    rope, dim = rotary(config), head_dim(config)
    if rope.kind != "llama3":
        return None
    if dim is None:
        raise AmqError(
            "config.json gives neither head_dim nor hidden_size and heads, by which rotary positions are scaled"
        )
    scaling = rope.parameters
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelength
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - kept) / scaling["factor"] + kept)).astype(np.float32)


def _add_metadata(writer: Any, config: Mapping[str, Any], name: str, plans: list[Plan]) -> None:
    import gguf

    window = ModelShape.of(config).window
    context = config["max_position_embeddings"]
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(min(context, window) if window else context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(kv_heads(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config["rope_theta"])
    rope = rotary(config)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.parameters["factor"])
    usual = Counter(plan.type for plan in plans if len(plan.shape) > 1).most_common(1)[0][0]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{usual}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _data(checkpoint: Checkpoint, plan: Plan, tallies: dict[tuple[str, str, bool], Tally]) -> np.ndarray:
    """The bytes of a tensor, uint8; matrices are counted in `tallies` {(format, type, codes kept): …}."""
    import gguf

    record = checkpoint.record
    rows = slice(None) if plan.order is None else plan.order
    if plan.source in record.formats:
        packed = checkpoint.packed(plan.source).map(lambda part: part[rows])
        data, exact, own_bytes = encode(packed, plan.kind), dequantize(packed).numpy(), packed.nbytes
        key = (record.formats[plan.source], plan.type, plan.kind is not None)
    else:
        tensor = checkpoint.tensor(plan.source)[rows]
        exact, own_bytes = tensor.float().numpy(), tensor.numel() * tensor.element_size()
        data = gguf.quantize(exact, gguf.GGMLQuantizationType[plan.type]).view(np.uint8)
        key = (str(tensor.dtype).removeprefix("torch."), plan.type, True)
    if exact.ndim > 1:
        tallies.setdefault(key, Tally()).add(plan, exact, data, own_bytes)
    return np.ascontiguousarray(data)


def _facts(tallies: Mapping[tuple[str, str, bool], Tally], config: Mapping[str, Any], size: int) -> dict[str, Any]:
    facts: dict[str, Any] = {FILE: f"{size / 1e6:.1f} MB"}
    for (fmt, type_, kept), tally in sorted(tallies.items()):
        note = "rounding to fp16" if kept else "quantized again"
        facts[f"{fmt} → {type_}" + ("" if kept else " (no type holds its codes)")] = tally.phrase(note)
    with_minimum = {kind.name for kind in TYPES if kind.offset is None}
    if any(type_ in with_minimum for _, type_, _ in tallies):
        facts["smaller and exact"] = (
            "with `amq quantize --zero-points symmetric`: Q4_0 and Q5_0 instead of Q4_1 and Q5_1"
        )
    if window := ModelShape.of(config).window:
        facts["context"] = f"{window} positions, the model's sliding window, which llama.cpp's llama does not have"
    return facts
