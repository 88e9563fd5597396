"""The settings of a report: the command line of `amq report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amq.util.settings import REQUIRED, Settings, flag


@dataclass(frozen=True)
class ReportSettings(Settings):
    VERB: ClassVar[str] = "report"
    ABOUT: ClassVar[str] = "writes the page and the charts of a search again, finished or still running"
    EXAMPLES: ClassVar[tuple[str, ...]] = ("amq report runs/smollm2", "amq report runs/qwen")

    run: str = flag(REQUIRED, "run folder of a search", positional=True)
