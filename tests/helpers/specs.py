"""Specs of the native engine beside the tensors of transformers' models, which are made without memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from amq.model.experts import unfuse
from amq.model.shape import ModelShape
from amq.runtime.decoder_spec import Array, DecoderSpec, Linear, Table
from amq.runtime.families import read_spec


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of everything that the spec reads."""
    found: dict[str, tuple[int, ...]] = {}
    for linear in spec.parts(Linear):
        found[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
        if linear.bias:
            found[f"{linear.name}.bias"] = (linear.out_features,)
    found |= {array.name: array.shape for array in spec.parts(Array) if array.name}
    return found | {f"{table.name}.weight": (table.rows, table.columns) for table in spec.parts(Table)}


def check(config: Any, auto: Any = AutoModelForCausalLM, written: Sequence[dict[str, Any]] = ()) -> tuple[str, ...]:
    """That the spec of a config has a place for every tensor of its model, and none for others.

    auto: the class that makes the model. written: what config.json may say of it; (): all that the model's config does.
    Returns the names of tensors that are not of the text model.
    """
    with torch.device("meta"):
        model = auto.from_config(config)
    unfuse(model)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    names = [name.removesuffix(".weight") for name in tensors]  # as a checkpoint gives those of its linears
    text: dict[str, tuple[int, ...]] = {}
    for said in written or (model.config.to_dict(),):
        spec = read_spec(json.loads(json.dumps(said)), "config.json", names)
        text = {name: shape for name, shape in tensors.items() if not name.startswith(spec.unread)}
        assert expected_shapes(spec) == text
        assert (spec.head.name == spec.embedding.name) == bool(tied)
        assert len(ModelShape.of(said).keeping) == spec.own_caches
    return tuple(tensors.keys() - text.keys())
