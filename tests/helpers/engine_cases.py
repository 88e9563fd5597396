"""Tiny models of the native engine's families: {case: what builds one}. A family has a case for each of its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from helpers import engine_cases_dense, engine_cases_mixture
from helpers.tiny_models import ARCHITECTURES


def _llama(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(ARCHITECTURES[kind].build, **{"num_hidden_layers": 2, **options})


CASES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama("llama"),
    "llama-biased": _llama("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama-wide": _llama("llama", hidden_size=80, head_dim=48, num_key_value_heads=1, intermediate_size=72),
    "mistral": _llama("mistral"),
    "qwen2": _llama("qwen2"),
    "qwen2-windows": _llama("qwen2", use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen3": _llama("qwen3"),
    **engine_cases_dense.CASES,
    **engine_cases_mixture.CASES,
}
