"""What families of models share: config.json as a typed record, and the parts that most blocks are made of.

A family is a function of an `Origin`. What it cannot say exactly as transformers computes it is `Unsupported`, with the
name of the part, and the caller takes another path; no weight has been read by then. A key that transformers has a
default for and a family wants is `Unsupported` too. A value of the wrong type, or one that no model has, is an AmqError
that names the file and the key: another path would do worse with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model import shape
from amq.runtime.decoder_spec import (
    ACTIVATIONS,
    RELU2,
    Array,
    Attention,
    DecoderSpec,
    Linear,
    Mlp,
    Operator,
    Projection,
    Rope,
    Step,
    Table,
)  # fmt: skip
from amq.util.extras import needs
from amq.util.records import check_range, parse_record, shorten

LARGEST = 1e15
"""Of bases and factors: beyond those of every model, and far from where float32 ends."""
MOST_FEATURES = 1 << 16
"""Of a head; angles are made for each before weights are compared."""
MOST_HEAD = 512
"""Features of a head that the kernels have room for: kMaxHeadDim in csrc/cpu/vector.h."""
MOST_EXPERTS = 1 << 16
"""Of all layers together, which are listed before weights are compared: several times those of every model."""
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
SIZES = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


class Unsupported(AmqError):
    """This model or setting is not for our own engine; the message says why."""


@dataclass(frozen=True)
class TextConfig:
    """The keys of config.json that all families compute with; a family's own record adds its keys.

    Everything is None where the file does not say it: `Origin.record` asks for what a family cannot do without.

    NORM: the key of what norms add to a mean of squares.
    """

    NORM: ClassVar[str] = "rms_norm_eps"

    model_type: str = ""
    hidden_size: int = 0
    vocab_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    max_position_embeddings: int = 0
    intermediate_size: int | None = None
    rms_norm_eps: float | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None

    def __post_init__(self) -> None:
        check_range(self, *SIZES, "intermediate_size", "num_key_value_heads", "head_dim")
        check_range(self, "num_hidden_layers", most=shape.MOST_LAYERS)
        check_range(self, "sliding_window", least=0)
        check_range(self, self.NORM, least=0, most=1)
        check_range(self, "rope_theta", most=LARGEST)
        check_range(self, "partial_rotary_factor", least=0, most=1)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"expected num_attention_heads to divide hidden_size {self.hidden_size} where there is no head_dim, "
                f"got {self.num_attention_heads}"
            )
        if self.features > MOST_FEATURES:
            raise ValueError(f"expected heads of at most {MOST_FEATURES} features, got {self.features}")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"expected num_key_value_heads to divide num_attention_heads {self.num_attention_heads}, "
                f"got {self.kv_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"expected layer_types of all {self.num_hidden_layers} layers, got {len(self.layer_types)} of them"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def features(self) -> int:
        """Of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def epsilon(self) -> float:
        said: float = getattr(self, self.NORM)
        return said

    @property
    def activation(self) -> str:
        """Its name in decoder.h."""
        return known_activation(self.hidden_act or "silu")


def check_experts(layers: int, experts: int) -> None:
    """For `__post_init__`, of the experts of each layer: raises ValueError where all layers have too many."""
    if layers * experts > MOST_EXPERTS:
        raise ValueError(f"expected at most {MOST_EXPERTS} experts, got {shorten(experts)} in each of {layers} layers")


def known_activation(name: str) -> str:
    """Its name in decoder.h, by that in config.json."""
    if name not in ACTIVATIONS:
        raise Unsupported(f"the native engine has no activation {name}")
    return ACTIVATIONS[name]


C = TypeVar("C", bound=TextConfig)


