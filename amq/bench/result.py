"""What `python -m amq.bench --json` writes: every figure of a measurement, and what follows from them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from amq.bench.machine import Reading
from amq.util.records import JsonFile

OURS = "amq"


@dataclass(frozen=True, kw_only=True)
class SettingsEntry:
    """What was asked for; tests: the names of the cases."""

    repetitions: int
    threads: int
    seed: int
    device: str
    backend: str | None
    activations: str | None
    dtype: str
    tests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MachineEntry:
    """`amq.bench.machine.describe`; environment: variables that change speeds."""

    processor: str
    cores: int | None
    isa: str
    last_level_cache_bytes: int | None = None
    environment: dict[str, str]
    gpu: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReadBandwidth:
    """Of a buffer of `bytes` bytes, in bytes per second: median, lowest, highest."""

    bytes: int
    bytes_per_second: float
    lowest: float
    highest: float

    @staticmethod
    def of(reading: Reading) -> ReadBandwidth:
        samples, median = reading.samples, statistics.median(reading.samples)
        return ReadBandwidth(bytes=reading.size, bytes_per_second=median, lowest=min(samples), highest=max(samples))


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """One engine; weight_bytes: of the weights that one token reads; file: what a peer ran. None for what was not
    measured or is not known."""

    version: str = ""
    description: str = ""
    file: str | None = None
    file_bytes: int | None
    weight_bytes: int
    vocab_size: int
    load_seconds: float | None = None
    startup_seconds: tuple[float, ...] | None = None
    resident_memory_bytes: int
    peak_memory_bytes: int
    gpu_memory_bytes: int | None = None
    perplexity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine in one case; samples: tokens/s of every repetition, of which tokens_per_second is the median.

    first_token_seconds: of a prompt. The figures of bytes and shares are of decode: of the weights that a token reads.
    others: the share of all cores' time that other processes had meanwhile, None where the system does not say.
    """

    engine: str
    test: str
    kind: str
    tokens: int
    sequences: int
    depth: int
    threads: int
    configuration: str
    file_bytes: int | None
    weight_bytes_per_token: float | None
    tokens_per_second: float
    lowest: float
    highest: float
    samples: tuple[float, ...]
    first_token_seconds: float | None
    weights_bytes_per_second: float | None
    share_of_memory_bandwidth: float | None
    share_of_model_size_bandwidth: float | None
    others: float | None


@dataclass(frozen=True, kw_only=True)
class TextEntry:
    """What perplexities were measured on."""

    text: str
    windows: int
    window_length: int
    window_prefix: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BenchResult(JsonFile):
    """read_bandwidth: of a buffer that no cache holds (`memory`) and of one as large as the weights (`model`).

    ratios: {peer: {test or figure: ours over theirs}}; scaling: {engine: {test: tokens/s over those of one sequence}};
    trials: what every way to run the peer reached; left_out: {engine: why}; provenance: of a run that is kept
    (amq/util/provenance.py).
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/bench/1",)

    schema: str = SCHEMAS[0]
    model: str
    settings: SettingsEntry
    counted: str
    machine: MachineEntry
    read_bandwidth: dict[str, ReadBandwidth]
    engines: dict[str, EngineFacts]
    rows: tuple[Row, ...]
    ratios: dict[str, dict[str, float]]
    scaling: dict[str, dict[str, float]]
    perplexity: TextEntry | None = None
    trials: tuple[dict[str, Any], ...] = ()
    left_out: dict[str, str]
    warnings: tuple[str, ...]
    provenance: dict[str, Any] | None = None


def ratios(rows: Sequence[Row], engines: dict[str, EngineFacts], name: str) -> dict[str, float]:
    """Ours over theirs: tokens/s of every test; perplexity, bytes of the file and of the weights of a token."""
    speeds = {(row.engine, row.test): row.tokens_per_second for row in rows}
    tests = [test for engine, test in speeds if engine == OURS and (name, test) in speeds]
    found = {test: speeds[OURS, test] / speeds[name, test] for test in tests}
    for figure in ("perplexity", "file_bytes", "weight_bytes"):
        ours, theirs = getattr(engines[OURS], figure), getattr(engines[name], figure)
        if ours and theirs:
            found[figure] = ours / theirs
    return found


def scaling(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Tokens/s of several sequences over those of one: {engine: {test: factor}}."""
    single = {(r.engine, r.kind, r.tokens, r.depth): r for r in rows if r.sequences == 1}
    factors: dict[str, dict[str, float]] = {}
    for row in rows:
        one = single.get((row.engine, row.kind, row.tokens, row.depth))
        if row.sequences > 1 and one:
            factors.setdefault(row.engine, {})[row.test] = row.tokens_per_second / one.tokens_per_second
    return factors
