"""Tokens per second of models larger than most caches and some memories, beside other engines:
`python benchmarks/engine_large.py DIR --shape 30B-A3B --json FILE`.

A random model of the shape (random_models.py), with as many layers as --most holds, is written into DIR, and as a GGUF
file with 4-bit blocks of 32 weights beside it; both are removed at the end. Engines take turns in one run, each in
processes of its own; of every peer the fastest of its ways is measured. Peers that are not installed are left out:
`pip install xllamacpp ik-llama-cpp-python`, whose wheels are compiled for AVX2, and llama-cpp-python, which is compiled
for the machine. (AMQ_CPU_ISA=avx2 keeps ours to AVX2 as well.) --smoke takes a tiny shape: it checks the benchmark and
measures nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decode_bytes import beside_weights, spec_of
from peers.gguf_layers import repeat_layers
from provenance import provenance, write_results
from random_models import (
    SHAPES,
    Bytes,
    Formats,
    Shape,
    layers_that_fit,
    sizes_by_layers,
    small_tokenizer,
    write_random,
)

from amq.bench.peers import PEERS
from amq.bench.result import OURS, BenchResult, Row
from amq.bench.run import bench
from amq.bench.settings import BenchSettings
from amq.export import export
from amq.model.open import resolve
from amq.util.progress import terminal_progress
from amq.util.records import to_json
from amq.util.settings import parse_size, run_command

SCHEMA = "amq/engine_large/1"
SMOKE = {"30B-A3B": "tiny-moe", "qwen3.5-9B": "tiny-hybrid"}


def write_gguf(folder: Path, shape: Shape, layers: int, formats: Formats, tokenizer: Path) -> Path:
    """A GGUF file of the shape, in `folder`: that of one period of layers, exported, again and again."""
    small, exported, output = folder / "period", folder / "period-gguf", folder / "model.gguf"
    write_random(small, shape.model(shape.period), formats, tokenizer)
    export(str(small), to="gguf", output=str(exported))
    repeat_layers(exported / "model.gguf", output, layers)
    for made in (small, exported):
        shutil.rmtree(made)
    return output


def measure(args: argparse.Namespace) -> dict[str, Any]:
    shape = SHAPES[SMOKE[args.shape] if args.smoke else args.shape]
    formats = Formats(group_size=32) if args.smoke else Formats()
    layers = args.layers or (2 * shape.period if args.smoke else layers_that_fit(shape, formats, parse_size(args.most)))
    folder = args.folder / args.shape
    folder.mkdir(parents=True)
    tokenizer = small_tokenizer(folder / "tokenizer") if args.smoke else resolve(args.tokenizer)
    try:
        write_random(folder / "amq", shape.model(layers), formats, tokenizer)
        spec = spec_of(folder / "amq")  # raises Unsupported before another engine of ours is measured
        file = str(write_gguf(folder, shape, layers, formats, tokenizer)) if args.peers else "auto"
        settings = BenchSettings(
            model=str(folder / "amq"), prompt=args.prompt, generate=args.generate, batch=args.batch, startup=False,
            repetitions=args.repetitions, threads=args.threads, peers=args.peers, gguf=file,
        )  # fmt: skip
        result = bench(settings, terminal_progress(), provenance())
        decoded = max(case.tokens for case in settings.cases)
        beside = beside_weights(spec, decoded // 2)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    sizes = [asdict(size) for size in sizes_by_layers(shape, formats)]
    return {
        "schema": SCHEMA, "shape": asdict(shape), "layers": layers, "formats": asdict(formats),
        "bytes_of_no_layer": sizes[0], "bytes_of_a_period": sizes[1], "bytes_beside_weights": beside,
        "bench": to_json(result), "rows": rows(result, shape, layers, sizes_by_layers(shape, formats), beside),
    }  # fmt: skip


def rows(
    result: BenchResult, shape: Shape, layers: int, sizes: tuple[Bytes, Bytes], beside: int
) -> list[dict[str, Any]]:
    """A row per engine and test; `whole` is tokens/s of all layers, extrapolated where fewer were measured: a prompt
    takes a layer's time for each, a decoded token that of the bytes that it reads."""
    rest, more = sizes
    read = [rest.read + more.read * count / shape.period for count in (layers, shape.layers)]
    bandwidth = result.read_bandwidth["memory"].bytes_per_second

    def row(measured: Row) -> dict[str, Any]:
        decode = measured.kind == "decode"
        factor = read[0] / read[1] if decode else layers / shape.layers
        moved = result.engines[measured.engine].weight_bytes + beside
        share = moved * measured.tokens_per_second / bandwidth if decode and measured.sequences == 1 else None
        return {
            "engine": measured.engine, "test": measured.test, "tokens_per_second": measured.tokens_per_second,
            "whole": measured.tokens_per_second * factor, "share_of_bandwidth": share, "others": measured.others,
            "ratio": None if measured.engine == OURS else result.ratios[measured.engine].get(measured.test),
        }  # fmt: skip

    return [row(measured) for measured in result.rows]


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    bench_, shape = content["bench"], content["shape"]
    machine, layers, whole = bench_["machine"], content["layers"], shape["layers"]
    lines = [
        f"{shape['source']}'s shape, {layers} of {whole} layers, {machine['processor']}, {machine['isa']}, "
        f"{bench_['settings']['threads']} threads",
        "",
        f"| engine | test | tokens/s | of {whole} layers, extrapolated | share of read bandwidth | ours ÷ theirs |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        share = "" if row["share_of_bandwidth"] is None else f"{row['share_of_bandwidth']:.0%}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        figures = f"{row['tokens_per_second']:.2f} | {row['whole']:.2f} | {share} | {ratio}"
        lines.append(f"| {row['engine']} | {row['test']} | {figures} |")
    lines += [""] if bench_["left_out"] or bench_["warnings"] else []
    lines += [f"{name} left out: {reason}" for name, reason in bench_["left_out"].items()]
    lines += [f"! {warning}" for warning in bench_["warnings"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--shape", choices=list(SMOKE), default="30B-A3B")
    parser.add_argument("--most", default="3.5GiB", metavar="SIZE", help="of the checkpoint's weights (default 3.5GiB)")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="default: as many as --most holds")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="LIST", help=f"of {', '.join(PEERS)}; empty: none")
    parser.add_argument("--prompt", default="512", metavar="LIST")
    parser.add_argument("--generate", default="64", metavar="LIST")
    parser.add_argument("--batch", default="1,4", metavar="LIST")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=None, metavar="N")
    parser.add_argument("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokenizer to copy")
    parser.add_argument("--keep", action="store_true", help="do not remove the models at the end")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape: checks the benchmark, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    content = measure(args)
    if args.json:
        write_results(args.json, content)
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main()))
