"""The files of a run folder as typed records, one per file; docs/format.md says what they mean.

`RunFile` and `CostFile` hold what `select` and `--resume` compute with, so their fields are required and bounded.
The records after them are for the report, which draws what is there: every field may be absent or null, but has its
type. A value that fits none of them is one AmqError that names the file and the place in it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.formats import KEPT
from amq.model.inventory import Inventory, LinearSpec, OtherWeight
from amq.model.shape import FULL, SLIDING, LayerCache, ModelShape
from amq.search.settings import SearchSettings
from amq.search.space import SearchSpace
from amq.util.files import read_json
from amq.util.records import check_range, parse_record, shorten

RUN_SCHEMA = "amq/run/2"
READABLE = (RUN_SCHEMA, "amq/run/1")
"""Windows of schema 1 began without the tokenizer's BOS: it is chosen from and reported, but not resumed."""
COST_SCHEMA = "amq/cost/1"
KIND_NAMES = {"small": "norm_or_bias"}
"""Kinds of other weights that runs before 2026-11-29 have under another name."""
MOST_LAYERS = 1 << 16
"""Lists of this length are made from a number of layers; no model comes near."""


@dataclass(frozen=True)
class ModelEntry:
    """The searched model: what identifies its weights, and how many decoder blocks it has."""

    fingerprint: str
    blocks: int

    def __post_init__(self) -> None:
        check_range(self, "blocks", most=MOST_LAYERS)


@dataclass(frozen=True)
class TextEntry:
    """The calibration text; windows: a hash of all windows that the run measures on; window_prefix: the tokens that
    each of them begins with (both absent in runs of schema 1)."""

    sha256: str
    windows: str = ""
    window_prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class LinearEntry:
    name: str
    block: int
    role: str
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        check_range(self, "block", least=0, most=MOST_LAYERS)
        check_range(self, "out_features", "in_features")


@dataclass(frozen=True)
class OtherEntry:
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

    def __post_init__(self) -> None:
        check_range(self, "layers", most=MOST_LAYERS)
        check_range(self, "per_token", "constant", least=0)
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
    def of(shape: ModelShape) -> dict[str, Any]:
        """As run.json holds it; `unknown` where config.json does not say enough."""
        try:
            runs = [(cache, len(list(equal))) for cache, equal in groupby(shape.caches)]
        except AmqError as error:
            return {"unknown": str(error)}
        return {"entries": [{"layers": count, **asdict(cache)} for cache, count in runs]}

    def caches(self) -> tuple[LayerCache, ...]:
        """Of all layers; raises AmqError where they are not known."""
        if self.unknown is not None:
            raise AmqError(self.unknown)
        if self.entries is not None:
            return tuple(LayerCache(e.per_token, e.constant, e.window) for e in self.entries for _ in range(e.layers))
        kinds = self.layer_types  # nothing is known here of layers of other types: the most that they could hold
        full = None if kinds is None else [kind if kind == SLIDING else FULL for kind in kinds]
        return ModelShape.of(replace(self, layer_types=full)).caches


@dataclass(frozen=True)
class RunFile:
    """run.json, as far as a run is resumed or chosen from by it."""

    schema: str
    settings: dict[str, Any]
    model: ModelEntry
    calibration: TextEntry
    linears: tuple[LinearEntry, ...]
    others: tuple[OtherEntry, ...]
    head_is_tied: bool
    kv_cache: KvEntry

    @staticmethod
    def read(path: Path) -> tuple[RunFile, SearchSettings]:
        """The file and its settings; raises AmqError where either is not what a search writes."""
        data = read_json(path)
        check_schema(data, path, *READABLE)
        run = parse_record(data, RunFile, str(path))
        unknown = sorted(run.settings.keys() - {f.name for f in fields(SearchSettings)})
        if unknown:
            raise AmqError(f"{path}: settings has {unknown[0]!r}, unknown to this version: use the one that wrote it")
        names = [s.name for s in run.linears]
        if not names or len(set(names)) != len(names):
            raise AmqError(f"{path}: expected linears with distinct names; the file is damaged or was edited")
        return run, parse_record(run.settings, SearchSettings, f"{path}: settings")

    @property
    def inventory(self) -> Inventory:
        """The model's parts; only the path of its blocks and the shapes of other weights are unknown."""
        linears = tuple(LinearSpec(s.name, s.block, s.role, s.out_features, s.in_features) for s in self.linears)
        others = tuple(OtherWeight(o.name, KIND_NAMES.get(o.kind, o.kind), o.numel, (), o.reason) for o in self.others)
        return Inventory("", self.model.blocks, linears, others, self.head_is_tied)


