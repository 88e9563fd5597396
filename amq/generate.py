"""`python -m amq.generate MODEL --prompt TEXT`: streams text, and says how fast it came and what memory it took."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.kernels.backends import ACTIVATIONS, BACKENDS
from amq.runtime import Generation, Runtime, Sampling, generate, load
from amq.util.files import check_file, write_json
from amq.util.settings import TRUST_REMOTE_CODE, run_command

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_file(args.json, "--json")
    sampling = Sampling(**{name: getattr(args, name) for name in SAMPLING}, stop=tuple(args.stop))
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise AmqError("the prompt is empty: give --prompt TEXT, or text on stdin with --prompt -")
    start = time.perf_counter()
    runtime = load(
        args.model, args.device, args.backend, args.activations, args.dtype, args.context,
        threads=args.threads, trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    load_seconds = time.perf_counter() - start
    print(runtime.engine.banner, file=sys.stderr)
    generation = generate(runtime, [{"role": "user", "content": text}] if args.chat else text, sampling)
    for piece in generation:
        print(piece, end="", flush=True)
    print(flush=True)
    figures = {"model": str(args.model), "load_seconds": load_seconds, **_figures(runtime, generation)}
    print(_line(figures), file=sys.stderr)
    if args.json:
        write_json(args.json, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m amq.generate", description="Generates text with a model.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder that amq.quantize wrote; or hub id, folder, .gguf file, smollm2")
    add("--prompt", required=True, metavar="TEXT", help="text to go on from; - reads it from stdin")
    add("--chat", action="store_true", help="the prompt is a message to the model: use its chat template")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="tokens to generate at most (default 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default 0: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that make up P (default 1)")
    add("--min-p", type=float, default=0.0, metavar="P", help="leave out tokens below P times the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less (default 1: off)")
    add("--seed", type=int, metavar="N", help="of the draws, to repeat them")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    add("--activations", choices=ACTIVATIONS, help="int8 or fp32 (exact); default: int8 on backend cpu, else fp32")
    add("--backend", choices=list(BACKENDS), help="what multiplies the quantized linears (default: the fastest)")
    add("--device", default="cpu")
    add("--dtype", default="auto", help="of what is not quantized (default: float32 on a CPU)")
    add("--trust-remote-code", action="store_true", help=TRUST_REMOTE_CODE)
    add("--context", type=int, metavar="N", help="tokens that prompt and text may have (default: the model's)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def _figures(runtime: Runtime, generation: Generation) -> dict[str, Any]:
    """JSON has no NaN: a speed that was not measured, such as that of a single token, is null."""
    import torch

    on_gpu = runtime.device.startswith("cuda")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "first_token_seconds": generation.first_token_seconds,
        "prompt_tokens_per_second": generation.prompt_tokens_per_second,
        "tokens_per_second": generation.tokens_per_second,
        "threads": torch.get_num_threads(),
        "device": runtime.device,
        "engine": runtime.engine.banner,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(runtime.device) if on_gpu else _ru_bytes(resident),
    }
    return {name: None if value != value else value for name, value in figures.items()}


def _ru_bytes(ru_maxrss: int) -> int:
    return ru_maxrss if sys.platform == "darwin" else 1024 * ru_maxrss


def _line(figures: dict[str, Any]) -> str:
    def speed(name: str) -> str:
        return "-" if figures[name] is None else f"{figures[name]:.1f}"

    kind = "GPU memory" if figures["device"].startswith("cuda") else "RSS"
    return (
        f"prompt {figures['prompt_tokens']} tokens, {speed('prompt_tokens_per_second')} tokens/s; "
        f"generated {figures['new_tokens']} tokens, {speed('tokens_per_second')} tokens/s; "
        f"peak {kind} {figures['peak_memory_bytes'] / 2**20:.0f} MiB; loaded in {figures['load_seconds']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
