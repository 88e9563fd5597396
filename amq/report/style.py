"""Colours and tick positions that both renderers share.

Formats go from light (few bits) to dark (many) along ColorBrewer's YlGnBu, whose steps differ in lightness and so stay
apart for colour-blind readers and in print. Everything else uses the Okabe-Ito set.
"""

from __future__ import annotations

import math

RAMP = ("#fbf3b0", "#c1e3b0", "#7cccba", "#3fa9c5", "#2b70b0", "#23307f")
INK, MUTED, FAINT, GRID = "#1c2430", "#5d6b7a", "#b4bcc5", "#e6eaee"
FRONT, CHOSEN, UNIFORM, CURVE, BAR = "#0a4c86", "#d55e00", "#1c2430", "#8a97a5", "#5b9bc8"
PHASES = {
    "initial": "#b4bcc5",
    "iteration": "#7fb8e0",
    "sensitivity": "#c9b458",
    "front": "#56b4e9",
    "budget": "#009e73",
    "refine": "#cc79a7",
}
OTHER_PHASE = "#999999"
SERIES = ("#0a4c86", "#d55e00", "#009e73", "#cc79a7")
PARTS = ("#0a4c86", "#56b4e9", "#009e73", "#e0c060", "#cc79a7", "#d55e00", "#8a97a5", "#b4bcc5")


def format_colors(count: int) -> list[str]:
    """`count` colours from light to dark; more formats than the ramp has steps repeat the darkest."""
    if count <= 1:
        return [RAMP[3]] * count
    if count > len(RAMP):
        return [*RAMP, *[RAMP[-1]] * (count - len(RAMP))]
    last = len(RAMP) - 1
    return [RAMP[round(i * last / (count - 1))] for i in range(count)]


def text_on(color: str) -> str:
    """Black or white, whichever reads better on `color` ("#rrggbb")."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"


def pick_ticks(count: int, most: int) -> list[int]:
    """At most `most` of the positions 0 … count-1, evenly spaced by a round step."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, max(1, count)) if count <= s * most or s >= count)
    return list(range(0, count, step))


def log_ticks(low: float, high: float) -> list[float]:
    """At least three ticks within [low, high] where a round step gives them: decades, then 1-2-5, then finer."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks: list[float] = []
    for steps in ((1,), (1, 2, 5), range(1, 10), [i / 5 for i in range(5, 50)]):
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= (4 if len(steps) == 1 else 3):
            break
    return ticks
