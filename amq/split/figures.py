"""What the report shows of split runs: their records, and the figures that follow from them by arithmetic.

    values       one step, one direction: batch · window_length · hidden_size, twice that where the client has labels
    float16      2 bytes per value, both directions: what a step would send without quantization
    work         of a party in a step: computing and encoding, without waiting (medians over the steps)
    transfer     8 · bytes of a step, both directions, everything included / bits per second
    a step       on a link: max(work of the slower party, transfer) with two micro-batches or more, which overlap;
                 with one nothing does: work of both + transfer

Latency of the link is left out of the arithmetic: two micro-batches in flight hide some of it, and how much is
measured, not known.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.split.quantizer import MOST_WIDTH
from amq.split.records import (
    EVALUATION,
    RUN,
    STEPS,
    WIDTHS,
    EvaluationRow,
    PartySeconds,
    SplitEvaluation,
    SplitRun,
    StepRecord,
    WidthsRecord,
    read_lines,
)
from amq.split.terms import Terms
from amq.util.records import check_range, shorten

STREAMS = ("forward", "backward", "forward.1", "backward.1")
LINKS = {"100 Mbit/s": 100e6, "20 Mbit/s": 20e6}
"""Bits per second that a step's time is computed for."""
LAST = 10
"""Steps at the end of a run whose mean is its final loss."""
SAME = ("model", "text", "samples", "window_length", "batch")
"""Terms that two runs must share for a loss of one to say anything about the other's."""


@dataclass(frozen=True)
class ShownRun:
    """A run as the page and its charts see it. name: its folder's, with as many parts as tell the runs apart.

    widths: {stream: its tables by rising step}, streams in the order of `STREAMS`.
    """

    path: Path
    name: str
    run: SplitRun
    terms: Terms
    steps: Sequence[StepRecord]
    widths: dict[str, list[WidthsRecord]]
    evaluation: SplitEvaluation | None

    @cached_property
    def sent(self) -> int:
        """Bytes on the client's socket, both directions; split.json has the last word once the run has ended."""
        last = self.steps[-1].sent + self.steps[-1].received if self.steps else 0
        return max(last, self.run.sent + self.run.received)

    @property
    def sent_per_step(self) -> float | None:
        """Both directions, mean over the steps so far."""
        return (self.steps[-1].sent + self.steps[-1].received) / len(self.steps) if self.steps else None

    @property
    def values(self) -> int:
        """That cross the cut or cuts in one step and one direction."""
        cuts = 2 if self.terms.labels == "client" else 1
        return self.terms.batch * self.terms.window_length * self.run.hidden_size * cuts

    @property
    def float16(self) -> int:
        """Bytes of a step's values, both directions, as float16."""
        return 2 * 2 * self.values

    @property
    def ratio(self) -> float | None:
        """How many times fewer bytes than as float16."""
        return self.float16 / self.sent_per_step if self.sent_per_step else None

    @property
    def wire_bits(self) -> float | None:
        """Bits per value of a step's frames, tables, ranges and labels included; mean over the steps."""
        payload = sum(step.forward_bytes + step.backward_bytes for step in self.steps)
        return 8 * payload / (2 * self.values * len(self.steps)) if self.steps else None

    def mean_bits(self, direction: str) -> float | None:
        """Width of the codes per value, `forward` or `backward`, mean over the steps."""
        return _mean([getattr(step, f"{direction}_bits") for step in self.steps])

    @property
    def loss(self) -> float | None:
        """Mean of the last `LAST` steps."""
        return _mean([step.loss for step in self.steps[-LAST:]])

    def seconds(self, party: str) -> PartySeconds | None:
        """Of a step at `client` or `server`: the median of each part."""
        if not self.steps:
            return None
        found: list[PartySeconds] = [getattr(step, party) for step in self.steps]

        def middle(part: Callable[[PartySeconds], float]) -> float:
            return statistics.median(map(part, found))

        return PartySeconds(
            compute=middle(lambda s: s.compute), encode=middle(lambda s: s.encode), wait=middle(lambda s: s.wait)
        )

    @property
    def measured(self) -> float | None:
        """Seconds of a step at the client, the median."""
        return statistics.median(step.seconds for step in self.steps) if self.steps else None

    @property
    def encode_share(self) -> float | None:
        """Of the parties' time in which they work, that of encoding and decoding."""
        parts = [party for step in self.steps for party in (step.client, step.server)]
        encode, compute = sum(part.encode for part in parts), sum(part.compute for part in parts)
        return encode / (encode + compute) if encode + compute > 0 else None

    @property
    def work(self) -> float | None:
        """Seconds of a step in which the slower party computes or encodes; of both where nothing overlaps."""
        parties = [self.seconds("client"), self.seconds("server")]
        found = [party.compute + party.encode for party in parties if party is not None]
        return None if not found else max(found) if self.overlaps else sum(found)

    @property
    def overlaps(self) -> bool:
        return self.terms.micro_batches > 1

    def transfer(self, rate: float) -> float | None:
        """Seconds that a step's bytes take on a link of `rate` bits per second."""
        return None if self.sent_per_step is None else 8 * self.sent_per_step / rate

    def step_seconds(self, rate: float) -> float | None:
        """Seconds of a step on such a link, by arithmetic."""
        work, transfer = self.work, self.transfer(rate)
        if work is None or transfer is None:
            return None
        return max(work, transfer) if self.overlaps else work + transfer

    def evaluated(self, name: str) -> EvaluationRow | None:
        rows = self.evaluation.rows if self.evaluation else ()
        return next((row for row in rows if row.name == name), None)


