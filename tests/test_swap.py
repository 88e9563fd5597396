"""LinearSwap and the evaluator on a kernel backend: the losses of the reference, and a model left as it was found."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import nn

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels.modules import QuantizedLinear
from amq.model.inventory import get_linear, take_inventory
from amq.model.open import LoadedModel
from amq.packing import PackedWeight
from amq.proxy.evaluator import Evaluator
from amq.proxy.swap import LinearSwap
from amq.quantize.bank import BankSettings, WeightBank, open_bank

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("int2", "int3", "int8")
WINDOWS = {"search": random_tokens(4, 50, seed=1), "confirm": random_tokens(2, 50, seed=2)}
UP = "model.layers.0.mlp.up_proj"


class Counting:
    """A bank that remembers what was asked of it, and fails for one linear on demand."""

    def __init__(self, bank: WeightBank) -> None:
        self.bank, self.asked, self.broken = bank, [], ""

    def get(self, linear: str, fmt: str) -> PackedWeight:
        if linear == self.broken:
            raise AmqError("damaged")
        self.asked.append((linear, fmt))
        return self.bank.get(linear, fmt)


class Setup:
    """A tiny model, its rtn bank at group 32, and swaps and evaluators on it."""

    def __init__(self, model: nn.Module, cache: Path) -> None:
        self.model, self.inventory = model, take_inventory(model)
        self.names = [s.name for s in self.inventory.linears]
        formats = [FORMATS[n] for n in NAMES]
        self.bank = Counting(open_bank(model, self.inventory, formats, BankSettings("rtn", 32), cache=cache))
        self.original = copy.deepcopy(model)
        self.modules = dict(model.named_modules())

    def swap(self, activations: str = "fp32") -> LinearSwap:
        return LinearSwap(self.model, self.names, "cpu", activations)

    def evaluator(self, **options: Any) -> Evaluator:
        loaded = LoadedModel(copy.deepcopy(self.original), None, "tiny")
        return Evaluator(loaded, self.inventory, self.bank, WINDOWS, **options)

    def uniform(self, fmt: str) -> dict[str, str]:
        return dict.fromkeys(self.names, fmt)

    def mixed(self, seed: int) -> dict[str, str]:
        generator = random.Random(seed)
        return {name: generator.choice(NAMES) for name in self.names}

    def assert_restored(self) -> None:
        """The same modules at the same places, and every parameter as it was, to the bit."""
        assert dict(self.model.named_modules()) == self.modules
        for (name, now), (other, before) in zip(
            self.model.named_parameters(), self.original.named_parameters(), strict=True
        ):
            assert name == other and torch.equal(now, before), name


@pytest.fixture
def setup(tiny_llama: nn.Module, tmp_path: Path) -> Setup:
    return Setup(tiny_llama, tmp_path)


@pytest.mark.parametrize("windows", WINDOWS)
def test_fp32_losses_are_those_of_the_reference(setup: Setup, windows: str) -> None:
    """The same weights through other sums: the loss may differ by what float32 rounds (see test_evaluator.py)."""
    reference, kernels = setup.evaluator(), setup.evaluator(backend="cpu")
    for formats in (setup.uniform("int2"), setup.mixed(0), setup.uniform("int8")):
        expected = reference.evaluate(formats, windows)
        assert kernels.evaluate(formats, windows) == pytest.approx(expected, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "opt"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Fused linears of the model itself, and linears with bias (opt)."""
    setup = Setup(ARCHITECTURES[name].build(), tmp_path)
    formats = setup.mixed(1)
    expected = setup.evaluator().evaluate(formats)
    assert setup.evaluator(backend="cpu").evaluate(formats) == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_int8_activations_cost_little_and_something(setup: Setup) -> None:
    """Far less than what int3 weights cost, and not nothing: the mode must have an effect."""
    exact, rounded = setup.evaluator(backend="cpu"), setup.evaluator(backend="cpu", activations="int8")
    formats = setup.uniform("int3")
    loss = exact.evaluate(formats)
    assert rounded.evaluate(formats) != loss
    assert abs(rounded.evaluate(formats) - loss) < 0.05 * loss
    assert 0 < rounded.evaluate(setup.uniform("int8")) < 0.05 * loss


@pytest.mark.parametrize("activations", ("fp32", "int8"))
def test_repeatable_and_sensitivities_are_full_evaluations(setup: Setup, activations: str) -> None:
    evaluator = setup.evaluator(backend="cpu", activations=activations)
    configurations = [setup.mixed(i) for i in range(3)]
    losses = [evaluator.evaluate(c) for c in configurations]
    assert len(set(losses)) == 3
    assert [evaluator.evaluate(c) for c in reversed(configurations)] == losses[::-1]
    fresh = setup.evaluator(backend="cpu", activations=activations)
    assert [fresh.evaluate(c) for c in reversed(configurations)] == losses[::-1]
    changes = random.Random(0).sample([(name, fmt) for name in setup.names for fmt in ("int2", "int8")], 6)
    for name, fmt, loss in evaluator.sensitivities(configurations[0], changes):
        assert loss == evaluator.evaluate({**configurations[0], name: fmt}), (name, fmt)


