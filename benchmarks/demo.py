"""`make demo`: the main job on a real model, from nothing to a table and a checkpoint that answers.

Searches SmolLM2-135M-Instruct over int2/int3/int4/int6, chooses at four budgets from the one run, measures perplexity
on a text that neither calibration nor search ever saw, writes a checkpoint at 4 bits per weight and asks it something.
The run folder is kept (runs/demo): a second call resumes it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from provenance import write_results

import amq
from amq.eval import table
from amq.quantize.__main__ import summary as quantized_summary
from amq.runtime import Sampling, generate, load
from amq.search.__main__ import summary
from amq.search.select import select_from_run
from amq.util.folders import work_folder
from amq.util.progress import Progress, terminal_progress
from amq.util.records import to_json

FORMATS = "int2,int3,int4,int6"
BUDGETS = (3.5, 4.0, 5.0)
CHECKPOINT_BITS = 4.0
PROMPT = "What is the capital of France, and what is it known for?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--text", default="docstrings", help="held-out text: a file, or the built-in docstrings")
    parser.add_argument("--max-tokens", type=int, default=8192)
    args = parser.parse_args()
    progress = terminal_progress()
    start = time.monotonic()
    result = amq.search(  # linears alone, as the uniform rows beside them have it; the checkpoint's head is int8
        args.model, args.output, formats=FORMATS, target_bits=4.0, head="16bit", resume=args.output.exists(),
        progress=progress,
    )  # fmt: skip
    searched = time.monotonic() - start
    print(summary(result.configuration))
    uniform_int3 = next(u.bits_per_weight for u in result.uniform if u.name == "int3")
    paths = []
    for bits in (uniform_int3, *BUDGETS):
        name = "searched-at-int3-cost" if bits == uniform_int3 else f"searched-{bits}"
        paths.append(args.output / f"{name}.json")
        select_from_run(args.output, target_bits=bits).save(paths[-1])
    evaluation = amq.evaluate(
        args.model, paths, "int2,int3,int4,int6", text=args.text, max_tokens=args.max_tokens, progress=progress
    )
    print(table(evaluation))
    rows = {r.name: r.perplexity for r in evaluation.rows}
    gain = 1 - rows["searched-at-int3-cost"] / rows["int3"]
    print(f"at uniform int3's cost the searched model's perplexity is {100 * gain:.1f} % lower")
    checkpoint = _quantize(args, progress)
    print(f"search {searched:.0f} s, everything {time.monotonic() - start:.0f} s; open {args.output}/report.html")
    print(f"ask it more: python -m amq.generate {checkpoint} --chat --prompt …, or python -m amq.serve {checkpoint}")
    write_results(args.output / "eval.json", to_json(evaluation))
    print(
        json.dumps({"seconds": round(time.monotonic() - start), "search_seconds": round(searched), "perplexity": rows})
    )
    return 0


def _quantize(args: argparse.Namespace, progress: Progress) -> Path:
    """Writes the checkpoint (unless an earlier call did) and lets it answer.

    `bank` takes seconds; the default method takes some minutes and is better.
    """
    folder = args.output / "checkpoint"
    if not folder.exists():
        configuration = args.output / f"searched-{CHECKPOINT_BITS}.json"
        settings = {"method": "bank", "configuration": str(configuration), "head": "int8", "perplexity": "none"}
        resume = work_folder(folder).exists()
        print(quantized_summary(amq.quantize(args.model, folder, resume=resume, progress=progress, **settings)))
    print(f"> {PROMPT}")
    runtime = load(folder)
    print(runtime.engine.banner)
    answer = generate(runtime, [{"role": "user", "content": PROMPT}], Sampling(max_new_tokens=60))
    for piece in answer:
        print(piece, end="", flush=True)
    print(f"\n({answer.tokens_per_second:.1f} tokens per second)")
    return folder


if __name__ == "__main__":
    sys.exit(main())