@dataclass(frozen=True)
class Origin:
    """raw: what config.json says of the text model. file: where it was read. root: what precedes the decoder's names in
    the checkpoint. names: of its tensors and linears. unread: see DecoderSpec."""

    raw: Mapping[str, Any]
    file: str
    root: str
    head: str
    names: frozenset[str]
    unread: tuple[str, ...] = ()

    def record(self, kind: type[C], *needed: str) -> C:
        """config.json as a `kind`; Unsupported without one of the keys `needed`, or one of those of every model."""
        needed = (kind.NORM, *needed)
        for key in (*SIZES, *needed):
            if key not in self.raw or (key in needed and self.raw[key] is None):
                raise Unsupported(f"config.json does not say {key}")
        if self.raw.get("is_causal", True) is not True:  # transformers asks any config, though no text model says it
            raise Unsupported("config.json says is_causal, and tokens that see later ones the native engine has not")
        if self.raw.get("per_layer_config") and "per_layer_config" not in {f.name for f in fields(kind)}:
            raise Unsupported("config.json says per_layer_config: layers of sizes of their own")
        return parse_record(self.raw, kind, self.file)

    def block(self, layer: int) -> str:
        return f"{self.root}layers.{layer}"

    @property
    def inside(self) -> bool:
        """Whether the text model is part of another one."""
        return self.root != "model."

    def has(self, linear: str) -> bool:
        return linear in self.names or f"{linear}.weight" in self.names


def norm(name: str, count: int) -> Array:
    """Of the module `name`."""
    return Array(f"{name}.weight", (count,))


def linears(prefix: str, in_features: int, bias: bool = False, **sizes: int) -> Projection:
    """Of {child of `prefix`: out_features}."""
    return Projection(tuple(Linear(f"{prefix}.{n}", out, in_features, bias) for n, out in sizes.items()))


