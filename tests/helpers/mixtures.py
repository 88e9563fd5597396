"""Tiny random mixtures of experts whose experts are linears, as `load_folder` makes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from amq.model.experts import unfuse
from helpers.tiny_models import ARCHITECTURES, QKVO, Architecture

EXPERTS = 4
MIXTURES = {
    "mixtral": ARCHITECTURES["mixtral"],
    "qwen3_moe": Architecture(
        "Qwen3Moe",
        QKVO,
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "tie_word_embeddings": True},
    ),
    "gpt_oss": Architecture(
        "GptOss", QKVO, {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}
    ),
}


def mixture(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """Two blocks; the experts are linears."""
    model = MIXTURES[kind].build(seed, **{"num_hidden_layers": 2, **options})
    unfuse(model)
    return model
