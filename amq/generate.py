"""`amq generate MODEL --prompt TEXT`: streams text, and says how fast it came and what memory it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from amq.errors import AmqError
from amq.model.settings import CHECKPOINT
from amq.runtime.settings import WRITE, RuntimeSettings, Sampling
from amq.util.files import check_file, write_json
from amq.util.machine import peak_memory_bytes
from amq.util.settings import REQUIRED, flag, parse_command, run_command

if TYPE_CHECKING:
    from amq.runtime import Generation, Runtime
    from amq.runtime.generation import Prompt


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(RuntimeSettings, Sampling):
    VERB: ClassVar[str] = "generate"
    ABOUT: ClassVar[str] = "streams text that a model writes, and says how fast it came"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        'amq generate smollm2-4bit --prompt "The capital of France is"',
        'amq generate smollm2-4bit --chat --prompt "Why is the sky blue?" --temperature 0.7',
    )

    model: str = flag(REQUIRED, CHECKPOINT, positional=True)
    prompt: str = flag(REQUIRED, "text to go on from; - reads it from stdin", WRITE, metavar="TEXT")
    chat: bool = flag(False, "the prompt is a message to the model: use its chat template", WRITE)
    system: str | None = flag(None, "what the model is told before the message of --chat", WRITE, metavar="TEXT")
    context: int | None = flag(
        None, "tokens that prompt and text may have (default: the model's)", least=1, metavar="N"
    )
    json_file: Path | None = flag(None, "write the figures as JSON", name="json", metavar="FILE")

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})


def main(argv: Sequence[str] | None = None) -> int:
    settings = GenerateSettings(**parse_command(argv, GenerateSettings))
    check_file(settings.json_file, "--json")
    if settings.system is not None and not settings.chat:
        raise AmqError("--system is for a chat: give --chat too")
    text = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    if not text.strip():
        raise AmqError("the prompt is empty: give --prompt TEXT, or text on stdin with --prompt -")
    start = time.perf_counter()
    from amq.runtime import generate, load

    runtime = load(settings.model, **settings.loading)
    load_seconds = time.perf_counter() - start
    print(runtime.engine.banner, file=sys.stderr)
    generation = generate(runtime, _prompt(settings, text), settings.sampling)
    for piece in generation:
        print(piece, end="", flush=True)
    print(flush=True)
    figures = {"model": settings.model, "load_seconds": load_seconds, **_figures(runtime, generation)}
    print(_line(figures), file=sys.stderr)
    if settings.json_file:
        write_json(settings.json_file, figures)
    return 0


def _prompt(settings: GenerateSettings, text: str) -> Prompt:
    if not settings.chat:
        return text
    system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    return [*system, {"role": "user", "content": text}]


def _figures(runtime: Runtime, generation: Generation) -> dict[str, Any]:
    """JSON has no NaN: a speed that was not measured, such as that of a single token, is null."""
    import torch

    on_gpu = runtime.device.startswith("cuda")
    figures = {
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": generation.new_tokens,
        "first_token_seconds": generation.first_token_seconds,
        "prompt_tokens_per_second": generation.prompt_tokens_per_second,
        "tokens_per_second": generation.tokens_per_second,
        "threads": torch.get_num_threads(),
        "device": runtime.device,
        "engine": runtime.engine.banner,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(runtime.device) if on_gpu else peak_memory_bytes(),
    }
    return {name: None if value != value else value for name, value in figures.items()}


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
