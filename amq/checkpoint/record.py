"""What config.json says of a quantized model under `quantization_config` (docs/format.md): one typed record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from amq.configuration import Configuration, compact, expand
from amq.errors import AmqError
from amq.formats import KEPT, BitFormat, check_group_size, get_format
from amq.model.experts import split_expert
from amq.model.inventory import LinearSpec
from amq.packing import PackedWeight, check_rotation
from amq.util.records import MOST, parse_record, to_json

METHOD = "amq"
"""`quant_method` in config.json."""
VERSIONS = (1, 2, 3, 4)
"""1: only linears are packed. 2: an embedding is read from the packed head, which a reader of version 1 would look for
in vain. 3: there are experts, by names that older readers do not find, or an embedding with a packed weight of its own.
4: weights are rotated, which an older reader would multiply as if they were not. A file has the lowest that says what
is in it."""


@dataclass(frozen=True)
class QuantizationRecord:
    """What config.json says under `quantization_config`.

    formats: {linear: format name}, every quantized linear of the model.
    shapes: {linear: (out_features, in_features)}; bytes alone do not tell how many codes the last unit of a row holds.
    quantizer: the method that made the weights, such as `gptq`; for information.
    shared_inputs: groups of linears that read one tensor (q, k, v), which a runtime may multiply in one call.
    head: the linear behind the blocks (`lm_head`), where it is one of `formats`; else empty.
    embedding: {embedding: linear} where an embedding's row i is row i of that packed linear: tied weights. Such an
        embedding has no tensor of its own. One that is packed by itself is named for itself, and is in `formats`.
    kept: {linear: (out_features, in_features)} of the linears, head and embeddings that were left in 16 bits by choice:
        plain tensors under their own names, counted in bits per weight.
    rotation: {linear: width} of those whose codes are of W H (`amq.rotation`); others are not rotated. Linears of a
        group of `shared_inputs` agree, and so do the experts of a layer and role. Head and embeddings are not rotated.
    cache: {layer: kind of cache} as `Configuration.cache` has it, for a runtime that is not told another. A reader that
        does not know a kind, or this field, reads the same weights.

    An expert's linear is named like every other, `model.layers.0.mlp.experts.gate_proj.3`; the file writes experts that
    agree once (`amq.configuration.compact`).
    """

    formats: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    group_size: int
    quantizer: str = ""
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    head: str = ""
    embedding: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rotation: Mapping[str, int] = field(default_factory=dict)
    cache: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in (*self.shapes.items(), *self.kept.items()):
            if min(shape) < 1 or max(shape) > MOST:
                raise ValueError(f"expected a shape of {name} from 1 to {MOST}, got {list(shape)}")

    @property
    def configuration(self) -> Configuration:
        """Of everything that has a format, head and embeddings included, and of what is kept."""
        formats = {**self.formats, **dict.fromkeys(self.kept, KEPT.name)}
        return Configuration(formats, self.group_size, cache=self.cache)

    @property
    def bits_per_weight(self) -> float:
        """Of everything that has a format, kept linears at their 16 bits; a tied pair counts once."""
        shapes = {**self.shapes, **self.kept}
        return self.configuration.bits_per_weight([LinearSpec(n, 0, n, *shape) for n, shape in shapes.items()])

    @property
    def own_embeddings(self) -> tuple[str, ...]:
        """Embeddings with a packed weight of their own."""
        return tuple(name for name, linear in self.embedding.items() if name == linear)

    @property
    def multiplied(self) -> tuple[str, ...]:
        """The formats, each once, of linears: what a backend has to run. An embedding's rows are looked up."""
        return tuple(sorted({fmt for name, fmt in self.formats.items() if self.embedding.get(name) != name}))

    @property
    def has_experts(self) -> bool:
        return any(split_expert(name) for name in (*self.formats, *self.kept))

    @property
    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """`shapes` of the blocks' linears: without head and embeddings."""
        outer = {self.head, *self.own_embeddings}
        return {name: shape for name, shape in self.shapes.items() if name not in outer}

    @property
    def version(self) -> int:
        if self.rotation:
            return 4
        if self.own_embeddings or self.has_experts:
            return 3
        return 2 if self.embedding else 1

    def json(self) -> dict[str, Any]:
        records = {name: asdict(get_format(name)) for name in sorted(set(self.formats.values()))}
        head = {
            "quant_method": METHOD,
            "version": self.version,
            "records": {n: {k: v for k, v in r.items() if k != "name"} for n, r in records.items()},
        }
        file = replace(self, cache=compact(self.cache))
        if self.version >= 3:  # readers of earlier ones know each linear by its own name alone
            formats, shapes, kept = compact(self.formats), compact(self.shapes), compact(self.kept)
            file = replace(file, formats=formats, shapes=shapes, kept=kept, rotation=compact(self.rotation))
        optional = ("head", "embedding", "kept", "rotation", "cache")
        return head | {name: value for name, value in to_json(file).items() if value or name not in optional}

    @staticmethod
    def parse(data: Any, source: str) -> QuantizationRecord:
        """Reads `quantization_config`; `source` names the file in errors. Unknown keys are ignored."""
        if not isinstance(data, Mapping) or data.get("quant_method") != METHOD:
            found = data.get("quant_method") if isinstance(data, Mapping) else None
            raise AmqError(f"{source}: expected quantization_config.quant_method {METHOD!r}, found {found!r}")
        version = data.get("version")
        if type(version) is not int or version not in VERSIONS:
            *earlier, last = VERSIONS
            raise AmqError(
                f"{source}: checkpoint version {version!r} is not known to this amq, which reads "
                f"{', '.join(map(str, earlier))} and {last}: upgrade amq"
            )
        where = f"{source}: quantization_config"
        record = parse_record(data, QuantizationRecord, where)._expanded(where)
        record._check(parse_record(data, _Records, where).records, source)
        if record.version > version:
            what = "experts" if record.has_experts else "packed embeddings like these"
            what = "rotations" if record.rotation else what
            raise AmqError(f"{source}: version {version} has no {what}; the file is damaged or was edited")
        return record

    def _expanded(self, source: str) -> QuantizationRecord:
        """This record, read from the file `source`, with a name for each expert."""
        try:
            formats, shapes, kept = expand(self.formats), expand(self.shapes), expand(self.kept)
            rotation, cache = expand(self.rotation), expand(self.cache)
        except ValueError as error:
            raise AmqError(f"{source}: {error}; the file is damaged or was edited") from None
        return replace(self, formats=formats, shapes=shapes, kept=kept, rotation=rotation, cache=cache)

    def _check(self, records: Mapping[str, Any], source: str) -> None:
        """Raises AmqError, naming the file `source`, unless the parts fit each other and this amq's formats.

        records: {format: its numbers, as the writer of the file knew it}.
        """
        check_group_size(self.group_size)
        if odd := sorted(self.formats.keys() ^ self.shapes.keys()):
            raise AmqError(f"{source}: linear {odd[0]!r} has a format or a shape, but not both; the file is damaged")
        for name in sorted(set(self.formats.values())):
            _check_record(get_format(name), records.get(name), source)
        once: set[str] = set()
        for name in (n for group in self.shared_inputs for n in group):
            if name not in self.formats or name in once:
                why = "which is in another group too" if name in once else "which has no format"
                raise AmqError(f"{source}: shared_inputs names {name!r}, {why}; the file is damaged")
            once.add(name)
        head = {"head": self.head} if self.head else {}
        for key, name in (*head.items(), *(("embedding", n) for n in self.embedding.values())):
            if name not in self.formats:
                raise AmqError(f"{source}: {key} names {name!r}, which has no format; the file is damaged")
        if self.head in self.own_embeddings:
            raise AmqError(f"{source}: {self.head!r} is the head and an embedding; the file is damaged")
        self._check_rotation(source)
        if both := sorted(self.formats.keys() & self.kept.keys()):
            raise AmqError(f"{source}: linear {both[0]!r} has a format and is kept as well; the file is damaged")

    def _check_rotation(self, source: str) -> None:
        outer = {self.head, *self.own_embeddings}
        for name, width in self.rotation.items():
            if name not in self.formats or name in outer:
                why = "a head or embedding, which is never rotated" if name in outer else "which has no format"
                raise AmqError(f"{source}: rotation names {name!r}, {why}; the file is damaged")
            check_rotation(width, self.shapes[name][1], f"{source}: {name}")
        layers: dict[str, list[str]] = {}
        for name in self.formats if self.rotation else ():
            if found := split_expert(name):
                layers.setdefault(found[0], []).append(name)
        alike = [(group, "other linears that read its input") for group in self.shared_inputs]
        alike += [(tuple(experts), "other experts of its layer") for experts in layers.values()]
        for group, others in alike:
            if len({self.rotation.get(name, 0) for name in group}) > 1:
                raise AmqError(f"{source}: {group[0]!r} and {others} are not rotated alike; the file is damaged")


@dataclass(frozen=True)
class _Records:
    """What else the file says, which this amq knows by itself."""

    records: dict[str, Any]


def _check_record(fmt: BitFormat, record: Any, source: str) -> None:
    expected = {"levels": fmt.levels, "unit_codes": fmt.unit_codes, "unit_bytes": fmt.unit_bytes}
    if record != expected:
        raise AmqError(f"{source}: format {fmt.name} was written as {record}, this amq knows it as {expected}")


def check_parts(
    linear: str, record: QuantizationRecord, qweight: Tensor, scale: Tensor, zero_point: Tensor
) -> PackedWeight:
    """The three tensors of `linear` as a PackedWeight of the recorded shape and format, or an error that names it."""
    out_features, in_features = record.shapes[linear]
    try:
        packed = PackedWeight(
            get_format(record.formats[linear]), in_features, record.group_size, qweight, scale, zero_point,
            rotation=record.rotation.get(linear, 0),
        )  # fmt: skip
    except AmqError as error:
        raise AmqError(f"{linear}: {error}; the checkpoint is damaged") from None
    if packed.out_features != out_features:
        raise AmqError(f"{linear}: expected {out_features} output rows, got {packed.out_features}; it is damaged")
    return packed
