"""`python -m amq.eval MODEL…`: one table of perplexities and task figures, and its JSON."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from amq.eval import TaskSettings, evaluate, table
from amq.formats import FORMATS
from amq.kernels.backends import ACTIVATIONS, BACKENDS
from amq.quantize.quantizers import QUANTIZERS
from amq.util.files import check_file
from amq.util.progress import terminal_progress
from amq.util.settings import TRUST_REMOTE_CODE, add_flags, run_command


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = vars(_parser().parse_args(argv))
    path, configurations, text = args.pop("json"), args.pop("configuration"), args.pop("text")
    check_file(path, "--json")
    given = {f.name: args.pop(f.name) for f in fields(TaskSettings) if f.name in args}
    tasks = TaskSettings(**given) if given else None
    if text is None:
        text = "" if tasks else "docstrings"
    result = evaluate(configurations=configurations, text=text, tasks=tasks, progress=terminal_progress(), **args)
    print(table(result))
    if path:
        result.write(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m amq.eval", description="Perplexity and task figures of models and their quantized forms."
    )
    parser.add_argument(
        "model",
        nargs="+",
        help="hub id, folder, .gguf file, or the alias smollm2; a folder that amq quantized runs as it is",
    )
    parser.add_argument(
        "--configuration", action="append", default=[], metavar="FILE", help="written by amq.search; may be repeated"
    )
    parser.add_argument(
        "--uniform", default="", metavar="LIST", help=f"uniform formats to compare, of {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--dequantized", action="store_true", help="a quantized folder also as plain torch linears: a second row"
    )
    parser.add_argument("--text", help="a text file, wikitext2, c4, pydoc or docstrings (default; with --tasks, none)")
    parser.add_argument(
        "--max-tokens", type=int, default=16384, metavar="N", help="tokens of the text to use (default 16384)"
    )
    parser.add_argument(
        "--window-length", type=int, default=512, metavar="N", help="tokens per window, BOS included (default 512)"
    )
    parser.add_argument(
        "--proxy", default="gptq", choices=list(QUANTIZERS), help="bank of --uniform without --configuration"
    )
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help="of --uniform without --configuration")
    parser.add_argument("--calibration", default="pydoc", metavar="TEXT", help="bank's text, without --configuration")
    parser.add_argument("--bank-windows", type=int, default=24, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_REMOTE_CODE)
    parser.add_argument(
        "--backend",
        choices=list(BACKENDS),
        help="what multiplies quantized linears (default: reference for "
        "--configuration and --uniform, the device's fastest for a quantized folder)",
    )
    parser.add_argument("--activations", default="fp32", choices=ACTIVATIONS, help="int8 needs --backend cpu or cuda")
    add_flags(parser, TaskSettings)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
