"""`python -m amq.quantize MODEL --configuration configuration.json --output DIR`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amq.quantize.settings import QuantizeCommand, QuantizeSettings
from amq.util.settings import parse_command, run_command

if TYPE_CHECKING:
    from amq.quantize.run import QuantizeResult


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    given = parse_command(argv, QuantizeSettings, QuantizeCommand)
    from amq.quantize import quantize
    from amq.util.progress import terminal_progress

    print(summary(quantize(**given, progress=terminal_progress())))
    return 0


def summary(result: QuantizeResult) -> str:
    """What was made, in a few lines."""
    log = result.log
    outer = ([log.head] if log.head else []) + list(log.embeddings)
    head = "".join(f"{found.name} {found.format}, " for found in outer)
    peak = "" if log.peak_memory_bytes is None else f", peak memory {log.peak_memory_bytes / 2**30:.2f} GiB"
    lines = [
        f"{len(log.linears)} linears at {log.bits_per_weight:.4f} bits per weight, {head}"
        f"{log.memory.total / 2**20:.1f} MiB with everything else; {log.seconds:.0f} s{peak}"
    ]
    if figures := log.perplexity:
        rows = ", ".join(f"{name} {'broken' if v is None else f'{v:.3f}'}" for name, v in figures.rows.items())
        lines.append(f"perplexity on {figures.tokens} tokens of {figures.text}: {rows}")
    if tuned := log.tuning:
        start, best = ("not finite" if loss is None else f"{loss:.4f}" for loss in (tuned.start, tuned.best))
        lines.append(
            f"tuned in {tuned.seconds:.0f} s: divergence on {tuned.held_out} held-out windows {start}, then {best} "
            f"nats per token at step {tuned.best_step} of {tuned.steps}; {tuned.end}"
        )
    lines += [f"note: {note}" for note in log.notes]
    lines.append(f"wrote {result.output}: python -m amq.generate {result.output} --prompt …")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
