"""The config of a GGUF file for transformers, made key by key: what the file says is translated or refused.

transformers' own reader takes the keys that it knows and leaves the rest, so that a model can come out with another
attention scale, window or rotary scaling, silently. Here every key below the architecture's name must be taken by a
translation; one that nobody takes and that is not neutral is an error that names it. Sizes are bounded before a model
is built of them. Architectures outside `FAMILIES` are left to transformers (`amq.model.gguf.convert`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amq.errors import AmqError
from amq.model.gguf.file import GgufFile, Strings
from amq.model.gguf.rope import Rope, read_rope, rope_parameters
from amq.util.records import MOST, shorten

FAMILIES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
    "phi3": "phi3", "gemma2": "gemma2", "gemma3": "gemma3_text", "stablelm": "stablelm", "starcoder2": "starcoder2",
    "nemotron": "nemotron",
}  # fmt: skip
"""llama.cpp's architectures whose keys and weights are translated here → model_type."""

EPSILON = {
    "llama": "rms_norm_eps", "qwen2": "rms_norm_eps", "qwen3": "rms_norm_eps", "qwen2moe": "rms_norm_eps",
    "qwen3moe": "rms_norm_eps", "phi3": "rms_norm_eps", "gemma2": "rms_norm_eps", "gemma3": "rms_norm_eps",
    "stablelm": "layer_norm_eps", "starcoder2": "norm_epsilon", "nemotron": "norm_eps",
}  # fmt: skip
EPSILON_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
NEUTRAL = {
    "expert_count": 0, "expert_used_count": 0, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0,
    "attention.causal": True, "pooling_type": 0, "attention.sliding_window": 0, "tensor_data_layout": None,
    "logit_scale": 0,
    "rope.scaling.finetuned": None, "expert_group_count": 0, "expert_shared_count": None, "residual_scale": 0,
    "embedding_scale": 0, "nextn_predict_layers": 0,
}  # fmt: skip
"""Keys that change nothing: at this value, or at any (None)."""
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}
OWN_HEAD_DIM = {"llama", "qwen3", "gemma2", "gemma3", "nemotron"}
"""Whose configs always say how wide a head is; the others only where it is not the hidden width per head."""
PARTIAL = {"phi3", "stablelm", "nemotron"}
"""Whose heads may turn in part, with a default of their own."""
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Blocks of the models whose attention llama.cpp scales by the width per head, which no key says."""


@dataclass
class Keys:
    """The keys below a file's architecture; remembers which were taken."""

    file: GgufFile
    taken: set[str] = field(default_factory=set)

    @property
    def architecture(self) -> str:
        return self.file.architecture

    def take(self, key: str, default: Any = None, kind: type = float) -> Any:
        """The value of `{architecture}.key` as a `kind`; without a default it must be there."""
        name = f"{self.architecture}.{key}"
        if name not in self.file.keys:
            if default is None:
                raise AmqError(f"{self.file.path} lacks the key {name}: the model cannot be built without it")
            return default
        self.taken.add(name)
        value: Any = self.file.keys[name]
        if isinstance(value, np.ndarray) and kind is not np.ndarray:
            value = self._same(name, value)
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise AmqError(f"{self.file.path}: key {name} must be a {kind.__name__}, got {shorten(value)}")
        return float(value) if kind is float else value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to `amq.util.records.MOST`."""
        value = self.take(key, default, int)
        if not 1 <= value <= MOST:
            raise AmqError(f"{self.file.path}: {self.architecture}.{key} is {shorten(value)}, expected 1 to {MOST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.take(key, default)
        if not math.isfinite(value):
            raise AmqError(f"{self.file.path}: {self.architecture}.{key} is {value}, expected a finite number")
        return value

    def _same(self, name: str, values: np.ndarray) -> Any:
        if not len(values) or (values != values[0]).any():
            raise AmqError(f"{self.file.path}: {name} differs from block to block, which is not supported")
        return values[0].item()

    def untaken(self) -> dict[str, Any]:
        """Those below the architecture's name that no translation took."""
        mine = f"{self.architecture}."
        return {k: v for k, v in self.file.keys.items() if k.startswith(mine) and k not in self.taken}


@dataclass(frozen=True)
class Translation:
    """values: of the config for transformers. rope: what the file says of rotary positions."""

    model_type: str
    values: Mapping[str, Any]
    rope: Rope


