"""`amq eval order`: configurations of a size, deployed losses against a checkpoint's, orders, a table that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import analytic

import amq
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.eval.__main__ import main
from amq.eval.order import deployed_loss, run_order
from amq.eval.order_settings import OrderSettings
from amq.eval.order_table import OrderEntry, OrderTable, agreements, markdown
from amq.model.losses import jensen_shannon
from amq.model.open import load_model
from amq.model.text import WindowSampler
from amq.quantize.methods import METHODS
from amq.search.conduct import Timings
from amq.search.draws import band_points, spread_points
from amq.search.run import prepare
from amq.util.progress import Progress
from amq.util.settings import parse_command, run_command

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
TEXT = "".join(f"Window {i} says {i * i}; " for i in range(400))


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Small: 4 configurations of all sizes, and 4 of one budget."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return {
        "model": str(tiny_folder), "output": str(tmp_path / "order"), "calibration": str(text), "group_size": 32,
        "window_length": 32, "windows": 1, "bank_windows": 2, "deploy_windows": 2, "spread": 4, "within": 4,
        "budgets": "4", "width": 0.3, "banks": "rtn", "methods": "rtn",
    }  # fmt: skip


def flags(arguments: dict[str, Any]) -> list[str]:
    given = {n: v for n, v in arguments.items() if n != "model"}
    return [arguments["model"], *(part for n, v in given.items() for part in (f"--{n.replace('_', '-')}", str(v)))]


# configurations


def test_spread_points_cover_all_sizes_evenly() -> None:
    of = analytic.space(blocks=12)
    points = spread_points(of, 30, np.random.default_rng(0))
    counts, _ = np.histogram(of.bits(points), bins=3, range=of.bits_range)
    assert counts.min() >= 7 and len(np.unique(points, axis=0)) > 25


def test_points_of_a_band_differ_and_keep_to_it() -> None:
    of = analytic.space(blocks=12)
    points = band_points(of, 3.5, 0.05, 20, np.random.default_rng(0))
    bits = of.bits(points)
    assert bits.min() >= 3.45 - 1e-9 and bits.max() <= 3.5 + 1e-9
    assert len(np.unique(points, axis=0)) == 20
    widest = (points == len(of.formats) - 1).mean(axis=1)
    assert np.ptp(widest) > 0.2, "mixes of all kinds: much of the middle, or of both ends"
    assert np.array_equal(points, band_points(of, 3.5, 0.05, 20, np.random.default_rng(0)))


def test_a_band_that_holds_too_few_is_refused() -> None:
    of = analytic.space(blocks=1)
    with pytest.raises(AmqError, match="1 of 5 different configurations were found from 2.499 to 2.5 bits"):
        band_points(of, 2.5, 0.001, 5, np.random.default_rng(0))
    with pytest.raises(AmqError, match="a budget of 9 bits per weight is above the largest configuration"):
        band_points(of, 9.0, 0.1, 5, np.random.default_rng(0))


# losses


@pytest.mark.parametrize("method", METHODS)
def test_a_deployed_loss_is_a_checkpoint_s(
    method: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `amq quantize` with the same windows; and the model is itself again afterwards."""
    settings = OrderSettings.make(**{**arguments, "rotation": "none"})
    stage = prepare(settings.search("rtn"), Progress(), Timings())
    before = {n: p.clone() for n, p in stage.opened.model.named_parameters()}
    formats = {s.name: ("int2", "int4")[i % 2] for i, s in enumerate(stage.quantized.linears)}
    found = deployed_loss(stage, method, settings, formats)
    assert all(torch.equal(p, before[n]) for n, p in stage.opened.model.named_parameters())
    assert deployed_loss(stage, method, settings, formats) == found
    monkeypatch.setattr(WindowSampler, "take", lambda self, count: stage.cost_windows)
    Configuration(formats, settings.group_size).save(tmp_path / "configuration.json")
    amq.quantize(
        settings.model, str(tmp_path / "checkpoint"), configuration=str(tmp_path / "configuration.json"),
        method=method, calibration=settings.calibration, windows=2, window_length=32, rotation="none",
        perplexity="none",
    )  # fmt: skip
    tokens = stage.evaluator._windows["search"]
    with torch.no_grad():
        models = [load_model(name).model for name in (settings.model, str(tmp_path / "checkpoint"))]
        full, made = (m(tokens).logits[:, stage.corpus.unscored :].flatten(0, 1).log_softmax(-1) for m in models)
    assert found == pytest.approx(float(jensen_shannon(full, made).mean()), rel=0.02)


