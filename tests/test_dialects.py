"""Dialects: level sets, the best of them for each group, weights put together from them, and their bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fake_bank import FakeBank
from helpers.tiny_models import random_tokens, tiny_llama

from amq.formats import FORMATS
from amq.model.calibration import CalibrationStream
from amq.model.inventory import get_weight, take_inventory
from amq.packing import PackedWeight
from amq.proxy import dialects
from amq.proxy.dialects import EXPONENTS, dialect_weights, extra_bytes, in_dialects, level_sets
from amq.proxy.rows import installed
from amq.quantize.quantizers.grid import to_groups
from amq.rotation import rotate

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES, GROUP = ("int2", "int3", "int4"), 32
WINDOWS = random_tokens(3, 40, seed=5)
RECORDS = [FORMATS[name] for name in NAMES]


@pytest.fixture
def one_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Leaves the given exponents alone."""

    def leave(*exponents: float) -> None:
        monkeypatch.setattr(dialects, "EXPONENTS", exponents)
        level_sets.cache_clear()

    yield leave
    monkeypatch.undo()
    level_sets.cache_clear()


class Turned(FakeBank):
    """Says that inputs which 64 divides are rotated."""

    def get(self, name: str, fmt: str) -> PackedWeight:
        found = super().get(name, fmt)
        return replace(found, rotation=64 * (found.in_features % 64 == 0))


@pytest.mark.parametrize("name", NAMES)
def test_level_sets_bend_the_levels(name: str) -> None:
    fmt = FORMATS[name]
    levels, between = level_sets(fmt)
    assert levels.shape == (len(EXPONENTS), fmt.levels) and between.shape == (len(EXPONENTS), fmt.max_code)
    assert bool((levels[:, 1:] > between).all() and (between > levels[:, :-1]).all())
    assert levels[:, 0].eq(0).all() and levels[:, -1].eq(fmt.max_code).all()
    uniform = torch.arange(fmt.levels, dtype=torch.float32)
    torch.testing.assert_close(levels[EXPONENTS.index(1.0)], uniform, rtol=1e-6, atol=1e-6)
    inner = levels[:, fmt.levels // 2] - fmt.max_code / 2
    assert bool((inner[1:] < inner[:-1]).all()), "a larger exponent does not draw levels to the middle"


def test_a_group_has_its_best_dialect(one_set: Any) -> None:
    groups = to_groups(torch.randn(6, 70, generator=torch.Generator().manual_seed(1)), GROUP)
    groups[1] = groups[1].sign() * groups[1].abs() ** 0.5
    groups[2] = groups[2] ** 3
    importance = to_groups(torch.rand(1, 70, generator=torch.Generator().manual_seed(2)) + 0.1, GROUP)[0]
    fmt = FORMATS["int3"]

    def error() -> tuple[torch.Tensor, torch.Tensor]:
        dialect, scale, zero = dialects._fit(groups, importance, fmt)
        levels = level_sets(fmt)[0][dialect]  # [rows, n_groups, levels]
        values = ((levels - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).unsqueeze(2)
        nearest = (groups.unsqueeze(-1) - values).square().amin(-1)
        return dialect, (nearest * importance).sum(-1)

    chosen, least = error()
    assert len(chosen.unique()) > 2
    for exponent in EXPONENTS:
        one_set(exponent)
        assert bool((least <= error()[1] * (1 + 1e-5)).all())


def test_a_weight_is_its_codes_looked_up() -> None:
    model = tiny_llama()
    made = dialect_weights(model, take_inventory(model), FakeBank(model, NAMES), WINDOWS, RECORDS, GROUP)
    assert made.keys() == {s.name for s in take_inventory(model).linears}
    whole = made["model.layers.0.self_attn.o_proj"]["int3"]
    for row, feature in ((0, 0), (5, 40), (63, 63)):
        group = feature // GROUP
        place = level_sets(whole.format)[0][int(whole.dialect[row, group]), int(whole.codes[row, feature])]
        value = (float(place) - float(whole.zero_point[row, group])) * float(whole.scale[row, group])
        assert float(whole.dequantized()[row, feature]) == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_several_sets_have_less_error_than_one(one_set: Any) -> None:
    """Of what the linears of a tiny model give on the windows: each relative to what it gives, and all together."""
    model = tiny_llama()
    inventory = take_inventory(model)

    def errors() -> dict[str, float]:
        made = dialect_weights(model, inventory, FakeBank(model, NAMES), WINDOWS, RECORDS, GROUP)
        total, stream = dict.fromkeys(NAMES, 0.0), CalibrationStream(model, WINDOWS)
        for block in sorted({s.block for s in inventory.linears}):
            for group in stream.measure(inventory.in_block(block), advance=True):
                for spec, fmt in itertools.product(group.linears, NAMES):
                    own = get_weight(model, spec.name)
                    error = own - made[spec.name][fmt].dequantized()
                    total[fmt] += float((error @ group.gram * error).sum() / (own @ group.gram * own).sum())
        return total

    several = errors()
    one_set(1.0)
    ratios = {fmt: several[fmt] / one for fmt, one in errors().items()}
    assert ratios["int2"] < 1.0 and ratios["int3"] < 0.97 and ratios["int4"] < 0.95, ratios


def test_rotated_weights_are_rotated_back() -> None:
    model = tiny_llama()
    inventory = take_inventory(model)
    made = dialect_weights(model, inventory, Turned(model, NAMES), WINDOWS, RECORDS[-1:], GROUP)
    for spec in inventory.linears:
        weight, own = made[spec.name]["int4"], get_weight(model, spec.name)
        assert weight.rotated == (spec.in_features % 64 == 0)
        assert float((weight.dequantized() - own).norm() / own.norm()) < 0.15
        if weight.rotated:
            assert weight.dequantized().equal(rotate(replace(weight, rotated=False).dequantized()))


def test_they_are_put_in_and_taken_out() -> None:
    model = tiny_llama()
    inventory = take_inventory(model)
    own = {s.name: get_weight(model, s.name).clone() for s in inventory.linears}
    made = dialect_weights(model, inventory, FakeBank(model, NAMES), WINDOWS, RECORDS, GROUP)
    formats = {s.name: NAMES[i % 3] for i, s in enumerate(inventory.linears)}
    with installed(model, in_dialects(model, made, formats)):
        for name, fmt in formats.items():
            assert get_weight(model, name).equal(made[name][fmt].dequantized())
    assert all(get_weight(model, name).equal(weight) for name, weight in own.items())
    spec = inventory.linears[0]
    assert extra_bytes(spec, GROUP) == spec.out_features * spec.in_features // GROUP * 3 // 8
