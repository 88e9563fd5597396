"""One budget for weights and cache: `--memory SIZE --context N --cache auto`.

What each layer keeps of a sequence is one more variable of the knapsack: its choices are the kinds of cache that an
engine has (keys and values of a layer together, as the kinds have them), its sizes their bytes at the context, its
costs Fisher's, in the unit of the weights' (`amq.proxy.fisher`). Where one layer's keys are rounded by the page, every
sequence has spare pages of all layers: so there are two knapsacks, with those kinds and the spare pages, and without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from amq.configuration import Configuration, compact, expand, memory_items
from amq.errors import AmqError
from amq.model.inventory import Inventory
from amq.model.shape import CACHES, DEFAULT_CACHE, PAGE, SPARE_PAGES, LayerCache, kept_as
from amq.search.choose import budget_from_memory
from amq.search.knapsack import select
from amq.search.space import SearchSpace
from amq.util.progress import Progress
from amq.util.records import JsonFile, check_range

KINDS = tuple(sorted((k for k in CACHES if sum(CACHES[k]) <= sum(CACHES[DEFAULT_CACHE])), key=lambda k: sum(CACHES[k])))
"""What a layer may keep keys and values as, smallest first: all that takes no more than the default, which costs
nothing."""
MOST_LENGTH, WINDOWS, SCORED = 4096, 2, 256
"""A share's loss is measured on so many windows, of the context's length or MOST_LENGTH, at the last SCORED tokens."""
SHARED = "shared"
"""The joint knapsack's own choice, beside those with one kind for all."""
CacheTable = Mapping[str, Mapping[str, float]]
"""{layers.N: {kind: cost}}, of what costs something."""


@dataclass(frozen=True)
class Share:
    """A way to spend the memory. name: SHARED, or the kind that all layers have. kinds: of the layers that keep keys
    and values. cache_bytes: of all layers at the context; bits: per weight, that are left for what is searched, of
    which `formats` is the knapsack's choice. cost: of both, predicted by the tables; loss: measured through that cache,
    None where nothing could."""

    name: str
    kinds: dict[str, str]
    cache_bytes: int
    bits: float
    formats: dict[str, str]
    cost: float
    loss: float | None = None

    @property
    def shown(self) -> Share:
        """As a file has it: ranges of layers and experts."""
        return replace(self, kinds=compact(self.kinds), formats=compact(self.formats))


