"""Second moments of what experts read, against inputs caught from whole forwards, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mixtures import EXPERTS, MIXTURES, mixture
from helpers.tiny_models import random_tokens
from torch import Tensor, nn

from amq.model import calibration
from amq.model.calibration import FLOAT, CalibrationStream, InputGroup, gram_bytes, in_parts, shared_inputs
from amq.model.experts import Experts
from amq.model.inventory import EXPERT, LinearSpec, get_linear, take_inventory

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = random_tokens(3, 40)
LAYER = "model.layers.0.mlp.experts"


def measured(model: nn.Module, windows: Tensor = WINDOWS) -> tuple[list[InputGroup], tuple[str, ...]]:
    stream = CalibrationStream(model, windows)
    with torch.no_grad():
        groups = stream.measure(take_inventory(model).in_block(0))
    return groups, stream.notes


def caught(model: nn.Module, windows: Tensor = WINDOWS) -> tuple[Tensor, dict[int, Tensor]]:
    """What enters the first layer of experts, and what each expert's down_proj reads, float64 [tokens, features]."""
    layer, entered, own = model.get_submodule(LAYER), [], {i: [] for i in range(EXPERTS)}
    assert isinstance(layer, Experts)
    handles = [layer.register_forward_pre_hook(lambda m, args: entered.append(args[0]))]
    handles += [
        linear.register_forward_pre_hook(lambda m, args, i=i: own[i].append(args[0]))
        for i, linear in enumerate(layer.linears("down_proj"))
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat(entered).double(), {i: torch.cat(x).double() for i, x in own.items() if x}


def mean(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def assert_near(gram: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().mean()))


def own_of(groups: list[InputGroup]) -> dict[int, Tensor]:
    return {g.linears[0].expert: g.gram for g in groups if g.linears[0].role.endswith("down_proj")}  # type: ignore[misc]


@pytest.mark.parametrize("kind", MIXTURES)
def test_gate_and_up_share_all_tokens_and_down_has_its_own(kind: str) -> None:
    model = mixture(kind)
    entered, own = caught(model)
    groups, notes = measured(model)
    (together,) = [g for g in groups if any(s.role.endswith("gate_proj") for s in g.linears)]
    assert {s.role.rpartition(".")[2] for s in together.linears} == {"gate_proj", "up_proj"}
    assert len(together.linears) == 2 * EXPERTS
    assert_near(together.gram, mean(entered))
    downs = own_of(groups)
    assert len(downs) == EXPERTS
    enough = min(len(entered), next(iter(own.values())).shape[1] // calibration.ENOUGH)
    assert any(len(x) >= enough for x in own.values()) and not notes
    for index, x in own.items():
        assert_near(downs[index], mean(x))
    names = [s.name for g in groups for s in g.linears]
    assert sorted(names) == sorted(s.name for s in take_inventory(model).in_block(0))


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_expert_of_few_tokens_is_measured_on_all_of_its_layer(kind: str) -> None:
    """Routed away from experts 1 and 3 (which no token reaches): their gram is that of all tokens, and a note says so;
    the block's output does not change."""
    model = mixture(kind)
    layer = model.get_submodule(LAYER)

    def route(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, index, weights = args
        index = torch.tensor([0, 2], device=index.device).expand_as(index).clone()
        index[0] = torch.tensor([0, 1])  # one token of each window
        return hidden, index, weights

    handle = layer.register_forward_pre_hook(route)
    entered, own = caught(model)
    assert {i: len(x) for i, x in own.items()} == {0: 120, 1: 3, 2: 117}
    expected = {}
    for index in (1, 3):
        reads: list[Tensor] = []
        down = get_linear(model, f"{LAYER}.down_proj.{index}")
        catch = down.register_forward_pre_hook(lambda m, args, reads=reads: reads.append(args[0]))
        with torch.no_grad():
            layer.run(entered.float(), [len(entered) * (i == index) for i in range(EXPERTS)])
        catch.remove()
        expected[index] = mean(reads[0].double())
    groups, notes = measured(model)
    handle.remove()
    downs = own_of(groups)
    for index, gram in expected.items():
        assert_near(downs[index], gram)
    assert_near(downs[2], mean(own[2]))
    least = get_linear(model, f"{LAYER}.down_proj.0").in_features // calibration.ENOUGH
    assert notes == (
        f"{LAYER}: 2 of 4 experts saw fewer than {least} of 120 calibration tokens (1, 3): their down_proj is "
        "calibrated with all of them; no token reached 3",
    )
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_matrices_of_experts_are_measured_in_parts() -> None:
    model = mixture("qwen3_moe")
    linears = take_inventory(model).in_block(0)
    one = FLOAT * 48**2
    parts = in_parts(linears, 3 * one)
    assert [sum(s.role.endswith("down_proj") for s in part) for part in parts] == [3, 1]
    assert sorted(s.name for part in parts for s in part) == sorted(s.name for s in linears)
    assert all(len(part) == 1 for part in in_parts(linears, 0)[1:]) and len(in_parts(linears)) == 1
    whole, _ = measured(model)
    stream = CalibrationStream(model, WINDOWS)
    with torch.no_grad():
        divided = [group for part in in_parts(linears, 0) for group in stream.measure(part)]
    expected = {g.linears: g.gram for g in whole}
    assert len(divided) == len(expected)
    for group in divided:
        assert torch.equal(group.gram, expected[group.linears])


@pytest.mark.parametrize("kind", ["qwen3_moe"])
def test_states_that_do_not_fit_in_memory_go_to_disk(kind: str, cache: Path) -> None:
    model = mixture(kind)
    inventory = take_inventory(model)
    streams = [CalibrationStream(model, WINDOWS), CalibrationStream(model, WINDOWS, memory=0)]
    with torch.no_grad():
        for block in range(2):
            resident, spilled = (stream.measure(inventory.in_block(block), advance=True) for stream in streams)
            assert [g.linears for g in resident] == [g.linears for g in spilled]
            assert all(torch.equal(a.gram, b.gram) for a, b in zip(resident, spilled, strict=True))
    assert streams[0]._states.spilled == 0 and streams[1]._states.spilled == WINDOWS.numel() * 64 * FLOAT


def test_bytes_of_matrices() -> None:
    def spec(role: str, features: int, expert: int | None = None) -> LinearSpec:
        name, kind = (role, "linear") if expert is None else (f"model.layers.0.{role}.{expert}", EXPERT)
        return LinearSpec(name, 0, role, 8, features, kind, expert)

    linears = [spec("q", 10), spec("k", 10), *(spec("mlp.experts.gate_proj", 20, i) for i in range(3))]
    linears += [*(spec("mlp.experts.up_proj", 20, i) for i in range(3))]
    linears += [spec("mlp.experts.down_proj", 30, i) for i in range(3)]
    assert gram_bytes(linears, {"k"}) == FLOAT * (10**2 + 20**2 + 3 * 30**2)


@pytest.mark.parametrize("kind", MIXTURES)
def test_shared_inputs_leave_experts_out(kind: str) -> None:
    model = mixture(kind)
    groups = shared_inputs(model, take_inventory(model).linears, WINDOWS[:1, :8])
    assert [[n.rpartition(".")[2] for n in group] for group in groups] == 2 * [["q_proj", "k_proj", "v_proj"]]