def read_runs(paths: Sequence[Path]) -> list[ShownRun]:
    """The runs in these folders. Raises AmqError for a folder that is no run's, is given twice, or is damaged."""
    if not paths:
        raise AmqError("amq split report: expected the folder of a run, got none: give what `amq split train` wrote")
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise AmqError(f"{path} is given twice: expected different runs; name each folder once")
    return [_read(path, name) for path, name in zip(paths, _names(places), strict=True)]


def _read(path: Path, name: str) -> ShownRun:
    if not (path / RUN).is_file():
        raise AmqError(
            f"{path} is not the folder of a split run: expected {RUN} in it; give what the training side wrote: "
            "amq split train MODEL --output FOLDER"
        )
    run = SplitRun.read(path / RUN)
    terms = Terms.parse(run.terms, f"{path / RUN} at $.terms")
    evaluation = SplitEvaluation.read(path / EVALUATION) if (path / EVALUATION).exists() else None
    return ShownRun(path, name, run, terms, _read_steps(path / STEPS), _read_widths(path / WIDTHS), evaluation)


def _read_steps(path: Path) -> list[StepRecord]:
    """Raises AmqError for a figure below 0 or not finite; a loss may be what it is, for training gives such ones."""
    steps = read_lines(path, StepRecord)
    for number, step in enumerate(steps, 1):
        try:
            counts = ("forward_bytes", "backward_bytes", "sent", "received")
            check_range(step, "forward_bits", "backward_bits", "seconds", *counts, least=0, most=1 << 62)
            for party in (step.client, step.server):
                check_range(party, "compute", "encode", "wait", least=0)
        except ValueError as error:
            raise AmqError(f"{path} line {number}: {error}; the file is damaged or was edited") from None
    return steps


def _read_widths(path: Path) -> dict[str, list[WidthsRecord]]:
    """Raises AmqError for a stream of another name, and for tables of a stream that have different lengths."""
    found: dict[str, list[WidthsRecord]] = {stream: [] for stream in STREAMS}
    for number, record in enumerate(read_lines(path, WidthsRecord), 1):
        before, count, wrong = found.get(record.stream), len(record.widths), ""
        if before is None:
            wrong = f"expected a stream of {', '.join(STREAMS)}, got {shorten(record.stream)}"
        elif not count or before and count != len(before[0].widths):
            wrong = f"expected {len(before[0].widths) if before else 'some'} widths, got {count}"
        elif outside := [width for width in record.widths if not 1 <= width <= MOST_WIDTH]:
            wrong = f"expected widths from 1 to {MOST_WIDTH}, got {shorten(outside[0])}"
        if before is None or wrong:
            raise AmqError(f"{path} line {number}: {wrong}; the file is damaged or was edited")
        before.append(record)
    return {stream: tables for stream, tables in found.items() if tables}


def _names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as make all of them differ; `places` are absolute and distinct."""
    parts = 1
    while True:
        names = ["/".join(place.parts[-parts:]) or str(place) for place in places]
        if len(set(names)) == len(names):
            return names
        parts += 1


def find_differences(runs: Sequence[ShownRun]) -> dict[str, list[str]]:
    """{term: each run's value as text} of the terms in which the runs differ."""
    terms = dict.fromkeys(term for run in runs for term in run.run.terms)
    found = {term: [_show(run.run.terms.get(term)) for run in runs] for term in terms}
    return {term: values for term, values in found.items() if len(set(values)) > 1}


def _show(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mean(values: Sequence[float]) -> float | None:
    """None without values, or where one is not finite."""
    return statistics.fmean(values) if values and all(map(math.isfinite, values)) else None
