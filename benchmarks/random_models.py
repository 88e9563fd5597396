"""Random quantized models of any shape that transformers has a config for, to measure speeds on.

    python benchmarks/random_models.py OUT --shape 30B-A3B --most 5GiB

Packed from the start, linear after linear: no float weight of a linear is ever made, and one file of the checkpoint is
in memory at a time. Which weights have a format is what amq's inventory of the model without weights says. Codes are
random, zero points in the middle and scales such that a weight has a variance of about 1 / in_features: nothing
overflows, every kernel has all its work, and what the model says means nothing. Zero points are whole numbers, so that
the GGUF export takes the codes as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_llama import random_packed
from torch import Tensor, nn

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import write_checkpoint
from amq.errors import AmqError
from amq.formats import FORMATS, get_format, n_groups
from amq.model.experts import unfuse
from amq.model.inventory import EMBEDDING, HEAD, Inventory, LinearSpec, take_inventory
from amq.model.open import TOKENIZER_FILES, resolve
from amq.packing import PackedWeight
from amq.util.folders import check_new_folder
from amq.util.settings import parse_size, run_command

GROUP_SIZE = 128
KEPT_DTYPE = torch.bfloat16
"""Of matrices without a format: those that route tokens, and convolutions."""


@dataclass(frozen=True)
class Shape:
    """A model of `config`, a class of transformers, with `options` over its defaults.

    source: whose shape it is. layers: of the whole model. patterns: {key of the config: what its layers have by turns}.
    period: layers after which kinds of layers come again.
    """

    source: str
    config: str
    layers: int
    options: dict[str, Any] = field(default_factory=dict)
    patterns: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    period: int = 1

    def model(self, layers: int) -> nn.Module:
        """With so many layers, without weights, experts one by one."""
        import transformers

        turns = {key: [turn[i % len(turn)] for i in range(layers)] for key, turn in self.patterns.items()}
        options = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        config = getattr(transformers, self.config)(**{**options, **self.options, **turns, "num_hidden_layers": layers})
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        unfuse(model)
        return model.eval()


SHAPES = {
    "30B-A3B": Shape(
        "Qwen3-30B-A3B", "Qwen3MoeConfig", 48,
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936},
    ),
    "qwen3.5-9B": Shape("Qwen3.5-9B (transformers' default)", "Qwen3_5TextConfig", 32, period=4),
    "qwen3.5-0.8B": Shape(
        "Qwen3.5-0.8B", "Qwen3_5TextConfig", 24,
        {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2,
         "linear_num_value_heads": 16, "vocab_size": 65536, "tie_word_embeddings": True},
        period=4,
    ),
    "tiny-moe": Shape(
        "a test", "Qwen3MoeConfig", 4,
        {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "vocab_size": 320},
    ),
    "tiny-hybrid": Shape(
        "a test", "Qwen3_5TextConfig", 8,
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "vocab_size": 320},
        period=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Formats:
    """linear: of the blocks' linears. outer: of head and embeddings."""

    linear: str = "int4"
    outer: str = "int8"
    group_size: int = GROUP_SIZE

    def of(self, spec: LinearSpec) -> str:
        return self.outer if spec.kind in (HEAD, EMBEDDING) else self.linear

    def bytes(self, spec: LinearSpec) -> int:
        """With scales and zero points."""
        fmt, groups = get_format(self.of(spec)), n_groups(spec.in_features, self.group_size)
        return spec.out_features * (fmt.row_bytes(spec.in_features) + 4 * groups)


@dataclass(frozen=True)
class Bytes:
    """stored: of a model's weights that have a format; read: those of them that one token reads."""

    stored: float
    read: float

    @staticmethod
    def of(inventory: Inventory, formats: Formats) -> Bytes:
        weights = [(formats.bytes(spec), spec.read) for spec in inventory.weights]
        return Bytes(sum(size for size, _ in weights), sum(size * share for size, share in weights))


def sizes_by_layers(shape: Shape, formats: Formats) -> tuple[Bytes, Bytes]:
    """(of no layers, of `period` layers more), from two small models."""
    one, two = (Bytes.of(take_inventory(shape.model(n * shape.period)), formats) for n in (1, 2))
    more = Bytes(two.stored - one.stored, two.read - one.read)
    return Bytes(one.stored - more.stored, one.read - more.read), more


