"""A configuration `{linear: format}` and what it costs: bits per weight, bytes, and a whole model's memory, itemised.

It names every linear of the blocks, and the head and embeddings that have a format (`Inventory.outer`): one that it
does not name stays in 16 bits and is no part of it. Bits per weight is the average of stored bits over all that it
names: codes plus one fp16 scale and zero point per group. A linear whose rows fill their groups costs exactly
`code_bits + 32 / group_size` (the paper's accounting); a ragged last group pays for its scale and zero point in full,
because the file does. A linear that is kept (`"16bit"`) counts with its 16 bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from amq.errors import AmqError
from amq.formats import KEPT, STORED, BitFormat, Kept, check_group_size, get_stored, quantized_formats
from amq.model.inventory import EMBEDDING, HEAD, Inventory, LinearSpec, match_linears
from amq.model.shape import CACHES, DEFAULT_CACHE, LayerCache
from amq.util.files import read_json, write_json
from amq.util.records import check_range, parse_record, shorten, to_json

SCHEMA = "amq/configuration/1"
Value = TypeVar("Value")
NUMBERS = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")
MOST_NAMES = 1 << 20
"""That one file may stand for: a model of 128 experts in 100 layers has 38,400 linears of experts."""
CACHE = "KV cache"
"""What `memory_items` calls it."""
OTHER_BYTES = 2
"""Weights that stay unquantized are counted in 16 bits: what the model ships and runs in."""


@dataclass(frozen=True)
class Provenance:
    """Where a configuration came from: what names its bank (proxy to rotation, and the model), and how it was
    searched."""

    proxy: str | None = None
    calibration: str | None = None
    window_length: int | None = None
    bank_windows: int | None = None
    seed: int | None = None
    rotation: str | None = None
    solver: str | None = None
    cost: str | None = None
    formats: str | None = None
    loss: str | None = None
    window_prefix: tuple[str, ...] | None = None
    model_fingerprint: str | None = None
    amq: str | None = None

    def __post_init__(self) -> None:
        check_range(self, "window_length", "bank_windows")
        check_range(self, "seed", least=0)


@dataclass(frozen=True)
class MemoryItem:
    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """What must be resident to run a model."""

    items: tuple[MemoryItem, ...]
    total: int

    @staticmethod
    def of(items: Iterable[MemoryItem]) -> Memory:
        listed = tuple(items)
        return Memory(listed, sum(i.bytes for i in listed))


@dataclass(frozen=True)
class Details:
    """What a configuration says besides: its figures and its origin, None where they are not known.

    bytes: of what `formats` names. bytes_read: of weights, by one token. loss, loss_confirm (on held-out windows),
    predicted_loss: nats per token, or in the unit of the objective that `provenance.loss` names.
    tokens_per_second: of one user, by a speed table.
    """

    model: str | None = None
    bits_per_weight: float | None = None
    bytes: int | None = None
    bytes_read: int | None = None
    loss: float | None = None
    loss_confirm: float | None = None
    predicted_loss: float | None = None
    tokens_per_second: float | None = None
    memory: Memory | None = None
    provenance: Provenance | None = None


@dataclass(frozen=True)
class _File:
    """configuration.json without its details, which stand beside these."""

    group_size: int
    formats: dict[str, str]
    cache: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Configuration:
    """Which format each linear has, `16bit` for a kept one; plus, once known, figures and origin (`details`).

    cache: {layer: kind of CACHES} of all layers that keep keys and values, by the names of `ModelShape.keeping`: what a
        runtime is to keep them as. Empty: what it likes.
    """

    formats: Mapping[str, str]
    group_size: int
    details: Details = Details()
    cache: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def uniform(linears: Sequence[LinearSpec], fmt: BitFormat, group_size: int) -> Configuration:
        return Configuration({s.name: fmt.name for s in linears}, group_size)

    @property
    def quantized(self) -> dict[str, str]:
        """`formats` without the linears that are kept."""
        return quantized_formats(self.formats)

    def save(self, path: Path) -> None:
        """Writes `docs/format.md`'s configuration JSON, atomically."""
        head = {"schema": SCHEMA, "group_size": self.group_size, "formats": compact(self.formats)}
        cache = {"cache": compact(self.cache)} if self.cache else {}
        write_json(path, {**head, **cache, **to_json(self.details)})

    @staticmethod
    def load(path: Path) -> Configuration:
        """Reads and checks a configuration file."""
        data = read_json(path)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise AmqError(f"{path} is not a configuration: expected schema {SCHEMA!r}, found {shorten(found)}")
        file = parse_record(data, _File, str(path))
        for linear, name in file.formats.items():
            try:
                get_stored(name)
            except AmqError as error:
                raise AmqError(f"{path}: {linear}: {error}") from None
        for layers, kind in file.cache.items():
            if kind not in CACHES:
                raise AmqError(f"{path}: cache of {layers}: expected one of {', '.join(CACHES)}, got {shorten(kind)}")
        try:
            check_group_size(file.group_size)
            formats, cache = expand(file.formats), expand(file.cache)
        except (AmqError, ValueError) as error:
            raise AmqError(f"{path}: {error}") from None
        return Configuration(formats, file.group_size, parse_record(data, Details, str(path)), cache)

    def check(
        self,
        linears: Sequence[LinearSpec],
        unusable: Mapping[str, str] | None = None,
        outer: Sequence[LinearSpec] = (),
    ) -> None:
        """Refuses a configuration that is not of exactly these linears and any of `outer`.

        unusable: {linear: why it has no format}.
        """
        names = {s.name for s in linears}
        for name, reason in (unusable or {}).items():
            if name in self.formats:
                raise AmqError(
                    f"the configuration names {name}, which stays in 16 bits in any case ({reason}): take it out, or "
                    "search this model again"
                )
        unknown = sorted(self.formats.keys() - names - {s.name for s in outer})
        missing = sorted(names - self.formats.keys())
        if unknown:
            raise AmqError(
                f"the configuration names {unknown[0]!r} ({len(unknown)} such), which the model does not have: "
                "it was made for another model"
            )
        if missing:
            raise AmqError(
                f"the configuration lacks {missing[0]!r} ({len(missing)} linears missing): search this model again, or "
                f'give "{KEPT.name}" for linears that are to stay as they are'
            )

    def of(self, weights: Iterable[LinearSpec]) -> tuple[LinearSpec, ...]:
        """Those of `weights` that have a format here, `16bit` included."""
        return tuple(s for s in weights if s.name in self.formats)

    def bytes(self, weights: Iterable[LinearSpec]) -> int:
        """Stored bytes of those of `weights` that have a format here."""
        return sum(linear_bytes(s, get_stored(self.formats[s.name]), self.group_size) for s in self.of(weights))

    def bits_per_weight(self, weights: Sequence[LinearSpec]) -> float:
        """Of those of `weights` that have a format here."""
        return 8 * self.bytes(weights) / sum(s.numel for s in self.of(weights))

    def bytes_read(self, weights: Iterable[LinearSpec]) -> float:
        """Of the stored bytes, those that one token reads on average: of experts, the share that it is routed to."""
        sizes = ((s, linear_bytes(s, get_stored(self.formats[s.name]), self.group_size)) for s in self.of(weights))
        return sum(size * (1.0 if s.tied else s.read) for s, size in sizes)


