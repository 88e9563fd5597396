"""StrategySettings: what strategies of bit allocation are compared by, as flags and as Python arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from amq.errors import AmqError
from amq.eval import banked_settings
from amq.eval.banked_settings import BankedSettings
from amq.eval.tables import numbers, whole_numbers
from amq.model.settings import DISK
from amq.quantize.quantizers import QUANTIZERS
from amq.search.settings import SearchSettings
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
from amq.util.settings import CHOOSE, MEASURE, flag

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
class StrategySettings(BankedSettings):
    """Which strategies, at which budgets, on which windows, and how often with other seeds.

    Head and embeddings stay in 16 bits, as in the systems that are compared with. windows: of the loss; refine is held
    to as many others. budgets, seeds, perplexity_at: comma-separated numbers.
    """

    VERB: ClassVar[str] = "eval strategies"
    ABOUT: ClassVar[str] = "compares strategies of bit allocation on one model, bank and loss"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq eval strategies smollm2 --output runs/strategies",
        "amq eval strategies smollm2 --strategies fisher,taylor,recipe --seeds 0 --output runs/three",
    )

    strategies: str = flag("", f"of {', '.join(STRATEGIES)} (default all)", CHOOSE, metavar="LIST")
    budgets: str = flag("2.75,3,3.5,4", "bits per weight of the linears to show losses at", CHOOSE, metavar="LIST")
    seeds: str = flag("0,1,2", "of windows, labels and draws: a row of each strategy per seed", MEASURE, metavar="LIST")
    proxy: str = flag("gptq", "quantizer of the bank", MEASURE, choices=QUANTIZERS)
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
        return numbers("--budgets", self.budgets)

    @property
    def shown_perplexities(self) -> list[float]:
        return numbers("--perplexity-at", self.perplexity_at) if self.text else []

    @property
    def seed_list(self) -> list[int]:
        return whole_numbers("--seeds", self.seeds)

    def search(self, seed: int, **more: Any) -> SearchSettings:
        """The settings of a search on the same model, bank, windows and loss."""
        return self.search_with(self.proxy, seed, max(1, self.cost_passes), **more)


FREE = banked_settings.FREE | {"strategies", "seeds"}
"""What may change between a table and its continuation: it alters no row, only how many there are."""
