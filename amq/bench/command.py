"""The command line of `python -m amq.bench`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amq.bench.cases import grid
from amq.bench.run import OpenPeer, Settings, bench
from amq.bench.table import csv_text, table
from amq.errors import AmqError
from amq.kernels.backends import ACTIVATIONS, BACKENDS
from amq.util.files import check_file, write_text
from amq.util.progress import terminal_progress
from amq.util.settings import TRUST_REMOTE_CODE


def main(
    argv: Sequence[str] | None = None,
    peers: Mapping[str, OpenPeer] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> int:
    """peers, provenance: see `amq.bench.run.bench`; for scripts that measure other engines beside ours."""
    args = vars(_parser().parse_args(argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    json_file, csv_file = args.pop("json"), args.pop("csv")
    check_file(json_file, "--json")
    check_file(csv_file, "--csv")
    lists = {name: numbers(args.pop(name), f"--{name}") for name in ("prompt", "generate", "batch")}
    depths = numbers(args.pop("depth"), "--depth", least=0)
    for name in ("repetitions", "threads", "max_tokens", "window_length"):
        if args[name] is not None and args[name] < 1:
            raise AmqError(f"--{name.replace('_', '-')} must be at least 1, got {args[name]}")
    cases = tuple(grid(lists["prompt"], lists["generate"], lists["batch"], depths))
    if not cases:
        raise AmqError("nothing to measure: give --prompt or --generate")
    settings = Settings(cases=cases, **args | {"threads": args["threads"] or _threads()})
    result = bench(settings, terminal_progress(), peers, provenance)
    print(table(result))
    if json_file:
        result.write(json_file)
    if csv_file:
        write_text(csv_file, csv_text(result))
    return 0


def numbers(text: str, flag: str, least: int = 1) -> list[int]:
    """`128,512` → [128, 512], without doubles; `0` or the empty text → nothing, unless 0 is allowed."""
    try:
        values = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise AmqError(f"{flag} {text!r}: expected whole numbers with commas between, such as 128,512") from None
    if least and values == [0]:
        return []
    if any(value < least for value in values):
        raise AmqError(f"{flag} {text!r}: expected numbers of at least {least}")
    return list(dict.fromkeys(values))


def _threads() -> int:
    from amq.util.limits import fit_threads

    return fit_threads()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m amq.bench",
        description="Measures prompt processing and decode in tokens/s, start-up, memory and the use of the memory's "
        "bandwidth.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that amq.quantize wrote; or hub id, folder, .gguf file, smollm2")
    add("--prompt", default="512", metavar="LIST", help="prompt lengths (default 512; 0: none)")
    add("--generate", default="128", metavar="LIST", help="tokens to decode (default 128; 0: none)")
    add("--batch", default="1,4", metavar="LIST", help="sequences that decode at a time (default 1,4)")
    add("--depth", default="0", metavar="LIST", help="tokens that are in the cache before (default 0)")
    add("--repetitions", type=int, default=5, metavar="N", help="of every test, after one to warm up (default 5)")
    add("--threads", type=int, metavar="N", help="CPU threads of every engine (default: torch's choice)")
    add("--no-startup", dest="startup", action="store_false", help="do not time a fresh process")
    add("--perplexity", metavar="FILE", help="a text file (or pydoc, docstrings): every engine's perplexity on it")
    add("--max-tokens", type=int, default=8192, metavar="N", help="of that text (default 8192)")
    add("--window-length", type=int, default=512, metavar="N", help="of that text (default 512)")
    add("--activations", choices=ACTIVATIONS, help="int8 or fp32 (exact); default: int8 on backend cpu, else fp32")
    add("--backend", choices=list(BACKENDS), help="what multiplies the quantized linears (default: the fastest)")
    add("--device", default="cpu")
    add("--dtype", default="auto", help="of what is not quantized (default: float32 on a CPU)")
    add("--trust-remote-code", action="store_true", help=TRUST_REMOTE_CODE)
    add("--seed", type=int, default=0, metavar="N", help="of the random tokens (default 0)")
    add("--json", type=Path, metavar="FILE", help="write all figures, every repetition's too")
    add("--csv", type=Path, metavar="FILE", help="write the table's rows")
    return parser