def test_apply_touches_only_what_changes(setup: Setup) -> None:
    swap, first = setup.swap("int8"), setup.uniform("int3")
    swap.apply(first, setup.bank)
    assert sorted(setup.bank.asked) == sorted(first.items())
    before = {name: setup.model.get_submodule(name) for name in setup.names}
    assert all(type(m) is QuantizedLinear and m.name == name for name, m in before.items())
    assert all(m.weight.format.name == "int3" and m.activations == "int8" for m in before.values())
    setup.bank.asked.clear()
    swap.apply(first, setup.bank)
    assert setup.bank.asked == []
    swap.apply({**first, UP: "int2"}, setup.bank)
    assert setup.bank.asked == [(UP, "int2")]
    changed = [name for name in setup.names if setup.model.get_submodule(name) is not before[name]]
    assert changed == [UP] and setup.model.get_submodule(UP).weight.format.name == "int2"


def test_restore_is_bit_exact(setup: Setup) -> None:
    swap = setup.swap()
    for formats in (setup.uniform("int2"), setup.mixed(3)):
        swap.apply(formats, setup.bank)
        swap.restore()
        setup.assert_restored()
    swap.restore()
    setup.assert_restored()
    with swap.full_precision():  # nothing was applied: nothing comes back
        setup.assert_restored()
    setup.assert_restored()


def test_full_precision_in_between(setup: Setup) -> None:
    swap, formats = setup.swap(), setup.mixed(4)
    swap.apply(formats, setup.bank)
    with swap.full_precision():
        setup.assert_restored()
    assert {n: setup.model.get_submodule(n).weight.format.name for n in setup.names} == formats
    with pytest.raises(KeyError), swap.full_precision():
        raise KeyError
    assert {n: setup.model.get_submodule(n).weight.format.name for n in setup.names} == formats


def test_a_bank_that_fails_halfway(setup: Setup) -> None:
    swap = setup.swap()
    swap.apply(setup.uniform("int8"), setup.bank)
    setup.bank.broken = setup.names[3]
    with pytest.raises(AmqError, match="damaged"):
        swap.apply(setup.uniform("int2"), setup.bank)
    setup.bank.broken = ""
    setup.bank.asked.clear()
    swap.apply(setup.uniform("int8"), setup.bank)
    assert setup.bank.asked == [(name, "int8") for name in setup.names[:3]]  # the fourth was not written over
    swap.restore()
    setup.assert_restored()


def test_memory_of_a_replaced_linear_is_freed(setup: Setup) -> None:
    import weakref

    swap = setup.swap()
    swap.apply(setup.uniform("int8"), setup.bank)
    watched = weakref.ref(setup.model.get_submodule(UP).data.untyped_storage())
    swap.apply(setup.uniform("int2"), setup.bank)
    assert watched() is None


def test_tied_modules_are_swapped_in_a_shared_parent(setup: Setup) -> None:
    """The embedding and head of this model are one parameter: swapping linears must leave that alone."""
    swap = setup.swap()
    swap.apply(setup.uniform("int2"), setup.bank)
    assert setup.model.get_output_embeddings().weight is setup.model.get_input_embeddings().weight
    assert isinstance(get_linear(setup.model, "lm_head"), nn.Linear)


def test_wrong_choices(setup: Setup) -> None:
    with pytest.raises(
        AmqError, match="--activations int8 does not go with backend reference: take --backend cpu or cuda"
    ):
        LinearSwap(setup.model, setup.names, "reference", "int8")
    with pytest.raises(AmqError, match="unknown backend 'gpu': expected one of cpu, cuda, triton, reference"):
        LinearSwap(setup.model, setup.names, "gpu")
    with pytest.raises(AmqError, match="activations must be one of fp32, int8, got 'int4'"):
        setup.evaluator(backend="cpu", activations="int4")
    with pytest.raises(AmqError, match="--activations int8 does not go with"):
        setup.evaluator(activations="int8")
    swap = setup.swap()
    with pytest.raises(AmqError, match="disagree about linear 'lm_head'"):
        swap.apply({**setup.uniform("int2"), "lm_head": "int2"}, setup.bank)
    with pytest.raises(AmqError, match="disagree about linear"):
        swap.apply({UP: "int2"}, setup.bank)
    setup.assert_restored()
