"""Strategies of bit allocation: their costs against formulas, their searches, and the table that compares them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import analytic
from helpers.fake_bank import FakeBank
from helpers.tiny_models import byte_tokenizer, random_tokens, tiny_llama
from torch import Tensor, nn

import amq
from amq.errors import AmqError
from amq.eval import strategies
from amq.eval.__main__ import main
from amq.eval.strategies import run_strategies
from amq.eval.strategy_run import HOW, SeedRun
from amq.eval.strategy_settings import StrategySettings
from amq.eval.strategy_table import StrategyTable, markdown
from amq.formats import parse_formats
from amq.model.inventory import Inventory, get_linear, get_weight, take_inventory
from amq.packing import dequantize
from amq.proxy.channels import extra_bytes, fitting_share, rank_features, widened
from amq.proxy.fisher import FISHER, TAYLOR, TRACE, fisher_passes, gradient_passes
from amq.proxy.outputs import output_errors, tables
from amq.proxy.rows import assembled, score_rows
from amq.proxy.soft import Shares, _Trainer, learn
from amq.search.archive import Archive
from amq.search.greedy import OFFSPRING, climb
from amq.search.knapsack import select
from amq.search.problem import Problem
from amq.search.recipe import follow, steps_up
from amq.search.rows import select_rows
from amq.search.run_folder import RunFolder
from amq.search.space import SearchSpace
from amq.search.strategies import STRATEGIES, Strategy
from amq.util.progress import Progress
from amq.util.settings import run_command

pytestmark = pytest.mark.usefixtures("cache", "one_thread")
NAMES = ("int2", "int3", "int4")
WINDOWS = random_tokens(2, 40, seed=5)
TEXT = "".join(f"Window {i} says {i * i}; " for i in range(400))
SHAPE: dict[str, Any] = {
    "group_size": 32, "window_length": 32, "windows": 1, "bank_windows": 2, "proxy": "rtn", "rotation": "none",
    "cost_passes": 2,
}  # fmt: skip


def parts() -> tuple[nn.Module, Inventory, FakeBank]:
    """A tiny model, its linears without head and embeddings, and a bank."""
    model = tiny_llama()
    inventory = take_inventory(model)
    return model, inventory.only({s.name for s in inventory.linears}), FakeBank(model, NAMES)


def seen(model: nn.Module, inventory: Inventory, window: Tensor, labels: Tensor | None, seed: int) -> dict[str, Any]:
    """{linear: (inputs, output gradients)} of one graph through the whole model, float64.

    labels: int64 [length]; −1 for none. None: drawn as Fisher's passes draw them.
    """
    ran: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, x: Tensor, output: Tensor) -> None:
        output.retain_grad()
        ran[name] = x.detach(), output

    model.requires_grad_(True)
    handles = [
        get_linear(model, s.name).register_forward_hook(lambda m, args, out, n=s.name: keep(n, args[0], out))
        for s in inventory.linears
    ]
    log_p = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)
    if labels is None:
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    log_p.gather(1, labels.clamp_min(0).unsqueeze(1))[labels >= 0].sum().backward()
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    return {n: (x[0].double(), out.grad[0].double()) for n, (x, out) in ran.items()}


def test_trace_and_taylor_are_their_formulas() -> None:
    model, inventory, bank = parts()
    drawn = list(gradient_passes(model, inventory, bank, WINDOWS, NAMES, 3, (FISHER, TRACE)))
    text = list(gradient_passes(model, inventory, bank, WINDOWS, NAMES, 3, (TAYLOR,)))
    assert [one[FISHER] for one in drawn] == list(fisher_passes(model, inventory, bank, WINDOWS, NAMES, 3))
    for index, window in enumerate(WINDOWS):
        by_drawn = seen(model, inventory, window, None, 3 * 1_000_003 + index)
        by_text = seen(model, inventory, window, torch.cat([window[1:], torch.tensor([-1])]), 0)
        for spec in inventory.linears:
            x, g = by_drawn[spec.name]
            for fmt in NAMES:
                error = bank.error(spec.name, fmt)
                trace = float((x.square().sum(1) * g.square().sum(1)).mean()) / spec.numel * float(error.square().sum())
                assert drawn[index][TRACE][spec.name][fmt] == pytest.approx(trace, rel=2e-3)
                own, slope = by_text[spec.name]
                taylor = abs(float((slope * (own @ error.T)).sum())) / len(window)
                assert text[index][TAYLOR][spec.name][fmt] == pytest.approx(taylor, rel=2e-3, abs=1e-7)


def test_scores_of_linears_alone_refuse_a_head() -> None:
    model = tiny_llama()
    with pytest.raises(AmqError, match=r"taylor are of the blocks' linears: leave out lm_head"):
        next(gradient_passes(model, take_inventory(model), FakeBank(model, NAMES), WINDOWS, NAMES, 0, (TAYLOR,)))


def test_activation_and_entropy_are_their_formulas() -> None:
    model, inventory, bank = parts()
    activation, entropy = tables(output_errors(model, inventory, bank, WINDOWS, NAMES))
    seen_inputs: dict[str, Tensor] = {}
    handles = [
        get_linear(model, s.name).register_forward_hook(
            lambda m, args, out, n=s.name: seen_inputs.update({n: args[0].flatten(0, -2).double()})
        )
        for s in inventory.linears
    ]
    model(input_ids=WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    for spec in inventory.linears:
        x, weight = seen_inputs[spec.name], get_weight(model, spec.name).double()
        gram, variance = x.T @ x / len(x), (x @ weight.T).var(0, correction=0)
        for fmt in NAMES:
            error = bank.error(spec.name, fmt)
            relative = torch.trace(error @ gram @ error.T) / torch.trace(weight @ gram @ weight.T)
            assert activation[spec.name][fmt] == pytest.approx(float(relative), rel=1e-3)
            left = (x @ error.T).square().mean(0) / variance
            bits = 0.5 * (2 * math.pi * math.e * variance).log2() - (-0.5 * left.log2()).clamp_min(0)
            assert entropy[spec.name][fmt] == pytest.approx(float(bits.sum()), rel=1e-3, abs=1e-2)


def shares_of(inventory: Inventory, target: float) -> Shares:
    of = SearchSpace.build(inventory.linears, parse_formats("int2,int3,int4"), 32)
    sizes = torch.from_numpy(8.0 * of.sizes / of.numel)
    return Shares(of.variables, of.format_names, sizes, 0.0, target)


def test_slopes_of_shares_are_the_loss_s() -> None:
    """By differences, of some linears of the first, the middle and the last block."""
    model, inventory, bank = parts()
    model.double()
    trainer = _Trainer(model, inventory, bank, shares_of(inventory, 3.5), 0, 1 << 20)
    before = {s.name: get_weight(model, s.name).clone() for s in inventory.linears}
    reference = trainer.final(WINDOWS[:1])
    p = torch.rand(len(inventory.linears), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p /= p.sum(-1, keepdim=True)
    _, slopes = trainer.step(WINDOWS[:1], reference, p)
    for i, j in ((0, 0), (6, 2), (10, 1), (13, 2)):
        up, down = p.clone(), p.clone()
        up[i, j] += 3e-3
        down[i, j] -= 3e-3
        measured = (trainer.step(WINDOWS[:1], reference, up)[0] - trainer.step(WINDOWS[:1], reference, down)[0]) / 6e-3
        assert float(slopes[i, j]) == pytest.approx(measured, rel=1e-2, abs=1e-5)
    assert all(torch.equal(get_weight(model, n), own) for n, own in before.items())


def test_learned_preferences_hold_the_target() -> None:
    model, inventory, bank = parts()
    notes: list[str] = []
    table = learn(model, inventory, bank, WINDOWS, shares_of(inventory, 3.5), 60, step=notes.append)
    assert len(notes) == 60 and notes[0].endswith("4.000 bits")
    assert abs(float(notes[-1].split()[2]) - 3.5) < 0.1
    shares = {n: [math.exp(-c) for c in row.values()] for n, row in table.items()}
    assert all(sum(row) == pytest.approx(1.0) for row in shares.values())
    assert len({row.index(max(row)) for row in shares.values()}) > 1, "all linears prefer the same format"


def test_rows_of_one_block_are_the_linear() -> None:
    """Its Fisher score, and its size; and more blocks are never dearer than what whole linears come to."""
    model, inventory, bank = parts()
    whole = list(fisher_passes(model, inventory, bank, WINDOWS, NAMES, 3))
    one = score_rows(model, inventory, bank, WINDOWS, NAMES, 3, 1)
    four = score_rows(model, inventory, bank, WINDOWS, NAMES, 3, 4, runs=(1,))
    for name, rows in one.rows.items():
        assert len(rows) == 1 and sorted(torch.cat(four.rows[name]).tolist()) == sorted(rows[0].tolist())
        for fmt in NAMES:
            mean = np.mean([table[name][fmt] for table in whole])
            assert one.costs[name][fmt] == [pytest.approx(mean, rel=1e-3)]
    of = SearchSpace.build(inventory.linears, parse_formats("int2,int3,int4"), 32)
    costs = of.variable_costs({n: {f: row[f][0] for f in NAMES} for n, row in one.costs.items()})
    counts = {n: [len(r) for r in rows] for n, rows in one.rows.items()}
    chosen, stored = select_rows(of, costs, one.costs, counts, of.capacity(3.6))
    plain = select(costs, of.sizes, of.capacity(3.6))
    assert {name: fmt for name, _, fmt in chosen} == of.decode(plain)
    assert stored == of.sizes[np.arange(len(plain)), plain].sum()
    with pytest.raises(AmqError, match="wants? linears that choose alone"):
        tied = SearchSpace.build(inventory.linears, parse_formats("int2,int4"), 32, ties=["qkv"])
        select_rows(tied, costs, one.costs, counts, 1e9)


def test_parts_are_put_together_and_taken_away() -> None:
    model, inventory, bank = parts()
    name, other = (inventory.linears[i].name for i in (0, 5))
    own, rows = get_weight(model, name).clone(), torch.arange(inventory.linears[0].out_features)
    made = [(name, rows[::2], "int2"), (name, rows[1::2], "int4"), (other, None, "int3")]
    with assembled(model, bank, made):
        weight = get_weight(model, name)
        for start, fmt in ((0, "int2"), (1, "int4")):
            assert torch.equal(weight[start::2], dequantize(bank.get(name, fmt)).to(weight.dtype)[start::2])
        assert torch.equal(get_weight(model, other), dequantize(bank.get(other, "int3")).float())
    assert torch.equal(get_weight(model, name), own)


def test_channels_are_the_features_that_matter_most() -> None:
    """By E[x_k²] · ‖δW_k‖², whose columns come close to the weight's own; the others stay as they are."""
    model, inventory, bank = parts()
    squares = {n: own.features for n, own in output_errors(model, inventory, bank, WINDOWS, NAMES).items()}
    ranked = rank_features(model, inventory.linears, bank, squares, "int2")
    spare = 12_000
    share = fitting_share(inventory.linears, spare, 32)
    assert 0 < share and extra_bytes(inventory.linears, share, 32) <= spare < extra_bytes(
        inventory.linears, share + 1 / 64, 32
    )
    for name, made in widened(model, inventory.linears, bank, ranked, "int2", share, 32):
        error, count = bank.error(name, "int2"), int(share * made.shape[1])
        salience = error.square().sum(0) * squares[name]
        chosen, rest = ranked[name][:count], ranked[name][count:]
        assert count and salience[chosen].min() >= salience[rest].max()
        left = (get_weight(model, name).double() - made.double()).square().sum(0)
        assert bool((left[chosen] < 0.01 * error.square().sum(0)[chosen]).all())
        assert torch.equal(made[:, rest], dequantize(bank.get(name, "int2")).float()[:, rest])


