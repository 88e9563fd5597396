"""`run_order`: does a search's bank rank configurations as they will be ranked when they are deployed?

    python -m amq.eval order smollm2 --banks hqq,gptq --budgets 3,3.5 --output runs/order

A search measures configurations on a bank: all linears rounded once, each on what the full-precision model gives it.
Deployed, a method quantizes block after block, each on what the quantized blocks before it give. The order is what
counts (order equivalence is AMQ's claim), and size makes most of it: a configuration of more bits is better by any
method. So random configurations are compared over all sizes, and again within each budget, where a search has to
choose (`amq.search.draws`). Every bank and method has the same ones, with the same windows of the loss.

The bank and its losses are a search's own (`amq.search.run.prepare`); a method is `amq quantize`'s own, block by block
(`amq.quantize.blocks`), with other windows for calibration than the bank. FOLDER gets order.json after every loss, and
order.md: the same command goes on where it was stopped, and more banks or methods may be asked for. Not among the
methods: `bank`, which deploys what was measured, and `autoround`, which takes minutes for every configuration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from amq.errors import AmqError
from amq.eval.order_settings import FREE, RESIDENT, OrderSettings
from amq.eval.order_table import ALL, OrderEntry, OrderTable, markdown
from amq.eval.tables import check_same, open_table
from amq.model.paging import pager_of
from amq.quantize.blocks import BlockQuantizer
from amq.quantize.methods import METHODS, rotation_of
from amq.quantize.output import stored_dtype
from amq.search.conduct import Timings
from amq.search.draws import band_points, spread_points
from amq.search.run import Stage, prepare
from amq.search.space import SearchSpace
from amq.util.files import write_text
from amq.util.progress import Progress
from amq.util.provenance import provenance

JSON, MARKDOWN = "order.json", "order.md"
FILES = (JSON, MARKDOWN)
"""What a folder gets."""
STREAM = 11
"""Of the seed's random numbers, those that draw configurations."""


def run_order(settings: OrderSettings, progress: Progress | None = None) -> OrderTable:
    """The table of `settings`, of which losses that its folder has are not measured again.

    Raises AmqError for unusable input, and for a folder with a table of other settings, before a model is loaded; for
    another model, text or bank than the table's, and for a budget that the model does not reach, before anything is
    measured.
    """
    comparison = _Comparison(settings, progress or Progress())
    for bank in settings.bank_list:
        comparison.measure_bank(bank)
    for method in settings.method_list:
        comparison.measure_deployed(method)
    assert comparison.table is not None, "settings name a bank"
    return comparison.table


