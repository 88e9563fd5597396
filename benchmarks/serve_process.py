"""A server whose engine fails on purpose, or that needs no model: `python serve_process.py --fault stall DIR …`.

    panic   a panic of Rust's tokenizers in the engine's thread, which Python sees as a BaseException
    exit    SystemExit in the engine's thread
    stall   a pass that never ends
    raise   an ordinary error

One pass has the fault.
Everything after the options is for `amq serve`. Only what `amq.runtime.load` returns is changed, so that it runs older
commits as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def panic() -> None:
    from tokenizers import Regex, decoders

    decoders.Replace(Regex("(-+-+)+y"), "z").decode(["-" * 1280])  # the regular expression gives up: Rust panics


def leave() -> None:
    raise SystemExit(3)


def stall() -> None:
    while True:
        time.sleep(1)


def fail() -> None:
    raise RuntimeError("an error on purpose")


FAULTS: dict[str, Callable[[], None]] = {"panic": panic, "exit": leave, "stall": stall, "raise": fail}


def preload() -> None:
    """Imports what takes seconds, so that processes forked from this one have it."""
    import amq.runtime
    import amq.serve.app  # noqa: F401

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import helpers.engines
    import helpers.small_tokenizers  # noqa: F401


def fake_runtime(folder: str, delay: float, max_sequences: int = 8) -> Any:
    """The tests' engine, which repeats prompts; a byte is a token, and so are the two marks of a turn."""
    from helpers.engines import FakeEngine
    from helpers.small_tokenizers import bytes_alone

    from amq.runtime.loading import Runtime
    from amq.runtime.tokenizer import Tokenizer

    inner = bytes_alone()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = Path(folder, "chat_template.jinja")
    tokenizer = Tokenizer(inner, [257], template.read_text() if template.exists() else TEMPLATE)
    engine = FakeEngine(context=8192, max_sequences=max_sequences, delay=delay, vocab_size=258)
    return Runtime(folder, engine, tokenizer, weight_bytes=1)


def serve(arguments: Sequence[str], fake: bool = False, fault: str = "", after: int = 0, delay: float = 0.0) -> int:
    """Runs the command; its exit status. after: passes that go well before the fault."""
    import amq.runtime
    from amq.serve.__main__ import main as command
    from amq.util.settings import run_command

    load = amq.runtime.load

    def broken(model: Any, **settings: Any) -> Any:
        if fake:
            runtime = fake_runtime(str(model), delay, settings.get("max_sequences", 8))
        else:
            runtime = load(model, **settings)
        return with_fault(runtime, FAULTS[fault], after) if fault else runtime

    amq.runtime.load = broken
    return run_command(command, arguments)


def with_fault(runtime: Any, fault: Callable[[], None], after: int) -> Any:
    forward, passes = runtime.engine.forward, 0

    def failing(segments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == after + 1:
            fault()
        return forward(segments)

    runtime.engine.forward = failing
    return runtime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=FAULTS, default="")
    parser.add_argument("--after", type=int, default=0, metavar="PASSES")
    known, rest = parser.parse_known_args()
    return serve(rest, fault=known.fault, after=known.after)


if __name__ == "__main__":
    sys.exit(main())
