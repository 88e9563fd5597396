"""Folders of split runs in milliseconds: synthetic figures, through the writers of `amq.split.records`.

folder = make_split_run(tmp_path / "run")                                  # 40 steps of waterfill, evaluated
folder = make_split_run(tmp_path / "none", policy="none", steps=10, evaluated=False)
folder = make_split_run(tmp_path / "u", labels="client", link="20mbit,30ms", status="interrupted")

Bits fall from 6 to 3 in the first 60 % of the steps; the loss falls with noise from the seed; bytes follow from bits.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

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
    append_line,
    write_lines,
)

TERMS: dict[str, Any] = {
    "policy": "waterfill", "coder": "range", "start_bits": 6.0, "target_bits": 3.0, "backward_bits": None, "seed": 0,
    "cut": 2, "labels": "server", "batch": 4, "micro_batches": 2, "window_length": 128, "lora": 8, "lora_alpha": 16.0,
    "model": "b3f1c0de", "half": False, "text": "docstrings", "beta": 1.0, "range_tokens": 0, "version": "0.1.0",
    "dtype": "float32", "samples": 100, "unscored": 0, "learning_rate": 2e-4, "clip": 1.0, "save_every": 10,
}  # fmt: skip
REFRESH = 4
"""Steps between tables of widths."""


def make_split_run(
    folder: Path,
    *,
    steps: int = 40,
    channels: int = 96,
    name: str = "tiny",
    status: str = "finished",
    link: str = "",
    evaluated: bool = True,
    **terms: Any,
) -> Path:
    """A run's folder. terms: those that are not as in `TERMS`."""
    folder.mkdir(parents=True)
    given = {**TERMS, "steps": steps, **terms}
    records, tables = make_steps(given, channels), make_tables(given, channels)
    last = records[-1] if records else None
    SplitRun(
        model=name, architecture="LlamaForCausalLM", blocks=6, parameters=134_515_008, trainable=2_442_240,
        hidden_size=channels, link=link, terms=given, status=status, machine={"cpu": "a processor", "cores": 2},
        versions={"torch": "2.11.0", "peft": "0.18.0"}, sent=last.sent if last else 0,
        received=last.received if last else 0,
    ).write(folder / RUN)  # fmt: skip
    write_lines(folder / STEPS, records)
    for table in tables:
        append_line(folder / WIDTHS, table)
    if evaluated:
        quality = 15.0 + 4.0 / mean_bits(given, steps)
        rows = (
            ("base", 18.25, None),
            ("tuned", 15.0, None),
            ("tuned, quantized cut", quality, mean_bits(given, steps)),
        )
        found = tuple(EvaluationRow(name=n, perplexity=p, loss=math.log(p), bits=b) for n, p, b in rows)
        SplitEvaluation(text="docstrings", tokens=8192, rows=found).write(folder / EVALUATION)
    return folder


def mean_bits(terms: dict[str, Any], step: int) -> float:
    """32 without a policy, its target with a fixed one, else from 6 to the target."""
    if terms["policy"] == "none":
        return 32.0
    if terms["policy"] == "fixed":
        return float(terms["target_bits"])
    done = min(1.0, step / max(1.0, 0.6 * terms["steps"]))
    return terms["target_bits"] + (6.0 - terms["target_bits"]) * (1 + math.cos(math.pi * done)) / 2


def make_steps(terms: dict[str, Any], channels: int) -> list[StepRecord]:
    noise, sent, received, found = random.Random(terms["seed"]), 400, 300, []
    cuts = 2 if terms["labels"] == "client" else 1
    values = terms["batch"] * terms["window_length"] * channels * cuts
    for step in range(terms["steps"]):
        bits = mean_bits(terms, step)
        coded = bits - (1 if terms["coder"] == "range" else 0)
        forward, backward = (round(values * part / 8) + 64 for part in (coded, coded + 0.25))
        sent, received = sent + forward + 80, received + backward + 80
        client = PartySeconds(compute=0.5 + 0.02 * noise.random(), encode=0.01, wait=0.9 + 0.1 * noise.random())
        server = PartySeconds(compute=0.9 + 0.03 * noise.random(), encode=0.015, wait=0.5)
        found.append(
            StepRecord(
                step=step, loss=2.2 + 0.9 * math.exp(-3 * step / terms["steps"]) + 0.1 * noise.gauss(0, 1) + 0.3 / bits,
                forward_bits=bits, backward_bits=bits + 0.25 if bits < 8 else bits, forward_bytes=forward,
                backward_bytes=backward, sent=sent, received=received, seconds=client.compute + client.wait + 0.01,
                client=client, server=server,
            )
        )  # fmt: skip
    return found


def make_tables(terms: dict[str, Any], channels: int) -> list[WidthsRecord]:
    """Widths around the step's mean, of other channels in the second half of the steps; none without a policy."""
    if terms["policy"] == "none":
        return []
    streams = ["forward", "backward"] + (["forward.1", "backward.1"] if terms["labels"] == "client" else [])
    fixed = terms["policy"] == "fixed"
    around, found = (0,) if fixed else (-1, 0, 0, 1), []
    for step in [0] if fixed else range(0, terms["steps"], REFRESH):
        for stream in streams:
            drawn = random.Random(f"{terms['seed']} {stream} {2 * step < terms['steps']}").choices(around, k=channels)
            widths = tuple(_clamp(mean_bits(terms, step) + part) for part in drawn)
            found.append(WidthsRecord(step=step, stream=stream, widths=widths))
    return found


def _clamp(bits: float) -> int:
    return max(1, min(8, round(bits)))
