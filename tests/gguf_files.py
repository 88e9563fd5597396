"""What writing a tiny Llama as a GGUF file takes, for tests that read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


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
            return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return weight


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
