"""The CUDA engine on a processor, with a real checkpoint: are its logits the native engine's?

    python benchmarks/gpu/on_cpu.py CHECKPOINT [CHECKPOINT …] [--tokens 24] [--json FILE]

The very sources of kernels/cuda, compiled for a CPU through tests/cuda_shim, run a prompt in one pass and then token
by token what the native engine (activations fp32) finds likeliest. Prints for each dtype the difference of logits, root
mean squares relative to theirs, what roundings to that dtype may add up to, and whether the likeliest tokens are the
same. It takes seconds per token and says nothing about speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from helpers.cuda_on_cpu import agrees, cuda_library, open_on_cpu  # noqa: E402
from provenance import write_results  # noqa: E402

from amq.runtime.engine import Segment  # noqa: E402
from amq.runtime.native_engine import open_native  # noqa: E402
from amq.runtime.tokenizer import Tokenizer  # noqa: E402

TEXT = "The memory that a language model needs is"


def likeliest(folder: Path, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """The native engine's greedy text, and logits [count, vocabulary] from which its tokens were chosen."""
    engine = open_native(folder, "fp32", context=256)
    slot = engine.open(prompt, count)
    rows, part = [], prompt
    while len(rows) < count:
        rows.append(engine.forward([Segment(slot, part)])[0].clone())
        part = [int(rows[-1].argmax())]
    return [int(row.argmax()) for row in rows], torch.stack(rows)


def compare(folder: Path, tokens: int, dtype: torch.dtype) -> dict[str, object]:
    prompt = Tokenizer.from_folder(folder).encode(TEXT)
    text, expected = likeliest(folder, prompt, tokens)
    engine = open_on_cpu(folder, dtype=str(dtype).removeprefix("torch."))
    slot = engine.open(prompt, tokens)
    rows = []
    for part in [prompt, *([token] for token in text[:-1])]:
        rows.append(engine.forward([Segment(slot, part)])[0].clone())
    found = torch.stack(rows)
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    layers = len(engine._weights.spec.steps) // 2
    return {
        "model": folder.name, "banner": engine.banner, "dtype": str(dtype).removeprefix("torch."),
        "prompt": len(prompt), "tokens": tokens, "relative_error": float(error), "allowed": agrees(layers, dtype),
        "same_tokens": int((found.argmax(-1) == expected.argmax(-1)).sum()),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, cuda_library(Path(folder)):
        for checkpoint in options.checkpoints:
            for dtype in (torch.float16, torch.bfloat16):
                rows.append(compare(checkpoint, options.tokens, dtype))
                print(rows[-1], flush=True)
    if options.json:
        write_results(options.json, {"rows": rows})
    return 0 if all(row["relative_error"] <= row["allowed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
