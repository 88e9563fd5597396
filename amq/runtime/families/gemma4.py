"""Gemma 4: heads of two sizes, keys and values of other layers, inputs per layer, and experts beside an MLP."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from amq.errors import AmqError
from amq.model.shape import FULL, SLIDING
from amq.runtime.decoder_spec import (
    Array,
    Attention,
    DecoderSpec,
    Linear,
    Mixture,
    Mlp,
    PerLayerEmbedding,
    PerLayerInput,
    Rope,
    Router,
    Step,
    Table,
    ones,
)  # fmt: skip
from amq.runtime.families.base import (
    LARGEST,
    MOST_FEATURES,
    Origin,
    TextConfig,
    Unsupported,
    check_experts,
    decoder,
    head_norms,
    known_activation,
    linears,
    mlp,
    norm,
    rope,
    windows,
)  # fmt: skip
from amq.runtime.families.gemma import sandwich
from amq.util.records import check_range, parse_record, shorten

NEEDED = (
    *("intermediate_size", "head_dim", "num_key_value_heads", "hidden_activation", "layer_types"),
    "hidden_size_per_layer_input",
)


@dataclass(frozen=True)
class _Heads:
    """What a layer may have of its own: heads of keys and values, and features per head."""

    num_key_value_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "num_key_value_heads")
        check_range(self, "head_dim", most=MOST_FEATURES)


@dataclass(frozen=True)
class _Config(TextConfig):
    """per_layer_config: {number of a layer, with zeros before it: what it has of its own}; without it, full layers
    have global_head_dim, and num_global_key_value_heads where their keys are their values."""

    hidden_activation: str | None = None
    per_layer_config: dict[str, dict[str, Any]] | None = None
    global_head_dim: int | None = None
    num_global_key_value_heads: int | None = None
    attention_k_eq_v: bool | None = None
    num_kv_shared_layers: int | None = None
    use_double_wide_mlp: bool | None = None
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int | None = None
    enable_moe_block: bool | None = None
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_kv_shared_layers", "hidden_size_per_layer_input", least=0)
        check_range(self, "global_head_dim", most=MOST_FEATURES)
        check_range(self, "num_experts", "num_global_key_value_heads", "vocab_size_per_layer_input")
        check_experts(self.num_hidden_layers, self.num_experts or 0)
        check_range(self, "top_k_experts", "moe_intermediate_size")
        check_range(self, "final_logit_softcapping", least=1e-6, most=LARGEST)
        if self.shared >= self.num_hidden_layers:
            raise ValueError(f"expected num_kv_shared_layers below num_hidden_layers, got {self.shared}")
        if self.enable_moe_block and (self.top_k_experts or 0) > (self.num_experts or 0):
            raise ValueError(f"expected top_k_experts of at most {self.num_experts} experts, got {self.top_k_experts}")

    @property
    def shared(self) -> int:
        return self.num_kv_shared_layers or 0

    @property
    def activation(self) -> str:
        return known_activation(self.hidden_activation or "")


def gemma4(origin: Origin) -> DecoderSpec:
    config = origin.record(_Config, *NEEDED)
    _check(config, origin)
    heads = _heads(config, origin)
    ropes = _ropes(origin, config, heads)
    numbers = {kind: number for number, kind in enumerate(ropes)}
    steps: list[Step] = []
    cache: dict[str, int] = {}  # {kind of layer: the step with the keys and values that later layers of it use}
    first_shared = config.num_hidden_layers - config.shared
    for layer, (kind, window) in enumerate(zip(config.layer_types or (), windows(config), strict=True)):
        block, shares = origin.block(layer), layer >= first_shared
        op = _attention(f"{block}.self_attn", config, kind, heads[layer], cache[kind] if shares else None,
                        window, numbers[kind])  # fmt: skip
        if not shares:
            cache[kind] = len(steps)
        steps += _layer(block, config, layer, op, doubled=shares and bool(config.use_double_wide_mlp))
    return decoder(
        origin, config, steps, list(ropes.values()), embedding_scale=config.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping or 0.0, per_layer=_per_layer(origin, config),
    )  # fmt: skip


def _check(config: _Config, origin: Origin) -> None:
    kinds = config.layer_types or []
    if config.use_bidirectional_attention == "all":
        raise Unsupported("config.json says use_bidirectional_attention, which the native engine has not")
    if kinds[-1] != FULL:
        raise Unsupported(f"config.json says a last layer of type {kinds[-1]}, which Gemma 4 does not have")
    first_shared = config.num_hidden_layers - config.shared
    if missing := set(kinds[first_shared:]) - set(kinds[:first_shared]):
        raise AmqError(
            f"{origin.file}: {config.shared} layers use keys and values of those before them (num_kv_shared_layers), "
            f"none of which is of type {', '.join(sorted(missing))}; the file is damaged or was edited"
        )
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size:
        raise Unsupported("config.json says a vocab_size_per_layer_input other than vocab_size, or none")


def _heads(config: _Config, origin: Origin) -> list[tuple[int, int]]:
    """(heads of keys and values, features per head) of every layer; all of one type are alike."""
    kinds, own = config.layer_types or [], _own_heads(config, origin)
    found = []
    for layer in range(len(kinds)):
        heads = own.get(layer, _Heads())
        found.append((heads.num_key_value_heads or config.kv_heads, heads.head_dim or config.features))
        if config.num_attention_heads % found[-1][0]:
            raise AmqError(
                f"{origin.file}: layer {layer} has {found[-1][0]} heads of keys and values, expected a divisor of "
                f"num_attention_heads {config.num_attention_heads}; the file is damaged or was edited"
            )
    if len(set(zip(kinds, found, strict=True))) > len(set(kinds)):
        raise Unsupported("config.json says heads of several sizes for layers of one type (per_layer_config)")
    return found


def _own_heads(config: _Config, origin: Origin) -> dict[int, _Heads]:
    """{layer: what it has of its own}."""
    if config.per_layer_config is None:
        if config.global_head_dim is None:
            raise Unsupported("config.json says neither per_layer_config nor global_head_dim")
        full = _Heads(config.num_global_key_value_heads if config.attention_k_eq_v else None, config.global_head_dim)
        return {layer: full for layer, kind in enumerate(config.layer_types or ()) if kind == FULL}
    found = {}
    for number, said in config.per_layer_config.items():
        if not (number.isdecimal() and len(number) < 10 and int(number) < config.num_hidden_layers):
            raise AmqError(
                f"{origin.file}: per_layer_config is of layer {shorten(number)}, expected one below "
                f"{config.num_hidden_layers}; the file is damaged or was edited"
            )
        if strange := sorted(said.keys() - {f.name for f in fields(_Heads)}):
            raise Unsupported(f"config.json says {', '.join(strange)} of single layers (per_layer_config)")
        found[int(number)] = parse_record(said, _Heads, f"{origin.file} at $.per_layer_config")
    return found


def _ropes(origin: Origin, config: _Config, heads: list[tuple[int, int]]) -> dict[str, Rope]:
    """By the kind of layer."""
    kinds = config.layer_types or []
    return {kind: rope(origin, config, heads[kinds.index(kind)][1], kind) for kind in (SLIDING, FULL) if kind in kinds}


def _attention(prefix: str, config: _Config, kind: str, heads: tuple[int, int], cache_of: int | None, window: int,
               rotary: int) -> Attention:  # fmt: skip
    kv_heads, features = heads
    bias, q = bool(config.attention_bias), config.num_attention_heads * features
    keys_are_values = bool(config.attention_k_eq_v) and kind == FULL
    norms: dict[str, Any] = {"q_norm": norm(f"{prefix}.q_norm", features)}
    kv: dict[str, int] = {}
    if cache_of is None:
        norms = {**head_norms(prefix, features), "v_norm": ones(features)}
        kv = {name: kv_heads * features for name in (("k_proj",) if keys_are_values else ("k_proj", "v_proj"))}
    return Attention(
        config.num_attention_heads, kv_heads, features, linears(prefix, config.hidden_size, bias, q_proj=q, **kv),
        linears(prefix, q, bias, o_proj=config.hidden_size), scale=1.0,
        keys_are_values=keys_are_values and cache_of is None, cache_of=cache_of, rope=rotary, window=window, **norms,
    )  # fmt: skip


def _layer(block: str, config: _Config, layer: int, attention: Attention, doubled: bool) -> list[Step]:
    """The steps of a layer, the last of which ends with the layer's scale."""
    hidden, wide = config.hidden_size, (config.intermediate_size or 0) * (2 if doubled else 1)
    dense = mlp(f"{block}.mlp", hidden, wide, config.activation)
    feedforward = _mixture(block, config, dense) if config.enable_moe_block else dense
    scale = Array(f"{block}.layer_scalar", (1,))
    first, second = sandwich(block, hidden, attention, feedforward, norm)
    if not (width := config.hidden_size_per_layer_input):
        return [first, Step(second.op, second.norm, second.post_norm, after=scale)]
    op = PerLayerInput(
        linears(block, hidden, per_layer_input_gate=width), linears(block, width, per_layer_projection=hidden), layer,
        config.activation,
    )  # fmt: skip
    return [first, second, Step(op, post_norm=norm(f"{block}.post_per_layer_input_norm", hidden), after=scale)]


