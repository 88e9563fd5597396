"""Small quantized checkpoints for tests: every linear of a tiny model in one of the formats, by turns, from RTN."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import write_checkpoint
from amq.formats import FORMATS
from amq.model.inventory import EMBEDDING, HEAD, get_weight, take_inventory
from amq.quantize.quantizers import rtn
from amq.rotation import WIDTH, divides, rotate
from helpers.tiny_models import byte_tokenizer

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def tiny_checkpoint(
    model: nn.Module,
    folder: Path,
    group_size: int = 32,
    head: str = "",
    embeddings: str = "",
    kept: str = "",
    rotated: str = "",
    formats: Mapping[str, str] = MappingProxyType({}),
    zero_points: str = "fractional",
    **options: Any,
) -> Path:
    """Writes `model` quantized into `folder`.

    head: the head's format. embeddings: that of embeddings which are tied to no head. kept: linears whose names match
    this pattern stay in 16 bits. rotated: those whose names match this one are rotated, where 64 divides their inputs.
    formats: {linear: format}, where not every linear takes its turn.
    zero_points: see `rtn.quantize`. options: of `write_checkpoint`.
    """
    packed, shapes, names = {}, {}, list(FORMATS)
    inventory = take_inventory(model)
    linears = [s for s in inventory.linears if not (kept and re.search(kept, s.name))]
    chosen = {s.name: names[i % len(names)] for i, s in enumerate(linears)} | dict(formats)
    chosen |= {s.name: embeddings if s.kind == EMBEDDING else head for s in inventory.outer}
    weights = [s for s in (*linears, *inventory.outer) if chosen[s.name]]
    for spec in weights:
        fmt, weight = FORMATS[chosen[spec.name]], get_weight(model, spec.name)
        rotates = rotated and spec in linears and re.search(rotated, spec.name) and divides(spec.in_features)
        weight = rotate(weight) if rotates else weight
        found = rtn.quantize([weight], [fmt], group_size, None, zero_points)[0][fmt.name]
        packed[spec.name] = replace(found, rotation=WIDTH if rotates else 0)
        shapes[spec.name] = (spec.out_features, spec.in_features)
    groups = [
        tuple(s.name for s in linears if s.block == block and s.role.rpartition(".")[2] in roles and s.expert == expert)
        for block in range(linears[-1].block + 1)
        for roles in SHARED
        for expert in sorted({s.expert for s in linears}, key=str)
    ]
    heads = {s.name: s.tied for s in weights if s.kind == HEAD}
    embedding = {tied: name for name, tied in heads.items() if tied}
    embedding |= {s.name: s.name for s in weights if s.kind == EMBEDDING}
    record = QuantizationRecord(
        {name: weight.format.name for name, weight in packed.items()}, shapes, group_size, "rtn",
        tuple(group for group in groups if len(group) > 1), next(iter(heads), ""), embedding,
        {s.name: (s.out_features, s.in_features) for s in inventory.linears if s not in linears},
        {name: weight.rotation for name, weight in packed.items() if weight.rotation},
    )  # fmt: skip
    left_out = {f"{name}.weight" for name in (*packed, *embedding)} | set(model.all_tied_weights_keys)
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}

    def extras(path: Path) -> None:
        byte_tokenizer().save_pretrained(path)
        model.generation_config.save_pretrained(path)

    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    write_checkpoint(folder, config, record, packed, others, extras, **options)
    return folder


def advise(folder: Path, cache: Mapping[str, Any]) -> None:
    """Lets config.json say how a runtime is to keep keys and values: {layers: kind}."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["cache"] = cache
    path.write_text(json.dumps(config))