def linear_bytes(spec: LinearSpec, fmt: BitFormat | Kept, group_size: int) -> int:
    return fmt.stored_bytes(spec.out_features, spec.in_features, group_size)


def parse_pins(pins: Sequence[str], linears: tuple[LinearSpec, ...]) -> dict[str, BitFormat | Kept]:
    """`REGEX=FORMAT` texts → {linear: format}; later ones win. The format `16bit` keeps a linear as it is."""
    pinned: dict[str, BitFormat | Kept] = {}
    for pin in pins:
        pattern, separator, name = pin.rpartition("=")
        if not separator or name not in STORED:
            raise AmqError(f"--pin {pin!r}: expected REGEX=FORMAT with a format of {', '.join(STORED)}")
        pinned.update(dict.fromkeys((s.name for s in match_linears(linears, pattern)), STORED[name]))
    return pinned


def memory_items(
    model: Inventory,
    configuration: Configuration,
    caches: Sequence[LayerCache] = (),
    context: int = 0,
    kept_as: str = DEFAULT_CACHE,
) -> tuple[MemoryItem, ...]:
    """Everything that must be resident to run the model: weights by kind, and the KV cache for `context` tokens.

    caches: what the layers keep (`ModelShape.caches`), needed when `context` > 0, with keys and values as `kept_as`.
    """
    stored = [(s, get_stored(configuration.formats[s.name])) for s in model.linears]
    outer = {s: get_stored(configuration.formats[s.name]) for s in configuration.of(model.outer)}
    kept = sum(linear_bytes(s, fmt, configuration.group_size) for s, fmt in stored if isinstance(fmt, Kept))
    codes = sum(s.out_features * fmt.row_bytes(s.in_features) for s, fmt in stored) - kept
    items = [
        MemoryItem("linears: codes", codes),
        MemoryItem("linears: scales and zero points", configuration.bytes(model.linears) - codes - kept),
        *([MemoryItem("linears: kept", kept, "16 bits, by choice")] if kept else ()),
        *_other_items(model, outer, configuration.group_size),
    ]
    if context:
        size = sum(cache.bytes(context) for cache in caches)
        items.append(MemoryItem(CACHE, size, f"{context} tokens in {kept_as}"))
    return tuple(items)