@dataclass(frozen=True, kw_only=True)
class Shares(JsonFile):
    """context.json: how memory was shared between weights and cache, all ways that were compared, and what was chosen.

    loss: measured on `windows` windows of `length` tokens, at the last `scored` of each. chosen: the name of one.
    final, final_in_default: losses there of what the whole search chose in the end, through the chosen cache and
    through one of 16 bits, which the memory has no room for; None before that is known.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/context/1",)
    REMEDY: ClassVar[str] = "run the search again"

    schema: str = SCHEMAS[0]
    memory: int
    context: int
    windows: int = 0
    length: int = 0
    scored: int = 0
    shares: tuple[Share, ...] = field(default_factory=tuple)
    chosen: str
    final: float | None = None
    final_in_default: float | None = None

    def __post_init__(self) -> None:
        check_range(self, "memory", most=1 << 60)
        check_range(self, "context")
        if self.chosen not in [share.name for share in self.shares]:
            raise ValueError(f"expected one of its shares as the chosen one, got {self.chosen!r}")

    @property
    def best(self) -> Share:
        return next(share for share in self.shares if share.name == self.chosen)

    def kinds_of(self, layers: Sequence[str]) -> dict[str, str]:
        """The chosen kinds of these layers, in their order, which ranges in a file do not keep."""
        found = expand(self.best.kinds)
        return {layer: found[layer] for layer in layers}


@dataclass(frozen=True)
class Sharing:
    """What is shared: `memory` bytes between the weights of `space` and what `caches` keep of `context` tokens.

    table, cache_table: costs of weights and of layers that keep keys and values, `layers` by their names.
    """

    memory: int
    context: int
    inventory: Inventory
    space: SearchSpace
    caches: tuple[LayerCache, ...]
    layers: tuple[str, ...]
    table: Mapping[str, Mapping[str, float]]
    cache_table: CacheTable

    def __post_init__(self) -> None:
        lacking = [
            (n, k) for n in self.layers for k in KINDS if k != DEFAULT_CACHE and k not in self.cache_table.get(n, ())
        ]
        if lacking:
            raise AmqError(
                f"the cost table lacks {lacking[0][0]} in a cache of {lacking[0][1]}: search again with --cache auto"
            )

    @cached_property
    def _costs(self) -> np.ndarray:
        """float64 [layers that keep, KINDS]."""
        rows = ([0.0 if k == DEFAULT_CACHE else self.cache_table[n][k] for k in KINDS] for n in self.layers)
        return np.array(list(rows)).reshape(len(self.layers), len(KINDS))

    @cached_property
    def _weights(self) -> np.ndarray:
        return self.space.variable_costs(self.table)

    def _sizes(self, spare: bool) -> np.ndarray:
        """Bytes at the context, int64 as `_costs`. spare: with each layer's part of the spare pages."""
        keeping = [cache for cache in self.caches if cache.per_token]

        def of(cache: LayerCache) -> int:
            more = SPARE_PAGES * PAGE * cache.per_token if spare else 0
            return cache.bytes(self.context) + more

        return np.array([[of(cache.coded(kind)) for kind in KINDS] for cache in keeping], np.int64)

    def shares(self) -> list[Share]:
        """All ways that fit, the joint one first; raises AmqError where none does."""
        joint = [kinds for spare in (False, True) if (kinds := self._joint(spare)) is not None]
        found = [share for kinds in joint if (share := self._share(SHARED, kinds)) is not None]
        best = sorted(found, key=lambda share: share.cost)[:1]
        for kind in reversed(KINDS):
            one = self._share(kind, (kind,) * len(self.layers))
            if one is not None and all(one.kinds != share.kinds for share in best):
                best.append(one)
        if not best:
            smallest = kept_as(self.caches, KINDS[0])
            budget_from_memory(
                self.memory, self.context, self.inventory, smallest, self.space
            )  # says what is too large
            raise AmqError(f"--memory {self.memory} holds no configuration with --context {self.context}")
        return best

    def _joint(self, spare: bool) -> tuple[str, ...] | None:
        """The layers' kinds in the least cost of weights and cache together; None where nothing fits."""
        allowed = np.array([spare or CACHES[kind][0] >= 8 for kind in KINDS])
        costs = np.where(allowed, self._costs, np.inf)
        n, m = len(self._weights), len(costs)
        width = max(self._weights.shape[1], len(KINDS))
        sizes = np.concatenate([_padded(self.space.sizes, width), _padded(self._sizes(spare), width)])
        both = np.concatenate([_padded(self._weights, width, np.inf), _padded(costs, width, np.inf)])
        smallest = Configuration(self.space.decode(self.space.smallest), self.space.group_size)
        others = sum(item.bytes for item in memory_items(self.inventory, smallest)) - smallest.bytes(self.space.weights)
        constant = sum(cache.constant for cache in self.caches if not cache.per_token)
        try:
            point = select(both, sizes, self.memory - others - constant - self.space.pinned_bytes)
        except AmqError:
            return None
        return tuple(KINDS[i] for i in point[n : n + m])

    def _share(self, name: str, kinds: Sequence[str]) -> Share | None:
        """What these kinds leave for the weights; None where that is too little."""
        caches = kept_as(self.caches, kinds)
        try:
            bits = budget_from_memory(self.memory, self.context, self.inventory, caches, self.space)
        except AmqError:
            return None
        point = select(self._weights, self.space.sizes, self.space.capacity(bits))
        cost = float(self._weights[np.arange(len(point)), point].sum())
        cost += sum(self._costs[i, KINDS.index(kind)] for i, kind in enumerate(kinds))
        size = sum(cache.bytes(self.context) for cache in caches)
        named = dict(zip(self.layers, kinds, strict=True))
        return Share(name, named, size, bits, self.space.decode(point), float(cost))


def _padded(rows: np.ndarray, width: int, value: float | None = None) -> np.ndarray:
    """[n, width], filled up with `value`, or each row with its last."""
    more = width - rows.shape[1]
    filling = np.repeat(rows[:, -1:], more, 1) if value is None else np.full((len(rows), more), value)
    return np.concatenate([rows, filling], 1).astype(rows.dtype)


Measure = Callable[[Mapping[str, str], Sequence[str]], float]
"""(formats, kinds of the layers) → loss behind a long prompt."""


def share_memory(sharing: Sharing, measure: Measure | None, length: int, progress: Progress) -> Shares:
    """All shares, of which the best is chosen: by their losses where `measure` gives these, on windows of `length`
    tokens, else by their costs."""
    found = []
    for share in sharing.shares():
        if measure is not None:
            share = replace(share, loss=measure(share.formats, list(share.kinds.values())))
        loss = "not measured" if share.loss is None else f"loss {share.loss:.5f} behind {length} tokens"
        progress.say(
            f"memory: cache {share.name}: {share.cache_bytes / 2**20:.1f} MiB of {sharing.context} tokens, leaves "
            f"{share.bits:.3f} bits per weight, {loss}"
        )
        found.append(share)
    best = min(found, key=lambda share: share.cost if share.loss is None else share.loss)
    return Shares(
        memory=sharing.memory, context=sharing.context, windows=WINDOWS if measure else 0, length=length,
        scored=SCORED if measure else 0, shares=tuple(share.shown for share in found), chosen=best.name,
    )  # fmt: skip


def prompt_length(context: int, tokens: int, unscored: int) -> int:
    """Of the windows that shares are measured on: the context, as far as a text of `tokens` tokens has WINDOWS of it,
    and MOST_LENGTH; 0 where that leaves no prompt before what is scored. unscored: tokens that windows begin with."""
    length = min(context, MOST_LENGTH, tokens // WINDOWS + unscored)
    return length if length > 2 * SCORED else 0
