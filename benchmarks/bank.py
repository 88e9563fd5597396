"""`python benchmarks/bank.py MODEL`: what a gptq bank costs, block by block, by the kernels and by the torch loop.

Both quantize the same linears from the same calibration in one run, block after block, in all formats. Beside wall
time stands the processor's, of all threads: on a machine that others use too, only its ratio says something. The torch
loop is run on `--blocks` blocks, evenly spread, up to the last of which the kernels run on all. `--total` builds a
whole bank too, as a search does: calibration, quantizing, checks, files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import write_results

from amq.formats import BitFormat, check_group_size, parse_formats
from amq.model.calibration import CalibrationStream, InputGroup
from amq.model.inventory import get_linear
from amq.model.opened import OpenModel, open_model
from amq.model.text import WindowSampler
from amq.quantize.bank import BankSettings, open_bank
from amq.quantize.methods import BANK_ROTATIONS
from amq.quantize.quantizers.gptq import quantize, quantize_in_torch
from amq.util.files import check_place
from amq.util.settings import add_flags, flag, run_command


@dataclass(frozen=True)
class BankBenchSettings:
    """Every field is a flag of the same name; `model` is the positional argument."""

    model: str
    json: str = flag("bank.json", "where the figures go", metavar="FILE")
    formats: str = flag("int2,int3,int4,int8", "formats of the bank", metavar="LIST")
    group_size: int = flag(128, "input features per scale", metavar="G")
    blocks: int = flag(3, "blocks that the torch loop is timed on", metavar="N", least=1)
    rotation: str = flag("auto", "of the whole bank that --total builds", choices=BANK_ROTATIONS)
    total: bool = flag(False, "time a whole bank too, as a search builds it")
    calibration: str = flag("pydoc", "text", metavar="TEXT")
    bank_windows: int = flag(24, "windows that the quantizer sees", metavar="N")
    window_length: int = flag(512, "tokens per window", metavar="N")
    threads: int = flag(0, "threads; 0: as torch has them", metavar="N")


@dataclass
class Seconds:
    """Of the clock on the wall, and of the processors."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a gptq bank costs.", argument_default=argparse.SUPPRESS)
    parser.add_argument("model", help="hub id, folder, .gguf file, or the alias smollm2")
    add_flags(parser, BankBenchSettings)
    settings = BankBenchSettings(**vars(parser.parse_args(argv)))
    result = bench(settings)
    print(table(result))
    print(f"wrote {settings.json}")
    return 0


def bench(settings: BankBenchSettings) -> dict[str, Any]:
    """Measures, writes `settings.json`, and returns its content."""
    check_group_size(settings.group_size)
    check_place(Path(settings.json), "--json")
    formats = parse_formats(settings.formats)
    opened = open_model(settings.model)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    sampler = WindowSampler(opened.corpus(settings.calibration), settings.window_length, 0)
    windows = sampler.take(settings.bank_windows)
    result = {
        "schema": "amq/bench-bank/1",
        "settings": asdict(settings),
        "blocks": _blocks(opened, windows, formats, settings),
        "total": _total(opened, windows, formats, settings) if settings.total else None,
    }
    write_results(Path(settings.json), result)
    return result


def _blocks(
    opened: OpenModel, windows: torch.Tensor, formats: Sequence[BitFormat], settings: BankBenchSettings
) -> list[dict[str, Any]]:
    count = opened.inventory.n_blocks
    chosen = {count * (2 * i + 1) // (2 * settings.blocks) for i in range(min(settings.blocks, count))}
    stream, rows = CalibrationStream(opened.model, windows), []
    with torch.no_grad():
        for block in range(max(chosen) + 1):
            calibration = Seconds()
            with calibration.measured():
                groups = stream.measure(opened.inventory.in_block(block), advance=True)
            row: dict[str, Any] = {"block": block, "calibration": asdict(calibration)}
            row["kernels"] = asdict(_time(opened, groups, formats, settings.group_size, quantize))
            if block in chosen:
                row["torch"] = asdict(_time(opened, groups, formats, settings.group_size, quantize_in_torch))
            rows.append(row)
    return rows


def _time(
    opened: OpenModel,
    groups: Sequence[InputGroup],
    formats: Sequence[BitFormat],
    group_size: int,
    quantizer: Callable[..., Any],
) -> Seconds:
    seconds = Seconds()
    for group in groups:
        weights = [get_linear(opened.model, spec.name).weight.detach().cpu() for spec in group.linears]
        with seconds.measured():
            quantizer(weights, formats, group_size, group.gram)
    return seconds


def _total(
    opened: OpenModel, windows: torch.Tensor, formats: Sequence[BitFormat], settings: BankBenchSettings
) -> dict[str, float]:
    seconds, fingerprint = Seconds(), opened.fingerprint
    with tempfile.TemporaryDirectory(prefix="amq-bench-") as folder, seconds.measured():
        bank = BankSettings("gptq", settings.group_size, windows, settings.rotation)
        open_bank(opened.model, opened.inventory, formats, bank, cache=Path(folder), fingerprint=fingerprint)
    return asdict(seconds)


def table(result: dict[str, Any]) -> str:
    """Seconds per block: wall (processor); ratio: of the processor's, how many times less the kernels take."""
    lines = ["| block | calibration, s | kernels, s | torch loop, s | ratio |", "|---|---|---|---|---|"]
    for row in result["blocks"]:
        old, new = row.get("torch"), row["kernels"]
        ratio = f"{old['cpu'] / max(new['cpu'], 1e-9):.1f}" if old else ""
        cells = [_cell(row["calibration"]), _cell(new), _cell(old), ratio]
        lines.append(f"| {row['block']} | " + " | ".join(cells) + " |")
    if result["total"]:
        lines.append(
            f"\nThe whole bank: {result['total']['wall']:.1f} s, {result['total']['cpu']:.1f} s of processors."
        )
    return "\n".join(lines)


def _cell(seconds: dict[str, float] | None) -> str:
    return f"{seconds['wall']:.3f} ({seconds['cpu']:.3f})" if seconds else ""


if __name__ == "__main__":
    sys.exit(run_command(main))
