"""PredictorSettings: how large an archive a predictor of losses needs, as flags and as Python arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amq.errors import AmqError
from amq.eval.tables import names_of, whole_numbers
from amq.formats import FORMATS, parse_formats
from amq.search.surrogates import SURROGATES
from amq.util.settings import CHOOSE, MEASURE, REQUIRED, RUN, Settings, flag

CLEAN, OUTLIERS, RARE, UNSEEN = "clean", "outliers", "rare", "unseen"
CASES = {
    CLEAN: "trained on and asked about random mixtures",
    OUTLIERS: "the same, some linears cost many times as much in the cheapest format",
    RARE: "the widest format is rare in the archive",
    UNSEEN: "the widest format is not in the archive",
}
LEAST_FORMATS = {UNSEEN: 3}
"""Formats that a case wants, where it is not two."""
SYNTHETIC = "what losses are made of"


@dataclass(frozen=True, kw_only=True)
class PredictorSettings(Settings):
    """Which predictors, on which archives, of what losses. sizes, cases, surrogates, seeds: comma-separated."""

    VERB: ClassVar[str] = "eval predictor"
    ABOUT: ClassVar[str] = "finds how large an archive a predictor of losses needs, on synthetic losses"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq eval predictor runs/smollm2 --output runs/predictor",
        "amq eval predictor runs/smollm2/cost.json --cases outliers --factor 100 --output runs/outliers",
    )

    table: str = flag(
        REQUIRED, "run folder of a search with a cost table; or a cost.json alone, whose linears then count as equally "
        "large", positional=True,
    )  # fmt: skip
    output: str = flag(
        REQUIRED, "folder of the table; a table of the same settings in it goes on where it stopped", RUN,
        metavar="FOLDER",
    )  # fmt: skip
    formats: str = flag(
        "int2,int3,int4", f"formats that are mixed, of {', '.join(FORMATS)}, all of them in the cost table", CHOOSE,
        metavar="LIST",
    )  # fmt: skip
    cases: str = flag("", "of " + "; ".join(f"{name}: {text}" for name, text in CASES.items()) + " (default all)",
                      CHOOSE, metavar="LIST")  # fmt: skip
    surrogates: str = flag("rbf", f"predictors, of {', '.join(SURROGATES)}", CHOOSE, metavar="LIST")
    sizes: str = flag("50,100,250,500,1000,2000", "evaluations in the archive", CHOOSE, metavar="LIST")
    questions: int = flag(200, "configurations that are asked about, of all sizes and of the budget", MEASURE, least=4,
                          metavar="N")  # fmt: skip
    budget: float = flag(3.0, "bits per weight of the questions within a budget", MEASURE, above=0, metavar="BITS")
    width: float = flag(0.05, "bits per weight that they may lie below it", MEASURE, above=0, metavar="BITS")
    wanted: float = flag(0.9, "rank correlation (Spearman) that an archive is to reach", MEASURE, above=0, most=1,
                         metavar="R")  # fmt: skip
    seeds: str = flag("0,1,2", "of archives, questions and losses; medians are over them", MEASURE, metavar="LIST")
    interaction: float = flag(0.5, "how much neighbouring linears change each other's cost", SYNTHETIC, least=0, most=1,
                              metavar="X")  # fmt: skip
    share: float = flag(0.05, "share of linears that are outliers", SYNTHETIC, above=0, most=1, metavar="P")
    factor: float = flag(30.0, "times that an outlier costs in the cheapest format", SYNTHETIC, above=0, metavar="X")
    rare: float = flag(0.01, "probability of the widest format where it is rare", SYNTHETIC, above=0, most=1,
                       metavar="P")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(parse_formats(self.formats))
        for case in self.case_list:
            if count < LEAST_FORMATS.get(case, 2):
                raise AmqError(
                    f"--formats {self.formats}: case {case!r} wants {LEAST_FORMATS.get(case, 2)} formats or more"
                )
        if not (self.size_list and self.seed_list):
            raise AmqError("--sizes and --seeds: expected a number or more each")
        self.surrogate_list  # noqa: B018 - raises for an unknown name

    @property
    def case_list(self) -> list[str]:
        return names_of("--cases", self.cases, CASES)

    @property
    def surrogate_list(self) -> list[str]:
        return names_of("--surrogates", self.surrogates, tuple(SURROGATES))

    @property
    def size_list(self) -> list[int]:
        return sorted(whole_numbers("--sizes", self.sizes, 2))

    @property
    def seed_list(self) -> list[int]:
        return whole_numbers("--seeds", self.seeds)


FREE = frozenset({"output", "table", "cases", "surrogates", "seeds", "wanted"})
"""What may change between a table and its continuation: it alters no row. Costs are compared by their hash."""
