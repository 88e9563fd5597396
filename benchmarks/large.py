"""A model larger than memory, planned and quantized: `python benchmarks/large.py DIR --shape 8B --memory 8GiB`.

Writes a random model of that shape into DIR block by block in bfloat16, as many layers as the disk holds, and then runs
amq on it in a process that is ended when it takes more memory than that. What counts is memory of its own: pages of the
files that it maps are the system's, which takes them back when it needs them. (A limit of RLIMIT_DATA counts all of a
file that is mapped for private changes, read or not.) The result is the most memory, of its own and with such pages,
and the seconds per block, start-up included; a model of more layers takes at most as many times the seconds, and the
same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import write_results
from safetensors.torch import save_file
from torch import Tensor

from amq.errors import AmqError
from amq.model.open import TOKENIZER_FILES, resolve
from amq.util.files import write_json
from amq.util.folders import check_new_folder
from amq.util.settings import parse_size, run_command

SCHEMA = "amq/large/1"
CONTEXT = 8192
SPARE = 4 << 30
"""Bytes of the disk that are left free."""
POOL = 1 << 22
"""Random numbers that all weights are made of, each from another place on."""
EVERY = 0.02
"""Seconds between looks at a process's memory."""


@dataclass(frozen=True)
class Shape:
    """A Llama, or with `experts` a Qwen3-MoE; embeddings are not tied.

    intermediate: of the MLP, or of one expert.
    """

    source: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    top_k: int = 0

    def config(self, layers: int) -> dict[str, Any]:
        """config.json as transformers writes it."""
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
        if self.experts:
            kind = {
                "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": self.experts,
                "num_experts_per_tok": self.top_k, "moe_intermediate_size": self.intermediate, "norm_topk_prob": True,
                "decoder_sparse_step": 1, "mlp_only_layers": [],
            }  # fmt: skip
        return kind | {
            "dtype": "bfloat16", "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "vocab_size": self.vocabulary, "max_position_embeddings": CONTEXT,
            "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "bos_token_id": None,
            "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip

    def block(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name inside the block, shape) of its tensors, experts one by one as published models have them."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, rows, columns in (("q", queries, self.hidden), ("k", keys, self.hidden), ("v", keys, self.hidden),
                                    ("o", self.hidden, queries)):  # fmt: skip
            yield f"self_attn.{name}_proj.weight", (rows, columns)
        if self.experts:
            yield from ((f"self_attn.{name}_norm.weight", (self.head_dim,)) for name in "qk")
            yield "mlp.gate.weight", (self.experts, self.hidden)
        for place in [f"mlp.experts.{i}" for i in range(self.experts)] or ["mlp"]:
            yield f"{place}.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{place}.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{place}.down_proj.weight", (self.hidden, self.intermediate)
        yield "input_layernorm.weight", (self.hidden,)
        yield "post_attention_layernorm.weight", (self.hidden,)

    def outside(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        yield "lm_head.weight", (self.vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)


SHAPES = {
    "8B": Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    "30B-A3B": Shape("Qwen3-30B-A3B", 48, 2048, 768, 32, 4, 128, 151936, experts=128, top_k=8),
    "tiny": Shape("a test", 4, 64, 96, 4, 2, 16, 256),
    "tiny-moe": Shape("a test", 4, 64, 32, 4, 2, 16, 256, experts=4, top_k=2),
}


def bytes_of(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> int:
    return sum(2 * torch.Size(shape).numel() for _, shape in tensors)


def layers_that_fit(shape: Shape, free: int, written: float) -> int:
    """How many of its layers `free` bytes hold, with `written` times their bytes for what is made of them; raises
    AmqError where that is none."""
    room = free - SPARE - (1 + written) * bytes_of(shape.outside())
    fit = min(shape.layers, int(room // ((1 + written) * bytes_of(shape.block()))))
    if fit < 1:
        raise AmqError(f"{free / 2**30:.1f} GiB are free, which is too little for one layer of {shape.source}")
    return fit


class Pool:
    """Weights of a plausible size, which differ from tensor to tensor, at the speed of copying."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.randn(POOL, generator=self._generator)

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        start = int(torch.randint(POOL, (), generator=self._generator))
        numbers = (self._numbers.roll(-start) * shape[-1] ** -0.5).bfloat16()
        numel = torch.Size(shape).numel()
        return numbers.repeat(-(-numel // POOL))[:numel].view(shape)


def write_model(folder: Path, shape: Shape, layers: int, tokenizer: Path, seed: int = 0) -> None:
    """A folder with one file per block, and one for the rest."""
    folder.mkdir(parents=True)
    pool, where = Pool(seed), {}
    parts = [("model-rest.safetensors", list(shape.outside()))]
    for layer in range(layers):
        tensors = [(f"model.layers.{layer}.{name}", size) for name, size in shape.block()]
        parts.append((f"model-{layer:03}.safetensors", tensors))
    for file, tensors in parts:
        save_file({name: pool.tensor(size) for name, size in tensors}, folder / file, {"format": "pt"})
        where |= {name: file for name, _ in tensors}
    total = bytes_of(shape.outside()) + layers * bytes_of(shape.block())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    write_json(folder / "config.json", shape.config(layers))
    kept = {"config.json", "generation_config.json", "model.safetensors.index.json", "quantization.json"}
    for pattern in TOKENIZER_FILES:
        for source in tokenizer.glob(pattern):
            if source.name not in kept:
                shutil.copy(source, folder / source.name)


@dataclass(frozen=True)
class Ran:
    """A process that was watched: its seconds, the most memory of its own and with pages of files, and what it said."""

    command: list[str]
    seconds: float
    own_gib: float
    resident_gib: float
    said: str


def run_within(command: list[str], limit: int) -> Ran:
    """Runs `command` with at most `limit` bytes of memory of its own; raises AmqError where it takes more or fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment) as process:
            own, resident = _watch(process, limit)
        said.seek(0)
        words = said.read()
    if own > limit:
        raise AmqError(f"{' '.join(command)} took {own / 2**30:.2f} GiB, more than {limit / 2**30:g}: {words[-2000:]}")
    if process.returncode:
        raise AmqError(f"{' '.join(command)} ended with {process.returncode}: {words[-2000:]}")
    return Ran(command[2:], round(time.monotonic() - start, 1), own / 2**30, resident / 2**30, words)


def _watch(process: subprocess.Popen[bytes], limit: int) -> tuple[int, int]:
    """The most bytes of its own, and with pages of files, until it ends, or is ended for having more than `limit`."""
    own = resident = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = re.findall(r"^(RssAnon|RssShmem|VmHWM):\s+(\d+) kB", status.read_text(), re.MULTILINE)
        now = {name: int(kib) << 10 for name, kib in fields}  # of a process that has just ended, none
        own = max(own, now.get("RssAnon", 0) + now.get("RssShmem", 0))
        resident = max(resident, now.get("VmHWM", 0))
        if own > limit:
            process.kill()
        time.sleep(EVERY)
    return own, resident


def measure(args: argparse.Namespace) -> dict[str, Any]:
    shape, folder = SHAPES[args.shape], args.folder / args.shape
    if not folder.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        layers = args.layers or layers_that_fit(shape, shutil.disk_usage(args.folder).free, 0.3)
        start = time.monotonic()
        write_model(folder, shape, layers, resolve(args.tokenizer))
        print(f"wrote {layers} of {shape.layers} layers in {time.monotonic() - start:.0f} s", flush=True)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    limit, runs = parse_size(args.memory), {}
    for name in args.run.split(","):
        output = args.folder / f"{args.shape}-{name}"
        check_new_folder(output)
        arguments = {
            "quantize": [*"--uniform int4 --method rtn --perplexity none --load disk".split(), "--output", str(output)],
            "search": [*args.search.split(), "--load", "disk", "--output", str(output)],
        }[name]
        runs[name] = run_within([sys.executable, "-m", f"amq.{name}", str(folder), *arguments], limit)
        print(runs[name].said, flush=True)
    sizes = [bytes_of(shape.outside()) + count * bytes_of(shape.block()) for count in (layers, shape.layers)]
    return {
        "schema": SCHEMA, "shape": asdict(shape), "layers": layers, "limit_gib": limit / 2**30,
        "model_gib": sizes[0] / 2**30, "whole_model_gib": sizes[1] / 2**30,
        "runs": {name: asdict(ran) | {"seconds_per_block": ran.seconds / layers} for name, ran in runs.items()},
    }  # fmt: skip


def table(content: dict[str, Any]) -> str:
    """Markdown; what is not measured is extrapolated from the layers that are, and says so."""
    layers, whole = content["layers"], content["shape"]["layers"]
    lines = ["| run | layers | GiB in 16 bits | memory of its own, GiB | with pages of files | seconds | per block |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, run in content["runs"].items():
        figures = (
            f"{run['own_gib']:.2f} | {run['resident_gib']:.2f} | {run['seconds']:.0f} | {run['seconds_per_block']:.1f}"
        )
        lines.append(f"| {name} | {layers} | {content['model_gib']:.1f} | {figures} |")
        if layers < whole:
            seconds = run["seconds_per_block"] * whole
            lines.append(
                f"| {name}, extrapolated, at most | {whole} | {content['whole_model_gib']:.1f} | | | {seconds:.0f} | |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--shape", choices=list(SHAPES), default="8B")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="default: all, or as many as the disk holds")
    parser.add_argument("--memory", default="8GiB", metavar="SIZE", help="that a process may take (default 8GiB)")
    parser.add_argument("--run", default="quantize", metavar="LIST", help="quantize, search (default quantize)")
    parser.add_argument("--search", metavar="ARGUMENTS", help="of the search", default="--target-bits 4.5 --proxy rtn "
                        "--cost weight --points 0 --windows 1 --confirm-windows 1 --window-length 64")  # fmt: skip
    parser.add_argument("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokenizer to copy")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    content = measure(args)
    if args.json:
        write_results(args.json, content)
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main()))
