"""Configurations that are measured together have the losses that each has alone, to the bit; resident and paged,
experts, head and embeddings included."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_bank import FakeBank
from helpers.mixtures import MIXTURES
from helpers.paging import PoisonPager, assert_only_held
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import nn

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.model.experts import unfuse
from amq.model.inventory import EMBEDDING, HEAD, get_weight, take_inventory
from amq.model.open import LoadedModel
from amq.packing import dequantize
from amq.proxy import evaluator as evaluators
from amq.proxy.evaluator import TOGETHER, Evaluator
from amq.proxy.walk import Walk

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("int2", "int3", "int8")
WINDOWS = {"search": random_tokens(6, 50, seed=1), "confirm": random_tokens(2, 50, seed=2)}
UP = "model.layers.0.mlp.up_proj"


class Setup:
    def __init__(self, name: str, **options: Any) -> None:
        model = (ARCHITECTURES | MIXTURES)[name].build(**options)
        unfuse(model)
        model(input_ids=random_tokens(1, 8))
        self.model, self.inventory, self.bank = model, take_inventory(model), FakeBank(model, NAMES)
        self.names = [s.name for s in self.inventory.linears]
        self.outer = [s.name for s in self.inventory.outer]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def evaluator(self, model: nn.Module, **options: Any) -> Evaluator:
        return Evaluator(LoadedModel(model, None, "tiny"), self.inventory, self.bank, WINDOWS, **options)

    def mixed(self, seed: int, outer: bool = True) -> dict[str, str]:
        """Neighbours in `seed` agree in their first blocks; every third leaves head and embeddings as they are."""
        far, near = random.Random(seed // 4), random.Random(seed)
        chosen = {
            s.name: (far if s.block < self.inventory.n_blocks - 1 else near).choice((*NAMES, "16bit"))
            for s in self.inventory.linears
        }
        return {**chosen, **{n: near.choice(NAMES) for n in self.outer if outer and seed % 3}}

    def brute_force(self, formats: dict[str, str]) -> nn.Module:
        """Another instance of the model that holds a configuration."""
        model = self.copy()
        with torch.no_grad():
            for name, fmt in formats.items():
                if fmt != "16bit":
                    get_weight(model, name).copy_(dequantize(self.bank.get(name, fmt)))
        return model


FAMILIES = ("llama", "mistral", "gemma3", "qwen3_moe", "gpt_oss")


@pytest.fixture(params=FAMILIES)
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(request.param)


def flat(chunks: Any) -> list[float]:
    return [loss for chunk in chunks for loss in chunk]


@pytest.mark.parametrize("memory", [0, 1 << 20, 256 << 20])
def test_together_as_alone(setup: Setup, monkeypatch: pytest.MonkeyPatch, cache: Path, memory: int) -> None:
    monkeypatch.setattr(evaluators, "TOGETHER", 5)
    configurations = [setup.mixed(seed) for seed in range(9)]
    configurations += [configurations[4], {**configurations[4], setup.names[0]: "int2"}]
    alone = [setup.evaluator(setup.copy()).evaluate(c) for c in configurations]
    assert len(set(alone)) == len(configurations) - 1
    evaluator = setup.evaluator(setup.model, cache_memory=memory)
    found = flat(evaluator.evaluate_many(configurations))
    assert found == pytest.approx(alone, rel=1e-6)  # the reference is cached here and computed again there
    if memory == 256 << 20:
        assert found == alone
    assert flat(evaluator.evaluate_many(configurations[::-1])) == found[::-1]
    assert [evaluator.evaluate(c) for c in configurations] == found
    confirm = flat(evaluator.evaluate_many(configurations[:3], "confirm"))
    assert confirm == [evaluator.evaluate(c, "confirm") for c in configurations[:3]]
    evaluator.restore()
    now, before = setup.model.state_dict(), setup.copy().state_dict()
    assert all(torch.equal(now[n], before[n]) for n in now)


def test_losses_are_those_of_whole_models(setup: Setup) -> None:
    """Of head and embeddings too, tied or not."""
    evaluator = setup.evaluator(setup.copy(), cache_memory=0)
    (full,) = (setup.model(input_ids=WINDOWS["search"]).logits.double().log_softmax(-1).exp(),)
    for seed in (1, 2, 3):
        formats = setup.mixed(seed)
        q = setup.brute_force(formats)(input_ids=WINDOWS["search"]).logits.double().log_softmax(-1).exp()
        middle = (full + q) / 2
        expected = float(((full * (full / middle).log() + q * (q / middle).log()) / 2).sum(-1).mean())
        assert evaluator.evaluate(formats) == pytest.approx(expected, rel=1e-3, abs=2e-6), formats


def test_each_kind_of_outer_weight_matters(setup: Setup) -> None:
    evaluator = setup.evaluator(setup.model, cache_memory=0)
    kept = dict.fromkeys(setup.names, "16bit")
    assert abs(evaluator.evaluate(kept)) < 1e-7
    kinds = {s.kind for s in setup.inventory.outer}
    assert kinds == ({HEAD} if setup.inventory.head_is_tied else {HEAD, EMBEDDING})
    for name in setup.outer:
        first = evaluator.evaluate({**kept, name: "int2"})
        assert first > 1e-3
        assert evaluator.evaluate({**kept, name: "int2"}) == first, "the reference was not from the full head"
    assert abs(evaluator.evaluate(kept)) < 1e-7


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_paged_is_resident(setup: Setup, cache: Path, backend: str) -> None:
    resident = setup.evaluator(setup.copy(), backend=backend)
    configurations = [setup.mixed(seed) for seed in range(6)]
    expected = flat(resident.evaluate_many(configurations))
    model = setup.copy()
    pager = PoisonPager(model)
    evaluator = setup.evaluator(model, backend=backend, cache_memory=100_000)
    pager.held.clear()
    found = assert_only_held(pager, lambda: flat(evaluator.evaluate_many(configurations)))
    assert found == pytest.approx(expected, rel=1e-6)
    assert pager.held == list(range(setup.inventory.n_blocks)), "one walk for all"
    evaluator.restore()  # head and embeddings; blocks are as they were already
    more = setup.evaluator(model, backend=backend)
    assert flat(more.evaluate_many(configurations)) == expected
    blocks = dict(setup.model.named_modules())[setup.inventory.blocks_path]
    for index, block in enumerate(blocks):  # what is paged is full precision between walks
        assert all(torch.equal(a, b) for a, b in zip(pager.weights(index), block.parameters(), strict=True))
    with pytest.raises(AmqError, match="holds one block at a time"):
        evaluator.apply(configurations[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_one_block_of_copies_at_a_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resident model without room for a second copy of it: the same losses, never two blocks' copies, none after."""
    setup = Setup("llama", num_hidden_layers=4)
    configurations = [setup.mixed(seed) for seed in range(5)] + [dict.fromkeys(setup.names, "int2")] * 2
    expected = flat(setup.evaluator(setup.copy(), backend=backend).evaluate_many(configurations))
    evaluator = setup.evaluator(setup.model, backend=backend, whole=False)
    swap, blocks = evaluator._swap, {s.name: s.block for s in setup.inventory.linears}
    seen, run = [], Walk._run

    def counted(self: Walk, *args: Any, **kwargs: Any) -> None:
        seen.append({blocks[name] for name in swap._made if name in blocks})
        run(self, *args, **kwargs)

    monkeypatch.setattr(Walk, "_run", counted)
    assert flat(evaluator.evaluate_many(configurations)) == expected
    assert seen and all(len(some) <= 1 for some in seen)
    assert not set(swap._made) & set(setup.names) and not set(swap._current) & set(setup.names)
    with pytest.raises(AmqError, match="holds one block at a time: a configuration can be evaluated, not applied"):
        evaluator.apply(configurations[0])


