"""run.json, cost.json and surrogate.json as typed records; docs/format.md says what they mean.

A record is built by the search, written as it stands, and read back as the same record by whoever goes on from the run:
`--resume`, `select`, `amq.eval`, the report. Fields that runs of schema 1 lack have a default.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import amq
from amq.configuration import Provenance, compact, expand_name
from amq.errors import AmqError
from amq.formats import KEPT, NO_ROTATION
from amq.model.inventory import BEFORE, EMBEDDING, EXPERT, HEAD, LINEAR, Inventory, LinearSpec, OtherWeight
from amq.model.shape import DEFAULT_CACHE, FULL, SLIDING, LayerCache, ModelShape, kept_as
from amq.search.settings import SearchSettings
from amq.search.space import SearchSpace
from amq.util.machine import cpu_name, gpu_facts, installed_versions
from amq.util.records import JsonFile, check_range, shorten

KIND_NAMES = {"small": "norm_or_bias"}
"""Kinds of other weights that runs before 2026-11-29 have under another name."""
MOST_LAYERS = 1 << 16
"""Lists of this length are made from a number of layers; no model comes near."""
PACKAGES = ("torch", "transformers", "numpy", "scipy", "hqq", "pymoo", "scikit-learn")
AGAIN = "run the search again"


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """The searched model: what identifies its weights, its weights' number, and how many decoder blocks it has."""

    name: str
    fingerprint: str
    parameters: int
    blocks: int
    architecture: str = ""

    def __post_init__(self) -> None:
        check_range(self, "blocks", most=MOST_LAYERS)
        check_range(self, "parameters", most=1 << 48)


@dataclass(frozen=True, kw_only=True)
class TextEntry:
    """The calibration text; windows: a hash of all windows that the run measures on; window_prefix: the tokens that
    each of them begins with."""

    name: str = ""
    sha256: str
    tokens: int | None = None
    windows: str = ""
    window_prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class GpuEntry:
    """`amq.util.machine.gpu_facts`."""

    name: str
    capability: str
    memory_bytes: int
    driver: str = ""


@dataclass(frozen=True)
class MachineEntry:
    """gpu: where `device` is one; runs before 2026-11-30 do not say."""

    cpu: str = ""
    system: str = ""
    threads: int | None = None
    device: str = ""
    gpu: GpuEntry | None = None

    @staticmethod
    def of(device: str, threads: int) -> MachineEntry:
        """This machine, for a run on `device`."""
        gpu = gpu_facts(device)
        return MachineEntry(cpu_name(), platform.platform(), threads, device, None if gpu is None else GpuEntry(**gpu))


@dataclass(frozen=True)
class LinearEntry(LinearSpec):
    """A `LinearSpec` whose numbers were looked at; or, with the name of all of them, the experts of a layer and role
    that are alike but for their number."""

    def __post_init__(self) -> None:
        check_range(self, "block", least=BEFORE, most=MOST_LAYERS)
        check_range(self, "out_features", "in_features", "experts", "top_k")
        if self.kind not in (LINEAR, EXPERT, HEAD, EMBEDDING):
            raise ValueError(f"expected a kind of weight, got {shorten(self.kind)}")
        if self.kind == EXPERT and not all(n.rpartition(".")[2].isdecimal() for n in expand_name(self.name)):
            raise ValueError(f"expected a name of experts that ends in their numbers, got {shorten(self.name)}")

    @property
    def expanded(self) -> list[LinearSpec]:
        """The specs that it stands for."""
        of = vars(self)
        if self.kind != EXPERT:
            return [LinearSpec(**of)]
        numbers = ((name, int(name.rpartition(".")[2])) for name in expand_name(self.name))
        return [LinearSpec(**{**of, "name": name, "expert": number}) for name, number in numbers]

    @staticmethod
    def of(specs: Iterable[LinearSpec]) -> tuple[LinearEntry, ...]:
        """Of all of them, in their order."""
        alike = {s.name: replace(s, name="", expert=None) if s.kind == EXPERT else s for s in specs}
        return tuple(LinearEntry(**{**vars(spec), "name": name}) for name, spec in compact(alike).items())


@dataclass(frozen=True)
class OtherEntry:
    """An `OtherWeight` without its shape."""

    name: str
    kind: str
    numel: int
    reason: str = ""

    def __post_init__(self) -> None:
        check_range(self, "numel", least=0, most=1 << 48)