def _mixture(block: str, config: _Config, shared: Mlp) -> Mixture:
    count, top_k, wide = config.num_experts, config.top_k_experts, config.moe_intermediate_size
    if count is None or top_k is None or wide is None:
        raise Unsupported("config.json does not say num_experts, top_k_experts or moe_intermediate_size of its experts")
    hidden, root = config.hidden_size, config.hidden_size**-0.5
    router = Router(
        Linear(f"{block}.router.proj", count, hidden), top_k, normalized=True,
        norm=Array(f"{block}.router.scale", (hidden,), lambda scale: scale * root),
        expert_scale=Array(f"{block}.router.per_expert_scale", (count,)),
    )  # fmt: skip
    experts = tuple(
        mlp(f"{block}.experts", hidden, wide, config.activation,
            names=[f"{role}.{number}" for role in ("gate_proj", "up_proj", "down_proj")])
        for number in range(count)
    )  # fmt: skip
    return Mixture(
        router, experts, shared, routed_norm=norm(f"{block}.pre_feedforward_layernorm_2", hidden),
        shared_post_norm=norm(f"{block}.post_feedforward_layernorm_1", hidden),
        routed_post_norm=norm(f"{block}.post_feedforward_layernorm_2", hidden),
    )  # fmt: skip


def _per_layer(origin: Origin, config: _Config) -> PerLayerEmbedding | None:
    if not (width := config.hidden_size_per_layer_input):
        return None
    root, hidden, features = origin.root, config.hidden_size, config.num_hidden_layers * width
    return PerLayerEmbedding(
        Table(f"{root}embed_tokens_per_layer", config.vocab_size_per_layer_input or 0, features),
        linears(root.removesuffix("."), hidden, per_layer_model_projection=features),
        norm(f"{root}per_layer_projection_norm", width), width, table_scale=width**0.5, projection_scale=hidden**-0.5,
        sum_scale=2.0**-0.5,
    )  # fmt: skip