@dataclass(frozen=True)
class CostFile:
    """cost.json; passes: backward passes that a Fisher table is the mean of."""

    schema: str
    kind: str
    cost: dict[str, dict[str, float]]
    passes: int | None = None

    def __post_init__(self) -> None:
        check_range(self, "passes")
        for linear, row in self.cost.items():
            for fmt, cost in row.items():
                if not math.isfinite(cost):
                    raise ValueError(f"expected a finite cost of {linear} in {fmt}, got {cost}")

    @staticmethod
    def read(path: Path, space: SearchSpace) -> CostFile:
        """Raises AmqError unless each linear of `space` has a cost in each format but 16 bits, which costs nothing."""
        data = read_json(path)
        check_schema(data, path, COST_SCHEMA)
        file = parse_record(data, CostFile, str(path))
        remedy = "it is damaged or was edited; delete it and run the search with --resume"
        kept = {name for name, fmt in space.pinned.items() if fmt is KEPT}
        wanted = {name: sizes.keys() - {KEPT.name} for name, sizes in space.linear_sizes.items() if name not in kept}
        for name in file.cost.keys() ^ wanted.keys():
            what = "has a linear {} that the run does not" if name in file.cost else "lacks the linear {}"
            raise AmqError(f"{path}: the table {what.format(shorten(name))}: {remedy}")
        for name, formats in wanted.items():
            for fmt in formats - file.cost[name].keys():
                raise AmqError(f"{path}: the table lacks {name} in {fmt}: {remedy}")
        return file


def check_schema(data: Any, path: Path, *schemas: str) -> None:
    """Raises AmqError unless `data` is an object of one of the schemas, of which the first is the current one."""
    found = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if found not in schemas:
        raise AmqError(f"{path}: expected schema {schemas[0]!r}, got {str(found)[:60]!r}: run the search again")


@dataclass(frozen=True)
class Row:
    """A point of front.json, or the choice in configuration.json, as the report shows it."""

    name: str | None = None
    bits_per_weight: float | None = None
    loss: float | None = None
    loss_confirm: float | None = None
    predicted: float | None = None
    predicted_loss: float | None = None
    configuration: dict[str, str] | None = None
    formats: dict[str, str] | None = None
    memory: Memory | None = None


@dataclass(frozen=True)
class MemoryRow:
    name: str | None = None
    bytes: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Memory:
    items: list[MemoryRow] | None = None
    total: float | None = None


@dataclass(frozen=True)
class Band:
    low: list[float | None] | None = None
    high: list[float | None] | None = None


@dataclass(frozen=True)
class ShownFront:
    """front.json."""

    uniform: list[Row] | None = None
    front: list[Row] | None = None
    curve: list[Row] | None = None
    band: Band | None = None
    fit: dict[str, float | None] | None = None


@dataclass(frozen=True)
class ShownLinear:
    name: str | None = None
    role: str | None = None
    block: int | None = None
    out_features: int | None = None
    in_features: int | None = None


@dataclass(frozen=True)
class ShownModel:
    name: str | None = None
    fingerprint: str | None = None
    parameters: int | None = None
    blocks: int | None = None


@dataclass(frozen=True)
class ShownSettings:
    """Those that the report's text and charts mention; its table lists all."""

    formats: str | list[str] | None = None
    solver: str | None = None
    loss: str | None = None
    target_bits: float | None = None
    memory: str | int | None = None
    max_loss: float | None = None
    refine: int | None = None


@dataclass(frozen=True)
class ShownMachine:
    cpu: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class ShownRun:
    """run.json."""

    status: str | None = None
    model: ShownModel | None = None
    settings: ShownSettings | None = None
    versions: dict[str, Any] | None = None
    machine: ShownMachine | None = None
    calibration: dict[str, Any] | None = None
    linears: list[ShownLinear] | None = None
    pinned: dict[str, str] | None = None
    timings: dict[str, float | None] | None = None
    evaluations: dict[str, float | None] | None = None


@dataclass(frozen=True)
class ShownSensitivity:
    """sensitivity.json."""

    lowest: str | None = None
    highest: str | None = None
    base_loss: float | None = None
    median: float | None = None
    threshold: float | None = None
    loss: dict[str, float | None] | None = None
    pinned: list[str] | None = None


@dataclass(frozen=True)
class ShownCost:
    """cost.json."""

    kind: str | None = None
    unit: str | None = None
    cost: dict[str, dict[str, float | None]] | None = None


@dataclass(frozen=True)
class ShownScores:
    """A row of surrogate.json: the scores of one iteration."""

    iteration: float | None = None
    evaluations: int | None = None
    surrogate: str | None = None
    rmse: float | None = None
    spearman: float | None = None
    kendall: float | None = None
    hypervolume: float | None = None
    best_loss_at_budget: float | None = None


def read_shown(path: Path, kind: Any) -> Any:
    """The JSON file `path`, checked to be a `kind`, as plain objects; None where it is absent."""
    if not path.is_file():
        return None
    data = read_json(path)
    parse_record(data, kind, str(path))
    return data
