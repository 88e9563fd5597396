"""What config.json says of a model of the native engine's families: a typed record, bounded before it sizes anything.

What the engine cannot compute exactly as transformers does is `Unsupported`, and the caller takes another path. A key
that transformers has a default for and this engine wants is `Unsupported` too. A value of the wrong type, or one that
no model has, is an AmqError that names the file and the key: another path would do worse with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model import shape
from amq.util.extras import needs
from amq.util.records import check_range, parse_record

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s whose block decoder.h computes. Others look alike and differ in a detail: a scale, a norm, a layer
without rotary embedding."""
DEFAULT_CONTEXT = 8192
SIZES = (
    *("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
"""That config.json must say."""


class Unsupported(AmqError):
    """This model or setting is not for the native engine; the message says why."""


@dataclass(frozen=True)
class _Kind:
    model_type: str | None = None
    hidden_act: str | None = None


LARGEST = 1e15
"""Of bases and factors: beyond those of every model, and far from where float32 ends."""


@dataclass(frozen=True)
class Rope:
    """`rope_parameters`, or `rope_scaling` of older files: what transformers' kinds of embedding read of it."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        check_range(self, "rope_theta", "original_max_position_embeddings", most=LARGEST)
        numbers = [f.name for f in fields(self) if isinstance(getattr(self, f.name), float)]
        check_range(self, *numbers, least=-LARGEST, most=LARGEST)
        check_range(self, "factor", "partial_rotary_factor", least=0, most=LARGEST)


@dataclass(frozen=True)
class ModelConfig:
    """The keys of config.json that the engine computes with; see transformers' LlamaConfig."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    partial_rotary_factor: float | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        check_range(self, *SIZES, "num_key_value_heads", "head_dim")
        check_range(self, "sliding_window", least=0)
        check_range(self, "rms_norm_eps", least=0, most=1)
        check_range(self, "rope_theta", most=LARGEST)
        check_range(self, "partial_rotary_factor", least=0)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"expected num_attention_heads to divide hidden_size {self.hidden_size} where there is no head_dim, "
                f"got {self.num_attention_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"expected layer_types of all {self.num_hidden_layers} layers, got {len(self.layer_types)} of them"
            )

    @property
    def head_features(self) -> int:
        return shape.head_dim(self) or 0

    @property
    def kv_heads(self) -> int:
        return shape.kv_heads(self) or 0

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normed per head."""
        return self.model_type == "qwen3"

    @property
    def biases(self) -> dict[str, bool]:
        """{projection of decoder.h: whether its linears have a bias}, as transformers' classes have them."""
        attention, mlp = bool(self.attention_bias), bool(self.mlp_bias)
        if self.model_type == "mistral":
            attention = mlp = False
        if self.model_type == "qwen2":
            return {"qkv": True, "o": False, "gate_up": False, "down": False}
        mlp = mlp and self.model_type == "llama"
        return {"qkv": attention, "o": attention, "gate_up": mlp, "down": mlp}


def read_config(config: Mapping[str, Any], source: str) -> ModelConfig:
    """config.json as read from the file `source`."""
    kind = parse_record(config, _Kind, source)
    if kind.model_type not in FAMILY:
        raise Unsupported(f"the native engine runs {', '.join(FAMILY)}, not {kind.model_type}")
    if kind.hidden_act not in (None, "silu", "swish"):
        raise Unsupported(f"the native engine has no activation {kind.hidden_act}")
    for key in (*SIZES, "rms_norm_eps"):
        if key not in config:
            raise Unsupported(f"config.json does not say {key}")
    return parse_record(config, ModelConfig, source)


def read_sizes(config: ModelConfig, group_size: int, context: int | None) -> dict[str, Any]:
    """The numbers of decoder.h's DecoderModel."""
    longest, head_dim = config.max_position_embeddings, config.head_features
    if head_dim % 16:
        raise Unsupported(f"the native engine wants heads of a multiple of 16 features, these have {head_dim}")
    if context is not None and not 1 <= context <= longest:
        raise AmqError(f"the context must be 1 to {longest}, which the model was made for, got {context}")
    return {
        "hidden": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.kv_heads,
        "head_dim": head_dim,
        "intermediate": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": min(longest, DEFAULT_CONTEXT) if context is None else context,
        "group_size": group_size,
        "rotary": head_dim,
        "epsilon": config.rms_norm_eps,
        "attention_scale": head_dim**-0.5,
    }


def rotary_frequencies(config: ModelConfig, raw: Mapping[str, Any], source: str) -> tuple[Tensor, float]:
    """Angle per position of each pair of features, float32 [head_dim / 2], and what cos and sin are multiplied by.

    raw: config.json, for transformers, which all but the plain kind come from; its import takes seconds.
    Raises AmqError, naming the file `source`, where transformers cannot use what it says.
    """
    rotary, head_dim = shape.ModelShape.of(raw).rotary.get(""), config.head_features
    if rotary is None:
        raise Unsupported("the native engine has one rotary embedding for all layers")
    theta, kind = rotary.theta, rotary.kind
    if theta is None:
        said = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if "rope_theta" in raw or "rope_theta" in said:
            raise AmqError(f"{source}: rope_theta is null, expected a number; the file is damaged or was edited")
        raise Unsupported("config.json does not say rope_theta")
    part = shape.said(rotary.parameters, "partial_rotary_factor")
    if (config.partial_rotary_factor if part is None else part) not in (None, 1.0):
        raise Unsupported("the native engine rotates whole heads, this model a part of each")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / theta**exponents, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise Unsupported(f"the native engine has no rotary embedding of kind {kind}")
    with needs("models", f"a rotary embedding of kind {kind}, which {source} asks for,"):
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        known = AutoConfig.for_model(**{key: v for key, v in raw.items() if key != "quantization_config"})
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](known, torch.device("cpu"))
        frequencies, factor = frequencies.float(), float(factor)
    except Exception as error:  # transformers' validators raise types of their own, its formulas whatever they meet
        raise AmqError(
            f"{source}: transformers cannot make a rotary embedding of kind {kind} from it "
            f"({type(error).__name__}: {error}); the file is damaged or was edited"
        ) from error
    if tuple(frequencies.shape) != (head_dim // 2,) or not bool(frequencies.isfinite().all()):
        raise AmqError(
            f"{source}: the rotary embedding of kind {kind} has {list(frequencies.shape)} frequencies, expected "
            f"{head_dim // 2} finite ones; the file is damaged or was edited"
        )
    return frequencies, factor


def windows(config: ModelConfig) -> list[int]:
    """Positions that each layer's tokens see, 0 for all."""
    layers = shape.ModelShape.of(replace(config, use_sliding_window=None)).layers
    if strange := {layer.kind for layer in layers} - {shape.FULL, shape.SLIDING}:
        raise Unsupported(f"the native engine has no layers of type {', '.join(sorted(strange))}")
    if not config.layer_types and config.model_type != "mistral":  # the others' windows are in layer_types alone
        if config.use_sliding_window:
            raise Unsupported("config.json does not say which layers have a sliding window (layer_types)")
        return [0] * len(layers)
    return [layer.window or 0 for layer in layers]
