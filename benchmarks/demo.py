"""`make demo`: the main job on a real model, from nothing to a table.

Searches SmolLM2-135M-Instruct over int2/int3/int4/int6, chooses at four budgets from the one run, and measures
perplexity on a text that neither calibration nor search ever saw. The run folder is kept (runs/demo): a second call
resumes it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import amq
from amq.eval.__main__ import table
from amq.files import write_json
from amq.progress import terminal_progress
from amq.search.__main__ import summary
from amq.search.select import select_from_run

FORMATS = "int2,int3,int4,int6"
BUDGETS = (3.5, 4.0, 5.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--text", default="docstrings", help="held-out text: a file, or the built-in docstrings")
    parser.add_argument("--max-tokens", type=int, default=8192)
    args = parser.parse_args()
    progress = terminal_progress()
    start = time.monotonic()
    result = amq.search(
        args.model, args.output, formats=FORMATS, target_bits=4.0, resume=args.output.exists(), progress=progress
    )
    searched = time.monotonic() - start
    print(summary(result.configuration))
    uniform_int3 = next(u["bits_per_weight"] for u in result.uniform if u["name"] == "int3")
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
    print(f"search {searched:.0f} s, everything {time.monotonic() - start:.0f} s; open {args.output}/report.html")
    write_json(args.output / "eval.json", evaluation.json())
    print(
        json.dumps({"seconds": round(time.monotonic() - start), "search_seconds": round(searched), "perplexity": rows})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