class _Comparison:
    """The table as far as it is, and the model with the bank that was opened last."""

    def __init__(self, settings: OrderSettings, progress: Progress) -> None:
        self._settings, self._progress, self._output = settings, progress, Path(settings.output)
        self.table = open_table(OrderTable, self._output / JSON, settings, FREE)
        self._stage: Stage | None = None

    def measure_bank(self, bank: str) -> None:
        if self.table is not None and not self.table.lacking("banks", bank):
            return
        stage, table = self._open(bank)
        places = table.lacking("banks", bank)
        wanted = [formats_of(table.entries[place], stage.space) for place in places]
        left = iter(places)
        with self._progress.stage(f"{bank} bank", len(places)) as step:
            for losses in stage.evaluator.evaluate_many(wanted):
                for loss in losses:
                    table = table.with_loss(next(left), "banks", bank, _finite(loss))
                    step(f"{loss:.5f}")
                self.keep(table)

    def measure_deployed(self, method: str) -> None:
        if self.table is not None and not self.table.lacking("deployed", method):
            return
        stage, table = (self._stage, self.table) if self._stage else self._open(self._settings.bank_list[0])
        assert table is not None
        places = table.lacking("deployed", method)
        with self._progress.stage(f"{method} deployed", len(places)) as step:
            for place in places:
                loss = deployed_loss(stage, method, self._settings, formats_of(table.entries[place], stage.space))
                table = self.keep(table.with_loss(place, "deployed", method, _finite(loss)))
                step(f"{loss:.5f}")

    def keep(self, table: OrderTable) -> OrderTable:
        """Writes what there is."""
        self.table = replace(table, provenance=provenance())
        self.table.write(self._output / JSON)
        write_text(self._output / MARKDOWN, markdown(self.table))
        return self.table

    def _open(self, bank: str) -> tuple[Stage, OrderTable]:
        """The model with that bank, in the place of the one before, and the table with what it says of itself."""
        settings = self._settings
        self._stage = None  # its memory goes before the next one is loaded
        stage = self._stage = prepare(settings.search(bank), self._progress, Timings())
        if pager_of(stage.opened.model) is not None:
            raise AmqError(f"{settings.model} is read block by block, and {RESIDENT}")
        now = OrderTable(
            settings=settings, fingerprint=stage.opened.fingerprint, measured_by=stage.measured_by,
            text=stage.corpus.sha256, windows=stage.windows_key, banks={bank: stage.bank.folder.name},
            entries=tuple(draw(settings, stage.space)),
        )  # fmt: skip
        if self.table is None:
            self.table = now
            return stage, now
        names = {"fingerprint": "model (or other weights)", "measured_by": "engine", "text": "text"}
        check_same(self.table, now, settings.output, {**names, "windows": "tokenizer (other windows of tokens)"})
        points = [[entry.point for entry in table.entries] for table in (self.table, now)]
        if self.table.banks.get(bank, now.banks[bank]) != now.banks[bank] or points[0] != points[1]:
            raise AmqError(
                f"--output {settings.output}: its {bank} bank or its configurations were others, amq has changed: give "
                "another folder"
            )
        self.table = replace(self.table, banks={**self.table.banks, **now.banks})
        return stage, self.table


def draw(settings: OrderSettings, space: SearchSpace) -> Iterator[OrderEntry]:
    """The configurations, without losses; those of one budget do not depend on which others there are."""

    def rng(place: float) -> np.random.Generator:
        return np.random.default_rng([settings.seed, STREAM, round(1000 * place)])

    drawn = {ALL: spread_points(space, settings.spread, rng(0))}
    for bits in settings.budget_list:
        drawn[f"{bits:g}"] = band_points(space, bits, settings.width, settings.within, rng(bits))
    for part, points in drawn.items():
        for point in points:
            yield OrderEntry(part=part, point="".join(map(str, point)), bits=round(float(space.bits(point)), 4))


def formats_of(entry: OrderEntry, space: SearchSpace) -> dict[str, str]:
    """{linear: format} of an entry."""
    return space.decode(np.array([int(digit) for digit in entry.point]))


def deployed_loss(stage: Stage, method: str, settings: OrderSettings, formats: dict[str, str]) -> float:
    """Loss of the model, quantized as `amq quantize --method` does it, by torch; the model is as before afterwards."""
    model, inventory = stage.opened.model, stage.quantized
    with stage.evaluator.full_precision(), _restored(model.get_submodule(inventory.blocks_path)):
        quantizer = BlockQuantizer(
            model, inventory, formats, settings.group_size, METHODS[method], stage.cost_windows,
            stored=stored_dtype(stage.opened.folder, model), rotation=rotation_of(method, settings.rotation),
        )  # fmt: skip
        for block in range(inventory.n_blocks):
            quantizer.finish(quantizer.make(block))
        return stage.evaluator.loss_as_it_is()


@contextmanager
def _restored(blocks: nn.Module) -> Iterator[None]:
    """Copies of all parameters inside, to be written over; the own ones afterwards."""
    own = {parameter: parameter.data for parameter in blocks.parameters()}
    try:
        for parameter, data in own.items():
            parameter.data = data.clone()
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data


def _finite(loss: float) -> float | None:
    return round(loss, 6) if math.isfinite(loss) else None
