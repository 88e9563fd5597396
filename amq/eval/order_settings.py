"""OrderSettings: whether a bank ranks configurations as deployed methods do, as flags and as Python arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amq.errors import AmqError
from amq.eval import banked_settings
from amq.eval.banked_settings import BankedSettings
from amq.eval.tables import names_of, numbers
from amq.model.settings import DISK
from amq.quantize.methods import METHODS, rotation_of
from amq.quantize.quantizers import QUANTIZERS
from amq.search.settings import SearchSettings
from amq.util.settings import CHOOSE, MEASURE, flag

RESIDENT = "configurations are deployed in a model that is in memory whole: give --load memory"


@dataclass(frozen=True, kw_only=True)
class OrderSettings(BankedSettings):
    """Which banks and methods, on how many configurations of which sizes. banks, methods, budgets: comma-separated."""

    VERB: ClassVar[str] = "eval order"
    ABOUT: ClassVar[str] = "compares the order of configurations by a search's bank with that by deployed methods"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq eval order smollm2 --output runs/order",
        "amq eval order smollm2 --banks gptq --methods gptq,awq --budgets 2.75,3 --output runs/two",
    )

    banks: str = flag("hqq,gptq", f"quantizers of banks, of {', '.join(QUANTIZERS)}", CHOOSE, metavar="LIST")
    methods: str = flag("", f"deployed methods, of {', '.join(METHODS)} (default all)", CHOOSE, metavar="LIST")
    budgets: str = flag("3,3.5", "bits per weight; configurations of each are compared by themselves", CHOOSE,
                        metavar="LIST")  # fmt: skip
    spread: int = flag(
        16, "configurations spread over all sizes, beside those of the budgets", CHOOSE, least=4, metavar="N"
    )
    within: int = flag(16, "configurations of each budget", CHOOSE, least=4, metavar="N")
    width: float = flag(0.05, "bits per weight that they may lie below it", CHOOSE, above=0, metavar="BITS")
    deploy_windows: int = flag(
        24, "windows that calibrate deployed methods; none of them is a bank's or the loss's", MEASURE, least=1,
        metavar="N",
    )  # fmt: skip
    seed: int = flag(0, "of configurations and windows", MEASURE, least=0, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.method_list:
            rotation_of(method, self.rotation)  # raises where a method cannot
        if not self.budget_list:
            raise AmqError("--budgets names no budget")
        if self.load == DISK:
            raise AmqError(f"--load {DISK}: {RESIDENT}")
        for bank in self.bank_list:
            self.search(bank)  # raises for what a search would refuse

    @property
    def bank_list(self) -> list[str]:
        return names_of("--banks", self.banks, tuple(QUANTIZERS))

    @property
    def method_list(self) -> list[str]:
        return names_of("--methods", self.methods, tuple(METHODS))

    @property
    def budget_list(self) -> list[float]:
        return sorted(set(numbers("--budgets", self.budgets)))

    def search(self, bank: str) -> SearchSettings:
        """The settings of a search on that bank, with the deployed methods' windows for those of its cost table."""
        return self.search_with(bank, self.seed, self.deploy_windows)


FREE = banked_settings.FREE | {"banks", "methods"}
"""What may change between a table and its continuation: it alters no loss, only how many there are."""
