"""Perplexity and decode speed at equal bytes, ours and other quantizers':
`python benchmarks/equal_bytes.py GGUF --work DIR --json FILE`.

All start from one model, GGUF in 32 bits on no grid (`peers.source`), and see one calibration text. Everything that
must be resident counts as bytes: linears, head, embeddings, norms. Rows are named `llama.cpp Q4_K_M`, `ik_llama.cpp
IQ4_K`, `auto-round int4`, `amq 3.5` (bits per weight of all that is searched), and `full precision`; they are added to
FILE as they are done, and a second call goes on with what is missing. What was quantized stays in DIR, for

    --speed         decode tokens/s of all rows that are there, in turn, instead of making any; on a quiet machine
    --table         the table of FILE, and nothing is measured

Peers: `pip install --no-deps ik-llama-cpp-python auto-round`, and llama-cpp-python, which is compiled (peers/ggml.py
says how). GGUF: a file, or the alias smollm2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from equal_bytes_make import AUTOROUND, OURS, Workshop
from equal_bytes_show import table
from equal_bytes_speed import measure_speeds
from provenance import provenance, write_results

from amq.bench.peers import ik_llama, llama_cpp
from amq.errors import AmqError
from amq.util.files import read_json
from amq.util.settings import run_command

SCHEMA = "amq/equal_bytes/1"
FULL = "full precision"
KINDS = {
    llama_cpp.NAME: "Q2_0,Q2_K,Q3_K_S,Q3_K_M,Q4_K_S,Q4_K_M,Q5_K_S,"
    "IQ2_XXS,IQ2_XS,IQ2_S,IQ2_M,IQ3_XXS,IQ3_S,IQ3_M,IQ4_XS,IQ4_NL",
    ik_llama.NAME: "IQ2_KS,IQ2_K,IQ3_KS,IQ3_K,IQ4_KS,IQ4_K,IQ5_KS,IQ2_KT,IQ3_KT,IQ4_KT",
    AUTOROUND: "int2,int3,int4",
}
"""What every peer's quantizer is asked for."""
NICE = 10


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    model = Path(args.model).name
    content = read_json(args.json) if args.json.is_file() else {"schema": SCHEMA, "model": model, "rows": []}
    if content.get("schema") != SCHEMA or content["model"] != model:
        raise AmqError(f"{args.json} holds results of {content.get('model')}: expected those of {model}, or no file")
    if args.speed:
        measure_speeds(content, args)
        save(args.json, content)
    elif not args.table:
        os.nice(NICE - os.nice(0))
        make_rows(content, args)
    print(table(content))
    return 0


def make_rows(content: dict[str, Any], args: argparse.Namespace) -> None:
    """Adds the missing rows, in the order of --rows, and writes FILE after each; one that fails is told and left
    out."""
    patterns = args.rows.split(",")
    wanted = list(dict.fromkeys(name for pattern in patterns for name in names(args) if fnmatch(name, pattern)))
    if not wanted:
        raise AmqError(f"--rows {args.rows}: no such row; there are {', '.join(names(args))}")
    workshop = Workshop(args)
    content |= workshop.facts()
    failed = []
    for name in wanted:
        if any(row["name"] == name for row in content["rows"]):
            continue
        try:
            row = workshop.row(name)
        except AmqError as error:
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        made = provenance()
        content["rows"].append({"name": name, **row, **{key: made[key] for key in ("commit", "dirty", "date")}})
        save(args.json, content)
        print(f"{name}: {row['bytes'] / 1e6:.1f} MB, perplexity {row['perplexity']:.3f}", flush=True)
    if failed:
        raise AmqError(
            f"{len(failed)} of {len(wanted)} rows failed: {', '.join(failed)}; the others are in {args.json}"
        )


def names(args: argparse.Namespace) -> list[str]:
    """Every row that there can be."""
    variant = f" {args.variant}" if args.variant else ""
    peers = [f"{engine} {kind}" for engine, kinds in KINDS.items() for kind in kinds.split(",")]
    return [FULL, f"{llama_cpp.NAME} F32", *peers, *(f"{OURS} {bits}{variant}" for bits in args.bits.split(","))]


def save(path: Path, content: dict[str, Any]) -> None:
    write_results(path, content)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="GGUF")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="where quantized models are made and kept"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--rows", default="*", metavar="LIST", help="patterns of names, such as 'llama.cpp Q*,amq *'")
    parser.add_argument("--bits", default="2.5,3.0,3.5,4.0,4.5,5.0,5.5,6.0", metavar="LIST", help="of ours")
    parser.add_argument(
        "--searched", default="", metavar="LIST", help="budgets that are searched; the other --bits are selected from "
        "the nearest of these searches (default: a search for each)",
    )  # fmt: skip
    parser.add_argument(
        "--search", default="--formats int2,int3,int4,int5,int6", metavar="FLAGS", help="of amq search, for ours"
    )
    parser.add_argument("--quantize", default="", metavar="FLAGS", help="of amq quantize, for ours")
    parser.add_argument("--variant", default="", metavar="NAME", help="added to the names of ours, for other FLAGS")
    parser.add_argument("--on-grid", action="store_true", help="the weights as the GGUF has them, dequantized")
    parser.add_argument("--text", default="docstrings", metavar="TEXT", help="whose perplexity is measured")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N", help="of it")
    parser.add_argument("--window-length", type=int, default=512, metavar="N", help="of it, and of the calibration")
    parser.add_argument(
        "--calibration",
        default="auto",
        metavar="TEXT",
        help="of all: search, quantizers and importance matrix",
    )
    parser.add_argument("--windows", type=int, default=64, metavar="N", help="of it")
    parser.add_argument(
        "--autoround", default="--autoround-iterations 200", metavar="FLAGS", help="of amq quantize, for auto-round"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of --speed")
    parser.add_argument("--generate", type=int, default=64, metavar="N", help="tokens of --speed")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main(), sys.argv[1:]))
