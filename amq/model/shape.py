"""What config.json says of a model's shape, worked out once: sizes, rotary positions, windows, and each layer's cache.

`ModelShape.of` takes config.json as it was read, a config of transformers, or any record with its keys. A config may
nest its text model, hold null, give a list with one value per layer, or keep settings of single layers beside the
common ones: Gemma 4's `head_dim` is such a setting, and asking the config itself for it raises a RuntimeError. `said`
is the one place that asks.

A cache is counted as transformers stores it from 5.20 on for a model in 16 bits (tests/test_shape.py compares the
two):

    full attention     keys and values of every token
    a window, chunks   of the last `window` tokens at most
    latent attention   (DeepSeek) kv_lora_rank + qk_rope_head_dim numbers per token, from which each step makes keys
                       and values anew; what stores those, as transformers did before, holds many times as much
    linear attention   (Mamba, gated delta nets, short convolutions) a state of constant size: what the convolution
                       looks back on in 16 bits, what is carried on in 32
    shared             (Gemma 3n and 4) nothing: these layers read another layer's keys and values
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from amq.errors import AmqError

log = logging.getLogger(__name__)

Sizes = tuple[int, int]
"""Of a layer's state: how many numbers a convolution looks back on, and how many a recurrence carries on."""
MOST_LAYERS = 1 << 16
"""No model comes near, and a list of that many costs nothing."""

CACHE_BYTES, STATE_BYTES = 2, 4
"""Of a number in the cache of a model in 16 bits, and of one that a recurrence carries on, which stays in float32."""
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
WINDOWED = {SLIDING: "sliding_window", "hybrid_sliding": "sliding_window", CHUNKED: "attention_chunk_size"}
"""{kind of layer: the key that says how many tokens it looks back on}."""
CACHES = {"float32": (32, 32), "float16": (16, 16), "int8": (8, 8), "k8v4": (8, 4), "int4": (4, 4)}
"""{what an engine keeps keys and values as: bits of a number of a key, and of a value}."""
DEFAULT_CACHE = "float16"
GRID_BYTES = 4
"""Of the scale and the least value that a key or value of less than 16 bits has; of keys in less than 8 bits, each
feature of a page has them."""
PAGE = 64
"""Positions that such keys are rounded together for."""
SPARE_PAGES = 3
"""That a sequence has beside those of its positions then: two where keys are in fp16 until their page is full, one for
the keys of its first page."""
STATES = frozenset({"linear_attention", "conv"})
BOTH = frozenset({"hybrid", "hybrid_sliding"})
"""Layers with a state beside keys and values."""
NOTHING = frozenset({"moe", "mlp", "dummy"})
INDEXED = "indexed_attention"
KINDS = frozenset({FULL, *WINDOWED, *STATES, *BOTH, *NOTHING, INDEXED})
OLD_KINDS = {
    "attention": FULL, "mamba": "linear_attention", "recurrent": "linear_attention",
    "deepseek_sparse_attention": INDEXED,
}  # fmt: skip
"""Kinds by the names that files and versions of transformers before 5.20 have for them."""


def said(config: Any, *names: str) -> Any:
    """The first of the keys `names` that `config` has and that is not null; None where there is none."""
    for name in names:
        if isinstance(config, Mapping | _LayerConfig):
            value = config.get(name)
        else:
            try:
                value = getattr(config, name, None)
            except Exception:  # noqa: BLE001 (a property may raise anything; a key that differs between layers does)
                value = None
        if value is not None:
            return value
    return None


def size(config: Any, *names: str) -> int | None:
    """`said`, where it is a positive whole number; None for anything else, which sizes nothing."""
    value = said(config, *names)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def need(config: Any, *names: str) -> int:
    """`size`, or an AmqError that names the key."""
    if (value := size(config, *names)) is None:
        raise AmqError(f"it says no {names[0]}")
    return value


def text_config(config: Any) -> Any:
    """The part of a config that describes the decoder."""
    if isinstance(config, Mapping):
        nested = config.get("text_config")
        return {**config, **nested} if isinstance(nested, Mapping) else config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


