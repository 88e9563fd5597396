"""Losses of configurations against float64 brute force, and that swapping weights leaves no trace."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import nn

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.model.inventory import Inventory, get_linear, take_inventory
from amq.model.losses import LN2, LOSSES
from amq.model.open import LoadedModel
from amq.packing import PackedWeight, dequantize
from amq.proxy.evaluator import Evaluator
from amq.quantize.bank import BankSettings, WeightBank, open_bank

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("int2", "int3", "int8")
WINDOWS = {"search": random_tokens(6, 50, seed=1), "confirm": random_tokens(2, 50, seed=2)}
# 300 and 100 tokens: several chunks of `TOKENS` and a rest, and the windows of one batch


class Setup:
    """A tiny model, its rtn bank at group 32, and evaluators on it."""

    def __init__(self, model: nn.Module, cache: Path) -> None:
        self.model = model
        self.inventory: Inventory = take_inventory(model)
        formats = [FORMATS[n] for n in NAMES]
        self.bank: WeightBank = open_bank(model, self.inventory, formats, BankSettings("rtn", 32), cache=cache)
        self.original = copy.deepcopy(model)

    def evaluator(self, **options: Any) -> Evaluator:
        return Evaluator(
            LoadedModel(self.model, None, "tiny"), self.inventory, options.pop("bank", self.bank), WINDOWS, **options
        )

    def fresh_evaluator(self) -> Evaluator:
        """On another instance of the same model, with no history."""
        loaded = LoadedModel(copy.deepcopy(self.original), None, "tiny")
        return Evaluator(loaded, self.inventory, self.bank, WINDOWS)

    def uniform(self, fmt: str) -> dict[str, str]:
        return {s.name: fmt for s in self.inventory.linears}

    def mixed(self, seed: int) -> dict[str, str]:
        generator = random.Random(seed)
        return {s.name: generator.choice(NAMES) for s in self.inventory.linears}

    def loss64(self, formats: dict[str, str], kind: str, windows: str = "search", unscored: int = 0) -> float:
        """The definition, all in float64: whole forwards, textbook formulas."""
        full = copy.deepcopy(self.original).double()
        quantized = copy.deepcopy(self.original).double()
        for name, fmt in formats.items():
            get_linear(quantized, name).weight.copy_(dequantize(self.bank.get(name, fmt)))
        p, q = (m(input_ids=WINDOWS[windows]).logits.softmax(-1) for m in (full, quantized))
        middle = (p + q) / 2
        terms = {
            "jsd": (p * (p / middle).log() + q * (q / middle).log()) / 2,
            "kl": p * (p / q).log(),
            "ce": -p * q.log(),
        }
        return float(terms[kind][:, unscored:].sum(-1).mean())

    def is_original(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.model.parameters(), self.original.parameters(), strict=True))


@pytest.fixture
def setup(tiny_llama: nn.Module, tmp_path: Path) -> Setup:
    return Setup(tiny_llama, tmp_path)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("windows", WINDOWS)
def test_loss_is_the_definition(setup: Setup, kind: str, windows: str) -> None:
    evaluator = setup.evaluator(loss=kind)
    for formats in (setup.uniform("int2"), setup.mixed(0), setup.uniform("int8")):
        # Softmaxes in float32 are off by about 1e-7 of each probability, and so is their sum.
        expected = setup.loss64(formats, kind, windows)
        assert evaluator.evaluate(formats, windows) == pytest.approx(expected, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "opt"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    setup = Setup(ARCHITECTURES[name].build(), tmp_path)
    formats = setup.mixed(1)
    assert setup.evaluator().evaluate(formats) == pytest.approx(setup.loss64(formats, "jsd"), rel=1e-3, abs=2e-6)


def test_losses_are_ordered_and_bounded(setup: Setup) -> None:
    evaluator = setup.evaluator()
    wide, narrow = evaluator.evaluate(setup.uniform("int8")), evaluator.evaluate(setup.uniform("int2"))
    assert 0 <= wide < 1e-4 and 1000 * wide < narrow < LN2


def test_full_precision_loss_is_zero(setup: Setup) -> None:
    """A bank that returns the original weights: every loss must vanish, cross-entropy be the entropy."""
    evaluator = setup.evaluator()
    evaluator.apply(setup.uniform("int8"))
    for name in setup.uniform("int8"):
        get_linear(setup.model, name).weight.copy_(get_linear(setup.original, name).weight)
    assert abs(evaluator.evaluate(setup.uniform("int8"))) < 1e-7


def test_repeatable_and_independent_of_the_path(setup: Setup) -> None:
    evaluator = setup.evaluator()
    configurations = [setup.mixed(i) for i in range(4)]
    losses = [evaluator.evaluate(c) for c in configurations]
    assert len(set(losses)) == 4
    for order in ([0, 0], [3, 1, 2, 0], [2, 3, 1]):
        for index in order:
            assert evaluator.evaluate(configurations[index]) == losses[index]
    fresh = setup.fresh_evaluator()
    assert [fresh.evaluate(c) for c in reversed(configurations)] == losses[::-1]


def test_sensitivities_are_full_evaluations(setup: Setup) -> None:
    evaluator = setup.evaluator()
    base = setup.mixed(0)
    changes = [(s.name, fmt) for s in setup.inventory.linears for fmt in ("int2", "int8")]
    changes = random.Random(0).sample(changes, 12)
    found = list(evaluator.sensitivities(base, changes))
    assert sorted((name, fmt) for name, fmt, _ in found) == sorted(changes)
    blocks = {s.name: s.block for s in setup.inventory.linears}
    assert [blocks[name] for name, _, _ in found] == sorted(blocks[name] for name, _ in changes)
    for name, fmt, loss in found:
        assert loss == evaluator.evaluate({**base, name: fmt}), (name, fmt)
    confirm = dict(((n, f), loss) for n, f, loss in evaluator.sensitivities(base, changes[:3], "confirm"))
    assert all(loss == evaluator.evaluate({**base, n: f}, "confirm") for (n, f), loss in confirm.items())


def test_sensitivities_survive_evaluations_in_between(setup: Setup) -> None:
    evaluator, base = setup.evaluator(), setup.uniform("int8")
    changes = [(f"model.layers.{block}.mlp.up_proj", "int2") for block in (0, 1)]
    expected = list(evaluator.sensitivities(base, changes))
    found = []
    for change in evaluator.sensitivities(base, changes):
        found.append(change)
        evaluator.evaluate(setup.uniform("int2"))
    assert found == expected


def test_cache_memory_changes_nothing_but_time(setup: Setup) -> None:
    formats = setup.mixed(2)
    one_chunk = 4 * 128 * 256
    losses = []
    for memory in (0, one_chunk - 1, one_chunk, 2 * one_chunk, 1 << 30):
        evaluator = setup.evaluator(cache_memory=memory)
        assert evaluator._meter.cached_bytes <= memory
        losses.append([evaluator.evaluate(formats, windows) for windows in WINDOWS])
        evaluator.restore()
    for loss in losses[1:]:
        assert loss == pytest.approx(losses[0], abs=1e-6)


def test_uncached_reference_survives_swaps(setup: Setup) -> None:
    """Without a cache the reference goes through the head again: linears are swapped then, the head must not be."""
    evaluator = setup.evaluator(cache_memory=0)
    first = evaluator.evaluate(setup.uniform("int2"))
    evaluator.evaluate(setup.uniform("int8"))
    assert evaluator.evaluate(setup.uniform("int2")) == first


def test_weights_are_put_back(setup: Setup) -> None:
    evaluator = setup.evaluator()
    formats = setup.mixed(0)
    loss = evaluator.evaluate(formats)
    assert not setup.is_original()
    with evaluator.full_precision():
        assert setup.is_original()
    assert not setup.is_original() and evaluator.evaluate(formats) == loss
    with pytest.raises(KeyError), evaluator.full_precision():
        raise KeyError
    assert not setup.is_original()
    evaluator.restore()
    assert setup.is_original()
    with evaluator.full_precision():
        pass
    assert setup.is_original() and evaluator.evaluate(formats) == loss


def test_wrong_linears_and_names(setup: Setup) -> None:
    evaluator = setup.evaluator()
    formats = setup.uniform("int2")
    missing = {k: v for k, v in formats.items() if k != "model.layers.0.mlp.up_proj"}
    with pytest.raises(AmqError, match="disagree about linear 'model.layers.0.mlp.up_proj'"):
        evaluator.evaluate(missing)
    with pytest.raises(AmqError, match="disagree about linear 'lm_tail'"):
        evaluator.evaluate({**formats, "lm_tail": "int2"})
    with pytest.raises(AmqError, match="linear 'lm_head' is not in the bank"):
        evaluator.evaluate({**formats, "lm_head": "int2"})
    with pytest.raises(AmqError, match="format 'int4' is not in this bank"):
        evaluator.evaluate({**formats, "model.layers.0.mlp.up_proj": "int4"})
    with pytest.raises(AmqError, match="unknown loss 'mse': expected one of jsd, kl, ce"):
        setup.evaluator(loss="mse")
    assert evaluator.evaluate(formats) == setup.fresh_evaluator().evaluate(formats)


class Patched:
    """A bank in which `change` alters one linear's int2 scale."""

    def __init__(self, bank: WeightBank, linear: str, change: Callable[[torch.Tensor], None]) -> None:
        self.bank, self.linear, self.change = bank, linear, change

    def get(self, linear: str, fmt: str) -> PackedWeight:
        packed = self.bank.get(linear, fmt)
        if (linear, fmt) != (self.linear, "int2"):
            return packed
        scale = packed.scale.clone()
        self.change(scale)
        return PackedWeight(
            packed.format, packed.in_features, packed.group_size, packed.qweight, scale, packed.zero_point
        )


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_give_a_non_finite_loss(setup: Setup, kind: str, value: float) -> None:
    broken = "model.layers.1.mlp.down_proj"
    evaluator = setup.evaluator(loss=kind, bank=Patched(setup.bank, broken, lambda scale: scale.fill_(value)))
    good = setup.uniform("int8")
    loss = evaluator.evaluate(good)
    assert not math.isfinite(evaluator.evaluate({**good, broken: "int2"}))
    assert [not math.isfinite(x) for _, _, x in evaluator.sensitivities(good, [(broken, "int2")])] == [True]
    assert evaluator.evaluate(good) == loss, "a non-finite candidate left a trace"