@dataclass(frozen=True)
class CacheEntry:
    """What each of `layers` layers in a row keeps of a sequence, in bytes: see `amq.model.shape.LayerCache`."""

    layers: int
    per_token: int
    constant: int = 0
    window: int | None = None
    heads: int = 0

    def __post_init__(self) -> None:
        check_range(self, "layers", most=MOST_LAYERS)
        check_range(self, "per_token", "constant", "heads", least=0)
        check_range(self, "window")


@dataclass(frozen=True)
class KvEntry:
    """What the layers of the model keep of a sequence, or why that is not known.

    The other fields are what runs before 2026-11-29 have instead: names and numbers of a Hugging Face config.
    """

    entries: tuple[CacheEntry, ...] | None = None
    unknown: str | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_size: int | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        check_range(self, "num_hidden_layers", least=0, most=MOST_LAYERS)
        check_range(
            self, "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "sliding_window", least=0
        )

    @staticmethod
    def of(shape: ModelShape) -> KvEntry:
        """`unknown` where config.json does not say enough."""
        try:
            runs = [(cache, len(list(equal))) for cache, equal in groupby(shape.caches)]
        except AmqError as error:
            return KvEntry(unknown=str(error))
        return KvEntry(tuple(CacheEntry(n, c.per_token, c.constant, c.window, c.heads) for c, n in runs))

    def caches(self, kinds: str | Sequence[str] = DEFAULT_CACHE) -> tuple[LayerCache, ...]:
        """Of all layers, as `amq.model.shape.kept_as` takes `kinds`; raises AmqError where they are not known."""
        return kept_as(self._caches(), kinds)

    def named(self, kind: str) -> dict[str, str]:
        """{layer: kind} for all layers that keep keys and values, as `Configuration.cache`."""
        return dict.fromkeys(self.layers, kind)

    @property
    def layers(self) -> tuple[str, ...]:
        """Those that keep keys and values."""
        return tuple(f"layers.{n}" for n, cache in enumerate(self._caches()) if cache.per_token)

    def _caches(self) -> tuple[LayerCache, ...]:
        if self.unknown is not None:
            raise AmqError(self.unknown)
        if self.entries is not None:
            return tuple(
                LayerCache(e.per_token, e.constant, e.window, e.heads) for e in self.entries for _ in range(e.layers)
            )
        kinds = self.layer_types  # nothing is known here of layers of other types: the most that they could hold
        full = None if kinds is None else [kind if kind == SLIDING else FULL for kind in kinds]
        return ModelShape.of(replace(self, layer_types=full)).caches


