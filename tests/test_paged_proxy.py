"""Losses and Fisher scores of a model whose blocks stay in their files are those of the model in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_bank import FakeBank
from helpers.families import FAMILIES
from helpers.paging import realign
from helpers.tiny_models import random_tokens
from torch import nn

from amq.model.losses import LN2
from amq.model.open import load_folder
from amq.model.paging import pager_of
from amq.model.settings import DISK, MEMORY
from amq.model.usable import find_usable
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import fisher_passes

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("int3", "int8")


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_scores(name: str, make_folder: Callable[[nn.Module], Path], cache: Path) -> None:
    folder = make_folder(FAMILIES[name].build())
    whole, paged = (load_folder("tiny", folder, "float32", "cpu", False, how) for how in (MEMORY, DISK))
    for loaded in (whole, paged):
        realign(loaded.model)
    inventory = find_usable(whole.model).inventory
    bank, rng = FakeBank(whole.model, NAMES), random.Random(0)
    configurations = [{s.name: rng.choice((*NAMES, "16bit")) for s in inventory.weights} for _ in range(4)]
    windows = {"search": random_tokens(2, 40, seed=3)}
    resident, evaluator = (Evaluator(loaded, inventory, bank, windows) for loaded in (whole, paged))
    expected, pager = flat(resident, configurations), pager_of(paged.model)
    before = pager.reads
    assert flat(evaluator, configurations) == expected and all(0 < loss < LN2 for loss in expected)
    assert pager.reads - before <= inventory.n_blocks
    tables = []
    for loaded, own in ((whole, resident), (paged, evaluator)):
        with own.full_precision():
            tables += fisher_passes(loaded.model, inventory, bank, random_tokens(1, 40, seed=4), NAMES, 0)
    for weight, scores in tables[0].items():
        assert tables[1][weight] == pytest.approx(scores, rel=1e-5), weight
    assert all(score > 0 for s in inventory.outer for score in tables[0][s.name].values())


def flat(evaluator: Evaluator, configurations: list[dict[str, str]]) -> list[float]:
    return [loss for some in evaluator.evaluate_many(configurations) for loss in some]
