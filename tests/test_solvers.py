"""Solvers on an analytic loss whose front is known: the knapsack over the true costs."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.analytic import AnalyticLosses, expert_linears, linears, lines, settings, solve, space, untied_head
from helpers.analytic import problem as make

from amq.configuration import parse_pins
from amq.errors import AmqError
from amq.model.inventory import Inventory
from amq.search.archive import Archive
from amq.search.choose import Budget, choose
from amq.search.front import hypervolume, pareto_indices, spread
from amq.search.knapsack import select, select_exact
from amq.search.loss_curve import fit_records
from amq.search.problem import Problem, TimeIsUp
from amq.search.refine import refine
from amq.search.scores import quality
from amq.search.sensitivity import Sensitivity, measure, prune, sensitivity_costs
from amq.search.settings import PAPER
from amq.search.solvers import SOLVERS
from amq.search.space import SearchSpace
from amq.search.surrogates import SURROGATES


def test_additive_finds_the_known_front(tmp_path):
    problem = solve(tmp_path / "a.jsonl", settings(points=7, exact=True), budget=3.1)
    of, losses = problem.space, problem.losses
    costs = of.variable_costs(losses.table)
    for record in problem.archive.evaluated():
        if record.phase in ("front", "budget"):
            best = of.decode(select_exact(costs, of.sizes, of.capacity(record.bits_per_weight + 1e-6)))
            assert record.loss <= (1 + 1e-6) * losses.evaluate(best)
    fit = fit_records(problem.archive.records, losses.table)
    assert fit.a == pytest.approx(1.0, rel=1e-3) and fit.p == pytest.approx(
        1.0, rel=1e-3
    )  # the loss is this very curve
    assert fit.spearman == pytest.approx(1.0)


def test_measured_sensitivities_recover_additive_costs(tmp_path):
    problem = make(tmp_path / "s.jsonl", settings())
    measured = sensitivity_costs(problem)
    true = problem.losses.table
    for name, row in measured.items():
        for low, high in (("int2", "int3"), ("int3", "int4")):
            assert row[low] - row[high] == pytest.approx(true[name][low] - true[name][high], rel=1e-6, abs=1e-9)
    with pytest.raises(AmqError, match="unknown cost"):
        problem.cost_table("guess")
    with pytest.raises(AmqError, match="unknown solver"):
        SOLVERS["guess"]


def test_the_front_has_a_point_at_every_uniform_cost(tmp_path):
    problem = solve(tmp_path / "a.jsonl", settings(formats="int2,int3,int4,int6", points=6))
    of, records = problem.space, problem.archive.evaluated()
    for fmt in of.formats[1:-1]:
        cost = of.bits_of(of.uniform(fmt))
        within = [r for r in records if r.phase == "front" and r.bits_per_weight <= cost + 1e-6]
        assert min(r.loss for r in within) < problem.archive.find(of.uniform(fmt)).loss
    assert len([r for r in records if r.phase == "front"]) == 6


@pytest.mark.parametrize("solver", ["paper", "random"])
def test_solvers_beat_the_line_between_uniform_points(tmp_path, solver):
    problem = solve(
        tmp_path / "a.jsonl",
        settings(solver=solver, initial=40, iterations=6, per_iteration=8, population=40, generations=8),
    )
    uniform = np.array([(r.bits_per_weight, r.loss) for r in problem.archive.evaluated() if r.phase == "uniform"])
    assert problem.hypervolume() > hypervolume(uniform, problem.space.bits_range)


def test_paper_solver_improves_on_its_initial_sample_and_reports_its_surrogate(tmp_path):
    options = settings(solver="paper", initial=40, iterations=8, per_iteration=8, population=60, generations=10)
    problem = solve(tmp_path / "a.jsonl", options)
    log = problem.surrogate_log
    assert [entry.iteration for entry in log] == list(range(8))
    assert log[-1].hypervolume > log[0].hypervolume
    assert log[-1].spearman > 0.7
    initial = [r for r in problem.archive.evaluated() if r.phase != "iteration"]
    points = np.array([(r.bits_per_weight, r.loss) for r in initial])
    assert problem.hypervolume() > hypervolume(points, problem.space.bits_range)


def test_paper_preset_is_the_papers_setting():
    options = settings(**PAPER)
    assert (options.initial, options.population, options.generations) == (250, 200, 20)
    assert (options.crossover, options.mutation, options.per_iteration, options.iterations) == (0.9, 0.1, 50, 200)
    assert (options.proxy, options.surrogate, options.solver, options.prune) == ("hqq", "rbf", "paper", 2.0)


@pytest.mark.parametrize("surrogate", ["rbf", "mlp"])
def test_surrogates_predict_what_they_have_not_seen(surrogate, caplog):
    of = space()
    losses = AnalyticLosses(of)
    rng = np.random.default_rng(0)
    points = rng.integers(0, 3, (160, len(of.variables)))
    y = np.array([losses.evaluate(of.decode(p)) for p in points])
    model = SURROGATES[surrogate](0)
    model.fit(points[:120], y[:120])
    assert quality(y[120:], model.predict(points[120:]))["spearman"] > 0.8
    with caplog.at_level(logging.WARNING):
        few = SURROGATES["rbf"](0)
        few.fit(points[:8], y[:8])
    assert "constant tail" in caplog.text
    assert np.isfinite(few.predict(points[:20])).all()
    with pytest.raises(AmqError, match="unknown surrogate"):
        SURROGATES["svm"]


def test_quality_by_hand():
    perfect = quality(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    assert perfect == {"rmse": 0.0, "spearman": pytest.approx(1.0), "kendall": pytest.approx(1.0)}
    # by hand: differences 1, −1, 0 → rmse √(2/3); ranks (1,2,3) against (2,1,3): Spearman ½, Kendall ⅓
    swapped = quality(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 3.0]))
    assert swapped["rmse"] == pytest.approx((2 / 3) ** 0.5)
    assert swapped["spearman"] == pytest.approx(0.5) and swapped["kendall"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="one length"):
        quality(np.zeros((3, 1)), np.zeros(3))


def test_pruning_on_real_sensitivities():
    path = Path(__file__).parents[2] / "shared" / "data" / "llama2_7b_sensitivity.json"
    if not path.exists():
        pytest.skip(f"{path} is not here: it is not part of the project")
    loss = json.loads(path.read_text())["loss"]
    median, pinned = prune(loss, 2.0)
    assert len(loss) == 224 and median == pytest.approx(0.01128, abs=1e-5)
    assert len(pinned) == 4


def test_pruned_linears_stay_at_the_highest_format(tmp_path):
    losses = AnalyticLosses(space())
    losses.table["layers.2.attn.v_proj"] = {"int2": 2.0, "int3": 0.5, "int4": 0.0}
    problem = solve(tmp_path / "a.jsonl", settings(solver="random", initial=20), losses)
    drawn = [r for r in problem.archive.records if r.phase == "initial"]
    assert 24 <= len(drawn) <= 28  # initial + iterations · per_iteration, less the few drawn twice
    assert {r.configuration["layers.2.attn.v_proj"] for r in drawn} == {"int4"}


def test_refine_keeps_only_what_the_held_out_windows_confirm(tmp_path):
    of = space()
    problem = make(tmp_path / "a.jsonl", settings())
    noisy = {n: {f: c * np.random.default_rng(i).lognormal(0, 1) for f, c in row.items()}
             for i, (n, row) in enumerate(problem.losses.table.items())}  # fmt: skip
    costs = of.variable_costs(noisy)
    start = of.decode(select(costs, of.sizes, of.capacity(3.3)))
    best = refine(problem, costs, start, 3.3, 60)
    assert problem.losses.evaluate(best) < problem.losses.evaluate(start)
    assert of.bits_of(best) <= 3.3 + 1e-9

    class Contrary(AnalyticLosses):  # whatever helps on the search windows hurts on the held-out ones
        def evaluate(self, formats, windows="search"):
            loss = super().evaluate(formats)
            return loss if windows == "search" else 0.69 - loss

    contrary = make(tmp_path / "b.jsonl", settings(), Contrary(of))
    assert refine(contrary, costs, start, 3.3, 20) == start
    records = contrary.archive.records
    assert any(r.loss < records[0].loss for r in records if r.phase == "refine" and r.windows == "search")
    assert choose(Budget(3.3), of, records).formats == start, "better on the search windows alone is no reason"
    assert choose(Budget(3.3), of, problem.archive.records).formats == best

    resumed = make(
        tmp_path / "c.jsonl", settings(), Contrary(of)
    )  # with --refine, after a run that confirmed its front
    resumed.evaluate(start, "budget")
    resumed.evaluate(start, "confirm", windows="confirm")
    assert refine(resumed, costs, start, 3.3, 20) == start
    assert choose(Budget(3.3), of, resumed.archive.records).formats == start


@pytest.mark.parametrize(("bits", "given", "spent"), [
    (2.6, None, True), (3.6, None, False), (2.6, 0, False), (3.6, 5, True), (None, None, False),
])  # fmt: skip
def test_refinement_is_the_default_where_costs_do_not_add_up(tmp_path, bits, given, spent):
    """2.5 bits of budget are scales and codes of int2, at group 64."""
    options = settings(refine=given)
    problem = make(tmp_path / "a.jsonl", options, budget=bits, max_loss=None if bits else 0.2)
    said = []
    problem.progress.say = said.append
    SOLVERS["additive"](problem, options)
    phases = {r.phase for r in problem.archive.records}
    assert ("refine" in phases) is spent
    assert bool(said) is (spent and given is None)
    if said:
        assert "40 more evaluations" in said[0] and "--refine 0" in said[0]


def test_what_the_linears_get_is_without_the_head():
    of = space(outer=untied_head())
    formats = {s.name: "int8" if s in untied_head() else "int2" for s in of.weights}
    assert of.bits_of_linears(formats) == space().bits_of(space().uniform(space().formats[0])) < 3 < of.bits_of(formats)


def test_time_is_up_stops_between_evaluations(tmp_path):
    with pytest.raises(TimeIsUp):
        solve(tmp_path / "a.jsonl", settings(), deadline=time.monotonic() - 1)
    assert (tmp_path / "a.jsonl").read_text() == ""


def test_a_search_that_is_stopped_has_its_cost_table(tmp_path):
    problem = make(tmp_path / "a.jsonl", settings())
    problem.evaluate(problem.space.uniform(problem.space.formats[-1]), "uniform")
    assert problem.table is None
    problem.deadline = time.monotonic() - 1
    with pytest.raises(TimeIsUp):
        SOLVERS["additive"](problem, settings())
    assert problem.table == problem.cost_table(settings().cost)


def test_max_loss_is_met_with_few_bits(tmp_path):
    problem = solve(tmp_path / "a.jsonl", settings(points=4), max_loss=0.05)
    chosen = choose(Budget(max_loss=0.05), problem.space, problem.archive.records)
    assert chosen.loss <= 0.05
    of, costs = problem.space, problem.space.variable_costs(problem.losses.table)
    cheaper = of.decode(select_exact(costs, of.sizes, of.capacity(chosen.bits_per_weight - 0.08)))
    assert problem.losses.evaluate(cheaper) > 0.05  # nothing much smaller would do
    with pytest.raises(AmqError, match="least is"):
        choose(Budget(max_loss=1e-9), problem.space, problem.archive.records)


def test_choice_at_an_unevaluated_budget_uses_the_table(tmp_path):
    problem = solve(tmp_path / "a.jsonl", settings())
    fit = fit_records(problem.archive.records, problem.losses.table)
    chosen = choose(Budget(2.9), problem.space, problem.archive.records, problem.losses.table, fit)
    assert chosen.loss is None and chosen.bits_per_weight <= 2.9
    assert chosen.predicted == pytest.approx(problem.losses.evaluate(chosen.formats), rel=1e-2)
    with pytest.raises(AmqError, match=r"reachable range is 2\.5000 to 4\.5000"):
        choose(Budget(2.0), problem.space, problem.archive.records)
    with pytest.raises(AmqError, match="above the largest"):
        choose(Budget(5.0), problem.space, problem.archive.records)


def test_ties_and_pins_hold_in_every_solver(tmp_path):
    of = space(pinned=parse_pins(["layers.1.mlp.up_proj=int8"], linears()), ties=["qv"])
    losses = AnalyticLosses(of)
    for solver in ("additive", "paper", "random"):
        problem = Problem(of, Archive(tmp_path / f"{solver}.jsonl"), losses, solver, 0)
        problem.cost_tables = {"fisher": lambda: losses.table}
        SOLVERS[solver](problem, settings(solver=solver))
        for record in problem.archive.records:
            if record.phase in ("front", "initial", "iteration"):
                formats = record.configuration
                assert formats["layers.1.mlp.up_proj"] == "int8"
                assert all(formats[f"layers.{b}.attn.q_proj"] == formats[f"layers.{b}.attn.v_proj"] for b in range(4))


def test_pareto_hypervolume_and_spread_by_hand():
    points = np.array([[2.0, 0.7], [3.0, 0.35], [3.0, 0.5], [4.0, 0.35], [4.0, 0.07]])
    assert pareto_indices(points) == [0, 1, 4]
    # the box is 2 bits wide and 0.7 high: [3, 4] is dominated from 0.35 up, the end point adds nothing
    assert hypervolume(points, (2.0, 4.0)) == pytest.approx(0.25, abs=1e-6)
    assert hypervolume(np.empty((0, 2)), (2.0, 4.0)) == 0.0
    assert spread(np.array([0.0, 0.1, 5.0, 9.0, 10.0]), [0.0], 2) == [4, 2]


def test_many_at_once_leave_the_lines_of_one_by_one(tmp_path):
    """Archived ones are not measured again, equal ones once; what the time cuts off is there up to the last chunk."""
    of = space()
    wanted = [(of.uniform(f), "uniform") for f in of.formats] + [(of.uniform(of.formats[0]), "front")]
    wanted += [(of.decode(p), "front") for p in np.random.default_rng(0).integers(0, 3, (6, len(of.variables)))]
    one = make(tmp_path / "one.jsonl", settings())
    records = [one.evaluate(formats, phase) for formats, phase in wanted]
    (tmp_path / "again.jsonl").write_bytes((tmp_path / "one.jsonl").read_bytes())
    again = make(tmp_path / "again.jsonl", settings())
    assert [r.loss for r in again.evaluate_many(wanted)] == [r.loss for r in records] and again.losses.calls == 0
    fresh, shown = make(tmp_path / "fresh.jsonl", settings()), []
    assert [r.index for r in fresh.evaluate_many(wanted, seen=shown.append)] == [r.index for r in records]
    assert lines(tmp_path / "fresh.jsonl") == lines(tmp_path / "one.jsonl")
    assert fresh.losses.calls == len(wanted) - 1 and len(shown) == len(wanted)
    stopped = make(tmp_path / "stopped.jsonl", settings())
    ticks = iter([None, 0.0])

    def measure(configurations, windows="search", real=stopped.losses.evaluate_many):
        for losses in real(configurations, windows):
            stopped.deadline = next(ticks)
            yield losses

    stopped.losses.evaluate_many = measure
    with pytest.raises(TimeIsUp):
        stopped.evaluate_many(wanted)
    assert lines(tmp_path / "stopped.jsonl") == lines(tmp_path / "one.jsonl")[: 2 * stopped.losses.together]


@pytest.mark.parametrize("options", [{}, {"exact": True, "refine": 4}, {"cost": "sensitivity"}], ids=str)
def test_the_additive_solver_searches_the_head_and_tied_experts(tmp_path, options):
    problem = mixed(tmp_path / "a.jsonl", settings(points=6, **options))
    problem.budget = 3.6
    SOLVERS["additive"](problem, settings(points=6, **options))
    check_choices(problem)
    within = [r for r in problem.archive.evaluated() if r.bits_per_weight <= 3.6 + 1e-6]
    best = min(within, key=lambda r: r.loss)
    assert best.phase in ("budget", "front", "refine") and best.configuration["lm_head"] != "int2"
    assert all(r.bits_per_weight <= problem.space.front_range[1] + 1e-6 for r in within)


@pytest.mark.parametrize("solver", ["paper", "random"])
def test_evolution_and_chance_stay_within_each_variables_choices(tmp_path, solver):
    options = settings(solver=solver, initial=30, iterations=3, per_iteration=6, population=30, generations=6)
    problem = mixed(tmp_path / "a.jsonl", options)
    SOLVERS[solver](problem, options)
    check_choices(problem)
    drawn = [r for r in problem.archive.records if r.phase in ("initial", "iteration")]
    assert {"int6", "int8", "16bit"} & {r.configuration["lm_head"] for r in drawn}


def test_what_is_tied_has_one_sensitivity(tmp_path):
    problem = mixed(tmp_path / "s.jsonl", settings())
    of, true = problem.space, problem.losses.table
    table = sensitivity_costs(problem)
    measured = [r for r in problem.archive.records if r.phase == "sensitivity"]
    assert len(measured) == 1 + (of.counts - 1).sum(), "one for each variable and format, and the base"
    tied = [f"layers.0.mlp.experts.up_proj.{e}" for e in range(4)]
    found = sum(table[n]["int2"] - table[n]["int4"] for n in tied)
    assert found == pytest.approx(sum(true[n]["int2"] - true[n]["int4"] for n in tied), rel=1e-6)
    assert len({table[n]["int2"] - table[n]["int4"] for n in tied}) == 1, "in equal parts: they are of equal size"
    assert table["lm_head"]["int8"] == pytest.approx(true["lm_head"]["int8"], rel=1e-6), "its base has 16 bits"
    whole = measure(problem, 2.0)
    assert len({whole.loss[n] for n in tied}) == 1 and whole.loss.keys() == {s.name for s in of.weights}
    whole.write(tmp_path / "sensitivity.json")
    assert Sensitivity.read(tmp_path / "sensitivity.json") == whole
    assert "up_proj.0-3" in (tmp_path / "sensitivity.json").read_text()


def mixed(path: Path, options) -> Problem:
    """Experts and an untied head, which is what costs most."""
    weights = (*expert_linears(), *untied_head(2))
    of = SearchSpace.of(Inventory("layers", 2, weights[:-2], (), False, weights[-2:]), options)
    losses = AnalyticLosses(of)
    losses.table["lm_head"] = {fmt: 0.2 * 4.0**-i for i, fmt in enumerate(losses.table["lm_head"])}
    problem = Problem(of, Archive(path, of), losses, options.solver, options.seed)
    problem.cost_tables = {"fisher": lambda: losses.table, "sensitivity": lambda: sensitivity_costs(problem)}
    return problem


def check_choices(problem: Problem) -> None:
    of = problem.space
    problem.archive.close()
    again = Archive(problem.archive._path, of)  # checks every line against the space
    again.close()
    for record in again.records:
        if record.phase != "uniform":
            assert of.decode(of.encode(record.configuration)) == record.configuration