def layers_that_fit(shape: Shape, formats: Formats, most: int) -> int:
    """As many layers as `most` bytes hold; raises AmqError where that is not one period of them."""
    rest, more = sizes_by_layers(shape, formats)
    periods = int((most - rest.stored) // more.stored)
    if periods < 1:
        least = (rest.stored + more.stored) / 2**30
        raise AmqError(f"{shape.source}'s shape takes {least:.1f} GiB with {shape.period} layers: give --most more")
    return min(shape.layers, periods * shape.period)


def layers_that_read(shape: Shape, formats: Formats, least: int, most: int) -> int:
    """As few layers as make a token read `least` bytes, in a model of at most `most`."""
    rest, more = sizes_by_layers(shape, formats)
    periods = max(1, -int(-(least - rest.read) // more.read))
    return min(periods * shape.period, layers_that_fit(shape, formats, most))


class _Drawn(Mapping[str, PackedWeight]):
    """{linear: random weight}, made when it is asked for and not kept."""

    def __init__(self, specs: Iterable[LinearSpec], formats: Formats, seed: int) -> None:
        self._specs, self._formats = {spec.name: spec for spec in specs}, formats
        self._generator = torch.Generator().manual_seed(seed)

    def __getitem__(self, name: str) -> PackedWeight:
        spec, formats = self._specs[name], self._formats
        fmt = get_format(formats.of(spec))
        return random_packed(
            spec.out_features, spec.in_features, fmt, formats.group_size, self._generator, symmetric=True
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def write_random(
    output: Path, model: nn.Module, formats: Formats, tokenizer: Path | None = None, seed: int = 0
) -> None:
    """Writes a checkpoint of `model`, which has no weights; tokenizer: a folder whose tokenizer is copied."""
    inventory = take_inventory(model)
    packed = _Drawn(inventory.weights, formats, seed)
    heads = [spec for spec in inventory.outer if spec.kind == HEAD]
    embedding = {spec.tied: spec.name for spec in heads if spec.tied}
    embedding |= {spec.name: spec.name for spec in inventory.outer if spec.kind == EMBEDDING}
    record = QuantizationRecord(
        {spec.name: formats.of(spec) for spec in inventory.weights},
        {spec.name: (spec.out_features, spec.in_features) for spec in inventory.weights},
        formats.group_size, "random", head=heads[0].name if heads else "", embedding=embedding,
    )  # fmt: skip
    left_out = {f"{name}.weight" for name in (*packed, *embedding)} | set(model.all_tied_weights_keys)
    generator = torch.Generator().manual_seed(seed)
    others = ((n, _other(t.shape, generator)) for n, t in model.state_dict().items() if n not in left_out)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    write_checkpoint(output, config, record, packed, others, lambda folder: _copy_tokenizer(tokenizer, folder))


def _other(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of a matrix, random as weights are; else ones."""
    if len(shape) < 2:
        return torch.ones(shape)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(KEPT_DTYPE)


def small_tokenizer(folder: Path) -> Path:
    """`folder`, with a tokenizer of bytes and a few words in it: for benchmarks that run --smoke."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from helpers.small_tokenizers import byte_level
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=byte_level()).save_pretrained(folder)
    return folder


def _copy_tokenizer(source: Path | None, folder: Path) -> None:
    kept = {"config.json", "generation_config.json", "model.safetensors.index.json", "quantization.json"}
    for pattern in TOKENIZER_FILES if source else ():
        for file in source.glob(pattern):
            if file.name not in kept:
                shutil.copy(file, folder / file.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--shape", choices=list(SHAPES), default="30B-A3B")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="default: as many as --most holds")
    parser.add_argument("--most", default="5GiB", metavar="SIZE", help="of the weights (default 5GiB)")
    parser.add_argument("--format", default="int4", choices=list(FORMATS), help="of linears (default int4)")
    parser.add_argument("--head", default="int8", choices=list(FORMATS), help="of head and embeddings (default int8)")
    parser.add_argument("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokenizer to copy")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    check_new_folder(args.output)
    shape, formats = SHAPES[args.shape], Formats(args.format, args.head)
    layers = args.layers or layers_that_fit(shape, formats, parse_size(args.most))
    write_random(args.output, shape.model(layers), formats, resolve(args.tokenizer), args.seed)
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    print(f"{args.output}: {shape.source}'s shape, {layers} of {shape.layers} layers, {size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main()))
