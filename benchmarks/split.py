"""Policies of split fine-tuning beside each other: `python benchmarks/split.py DIR`.

Each run is two processes on this machine, the client and the server of `amq split`, with one thread each; `--jobs`
such pairs at a time. After it the adapter is loaded by peft, and the perplexity on windows that no run trained on is
measured with the cut as it is and quantized; aq-sgd sends float16 then, for it has not seen these windows. Losses do
not depend on how busy the machine is; seconds do, and mean something only with one job on a machine that does nothing
else. A run that DIR has already is not made again.

A policy is written NAME[:BITS][+range]: `fixed:3`, `waterfill:6-3+range` (from 6 to 3 bits), and `waterfill:=amaq:4-3`
for the mean bits that the run `amaq:4-3` of the same seed had: what is compared at equal bits has equal bits.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from provenance import write_results
from serving import free_port

from amq.errors import AmqError
from amq.split.records import (
    ADAPTER,
    EVALUATION,
    QUANTIZED,
    RUN,
    STEPS,
    TUNED,
    SplitEvaluation,
    SplitRun,
    StepRecord,
    read_lines,
)  # fmt: skip
from amq.util.settings import run_command

SCHEMA = "amq/split/1"
POLICIES = "none,fixed:3,waterfill:3+range,step:1+range,aq-sgd:4,amaq:4-3,fixed:=amaq:4-3,waterfill:=amaq:4-3"
HELD_OUT = 2048
"""Tokens."""
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#6B6B6B")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LAST = 10
"""Steps whose mean loss is a run's last."""
ASKED = "asked.txt"
"""In a run's folder: what it was made with; runs of before 2026-11-30 have none."""


@dataclass(frozen=True)
class Policy:
    """As it was written; like: of another run, whose mean bits this one has from first to last."""

    text: str
    name: str
    start: float | None
    target: float | None
    coder: str
    like: str | None = None

    @classmethod
    def parse(cls, text: str) -> Policy:
        match = re.fullmatch(r"([a-z-]+)(?::(?:([\d.]+)(?:-([\d.]+))?|=(.+?)))?(\+range)?", text)
        if not match:
            raise AmqError(f"policy {text!r} is not NAME[:BITS][+range], such as fixed:3 or waterfill:6-3+range")
        name, first, second, like, coder = match.groups()
        start = None if first is None else float(first)
        return cls(text, name, start, float(second) if second else start, "range" if coder else "none", like)

    def flags(self, mean: float | None) -> list[str]:
        bits = (mean, mean) if self.like else (self.start, self.target)
        flags = ["--policy", self.name, "--coder", self.coder]
        for flag, value in zip(("--start-bits", "--target-bits"), bits, strict=True):
            flags += [] if value is None else [flag, f"{value:.6f}"]
        return flags


