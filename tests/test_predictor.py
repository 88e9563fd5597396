"""`amq eval predictor`: synthetic losses by hand, what predictors can and cannot know, and a table that goes on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import analytic
from helpers.runs import make_run

from amq.errors import AmqError
from amq.eval.__main__ import main
from amq.eval.predictor import Trial, open_costs, run_predictor
from amq.eval.predictor_settings import CASES, RARE, UNSEEN, PredictorSettings
from amq.eval.predictor_table import PredictorRow, PredictorTable, markdown
from amq.model.losses import LN2
from amq.search.records import Cost
from amq.search.synthetic import SyntheticLosses, additive, measured_costs, with_outliers, without_widest
from amq.util.settings import parse_command, run_command


@pytest.fixture(autouse=True)
def no_warnings_of_small_archives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 blocks, 32 linears."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", weights=analytic.linears(8), head="16bit").path


def settings(run: Path, output: Path, **given: Any) -> PredictorSettings:
    small = {"sizes": "20,150", "seeds": "0", "questions": 60, "width": 0.2, "budget": 3.2}
    return PredictorSettings.make(**{"table": str(run), "output": str(output), **small, **given})


# losses


def test_losses_by_hand() -> None:
    costs = np.array([[0.4, 0.1], [0.9, 0.4], [0.0, 0.0]])
    losses = SyntheticLosses(costs, np.array([0.5, -1.0]), 0.8)
    points = np.array([[0, 0, 0], [1, 1, 1], [1, 0, 1]])
    totals = np.array([1.3 + 0.8 * 0.5 * 0.6, 0.5 + 0.8 * 0.5 * 0.2, 1.0 + 0.8 * 0.5 * 0.3])
    assert losses(points) == pytest.approx(LN2 * (1 - np.exp(-totals / LN2)))
    assert additive(costs, points) == pytest.approx([1.3, 0.5, 1.0])


def test_losses_are_never_negative() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(-4, 2, (30, 3))
    for seed in range(20):
        losses = SyntheticLosses.draw(costs, 1.0, np.random.default_rng(seed))
        assert losses(rng.integers(0, 3, (100, 30))).min() >= 0


def test_measured_costs_are_those_of_an_additive_loss() -> None:
    """But for the widest format, which is the same for all; with interaction they are not."""
    costs = np.random.default_rng(0).lognormal(-5, 1, (12, 3))
    found, evaluations = measured_costs(SyntheticLosses.draw(costs, 0.0, np.random.default_rng(0)))
    assert evaluations == 12 * 2 + 1
    assert found == pytest.approx((costs - costs[:, -1:]) / LN2**2 * LN2, rel=1e-6)
    other, _ = measured_costs(SyntheticLosses.draw(costs, 0.5, np.random.default_rng(0)))
    assert not np.allclose(other, found, rtol=1e-2)


def test_outliers_are_a_share_of_the_cheapest_format() -> None:
    costs = np.ones((40, 3))
    changed = with_outliers(costs, 0.1, 30, np.random.default_rng(0))
    assert (changed[:, 0] == 30).sum() == 4 and bool((changed[:, 1:] == 1).all())
    assert (with_outliers(costs, 1e-6, 30, np.random.default_rng(0)) == 30).sum() == 1


def test_the_widest_format_is_rare_or_absent() -> None:
    of = analytic.space(blocks=12)
    assert without_widest(of, 50, 0.0, np.random.default_rng(0)).max() == 1
    share = (without_widest(of, 400, 0.05, np.random.default_rng(0)) == 2).mean()
    assert share == pytest.approx(0.05, abs=0.01)


# predictors


def test_what_predictors_can_know(run: Path, tmp_path: Path) -> None:
    """Without interaction additive predictors are exact, but the table where it does not know of outliers; radial
    functions learn with the archive, and least about a format that they have not seen."""
    table = run_predictor(settings(run, tmp_path / "p", interaction=0.0, share=0.2, factor=100, sizes="20,40,600"))
    figure = {(r.case, r.predictor, r.evaluations): r.spearman for r in table.rows}
    for case in CASES:
        assert figure[case, "measured", 65] == pytest.approx(1.0, abs=1e-4)
        assert (figure[case, "table", 0] == pytest.approx(1.0, abs=1e-4)) == (case != "outliers")
        assert figure[case, "rbf", 600] > figure[case, "rbf", 20] - 0.02
    assert figure["clean", "rbf", 600] > 0.98
    assert figure[UNSEEN, "rbf", 600] < figure[RARE, "rbf", 600]


def test_seeds_ask_the_same_in_every_case(run: Path, tmp_path: Path) -> None:
    made = settings(run, tmp_path)
    space, costs = open_costs(made)
    clean, unseen, other = (Trial(made, space, costs, c, s) for c, s in (("clean", 0), (UNSEEN, 0), ("clean", 1)))
    assert all(np.array_equal(a, b) for a, b in zip(clean.questions, unseen.questions, strict=True))
    assert not np.array_equal(clean.questions[0], other.questions[0])
    assert unseen.archive.max() == 1 and max(points.max() for points in unseen.questions) == 2
    bits = space.bits(clean.questions[1])
    assert 3.0 - 1e-9 <= bits.min() and bits.max() <= 3.2 + 1e-9


def test_what_is_needed_is_reached_by_all_larger_archives() -> None:
    made = PredictorSettings.make(table="t", output="o", sizes="10,20,30,40", seeds="0", wanted=0.9)

    def needed(*figures: float) -> int | None:
        rows = (
            PredictorRow(case="clean", predictor="rbf", evaluations=size, seed=0, spearman=value, kendall=0.5,
                         within_spearman=0.5, within_kendall=0.5)
            for size, value in zip((10, 20, 30, 40), figures, strict=True)
        )  # fmt: skip
        return PredictorTable(settings=made, costs="c", linears=1, rows=tuple(rows)).needed("clean", "rbf", "spearman")

    assert needed(0.95, 0.8, 0.9, 0.99) == 30
    assert needed(0.9, 0.9, 0.9, 0.9) == 10
    assert needed(0.9, 0.9, 0.9, 0.89) is None


# the command


def flags(made: PredictorSettings) -> list[str]:
    given = {n: v for n, v in made.json().items() if n != "table"}
    return [made.table, *(part for n, v in given.items() for part in (f"--{n}", str(v)))]


def test_the_command_writes_its_table_and_goes_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    assert main(["predictor", *flags(settings(run, output, cases="clean,unseen"))]) == 0
    shown = capsys.readouterr().out
    assert "| case | asked about | additive, table | additive, 65 single | rbf, 20 | rbf, 150 | rbf needs |" in shown
    assert shown.count("| clean |") == shown.count("| unseen |") == 2
    table = PredictorTable.read(output / "predictor.json")
    assert len(table.rows) == 2 * 4 and table.linears == 32
    assert (output / "predictor.md").read_text() == markdown(table) and markdown(table) in shown
    # the rows that are there are not made again, from the cost table alone either
    calls: list[str] = []
    rows = Trial.rows
    monkeypatch.setattr(Trial, "rows", lambda self, name: calls.append(f"{self.case} {self.seed}") or rows(self, name))
    more = run_predictor(settings(run, output, cases="clean", seeds="0,1"))
    assert set(calls) == {"clean 1"} and len(more.rows) == 12 and more.rows[:8] == table.rows
    with pytest.raises(AmqError, match="holds a table of another cost table"):
        run_predictor(settings(run / "cost.json", output, cases="clean"))


def test_real_sensitivities(tmp_path: Path) -> None:
    """Of Llama-2-7B, one linear at 2 bits, as a cost table alone: 224 linears."""
    path = Path(__file__).parents[2] / "shared" / "data" / "llama2_7b_sensitivity.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here: it is not part of the project")
    loss = json.loads(path.read_text())["loss"]
    base = min(loss.values())
    cost = {f"model.layers.{name}": {"int2": value - base, "int4": 0.0} for name, value in loss.items()}
    Cost(kind="sensitivity", unit="nats/token", cost=cost).write(tmp_path / "cost.json")
    made = settings(
        tmp_path / "cost.json", tmp_path / "out", formats="int2,int4", cases="clean,outliers,rare", budget=4.0,
        sizes="50,500",
    )  # fmt: skip
    table = run_predictor(made)
    assert table.linears == 224
    figure = {(r.case, r.predictor, r.evaluations): r.spearman for r in table.rows}
    assert figure["clean", "rbf", 500] > max(0.9, figure["clean", "rbf", 50])
    assert figure["clean", "measured", 225] > 0.95


def test_examples_are_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for line in PredictorSettings.EXAMPLES:
        amq_, *words = line.split()
        assert (amq_, words[:2]) == ("amq", ["eval", "predictor"])
        PredictorSettings.make(**parse_command(words[2:], PredictorSettings))
    with pytest.raises(SystemExit):
        main(["predictor", "--help"])
    assert PredictorSettings.ABOUT[1:] in capsys.readouterr().out


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(**given: Any) -> str:
        assert run_command(main, ["predictor", *flags(settings(run, tmp_path / "out", **given))]) == 2
        return capsys.readouterr().err

    assert "the cost table lacks 'int5'" in refused(formats="int2,int3,int5")
    assert "is not a run folder" in refused(table=str(tmp_path))
    assert "cost.json does not exist" in refused(table=str(tmp_path / "cost.json"))
    assert "a budget of 9 bits per weight is above the largest configuration" in refused(budget=9.0)
    for given, message in (
        ({"cases": "dirty"}, "--cases: 'dirty' is none of clean, outliers, rare, unseen"),
        ({"formats": "int2,int4"}, "--formats int2,int4: case 'unseen' wants 3 formats or more"),
        ({"surrogates": "svm"}, "--surrogates: 'svm' is none of rbf, mlp"),
        ({"sizes": "1,20"}, "--sizes: expected whole numbers from 2 on, got 1"),
        ({"seeds": ""}, "--sizes and --seeds: expected a number or more each"),
        ({"interaction": 1.5}, "--interaction must be from 0 to 1, got 1.5"),
    ):
        with pytest.raises(AmqError) as raised:
            settings(run, tmp_path, **given)
        assert str(raised.value).startswith(message)
    assert not (tmp_path / "out").exists()