def test_recipe_raises_values_and_ends() -> None:
    of = analytic.space()
    up = dict(zip((v[0].name for v in of.variables), steps_up(of), strict=True))
    assert up["layers.0.attn.v_proj"] == 2 and up["layers.1.mlp.down_proj"] == 1 and up["layers.1.attn.q_proj"] == 0
    formats = follow(of, 3.0)  # int2 takes 2.5
    assert formats["layers.3.attn.v_proj"] == "int4" and formats["layers.1.mlp.up_proj"] == "int2"
    for budget in (2.5, 2.6, 3.0, 3.5, 3.7, 4.5):
        assert of.bits_of(follow(of, budget)) <= budget + 1e-9
    assert set(follow(of, 4.5).values()) == {"int4"} and set(follow(of, 2.5).values()) == {"int2"}
    with pytest.raises(AmqError, match="recipe wants linears called v"):
        steps_up(SearchSpace.build(analytic.linears()[::4], of.formats, 64))


def test_greedy_stays_on_budgets_and_improves(tmp_path: Path) -> None:
    problem = analytic.problem(tmp_path / "a.jsonl", analytic.settings())
    budgets, of = [3.0, 3.75], problem.space
    found = climb(problem, budgets, 82)
    assert problem.losses.calls <= 82 and list(found) == budgets
    for index, budget in enumerate(budgets):
        start = next(r for r in problem.archive.records if r.iteration == index)
        best = select(of.variable_costs(problem.losses.table), of.sizes, of.capacity(budget))
        assert found[budget].bits_per_weight <= budget + 1e-9
        assert problem.losses.evaluate(of.decode(best)) * 0.999 <= found[budget].loss < start.loss
    again = climb(analytic.problem(tmp_path / "b.jsonl", analytic.settings()), budgets, 82)
    assert [r.configuration for r in again.values()] == [r.configuration for r in found.values()]
    assert OFFSPRING < 41


