"""Simulated activations of `amq eval`: against rounding by hand, in full precision, of a checkpoint, and from disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import byte_tokenizer, tiny_llama
from torch import Tensor, nn

from amq.errors import AmqError
from amq.eval import evaluate
from amq.eval.result import Evaluation, table
from amq.eval.settings import EvalSettings
from amq.eval.simulated import Simulated
from amq.formats import get_format
from amq.model.inventory import get_linear, take_inventory
from amq.rotation import rotate

pytestmark = pytest.mark.usefixtures("cache", "one_thread")
TEXT = "".join(f"Window {i} says {i * i}; " for i in range(100))
OPTIONS: dict[str, Any] = {"window_length": 64, "max_tokens": 128, "group_size": 32}
NAMES = ("int8", "int4")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def rounded(x: Tensor, fmt: str, group: int, rotated: bool) -> Tensor:
    """Token by token and group by group."""
    turn = rotate if rotated and x.shape[-1] % 64 == 0 else lambda own: own
    most, result = get_format(fmt).levels // 2 - 1, turn(x).clone()
    for row in result.view(-1, x.shape[-1]):
        for part in row.split(group):
            step = float(part.abs().max()) / most
            part.copy_((part / step).round().clamp(-most, most) * step)
    return turn(result)


@contextmanager
def by_hand(model: nn.Module, how: Simulated) -> Iterator[None]:
    """Every linear of the blocks replaced by a function of rounded inputs."""
    kept = {}
    for spec in take_inventory(model).linears:
        module = get_linear(model, spec.name)
        kept[module] = own = module.forward
        module.forward = lambda x, own=own: own(rounded(x, how.activations, how.group_size, how.rotated))
    yield
    for module in kept:
        del module.forward


def loss(model: nn.Module) -> float:
    tokens = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])[:128].view(2, 64)
    return sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in tokens) / 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rotated", [False, True])
def test_rounding_is_that_by_hand(name: str, rotated: bool) -> None:
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)) ** 3
    seen = Simulated(name, 32, rotated).round(x)
    torch.testing.assert_close(seen, rounded(x, name, 32, rotated), rtol=1e-5, atol=1e-5)
    assert Simulated(name, 32, rotated).round(x.bfloat16()).dtype is torch.bfloat16
    assert Simulated(name, 32, True).round(x[..., :96]).equal(Simulated(name, 32, False).round(x[..., :96]))


def test_rows_of_a_model(tiny_folder: Path, text: str, tmp_path: Path) -> None:
    result = evaluate(str(tiny_folder), uniform="int4", text=text, calibration=text, proxy="rtn",
                      simulate_activations="int4,int8", **OPTIONS)  # fmt: skip
    expected = [Simulated(name, 32, rotated) for name in NAMES for rotated in (False, True)]
    assert [row.simulated for row in result.rows] == [None, *expected, None]
    assert result.rows[1].name == "full, int8 activations (simulated)"
    assert result.rows[4].name == "full, int4 activations, rotated (simulated)"
    for row in result.rows[1:5]:
        model = tiny_llama()
        with by_hand(model, row.simulated):
            assert row.negative_log_likelihood == pytest.approx(loss(model), rel=1e-4), row.name
    losses = [row.negative_log_likelihood for row in result.rows]
    assert len(set(losses[:5])) == 5 and losses[0] == pytest.approx(loss(tiny_llama()), rel=1e-5)
    plain = evaluate(str(tiny_folder), uniform="int4", text=text, calibration=text, proxy="rtn", **OPTIONS)
    assert plain.rows == (result.rows[0], result.rows[5]), "a hook stayed in the model"
    path = tmp_path / "table.json"
    result.write(path)
    assert Evaluation.read(path) == result and table(result).count("(simulated)") == 4


def test_rows_of_a_checkpoint(text: str, tmp_path: Path) -> None:
    """On its dequantized weights, in its own group size, whatever runs it."""
    folder = str(tiny_checkpoint(tiny_llama(), tmp_path / "quantized"))
    options = {**OPTIONS, "group_size": 128, "text": text, "simulate_activations": "int4"}
    first = evaluate(folder, **options)
    assert [row.name for row in first.rows] == ["quantized", *(f"quantized dequantized, int4 activations{r} (simulated)"
                                                               for r in ("", ", rotated"))]  # fmt: skip
    both = evaluate(folder, dequantized=True, **options)
    reference = evaluate(folder, backend="reference", **options)
    assert both.rows[2:] == first.rows[1:] == reference.rows[1:] and both.rows[1] == reference.rows[0]
    assert {row.simulated.group_size for row in first.rows[1:]} == {32}
    assert len({row.negative_log_likelihood for row in reference.rows}) == 3


def test_a_model_on_disk_is_rounded_alike(tiny_folder: Path, text: str) -> None:
    options = {**OPTIONS, "text": text, "simulate_activations": "int4"}
    there, here = (evaluate(str(tiny_folder), load=load, **options).rows for load in ("disk", "memory"))
    assert there == here


def test_widths_that_cannot_be_rotated_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(96, 8)})
    with Simulated("int4", 32, True).within(model, ["a", "b"]):
        pass
    assert "inputs of 1 of 2 linears are not rotated, 64 does not divide them" in caplog.text
    with pytest.raises(AmqError, match="unknown format 'int9'"):
        EvalSettings.make(model="m", simulate_activations="int9")
    with pytest.raises(AmqError, match="group size 48"):
        EvalSettings.make(model="m", simulate_activations="int4", group_size=48)
