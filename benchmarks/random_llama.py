"""Writes a checkpoint of a random Llama-shaped model, to measure speed on a model that no cache holds.

    python benchmarks/random_llama.py OUT --size 1B --formats int4 --group-size 128 --head int8
    python -m amq.bench OUT

Codes are random bytes and scales are plausible (weights of variance 1 / in_features), so that nothing overflows and a
kernel has all its work; what the model says means nothing. Weights are packed from the start, block by block: no
float weight of a linear is ever made. The tokenizer is that of another model, smollm2 by default; the vocabulary is
the shape's, whose later tokens then have no text.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import write_checkpoint
from amq.errors import AmqError
from amq.formats import FORMATS, BitFormat, check_group_size, get_format, n_groups
from amq.model.open import TOKENIZER_FILES, resolve
from amq.packing import PackedWeight
from amq.util.folders import check_new_folder
from amq.util.settings import run_command

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CONTEXT = 8192


@dataclass(frozen=True)
class Shape:
    """A Llama; its embeddings are tied to the head."""

    source: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def linears(self, block: int) -> Iterator[tuple[str, int, int]]:
        """(name, out_features, in_features) of one block."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = (("q_proj", queries, self.hidden), ("k_proj", keys, self.hidden), ("v_proj", keys, self.hidden))
        for name, rows, columns in (*attention, ("o_proj", self.hidden, queries)):
            yield f"model.layers.{block}.self_attn.{name}", rows, columns
        gated = (("gate_proj", self.intermediate, self.hidden), ("up_proj", self.intermediate, self.hidden))
        for name, rows, columns in (*gated, ("down_proj", self.hidden, self.intermediate)):
            yield f"model.layers.{block}.mlp.{name}", rows, columns

    def norms(self) -> Iterator[str]:
        for block in range(self.layers):
            yield f"model.layers.{block}.input_layernorm.weight"
            yield f"model.layers.{block}.post_attention_layernorm.weight"
        yield "model.norm.weight"


SIZES = {
    "1B": Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256),
    "3B": Shape("Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128, 128256),
    "tiny": Shape("a test", 2, 64, 128, 4, 2, 16, 512),
}


def random_packed(rows: int, columns: int, fmt: BitFormat, group_size: int, generator: torch.Generator,
                  symmetric: bool = False) -> PackedWeight:  # fmt: skip
    """Random codes around a zero point in the middle; weights have a variance of about 1 / columns.

    symmetric: all zero points are half the number of levels.
    """
    if fmt.levels**fmt.unit_codes != 256**fmt.unit_bytes or columns % fmt.unit_codes:
        raise AmqError(
            f"{fmt.name} at {columns} columns: only formats and widths without spare bits can be random bytes"
        )
    count = rows * fmt.row_bytes(columns)
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),), generator=generator)  # eight bytes at a time
    qweight = draws.view(torch.uint8)[:count].view(rows, -1)
    groups = (rows, n_groups(columns, group_size))
    step = (12 / columns) ** 0.5 / fmt.levels
    scale = step * (0.8 + 0.4 * torch.rand(groups, generator=generator))
    middle = fmt.max_code / 2 + torch.rand(groups, generator=generator) - 0.5
    zero_point = torch.full(groups, fmt.levels / 2) if symmetric else middle
    return PackedWeight(fmt, columns, group_size, qweight, scale.half(), zero_point.half())


def write_model(output: Path, shape: Shape, formats: list[BitFormat], group_size: int, head: str, seed: int,
                tokenizer: str) -> None:  # fmt: skip
    """formats: taken by turns by the linears of a block. head: a format, or `none` for float32 embeddings."""
    generator, packed, others = torch.Generator().manual_seed(seed), {}, {}
    for block in range(shape.layers):
        for i, (name, rows, columns) in enumerate(shape.linears(block)):
            packed[name] = random_packed(rows, columns, formats[i % len(formats)], group_size, generator)
    for name in shape.norms():
        others[name] = torch.ones(shape.hidden)
    if head == "none":
        others[f"{EMBEDDING}.weight"] = torch.randn(shape.vocabulary, shape.hidden, generator=generator) * 0.02
    else:
        packed[HEAD] = random_packed(shape.vocabulary, shape.hidden, get_format(head), group_size, generator)
    groups = [
        tuple(name for name, *_ in shape.linears(block) if name.rpartition(".")[2] in roles)
        for block in range(shape.layers)
        for roles in SHARED
    ]
    record = QuantizationRecord(
        formats={name: weight.format.name for name, weight in packed.items()},
        shapes={name: (weight.out_features, weight.in_features) for name, weight in packed.items()},
        group_size=group_size,
        quantizer="random",
        shared_inputs=tuple(groups),
        **({} if head == "none" else {"head": HEAD, "embedding": {EMBEDDING: HEAD}}),
    )
    files = resolve(tokenizer)

    def extras(folder: Path) -> None:
        for pattern in TOKENIZER_FILES:
            for file in files.glob(pattern):
                if file.name not in ("config.json", "model.safetensors.index.json", "quantization.json"):
                    shutil.copy(file, folder / file.name)

    write_checkpoint(output, config(shape), record, packed, others, extras)


def config(shape: Shape) -> dict[str, Any]:
    """config.json as transformers writes it for a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes a checkpoint of a random Llama-shaped model.")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--size", choices=list(SIZES), default="1B", help="shape (default 1B: Llama-3.2-1B)")
    parser.add_argument("--formats", default="int4", metavar="LIST", help=f"of {', '.join(FORMATS)}, taken by turns")
    parser.add_argument("--group-size", type=int, default=128, metavar="G")
    parser.add_argument("--head", default="int8", choices=["none", *FORMATS], help="head and embedding (default int8)")
    parser.add_argument("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokenizer to copy")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    check_new_folder(args.output)
    formats = [get_format(name) for name in args.formats.split(",")]
    group_size, shape = check_group_size(args.group_size), SIZES[args.size]
    write_model(args.output, shape, formats, group_size, args.head, args.seed, args.tokenizer)
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    print(f"{args.output}: {shape.source}'s shape, {size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main()))
