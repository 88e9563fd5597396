"""A checkpoint of random weights in the shapes of a Llama: what both engines of engine.py open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import random_packed
from decode import Config
from torch import Tensor

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import write_checkpoint
from amq.formats import get_format
from amq.packing import PackedWeight

GROUP_SIZE = 128
HEAD, HEAD_FORMAT, EMBEDDING = "lm_head", "int6", "model.embed_tokens.weight"
ROLES = (("self_attn", ("q_proj", "k_proj", "v_proj"), ("o_proj",)), ("mlp", ("gate_proj", "up_proj"), ("down_proj",)))
"""Module, linears that share its input, and the last one."""


def write_random(
    folder: Path, sizes: Config, layers: int, context: int, formats: Sequence[str], where: torch.device
) -> Path:
    """Returns the folder. formats: that linears take in turn; the head is HEAD_FORMAT, the embedding float16. where:
    numbers are drawn."""
    record = _record(sizes, layers, formats)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16", "hidden_act": "silu",
        "vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden, "intermediate_size": sizes.intermediate,
        "num_hidden_layers": layers, "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.key_value_heads,
        "head_dim": sizes.head_features, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    write_checkpoint(folder, config, record, RandomWeights(record, where), dict(_others(sizes, layers, where)))
    return folder


def _record(sizes: Config, layers: int, formats: Sequence[str]) -> QuantizationRecord:
    shapes: dict[str, tuple[int, int]] = {}
    shared: list[tuple[str, ...]] = []
    projections = [(outputs, k) for outputs, k in sizes.roles.values()]
    for layer in range(layers):
        for at, (module, together, last) in enumerate(ROLES):
            for names, (outputs, k) in zip((together, last), projections[2 * at : 2 * at + 2], strict=True):
                full = tuple(f"model.layers.{layer}.{module}.{name}" for name in names)
                shapes |= {name: (n, k) for name, n in zip(full, outputs, strict=True)}
                shared += [full] * (len(full) > 1)
    chosen = {name: formats[(i + i // len(formats)) % len(formats)] for i, name in enumerate(shapes)}
    shapes[HEAD], chosen[HEAD] = (sizes.vocabulary, sizes.hidden), HEAD_FORMAT
    return QuantizationRecord(chosen, shapes, GROUP_SIZE, "random", tuple(shared), HEAD)


def _others(sizes: Config, layers: int, where: torch.device) -> Iterator[tuple[str, Tensor]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float16, device=where)

    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(layers) for n in ("input", "post_attention")]
    for name in (*norms, "model.norm.weight"):
        yield name, (1 + 0.1 * normal(sizes.hidden)).cpu()
    yield EMBEDDING, (0.02 * normal(sizes.vocabulary, sizes.hidden)).cpu()


class RandomWeights(Mapping[str, PackedWeight]):
    """Of `record`, made when asked for, so that a shard of a large model is held and no more. Those of one format and
    shape are copies of one: what matters of a weight's numbers shows in a few layers."""

    def __init__(self, record: QuantizationRecord, where: torch.device) -> None:
        self._record, self._where = record, where
        self._made: dict[tuple[str, tuple[int, int]], PackedWeight] = {}

    def __len__(self) -> int:
        return len(self._record.formats)

    def __iter__(self) -> Iterator[str]:
        return iter(self._record.formats)

    def __getitem__(self, name: str) -> PackedWeight:
        fmt, shape = self._record.formats[name], self._record.shapes[name]
        if (fmt, shape) not in self._made:
            self._made[fmt, shape] = random_packed(get_format(fmt), *shape, GROUP_SIZE, self._where).to("cpu")
        made = self._made[fmt, shape]
        parts = (made.qweight.clone(), made.scale.clone(), made.zero_point.clone())
        return replace(made, qweight=parts[0], scale=parts[1], zero_point=parts[2])