def test_failing_bank_leaves_a_usable_evaluator(setup: Setup) -> None:
    broken = "model.layers.1.mlp.down_proj"

    def fail(scale: torch.Tensor) -> None:
        raise AmqError("damaged")

    evaluator = setup.evaluator(bank=Patched(setup.bank, broken, fail))
    good = setup.uniform("int8")
    loss = evaluator.evaluate(good)
    with pytest.raises(AmqError, match="damaged"):
        evaluator.evaluate(setup.uniform("int2"))
    assert evaluator.evaluate(good) == loss
    evaluator.restore()
    assert setup.is_original()


@pytest.mark.parametrize("unscored", [1, 2])
@pytest.mark.parametrize("kind", ["jsd", "kl"])
def test_leading_positions_without_a_loss(setup: Setup, kind: str, unscored: int) -> None:
    """They are run through the model and count nowhere: neither in losses nor in sensitivities, cached or not."""
    base, formats = setup.uniform("int8"), setup.mixed(5)
    name = setup.inventory.linears[-1].name
    evaluator = setup.evaluator(loss=kind, unscored=unscored, cache_memory=200_000)  # some chunks, not all
    for windows in WINDOWS:
        expected = setup.loss64(formats, kind, windows, unscored)
        assert evaluator.evaluate(formats, windows) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert abs(expected - setup.loss64(formats, kind, windows)) > 1e-3 * expected  # the test can tell
    ((_, _, found),) = evaluator.sensitivities(base, [(name, "int2")])
    assert found == pytest.approx(setup.loss64({**base, name: "int2"}, kind, "search", unscored), rel=1e-4, abs=1e-7)