def test_sensitivities_share_what_comes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change runs the blocks from its own on, and the base's blocks run once, over all chunks."""
    monkeypatch.setattr(evaluators, "TOGETHER", 3)
    setup = Setup("llama", num_hidden_layers=4)
    evaluator = setup.evaluator(setup.model)
    base = dict.fromkeys(setup.names, "int8")
    changes = [(name, "int2") for name in setup.names]
    runs: list[int] = []
    run = Walk._run

    def counted(self: Walk, block: int, stop: int, *args: Any, **kwargs: Any) -> None:
        runs.append(stop - block)
        run(self, block, stop, *args, **kwargs)

    monkeypatch.setattr(Walk, "_run", counted)
    found = list(evaluator.sensitivities(base, changes))
    spent, roles = sum(runs), len(setup.names) // 4
    assert spent <= roles * (4 + 3 + 2 + 1) + 6, "those of all changes, the base's own, and few more at chunks' ends"
    assert [loss for *_, loss in found] == [evaluator.evaluate({**base, name: "int2"}) for name, _, _ in found]


def test_a_weight_is_dequantized_once_per_block_for_all() -> None:
    setup = Setup("llama")
    evaluator = setup.evaluator(setup.model)
    configurations = [setup.mixed(seed) for seed in range(TOGETHER)]
    setup.bank.asked.clear()
    flat(evaluator.evaluate_many(configurations))
    assert len(setup.bank.asked) == len(set(setup.bank.asked))
    assert set(setup.bank.asked) == {i for c in configurations for i in c.items() if i[1] != "16bit"}


def test_what_is_kept_ready_is_within_the_limit() -> None:
    setup = Setup("llama")
    swap = setup.evaluator(setup.model, cache_memory=20_000)._swap
    for seed in range(6):
        swap.apply(setup.mixed(seed), setup.bank)
        spare = sum(made.nbytes for some in swap._made.values() for made in list(some.values())[:-1])
        assert spare == swap._spare <= 20_000
    swap.trim(setup.names + setup.outer)
    assert swap._spare == 0 and all(len(some) == 1 for some in swap._made.values())
    swap.release(setup.names + setup.outer)
    assert not swap._made and not swap._current and not swap._full


def test_a_configuration_that_is_wrong_is_refused_before_any_is_measured() -> None:
    setup = Setup("llama")
    evaluator = setup.evaluator(setup.model)
    good = setup.mixed(1)
    with pytest.raises(AmqError, match="disagree about linear"):
        next(evaluator.evaluate_many([good, {**good, "model.layers.9": "int2"}]))
    assert flat(evaluator.evaluate_many([])) == []
    Configuration(good, 32).check(setup.inventory.linears, outer=setup.inventory.outer)
