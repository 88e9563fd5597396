"""Clocks, power and temperature of the GPU once a second while the other parts run: tells a slow row from a slow clock.

    python benchmarks/gpu/clocks.py DIR          appends to DIR/clocks.jsonl until it is terminated

A line is {"at": seconds since 1970, and what nvidia-smi says}; rows of suite.json have `at` too. `plot.py` moves the
lines into the section "clocks" of suite.json. Where there is no nvidia-smi, one line says so.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

QUANTITIES = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
    "utilization.gpu": "busy_percent",
    "clocks_throttle_reasons.active": "throttled_by",
}
"""nvidia-smi's names → ours. What this GPU or driver does not tell is null."""
FILE = "clocks.jsonl"


def number(text: str) -> float | str | None:
    """As nvidia-smi prints it: a number, a bit mask as it is, or null for its [N/A]."""
    text = text.strip()
    if text.startswith("0x"):
        return text
    try:
        return float(text)
    except ValueError:
        return None


def watch(out) -> None:
    """A line a second, for as long as nvidia-smi goes on."""

    def write(line: dict) -> None:
        print(json.dumps({"at": round(time.time(), 2), **line}), file=out, flush=True)

    query = f"--query-gpu={','.join(QUANTITIES)}"
    command = ["nvidia-smi", "-i", "0", query, "--format=csv,noheader,nounits", "-lms", "1000"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        write({"left_out": f"nvidia-smi cannot be run: {error}"})
        return
    try:
        for line in process.stdout:
            fields = line.split(",")
            if len(fields) == len(QUANTITIES):
                write(dict(zip(QUANTITIES.values(), map(number, fields), strict=True)))
            elif line.strip():
                write({"left_out": f"nvidia-smi said: {line.strip()[:300]}"})
    finally:
        process.kill()
        process.wait()


def collect(folder: Path) -> dict:
    """DIR/clocks.jsonl as the section of suite.json: {"columns": names, "rows": […]} or {"left_out": why}; removes it.

    The last line may be cut short where the watch was killed.
    """
    path = folder / FILE
    if not path.exists():
        return {"left_out": "nothing watched the clocks"}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    path.unlink()
    columns = ["at", *QUANTITIES.values()]
    rows = [[line[name] for name in columns] for line in lines if "left_out" not in line]
    reasons = sorted({line["left_out"] for line in lines if "left_out" in line})
    return {"columns": columns, "rows": rows} | ({"left_out": "; ".join(reasons)} if reasons else {})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # through `finally`: nvidia-smi must not stay
    with (Path(sys.argv[1]) / FILE).open("a") as file:
        watch(file)
