"""A real mixture of experts, made of a dense model, and what a search gives it: `python benchmarks/mixture.py DIR`.

Writes the mixtures of `mixture_models.py` into DIR and measures perplexity of each beside the dense model: those that
route to all experts are the same function. Then both are searched at one budget. Experts of a layer and role share a
format by default, so that the search has the same choices, and should make them: the table says for how many of the
MLPs' weights it did, and what the chosen configurations lose.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mixture_models import equal_parts, fitted, fitted_norms, mixtral, qwen2_moe, qwen3, qwen3_moe
from provenance import write_results

import amq
from amq.errors import AmqError
from amq.model.inventory import take_inventory
from amq.model.open import TOKENIZER_FILES, LoadedModel, load_model, resolve
from amq.model.perplexity import perplexity
from amq.model.text import WindowSampler, fixed_windows, load_corpus
from amq.util.settings import run_command

SCHEMA = "amq/mixture/1"
FITTING = 16
"""Windows that routers and norms are fitted to."""


@dataclass(frozen=True)
class Pair:
    """A mixture and the dense model that it is. same: whether it computes the same."""

    name: str
    dense: str
    same: bool


PAIRS = (
    Pair("mixtral", "llama", True),
    Pair("qwen2_moe", "llama", True),
    Pair("qwen3_moe", "qwen3", True),
    Pair("mixtral_most", "llama", False),
)


def build(name: str, dense: Any, experts: int, windows: torch.Tensor) -> Any:
    """The model `name` of `PAIRS`, mixtures and dense ones, made of the Llama `dense`."""
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: dense,
        "qwen3": lambda: qwen3(dense, fitted_norms(dense, windows)),
        "mixtral": lambda: mixtral(dense, equal_parts(dense, experts)),
        "qwen2_moe": lambda: qwen2_moe(dense, equal_parts(dense, experts)),
        "qwen3_moe": lambda: qwen3_moe(qwen3(dense, fitted_norms(dense, windows)), equal_parts(dense, experts)),
        "mixtral_most": lambda: mixtral(dense, fitted(dense, 2 * experts, 2 * experts - experts // 2, windows)),
    }
    return makers[name]()


def write(folder: Path, model: Any, tokenizer: Path) -> None:
    """`model` and the tokenizer's files as a folder that transformers loads."""
    model.save_pretrained(folder)
    kept = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    for pattern in TOKENIZER_FILES:
        for file in tokenizer.glob(pattern):
            if file.name not in kept:
                shutil.copy(file, folder / file.name)


def searched(folder: Path, run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a search chose: {block and role, as in the dense model: format}, and what that loses."""
    chosen = amq.search(str(folder), output=str(run), **settings).configuration
    specs = {s.name: s for s in take_inventory(load_model(str(folder)).model).weights}
    formats: dict[str, set[str]] = {}
    for name, fmt in chosen.formats.items():
        place = f"{specs[name].block} {specs[name].role.replace('mlp.experts.', 'mlp.')}"
        formats.setdefault(place, set()).add(fmt)
    figures = {name: getattr(chosen.details, name) for name in ("bits_per_weight", "loss", "loss_confirm")}
    return {**figures, "formats": {place: "+".join(sorted(found)) for place, found in sorted(formats.items())}}


def compare(dense: dict[str, Any], mixture: dict[str, Any]) -> dict[str, float]:
    """Shares of block and role that have the same format in both, of the MLPs and of all. A shared expert, which the
    dense model has not, does not count."""
    first = dense["formats"]
    second = {place: fmt for place, fmt in mixture["formats"].items() if ".shared_expert." not in place}
    if first.keys() != second.keys():
        raise AmqError(f"the searches chose for other weights: {sorted(first.keys() ^ second.keys())[:4]}")
    same = {place: first[place] == second[place] for place in first}
    inside = [equal for place, equal in same.items() if " mlp." in place]
    return {"same_in_mlp": sum(inside) / len(inside), "same": sum(same.values()) / len(same)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--model", default="smollm2", help="a Llama (default smollm2)")
    parser.add_argument("--experts", type=int, default=4, metavar="E", help="a power of two, for equal parts exactly")
    parser.add_argument("--only", default=",".join(p.name for p in PAIRS), metavar="LIST")
    parser.add_argument("--text", default="docstrings", help="that perplexity is measured on")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--target-bits", type=float, default=3.5, metavar="B")
    parser.add_argument("--search", default="", metavar="JSON", help='settings of the searches, such as {"points": 4}')
    parser.add_argument("--no-search", action="store_true", help="perplexities alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    content = {"schema": SCHEMA, "model": args.model, "experts": args.experts, "rows": measure(args)}
    if args.json:
        write_results(args.json, content)
    print(table(content["rows"]))
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    pairs = [pair for pair in PAIRS if pair.name in args.only.split(",")]
    source = load_model(args.model)
    corpus = load_corpus("pydoc", source.tokenizer, source.embedding_rows)
    windows = WindowSampler(corpus, min(512, source.config.max_position_embeddings), 0).take(FITTING)
    names = dict.fromkeys(name for pair in pairs for name in (pair.dense, pair.name))
    for name in names:
        if not (args.folder / name).exists():
            write(args.folder / name, build(name, source.model, args.experts, windows), resolve(args.model))
    found = {name: {"perplexity": _perplexity(load_model(str(args.folder / name)), args)} for name in names}
    if not args.no_search:
        settings = {"target_bits": args.target_bits, **json.loads(args.search or "{}")}
        for name in names:
            found[name] |= searched(args.folder / name, args.folder / f"search-{name}", settings)
    rows = []
    for pair in pairs:
        row = {"mixture": pair.name, "dense": pair.dense, "same_function": pair.same}
        row |= {"of_dense": found[pair.dense], "of_mixture": found[pair.name]}
        rows.append(row | ({} if args.no_search else compare(found[pair.dense], found[pair.name])))
    return rows


def _perplexity(loaded: LoadedModel, args: argparse.Namespace) -> float:
    corpus = load_corpus(args.text, loaded.tokenizer, loaded.embedding_rows)
    return perplexity(loaded.model, fixed_windows(corpus, 512, args.max_tokens), corpus.unscored)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| mixture | of | perplexity: dense | mixture | loss: dense | mixture | same formats in MLPs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        dense, mixture = row["of_dense"], row["of_mixture"]
        losses = ["" if (loss := side.get("loss")) is None else f"{loss:.4f}" for side in (dense, mixture)]
        same = f"{row['same_in_mlp']:.0%}" if "same_in_mlp" in row else ""
        cells = (row["mixture"], row["dense"], f"{dense['perplexity']:.4f}", f"{mixture['perplexity']:.4f}")
        lines.append(f"| {' | '.join((*cells, *losses, same))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main()))
