"""Tiny models of the dense families for tests/test_engine_families.py, with what each family's config can turn on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from amq.model.experts import unfuse
from helpers.tiny_models import COMMON, randomized

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"sliding_window": 16}
BY_TURNS = {**WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}
BIASES = {"attention_bias": True}
UNTIED = {"tie_word_embeddings": False}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 96,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)], "long_factor": [1.5 + 1.5 * pair for pair in range(8)],
}  # fmt: skip
GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2 = {**GEMMA, **BY_TURNS, "query_pre_attn_scalar": 24}
GEMMA4 = {
    **GEMMA, **WINDOW, "num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "global_head_dim": 32, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32,
}  # fmt: skip
EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 32,
           "hidden_size_per_layer_input": 0}  # fmt: skip
SIGLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
GEMMA4_VISION = {**SIGLIP, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}
PIXTRAL = {**SIGLIP, "model_type": "pixtral", "head_dim": 16}
MINISTRAL3 = {"head_dim": 16, "rope_parameters": {**YARN, "original_max_position_embeddings": 48, "mscale": 1.0,
                                                  "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}}  # fmt: skip


def _build(config: str, model: str, sizes: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    built = randomized(getattr(transformers, model)(getattr(transformers, config)(**sizes)).float(), 0)
    for name, tensor in built.state_dict().items():
        if name.endswith("layer_scalar"):  # of Gemma 4 alone
            tensor.fill_(0.6 + 0.1 * int(name.split(".")[-2]))
        elif model.startswith("Gemma4") and name.endswith("q_norm.weight"):
            tensor.mul_(0.4)  # its scores are not scaled, and with large ones every layer triples rounding errors
    unfuse(built)
    return built


def text_model(family: str, options: dict[str, Any], config: str = "") -> Callable[[], nn.Module]:
    """A text model; config: the name of its config where that is not the family's."""
    return partial(_build, f"{config or family}Config", f"{family}ForCausalLM", {**COMMON, **options})


def _inside(family: str, vision: dict[str, Any], options: dict[str, Any], **outer: Any) -> Callable[[], nn.Module]:
    """The text model inside of one for images and text."""
    sizes = {"text_config": {**COMMON, **options}, "vision_config": vision, **outer}
    return partial(_build, f"{family}Config", f"{family}ForConditionalGeneration", sizes)


CASES: dict[str, Callable[[], nn.Module]] = {
    "gemma": text_model("Gemma", {"head_dim": 32}),
    "gemma biases": text_model("Gemma", {"head_dim": 16, **BIASES, **UNTIED}),
    "gemma2": text_model("Gemma2", {**GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 plain": text_model(
        "Gemma2",
        {**GEMMA2, **BIASES, **UNTIED, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": text_model("Gemma3", {**GEMMA2, "final_logit_softcapping": 4.0}, "Gemma3Text"),
    "gemma3 scaled": text_model(
        "Gemma3",
        {
            **GEMMA2, **BIASES, **UNTIED,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "Gemma3Text",
    ),
    "gemma3 with images": _inside("Gemma3", SIGLIP, GEMMA2, mm_tokens_per_image=4),
    "gemma4": text_model(
        "Gemma4",
        {**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 4.0},
        "Gemma4Text",
    ),
    "gemma4 alone": text_model(
        "Gemma4", {**GEMMA4, "hidden_size_per_layer_input": 0, **BIASES, **UNTIED}, "Gemma4Text"
    ),
    "gemma4 keys as values": text_model(
        "Gemma4",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 2},
        "Gemma4Text",
    ),
    "gemma4 with images": _inside(
        "Gemma4", GEMMA4_VISION, {**GEMMA4, "num_kv_shared_layers": 2, "pad_token_id": 0}
    ),
    "gemma4 experts": text_model("Gemma4", {**GEMMA4, **EXPERTS, "attention_k_eq_v": True}, "Gemma4Text"),
    "phi3": text_model("Phi3", {}),
    "phi3 window": text_model("Phi3", {**WINDOW, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "phi3 partial": text_model(
        "Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
    ),
    "phi3 longrope": text_model("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 96}),
    "smollm3": text_model("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3 windows": text_model(
        "SmolLM3",
        {**WINDOW, **BIASES, **UNTIED, "mlp_bias": True, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    ),
    "ministral": text_model("Ministral", {**BY_TURNS, "head_dim": 32}),
    "ministral3": text_model("Ministral3", MINISTRAL3),
    "ministral3 window": text_model("Ministral3", {**MINISTRAL3, "sliding_window": 24, "tie_word_embeddings": True}),
    "mistral3 with images": _inside(
        "Mistral3", PIXTRAL, {"model_type": "ministral3", **MINISTRAL3}, image_token_index=3, spatial_merge_size=2,
        tie_word_embeddings=False,
    ),
    "arcee": text_model("Arcee", {"head_dim": 16}),
    "arcee biases": text_model("Arcee", {"head_dim": 16, **BIASES, "mlp_bias": True, "tie_word_embeddings": True}),
    "olmo2": text_model("Olmo2", {}),
    "olmo2 biases": text_model("Olmo2", {**BIASES, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "olmo3": text_model("Olmo3", {**BY_TURNS, "rope_parameters": {
        FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 10000.0}}}),
}  # fmt: skip
"""{case: builder of a random model in float32 and evaluation mode}."""
