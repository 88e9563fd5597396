"""Perplexity of every quantization method at several sizes, in one table: `python benchmarks/quality.py --json FILE`.

Each configuration is quantized in memory, as `python -m amq.quantize` does before it writes, and measured on texts that
calibration did not see. Rows are added to FILE as they are done, and a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, write_results

from amq.configuration import Configuration
from amq.formats import get_format
from amq.model.inventory import take_inventory
from amq.model.open import load_model, model_fingerprint
from amq.model.perplexity import perplexity
from amq.model.text import WindowSampler, fixed_windows, load_corpus
from amq.quantize.bank import BankRecipe
from amq.quantize.blocks import BlockQuantizer, BlockSource
from amq.quantize.head import quantize_outer
from amq.quantize.methods import METHODS, ROTATIONS, rotation_of
from amq.quantize.sources import BankSource
from amq.util.files import read_json
from amq.util.progress import Progress

SCHEMA = "amq/quality/1"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--configuration", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("--uniform", default="", metavar="LIST", help="formats, such as int3,int4")
    parser.add_argument("--group-size", type=int, default=64, metavar="G", help="of --uniform")
    parser.add_argument("--method", default="rtn,hqq,bank,awq,gptq", metavar="LIST")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="default: docstrings")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--rotation", default="auto", choices=ROTATIONS, help="of gptq, clip and uniform banks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    content = read_json(args.json) if args.json.is_file() else {"schema": SCHEMA, "rows": []}
    measure(args, content)
    print(table(content["rows"]))


def measure(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Adds the missing rows to `content` and writes it after each."""
    loaded = load_model(args.model)
    parts = take_inventory(loaded.model)
    fingerprint = model_fingerprint(loaded.model)
    texts = args.text or ["docstrings"]
    measured = {Path(t).name: load_corpus(t, loaded.tokenizer, loaded.embedding_rows) for t in texts}
    windows = {name: fixed_windows(text, 512, args.max_tokens) for name, text in measured.items()}
    corpus = load_corpus(args.calibration, loaded.tokenizer, loaded.embedding_rows)
    calibration = WindowSampler(corpus, 512, args.seed).take(args.windows)
    jobs = [(f"uniform {f}", Configuration.uniform(parts.linears, get_format(f), args.group_size))
            for f in args.uniform.split(",") if f]  # fmt: skip
    jobs += [(f"searched {path.stem}", Configuration.load(path)) for path in args.configuration]

    made = provenance()  # of every row, because a second call may be of another commit

    def add(**row: Any) -> None:
        found = {name: perplexity(loaded.model, w, corpus.unscored) for name, w in windows.items()}
        row["perplexity"] = {name: round(value, 3) for name, value in found.items()}
        print(json.dumps(row), flush=True)
        content["rows"].append(row | {name: made[name] for name in ("commit", "dirty", "date")})
        write_results(args.json, content)

    def done(**key: Any) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in content["rows"])

    begin = {"window_prefix": list(corpus.prefix_names)} if corpus.prefix else {}  # older rows were made without
    if not done(method="full", **begin):
        add(name="full precision", method="full", group_size=None, bits=16.0, **begin)
    for name, configuration in jobs:
        for method in args.method.split(","):
            key = {"name": name, "method": method, "group_size": configuration.group_size,
                   "windows": args.windows, "calibration": args.calibration, "seed": args.seed,
                   "rotation": rotation_of(method, args.rotation), **begin}  # fmt: skip
            if done(**key):
                continue
            with untouched(loaded.model):
                start = time.perf_counter()
                for spec in parts.only(configuration.quantized).outer:
                    fmt = get_format(configuration.formats[spec.name])
                    quantize_outer(loaded.model, spec, fmt, configuration.group_size, "fractional")
                source = block_source(method, loaded, parts, configuration, calibration, args, fingerprint)
                for block in range(parts.n_blocks):
                    source.finish(source.make(block))
                seconds = round(time.perf_counter() - start, 1)
                add(**key, bits=round(configuration.bits_per_weight(parts.weights), 3), seconds=seconds)


def block_source(
    method: str, loaded: Any, parts: Any, configuration: Configuration, calibration: torch.Tensor,
    args: argparse.Namespace, fingerprint: str,
) -> BlockSource:  # fmt: skip
    quantized, group_size = parts.only(configuration.quantized), configuration.group_size
    formats = {spec.name: configuration.formats[spec.name] for spec in quantized.linears}
    if method == "bank":
        recipe = BankRecipe("gptq", group_size, args.calibration, 24, 512, args.seed, args.rotation).of(configuration)
        bank = recipe.open(loaded, quantized, set(formats.values()), Progress(), fingerprint)
        return BankSource(loaded.model, quantized, formats, bank)
    rotation = rotation_of(method, args.rotation)
    return BlockQuantizer(loaded.model, parts, formats, group_size, METHODS[method], calibration, rotation=rotation)


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Puts the model's parameters back."""
    saved = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(saved[name])


def table(rows: list[dict[str, Any]]) -> str:
    """One Markdown table per text: configurations down, methods across."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "full"))
    keys = sorted({(r["group_size"], r["bits"], r["name"]) for r in rows if r["method"] != "full"})
    full = next((r["perplexity"] for r in rows if r["method"] == "full"), {})
    parts = []
    for text in full:
        head = ["group", "bits/weight", "configuration", *methods]
        lines = [f"{text}, full precision {full[text]:.2f}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for group_size, bits, name in keys:
            cells = {
                r["method"]: r["perplexity"][text] for r in rows if (r["group_size"], r["name"]) == (group_size, name)
            }
            shown = [f"{cells[m]:.2f}" if m in cells else "" for m in methods]
            lines.append(f"| {group_size} | {bits:.3f} | {name} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
