"""The whole measurement: start-up, then every case with repetitions that alternate between engines, then perplexity."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from amq.bench.cases import Case
from amq.bench.contender import Contender, PeerMissing
from amq.bench.machine import BUSY, Reading, buffer_bytes, describe, last_level_cache
from amq.bench.own import OwnEngine
from amq.bench.peers.gguf import EQUAL
from amq.bench.peers.strongest import open_peer
from amq.bench.result import (
    OURS,
    BenchResult,
    EngineFacts,
    MachineEntry,
    ReadBandwidth,
    Row,
    SettingsEntry,
    TextEntry,
    ratios,
    scaling,
)
from amq.bench.settings import BenchSettings
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.util.limits import fit_threads
from amq.util.progress import Progress, Step
from amq.util.records import parse_record

STARTUP_PROMPT = "The capital of France is"
STARTUP_REPETITIONS = 3
COUNTED = (
    "a prompt is timed until the logits after its last token are there; a decoded token of amq includes choosing the "
    "likeliest; tokens/s of several sequences are their sum"
)


def bench(
    settings: BenchSettings,
    progress: Progress | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> BenchResult:
    """Measures and returns what --json writes.

    provenance: what made the result, for the result.
    Raises AmqError for a model that cannot be loaded or has no room for a case; a peer's failure is part of the result.
    """
    progress = progress or Progress()
    settings = replace(settings, threads=settings.threads or fit_threads())
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        startup = start_up(settings, progress) if settings.startup else []
        ours = ChildProcess(OwnEngine, settings.model, settings.seed, settings.load_options())
        stack.callback(ours.close)
        engines = [Contender(OURS, ours.call("facts"), {False: ours, True: ours}, {False: "", True: ""})]
        if startup:
            engines[0].facts["startup_seconds"] = startup
        for name in settings.peer_names:
            try:
                engines.append(open_peer(name, settings, progress, engines[0].facts["weight_bytes"]))
                for worker in engines[-1].workers.values():
                    stack.callback(worker.close)
            except PeerMissing as reason:
                left_out[name] = str(reason)
        trials = [trial for engine in engines for trial in engine.trials]
        counted = "; ".join([COUNTED, *(engine.counted for engine in engines if engine.counted)])
        readings = _readings(settings, engines[0].facts["weight_bytes"])
        rows = _rows(settings, engines, readings, left_out, progress)
        for engine in engines:
            _after(engine)
        text = _perplexities(settings, engines, left_out, progress) if settings.perplexity else None
    facts = {engine.name: parse_record(engine.facts, EngineFacts, f"what {engine.name} says") for engine in engines}
    return BenchResult(
        model=settings.model, settings=_asked(settings), counted=counted,
        machine=parse_record(describe(settings.device), MachineEntry, "what this machine says"),
        read_bandwidth={reading.name: ReadBandwidth.of(reading) for reading in readings},
        engines=facts, rows=tuple(rows), ratios={name: ratios(rows, facts, name) for name in facts if name != OURS},
        scaling=scaling(rows), perplexity=text, trials=tuple(trials), left_out=left_out,
        warnings=(*_unequal(facts), *_warnings(rows, readings, settings)),
        provenance=dict(provenance) if provenance else None,
    )  # fmt: skip


def _asked(settings: BenchSettings) -> SettingsEntry:
    names = ("repetitions", "threads", "seed", "device", "backend", "activations", "dtype")
    return SettingsEntry(**{n: getattr(settings, n) for n in names}, tests=tuple(case.name for case in settings.cases))


def start_up(settings: BenchSettings, progress: Progress) -> list[float]:
    """Seconds from starting `python -m amq.generate` until its first text came, a few times."""
    command = [
        sys.executable,
        "-m",
        "amq.generate",
        settings.model,
        "--prompt",
        STARTUP_PROMPT,
        "--max-new-tokens",
        "1",
    ]
    command += ["--device", settings.device, "--dtype", settings.dtype, "--threads", str(settings.threads)]
    command += ["--backend", settings.backend] if settings.backend else []
    command += ["--activations", settings.activations] if settings.activations else []
    seconds = []
    count = min(STARTUP_REPETITIONS, settings.repetitions)
    with progress.stage("start-up", count) as step:
        for _ in range(count):
            with tempfile.TemporaryFile("w+") as errors:
                start = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
                assert process.stdout is not None  # it is a pipe
                process.stdout.read(1)
                seconds.append(time.perf_counter() - start)
                process.communicate()
                if process.returncode:
                    errors.seek(0)
                    lines = errors.read().strip().splitlines() or ["no message"]
                    raise AmqError(
                        f"python -m amq.generate {settings.model} failed: {lines[-1].removeprefix('error: ')}"
                    )
            step()
    return seconds


def _readings(settings: BenchSettings, weight_bytes: int) -> list[Reading]:
    import torch

    torch.set_num_threads(settings.thread_count)
    large = buffer_bytes() if settings.device == "cpu" else 1 << 30
    return [
        Reading("memory", max(large, weight_bytes), settings.device),
        Reading("model", weight_bytes, settings.device),
    ]


def _rows(
    settings: BenchSettings,
    engines: list[Contender],
    readings: list[Reading],
    left_out: dict[str, str],
    progress: Progress,
) -> list[Row]:
    """One row per case and engine; an engine that fails (not ours) is dropped from `engines`, with the reason."""
    measured: list[tuple[Case, Contender, list[dict[str, Any]]]] = []
    with progress.stage("measuring", len(settings.cases) * (settings.repetitions + 1)) as step:
        for case in settings.cases:
            for reading in readings:
                reading.sample()
            samples = _alternate(case, settings.repetitions, engines, left_out, step)
            measured += [(case, engine, samples[engine.name]) for engine in engines]
    for reading in readings:
        reading.sample()
    return [_row(settings, case, engine, samples, readings) for case, engine, samples in measured]


def _alternate(
    case: Case, repetitions: int, engines: list[Contender], left_out: dict[str, str], step: Step
) -> dict[str, list[dict[str, Any]]]:
    """Figures of every repetition but the first, which warms up; who goes first alternates."""
    samples: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
    for repetition in range(repetitions + 1):
        for engine in engines[:: 1 if repetition % 2 else -1]:
            try:
                figures = engine.workers[case.decode].call("measure", case, repetition)
            except (AmqError, ChildFailed) as error:
                _drop(engine, engines, left_out, f"{case.name}: {error}", error)
                continue
            if repetition:
                samples[engine.name].append(figures)
        step(case.name)
    return samples


def _drop(engine: Contender, engines: list[Contender], left_out: dict[str, str], reason: str, error: Exception) -> None:
    if engine.name == OURS:
        raise error
    engines.remove(engine)
    left_out[engine.name] = reason


def _row(
    settings: BenchSettings, case: Case, engine: Contender, samples: list[dict[str, Any]], readings: list[Reading]
) -> Row:
    speeds = [case.tokens * case.sequences / sample["seconds"] for sample in samples]
    others = [sample["others"] for sample in samples if sample["others"] is not None]
    first = [sample["first_token_seconds"] for sample in samples if "first_token_seconds" in sample]
    weight_bytes = engine.facts["weight_bytes"]
    read = weight_bytes * statistics.median(speeds) / case.sequences if case.decode else None
    shares = {r.name: None if read is None else read / statistics.median(r.samples) for r in readings}
    return Row(
        engine=engine.name, test=case.name, kind="decode" if case.decode else "prompt", tokens=case.tokens,
        sequences=case.sequences, depth=case.depth, threads=settings.thread_count,
        configuration=engine.configurations[case.decode], file_bytes=engine.facts["file_bytes"],
        weight_bytes_per_token=weight_bytes / case.sequences if case.decode else None,
        tokens_per_second=statistics.median(speeds), lowest=min(speeds), highest=max(speeds), samples=tuple(speeds),
        first_token_seconds=statistics.median(first) if first else None, weights_bytes_per_second=read,
        share_of_memory_bandwidth=shares["memory"], share_of_model_size_bandwidth=shares["model"],
        others=statistics.median(others) if others else None,
    )  # fmt: skip


def _after(engine: Contender) -> None:
    """Memory once all cases have run; of several processes, the one that decodes."""
    engine.facts |= engine.workers[True].call("memory")


def _perplexities(
    settings: BenchSettings, engines: list[Contender], left_out: dict[str, str], progress: Progress
) -> TextEntry:
    """Adds `perplexity` to the engines' facts: the same token ids in the same windows for each."""
    arguments = (settings.perplexity, settings.window_length, settings.max_tokens)
    windows, prefix = engines[0].workers[True].call("windows", *arguments)
    predicted = len(windows) * (settings.window_length - 1 - len(prefix))
    with progress.stage("perplexity", len(engines)) as step:
        for engine in list(engines):
            try:
                if engine.facts["vocab_size"] != engines[0].facts["vocab_size"]:
                    sizes = f"{engine.facts['vocab_size']} tokens, the model's {engines[0].facts['vocab_size']}"
                    raise AmqError(f"its vocabulary has {sizes}: not the same model")
                total = engine.workers[True].call("log_likelihood", windows, len(prefix))
                engine.facts["perplexity"] = math.exp(min(700.0, -total / predicted))
            except (AmqError, ChildFailed) as error:
                if engine.name == OURS:
                    raise
                left_out[engine.name] = f"perplexity: {error}"
            step(engine.name)
    return TextEntry(
        text=settings.perplexity, windows=len(windows), window_length=settings.window_length,
        window_prefix=tuple(prefix),
    )  # fmt: skip


def _unequal(facts: Mapping[str, EngineFacts]) -> list[str]:
    return [
        f"not at equal bytes: a token of {name} reads {share:.0%} of the bytes that ours does"
        for name, share in ((name, theirs.weight_bytes / facts[OURS].weight_bytes) for name, theirs in facts.items())
        if abs(share - 1) > EQUAL
    ]


def _warnings(rows: list[Row], readings: list[Reading], settings: BenchSettings) -> list[str]:
    found = []
    busy = [f"{row.engine} {row.test}" for row in rows if (row.others or 0) > BUSY]
    if busy:
        found.append(f"other processes had over {BUSY:.0%} of the cores' time, not figures to quote: {', '.join(busy)}")
    cache = last_level_cache()
    if settings.device == "cpu" and cache and readings[0].size < 2 * cache:
        found.append(
            f"the buffer that memory was read in has {readings[0].size / 2**20:.0f} MiB, too little for a last-level "
            f"cache of {cache / 2**20:.0f} MiB"
        )
    return found
