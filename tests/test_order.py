"""Order equivalence: configurations spread over the budget, correlations, and the walk that measures them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import random_tokens, tiny_llama
from order import OrderSettings, Walk, correlations, main, order_equivalence, spread_configurations

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import FORMATS
from amq.model.calibration import CalibrationStream
from amq.model.inventory import get_linear, take_inventory
from amq.model.losses import jensen_shannon
from amq.packing import dequantize
from amq.quantize.methods import METHODS
from amq.quantize.quantizers import rtn
from amq.util.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
SMALL = [FORMATS[name] for name in ("int2", "int3", "int4")]


def test_configurations_cover_the_budget_evenly() -> None:
    linears = take_inventory(tiny_llama(num_hidden_layers=8)).linears
    configurations = spread_configurations(linears, SMALL, 32, 30, seed=0)
    bits = [Configuration(c, 32).bits_per_weight(linears) for c in configurations]
    low, high = (f.bits_per_weight(32) for f in (SMALL[0], SMALL[-1]))
    counts, _ = np.histogram(bits, bins=3, range=(low, high))
    assert counts.min() >= 7
    assert len({tuple(c.values()) for c in configurations}) > 25
    assert configurations == spread_configurations(linears, SMALL, 32, 30, seed=0)
    assert configurations != spread_configurations(linears, SMALL, 32, 30, seed=1)


def test_correlations_of_known_orders() -> None:
    bits = np.linspace(2, 4, 25)
    same = correlations(-bits, -2 * bits, bits)
    assert same == {
        "spearman": pytest.approx(1),
        "kendall": pytest.approx(1),
        "spearman_within_bands": pytest.approx(1),
    }
    # Equal over the whole range, opposite among neighbours: size alone ranks them.
    order = np.arange(25)
    opposite = correlations(order // 5 * 100 + order % 5, order // 5 * 100 - order % 5, bits)
    assert opposite["spearman"] > 0.9 and opposite["spearman_within_bands"] == pytest.approx(-1)


@pytest.mark.parametrize("unscored", [0, 1])
def test_the_walk_measures_what_the_assembled_model_would(unscored: int) -> None:
    """Losses from the block-by-block walk equal those of whole models with the same weights.

    unscored: leading positions of every window that have no loss.
    """
    model = tiny_llama()
    parts = take_inventory(model)
    windows = random_tokens(2, 40)
    configurations = spread_configurations(parts.linears, SMALL, 32, 3, seed=0)
    walk = Walk(model, 32, {"rtn": METHODS["rtn"]}, configurations, windows, unscored)
    stream = CalibrationStream(model, random_tokens(2, 40, seed=1))
    for block in range(parts.n_blocks):
        groups = stream.measure(parts.in_block(block), advance=True)
        walk.block(block, groups, [None] * len(groups))
    found = walk.losses(Progress())["rtn"]
    with torch.no_grad():
        reference = model(windows).logits[:, unscored:].flatten(0, 1).log_softmax(-1)
        for formats, loss in zip(configurations, found, strict=True):
            whole = tiny_llama()
            for name, fmt in formats.items():
                linear = get_linear(whole, name)
                packed = rtn.quantize([linear.weight], [FORMATS[fmt]], 32)[0][fmt]
                linear.weight.data = dequantize(packed)
            found_here = whole(windows).logits[:, unscored:].flatten(0, 1).log_softmax(-1)
            expected = jensen_shannon(reference, found_here).mean()
            assert loss == pytest.approx(float(expected), rel=1e-4)


def test_the_command_writes_its_figures_and_a_plot(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(2000)))
    arguments = f"{tiny_folder} --output {tmp_path / 'out'} --samples 10 --group-size 32 --calibration {text} "
    assert main((arguments + "--calibration-windows 2 --windows 2 --window-length 48").split()) == 0
    content = json.loads((tmp_path / "out" / "order.json").read_text())
    assert {(r["proxy"], r["deployed"]) for r in content["correlations"]} == {("hqq", "awq"), ("hqq", "gptq")}
    assert {name: len(values) for name, values in content["losses"].items()} == {"hqq": 10, "awq": 10, "gptq": 10}
    assert content["correlations"][0]["spearman"] > 0.5  # more bits are better, for any method
    assert (tmp_path / "out" / "order.png").stat().st_size > 10_000
    assert "Spearman" in capsys.readouterr().out


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(AmqError, match="unknown method 'gguf': expected one of"):
        order_equivalence(OrderSettings("smollm2", output=str(tmp_path), deployed="gguf"))
    with pytest.raises(AmqError, match="--samples 3 is too small"):
        order_equivalence(OrderSettings("smollm2", output=str(tmp_path), samples=3))