@dataclass(frozen=True)
class Evaluations:
    """How many evaluations of each kind a run has, and what one costs."""

    count: int
    sensitivities: int
    confirmations: int = 0
    seconds_each: float | None = None
    cost_in_evaluations: float | None = None
    share_outside_model: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunFile(JsonFile):
    """run.json: what was searched, how, and how far it came.

    status: running, stopped (by `--time`) or finished; measured_by: what ran the candidates, which runs before
    2026-12-01 do not say; rotation: of the bank, one of `BANK_ROTATIONS`; linears: of the blocks, the experts of a
    layer and role in one entry. outer: head and embeddings, which `--head 16bit` leaves out of the search. pinned:
    {linear: format} by the user and by pruning. timings: {stage: seconds} and `evaluations` are known at the end.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/run/3", "amq/run/2", "amq/run/1")
    """Runs of schema 2 know of no head or embedding, and windows of schema 1 began without the tokenizer's BOS: they
    are chosen from and reported, but not resumed."""
    REMEDY: ClassVar[str] = AGAIN

    schema: str = SCHEMAS[0]
    status: str
    model: ModelEntry
    settings: SearchSettings
    calibration: TextEntry
    versions: dict[str, str]
    machine: MachineEntry
    bank: str = ""
    measured_by: str = ""
    rotation: str = NO_ROTATION
    linears: tuple[LinearEntry, ...]
    outer: tuple[LinearEntry, ...] = ()
    others: tuple[OtherEntry, ...]
    head_is_tied: bool
    kv_cache: KvEntry
    pinned: dict[str, str]
    timings: dict[str, float] | None = None
    evaluations: Evaluations | None = None

    def __post_init__(self) -> None:
        names = [s.name for entry in (*self.linears, *self.outer) for s in entry.expanded]
        if not self.linears or len(set(names)) != len(names):
            raise ValueError("expected linears with distinct names")

    @classmethod
    def parse(cls, data: Any, source: str) -> RunFile:
        """As for every file; a setting that this version does not know is an error too, not ignored. Runs before schema
        3 searched without the head, and those that name no rotation without one."""
        settings = data.get("settings") if isinstance(data, dict) else None
        if isinstance(settings, dict):
            before = {"rotation": NO_ROTATION}
            if data.get("schema") in cls.SCHEMAS[1:]:
                before["head"] = KEPT.name
            data = {**data, "settings": {**before, **settings}}
        known = {f.name for f in fields(SearchSettings)}
        if isinstance(settings, dict) and (unknown := sorted(settings.keys() - known)):
            raise AmqError(f"{source}: settings has {unknown[0]!r}, unknown to this version: use the one that wrote it")
        return super().parse(data, source)

    @property
    def inventory(self) -> Inventory:
        """The model's parts; only the path of its blocks and the shapes of other weights are unknown."""
        others = tuple(OtherWeight(o.name, KIND_NAMES.get(o.kind, o.kind), o.numel, (), o.reason) for o in self.others)
        linears, outer = (tuple(s for e in some for s in e.expanded) for some in (self.linears, self.outer))
        return Inventory("", self.model.blocks, linears, others, self.head_is_tied, outer)

    @property
    def provenance(self) -> Provenance:
        """Where a configuration of this run came from, and what names its bank."""
        of = self.settings
        return Provenance(
            proxy=of.proxy, calibration=self.calibration.name, window_length=of.window_length,
            bank_windows=of.bank_windows, seed=of.seed, rotation=self.rotation, solver=of.solver, cost=of.cost,
            formats=of.formats, loss=of.loss, window_prefix=self.calibration.window_prefix,
            model_fingerprint=self.model.fingerprint, amq=amq.__version__,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cost(JsonFile):
    """cost.json: {linear: {format: cost}}; passes: backward passes that a Fisher table is the mean of. cache: {layer:
    {kind: cost}} of what layers keep of a sequence, of a search with `--cache auto`."""

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/cost/2", "amq/cost/1")
    """Fisher scores of schema 1 are sums of squares position by position; those of schema 2 are of `fisher.RUNS`."""
    REMEDY: ClassVar[str] = AGAIN

    schema: str = SCHEMAS[0]
    kind: str
    unit: str = ""
    passes: int | None = None
    cost: dict[str, dict[str, float]]
    cache: dict[str, dict[str, float]] | None = None

    def __post_init__(self) -> None:
        check_range(self, "passes")
        for linear, row in (*self.cost.items(), *(self.cache or {}).items()):
            for fmt, cost in row.items():
                if not math.isfinite(cost):
                    raise ValueError(f"expected a finite cost of {linear} in {fmt}, got {cost}")

    def check(self, space: SearchSpace, path: Path) -> None:
        """Raises AmqError unless each linear of `space` has a cost in each format but 16 bits, which costs nothing."""
        remedy = "it is damaged or was edited; delete it and run the search with --resume"
        kept = {name for name, fmt in space.pinned.items() if fmt is KEPT}
        wanted = {name: sizes.keys() - {KEPT.name} for name, sizes in space.weight_sizes.items() if name not in kept}
        for name in self.cost.keys() ^ wanted.keys():
            what = "has a linear {} that the run does not" if name in self.cost else "lacks the linear {}"
            raise AmqError(f"{path}: the table {what.format(shorten(name))}: {remedy}")
        for name, formats in wanted.items():
            for fmt in formats - self.cost[name].keys():
                raise AmqError(f"{path}: the table lacks {name} in {fmt}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class SurrogateScores:
    """A row of surrogate.json: how one iteration's surrogate predicted candidates that it had not seen."""

    iteration: int
    evaluations: int
    surrogate: str
    rmse: float | None
    spearman: float | None
    kendall: float | None
    hypervolume: float
    best_loss_at_budget: float | None


def versions() -> dict[str, str]:
    """Of amq, Python and the packages that results depend on."""
    found = dict.fromkeys(PACKAGES, "not installed") | installed_versions(PACKAGES)
    return {"amq": amq.__version__, "python": platform.python_version(), **found}
