"""Tokens per second of the CUDA engine on paper: every call of a decode step, what it must read, issue and wait for.

    python benchmarks/gpu/derive_engine.py [--activations int8] [--json FILE]

Nothing runs on a GPU. The calls are those of the real code (`amq.runtime.cuda_pass.PassBuilder`, over weights without
memory); instructions and tensor-core products are read from what nvcc makes of the kernels (roofline.py). A call takes

    max(bytes / (STREAM_SHARE · bandwidth), issue slots, tensor cores) + staging of x + TRIPS · TRIP_US + GAP_US

The ceiling is the data sheet's bandwidth over the bytes of all weights, head included, and nothing else: no cache, no
launch. Everything that is assumed is a constant below that says where it comes from; benchmarks/gpu/engine.py measures.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import roofline  # noqa: E402
import torch  # noqa: E402
from provenance import write_results  # noqa: E402
from roofline import Gpu, Loop  # noqa: E402

from amq.formats import FORMATS, get_format  # noqa: E402
from amq.kernels.cuda_calls import ACTIVATE, KINDS, Call, SampleCall  # noqa: E402
from amq.kernels.gpu_layout import layout_of  # noqa: E402
from amq.packing import PreparedWeight  # noqa: E402
from amq.runtime.cuda_buffers import PAGE, Buffers, Inputs, KeyCache, StepPlaces  # noqa: E402
from amq.runtime.cuda_pass import SPLITS, PassBuilder  # noqa: E402
from amq.runtime.decoder_spec import Array, DecoderSpec, Linear  # noqa: E402
from amq.runtime.families import read_spec  # noqa: E402

STREAM_SHARE = 0.88
"""Of the data sheet's bandwidth that a kernel reaches which only streams: cub's BabelStream loops on an RTX 5090, large
arrays, 1,573 of 1,792 GB/s (NVIDIA/cccl, pull request 9881); torch's copy on an A800, 1,727 of 1,935
(mli/transformers-benchmarks, issue 4). That the linears reach what a copy does is the target of docs/gpu.md."""
GAP_US = 0.5
"""Between two kernels of a CUDA graph that wait for each other: 3.4 µs a kernel of 2.9 on a V100 (NVIDIA's technical
blog, "Getting Started with CUDA Graphs"). Programmatic launches, which would hide some of it, are not used."""
TRIP_US = 0.6
"""A load that misses the L2 cache and is waited for, with nothing else to do meanwhile: assumed, some 1,500 clocks of
an RTX 4090. Taken for every GPU, and for trips to L2 too, which are shorter."""
TRIPS = {"LinearCall": 2, "AttentionCall": 6, "NormCall": 2, "EmbedCall": 2, "SampleCall": 8}
"""Loads of a call that follow one another, read in kernels/cuda: of a linear x, then weights until they flow; of
attention position, page table, keys, values, then partial results and the counter; of a norm its row, twice; of an
embedding the token and its row; of sampling, logits a few times over and what blocks hand on."""
STAGING_BYTES = 64
"""That a multiprocessor takes from L2 per clock: the width of its port since Volta."""


def constant(file: str, name: str) -> int:
    """A `constexpr int` of kernels/cuda."""
    found = re.search(rf"constexpr int {name} = (\d+)(?: << (\d+))?;", (roofline.KERNELS / file).read_text())
    if found is None:
        raise SystemExit(f"kernels/cuda/{file} has no constexpr int {name} with a number any more: mend {__file__}")
    return int(found[1]) << int(found[2] or 0)


BLOCKS = constant("gemv.cuh", "kBlocksOfMultiprocessor")
"""Of a linear on a multiprocessor; each stages x for itself."""
SHARED_BYTES = constant("stage.cuh", "kStageBytes")
"""Of x that a block stages at most; where x is more, or items are fewer than multiprocessors, blocks share the
features."""
GATHER_TRIPS = 2
"""Of a linear whose features are shared: the counter, then what the other blocks found."""
SAMPLE_READS = 3
"""Times that sampling reads the logits."""
GROUP_SIZE = 128
HEAD = "int6"
CONTEXTS, ROWS, CACHES = (512, 8192), (1, 8), ("float16", "int8")
GPUS = (
    *(gpu for gpu in roofline.GPUS if gpu.name.startswith("RTX")),
    Gpu("H100", 90, 3350, 132, 1.83, 1024, 2),
)
"""Data sheets, tensor cores as in roofline.py."""


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @cached_property
    def spec(self) -> DecoderSpec:
        config = {
            "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary, "max_position_embeddings": max(CONTEXTS), "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "rope_theta": 500000.0, "tie_word_embeddings": False, "head_dim": 128,
        }  # fmt: skip
        return read_spec(config, self.name, {"model.layers.0.mlp.gate_proj", "lm_head", "model.embed_tokens.weight"})


MODELS = (
    Model("Llama-3.1-8B", 32, 4096, 32, 8, 14336, 128256),
    Model("Llama-2-7B", 32, 4096, 32, 32, 11008, 32000),
)
FORMAT_SETS = {"int4": ("int4",), "int3": ("int3",), "mixed": ("int2", "int3", "int4")}
"""Formats that linears take in turn; mixed: 3 bits on average, to a hundredth."""


class NoMemory:
    """`CudaWeights` of a model in formats that its linears take in turn, on device meta."""

    def __init__(self, spec: DecoderSpec, formats: Sequence[str]) -> None:
        self.spec, self.device = spec, torch.device("meta")
        self.checkpoint = SimpleNamespace(record=SimpleNamespace(group_size=GROUP_SIZE))
        linears = {linear.name: linear for linear in spec.parts(Linear)}
        chosen = {name: formats[(i + i // len(formats)) % len(formats)] for i, name in enumerate(linears)}
        self.prepared = {name: self._prepared(linear, chosen[name]) for name, linear in linears.items()}
        self.prepared[spec.head.name] = self._prepared(Linear(spec.head.name, spec.head.rows, spec.head.columns), HEAD)
        self.rows: dict[str, Any] = {}
        self.elements = {array.key: self._floats(*array.shape) for array in spec.parts(Array)}
        table = spec.embedding
        self.elements[table.name] = torch.empty(table.rows, table.columns, dtype=torch.float16, device=self.device)
        for index in range(len(spec.ropes)):
            self.elements |= {f"rope.{index}.{name}": self._floats(1) for name in ("cos", "sin")}

    def _floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, device=self.device)

    def _prepared(self, linear: Linear, name: str) -> PreparedWeight:
        fmt, (n, k) = get_format(name), (linear.out_features, linear.in_features)
        data = torch.empty(layout_of(fmt, n, k, GROUP_SIZE).nbytes, dtype=torch.uint8, device=self.device)
        return PreparedWeight("cuda", fmt, n, k, GROUP_SIZE, data)

    @property
    def bytes(self) -> int:
        """Of codes, scales and zero points."""
        return sum(w.format.stored_bytes(w.out_features, w.in_features, GROUP_SIZE) for w in self.prepared.values())

    @property
    def bits(self) -> float:
        """Average bits of a code in the blocks."""
        inner = [w for name, w in self.prepared.items() if name != self.spec.head.name]
        counts = [w.out_features * w.in_features for w in inner]
        return sum(n * w.format.bits for n, w in zip(counts, inner, strict=True)) / sum(counts)


class NoLibrary:
    """In place of a `CallLibrary`: nothing is launched, and scratch has no size."""

    def size(self, function: str, call: Call) -> int:
        return 0


def decode_calls(weights: NoMemory, rows: int, int8: bool) -> list[Call]:
    """All calls of a decode step that chooses its tokens itself, as `amq.runtime.cuda_own` makes them."""
    library, spec, device = NoLibrary(), weights.spec, weights.device
    pages = -(-max(CONTEXTS) // PAGE)
    buffers = Buffers(spec, max(ROWS), max(ROWS) * SPLITS, torch.float16, device)
    cache = KeyCache(StepPlaces.of(spec, library, ["float16"] * spec.own_caches), 1, device)
    inputs = Inputs(rows, torch.zeros(rows, pages, dtype=torch.int32, device=device))
    builder = PassBuilder(library, weights, buffers, inputs, cache, None, int8, None)
    logits = torch.empty(rows, spec.head.rows, device=device)
    body, head = builder.build(rows, decode=True), builder.build_head(buffers.stream[:rows], logits)
    return [*body.parts, *head.parts, Call(SampleCall, {"rows": rows, "vocabulary": spec.head.rows})]


@dataclass(frozen=True)
class Cost:
    """Microseconds of a call. work: what it reads, issues or multiplies, whichever takes longest; latency: the rest."""

    kind: str
    work: float
    latency: float


class Costs:
    """Of calls on one GPU. loops: of its architecture, by format."""

    def __init__(self, gpu: Gpu, loops: Sequence[Loop], activations: str) -> None:
        self.gpu = gpu
        self.loops = {
            loop.format: loop
            for loop in loops
            if (loop.architecture, loop.activations) == (gpu.architecture, activations)
        }
        self._formats = {get_format(name).bits: name for name in FORMATS if get_format(name).is_dense}

    def of(self, call: Call, positions: int, cache: str) -> Cost:
        kind = type(call.struct).__name__
        work = {"LinearCall": self._linear, "SampleCall": self._sample}.get(kind, lambda struct: 0.0)(call.struct)
        if kind == "AttentionCall":
            work = self._stream(attention_bytes(call.struct, positions, cache))
        trips = TRIPS[kind] + (GATHER_TRIPS if kind == "LinearCall" and self._is_shared(call.struct) else 0)
        return Cost(kind, work, trips * TRIP_US + GAP_US)

    def _stream(self, size: float) -> float:
        return size / (STREAM_SHARE * self.gpu.gigabytes_per_second) / 1e3

    def _linear(self, struct: Any) -> float:
        """All weights of a call, one behind another, and x staged before them."""
        need: Counter[str] = Counter()
        for weight in struct.weights[: struct.n_weights]:
            loop = self.loops[self._formats[weight.bits]]
            need.update(roofline.expected(self.gpu, loop, (weight.rows, struct.in_features)))
        element = 4 if struct.x_kind == KINDS[torch.float32] else 2
        staged = min(2 * struct.rows * struct.in_features, SHARED_BYTES) / 2 * element
        staging = BLOCKS * staged / (STAGING_BYTES * self.gpu.gigahertz) / 1e3
        return max(need["memory"] / STREAM_SHARE, need["issue"], need["tensor"]) + staging

    def _is_shared(self, struct: Any) -> bool:
        """Whether blocks share the features of x: an item is as many output rows as a format takes at once."""
        sides = struct.n_weights if struct.epilogue == ACTIVATE else 1
        weights = struct.weights[: struct.n_weights]
        items = sum(weight.rows / self.loops[self._formats[weight.bits]].rows for weight in weights) / sides
        return items < self.gpu.multiprocessors or 2 * struct.rows * struct.in_features > SHARED_BYTES

    def _sample(self, struct: Any) -> float:
        return self._stream(SAMPLE_READS * 4 * struct.rows * struct.vocabulary)


def attention_bytes(struct: Any, positions: int, cache: str) -> int:
    """Keys and values of all rows, each of a sequence of its own; int8 has a scale of 4 bytes for each head."""
    of_head = 2 * struct.head_dim if cache == "float16" else struct.head_dim + 4
    return 2 * struct.rows * positions * struct.n_kv_heads * of_head


def derive(gpu: Gpu, loops: Sequence[Loop], activations: str) -> list[dict[str, Any]]:
    """A row for each model, formats, number of rows, positions and cache."""
    costs = Costs(gpu, loops, activations)
    found = []
    for model in MODELS:
        for name, formats in FORMAT_SETS.items():
            weights = NoMemory(model.spec, formats)
            common = {"gpu": gpu.name, "model": model.name, "formats": name, "bits": round(weights.bits, 3),
                      "weight_bytes": weights.bytes, "activations": activations}  # fmt: skip
            ceiling = gpu.gigabytes_per_second * 1e9 / weights.bytes
            for rows in ROWS:
                calls = decode_calls(weights, rows, activations == "int8")
                of_layer = sum(type(call.struct).__name__ != "EmbedCall" for call in calls[:-1]) // model.layers
                for positions in CONTEXTS:
                    for cache in CACHES:
                        step = sum_of([costs.of(call, positions, cache) for call in calls], rows)
                        found.append({
                            **common, "rows": rows, "positions": positions, "cache": cache, "launches": len(calls),
                            "launches_per_layer": of_layer, **step, "ceiling": round(ceiling, 1),
                            "share": round(step["tokens_per_second"] / rows / ceiling, 4),
                        })  # fmt: skip
    return found


def sum_of(costs: Sequence[Cost], rows: int) -> dict[str, float]:
    work: Counter[str] = Counter()
    for cost in costs:
        work[cost.kind] += cost.work
    latency = sum(cost.latency for cost in costs)
    step = work.total() + latency
    return {
        "linears_us": round(work["LinearCall"], 1), "attention_us": round(work["AttentionCall"], 1),
        "latency_us": round(latency, 1), "step_us": round(step, 1), "tokens_per_second": round(rows * 1e6 / step, 1),
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each GPU, model and formats; tokens per second of all rows together."""
    of = {tuple(row[name] for name in ("gpu", "model", "formats", "rows", "positions", "cache")): row for row in found}
    columns = [(rows, positions, "float16") for rows in ROWS for positions in CONTEXTS]
    columns.append((max(ROWS), max(CONTEXTS), "int8"))
    heads = [f"{rows} row{'s' * (rows > 1)}, {p}{', int8 cache' * (c == 'int8')}" for rows, p, c in columns]
    lines = [
        "| GPU | model | formats | ceiling | " + " | ".join(heads) + f" | share of the ceiling at {heads[0]} |",
        "|---|---|---|---|" + "---|" * (len(heads) + 1),
    ]
    for gpu, model, formats in dict.fromkeys((row["gpu"], row["model"], row["formats"]) for row in found):
        rows = [of[(gpu, model, formats, *column)] for column in columns]
        cells = " | ".join(f"{row['tokens_per_second']:.0f}" for row in rows)
        share = 100 * rows[0]["share"]
        lines.append(f"| {gpu} | {model} | {formats} | {rows[0]['ceiling']:.0f} | {cells} | {share:.0f} % |")
    return "\n".join(lines)