def test_every_row_can_be_run_and_says_what_it_deviates_in() -> None:
    assert {row.how for row in STRATEGIES.values()} == HOW.keys()
    for row in STRATEGIES.values():
        assert row.family and row.granularity and row.inputs and row.systems and row.deviation


# the table


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return {
        **SHAPE, "model": str(tiny_folder), "output": str(tmp_path / "table"), "calibration": str(text),
        "text": str(text), "max_tokens": 96, "budgets": "3.5,4", "perplexity_at": "3.5", "seeds": "0",
        "evaluations": 21, "steps": 2,
    }  # fmt: skip


def flags(arguments: dict[str, Any]) -> list[str]:
    given = {n: v for n, v in arguments.items() if n != "model"}
    return [arguments["model"], *(part for n, v in given.items() for part in (f"--{n.replace('_', '-')}", str(v)))]


def test_all_strategies(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a tiny model: every row of the registry, files, and figures that can be checked."""
    output = Path(arguments["output"])
    assert main(["strategies", *flags(arguments)]) == 0
    table = StrategyTable.read(output / "strategies.json")
    assert [row.strategy for row in table.rows] == list(STRATEGIES)
    assert table.ends == (3.0, 5.0) and table.hv_budgets == (3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75)
    by_name = {row.strategy: row for row in table.rows}
    for row in table.rows:
        assert row.losses.keys() == {"3.25", "3.5", "3.75", "4", "4.25", "4.5", "4.75"}
        assert all(row.bits[b] <= float(b) + 1e-4 for b in row.bits) and all(0 < x < 0.7 for x in row.losses.values())
        assert 0 < row.hv7 < 1 and row.perplexity["3.5"] > 1 and row.equivalents > 0
    assert by_name["uniform"].bits == {**dict.fromkeys(("3.25", "3.5", "3.75"), 3.0), **dict.fromkeys(
        ("4", "4.25", "4.5", "4.75"), 4.0)}  # fmt: skip
    assert by_name["sensitivity"].singles >= 27 and by_name["fisher"].passes == 2 and by_name["rows"].passes == 4
    assert by_name["fisher"].evaluations == 7 and 14 <= by_name["greedy"].evaluations <= 21
    shown = capsys.readouterr().out
    assert markdown(table) in shown and (output / "strategies.md").read_text() == markdown(table)
    assert all(f"| {name} |" in shown and f"- `{name}` (" in shown for name in STRATEGIES)
    assert (output / "strategies.png").stat().st_size > 5_000 and "rows" in (output / "report.html").read_text()
    assert "Which systems allocate so" in (output / "report.html").read_text()


def test_fisher_chooses_as_the_search_does(arguments: dict[str, Any], tmp_path: Path) -> None:
    run = SeedRun(StrategySettings.make(**arguments), 0, Progress())
    made = run.measure(STRATEGIES["fisher"], None)
    shared = {n: arguments[n] for n in (*SHAPE, "calibration")}
    found = amq.search(
        arguments["model"], tmp_path / "run", target_bits=3.5, points=0, refine=0, head="16bit", activations="fp32",
        confirm_windows=1, **shared,
    )  # fmt: skip
    chosen = found.configuration.formats
    (record,) = [r for r in RunFolder.open(found.output).archive if r.phase == "budget" and r.windows == "search"]
    assert record.configuration == chosen and made.losses["3.5"] == pytest.approx(record.loss, abs=1e-6)
    table = run._tables["fisher"].table
    costs = run.space.variable_costs(table)
    assert run.space.decode(select(costs, run.space.sizes, run.space.capacity(3.5))) == chosen
    assert table == RunFolder.open(found.output).cost.cost


def test_weights_put_in_lose_what_their_configuration_does(arguments: dict[str, Any], tmp_path: Path) -> None:
    """By torch what the native engine measures; and channels of no share are the uniform format."""
    run = SeedRun(StrategySettings.make(**arguments), 0, Progress())
    problem = Problem(run.space, Archive(tmp_path / "a.jsonl"), run.losses, "weight", 0)
    for choice in run.by_table(STRATEGIES["weight"], problem).choices.values():
        assert run._put_choice(0, choice.put).loss == pytest.approx(choice.loss, rel=1e-3)
    uniform, beside = (HOW[how](run, STRATEGIES[how], problem).choices for how in ("uniform", "channels"))
    assert beside[4.0].loss == pytest.approx(uniform[4.0].loss, rel=1e-3) and beside[4.0].bits == 4.0
    assert beside[3.75].loss < uniform[3.75].loss and 3.6 < beside[3.75].bits <= 3.75


def test_sensitivities_of_another_divergence(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Those that a search with that loss measures; afterwards losses are as before."""
    run = SeedRun(StrategySettings.make(**arguments), 0, Progress())
    problem = Problem(run.space, Archive(tmp_path / "a.jsonl"), run.losses, "kl", 0)
    uniform = run.space.uniform(run.space.formats[0])
    before = run.stage.evaluator.evaluate(uniform)
    found = run.by_divergence(STRATEGIES["kl"], problem)
    assert found.singles == 1 + 2 * len(run.space.variables) and run.stage.evaluator.evaluate(uniform) == before
    shared = {n: arguments[n] for n in (*SHAPE, "calibration")}
    other = amq.search(
        arguments["model"], tmp_path / "run", target_bits=3.5, points=0, refine=0, head="16bit", activations="fp32",
        confirm_windows=1, cost="sensitivity", loss="kl", **shared,
    )  # fmt: skip
    assert found.choices[3.5].formats == other.configuration.formats


def test_dialects_are_counted(arguments: dict[str, Any], tmp_path: Path) -> None:
    run = SeedRun(StrategySettings.make(**arguments), 0, Progress())
    problem = Problem(run.space, Archive(tmp_path / "a.jsonl"), run.losses, "dialect", 0)
    costs = run.space.variable_costs(run._table(FISHER, problem).table)
    for budget, choice in run.dialects(STRATEGIES["dialect"], problem).choices.items():
        formats = run.space.decode(select(costs, run._dialect_sizes, run.space.capacity(budget)))
        ids = sum(s.out_features * -(-s.in_features // 32) * 3 / 8 for s in run.space.weights)
        assert choice.bits <= budget
        assert choice.bits == pytest.approx(run.space.bits_of(formats) + 8 * ids / run.space.numel)
    low = SeedRun(StrategySettings.make(**{**arguments, "budgets": "3.05,3.5"}), 0, Progress())
    with pytest.raises(AmqError, match=r"'dialect': int2 .* take 3.09\d+ bits per weight, .* instead of 3.05"):
        low.check_dialects(low.space)


def test_stacks_want_a_round_of_every_linear(arguments: dict[str, Any]) -> None:
    with pytest.raises(AmqError, match=r"'bitstack': the first round of every linear takes 2.93\d+ bits per weight"):
        run_strategies(StrategySettings.make(**{**arguments, "group_size": 128, "strategies": "uniform,bitstack"}))
    assert not Path(arguments["output"]).exists()


def test_full_precision_is_measured_in_full_precision(arguments: dict[str, Any]) -> None:
    """Also by an engine that leaves what it evaluated last in the model; and kernels agree with the native engine."""
    some = {**arguments, "strategies": "uniform"}
    native = run_strategies(StrategySettings.make(**some))
    other = {**some, "backend": "reference", "output": some["output"] + "-reference"}
    reference = run_strategies(StrategySettings.make(**other))
    assert native.full == reference.full and native.full < native.rows[0].perplexity["3.5"]
    assert reference.rows[0].losses == pytest.approx(native.rows[0].losses, abs=2e-6)
    assert reference.rows[0].perplexity == native.rows[0].perplexity


def test_an_interrupted_table_goes_on(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are done are not measured again, and those that lack come out as without the interruption."""
    some = {**arguments, "strategies": "uniform,random,weight,fisher", "text": ""}
    whole = run_strategies(StrategySettings.make(**{**some, "output": some["output"] + "-whole"}))
    measure, measured = SeedRun.measure, list[str]()

    def stop(self: SeedRun, strategy: Strategy, held_out: Any) -> Any:
        measured.append(strategy.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, strategy, held_out)

    monkeypatch.setattr(SeedRun, "measure", stop)
    command = ["strategies", *flags(some)]
    assert main(command) == 130
    path = Path(some["output"]) / "strategies.json"
    assert [row.strategy for row in StrategyTable.read(path).rows] == ["uniform", "random"]
    assert main(command) == 0
    assert measured == ["uniform", "random", "weight", "weight", "fisher"]
    table = StrategyTable.read(path)
    assert [(r.losses, r.bits, r.hv7) for r in table.rows] == [(r.losses, r.bits, r.hv7) for r in whole.rows]
    assert main(["strategies", *flags({**some, "seeds": "1,0", "strategies": "weight"})]) == 0  # more may be asked for
    assert measured[5:] == ["weight"] and len(StrategyTable.read(path).rows) == 5
    monkeypatch.setattr(strategies, "SeedRun", None)  # nothing is loaded for a table that lacks nothing
    assert main(command) == 0


def test_a_folder_of_something_else_is_refused(arguments: dict[str, Any], tmp_path: Path, make_folder: Any) -> None:
    some = {**arguments, "strategies": "uniform", "text": ""}
    run_strategies(StrategySettings.make(**some))
    path = Path(some["output"]) / "strategies.json"
    before = path.read_bytes()
    with pytest.raises(AmqError, match=r"other settings: --window-length was 32, is 40"):
        run_strategies(StrategySettings.make(**{**some, "window_length": 40}))
    moved = tmp_path / "same name"
    tiny_llama(seed=1).save_pretrained(moved)
    byte_tokenizer().save_pretrained(moved)
    told = json.loads(before)
    told["settings"]["model"] = str(moved)
    path.write_text(json.dumps(told))
    with pytest.raises(AmqError, match=r"table of another model"):
        run_strategies(StrategySettings.make(**{**some, "model": str(moved), "strategies": "uniform,weight"}))
    path.write_bytes(before[:200])
    with pytest.raises(AmqError, match=r"strategies\.json"):
        run_strategies(StrategySettings.make(**some))
    path.rename(path.with_name("other.json"))
    with pytest.raises(AmqError, match=r"holds no strategies\.json"):
        run_strategies(StrategySettings.make(**some))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategies": "fisher,guess"}, "'guess' is none of uniform, random"),
        ({"cost_passes": 0}, "strategy 'activation' looks at inputs or gradients .* --cost-passes above 0"),
        ({"steps": 0}, "strategy 'gradient' is trained: give --steps above 0, or leave it out of --strategies"),
        ({"evaluations": 0}, "strategy 'random' searches by true evaluations: give --evaluations"),
        ({"evaluations": 5}, "--evaluations must be 0 or at least 20"),
        ({"load": "disk"}, "strategy 'gradient' puts weights together .* --load memory"),
        ({"perplexity_at": "3.25"}, "--perplexity-at 3.25 is none of --budgets"),
        ({"budgets": "3,x"}, "--budgets 3,x: expected numbers"),
        ({"seeds": "-1"}, "--seeds: expected whole numbers"),
        ({"formats": "int4"}, "at least two formats"),
    ],
)
def test_what_lacks_is_said_before_a_model_is_loaded(
    arguments: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(AmqError, match=message):
        StrategySettings.make(**{**arguments, **given})
    assert not Path(arguments["output"]).exists()


def test_a_budget_that_is_none_is_one_line(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    given = flags({**arguments, "budgets": "2.75,3.5", "strategies": "uniform"})
    assert run_command(lambda argv: main(argv), ["strategies", *given]) == 2
    assert "2.75" in capsys.readouterr().err


def test_examples_are_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StrategySettings] = []

    def stop(settings: StrategySettings, progress: Progress) -> None:
        made.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(strategies, "run_strategies", stop)
    for line in StrategySettings.EXAMPLES:
        assert main(line.split()[2:]) == 130
    assert [row.name for row in made[1].rows] == ["recipe", "taylor", "fisher"] and made[0].seed_list == [0, 1, 2]
