"""Does the native engine generate what transformers generates? Greedily, on the same weights, for 256 tokens:
`python benchmarks/identical.py DIR`.

Both run exact activations in float32. Where texts part, the line says how far apart the two likeliest tokens were: sums
in another order may decide a tie. The exit status says whether all texts were the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from provenance import write_results

from amq.runtime import Runtime, load
from amq.runtime.engine import Segment
from amq.util.settings import run_command

PROMPTS = (
    "Write a story about a lighthouse keeper who finds a letter.",
    "Explain how a bicycle stays upright.",
    "List the planets of the solar system and describe each of them.",
    "What should I cook with rice, eggs and spinach?",
    "Write a Python function that reverses a linked list, and explain it.",
    "Describe the water cycle to a child.",
    "Give me a plan for learning to play the piano in a year.",
    "Summarize the causes of the first world war.",
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    runtime = load(args.folder, activations="fp32")
    print(runtime.engine.banner)
    model = _transformers(args.folder)
    rows = []
    for prompt in PROMPTS[: args.prompts]:
        tokens = runtime.tokenizer.encode_chat([{"role": "user", "content": prompt}]).tokens
        ours, margins = _ours(runtime, tokens, args.tokens)
        theirs = _theirs(model, tokens, args.tokens, sorted(runtime.tokenizer.end_ids))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        identical = ours == theirs
        rows.append({"prompt": prompt, "tokens": len(ours), "same": same, "identical": identical,
                     "margin": None if identical else margins[same], "least_margin": min(margins)})  # fmt: skip
        end = "" if identical else f"; there the two likeliest were {margins[same]:.2g} apart"
        print(f"{same} of {len(ours)} tokens the same (closest call {min(margins):.2g}){end}: {prompt}")
    if args.json:
        write_results(args.json, {"model": str(args.folder), "rows": rows})
    return 0 if all(row["identical"] for row in rows) else 1


def _transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from amq.integrations.transformers import AmqConfig

    how = AmqConfig(activations="fp32")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)


def _ours(runtime: Runtime, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens, and how far the likeliest was ahead of the next one."""
    engine, tokens, margins = runtime.engine, [], []
    slot = engine.open(prompt, count)
    assert slot is not None
    fed = prompt[slot.length :]
    while len(tokens) < count and not (tokens and tokens[-1] in runtime.tokenizer.end_ids):
        best = engine.forward([Segment(slot, fed)])[0].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        fed = tokens[-1:]
    engine.close(slot)
    return tokens, margins


def _theirs(model: Any, prompt: list[int], count: int, ends: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


if __name__ == "__main__":
    sys.exit(run_command(main))
