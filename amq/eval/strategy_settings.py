"""StrategySettings: what strategies of bit allocation are compared by, as flags and as Python arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from amq.errors import AmqError
from amq.formats import FORMATS, KEPT
from amq.kernels.names import ACTIVATIONS, BACKENDS
from amq.model.settings import CALIBRATION_TEXTS, DISK, MODEL, LoadSettings
from amq.quantize.methods import ROTATION_HELP, ROTATIONS
from amq.quantize.quantizers import QUANTIZERS
from amq.search.settings import AUTO, NATIVE, SearchSettings
from amq.search.strategies import (
    EVALUATIONS,
    PASSES,
    RESIDENT,
    STEPS,
    STRATEGIES,
    Strategy,
    check_needs,
    parse_strategies,
)
from amq.util.settings import CHOOSE, MEASURE, REQUIRED, RUN, declared, flag, parse_size

SPEND = "what a strategy may spend"
REMEDIES = {
    PASSES: "looks at inputs or gradients on windows of its own: give --cost-passes above 0",
    STEPS: "is trained: give --steps above 0",
    EVALUATIONS: "searches by true evaluations: give --evaluations above 0",
    RESIDENT: "puts weights together in a model that is in memory whole: give --load memory",
}
"""What to do for a strategy that lacks what it needs."""
LEAST_EVALUATIONS = 20
"""Below that the search of the paper has no first points to speak of."""


@dataclass(frozen=True, kw_only=True)
class StrategySettings(LoadSettings):
    """Which strategies, at which budgets, on which windows, and how often with other seeds.

    The linears of the blocks are allocated; head and embeddings stay in 16 bits, and budgets are bits per weight of the
    linears: the systems that are compared with do so. budgets, seeds, perplexity_at: comma-separated numbers.
    """

    VERB: ClassVar[str] = "eval strategies"
    ABOUT: ClassVar[str] = "compares strategies of bit allocation on one model, bank and loss"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq eval strategies smollm2 --output runs/strategies",
        "amq eval strategies smollm2 --strategies fisher,taylor,recipe --seeds 0 --output runs/three",
    )

    model: str = flag(REQUIRED, MODEL, positional=True)
    output: str = flag(
        REQUIRED, "folder of the table; a table of the same settings in it goes on where it stopped", RUN,
        metavar="FOLDER",
    )  # fmt: skip
    strategies: str = flag("", f"of {', '.join(STRATEGIES)} (default all)", CHOOSE, metavar="LIST")
    budgets: str = flag("2.75,3,3.5,4", "bits per weight of the linears to show losses at", CHOOSE, metavar="LIST")
    formats: str = flag("int2,int3,int4", f"candidate formats, of {', '.join(FORMATS)}", CHOOSE, metavar="LIST")
    group_size: int = flag(64, "input features per scale: 32, 64 or 128", CHOOSE, metavar="G")
    seeds: str = flag("0,1,2", "of windows, labels and draws: a row of each strategy per seed", MEASURE, metavar="LIST")
    proxy: str = flag("gptq", "quantizer of the bank", MEASURE, choices=QUANTIZERS)
    rotation: str = flag(AUTO, ROTATION_HELP, MEASURE, choices=ROTATIONS)
    calibration: str = flag("pydoc", f"text: {CALIBRATION_TEXTS}", MEASURE, metavar="TEXT")
    window_length: int = flag(256, "tokens per window, BOS included", MEASURE, least=2, metavar="N")
    windows: int = flag(2, "windows of the loss; refine is held to as many others", MEASURE, least=1, metavar="N")
    bank_windows: int = flag(24, "windows that calibrate the gptq bank", MEASURE, least=1, metavar="N")
    text: str = flag(
        "docstrings", "held-out text of the perplexities: a file, wikitext2, c4, pydoc, docstrings; empty for none",
        MEASURE, metavar="TEXT",
    )  # fmt: skip
    max_tokens: int = flag(4096, "tokens of that text", MEASURE, least=1, metavar="N")
    perplexity_at: str = flag("3,3.5", "of --budgets, those whose choice has its perplexity measured", MEASURE,
                              metavar="LIST")  # fmt: skip
    cost_passes: int = flag(
        16, "windows of strategies that look at inputs or gradients, one pass each; 0 leaves them without", SPEND,
        least=0, metavar="N",
    )  # fmt: skip
    evaluations: int = flag(
        200, "true evaluations of each of random, greedy, paper and refine, over all budgets", SPEND, least=0,
        metavar="N",
    )  # fmt: skip
    steps: int = flag(60, "steps of gradient", SPEND, least=0, metavar="N")
    row_blocks: int = flag(4, "blocks that rows cuts each linear into", SPEND, least=2, metavar="N")
    backend: str = flag(AUTO, "what runs the candidates, as of amq search", choices=(AUTO, NATIVE, *BACKENDS))
    activations: str = flag(
        "fp32", "int8 rounds activations as deployed, of what a kernel can run: not of rows", choices=ACTIVATIONS
    )
    cache_memory: str | int = flag("256MiB", "as of amq search", parse=parse_size, metavar="SIZE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.evaluations < LEAST_EVALUATIONS:
            raise AmqError(f"--evaluations must be 0 or at least {LEAST_EVALUATIONS}, got {self.evaluations}")
        has = {PASSES: self.cost_passes > 0, STEPS: self.steps > 0, EVALUATIONS: self.evaluations > 0}
        check_needs(self.rows, {**has, RESIDENT: self.load != DISK}, REMEDIES)
        for at in self.shown_perplexities:
            if at not in self.shown_budgets:
                raise AmqError(f"--perplexity-at {at:g} is none of --budgets {self.budgets}")
        if not self.seed_list:
            raise AmqError("--seeds names no seed")
        self.search(self.seed_list[0])  # raises for what a search would refuse

    @property
    def rows(self) -> list[Strategy]:
        return parse_strategies(self.strategies)

    @property
    def shown_budgets(self) -> list[float]:
        return _numbers("--budgets", self.budgets)

    @property
    def shown_perplexities(self) -> list[float]:
        return _numbers("--perplexity-at", self.perplexity_at) if self.text else []

    @property
    def seed_list(self) -> list[int]:
        found = _numbers("--seeds", self.seeds)
        if odd := next((seed for seed in found if seed != int(seed) or seed < 0), None):
            raise AmqError(f"--seeds: expected whole numbers from 0 on, got {odd:g}")
        return [int(seed) for seed in dict.fromkeys(found)]

    def search(self, seed: int, **more: Any) -> SearchSettings:
        """The settings of a search on the same model, bank, windows and loss."""
        shared = (
            "model", "formats", "group_size", "proxy", "rotation", "calibration", "window_length", "windows",
            "bank_windows", "backend", "activations", "cache_memory", "dtype", "device", "trust_remote_code", "load",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in shared} | {"confirm_windows": self.windows}
        given |= {"cost_passes": max(1, self.cost_passes), "seed": seed, "head": KEPT.name, "output": self.output}
        return SearchSettings.make(**given, **more)


FREE = frozenset({"output", "strategies", "seeds", "cache_memory", "load", "trust_remote_code"})
"""What may change between a table and its continuation: it alters no row, only how many there are."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that forbid going on with a table, as `--name was X, is Y`."""
    flags = declared(StrategySettings)
    names = [n for n in new if n not in FREE and old.get(n) != new[n]]
    return [f"{flags[n].spelling} was {old.get(n)}, is {new[n]}" for n in names]


def _numbers(what: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise AmqError(f"{what} {text}: expected numbers such as 3,3.5") from None
    if not all(math.isfinite(number) for number in found):
        raise AmqError(f"{what} {text}: expected finite numbers")
    return found