class _LayerConfig:
    """A config as one of its layers sees it: its own settings first, and its value of those that list every layer's."""

    def __init__(self, config: Any, layer: int, n_layers: int) -> None:
        own = said(config, "per_layer_config")
        if isinstance(own, Mapping):  # of config.json: {number: settings}, all numbers of as many digits
            written = (str(layer).zfill(digits) for digits in range(1, len(str(MOST_LAYERS)) + 1))
            own = next((own[number] for number in (*written, layer) if number in own), None)
        elif own is not None:
            own = own[layer]
        self._configs = (config,) if own is None else (own, config)
        self._layer, self._n_layers = layer, n_layers

    def get(self, name: str) -> Any:
        value = next((found for config in self._configs if (found := said(config, name)) is not None), None)
        if isinstance(value, list | tuple) and len(value) == self._n_layers:
            return value[self._layer]
        return value


@dataclass(frozen=True)
class Rotary:
    """How positions turn keys and queries. kind: `default`, `linear`, `llama3`, …; parameters: what else is said."""

    kind: str
    theta: float | None
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class LayerCache:
    """What a layer keeps of a sequence: `per_token` bytes of each of its last `window` tokens (None: of all), and
    `constant` bytes in any case. heads: of keys and values of one size that are all of `per_token`; 0: it is something
    else, or not known."""

    per_token: int = 0
    constant: int = 0
    window: int | None = None
    heads: int = 0

    def bytes(self, tokens: int) -> int:
        return self.constant + self.per_token * (tokens if self.window is None else min(tokens, self.window))

    def coded(self, kind: str) -> LayerCache:
        """With keys and values as a kind of CACHES, without spare pages: `kept_as` is for all layers of a model. Raises
        AmqError where that does not go by what is known here."""
        if kind == DEFAULT_CACHE:
            return self
        if not self.heads:
            raise AmqError(
                f"a cache in {kind} has no size that is known: the layers keep something else than keys and values of "
                "one size, or the search was made before 2026-12-01, and has to be made again"
            )
        numbers, (keys, values) = self.per_token // CACHE_BYTES // 2, CACHES[kind]
        by_page = keys < 8
        page_grids = (numbers if by_page else PAGE * self.heads * (keys < 16)) + PAGE * self.heads * (values < 16)
        return replace(self, per_token=numbers * (keys + values) // 8 + -(-GRID_BYTES * page_grids // PAGE))


def kept_as(caches: Sequence[LayerCache], kinds: str | Sequence[str]) -> tuple[LayerCache, ...]:
    """The caches of a model's layers with keys and values as `kinds` of CACHES: one for all, or one for each layer that
    has any, in their order.

    A page holds a part of every layer: so where one is rounded by the page, the spare pages are of all of them.
    """
    own = sum(cache.per_token > 0 for cache in caches)
    given = [kinds] * own if isinstance(kinds, str) else list(kinds)
    if len(given) != own:
        raise AmqError(f"expected a kind of cache for each of {own} layers with keys and values, got {len(given)}")
    spare = SPARE_PAGES * PAGE * any(CACHES[kind][0] < 8 for kind in given)
    each = iter(given)
    coded = (cache.coded(next(each)) if cache.per_token else cache for cache in caches)
    return tuple(replace(cache, constant=cache.constant + spare * cache.per_token) for cache in coded)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    kind: the word of transformers' `layer_types`. window: tokens that it looks back on, None for all.
    kv_heads, head_dim: of its attention; None where config.json names no heads.
    config: what is said of this layer.
    """

    kind: str
    window: int | None
    kv_heads: int | None
    head_dim: int | None
    config: _LayerConfig

    def cache(self) -> LayerCache:
        """Raises AmqError where the config does not say what the layer keeps."""
        if self.kind in NOTHING:
            return LayerCache()
        constant = self._state() if self.kind in STATES | BOTH else 0
        if self.kind in STATES:
            return LayerCache(constant=constant)
        numbers = self._numbers_per_token()
        heads = self.kv_heads or 0
        is_plain = numbers == 2 * heads * (self.head_dim or 0)
        return LayerCache(CACHE_BYTES * numbers, constant, self.window, heads if is_plain else 0)

    def _numbers_per_token(self) -> int:
        own_index = self.kind == INDEXED and said(self.config, "indexer_types") != "shared"
        index = (size(self.config, "index_head_dim") or 0) if own_index else 0
        if latent := size(self.config, "kv_lora_rank"):
            return latent + (size(self.config, "qk_rope_head_dim") or 0) + index
        if not self.kv_heads or not self.head_dim:
            raise AmqError(f"it names no attention heads for its layers of type {self.kind}")
        return self.kv_heads * (self.head_dim + (size(self.config, "v_head_dim") or self.head_dim)) + index

    def _state(self) -> int:
        for formula in STATE_FORMULAS:
            if (sizes := formula(self)) is not None:
                convolved, carried = sizes
                return CACHE_BYTES * convolved + STATE_BYTES * carried
        raise AmqError(f"it does not say in a known way what its layers of type {self.kind} carry on")


@dataclass(frozen=True)
class ModelShape:
    """name: of the kind of model, for errors. layers: of the decoder; none where config.json does not say how many.

    rotary: {kind of layer, or "" where all are alike: its rotary positions}.
    """

    name: str
    layers: tuple[LayerShape, ...]
    rotary: Mapping[str, Rotary]

    @staticmethod
    def of(config: Any) -> ModelShape:
        """Raises AmqError for more layers than a model has."""
        config = text_config(config)
        kinds = _kinds(config)
        layers = []
        for number, kind in enumerate(kinds):
            own = _LayerConfig(config, number, len(kinds))
            window = size(own, WINDOWED[kind]) if kind in WINDOWED else None
            layers.append(LayerShape(kind, window, *_heads(own, kind), own))
        return ModelShape(said(config, "model_type") or type(config).__name__, tuple(layers), _rotary(config))

    @property
    def window(self) -> int | None:
        """The fewest tokens that a layer looks back on; None where every layer looks back on all."""
        return min((layer.window for layer in self.layers if layer.window), default=None)

    def head_dim(self, layer: int) -> int | None:
        """Features per attention head of a layer; None where they are not known."""
        return self.layers[layer].head_dim if layer < len(self.layers) else None

    @property
    def keeping(self) -> tuple[str, ...]:
        """The layers that keep keys and values of their own, by the names (`layers.3`) that files give them."""
        return tuple(f"layers.{n}" for n, layer in enumerate(self.layers) if layer.kind not in NOTHING | STATES)

    def cache_kinds(self, named: Mapping[str, str]) -> tuple[str, ...]:
        """What `named` {layer: kind} says of each of `keeping`; raises AmqError unless it names these and no others."""
        keeping = self.keeping
        if odd := next((n for n in (*keeping, *named) if (n in named) != (n in keeping)), None):
            raise AmqError(
                f"expected a kind of cache for each of the {len(keeping)} layers of a {self.name} that keep keys and "
                f"values of their own, {'got none for' if odd in keeping else 'which are not'} {odd!r}"
            )
        return tuple(named[name] for name in keeping)

    @cached_property
    def caches(self) -> tuple[LayerCache, ...]:
        """Of all layers, for one sequence; raises AmqError where config.json does not say enough."""
        strange = sorted({layer.kind for layer in self.layers} - KINDS)
        if strange:
            log.warning("layers of type %s are counted as full attention, which holds the most", ", ".join(strange))
        try:
            if not self.layers:
                raise AmqError("it names no number of layers")
            return tuple(layer.cache() for layer in self.layers)
        except AmqError as error:
            raise AmqError(
                f"cannot size the KV cache of a {self.name}: {error}; give the budget as --target-bits"
            ) from None


def head_dim(config: Any) -> int | None:
    """Features per attention head, where they are the same in all layers, or of the layer whose `config` it is."""
    heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
    return size(config, "head_dim") or (hidden // heads if heads and hidden else None)


def kv_heads(config: Any) -> int | None:
    """Heads of keys and values, likewise, as they are cached.

    Falcon and GPT-BigCode say `multi_query` for a single one; Falcon's later layout repeats its heads for all queries.
    """
    heads = size(config, "num_attention_heads")
    if said(config, "new_decoder_architecture"):
        return heads
    return 1 if said(config, "multi_query") else size(config, "num_key_value_heads") or heads


def _heads(config: Any, kind: str) -> tuple[int | None, int | None]:
    """(heads of keys and values, features per head); Gemma 4 has others where a layer looks back on all."""
    heads, features = kv_heads(config), head_dim(config)
    if kind != FULL:
        return heads, features
    own_heads = size(config, "num_global_key_value_heads") if said(config, "attention_k_eq_v") else None
    return own_heads or heads, size(config, "global_head_dim") or features


def _kinds(config: Any) -> list[str]:
    """Every layer's kind; empty where the number of layers is unknown."""
    count = size(config, "num_hidden_layers") or 0
    kinds = said(config, "layer_types", "layers_block_type")
    if max(count, len(kinds or ())) > MOST_LAYERS:
        raise AmqError(f"config.json: num_hidden_layers is {count}, expected at most {MOST_LAYERS}; it is damaged")
    if kinds is None:
        kind = FULL
        if size(config, "sliding_window") and said(config, "use_sliding_window") is not False:
            kind = SLIDING
        elif size(config, "attention_chunk_size"):
            kind = CHUNKED
        kinds = [kind] * count
    kinds = [OLD_KINDS.get(kind, kind) for kind in map(str, kinds)]
    first = len(kinds) - (size(config, "num_kv_shared_layers") or 0)
    return [kind if layer < first else "dummy" for layer, kind in enumerate(kinds)]


def _rotary(config: Any) -> dict[str, Rotary]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` as before."""
    found = said(config, "rope_parameters") or said(config, "rope_scaling") or {}
    if not isinstance(found, Mapping):
        return {}
    kinds = {name: value for name, value in found.items() if isinstance(value, Mapping)}
    theta = said(config, "rope_theta")
    return {name: _one_rotary(value, theta) for name, value in (kinds or {"": found}).items()}


def _one_rotary(parameters: Mapping[str, Any], theta: float | None) -> Rotary:
    kind = said(parameters, "rope_type", "type") or "default"
    own = said(parameters, "rope_theta")
    return Rotary(kind, theta if own is None else own, {k: v for k, v in parameters.items() if k != "rope_theta"})


def _delta(layer: LayerShape) -> Sizes | None:
    """A gated delta net (Qwen3-Next), or Kimi's, whose heads are all alike."""
    config = layer.config
    if not (width := size(config, "linear_conv_kernel_dim")):
        return None
    if features := size(config, "linear_head_dim"):
        heads = need(config, "linear_num_heads")
        return 3 * heads * features * width, heads * features**2
    key, value = need(config, "linear_key_head_dim"), need(config, "linear_value_head_dim")
    heads = need(config, "linear_num_value_heads")
    convolved = 2 * need(config, "linear_num_key_heads") * key + heads * value
    return convolved * width, heads * key * value


def _mamba(layer: LayerShape) -> Sizes | None:
    """Mamba, or Mamba 2, which convolves what its groups share as well."""
    config = layer.config
    state = size(config, "mamba_d_state", "ssm_state_size", "state_size")
    width = size(config, "mamba_d_conv", "conv_kernel")
    if not state or not width:
        return None
    groups = size(config, "mamba_n_groups", "mamba_ngroups", "n_groups") or 0
    features = said(config, "mamba_d_head", "mamba_headdim", "mamba_head_dim", "head_dim")
    if groups and isinstance(features, int):  # else "auto"
        inner = features * need(config, "mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads")
    elif expand := said(config, "mamba_expand"):
        inner = int(expand * need(config, "hidden_size"))
    else:  # a plain Mamba says its width; Falcon-Mamba's `expand` is not what it was built with
        inner = need(config, "intermediate_size")
    return (inner + 2 * groups * state) * width, inner * state


def _convolution(layer: LayerShape) -> Sizes | None:
    """LFM2's short convolution."""
    width = size(layer.config, "conv_L_cache")
    return (need(layer.config, "hidden_size") * width, 0) if width else None


def _lru(layer: LayerShape) -> Sizes | None:
    """RecurrentGemma's linear recurrent unit, whose state lies in the model's modules."""
    width, units = size(layer.config, "conv1d_width"), size(layer.config, "lru_width")
    return (units * (width - 1), units) if width and units else None


def _lightning(layer: LayerShape) -> Sizes | None:
    """MiniMax' attention, whose heads carry a square on; told by its `block_size`."""
    if not size(layer.config, "block_size") or not layer.head_dim:
        return None
    return need(layer.config, "num_attention_heads") * layer.head_dim**2, 0


STATE_FORMULAS: tuple[Callable[[LayerShape], Sizes | None], ...] = (_delta, _mamba, _convolution, _lru, _lightning)
"""Each tells by the keys whether a layer is of its kind."""