def steps_table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: where a step of one row goes, at the fewest positions."""
    lines = ["| GPU | model | formats | launches (a layer) | linears µs | attention µs | waits and gaps µs | step µs |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in found:
        if (row["rows"], row["positions"], row["cache"]) == (ROWS[0], CONTEXTS[0], "float16"):
            lines.append(
                f"| {row['gpu']} | {row['model']} | {row['formats']} | {row['launches']} ({row['launches_per_layer']}) "
                f"| {row['linears_us']:.0f} | {row['attention_us']:.0f} | {row['latency_us']:.0f} "
                f"| {row['step_us']:.0f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", choices=("fp16", "int8"), default="fp16", help="what linears multiply")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    loops = roofline.read_loops(tuple(sorted({gpu.architecture for gpu in GPUS})))
    found = [row for gpu in GPUS for row in derive(gpu, loops, arguments.activations)]
    print(f"{table(found)}\n\n{steps_table(found)}")
    if arguments.json:
        write_results(arguments.json, {"assumed": assumed(), "rows": found})
    return 0


def assumed() -> dict[str, Any]:
    names = ("STREAM_SHARE", "GAP_US", "TRIP_US", "TRIPS", "GATHER_TRIPS", "STAGING_BYTES", "BLOCKS", "SHARED_BYTES")
    return {name: globals()[name] for name in (*names, "SAMPLE_READS")} | {"gpus": [asdict(gpu) for gpu in GPUS]}


if __name__ == "__main__":
    sys.exit(main())
