"""Every family of our engines without weights: the spec of transformers' default config has a place for every tensor of
the model, and none for others; and what a family cannot compute it refuses by the config alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from amq.model.experts import unfuse
from amq.runtime.decoder_spec import Array, DecoderSpec, Linear, Table
from amq.runtime.families import FAMILIES, read_spec

WRAPPED = {
    "gemma3": ("Gemma3Config", {}),
    "gemma4": ("Gemma4Config", {"vision_config": {}, "audio_config": {}}),
    "mistral3": ("Mistral3Config", {}),
    "mistral3 of a ministral3": ("Mistral3Config", {"text_config": {"model_type": "ministral3"}}),
}
"""{name: (config with a text model inside, options)}."""
SIZES = {"ministral": {"head_dim": 128}}
"""{model_type: options that its default config lacks}."""
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma4_text shared": {"num_kv_shared_layers": 20, "use_double_wide_mlp": True},
    "gemma4_text experts": {
        "enable_moe_block": True, "num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 704,
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 2,
    },
    "llama biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "smollm3 biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "arcee biases": {"attention_bias": True, "mlp_bias": True},
    "olmo2 biases": {"attention_bias": True},
    "gemma2 biases": {"attention_bias": True, "tie_word_embeddings": False},
    "gemma3_text biases": {"attention_bias": True},
    "gemma4_text biases": {"attention_bias": True, "num_kv_shared_layers": 10},
}  # fmt: skip
"""{model_type and what is special: options over the default config}."""


def expected_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of everything that the spec reads."""
    found: dict[str, tuple[int, ...]] = {}
    for linear in spec.parts(Linear):
        found[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
        if linear.bias:
            found[f"{linear.name}.bias"] = (linear.out_features,)
    found |= {array.name: array.shape for array in spec.parts(Array) if array.name}
    return found | {f"{table.name}.weight": (table.rows, table.columns) for table in spec.parts(Table)}


def check(config: Any) -> None:
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto.from_config(config)
    unfuse(model)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}
    spec = read_spec(model.config.to_dict(), "config.json", [linear_name(name) for name in tensors])
    text = {name: shape for name, shape in tensors.items() if not name.startswith(spec.unread)}
    assert expected_shapes(spec) == text
    assert (spec.head.name == spec.embedding.name) == bool(tied)
    assert tensors.keys() - text.keys() or not hasattr(config, "vision_config")


def linear_name(tensor: str) -> str:
    """As a checkpoint's names are given: of linears, and of other tensors."""
    return tensor.removesuffix(".weight")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_default_config_of(kind: str) -> None:
    check(CONFIG_MAPPING[kind](**SIZES.get(kind, {})))


@pytest.mark.parametrize("kind", OPTIONS)
def test_other_tensors_of(kind: str) -> None:
    check(CONFIG_MAPPING[kind.split()[0]](**OPTIONS[kind]))


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_text_model_inside_of(kind: str) -> None:
    name, options = WRAPPED[kind]
    check(getattr(transformers, name)(**options))