@dataclass(frozen=True)
class Row:
    """One run. forward_bits, backward_bits: means over its steps; bits: of frames per value, both ways, all included.

    last_loss: mean of the last steps' training losses. perplexity, quantized: held out, the cut as it is or quantized.
    seconds: median of a step, on a machine that did other things.
    """

    policy: str
    seed: int
    forward_bits: float
    backward_bits: float
    bits: float
    mib: float
    last_loss: float
    loss: float
    perplexity: float
    quantized: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="for the runs")
    add("--model", default="smollm2")
    add("--cut", type=int, default=10, metavar="N")
    add("--policies", default=POLICIES, metavar="LIST", help="default: %(default)s")
    add("--seeds", default="0,1,2", metavar="LIST")
    add("--steps", type=int, default=100, metavar="N")
    add(
        "--train-args", default="--samples 100 --batch 2 --micro-batches 1", metavar="ARGS", help="default: %(default)s"
    )
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, of two threads each (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write every run")
    add("--picture", type=Path, metavar="FILE", help="draw held-out perplexity against bits sent")
    add("--smoke", action="store_true", help="a tiny random model and few steps")
    args = parser.parse_args(argv)
    if args.smoke:
        args.model, args.cut, args.steps, args.seeds = str(tiny_model(args.folder / "model")), 1, 3, "0"
        args.train_args = "--samples 4 --batch 2 --micro-batches 2 --window-length 32"
    policies = [Policy.parse(text) for text in args.policies.split(",")]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rows = all_rows(args, policies, seeds)
    print(table(rows, [policy.text for policy in policies]))
    if args.picture:
        draw(rows, args.picture)
    if args.json:
        settings = {name: getattr(args, name) for name in ("model", "cut", "steps", "train_args")}
        settings["model"] = Path(args.model).name
        steps = {f"{row.policy} {row.seed}": curve(folder_of(args.folder, row.policy, row.seed)) for row in rows}
        write_results(args.json, {"schema": SCHEMA, **settings, "rows": [asdict(r) for r in rows], "curves": steps})
    return 0


def all_rows(args: argparse.Namespace, policies: Sequence[Policy], seeds: Sequence[int]) -> list[Row]:
    """First the runs that stand alone, then those that take another's bits."""
    made: dict[tuple[str, int], Row] = {}
    alone = [policy.text for policy in policies if policy.like is None]
    for policy in policies:
        if policy.like is not None and policy.like not in alone:
            raise AmqError(f"policy {policy.text!r} takes the bits of {policy.like!r}: expected one of {alone}; add it")

    def run(job: tuple[Policy, int]) -> None:
        policy, seed = job
        like = None if policy.like is None else made[policy.like, seed]
        mean = None if like is None else (like.forward_bits + like.backward_bits) / 2
        made[policy.text, seed] = one_run(args, policy, seed, mean)
        print(made[policy.text, seed], file=sys.stderr, flush=True)

    for wave in ([p for p in policies if p.like is None], [p for p in policies if p.like is not None]):
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run, [(policy, seed) for seed in seeds for policy in wave]))
    return [made[policy.text, seed] for policy in policies for seed in seeds]


def folder_of(folder: Path, policy: str, seed: int) -> Path:
    return folder / f"{re.sub('[^a-z0-9.+-]', '_', policy)}-{seed}"


def one_run(args: argparse.Namespace, policy: Policy, seed: int, mean: float | None) -> Row:
    """Made and measured, or found from an earlier call."""
    folder = folder_of(args.folder, policy.text, seed)
    asked = [
        *(args.model, "--cut", str(args.cut), "--steps", str(args.steps), "--seed", str(seed), "--save-every", "50"),
        *(*args.train_args.split(), *policy.flags(mean)),
    ]
    if not (folder / "run" / ADAPTER).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        train(args, asked, folder)
    elif (folder / ASKED).exists() and (before := (folder / ASKED).read_text()) != " ".join(asked):
        raise AmqError(f"{folder} has a run of {before}, expected {' '.join(asked)}: give another DIR")
    if not (folder / "run" / EVALUATION).exists():
        in_process("measure", folder)
    return row_of(folder, policy.text, seed)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def train(args: argparse.Namespace, asked: Sequence[str], folder: Path) -> None:
    """Both processes, to the end of the run. asked: of the client."""
    port = free_port()
    both = [sys.executable, "-m", "amq.split"]
    server = [*both, "serve", args.model, "--cut", str(args.cut), "--port", str(port)]
    server += ["--output", str(folder / "server")]
    client = [*both, "train", *asked, "--server", f"127.0.0.1:{port}", "--output", str(folder / "run")]
    folder.mkdir(parents=True)
    (folder / ASKED).write_text(" ".join(asked))
    with (
        open(folder / "server.log", "wb") as server_log, open(folder / "client.log", "wb") as client_log,
        subprocess.Popen(server, env=environment(), stderr=server_log) as serving,
    ):  # fmt: skip
        try:
            wait_for(port, serving)
            status = subprocess.run(client, env=environment(), stdout=client_log, stderr=client_log).returncode
            if status:
                raise AmqError(f"{' '.join(client)} failed: {(folder / 'client.log').read_text()[-2000:]}")
            serving.wait(60)
        finally:
            serving.kill()


def wait_for(port: int, serving: subprocess.Popen[bytes]) -> None:
    while serving.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AmqError(f"the server ended with {serving.returncode} before it listened: see server.log in the run's folder")


