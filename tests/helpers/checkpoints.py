"""Small quantized checkpoints for tests: every linear of a tiny model in one of the formats, by turns, from RTN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import write_checkpoint
from amq.formats import FORMATS
from amq.model.inventory import get_linear, take_inventory
from amq.quantize.quantizers import rtn
from helpers.tiny_models import byte_tokenizer

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def tiny_checkpoint(model: nn.Module, folder: Path, group_size: int = 32, head: str = "", **options: Any) -> Path:
    """Writes `model` quantized into `folder`, the head as the format `head`; `options` go to `write_checkpoint`."""
    packed, shapes, names = {}, {}, list(FORMATS)
    linears = take_inventory(model).linears
    for i, spec in enumerate(linears):
        fmt = FORMATS[names[i % len(names)]]
        packed[spec.name] = rtn.quantize([get_linear(model, spec.name).weight], [fmt], group_size)[0][fmt.name]
        shapes[spec.name] = (spec.out_features, spec.in_features)
    groups = [
        tuple(s.name for s in linears if s.block == block and s.name.rpartition(".")[2] in roles)
        for block in range(linears[-1].block + 1)
        for roles in SHARED
    ]
    embedding = {}
    if head:
        weight = model.get_output_embeddings().weight
        packed["lm_head"] = rtn.quantize([weight], [FORMATS[head]], group_size)[0][head]
        shapes["lm_head"] = tuple(weight.shape)
        embedding = {name.removesuffix(".weight"): "lm_head" for name in model.all_tied_weights_keys.values()}
    record = QuantizationRecord(
        {name: weight.format.name for name, weight in packed.items()}, shapes, group_size, "rtn",
        tuple(group for group in groups if len(group) > 1), "lm_head" if head else "", embedding,
    )  # fmt: skip
    left_out = {f"{name}.weight" for name in (*packed, *embedding)} | set(model.all_tied_weights_keys)
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}

    def extras(path: Path) -> None:
        byte_tokenizer().save_pretrained(path)
        model.generation_config.save_pretrained(path)

    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    write_checkpoint(folder, config, record, packed, others, extras, **options)
    return folder
