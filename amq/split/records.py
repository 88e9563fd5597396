"""What the training side of a split run leaves in its folder, as typed records; docs/split.md says what they mean.

    split.json      `SplitRun`: what was agreed, machine, versions, status; written at the start and at the end
    steps.jsonl     one `StepRecord` per step
    widths.jsonl    one `WidthsRecord` whenever a table of widths changed
    evaluation.json `SplitEvaluation`, by `amq split eval`
    adapter/        the trained LoRA, as peft writes it

Lines of a step are written in one go and cut back to the step from which a run goes on, so that a resumed run's files
are those of an uninterrupted one, times aside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from amq.errors import AmqError
from amq.util.files import write_text
from amq.util.records import JsonFile, check_range, parse_record, to_json

RUN, STEPS, WIDTHS, EVALUATION, ADAPTER = "split.json", "steps.jsonl", "widths.jsonl", "evaluation.json", "adapter"
BASE, TUNED, QUANTIZED = "base", "tuned", "tuned, quantized cut"
"""Rows of an evaluation."""
PACKAGES = ("torch", "transformers", "peft", "numpy")
Line = TypeVar("Line")


@dataclass(frozen=True, kw_only=True)
class SplitRun(JsonFile):
    """terms: what hello carries, as JSON (`amq.split.terms.Terms`). status: running, finished or interrupted.

    sent, received: bytes counted on the client's socket over all connections, frames' heads and heartbeats included.
    """

    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq-split/1",)

    model: str
    architecture: str
    blocks: int
    parameters: int
    trainable: int
    hidden_size: int
    link: str = ""
    text: str = ""
    terms: dict[str, Any]
    status: str = "running"
    sent: int = 0
    received: int = 0
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    schema: str = SCHEMAS[0]

    def __post_init__(self) -> None:
        check_range(self, "blocks", "hidden_size", "parameters", most=1 << 48)
        check_range(self, "sent", "received", least=0, most=1 << 62)


@dataclass(frozen=True, kw_only=True)
class PartySeconds:
    """Of one step: computing (forward, backward, optimizer), encoding and decoding, and waiting for the other party."""

    compute: float
    encode: float
    wait: float


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step. loss: mean cross-entropy over the step's predicted tokens, nats.

    forward_bits, backward_bits: mean width of the codes per value, over all cuts; 16 or 32 where nothing is quantized.
    forward_bytes, backward_bytes: frames that carried tensors to the server and from it, tables and labels included.
    sent, received: bytes on the client's socket since the run began, everything included.
    seconds: of the whole step at the client; client, server: what each did in it.
    """

    step: int
    loss: float
    forward_bits: float
    backward_bits: float
    forward_bytes: int
    backward_bytes: int
    sent: int
    received: int
    seconds: float
    client: PartySeconds
    server: PartySeconds


@dataclass(frozen=True, kw_only=True)
class WidthsRecord:
    """The widths in force from `step` on, one per channel. stream: `forward` or `backward`, and `.1` for the second cut
    of a U-shaped run."""

    step: int
    stream: str
    widths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """name: `BASE`, `TUNED` (unquantized cut) or `QUANTIZED`. bits: mean bits per value sent at the cut."""

    name: str
    perplexity: float
    loss: float
    bits: float | None = None


@dataclass(frozen=True, kw_only=True)
class SplitEvaluation(JsonFile):
    SCHEMAS: ClassVar[tuple[str, ...]] = ("amq-split-evaluation/1",)

    text: str
    tokens: int
    rows: tuple[EvaluationRow, ...]
    schema: str = SCHEMAS[0]


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """The whole file anew."""
    write_text(path, "".join(json.dumps(to_json(record)) + "\n" for record in records))


def append_line(path: Path, record: Any) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(to_json(record)) + "\n")


def read_lines(path: Path, kind: type[Line]) -> list[Line]:
    """The records of a file of lines; an unfinished last line, which a killed process leaves, is not there yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise AmqError(f"{path} cannot be read: {error}") from None
    whole = text[: text.rfind("\n") + 1]
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            data = json.loads(line)
        except ValueError as error:
            raise AmqError(f"{path} line {number} is not valid JSON: {error}; the file is damaged") from None
        found.append(parse_record(data, kind, f"{path} line {number}"))
    return found
