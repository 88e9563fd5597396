"""quantization.json: how a checkpoint was made, and how each of its weights came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from amq.configuration import Memory
from amq.quantize.settings import QuantizeSettings
from amq.util.records import JsonFile

LOG = "quantization.json"


@dataclass(frozen=True)
class SourceEntry:
    """The model that was quantized: as it was named, and what identifies its weights."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class LinearOutcome:
    """relative_error: ‖W − Ŵ‖/‖W‖, of what the method measures; None for a kept linear, and before it is known.
    rotation: the width, where its input is rotated."""

    format: str
    shape: tuple[int, int]
    relative_error: float | None = None
    rotation: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsOutcome:
    """Experts of one layer and role: {format: how many}, and the least and most of their relative errors.

    None where nothing is known of these: before the end, or where all are kept.
    """

    formats: dict[str, int]
    least_error: float | None = None
    most_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class OuterOutcome:
    """A head or an embedding that is quantized; embedding: of a head, the one that shares its weight."""

    name: str
    format: str
    shape: tuple[int, int]
    bytes: int
    relative_error: float | None = None
    embedding: str | None = None


@dataclass(frozen=True, kw_only=True)
class PerplexityFigures:
    """rows: {`full` or the method: perplexity, None where it was not finite}; tokens: scored, in all windows."""

    text: str
    tokens: int
    window_length: int
    window_prefix: tuple[str, ...] = ()
    rows: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What --tune did: `steps` on so many windows of a text, in `seconds`, and why it ended.

    start, best: KL divergence from the full-precision model on held-out windows, nats per token, of what was quantized
    and of what was kept; None where it was not finite. best_step: when that was seen, 0 for what was quantized.
    """

    text: str
    windows: int
    held_out: int
    start: float | None
    best: float | None
    steps: int
    best_step: int
    seconds: float
    end: str


@dataclass(frozen=True, kw_only=True)
class QuantizationLog(JsonFile):
    """not_quantized: {linear: why it could not be}; window_prefix: tokens that every calibration window begins with.

    bits_per_weight: of linears, head and embeddings that have a format. experts: {layer and role: what `linears` says
    of each of them}; errors are those before tuning. embeddings: those that are quantized and not tied to the head.
    head, perplexity, tuning: None where there is none. seconds, peak_memory_bytes: 0 until the end.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/quantization/1",)

    schema: str = SCHEMAS[0]
    settings: QuantizeSettings
    model: SourceEntry
    calibration_sha256: str
    window_prefix: tuple[str, ...] = ()
    bits_per_weight: float
    memory: Memory
    perplexity: PerplexityFigures | None = None
    linears: dict[str, LinearOutcome]
    not_quantized: dict[str, str]
    experts: dict[str, ExpertsOutcome] = field(default_factory=dict)
    head: OuterOutcome | None = None
    embeddings: tuple[OuterOutcome, ...] = ()
    tuning: Tuning | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_memory_bytes: int = 0
