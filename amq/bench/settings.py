"""What `amq bench` measures: one dataclass is the command line and what `bench` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from amq.bench.cases import Case, grid
from amq.bench.peers import PEERS
from amq.errors import AmqError
from amq.model.settings import CHECKPOINT
from amq.runtime.settings import RuntimeSettings
from amq.util.settings import MEASURE, REQUIRED, flag

BESIDE, TEXT = "other engines", "perplexity besides"


@dataclass(frozen=True, kw_only=True)
class BenchSettings(RuntimeSettings):
    VERB: ClassVar[str] = "bench"
    ABOUT: ClassVar[str] = (
        "measures tokens/s of prompts and decode, start-up, memory and the use of the memory's bandwidth"
    )
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq bench smollm2-4bit --prompt 128,512 --batch 1,8 --depth 0,4096 --json bench.json",
        "amq bench smollm2-4bit --peers llama.cpp,ik_llama.cpp",
    )

    model: str = flag(REQUIRED, CHECKPOINT, positional=True)
    prompt: str = flag("512", "prompt lengths; 0: none", MEASURE, metavar="LIST")
    generate: str = flag("128", "tokens to decode; 0: none", MEASURE, metavar="LIST")
    batch: str = flag("1,4", "sequences that decode at a time", MEASURE, metavar="LIST")
    depth: str = flag("0", "tokens that are in the cache before", MEASURE, metavar="LIST")
    repetitions: int = flag(5, "of every test, after one to warm up", MEASURE, least=1, metavar="N")
    startup: bool = flag(True, "do not time a fresh process", MEASURE, name="no-startup")
    seed: int = flag(0, "of the random tokens", MEASURE, least=0, metavar="N")
    peers: str = flag(
        "", f"measure these in turn with ours, each in its fastest way: {', '.join(PEERS)}", BESIDE, metavar="LIST"
    )
    gguf: str = flag(
        "auto",
        "what they run: a .gguf file; a type that their quantizer makes of the model's own GGUF; auto: their fastest "
        "type that reads as many bytes per token as ours",
        BESIDE,
        metavar="FILE|TYPE",
    )
    perplexity: str = flag(
        "", "a text file (or pydoc, docstrings): every engine's perplexity on it", TEXT, metavar="FILE"
    )
    max_tokens: int = flag(8192, "of that text", TEXT, least=1, metavar="N")
    window_length: int = flag(512, "of that text", TEXT, least=1, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cases:
            raise AmqError("nothing to measure: give --prompt or --generate")
        if unknown := [name for name in self.peer_names if name not in PEERS]:
            raise AmqError(f"--peers must be some of {', '.join(PEERS)}, got {unknown[0]!r}")

    @property
    def cases(self) -> list[Case]:
        prompts, generates = numbers(self.prompt, "--prompt"), numbers(self.generate, "--generate")
        return grid(prompts, generates, numbers(self.batch, "--batch"), numbers(self.depth, "--depth", least=0))

    @property
    def peer_names(self) -> list[str]:
        return list(dict.fromkeys(name.strip() for name in self.peers.split(",") if name.strip()))

    @property
    def thread_count(self) -> int:
        """`threads`, which `bench` has filled in."""
        assert self.threads is not None
        return self.threads

    def load_options(self) -> dict[str, Any]:
        """For `amq.runtime.load`, with room for the largest case and no more."""
        positions = [case.positions for case in self.cases] + ([self.window_length + 1] if self.perplexity else [])
        sequences = max(case.sequences for case in self.cases)
        return {**self.loading, "context": max(positions), "max_sequences": sequences}


@dataclass(frozen=True)
class BenchCommand:
    """What the command takes besides."""

    json: Path | None = flag(
        None, "write all figures; into a folder: under a name of model, processor and date", metavar="FILE|DIR"
    )
    csv: Path | None = flag(None, "write the table's rows", metavar="FILE")
    table: Path | None = flag(
        None,
        "measure a speed table instead, for --min-speed of search and select: seconds of every shape of the model in "
        "every format; MODEL may be quantized or not. --threads, --activations, --cache, --depth and the first of "
        "--batch hold",
        metavar="FILE",
    )
    group_size: int = flag(128, "of --table: input features per scale", metavar="G")


def numbers(text: str, flag: str, least: int = 1) -> list[int]:
    """`128,512` → [128, 512], without doubles; `0` or the empty text → nothing, unless 0 is allowed."""
    try:
        values = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise AmqError(f"{flag} {text!r}: expected whole numbers with commas between, such as 128,512") from None
    if least and values == [0]:
        return []
    if any(value < least for value in values):
        raise AmqError(f"{flag} {text!r}: expected numbers of at least {least}")
    return list(dict.fromkeys(values))