def in_process(function: str, folder: Path) -> None:
    """Calls one of this file's functions in a process of its own, whose memory goes with it."""
    code = f"import split; from pathlib import Path; split.{function}(Path({str(folder)!r}))"
    command = [sys.executable, "-c", code]
    here = {**environment(), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run(command, env=here, capture_output=True, text=True)
    if result.returncode:
        raise AmqError(f"measuring {folder} failed: {result.stderr[-2000:]}")


def measure(folder: Path) -> None:
    """Held-out losses of a run, the cut as it is and quantized."""
    from amq.split.evaluate import evaluate_run

    evaluate_run(folder / "run", max_tokens=HELD_OUT, base=False).write(folder / "run" / EVALUATION)


def row_of(folder: Path, policy: str, seed: int) -> Row:
    losses = {row.name: row.loss for row in SplitEvaluation.read(folder / "run" / EVALUATION).rows}
    tuned, quantized = losses[TUNED], losses[QUANTIZED]
    run = SplitRun.read(folder / "run" / RUN)
    steps = read_lines(folder / "run" / STEPS, StepRecord)
    cuts = 2 if run.terms["labels"] == "client" else 1
    values = 2 * cuts * run.hidden_size * run.terms["window_length"] * run.terms["batch"] * len(steps)
    mean: Callable[[Any], float] = statistics.fmean
    return Row(
        policy, seed, mean(s.forward_bits for s in steps), mean(s.backward_bits for s in steps),
        8 * sum(s.forward_bytes + s.backward_bytes for s in steps) / values, (run.sent + run.received) / 2**20,
        mean(s.loss for s in steps[-LAST:]), tuned, math.exp(tuned), math.exp(quantized),
        statistics.median(s.seconds for s in steps),
    )  # fmt: skip


def curve(folder: Path) -> list[list[float]]:
    """[MiB on the socket so far, loss] of every step."""
    steps = read_lines(folder / "run" / STEPS, StepRecord)
    return [[round((s.sent + s.received) / 2**20, 3), round(s.loss, 5)] for s in steps]


def table(rows: Sequence[Row], policies: Sequence[str]) -> str:
    """Markdown: one line per policy, means over the seeds."""
    lines = [
        "| policy | width, mean | bits per value sent | MiB | held-out loss | perplexity | with the cut quantized |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in policies:
        own = [row for row in rows if row.policy == name]

        def mean(field: str, own: Sequence[Row] = own) -> float:
            return statistics.fmean(getattr(row, field) for row in own)

        spread = statistics.stdev(row.loss for row in own) if len(own) > 1 else 0.0
        lines.append(
            f"| {name} | {(mean('forward_bits') + mean('backward_bits')) / 2:.2f} | {mean('bits'):.2f} | "
            f"{mean('mib'):.1f} | {mean('loss'):.4f} ± {spread:.4f} | {mean('perplexity'):.2f} | "
            f"{mean('quantized'):.2f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """One point per policy, the mean of its seeds, and a bar over them; `none` is the line that others come up to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.2, 4.6), layout="constrained")
    plain = [row.perplexity for row in rows if row.policy == "none"]
    if plain:
        axes.axhline(statistics.fmean(plain), color="#8A8A8A", linewidth=1, linestyle="--", label="none (32 bits)")
    shown = [name for name in dict.fromkeys(row.policy for row in rows) if name != "none"]
    for name, color, marker in zip(shown, itertools.cycle(COLORS), itertools.cycle(MARKERS), strict=False):
        own = [row for row in rows if row.policy == name]
        bits = statistics.fmean(row.bits for row in own)
        for field, filled in (("quantized", True), ("perplexity", False)):
            values = [getattr(row, field) for row in own]
            middle = statistics.fmean(values)
            bar = [[middle - min(values)], [max(values) - middle]]
            axes.errorbar(
                bits, middle, yerr=bar, color=color, marker=marker, markersize=8, capsize=3, linestyle="none",
                markerfacecolor=color if filled else "white", label=name if filled else None,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("bits per value sent, both ways, all included")
    axes.set_ylabel("held-out perplexity")
    axes.set_title("Filled: the cut quantized. Hollow: the cut as it is.", loc="left", fontsize=10)
    axes.grid(color="#DFE4E9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def tiny_model(folder: Path) -> Path:
    """A random Llama of three blocks with a tokenizer of bytes."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from helpers.tiny_models import byte_tokenizer, tiny_llama

    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(run_command(main))
