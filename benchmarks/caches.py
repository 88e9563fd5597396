"""What keys and values in fewer bits cost and gain: `python benchmarks/caches.py DIR --text TEXT [--json FILE]`.

DIR is a checkpoint that the native engine runs. For every kind of cache, and a mix of two (`mixed`): bytes a token of a
sequence takes; perplexity on windows of each of --lengths (positions; the same tokens for all kinds, activations in
float32, so that nothing else is rounded), beside that of float32; and processor time of a decoded token at --depth
positions, the kinds in turn, one thread, the median and quartiles of how many times float16's it takes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from provenance import write_results
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer

from amq.model.shape import CACHES, DEFAULT_CACHE, PAGE, ModelShape
from amq.model.text import Corpus, fixed_windows, load_corpus
from amq.runtime.engine import Segment
from amq.runtime.native_engine import open_native

TOKENS = 8
"""Decoded in a turn."""


ENDS = 2
"""Layers at each end that the mix keeps in 8 bits."""
Kinds = dict[str, str | list[str]]
"""{name: a kind, or one for each layer}."""


def all_kinds(folder: Path) -> Kinds:
    """The mix: as int4, but the first and last layers as int8."""
    layers = len(ModelShape.of(AutoConfig.from_pretrained(folder)).keeping)
    ends = [min(layer, layers - 1 - layer) < ENDS for layer in range(layers)]
    return {**{kind: kind for kind in CACHES}, "mixed": ["int8" if end else "int4" for end in ends]}


def bytes_per_token(folder: Path, kind: str | list[str]) -> float:
    """Of a token more; what a sequence takes beside its positions is not of any."""
    one, two = (open_native(folder, context=pages * PAGE, cache=kind).cache_bytes for pages in (1, 2))
    return (two - one) / PAGE


def perplexities(folder: Path, kinds: Kinds, corpus: Corpus, length: int, most: int) -> dict[str, float]:
    """{name: perplexity} on the first `most` tokens, in windows of `length`."""
    windows, skipped = fixed_windows(corpus, length, most), corpus.unscored
    found = {}
    for name, kind in kinds.items():
        engine = open_native(folder, "fp32", context=length, cache=kind)
        losses = []
        for window in windows:
            logits = engine.all_logits(window.tolist())[skipped:-1]
            losses.append(cross_entropy(logits, window[skipped + 1 :]).item())
        found[name] = math.exp(statistics.fmean(losses))
    return found


def decoding(folder: Path, kinds: Kinds, depth: int, turns: int) -> dict[str, dict[str, Any]]:
    """{name: milliseconds of a token, times float16's with quartiles}."""
    torch.set_num_threads(1)
    context = depth + (turns + 1) * TOKENS
    engines = {name: open_native(folder, context=context, cache=kind, threads=1) for name, kind in kinds.items()}
    tokens = torch.randint(0, engines[DEFAULT_CACHE].vocab_size, (depth,), generator=torch.Generator().manual_seed(0))
    state = {}
    for kind, engine in engines.items():
        slot = engine.open(tokens.tolist(), (turns + 1) * TOKENS)
        assert slot is not None
        for start in range(0, depth, engine.max_rows):
            row = engine.forward([Segment(slot, tokens[start : start + engine.max_rows].tolist())])[0]
        state[kind] = [slot, int(row.argmax())]
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(turns + 1):
        for kind, engine in engines.items():
            start = time.process_time()
            for _ in range(TOKENS):
                slot, token = state[kind]
                state[kind][1] = int(engine.forward([Segment(slot, [token])])[0].argmax())
            if turn:  # the first one warms up
                times[kind].append((time.process_time() - start) / TOKENS * 1e3)
    result = {}
    for kind in kinds:
        ratios = [half / mine for half, mine in zip(times[DEFAULT_CACHE], times[kind], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[kind] = {"ms": statistics.median(times[kind]), "speedup": middle, "quartiles": [low, high]}
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--text", default="docstrings", metavar="TEXT")
    parser.add_argument("--lengths", default="1024,4096", metavar="LIST")
    parser.add_argument("--max-tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--depth", type=int, default=4096, metavar="N")
    parser.add_argument("--turns", type=int, default=20, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    lengths = [int(length) for length in args.lengths.split(",")]
    rows_of_table = AutoConfig.from_pretrained(args.folder).get_text_config().vocab_size
    corpus = load_corpus(args.text, AutoTokenizer.from_pretrained(args.folder), rows_of_table)
    kinds = all_kinds(args.folder)
    rows: dict[str, dict[str, Any]]
    rows = {name: {"bytes_per_token": bytes_per_token(args.folder, kind)} for name, kind in kinds.items()}
    for length in lengths:
        for kind, value in perplexities(args.folder, kinds, corpus, length, args.max_tokens).items():
            rows[kind][f"perplexity_{length}"] = value
    for kind, found in decoding(args.folder, kinds, args.depth, args.turns).items():
        rows[kind][f"decode_{args.depth}"] = found
    print(table(rows, lengths, args.depth))
    if args.json:
        write_results(args.json, {"folder": args.folder.name, "text": Path(args.text).name, "rows": rows})


def table(rows: dict[str, dict[str, Any]], lengths: list[int], depth: int) -> str:
    names = [f"perplexity at {length}" for length in lengths]
    lines = [f"| cache | bytes a token | {' | '.join(names)} | decode at {depth} |", "|---" * (len(lengths) + 3) + "|"]
    for kind, row in rows.items():
        cells = [kind, f"{row['bytes_per_token']:,.0f}"]
        for length in lengths:
            value, exact = row[f"perplexity_{length}"], rows["float32"][f"perplexity_{length}"]
            cells.append(f"{value:.3f} ({100 * (value / exact - 1):+.2f} %)")
        low, high = row[f"decode_{depth}"]["quartiles"]
        cells.append(f"{row[f'decode_{depth}']['speedup']:.2f}× ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
