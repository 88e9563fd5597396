"""Every family that the CUDA engine knows, on the device, against the CPU engine's exact mode: tiny models, all calls.

    python benchmarks/gpu/families.py DIR [--smoke]           writes the section "families" of DIR/suite.json

What tests/test_cuda_engine.py does on a CPU, through the shim, is done here with the real kernels, in CUDA graphs: a
prompt in one pass, tokens one by one behind it, and a text that the GPU writes by itself, which must be the one that
the host chooses from the same engine's logits. The bound is derived (engine.py): a miss is a fault, not noise.

`calls` counts what has been launched, and `never_launched` lists the functions of kernels/cuda/calls.h that no model
here needed: none, once the first cases ran. At real widths, those of a Llama run in part engine.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import ROOT, Clock, Device, Failure, Results, arguments, attempt, load_cpu_module, now, say

sys.path.append(str(ROOT / "tests"))

import torch  # noqa: E402
from engine import Prompt, agrees, by_itself, follow  # noqa: E402
from helpers.checkpoints import tiny_checkpoint  # noqa: E402
from helpers.engine_cases import CASES  # noqa: E402
from helpers.engines import text  # noqa: E402
from torch import Tensor  # noqa: E402

from amq.checkpoint.store import open_checkpoint  # noqa: E402
from amq.kernels import cuda  # noqa: E402
from amq.kernels.cuda_calls import CALLS, STORE_KEYS, Call  # noqa: E402
from amq.runtime.cuda_engine import open_cuda  # noqa: E402
from amq.runtime.decoder_spec import Mixture  # noqa: E402
from amq.runtime.engine import Segment  # noqa: E402
from amq.runtime.native_engine import open_native  # noqa: E402

FIRST = ("llama", "qwen3_moe", "qwen3_5", "lfm2", "gemma2", "gemma4", "gpt_oss", "glm4_moe")
"""Cases that make every call between them; the others follow, as far as the time goes."""
SMOKE_CASES = ("llama", "lfm2")
LENGTH, DECODED, CONTEXT = 70, 8, 256
"""Tokens: more than a page, and than the windows of most cases."""
SMOKE_LENGTH, SMOKE_DECODED = 12, 3
LAYERS = 2
FUNCTIONS = frozenset({*(kind.FUNCTION for kind in CALLS), STORE_KEYS})


class Counted:
    """Counts the functions that the library's calls are launched through, once for each capture of a graph."""

    def __init__(self) -> None:
        self.functions: Counter[str] = Counter()
        library = cuda.library().calls
        run = library.run

        def counting(call: Call, stream: int) -> None:
            run(call, stream)
            self.functions[call.function] += 1

        library.run = counting


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Of each row, root mean squares over the vocabulary, relative to the row's."""
    return (found - expected).double().square().mean(-1).sqrt() / expected.double().square().mean(-1).sqrt()


def family(device: Device, case: str, folder: Path) -> dict:
    """A row of the result. A router that is nearly undecided may choose another expert after a rounding, which a
    recurrent state remembers: of mixtures the median row counts."""
    length, decoded = (SMOKE_LENGTH, SMOKE_DECODED) if device.smoke else (LENGTH, DECODED)
    tiny_checkpoint(CASES[case](), folder)
    tokens = text(length)
    expected = open_native(folder, "fp32", context=CONTEXT).all_logits(tokens)
    engine = open_cuda(open_checkpoint(folder, verify=False), str(device.torch), dtype="float16", context=CONTEXT)
    engine._builder._many = None  # eight rows at a time: Triton's kernels, which part correctness checks, take seconds
    slot = engine.open(tokens, 0, reuse=False)
    parts = [engine.forward([Segment(slot, tokens[: length - decoded], every=True)])]
    parts += [engine.forward([Segment(slot, [token])]).clone() for token in tokens[length - decoded :]]
    engine.close(slot)
    of_rows = errors(torch.cat(parts), expected)
    mixes = bool(engine._weights.spec.parts(Mixture))
    difference = float(of_rows.median() if mixes else of_rows.max())
    prompt = Prompt(tokens, decoded, LAYERS)
    host = follow(engine, tokens, prompt.most, decoded).argmax(-1).tolist()
    equal, allowed = by_itself(engine, prompt) == host, agrees(LAYERS, torch.float16)
    return {
        "case": case, "difference": round(difference, 6), "worst_row": round(float(of_rows.max()), 6),
        "allowed": round(allowed, 6), "by_itself_equal": equal, "banner": engine.banner,
        "wrong": not (difference <= allowed and equal),
    }  # fmt: skip


def run_all(device: Device, clock: Clock, results: Results) -> dict:
    content: dict[str, Any] = {"rows": [], "failed": {}, "left_out": {}, "calls": {}, "never_launched": []}
    if reason := load_cpu_module():
        content["left_out"]["all"] = f"the CPU engine, which they are compared with, is not here: {reason}"
        results.write(content)
        return content
    counted = Counted()
    cases = SMOKE_CASES if device.smoke else (*FIRST, *(case for case in CASES if case not in FIRST))
    with tempfile.TemporaryDirectory(prefix="amq-families-") as folder:
        for number, case in enumerate(cases):
            if clock.left() < 0:
                content["left_out"][case] = "no time left"
                continue
            row = attempt(device, family, device, case, Path(folder, str(number)))
            if isinstance(row, Failure):
                content["failed"][case] = row.reason
                say(f"families: FAILED {case}: {row.reason}\n{row.traceback}")
            else:
                content["rows"].append({**row, "at": now()})
                say(f"families: {case}: {row['difference']} of {row['allowed']}{', WRONG' if row['wrong'] else ''}")
            content["calls"] = dict(counted.functions)
            content["never_launched"] = sorted(FUNCTIONS - set(counted.functions))
            results.write({**content, "seconds": clock.spent()})
            if isinstance(row, Failure) and row.broken:
                raise SystemExit(1)
    return content


def main() -> int:
    options = arguments(__doc__, 40).parse_args()
    clock, device = Clock(options.seconds, options.began), Device(options.smoke)
    content = run_all(device, clock, Results(options.folder, "families", options.smoke))
    missed = not device.smoke and content["rows"] and content["never_launched"]
    return 1 if content["failed"] or missed or any(row["wrong"] for row in content["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
