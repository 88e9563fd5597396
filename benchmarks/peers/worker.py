"""One peer in a process of its own, and the side that starts it.

    python -m peers.worker '{"peer": "ggml-q4_K", "out_features": 4096, "in_features": 4096,
                             "tokens": 1, "count": 110, "threads": 2}'          # from the folder benchmarks/

Why a process: OpenMP runtimes and thread pools of different libraries in one process slow each other down, some read
their thread count only when they are loaded, and memory comes back for certain when a process ends. The worker builds,
checks its first product against the dequantized weight, measures, prints one line of JSON; its parent sleeps meanwhile.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from . import PEERS
from .base import Product

TOLERANCE = 0.02
"""Relative error of the checked product: rounding x to 8 bits gives 0.007, a misunderstood layout gives over 0.5."""
WARM_UP, ROUNDS, SECONDS, FEWEST = 2, 12, 6.0, 10
"""Rounds before and while measuring; not beyond SECONDS once FEWEST are done."""
TIMEOUT = 180.0
"""Seconds in which a worker must have built, checked and measured."""


class PeerError(RuntimeError):
    """A peer that is installed and yet did not deliver a correct product."""


def measure(peer: str, problem: Product) -> dict:
    """Builds and times one peer: `seconds` (median), `fastest` and `bytes` per matrix, `rounds`, `error`, `detail`."""
    threads = str(problem.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", "peers.worker", json.dumps({"peer": peer, **asdict(problem)})]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        try:
            output, _ = process.communicate()
        finally:
            timer.cancel()
            process.kill()
        if process.returncode != 0:
            errors.seek(0)
            raise PeerError(f"{peer}, {problem}: exit code {process.returncode}\n{errors.read()[-2000:]}")
    return json.loads(output.splitlines()[-1])


def work(peer: str, problem: Product) -> dict:
    """What the worker process does; see `measure`."""
    x = problem.random().standard_normal((problem.tokens, problem.in_features), dtype=np.float32)
    runner = PEERS[peer].build(problem, x)
    runner.run()
    expected = x @ runner.reference.T
    error = float(np.linalg.norm(runner.first() - expected) / np.linalg.norm(expected))
    if not error <= TOLERANCE:
        raise PeerError(f"{peer}: its product is off by {error:.3g} of its norm, allowed are {TOLERANCE}")
    rounds, start = [], time.perf_counter()
    while len(rounds) < WARM_UP + ROUNDS:
        if len(rounds) >= WARM_UP + FEWEST and time.perf_counter() - start > SECONDS:
            break
        before = time.perf_counter()
        runner.run()
        rounds.append(time.perf_counter() - before)
    return {
        "seconds": statistics.median(rounds[WARM_UP:]) / problem.count,
        "fastest": min(rounds[WARM_UP:]) / problem.count,
        "bytes": getattr(runner, "matrix_bytes", PEERS[peer].matrix_bytes(problem.out_features, problem.in_features)),
        "rounds": len(rounds) - WARM_UP,
        "error": error,
        "detail": runner.detail,
    }


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    print(json.dumps(work(fields.pop("peer"), Product(**fields))))
