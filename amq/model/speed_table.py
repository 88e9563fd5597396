"""How long a decoded token takes, as a table: what a search with a budget of tokens/s reckons with.

    seconds(token) = rest + cache(positions before it) + Σ seconds(format, shape) of the linears that it reads

The sum is of the kernels that will run, measured one shape and format at a time; `rest` (norms, attention of a short
text, choosing) and `cache` come of whole passes of the engine (`amq.runtime.speed_measure`). A linear of an expert
counts as often as a token is routed to it. `benchmarks/speed_model.py` says how far off that is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from amq.errors import AmqError
from amq.model.inventory import EMBEDDING, LinearSpec
from amq.util.machine import cpu_name
from amq.util.native import cpu_module
from amq.util.records import JsonFile

MADE_BY = "amq bench MODEL --table FILE"
IGNORED = ("quantization_config", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map")
"""Keys of config.json that say nothing of the shape."""


@dataclass(frozen=True, kw_only=True)
class SpeedTable(JsonFile):
    """processor, isa, threads, kernels: what measured it; kernels is a hash of the compiled module. model: of
    config.json, which `rest` belongs to. activations, cache, group_size: as the engine was opened.

    rows: sequences that decode together; a token's seconds are those of a pass. linears: {"OUTxIN": {format: seconds}}.
    depths: {positions before the token: seconds of all but linears}, at least one.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq/speed/1",)
    REMEDY: ClassVar[str] = f"make one with {MADE_BY}"

    schema: str = SCHEMAS[0]
    processor: str
    isa: str
    threads: int
    kernels: str
    model: str
    activations: str
    cache: str
    group_size: int
    rows: int = 1
    linears: dict[str, dict[str, float]]
    depths: dict[str, float]

    def check(self, source: str, group_size: int, model: str | None = None, threads: int | None = None) -> None:
        """Refuses a table of another machine, other kernels or another model (None: not compared). source: names it in
        errors."""
        here = {
            "processor": cpu_name(), "isa": cpu_module().isa(), "threads": threads, "kernels": kernels(),
            "model": model, "group_size": group_size,
        }  # fmt: skip
        for what, value in here.items():
            if value is not None and (found := getattr(self, what)) != value:
                raise AmqError(
                    f"{source} is a speed table of another {WORDS[what]} ({found}, here {value}): times do not carry "
                    f"over; make one with {MADE_BY}"
                )

    def seconds(self, formats: Mapping[str, str], weights: Iterable[LinearSpec], context: int = 0) -> float:
        """Of one token after `context` others. formats: {weight: format} of `weights`, those that are multiplied by."""
        return self.beside(context) + sum(self.of(spec, formats[spec.name]) for spec in weights)

    def of(self, spec: LinearSpec, fmt: str) -> float:
        """Seconds of a weight's products for one token, on average; none for an embedding, whose rows are looked up."""
        if spec.kind == EMBEDDING:
            return 0.0
        shape = shape_key(spec.out_features, spec.in_features)
        found = self.linears.get(shape, {}).get(fmt)
        if found is None:
            raise AmqError(
                f"the speed table has no time of {spec.name} ({shape}) in {fmt}: make one with {MADE_BY}, whose "
                "--formats name it"
            )
        return found * spec.read

    def beside(self, context: int) -> float:
        """All but the linears, of a token after `context` others: between two measured depths on the line between."""
        known = sorted((int(depth), seconds) for depth, seconds in self.depths.items())
        if len(known) == 1 or context <= known[0][0]:
            return known[0][1]
        after = next((i for i, (depth, _) in enumerate(known) if depth >= context), len(known) - 1)
        (low, first), (high, last) = known[after - 1], known[after]
        return first + (last - first) * (context - low) / (high - low)


WORDS = {
    "processor": "processor", "isa": "instruction set", "threads": "number of threads", "kernels": "build of amq",
    "model": "model", "group_size": "group size",
}  # fmt: skip


def shape_key(out_features: int, in_features: int) -> str:
    return f"{out_features}x{in_features}"


def kernels() -> str:
    """A hash of the compiled module: other kernels have other speeds."""
    return hashlib.blake2b(Path(str(cpu_module().__file__)).read_bytes(), digest_size=8).hexdigest()


def model_key(config: Mapping[str, Any]) -> str:
    """A hash of what of config.json decides about the shape."""
    said = {key: value for key, value in config.items() if key not in IGNORED and not key.startswith("amq_")}
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
