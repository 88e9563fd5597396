"""Tiny models with delta nets and short convolutions, for tests of the engine against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from amq.model.experts import unfuse
from helpers.tiny_models import COMMON, randomized

LINEAR, FULL = "linear_attention", "full_attention"
COMMON_TEXT = {**COMMON, "num_hidden_layers": 4, "max_position_embeddings": 256, "tie_word_embeddings": False}
DELTA = {
    **COMMON_TEXT, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 16, "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 48}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2], "mrope_interleaved": True}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
          "num_position_embeddings": 16}  # fmt: skip
CONV = {**COMMON_TEXT, "layer_types": ["conv", FULL, "conv", FULL]}


def _model(family: str, config: str = "", causal_lm: str = "", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}{config}Config")(**options)
    model = randomized(getattr(transformers, causal_lm or f"{family}ForCausalLM")(made).float(), 0)
    _spread(model)
    unfuse(model)
    return model


def _spread(model: nn.Module) -> None:
    """Decays and gates of many sizes, and corrections that change which experts are chosen."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("A_log", "dt_bias", "expert_bias")):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))


def _image_text() -> nn.Module:
    text = {k: v for k, v in DELTA.items() if k != "attn_implementation"}
    return _model("Qwen3_5", causal_lm="Qwen3_5ForConditionalGeneration", text_config=text, vision_config=VISION,
                  image_token_id=250, video_token_id=251)  # fmt: skip


def _case(*names: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: _model(*names, **options)


CASES: dict[str, Callable[[], nn.Module]] = {
    "qwen3_5": _case("Qwen3_5", "Text", **DELTA),
    "qwen3_5-tied-biased": _case("Qwen3_5", "Text", **{**DELTA, "tie_word_embeddings": True, "attention_bias": True,
                                                       "linear_conv_kernel_dim": 3, "linear_value_head_dim": 48}),
    "qwen3_5-yarn": _case("Qwen3_5", "Text", **{**DELTA, "rope_parameters": YARN, "linear_num_key_heads": 4}),
    "qwen3_5-image-text": _image_text,
    "qwen3_5_moe": _case("Qwen3_5Moe", "Text", **DELTA, **SHARED),
    "qwen3_next": _case("Qwen3Next", **DELTA, **SHARED),
    "qwen3_next-some-dense": _case("Qwen3Next", **DELTA, **SHARED, mlp_only_layers=[1], norm_topk_prob=False),
    "lfm2": _case("Lfm2", **CONV, block_auto_adjust_ff_dim=False),
    "lfm2-tied-biased": _case("Lfm2", **{**CONV, "tie_word_embeddings": True, "conv_bias": True, "conv_L_cache": 4,
                                         "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.2}),
    "lfm2_moe": _case("Lfm2Moe", **CONV, **EXPERTS, num_dense_layers=1),
    "lfm2_moe-unnormalized": _case("Lfm2Moe", **CONV, **EXPERTS, num_dense_layers=0, use_expert_bias=False,
                                   norm_topk_prob=False, routed_scaling_factor=1.5),
}  # fmt: skip
