"""Every family of our engines without weights: the spec of transformers' default config has a place for every tensor of
the model, and none for others; and what a family cannot compute it refuses by the config alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from helpers.specs import check
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from amq.errors import AmqError
from amq.runtime.decoder_spec import Attention, Mixture, Mlp
from amq.runtime.families import FAMILIES, Unsupported, read_spec

WRAPPED = {
    "gemma3": ("Gemma3Config", {}),
    "gemma4": ("Gemma4Config", {"vision_config": {}, "audio_config": {}}),
    "mistral3": ("Mistral3Config", {}),
    "qwen3_5": ("Qwen3_5Config", {}),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", {"text_config": {"num_hidden_layers": 4}}),
    "mistral3 of a ministral3": ("Mistral3Config", {"text_config": {"model_type": "ministral3"}}),
}
"""{name: (config with a text model inside, options)}."""
SIZES: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 128},
    **{kind: {"num_hidden_layers": 4} for kind in ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss")},
    "glm4_moe": {"num_hidden_layers": 4, "head_dim": 128},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": ["attention"] * 4},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen3_5_moe": {"text_config": {"num_hidden_layers": 4}},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
}
"""{model_type: what its default config lacks, and fewer layers where each has hundreds of experts}."""
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
    "qwen3_moe dense layers": {"decoder_sparse_step": 2, "attention_bias": True},
    "qwen2_moe dense layers": {"mlp_only_layers": [0, 2], "qkv_bias": False},
    "olmoe biases": {"attention_bias": True},
    "gpt_oss without biases": {"attention_bias": False},
    "glm4_moe norms": {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2},
    "granite biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "granitemoehybrid dense": {"num_local_experts": 0},
}  # fmt: skip
"""{model_type and what is special: options over the default config}."""


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_default_config_of(kind: str) -> None:
    assert not check(CONFIG_MAPPING[kind](**SIZES.get(kind, {})))


@pytest.mark.parametrize("kind", OPTIONS)
def test_other_tensors_of(kind: str) -> None:
    name = kind.split()[0]
    assert not check(CONFIG_MAPPING[name](**{**SIZES.get(name, {}), **OPTIONS[kind]}))


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_text_model_inside_of(kind: str) -> None:
    name, options = WRAPPED[kind]
    assert check(getattr(transformers, name)(**options), AutoModelForImageTextToText)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("gpt2", {}, "not gpt2"),
    "both ways, gemma": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "both ways, gemma 2": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "both ways, gemma 3": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "both ways, gemma 4": ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    "activation": ("gemma3_text", {"hidden_activation": "gelu"}, "no activation gelu"),
    "no activation said": ("gemma2", {"hidden_activation": None}, "does not say hidden_activation"),
    "relu² with a gate": ("llama", {"hidden_act": "relu2"}, "relu2 behind a gate"),
    "silu without a gate": ("arcee", {"hidden_act": "silu"}, "silu without a gate"),
    "a kind of layer": ("gemma2", {"layer_types": ["chunked_attention"] * 26}, "no layers of type chunked_attention"),
    "no window said": ("gemma3_text", {"sliding_window": None}, "does not say sliding_window"),
    "no scalar said": ("gemma2", {"query_pre_attn_scalar": None}, "does not say query_pre_attn_scalar"),
    "layers of their own sizes": ("llama", {"per_layer_config": {"1": {"head_dim": 32}}}, "per_layer_config"),
    "other keys of a layer": ("gemma4_text", {"per_layer_config": {"05": {"skip": ["mlp"]}}}, "skip of single layers"),
    "a layer unlike its kind": ("gemma4_text", {"per_layer_config": {"05": {"head_dim": 128}}}, "of one type"),
    "no heads of full layers": ("gemma4_text", {"per_layer_config": None}, "neither per_layer_config nor global"),
    "a last layer with a window": (
        "gemma4_text", {"layer_types": ["sliding_attention"] * 30}, "last layer of type sliding_attention",
    ),
    "fewer inputs per layer": ("gemma4_text", {"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input"),
    "experts without sizes": ("gemma4_text", {"enable_moe_block": True}, "num_experts"),
    "no scale of queries": (
        "ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "llama_4_scaling_beta",
    ),
    "a part of heads": (
        "olmo2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "one embedding for two kinds": (
        "gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "of full_attention layers",
    ),
    "a part of heads of a mixture": ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "tokens that see later ones": ("qwen3", {"is_causal": False}, "is_causal"),
    "wide heads": ("llama", {"head_dim": 1024}, "up to 512, these have 1024"),
    "another key of norms": ("llama", {"rms_norm_eps": None, "norm_eps": 1e-5}, "does not say rms_norm_eps"),
    "convolutions over one position": ("lfm2", {"conv_L_cache": 1}, "two positions or more"),
    "dynamic angles": (
        "phi3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "kind dynamic",
    ),
    "layers of Mamba": ("granitemoehybrid", {"layer_types": ["mamba"] * 4}, "no layers of type mamba"),
    "clipped queries": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    "another gain": ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha of 1.702, not 1.0"),
    "no limit said": ("gpt_oss", {"swiglu_limit": None}, "does not say swiglu_limit"),
    "a part of heads unsaid": (
        "glm4_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "partial_rotary_factor",
    ),
    "no number of experts": ("mixtral", {"num_local_experts": None}, "any of num_experts, num_local_experts"),
    "no number of chosen experts": ("olmoe", {"num_experts_per_tok": None}, "does not say num_experts_per_tok"),
    "windows of no layer": ("qwen2_moe", {"use_sliding_window": True, "layer_types": None}, "layer_types"),
    "halves within a tile": ("granitemoehybrid", {"shared_intermediate_size": 1000}, "shared_intermediate_size"),
    "no layers said to have angles": ("smollm3", {"no_rope_layers": None}, "does not say no_rope_layers"),
}  # fmt: skip
"""{what: (model_type, what its default config says instead, what the message names)}."""
DAMAGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a softcap of nothing": ("gemma2", {"attn_logit_softcapping": 0.0}, "expected attn_logit_softcapping from"),
    "words for numbers": ("gemma3_text", {"query_pre_attn_scalar": "much"}, "query_pre_attn_scalar"),
    "too few kinds": ("gemma2", {"layer_types": ["full_attention"]}, "expected layer_types of all 26"),
    "too many layers": ("olmo2", {"num_hidden_layers": 2**30}, "expected num_hidden_layers from 1 to 65536"),
    "heads without end": ("llama", {"head_dim": 2**30}, "expected heads of at most 65536 features"),
    "experts without end": ("qwen3_moe", {"num_experts": 2**30}, "expected at most 65536 experts, got 1073741824 in"),
    "experts without end, Gemma": ("gemma4_text", {"num_experts": 2**20}, "expected at most 65536 experts"),
    "all layers shared": ("gemma4_text", {"num_kv_shared_layers": 30}, "num_kv_shared_layers below num_hidden_layers"),
    "nothing to share": ("gemma4_text", {"num_kv_shared_layers": 26}, "none of which is of type full_attention"),
    "a layer that is none": ("gemma4_text", {"per_layer_config": {"30": {"head_dim": 32}}}, "expected one below 30"),
    "a layer without number": ("gemma4_text", {"per_layer_config": {"first": {}}}, "expected one below 30"),
    "heads that are none": ("gemma4_text", {"per_layer_config": {"05": {"head_dim": 0}}}, "expected head_dim from 1"),
    "heads that do not fit": (
        "gemma4_text",
        {"per_layer_config": {f"{layer:02d}": {"num_key_value_heads": 3} for layer in range(5, 30, 6)}},
        "expected a divisor of num_attention_heads 8",
    ),
    "more experts than there are": (
        "gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5}, "top_k_experts of at most 4",
    ),
    "more experts chosen than there are": (
        "qwen3_moe", {"num_experts_per_tok": 129}, "to 129 experts, expected 1 to 128",
    ),
    "more experts than chosen groups have": (
        "glm4_moe", {"n_group": 32, "topk_group": 1, "num_experts_per_tok": 8}, "to 8 experts, expected 1 to 4",
    ),
    "groups that do not divide": ("glm4_moe", {"n_group": 3}, "1 of 3 groups of 128 experts"),
    "groups of one expert": ("glm4_moe", {"n_group": 128, "topk_group": 8}, "8 of 128 groups of 128 experts"),
    "more groups than there are": ("glm4_moe", {"n_group": 4, "topk_group": 5}, "5 of 4 groups"),
    "no experts": ("mixtral", {"num_local_experts": 0}, "has 0 experts, expected at least 1"),
    "logits over nothing": ("granite", {"logits_scaling": 0.0}, "a logits_scaling other than 0"),
    "a factor of no model": ("granite", {"residual_multiplier": 1e300}, "residual_multiplier from"),
    "a scale of nothing": (
        "ministral3",
        {"rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 0}},
        "expected original_max_position_embeddings from 1",
    ),
    "too few layers with angles": ("smollm3", {"no_rope_layers": [1]}, "expected no_rope_layers of all 36"),
    "factors that do not fit": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0],
                "long_factor": [1.0], "original_max_position_embeddings": 4096,
            }
        },
        "rotary embedding of kind longrope",
    ),
}  # fmt: skip
"""Likewise, of values that no model has."""


def said(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {**CONFIG_MAPPING[kind](**SIZES.get(kind, {})).to_dict(), **changes}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_computed_is_refused_before_weights_are_read(what: str) -> None:
    kind, changes, message = REFUSED[what]
    with pytest.raises(Unsupported, match=message):
        read_spec(said(kind, changes), "config.json", ())


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_config_is_named(what: str) -> None:
    kind, changes, message = DAMAGED[what]
    with pytest.raises(AmqError, match=message) as found:
        read_spec(said(kind, changes), "some/config.json", ())
    assert "some/config.json" in str(found.value) and not isinstance(found.value, Unsupported)


def test_heads_of_full_layers_said_in_two_ways() -> None:
    sizes = {"num_global_key_value_heads": 2, "attention_k_eq_v": True, "global_head_dim": 64}
    by_layer = CONFIG_MAPPING["gemma4_text"](**sizes).to_dict()
    for_all = {**by_layer, "per_layer_config": None, **sizes}
    first, second = (read_spec(config, "config.json", ()) for config in (by_layer, for_all))
    heads = [[(a.n_kv_heads, a.head_dim, a.keys_are_values) for a in spec.parts(Attention)] for spec in (first, second)]
    assert heads[0] == heads[1] and heads[0][4:6] == [(4, 256, False), (2, 64, True)]


def test_later_layers_use_the_last_cache_of_their_kind() -> None:
    spec = read_spec(said("gemma4_text", {"num_kv_shared_layers": 18, "use_double_wide_mlp": True}), "config.json", ())
    layers = [step.op for step in spec.steps if isinstance(step.op, Attention)]
    wide = [mlp.down.in_features for mlp in spec.parts(Mlp)]
    assert [op.cache_of for op in layers[:12]] == [None] * 12 and wide[:12] == [9216] * 12
    assert wide[12:] == [2 * 9216] * 18
    for op in layers[12:]:
        assert op.cache_of == 3 * (11 if op.window == 0 else 10) and op.k_norm is op.v_norm is None
        assert spec.steps[op.cache_of].op in layers[10:12]


def test_angles_of_a_kind_that_turns_a_part() -> None:
    spec = read_spec(said("gemma4_text", {}), "config.json", ())
    full = spec.ropes[1]
    assert full.rotary == 512 and bool((full.frequencies[64:] == 0).all()) and bool((full.frequencies[:64] > 0).all())


def test_long_texts_have_their_own_angles() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "short_factor": [1.0] * 48,
        "long_factor": [4.0] * 48, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
    (found,) = read_spec(said("phi3", changes), "config.json", ()).ropes
    assert found.border == 4096 and found.rotary == 96
    assert found.long_frequencies is not None and torch.allclose(found.long_frequencies * 4, found.frequencies)
    assert found.factor == found.long_factor == pytest.approx((1 + math.log(32) / math.log(4096)) ** 0.5)


def test_where_texts_are_long_is_said_outside_of_rope_parameters_first() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [4.0] * 48,
        "original_max_position_embeddings": 2048,
    }  # fmt: skip
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 1024, "max_position_embeddings": 8192}
    config = said("phi3", changes)
    (found,) = read_spec(config, "config.json", ()).ropes
    assert found.border == 1024 and found.long_frequencies is not None
    assert torch.allclose(found.long_frequencies * 4, found.frequencies)
    del config["original_max_position_embeddings"]
    assert (
        read_spec(config, "config.json", ()).ropes[0].border
        == transformers.Phi3Config().original_max_position_embeddings
    )


def test_queries_far_into_a_text_are_scaled() -> None:
    spec = read_spec(said("ministral3", {}), "config.json", ())
    scale = spec.parts(Attention)[0].position_scale
    expected = [1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(4)]
    assert scale(torch.tensor([0.0, 16383, 16384, 49152])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_no_windows_where_transformers_masks_none(kind: str) -> None:
    config = said(kind, {"sliding_window": 24, "use_sliding_window": False})
    config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    assert {op.window for op in read_spec(config, "config.json", ()).parts(Attention)} == {0}


@pytest.mark.parametrize(("said_", "activation"), [("gelu", "gelu_tanh"), ("silu", "silu")])
def test_the_first_gemma_reads_hidden_act_alone(said_: str, activation: str) -> None:
    config = said("gemma", {"hidden_act": said_, "hidden_activation": "gelu_pytorch_tanh"})
    assert {mlp.activation for mlp in read_spec(config, "config.json", ()).parts(Mlp)} == {activation}


def test_the_first_gemma_caps_no_logits() -> None:
    assert not read_spec(said("gemma", {"final_logit_softcapping": 30.0}), "config.json", ()).logit_softcap


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_gemma_2_has_caps_where_it_says_none(key: str) -> None:
    config = said("gemma2", {key: None})
    read_spec(config, "config.json", ())
    del config[key]
    with pytest.raises(Unsupported, match=f"does not say {key}"):
        read_spec(config, "config.json", ())


def test_lfm2_reads_its_own_key_of_norms_and_no_activation() -> None:
    spec = read_spec(
        said("lfm2_moe", {"norm_eps": 1e-4, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}), "config.json", ()
    )
    assert spec.epsilon == 1e-4 and {mlp.activation for mlp in spec.parts(Mlp)} == {"silu"}


def test_a_gemma_3_with_images_caps_no_logits() -> None:
    config = transformers.Gemma3Config().to_dict()
    config["text_config"]["final_logit_softcapping"] = 30.0
    with pytest.raises(Unsupported, match="final_logit_softcapping"):
        read_spec(config, "config.json", ["model.language_model.layers.0.self_attn.q_proj"])


def test_a_head_that_is_neither_there_nor_said_to_be_tied() -> None:
    config = said("llama", {"tie_word_embeddings": None})
    with pytest.raises(Unsupported, match="does not say tie_word_embeddings, and there is no lm_head"):
        read_spec(config, "config.json", ["model.embed_tokens"])
    assert read_spec(config, "config.json", ["model.embed_tokens", "lm_head"]).head.name == "lm_head"


def test_a_dense_model_of_a_family_with_experts_says_that_it_chooses_none() -> None:
    """Granite 4.0 micro does."""
    config = said("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0})
    assert not read_spec(config, "config.json", ()).parts(Mixture)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "ministral3"])
def test_windows_of_all_layers_whatever_their_types(kind: str) -> None:
    """As transformers masks them, which reads no layer_types of these families."""
    layers = CONFIG_MAPPING[kind]().num_hidden_layers
    types = {"layer_types": ["full_attention"] * layers}
    for window in (None, 24):
        spec = read_spec(said(kind, {**types, "sliding_window": window}), "config.json", ())
        assert [op.window for op in spec.parts(Attention)] == [window or 0] * layers


def test_whether_a_head_is_tied_is_said_around_the_text_model() -> None:
    config = transformers.Mistral3Config().to_dict()
    names = ["model.language_model.layers.0.self_attn.q_proj", "model.language_model.embed_tokens"]
    assert not config["text_config"]["tie_word_embeddings"] and config["tie_word_embeddings"]
    tied, own = (read_spec({**config, "tie_word_embeddings": value}, "config.json", names) for value in (True, False))
    assert tied.head.name == tied.embedding.name == "model.language_model.embed_tokens" and own.head.name == "lm_head"
