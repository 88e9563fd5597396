"""`python -m amq.eval MODEL`: one table of perplexities, and its JSON."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from amq.backends import ACTIVATIONS, BACKENDS
from amq.eval import Evaluation, evaluate
from amq.files import write_json
from amq.formats import FORMATS
from amq.progress import terminal_progress
from amq.quantizers import QUANTIZERS
from amq.settings import run_command


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m amq.eval", description="Perplexity of a model and its quantized forms."
    )
    parser.add_argument("model", help="hub id, folder, .gguf file, or the alias smollm2")
    parser.add_argument(
        "--configuration", action="append", default=[], metavar="FILE", help="written by amq.search; may be repeated"
    )
    parser.add_argument(
        "--uniform", default="", metavar="LIST", help=f"uniform formats to compare, of {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--text", default="docstrings", help="a text file, wikitext2, c4, pydoc or docstrings (default)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=16384, metavar="N", help="tokens of the text to use (default 16384)"
    )
    parser.add_argument("--window-length", type=int, default=512, metavar="N", help="window and stride (default 512)")
    parser.add_argument(
        "--proxy", default="gptq", choices=list(QUANTIZERS), help="bank of --uniform without --configuration"
    )
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="of --uniform without --configuration")
    parser.add_argument("--calibration", default="pydoc", metavar="TEXT", help="bank's text, without --configuration")
    parser.add_argument("--bank-windows", type=int, default=24, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="reference", choices=list(BACKENDS), help="what multiplies the linears")
    parser.add_argument("--activations", default="fp32", choices=ACTIVATIONS, help="int8 needs --backend cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    args = vars(parser.parse_args(argv))
    path, configurations = args.pop("json"), args.pop("configuration")
    result = evaluate(configurations=configurations, progress=terminal_progress(), **args)
    print(table(result))
    if path:
        write_json(path, result.json())
    return 0


def table(result: Evaluation) -> str:
    """The rows as aligned text."""
    s = result.settings
    width = max(len(r.name) for r in result.rows) if result.rows else 4
    lines = [f"perplexity on {s['text']}: {s['tokens']} tokens, window = stride = {s['window_length']}",
             f"{'':{width}}  bits/weight  weights MiB  perplexity"]  # fmt: skip
    for row in result.rows:
        lines.append(
            f"{row.name:{width}}  {row.bits_per_weight:11.3f}  {row.weight_bytes / 2**20:11.1f}  {row.perplexity:10.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
