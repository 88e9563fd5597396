"""The result as text for people, and as CSV: one line per test and engine."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator
from dataclasses import fields

from amq.bench.machine import BUSY
from amq.bench.result import OURS, BenchResult, Row

MIB = 2**20


def csv_text(result: BenchResult) -> str:
    """The rows; samples are joined by semicolons."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in result.rows:
        writer.writerow(vars(row) | {"samples": ";".join(f"{sample:.6g}" for sample in row.samples)})
    return file.getvalue()


def table(result: BenchResult) -> str:
    return "\n".join([*_head(result), "", *_speeds(result), "", *_facts(result), *_notes(result)])


def _head(result: BenchResult) -> Iterator[str]:
    settings, machine = result.settings, result.machine
    where = machine.gpu or f"{machine.processor}, {settings.threads} of {machine.cores} threads"
    yield f"{result.model} on {where}; {settings.repetitions} repetitions, engines in turn, medians"
    width = max(map(len, result.engines))
    for name, facts in result.engines.items():
        yield f"{name:{width}}  {facts.description} ({facts.version})"


def _speeds(result: BenchResult) -> Iterator[str]:
    rows, reading = result.rows, result.read_bandwidth
    tests, engines = max(len(row.test) for row in rows), max(len(row.engine) for row in rows)
    size = f"of {reading['model'].bytes / MIB:.0f} MiB"
    yield (
        f"{'test':{tests}}  {'engine':{engines}}  {'tokens/s':>9}  {'lowest..highest':>17}  {'GB/s':>6}  "
        f"{'of memory':>9}  {size:>11}  others" + ("  amq is" if result.ratios else "")
    )
    for row in rows:
        spread = f"{row.lowest:.1f}..{row.highest:.1f}"
        read = row.weights_bytes_per_second
        rate = "" if read is None else f"{read / 1e9:.1f}"
        shares = [row.share_of_memory_bandwidth, row.share_of_model_size_bandwidth]
        memory, model = ("" if share is None else f"{share:.0%}" for share in shares)
        others = "" if row.others is None else f"{row.others:.0%}{'!' if row.others > BUSY else ' '}"
        factor = result.ratios.get(row.engine, {}).get(row.test)
        ratio = "" if factor is None else f"  {factor:.2f}x"
        line = f"{row.test:{tests}}  {row.engine:{engines}}  {row.tokens_per_second:9.1f}  {spread:>17}  "
        yield (line + f"{rate:>6}  {memory:>9}  {model:>11}  {others:>6}{ratio}").rstrip()


def _facts(result: BenchResult) -> Iterator[str]:
    width = max(map(len, result.engines))
    for name, facts in result.engines.items():
        parts = []
        if facts.startup_seconds:
            parts.append(f"process start to first token {statistics.median(facts.startup_seconds):.2f} s")
        parts += [
            f"first token of {row.test} after {row.first_token_seconds:.2f} s"
            for row in result.rows
            if row.engine == name and row.first_token_seconds is not None
        ]
        parts.append(f"weights per token {facts.weight_bytes / 1e6:.1f} MB")
        parts += [f"file {facts.file_bytes / 1e6:.1f} MB"] if facts.file_bytes else []
        peak, now = facts.peak_memory_bytes / MIB, facts.resident_memory_bytes / MIB
        parts.append(f"memory {now:.0f} MiB, at most {peak:.0f} MiB")
        parts += [f"GPU memory {facts.gpu_memory_bytes / MIB:.0f} MiB"] if facts.gpu_memory_bytes is not None else []
        parts += [f"perplexity {facts.perplexity:.3f}"] if facts.perplexity is not None else []
        parts += [f"{test} is {factor:.2f}x one" for test, factor in result.scaling.get(name, {}).items()]
        yield f"{name:{width}}  {'; '.join(parts)}"


def _ways(result: BenchResult, name: str) -> Iterator[str]:
    """How a peer ran, and how not."""
    ours, theirs = result.engines[OURS], result.engines[name]
    ways = dict.fromkeys((row.kind, row.configuration) for row in result.rows if row.engine == name)
    chosen = "; ".join(f"{kind}: {configuration}" for kind, configuration in ways)
    trials = [trial for trial in result.trials if trial["engine"] == name]
    yield f"{name} ran {theirs.file}, the fastest way of {len(trials)} tried: {chosen}"
    yield (
        f"a token of {name} reads {theirs.weight_bytes / 1e6:.1f} MB of weights, one of amq "
        f"{ours.weight_bytes / 1e6:.1f} MB: {theirs.weight_bytes / ours.weight_bytes:.2f} times as many"
    )
    if failed := [f"{t['file']}, {t['configuration']} ({t['failed']})" for t in trials if "failed" in t]:
        yield f"{name} failed with {'; '.join(failed)}; a build of it that does not may be faster"


def _notes(result: BenchResult) -> Iterator[str]:
    reading = result.read_bandwidth
    memory, model = reading["memory"], reading["model"]
    yield (
        f"reading {memory.bytes / MIB:.0f} MiB: {memory.bytes_per_second / 1e9:.1f} GB/s (of memory); "
        f"{model.bytes / MIB:.0f} MiB, as the weights: {model.bytes_per_second / 1e9:.1f} GB/s"
    )
    for name in result.ratios:
        yield from _ways(result, name)
    if text := result.perplexity:
        begin = f" that begin with {' '.join(text.window_prefix)}" if text.window_prefix else ""
        yield (
            f"perplexity on {text.text}, {text.windows} windows of {text.window_length} tokens{begin}, the "
            "same token ids for each; amq one token at a time"
        )
    for name, reason in result.left_out.items():
        yield f"{name} left out: {reason}"
    if environment := result.machine.environment:
        yield "set: " + " ".join(f"{name}={value}" for name, value in environment.items())
    yield result.counted
    for warning in result.warnings:
        yield f"! {warning}"