def bytes_read(model: Inventory, configuration: Configuration) -> float:
    """Bytes of weights that one token reads on average, which decides the speed of decoding; its KV cache not counted.

    Of experts the share that a token is routed to, of an embedding one row, of all else everything: at most what a
    text needs, for what stands outside the blocks (a vision tower) cannot be told from what it passes through.
    """
    named = configuration.of(model.outer)
    gone = {f"{name}.weight" for s in named for name in (s.name, s.tied)}
    multiplied = {f"{s.tied}.weight" for s in model.outer if s.tied}
    all_of_them = model.head_is_tied and not multiplied  # of a run whose embeddings were not listed
    rest = [o for o in model.others if o.kind != "embedding" or all_of_them or o.name in multiplied]
    return configuration.bytes_read(model.weights) + OTHER_BYTES * sum(o.numel for o in rest if o.name not in gone)


def _other_items(model: Inventory, outer: Mapping[LinearSpec, BitFormat | Kept], group_size: int) -> list[MemoryItem]:
    """What is outside the blocks' linears, by kind: at 16 bits each, but for the head and embeddings in `outer`."""
    packed = {s: fmt for s, fmt in outer.items() if not isinstance(fmt, Kept)}
    gone = {f"{name}.weight" for s in packed for name in (s.name, s.tied)}

    def total(kind: str) -> int:
        return OTHER_BYTES * sum(o.numel for o in model.others if o.kind == kind and o.name not in gone)

    def item(name: str, kind: str, others: str, note: str) -> MemoryItem:
        mine = {s: fmt for s, fmt in packed.items() if s.kind == kind}
        size = total(others) + sum(linear_bytes(s, fmt, group_size) for s, fmt in mine.items())
        return MemoryItem(name, size, ", ".join(dict.fromkeys(fmt.name for fmt in mine.values())) or note)

    head_is_packed = any(s.tied for s in packed)
    tied = "tied to the embeddings: the same bytes" if model.head_is_tied else "16 bits"
    items = [
        item(
            "embeddings", EMBEDDING, "embedding", "tied to the lm_head: the same bytes" if head_is_packed else "16 bits"
        ),
        item("lm_head", HEAD, "lm_head", tied),
        MemoryItem("norms and biases", total("norm_or_bias"), "16 bits"),
    ]
    rest = total("not quantized")
    if rest:
        reasons = sorted({o.reason for o in model.others if o.kind == "not quantized"})
        items.append(MemoryItem("not quantized", rest, "; ".join(reasons)))
    return items


def compact(values: Mapping[str, Value]) -> dict[str, Value]:
    """{name: value} with one key for all names that differ in their last part, a number, and have equal values.

    `experts.up_proj.0`, `.1`, `.2` and `.5` become `experts.up_proj.0-2,5`: what `expand` undoes. Other names stay as
    they are. Values: hashable, or lists of such.
    """
    groups: dict[tuple[str, object], list[int]] = {}
    keys: dict[str, tuple[str, object]] = {}
    for name, value in values.items():
        parent, _, number = name.rpartition(".")
        if number.isdecimal() and str(int(number)) == number:
            keys[name] = parent, tuple(value) if isinstance(value, list) else value
            groups.setdefault(keys[name], []).append(int(number))
    found: dict[str, Value] = {}
    written: set[tuple[str, object]] = set()
    for name, value in values.items():
        key = keys.get(name)
        if key is None:
            found[name] = value
        elif key not in written:
            written.add(key)
            found[f"{key[0]}.{_ranges(groups[key])}"] = value
    return found


def _ranges(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` → `"0-2,5"`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def expand(values: Mapping[str, Value]) -> dict[str, Value]:
    """The inverse of `compact`; names without such a last part stay. Raises ValueError where a name comes twice."""
    found: dict[str, Value] = {}
    count = 0
    for key, value in values.items():
        names = expand_name(key)
        count += len(names)
        if count > MOST_NAMES:
            raise ValueError(f"expected at most {MOST_NAMES} names, got more with {shorten(key)}")
        found.update(dict.fromkeys(names, value))
        if len(found) != count:
            raise ValueError(f"a linear or layer is named twice, the second time by {shorten(key)}")
    return found


def expand_name(key: str) -> list[str]:
    """`["experts.up_proj.0", "experts.up_proj.1"]` of `experts.up_proj.0-1`; of any other name that name alone."""
    parent, dot, last = key.rpartition(".")
    if not dot or last.isdecimal() or len(last) > MOST_NAMES or not NUMBERS.fullmatch(last):
        return [key]
    names: list[str] = []
    for part in last.split(","):
        low, _, high = part.partition("-")
        first, end = int(low[:10]), int((high or low)[:10])
        if not first <= end < MOST_NAMES:
            raise ValueError(f"expected rising numbers below {MOST_NAMES} in {shorten(key)}, got {shorten(part)}")
        names.extend(f"{parent}.{number}" for number in range(first, end + 1))
    return names


def configuration_key(formats: Mapping[str, str]) -> str:
    """A canonical text of `{linear: format}`, equal for equal configurations."""
    return json.dumps(compact(dict(sorted(formats.items()))), separators=(",", ":"))