def test_orders_by_hand() -> None:
    table = OrderTable(
        settings=OrderSettings.make(model="m", output="o"), fingerprint="f", measured_by="e", text="t", windows="w",
        entries=tuple(
            OrderEntry(part=part, point="01", bits=3.0, banks={"hqq": bank}, deployed={"awq": deployed})
            for part, bank, deployed in (("all", 1.0, 0.1), ("all", 2.0, 0.2), ("all", None, 0.3), ("3", 0.1, 0.3),
                                         ("3", 0.2, 0.2), ("3", 0.3, 0.4))
        ),
    )  # fmt: skip
    size, budget = agreements(table)
    assert (size.part, size.configurations, budget.part, budget.configurations) == ("all", 6, "3", 3)
    assert budget.spearman == pytest.approx(0.5) and budget.kendall == pytest.approx(1 / 3, abs=1e-4)
    assert budget.regret == pytest.approx(0.5), "0.3 where 0.2 is among them"
    assert size.regret == pytest.approx(2.0) and size.spearman == pytest.approx(-0.4708, abs=1e-4)
    lacking = replace(table, entries=(replace(table.entries[0], deployed={}), *table.entries[1:]))
    assert [row.part for row in agreements(lacking)] == ["3"] and lacking.lacking("deployed", "awq") == [0]
    assert "| hqq | awq | – | 0.50 / 0.33, 50.0 % |" in markdown(replace(lacking, rows=tuple(agreements(lacking))))


# the command


def test_the_command_writes_its_table_and_goes_on(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(arguments["output"])
    assert main(["order", *flags(arguments)]) == 0
    shown = capsys.readouterr().out
    assert "| bank | deployed | all sizes (8) | 4 bits (4) |" in shown and "wrote " in shown
    table = OrderTable.read(output / "order.json")
    assert [entry.part for entry in table.entries] == ["all"] * 4 + ["4"] * 4
    assert all(3.7 <= entry.bits <= 4.0 for entry in table.entries[4:])
    for row in table.rows:  # without calibration, what is measured is what is deployed
        assert row.spearman == pytest.approx(1.0) and row.regret == 0.0
    for entry in table.entries:
        assert entry.deployed["rtn"] == pytest.approx(entry.banks["rtn"], rel=1e-3)
    assert (output / "order.md").read_text() in shown
    # another method: the losses that are there are not measured again
    monkeypatch.setattr("amq.proxy.evaluator.Evaluator.evaluate_many", None)
    more = run_order(OrderSettings.make(**{**arguments, "methods": "rtn,hqq"}))
    assert [(row.method, row.part) for row in more.rows] == [("rtn", "all"), ("rtn", "4"), ("hqq", "all"), ("hqq", "4")]
    monkeypatch.setattr("amq.eval.order.prepare", None)
    assert run_order(OrderSettings.make(**arguments)).entries == more.entries


def test_examples_are_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for line in OrderSettings.EXAMPLES:
        amq_, *words = line.split()
        assert (amq_, words[:2]) == ("amq", ["eval", "order"])
        OrderSettings.make(**parse_command(words[2:], OrderSettings))
    with pytest.raises(SystemExit):
        main(["order", "--help"])
    assert OrderSettings.ABOUT[1:] in capsys.readouterr().out


def test_bad_input(arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(**given: Any) -> str:
        assert run_command(main, ["order", *flags({**arguments, **given})]) == 2
        return capsys.readouterr().err

    assert "--methods: 'gguf' is none of awq, gptq" in refused(methods="gguf")
    assert "--banks: 'awq' is none of gptq" in refused(banks="awq")
    assert "--budgets names no budget" in refused(budgets="")
    assert "--spread must be at least 4, got 3" in refused(spread=3)
    assert "--load disk: configurations are deployed in a model that is in memory whole" in refused(load="disk")
    assert "--method awq does not rotate" in refused(methods="awq", rotation="64")
    assert "a budget of 2 bits per weight is below the smallest configuration" in refused(budgets="2")
    assert not Path(arguments["output"]).exists()
    assert main(["order", *flags(arguments)]) == 0
    capsys.readouterr()
    assert "another settings" not in refused(within=5) and "--within was 4, is 5" in refused(within=5)
    (tmp_path / "text.txt").write_text(TEXT + "more")
    assert "holds a table of another text" in refused(methods="rtn,clip")
