"""What writing a tiny model as a GGUF file takes, for tests that read one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn


def llama_writer(path: Path, config: Any, architecture: str = "llama") -> Any:
    """A gguf.GGUFWriter with the model's sizes; tokenizer and tensors are the caller's."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    return writer


def tensor_names(config: Any) -> Any:
    """gguf's map from transformers' names, without `.weight`, to those of the file."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)


def turned(name: str, weight: Tensor, config: Any) -> Tensor:
    """Rows of q and k as llama.cpp has them, the halves of each rotary head interleaved; other weights as they are."""
    for role, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if role in name:
            return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    return weight


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any) -> None:
    """A small tokenizer of GPT-2's kind: one token per byte but two, and two merges: readers break on fewer."""
    import gguf
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:-2], "th", "he"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(["t h", "h e"])


def add_sentencepiece(writer: Any) -> None:
    """A small tokenizer of Llama 2's kind, which some families' readers expect: bytes only."""
    import gguf

    kind = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(251)), "\u2581", "a"])
    writer.add_token_scores([-float(i) for i in range(256)])
    writer.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 251, kind.NORMAL, kind.NORMAL])
    for i, name in ((0, "unk"), (1, "bos"), (2, "eos"), (2, "pad")):
        getattr(writer, f"add_{name}_token_id")(i)


SENTENCEPIECE = {"phi3", "gemma2", "gemma3"}
OFFSET_NORMS = {"gemma2", "gemma3", "nemotron"}
"""Architectures whose norms llama.cpp has larger by one."""
LAYER_NORMS = {"stablelm", "starcoder2", "nemotron"}


def keys_of(model: nn.Module, architecture: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config, without the architecture's name."""
    config = model.config
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = "layer_norm_epsilon" if architecture in LAYER_NORMS else "layer_norm_rms_epsilon"
    names = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        f"attention.{kind}": next(float(getattr(config, n)) for n in names if hasattr(config, n)),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    if getattr(config, "sliding_window", None) and architecture in ("gemma2", "gemma3", "phi3"):
        keys["attention.sliding_window"] = config.sliding_window
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            keys[name] = float(getattr(config, name))
    if "moe" in architecture:
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        keys |= {"expert_feed_forward_length": config.moe_intermediate_size}
    return keys


def weights_of(model: nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """{name in the file: float32} of a model, as llama.cpp's converter changes them."""
    import gguf

    config = model.config
    index = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(index, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        weight = turned(name, parameter, config) if architecture == "llama" else parameter
        if architecture in OFFSET_NORMS and name.endswith("norm.weight"):
            weight = weight + 1
        if name.endswith("mlp.experts.gate_up_proj"):
            block = name.split(".")[2]
            for half, role in zip(weight.chunk(2, dim=1), ("gate", "up"), strict=True):
                found[f"blk.{block}.ffn_{role}_exps.weight"] = half.contiguous().numpy()
            continue
        if name.endswith("mlp.experts.down_proj"):
            name = f"{name}.weight"
        if name.endswith("shared_expert_gate.weight"):
            weight = weight[0]
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        found[target] = weight.contiguous().numpy()
    return found


def write_gguf(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    weights: dict[str, np.ndarray],
    tokenizer: bool = True,
    kind: str = "F32",
) -> Path:
    """keys: below the architecture's name, unless they begin with a dot. kind: of matrices, in gguf's names."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in keys.items():
        add_key(writer, name.removeprefix(".") if name.startswith(".") else f"{architecture}.{name}", value)
    if tokenizer:
        (add_sentencepiece if architecture in SENTENCEPIECE else add_tokenizer)(writer)
    for name, weight in weights.items():
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(weight.astype(np.float32), stored), raw_dtype=stored)
    finish(writer)
    return path


def add_key(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(name, value)
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](name, value)


def in_float32(
    source: Path,
    path: Path,
    keys: Mapping[str, Any] = MappingProxyType({}),
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
) -> Path:
    """A copy of a GGUF file with all tensors in 32 bits.

    keys: of other values, below the architecture's name. change: of {name: tensor}, in place.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    others = {f"{architecture}.{name}": value for name, value in keys.items()}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", *others):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for name, value in others.items():
        add_key(writer, name, value)
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        tensors[tensor.name] = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    change(tensors)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    return path
