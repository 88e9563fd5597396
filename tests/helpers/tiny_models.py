"""Tiny random causal LMs of many architectures, built from their configs, and a byte-level tokenizer: no download."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from helpers.small_tokenizers import bytes_alone

HIDDEN = 64
VOCABULARY = 256
"""One token per byte: what `byte_tokenizer` produces."""

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one family: `<family>Config` and its causal LM, and what the inventory must find in it."""

    family: str
    roles: tuple[str, ...]
    options: dict[str, Any]
    blocks_path: str = "model.layers"
    causal_lm: str = ""

    def config(self, **options: Any) -> Any:
        return getattr(transformers, f"{self.family}Config")(**{**COMMON, **self.options, **options})

    def build(self, seed: int = 0, **options: Any) -> nn.Module:
        """A seeded model in evaluation mode; every parameter is random, so that norms and biases matter too."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.causal_lm or f"{self.family}ForCausalLM")(self.config(**options))
        return randomized(model.float(), seed)


def randomized(model: nn.Module, seed: int, std: float = 0.08) -> nn.Module:
    """Draws matrices from N(0, std²) and norms and biases from N(their value, 0.05²); evaluation mode, no gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * std if parameter.ndim > 1 else parameter + 0.05 * noise)
    return model.eval().requires_grad_(False)


WINDOWED = {"sliding_window": 16}
ARCHITECTURES = {
    "llama": Architecture("Llama", (*QKVO, *GATED), {"tie_word_embeddings": True}),
    "mistral": Architecture("Mistral", (*QKVO, *GATED), {**WINDOWED, "tie_word_embeddings": False}),
    "qwen2": Architecture("Qwen2", (*QKVO, *GATED), {"tie_word_embeddings": True}),
    "qwen3": Architecture("Qwen3", (*QKVO, *GATED), {"head_dim": 32, "tie_word_embeddings": False}),
    "gemma2": Architecture(
        "Gemma2",
        (*QKVO, *GATED),
        {**WINDOWED, "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    ),
    "gemma3": Architecture(
        "Gemma3Text",
        (*QKVO, *GATED),
        {
            **WINDOWED,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        causal_lm="Gemma3ForCausalLM",
    ),
    "phi3": Architecture(
        "Phi3",
        ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        {"tie_word_embeddings": False},
    ),
    "opt": Architecture(
        "OPT",
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
        {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN, "tie_word_embeddings": True},
        blocks_path="model.decoder.layers",
    ),
    "mixtral": Architecture(
        "Mixtral", QKVO, {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    ),
}


def tiny_llama(seed: int = 0, **options: Any) -> nn.Module:
    """Two blocks of a Llama with tied embeddings."""
    return ARCHITECTURES["llama"].build(seed, **{"num_hidden_layers": 2, **options})


SPECIAL = ("<bos>", "<eos>", "<start>")
"""Added by `byte_tokenizer` with a template: ids 256 to 258."""
TEMPLATES = {
    "llama": "<bos> $A",
    "gemma": "<bos> $A",
    "glm": "<start> <bos> $A <eos>",
    "eos": "$A <eos>",
    "qwen": "$A",
}
"""How families put special tokens around a text."""


def family_tokenizer(kind: str, folder: Path) -> Any:
    """`byte_tokenizer` with the template of a family, as it is loaded from `folder`, into which it is saved.

    Gemma's is as transformers converts it from a GGUF file: its configuration says that it adds no BOS.
    """
    byte_tokenizer(TEMPLATES[kind]).save_pretrained(folder)
    if kind == "gemma":
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def byte_tokenizer(template: str = "") -> Any:
    """A real fast tokenizer without merges: one token per UTF-8 byte.

    template: what is put around a text, of `SPECIAL` and $A; the tokenizer has these tokens only if it is given.
    """
    from tokenizers import processors

    tokenizer = bytes_alone()
    if template:
        tokenizer.add_special_tokens(list(SPECIAL))
        ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    names = {"bos_token": "<bos>", "eos_token": "<eos>"} if template else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def random_tokens(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [windows, length]."""
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def longrope(border: int) -> dict[str, Any]:
    """Options of a config whose texts of more than `border` positions have other rotary angles; heads of 16."""
    return {
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": border, "factor": 8.0},
            **{"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * i for i in range(8)]},
        },
        "original_max_position_embeddings": border,
    }


def dynamic_rope(border: int) -> dict[str, Any]:
    """Options of a config whose rotary angles depend on every length beyond `border`."""
    return {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": border,
    }