def translate(file: GgufFile, factors: Mapping[str, np.ndarray]) -> Translation:
    """The config of a file of one of `FAMILIES`; factors: see `Rope`. Raises AmqError naming what has no equal."""
    keys, architecture = Keys(file), file.architecture
    names = {tensor.name for tensor in file.tensors}
    values = _sizes(keys, names)
    head_dim = values["head_dim"]
    rope = read_rope(_rope_taker(keys), head_dim, values["max_position_embeddings"], factors)
    try:
        rotary = rope_parameters(rope)
    except AmqError as error:
        raise AmqError(f"{file.path}: {error}") from None
    if architecture in PARTIAL:
        rotary["partial_rotary_factor"] = rope.dims / head_dim
        values["partial_rotary_factor"] = rope.dims / head_dim
    values["rope_parameters"] = rotary
    if architecture not in OWN_HEAD_DIM and head_dim * values["num_attention_heads"] == values["hidden_size"]:
        del values["head_dim"]
    if "original_max_position_embeddings" in rotary and architecture == "phi3":
        values["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]
    if architecture in SPECIAL:
        SPECIAL[architecture](keys, values, names)
    _refuse_untaken(keys, head_dim)
    return Translation(FAMILIES[architecture], values, rope)


def _sizes(keys: Keys, names: set[str]) -> dict[str, Any]:
    """What all families have."""
    file, architecture = keys.file, keys.architecture
    tokens = file.keys.get("tokenizer.ggml.tokens")
    vocabulary = keys.size("vocab_size", tokens.length if isinstance(tokens, Strings) else None)
    blocks, heads = keys.size("block_count"), keys.size("attention.head_count")
    if blocks > len(file.tensors):
        raise AmqError(
            f"{file.path}: {architecture}.block_count is {blocks}, more than its {len(file.tensors)} tensors"
        )
    hidden = keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", max(hidden // heads, 1))
    if keys.size("attention.value_length", head_dim) != head_dim:
        raise AmqError(f"{file.path}: attention.value_length differs from key_length {head_dim}: not supported")
    given = [key for key in EPSILON_KEYS if f"{architecture}.{key}" in file.keys] or [EPSILON_KEYS[0]]
    values: dict[str, Any] = {
        "max_position_embeddings": keys.size("context_length"),
        "num_hidden_layers": blocks,
        "intermediate_size": keys.size("feed_forward_length", 1 if "moe" in architecture else None),
        "hidden_size": hidden,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        EPSILON[architecture]: keys.number(given[0]),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in names,
    }
    for name, key in TOKEN_IDS.items():  # a class's own default may not even be in the vocabulary
        value = file.keys.get(f"tokenizer.ggml.{key}_token_id")
        known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary
        if known or name != "unk_token_id":
            values[name] = value if known else None
    own_name = file.keys.get("general.name")
    if isinstance(own_name, str):  # as transformers writes it: fingerprints stay
        values["_model_name_or_path"] = own_name
    return values


def _rope_taker(keys: Keys) -> Callable[..., Any]:
    def take(key: str, default: Any, kind: type = float) -> Any:
        return keys.number(key, default) if kind is float else keys.take(key, default, kind)

    return take


def _llama(keys: Keys, values: dict[str, Any], names: set[str]) -> None:
    values["attention_bias"] = "blk.0.attn_q.bias" in names
    values["mlp_bias"] = "blk.0.ffn_up.bias" in names


def _qwen3(keys: Keys, values: dict[str, Any], names: set[str]) -> None:
    values["attention_bias"] = "blk.0.attn_q.bias" in names


def _experts(keys: Keys, values: dict[str, Any], names: set[str]) -> None:
    shapes = {tensor.name: tensor.shape for tensor in keys.file.tensors}
    values["num_experts"] = keys.size("expert_count")
    values["num_experts_per_tok"] = keys.size("expert_used_count")
    expert = shapes.get("blk.0.ffn_up_exps.weight", (0, 0, 0))
    values["moe_intermediate_size"] = keys.size("expert_feed_forward_length", max(expert[-2], 1))
    values["norm_topk_prob"] = keys.take("expert_weights_norm", keys.architecture == "qwen3moe", bool)
    if keys.number("expert_weights_scale", 1.0) not in (0.0, 1.0) or keys.take("expert_gating_func", 1, int) != 1:
        raise AmqError(f"{keys.file.path}: expert_weights_scale or expert_gating_func has no equal in transformers")
    if keys.architecture == "qwen2moe":
        shared = shapes.get("blk.0.ffn_up_shexp.weight", (0, 0))
        values["shared_expert_intermediate_size"] = keys.size("expert_shared_feed_forward_length", max(shared[0], 1))
    else:
        values["attention_bias"] = "blk.0.attn_q.bias" in names


def _phi3(keys: Keys, values: dict[str, Any], names: set[str]) -> None:
    window = keys.take("attention.sliding_window", 0, int)
    values["sliding_window"] = window or None
    rotary = values["rope_parameters"]
    if rotary["rope_type"] not in ("default", "longrope"):
        raise AmqError(f"{keys.file.path}: phi3 in transformers has no rotary scaling {rotary['rope_type']}")


def _gemma(keys: Keys, values: dict[str, Any], names: set[str]) -> None:
    """llama.cpp scales attention by the head's width, in the largest model by the hidden width per head."""
    architecture, head_dim = keys.architecture, values["head_dim"]
    wide = values["num_hidden_layers"] == GEMMA_27B[architecture]
    scalar = values["hidden_size"] // values["num_attention_heads"] if wide else head_dim
    given = keys.number("attention.scale", 0.0)
    values["query_pre_attn_scalar"] = round(given**-2) if given > 0 else scalar
    values["sliding_window"] = keys.size("attention.sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        softcap = keys.number(key, 0.0)
        if softcap or architecture == "gemma3":
            values[key] = softcap or None
    _layer_types(keys, values, 2 if architecture == "gemma2" else 6)
    if architecture == "gemma3":
        local = keys.number("rope.freq_base_swa", 10000.0)
        values["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }


def _layer_types(keys: Keys, values: dict[str, Any], period: int) -> None:
    """Every `period`th block sees all positions, unless the file says which do."""
    pattern = keys.file.keys.get(f"{keys.architecture}.attention.sliding_window_pattern")
    blocks = values["num_hidden_layers"]
    if isinstance(pattern, np.ndarray):
        keys.taken.add(f"{keys.architecture}.attention.sliding_window_pattern")
        if len(pattern) != blocks:
            raise AmqError(f"{keys.file.path}: attention.sliding_window_pattern has {len(pattern)} of {blocks} blocks")
        slides = [bool(x) for x in pattern]
    else:
        period = keys.size("attention.sliding_window_pattern", period)
        slides = [(i + 1) % period != 0 for i in range(blocks)]
    values["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]


def _stablelm(keys: Keys, values: dict[str, Any], names: set[str]) -> None:
    values["use_qkv_bias"] = "blk.0.attn_q.bias" in names
    values["use_parallel_residual"] = not any(".ffn_norm." in name for name in names)
    if keys.take("use_parallel_residual", values["use_parallel_residual"], bool) != values["use_parallel_residual"]:
        raise AmqError(f"{keys.file.path}: use_parallel_residual contradicts the tensors ffn_norm")


def _starcoder2(keys: Keys, values: dict[str, Any], names: set[str]) -> None:
    values["use_bias"] = "blk.0.attn_q.bias" in names
    values["sliding_window"] = keys.take("attention.sliding_window", 0, int) or None


SPECIAL: dict[str, Callable[[Keys, dict[str, Any], set[str]], None]] = {
    "llama": _llama, "qwen3": _qwen3, "qwen2moe": _experts, "qwen3moe": _experts, "phi3": _phi3, "gemma2": _gemma,
    "gemma3": _gemma, "stablelm": _stablelm, "starcoder2": _starcoder2,
}  # fmt: skip


def _refuse_untaken(keys: Keys, head_dim: int) -> None:
    """Raises AmqError for a key with an effect that no translation took."""
    for name, value in keys.untaken().items():
        key = name.partition(".")[2]
        if key == "attention.scale" and abs(float(value) * math.sqrt(head_dim) - 1) < 1e-5:
            continue
        if key in NEUTRAL and (NEUTRAL[key] is None or value == NEUTRAL[key]):
            continue
        shown = f"{value.length} texts" if isinstance(value, Strings) else shorten(value)
        raise AmqError(
            f"{keys.file.path}: nothing translates the key {name} ({shown}), which may change what the model computes: "
            "use the original safetensors"
        )