def mlp(prefix: str, hidden: int, wide: int, activation: str, bias: bool = False,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Mlp:  # fmt: skip
    """With a gate; `relu2` is of models without."""
    if activation == RELU2:
        raise Unsupported("the native engine has no activation relu2 behind a gate")
    gate, up, down = names
    return Mlp(
        linears(prefix, hidden, bias, **{gate: wide, up: wide}),
        linears(prefix, wide, bias, **{down: hidden}),
        activation,
    )


def attention(prefix: str, config: TextConfig, bias: bool = False, output_bias: bool = False, rope: int | None = 0,
              output: str = "o_proj", **more: Any) -> Attention:  # fmt: skip
    """With heads of the model's own sizes; `more`: other fields of Attention."""
    heads, kv_heads, features = config.num_attention_heads, config.kv_heads, config.features
    q = heads * features * (2 if more.get("gated") else 1)
    kv = kv_heads * features
    fields_ = {
        "qkv": linears(prefix, config.hidden_size, bias, q_proj=q, k_proj=kv, v_proj=kv),
        "o": linears(prefix, heads * features, output_bias, **{output: config.hidden_size}),
        "scale": features**-0.5,
        "rope": rope,
    }
    return Attention(heads, kv_heads, features, **{**fields_, **more})


def head_norms(prefix: str, features: int, q: str = "q_norm", k: str = "k_norm") -> dict[str, Any]:
    """Fields of Attention, of norms per head."""
    return {"q_norm": norm(f"{prefix}.{q}", features), "k_norm": norm(f"{prefix}.{k}", features)}


def prenorm(block: str, hidden: int, attention: Operator, feedforward: Operator) -> list[Step]:
    """The steps of a layer with a norm before each of its operators, as Llama names them."""
    return [
        Step(attention, norm(f"{block}.input_layernorm", hidden)),
        Step(feedforward, norm(f"{block}.post_attention_layernorm", hidden)),
    ]


def decoder(origin: Origin, config: TextConfig, steps: Sequence[Step], ropes: Sequence[Rope] = (),
            **more: Any) -> DecoderSpec:  # fmt: skip
    """The model around its steps; `more`: other fields of DecoderSpec."""
    embedding, hidden = f"{origin.root}embed_tokens", config.hidden_size
    # A tied model has one of the two, or both where they differ: then its head is its own, as in transformers.
    tied = bool(config.tie_word_embeddings)
    if config.tie_word_embeddings is None and origin.names and not origin.has(origin.head):
        raise Unsupported(f"config.json does not say tie_word_embeddings, and there is no {origin.head}")
    head = origin.head if origin.has(origin.head) or not tied else embedding
    if tied and not origin.has(embedding):
        embedding = origin.head
    fields_ = {
        "hidden": hidden, "vocabulary": config.vocab_size, "longest": config.max_position_embeddings,
        "epsilon": config.epsilon, "embedding": Table(embedding, config.vocab_size, hidden),
        "head": Table(head, config.vocab_size, hidden), "final_norm": norm(f"{origin.root}norm", hidden),
        "unread": origin.unread,
    }  # fmt: skip
    spec = DecoderSpec(steps=tuple(steps), ropes=tuple(ropes), **{**fields_, **more})
    for op in spec.parts(Attention):
        if op.head_dim % 16 or op.head_dim > MOST_HEAD:
            raise Unsupported(
                f"the native engine has heads of a multiple of 16 features up to {MOST_HEAD}, these have {op.head_dim}"
            )
    return spec


def windows(config: TextConfig, always: bool = False) -> list[int]:
    """Positions that each layer's tokens see, 0 for all. always: of all layers, whatever layer_types says."""
    if always or not config.layer_types:
        if not always and config.use_sliding_window:
            raise Unsupported("config.json does not say which layers have a sliding window (layer_types)")
        return [(config.sliding_window or 0) if always else 0] * config.num_hidden_layers
    found = []
    for kind in config.layer_types:
        if kind not in (shape.FULL, shape.SLIDING):
            raise Unsupported(f"the native engine has no layers of type {kind}")
        if kind == shape.SLIDING and not config.sliding_window:
            raise Unsupported("config.json does not say sliding_window of its layers that have one")
        found.append((config.sliding_window or 0) if kind == shape.SLIDING else 0)
    return found


def rope(origin: Origin, config: TextConfig, features: int = 0, layers: str = "", partial: bool = False) -> Rope:
    """The rotary embedding of layers of the kind `layers` ("": all have one), for heads of `features`.

    partial: whether the family reads `partial_rotary_factor`, which is Unsupported else.
    The kinds with formulas of their own come from transformers, whose import takes seconds.
    Raises AmqError, naming the file, where transformers cannot use what it says.
    """
    features = features or config.features
    rotary = shape.ModelShape.of(origin.raw).rotary.get(layers)
    if rotary is None:
        raise Unsupported(f"config.json does not say one rotary embedding of {layers or 'all'} layers")
    kind = rotary.kind
    if kind not in ROPE_KINDS:
        raise Unsupported(f"the native engine has no rotary embedding of kind {kind}")
    theta = _checked_theta(rotary, origin)
    part = shape.said(rotary.parameters, "partial_rotary_factor")
    part = config.partial_rotary_factor if part is None else part
    if kind == "proportional":
        return _proportional(rotary, theta, features, 1.0 if part is None else part)
    if not partial and part not in (None, 1.0):
        raise Unsupported(f"config.json says partial_rotary_factor, which a {config.model_type} does not have")
    if kind in ("default", "linear"):
        frequencies = _frequencies(theta, features if part is None else int(features * part))
        if kind == "linear":
            frequencies /= _factor(rotary)
        return Rope(2 * len(frequencies), frequencies)
    made, border = _rope_of_transformers(origin, kind, layers)
    if kind != "longrope":
        frequencies, factor = made(None)
        return Rope(2 * len(frequencies), frequencies, factor)
    if border is None:
        raise Unsupported("config.json does not say original_max_position_embeddings of its longrope")
    (short, factor), (long, long_factor) = made(border), made(border + 1)
    return Rope(2 * len(short), short, factor, long, long_factor, border)


def _frequencies(theta: float, rotated: int, features: int = 0) -> Tensor:
    """Of `rotated` features, as if they were the first ones of `features`."""
    exponents = torch.arange(0, rotated, 2, dtype=torch.int64).float() / (features or rotated)
    return 1.0 / theta**exponents


def _factor(rotary: shape.Rotary) -> float:
    factor = shape.said(rotary.parameters, "factor")
    if not factor:
        raise Unsupported(f"config.json does not say the factor of a rotary embedding of kind {rotary.kind}")
    return float(factor)


def _proportional(rotary: shape.Rotary, theta: float, features: int, part: float) -> Rope:
    """Whole heads are rotated, but by no angle beyond the first `part` of their pairs."""
    turning = int(part * features // 2)
    frequencies = torch.cat([_frequencies(theta, 2 * turning, features), torch.zeros(features // 2 - turning)])
    if "factor" in rotary.parameters:
        frequencies /= _factor(rotary)
    return Rope(features, frequencies)


def _checked_theta(rotary: shape.Rotary, origin: Origin) -> float:
    """`rope_theta`, beside which everything else that is said was bounded."""
    if rotary.theta is None:
        said = origin.raw.get("rope_parameters") or origin.raw.get("rope_scaling") or {}
        if "rope_theta" in origin.raw or "rope_theta" in said:
            raise AmqError(f"{origin.file}: rope_theta is null, expected a number; the file is damaged or was edited")
        raise Unsupported("config.json does not say rope_theta")
    return parse_record({"rope_theta": rotary.theta, **rotary.parameters}, _RopeNumbers, origin.file).rope_theta


@dataclass(frozen=True)
class _RopeNumbers:
    """What transformers' kinds of rotary embedding read, bounded."""

    rope_theta: float
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
    short_factor: list[float] | None = None
    long_factor: list[float] | None = None

    def __post_init__(self) -> None:
        check_range(self, "rope_theta", "original_max_position_embeddings", most=LARGEST)
        numbers = [f.name for f in fields(self) if isinstance(getattr(self, f.name), float)]
        check_range(self, *numbers, least=-LARGEST, most=LARGEST)
        check_range(self, "factor", least=0, most=LARGEST)
        check_range(self, "partial_rotary_factor", least=0, most=1)


def _rope_of_transformers(
    origin: Origin, kind: str, layers: str
) -> tuple[Callable[[int | None], tuple[Tensor, float]], int | None]:
    """A function of a text's length (None: any) that gives frequencies, float32 [rotary / 2], and the factor of cos
    and sin; and original_max_position_embeddings, which may be said in two places, as transformers understands it."""
    with needs("models", f"a rotary embedding of kind {kind}, which {origin.file} asks for,"):
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # transformers' validators raise types of their own, its formulas whatever they met
            raise AmqError(
                f"{origin.file}: transformers cannot make a rotary embedding of kind {kind} from it "
                f"({type(error).__name__}: {shorten(str(error), 300)}); the file is damaged or was edited"
            ) from error

    with named():
        known = AutoConfig.for_model(**{key: v for key, v in origin.raw.items() if key != "quantization_config"})
        parameters = known.rope_parameters[layers] if layers else known.rope_parameters

    def make(length: int | None) -> tuple[Tensor, float]:
        more = {"layer_type": layers} if layers else {}
        with named():
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](known, torch.device("cpu"), seq_len=length, **more)
            frequencies, factor = frequencies.float(), float(factor)
        if frequencies.ndim != 1 or not bool(frequencies.isfinite().all()):
            raise AmqError(
                f"{origin.file}: the rotary embedding of kind {kind} has {list(frequencies.shape)} frequencies, "
                "expected finite ones; the file is damaged or was edited"
            )
        return frequencies, factor

    return make, shape.size(parameters, "original_max_position_embeddings")
