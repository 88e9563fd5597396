"""Losses by the native engine are those of the reference: every family, head and embeddings, what is kept."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.engine_cases import CASES
from helpers.fake_bank import FakeBank
from helpers.tiny_models import ARCHITECTURES, random_tokens
from torch import Tensor, nn

from amq.model.inventory import take_inventory
from amq.model.open import LoadedModel
from amq.proxy.evaluator import Evaluator
from amq.proxy.native import NativeStates
from amq.runtime.families import Unsupported

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("int2", "int3", "int4", "int8")
FAMILIES = ("llama", "llama-biased", "mistral", "qwen2-windows", "qwen3", "gemma2", "gemma4", "phi3",
            "qwen3_moe", "gpt_oss", "qwen3_5", "lfm2", "gemma4 with images")  # fmt: skip


class Setup:
    """A tiny model with a bank of all its weights; windows of 50 tokens unless `length` says otherwise."""

    def __init__(self, model: nn.Module, length: int = 50) -> None:
        self.model, self.inventory = model, take_inventory(model)
        self.loaded = LoadedModel(model, None, "tiny")
        self.bank = FakeBank(model, NAMES)
        self.windows = {"search": random_tokens(6, length, seed=1), "confirm": random_tokens(2, length, seed=2)}

    def native(self, activations: str = "fp32", **options: Any) -> NativeStates:
        return NativeStates(self.loaded, self.inventory, 32, activations, **options)

    def evaluator(self, native: NativeStates | None = None, **options: Any) -> Evaluator:
        if native is not None:
            options = {"backend": "cpu", "activations": native.activations, **options}
        return Evaluator(self.loaded, self.inventory, self.bank, self.windows, native=native, **options)

    def mixed(self, seed: int) -> dict[str, str]:
        """Every third leaves head and embeddings as they are; a sixth of the linears keeps 16 bits."""
        generator = random.Random(seed)
        chosen = {s.name: generator.choice((*NAMES, *NAMES, "16bit")) for s in self.inventory.linears}
        return {**chosen, **{s.name: generator.choice(NAMES) for s in self.inventory.outer if seed % 3}}


def flat(evaluator: Evaluator, configurations: list[dict[str, str]], windows: str = "search") -> list[float]:
    """The losses; the model is as it was afterwards."""
    losses = [loss for some in evaluator.evaluate_many(configurations, windows) for loss in some]
    evaluator.restore()
    return losses


@pytest.fixture
def setup() -> Setup:
    return Setup(CASES["llama"]())


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_reference(family: str) -> None:
    setup = Setup(CASES[family]())
    configurations = [setup.mixed(seed) for seed in range(6)]
    expected = flat(setup.evaluator(), configurations)
    assert len(set(expected)) == 6
    native = setup.native()
    setup.bank.asked.clear()
    assert flat(setup.evaluator(native), configurations) == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert setup.bank.asked, "the weights came from elsewhere"


@pytest.mark.parametrize("length", [8, 300, 512, 700])
def test_windows_of_any_length(length: int) -> None:
    """Many in one pass, a part of a batch, one in a pass, and one in two."""
    setup = Setup(CASES["qwen3"](max_position_embeddings=1024) if length > 512 else CASES["qwen3"](), length)
    formats = setup.mixed(1)
    for windows in setup.windows:
        expected = flat(setup.evaluator(), [formats], windows)[0]
        assert flat(setup.evaluator(setup.native()), [formats], windows)[0] == pytest.approx(expected, rel=1e-4)


def test_long_texts_have_angles_of_their_own() -> None:
    """Of phi3's longrope, whose border is at 96 tokens here."""
    for length in (90, 120):
        setup = Setup(CASES["phi3 longrope"](), length)
        expected = flat(setup.evaluator(), [setup.mixed(2)])[0]
        assert setup.evaluator(setup.native()).evaluate(setup.mixed(2)) == pytest.approx(expected, rel=1e-3)


def test_eight_bits_are_near_and_not_the_same(setup: Setup) -> None:
    configurations = [setup.mixed(seed) for seed in range(4)]
    exact = torch.tensor(flat(setup.evaluator(), configurations))
    rounded = torch.tensor(flat(setup.evaluator(setup.native("int8")), configurations))
    assert 1e-6 < float((rounded - exact).abs().max()) < 0.1 * float(exact.min())


def test_nothing_depends_on_order_memory_or_what_was_measured_before(setup: Setup) -> None:
    configurations = [setup.mixed(seed) for seed in range(5)]
    evaluator = setup.evaluator(setup.native("int8"))
    expected = flat(evaluator, configurations)
    assert flat(evaluator, configurations[::-1]) == expected[::-1]
    native = setup.native("int8", memory=0)
    assert flat(setup.evaluator(native, cache_memory=0), configurations) == expected
    assert native.room == 0
    small = setup.native("int8", memory=5000)
    assert flat(setup.evaluator(small), configurations) == expected
    assert 0 <= small.room < 5000, "nothing was kept"


def test_weights_are_made_once(setup: Setup) -> None:
    native = setup.native()
    evaluator = setup.evaluator(native)
    formats = dict.fromkeys(setup.mixed(0), "int4")
    first = evaluator.evaluate(formats)
    setup.bank.asked.clear()
    assert evaluator.evaluate(formats) == first and not setup.bank.asked
    other = FakeBank(setup.model, NAMES)
    tokens: list[Tensor] = [setup.windows["search"]]
    native.final(formats, other, tokens)
    assert {name for name, _ in other.asked} == set(formats), "another bank's weights were taken for this one's"


def test_sensitivities_are_losses(setup: Setup) -> None:
    base = dict.fromkeys((s.name for s in setup.inventory.linears), "int8")
    changes = [(s.name, "int2") for s in setup.inventory.linears]
    found = list(setup.evaluator(setup.native()).sensitivities(base, changes))
    expected = list(setup.evaluator().sensitivities(base, changes))
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=1e-3)


def test_the_model_stays_as_it_is(setup: Setup) -> None:
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    evaluator = setup.evaluator(setup.native())
    evaluator.evaluate(setup.mixed(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.model.state_dict().items())


def test_sixteen_bits() -> None:
    """A model in bfloat16 is read as it is; its own forward rounds more than this one."""
    setup = Setup(CASES["llama"]().bfloat16())
    expected = flat(setup.evaluator(), [setup.mixed(1)])[0]
    assert setup.evaluator(setup.native()).evaluate(setup.mixed(1)) == pytest.approx(expected, rel=0.05)


def test_unknown_family() -> None:
    with pytest.raises(Unsupported, match="not opt"):
        Setup(ARCHITECTURES["opt"].build()).native()


def test_another_computation_is_refused(setup: Setup) -> None:
    """What config.json says and the model does not do: 10,000 is the base that it was built with."""
    setup.model.config.rope_parameters = {**setup.model.config.rope_parameters, "rope_theta": 500.0}
    with pytest.raises(Unsupported, match="differ from those of LlamaForCausalLM by"):
        setup.native()


def test_a_weight_that_the_family_does_not_have(setup: Setup) -> None:
    setup.model.model.layers[0].self_attn.gate_norm = nn.LayerNorm(64)
    with pytest.raises(Unsupported, match="gate_norm"):
        setup.native()
