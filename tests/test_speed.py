"""Tokens per second as a budget: the table, what is selected by it, how it is measured, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speed_model
import torch
from helpers.analytic import AnalyticLosses, expert_linears, linears, settings, solve, space, tied_head, untied_head
from helpers.report_pages import rows
from helpers.runs import make_run

from amq.bench.command import main as bench
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import KEPT, get_format
from amq.model.inventory import EMBEDDING, Inventory
from amq.model.speed_table import SpeedTable, kernels, model_key, shape_key
from amq.report import charts, write_report
from amq.report.data import SIZES, Shown
from amq.report.look import Missing
from amq.runtime.drawn import draw
from amq.runtime.speed_measure import How, Skeleton, measure, quiet, shapes_of
from amq.search import search
from amq.search.knapsack import select as by_bytes
from amq.search.knapsack import select_in_time
from amq.search.run_folder import RunFolder
from amq.search.select import select
from amq.search.settings import SearchSettings, SelectSettings
from amq.search.speed import Speed, wanted_times
from amq.util.machine import cpu_name
from amq.util.native import cpu_module

FORMATS = ("int2", "int3", "int4", "int6", "int8", KEPT.name)
QUICK = {
    "group_size": 64, "window_length": 32, "windows": 2, "confirm_windows": 1, "bank_windows": 2, "cost_passes": 2,
    "points": 3, "proxy": "rtn", "head": "16bit", "calibration": "docstrings", "backend": "reference",
}  # fmt: skip


def made(shapes: Any, slow: str = "", **fields: Any) -> SpeedTable:
    """Times that go with the bytes: a nanosecond each; the format `slow` takes five times that."""
    linears = {
        shape_key(*shape): {f: 1e-9 * stored(f, *shape) * (5 if f == slow else 1) for f in FORMATS} for shape in shapes
    }
    here = {
        "processor": cpu_name(), "isa": cpu_module().isa(), "threads": torch.get_num_threads(), "kernels": kernels(),
        "model": "m", "activations": "int8", "cache": "float16", "group_size": 64,
        "depths": {"0": 1e-6, "100": 3e-6, "200": 4e-6},
    }  # fmt: skip
    return SpeedTable(linears=linears, **{**here, **fields})


def stored(fmt: str, rows: int, columns: int) -> int:
    return KEPT.stored_bytes(rows, columns, 64) if fmt == KEPT.name else get_format(fmt).stored_bytes(rows, columns, 64)


def of_linears(slow: str = "", **fields: Any) -> SpeedTable:
    every = (*linears(), *expert_linears(), *untied_head())
    return made({(s.out_features, s.in_features) for s in every}, slow, **fields)


def test_a_token_takes_the_sum_of_what_it_reads() -> None:
    table, weights = of_linears(), (*expert_linears(1), *untied_head(1))
    formats = dict.fromkeys((s.name for s in weights), "int4")
    each = 1e-9 * stored("int4", 64, 64)
    head = 1e-9 * stored("int4", 256, 64)
    wanted = each * (1 + 12 * 2 / 4) + head  # q, twelve linears of experts of which half are read, and no embedding
    assert table.seconds(formats, weights) == pytest.approx(1e-6 + wanted)
    assert [s.name for s in weights if table.of(s, "int4") == 0] == ["embed"]


@pytest.mark.parametrize(("context", "seconds"), [(0, 1.0), (50, 2.0), (100, 3.0), (150, 3.5), (400, 6.0)])
def test_between_depths_time_goes_on_a_line_and_beyond_them_too(context: int, seconds: float) -> None:
    assert of_linears().beside(context) == pytest.approx(1e-6 * seconds)
    assert of_linears(depths={"7": 2e-6}).beside(context) == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [("processor", "another", "processor"), ("isa", "neon", "instruction set"), ("threads", 99, "number of threads"),
     ("kernels", "00", "build of amq"), ("model", "other", "model"), ("group_size", 32, "group size")],
)  # fmt: skip
def test_a_table_of_something_else_is_refused_by_name(field: str, value: object, what: str) -> None:
    table = of_linears()
    table.check("t.json", 64, "m", torch.get_num_threads())
    with pytest.raises(
        AmqError, match=rf"^t\.json is a speed table of another {what} \({value}, here .*amq bench MODEL"
    ):
        replace(table, **{field: value}).check("t.json", 64, "m", torch.get_num_threads())


def test_a_format_without_a_time_is_named() -> None:
    with pytest.raises(
        AmqError, match=r"no time of layers\.0\.attn\.q_proj \(64x64\) in int5: make one with amq bench"
    ):
        of_linears().of(linears()[0], "int5")


def test_the_same_model_has_the_same_key_whatever_its_formats() -> None:
    config = {"hidden_size": 8, "model_type": "llama"}
    assert model_key(config) == model_key({**config, "quantization_config": {"formats": {}}, "dtype": "float16"})
    assert model_key(config) != model_key({**config, "hidden_size": 16})


@pytest.mark.parametrize("seed", range(12))
def test_both_bounds_are_kept_and_little_is_lost(seed: int) -> None:
    """Beside every one of 3^7 choices: never below the least cost, and mostly near it."""
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 400, (7, 3)), axis=1) + np.arange(3)
    costs = np.sort(rng.lognormal(0, 1.0, (7, 3)), axis=1)[:, ::-1]
    times = rng.uniform(1, 4, (7, 3))
    points = np.array(list(itertools.product(range(3), repeat=7)))
    every = [table[np.arange(7), points].sum(axis=1) for table in (costs, sizes, times)]
    capacity, most = float(np.quantile(every[1], 0.6)), float(np.quantile(every[2], 0.3))
    allowed = (every[1] <= capacity) & (every[2] <= most)
    found = select_in_time(costs, sizes, capacity, times, most)
    if found is None:
        assert not allowed.any() or every[2][every[1] <= capacity].min() > 0.97 * most
        return
    cost, size, time = (float(table[np.arange(7), found].sum()) for table in (costs, sizes, times))
    assert size <= capacity and time <= most
    assert every[0][allowed].min() <= cost * (1 + 1e-9) and cost <= np.quantile(every[0][allowed], 0.1)
    free = select_in_time(costs, sizes, capacity, times, np.inf)
    assert free is not None and free.tolist() == by_bytes(costs, sizes, capacity).tolist()


def test_what_cannot_be_met_says_what_is_nearest() -> None:
    of = space()
    table = of_linears(slow="int2")  # the smallest are the slowest
    costs = of.variable_costs(AnalyticLosses(of).table)
    capacity = of.capacity(2.8)
    unbound = Speed(table, of)
    reached = 1 / unbound.seconds(of.decode(by_bytes(unbound.times, of.sizes, capacity)))
    fits = Speed(table, of, least=0.99 * reached)
    assert fits.fits(of.decode(fits.select(costs, capacity)))
    with pytest.raises(AmqError, match=r"tokens/s after 0 others cannot be met within 2\.800 bits per weight: there"):
        Speed(table, of, least=1.05 * reached).select(costs, capacity)
    with pytest.raises(AmqError, match="the fastest formats reach .* give a lower --min-speed, or faster --formats"):
        Speed(table, of, least=1e9).select(costs, of.capacity(4.5))


def test_head_and_embeddings_outside_of_the_search_take_their_16_bits() -> None:
    of, outer = space(), untied_head()
    inventory = Inventory("layers", 4, of.weights, (), False, outer)
    speed = Speed.of(of_linears(), inventory, of, 100)
    formats = of.uniform(of.formats[0])
    more = {**formats, "embed": KEPT.name, "lm_head": KEPT.name}
    assert speed.seconds(formats) == pytest.approx(of_linears().seconds(more, (*of.weights, *outer), 100))
    wanted = wanted_times(inventory, of)
    assert wanted[256, 64] == {KEPT.name} and wanted[64, 64] == {"int2", "int3", "int4"}
    head = space(outer=tied_head())
    assert {"int2", "int8", KEPT.name} <= wanted_times(Inventory("layers", 4, head.weights, (), True), head)[256, 64]
    assert EMBEDDING not in wanted


def test_a_search_evaluates_what_is_fast_enough(tmp_path: Path) -> None:
    of = space()
    table = of_linears(slow="int3")
    speed = Speed(table, of, least=1 / (1.4 * Speed(table, of).seconds(of.uniform(of.formats[0]))))
    found = solve(tmp_path / "archive.jsonl", settings(target_bits=4.0), budget=4.0, speed=speed)
    (record,) = [r for r in found.archive.records if r.phase == "budget"]
    assert speed.fits(record.configuration) and set(record.configuration.values()) == {"int2", "int4"}


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SpeedTable]:
    """A search that measured its own table for a speed that everything reaches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("run") / "run"
        search(str(tiny_folder), folder, **QUICK, min_speed=0.001, target_bits=3.5)
    return folder, SpeedTable.read(folder / "speed.json")


def test_a_search_measures_a_table_and_says_the_speed(run: tuple[Path, SpeedTable]) -> None:
    folder, table = run
    shapes = {key: set(row) for key, row in table.linears.items()}
    assert shapes["256x64"] == {"int2", KEPT.name} and {"int2", "int3", "int4"} == shapes["64x64"]
    assert all(0 < seconds < 1 for row in table.linears.values() for seconds in row.values())
    chosen = Configuration.load(folder / "configuration.json")
    assert chosen.details.tokens_per_second and chosen.details.tokens_per_second > 0.001


def test_the_report_says_the_speed(run: tuple[Path, SpeedTable], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "By the speed table of this run" in page and "; 0.001 were asked for" in page and ">tokens/s<" in page


def test_the_speed_chart_has_a_line_for_each_size(run: tuple[Path, SpeedTable]) -> None:
    """Each within its size, and faster from point to point, as far as there is something faster."""
    shown = Shown(RunFolder.open(run[0]))
    lines: dict[float, list[tuple[float, float]]] = {}
    for bits, formats, loss in shown.trades:
        assert shown.folder.space.bits_of(formats) <= bits + 0.01
        lines.setdefault(bits, []).append((shown.timed(formats)["tokens/s"], loss))
    assert len(lines) == SIZES + 1
    for line in lines.values():
        assert [speed for speed, _ in line] == sorted(speed for speed, _ in line)
    chart = charts.speed_chart(shown)
    assert not isinstance(chart, Missing)
    found = rows(chart.to_dict())
    assert {row["budget"] for row in found if "budget" in row} == set(lines)
    assert {row["kind"] for row in found if "kind" in row} >= {"uniform", "chosen"}
    bare = charts.speed_chart(Shown(make_run(run[0].parent / "bare")))
    assert isinstance(bare, Missing) and bare.reason == "the search asked for no speed"


def test_select_reads_the_table_of_the_run(run: tuple[Path, SpeedTable], tmp_path: Path) -> None:
    folder, table = run
    given = tmp_path / "speed.json"
    slow = {shape: {f: 1e-3 * (1 + 9 * (f == "int4")) for f in row} for shape, row in table.linears.items()}
    replace(table, linears=slow, depths={"0": 0.0}).write(given)
    free = select(SelectSettings(run=str(folder), target_bits=4.0))
    assert "int4" in free.formats.values()
    n_linears = len(free.formats)
    fast = select(
        SelectSettings(run=str(folder), target_bits=4.0, min_speed=999 / (n_linears + 1), speed_table=str(given))
    )
    assert "int4" not in fast.formats.values() and fast.details.tokens_per_second
    assert fast.details.tokens_per_second == pytest.approx(1000 / (n_linears + 1), rel=1e-3)
    liked = select(SelectSettings(run=str(folder), target_bits=4.0, prefer="speed", speed_table=str(given)))
    losses = [c.details.loss or c.details.predicted_loss or 0.0 for c in (free, liked)]
    assert losses[1] <= 1.1 * losses[0] + 1e-9
    assert liked.details.tokens_per_second >= 1000 / (n_linears * 10 + 1)  # type: ignore[operator]
    with pytest.raises(AmqError, match="is a speed table of another processor"):
        replace(table, processor="other").write(given)
        select(SelectSettings(run=str(folder), min_speed=1, speed_table=str(given)))


def test_a_run_without_a_table_says_how_to_make_one(run: tuple[Path, SpeedTable], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "speed.json").unlink()
    with pytest.raises(AmqError, match="has no speed table.* amq bench MODEL --table FILE, and give it as"):
        select(SelectSettings(run=str(folder), min_speed=1))


@pytest.mark.parametrize(
    ("given", "error"),
    [({"exact": True, "min_speed": 1.0}, "--exact has one bound, the size"),
     ({"max_loss": 0.1, "min_speed": 1.0}, "give --prefer speed instead of --min-speed"),
     ({"speed_table": "t.json"}, "--speed-table is for --min-speed or --prefer speed"),
     ({"context": 10}, "says what comes before a token of --min-speed: give --memory or --min-speed too")],
)  # fmt: skip
def test_flags_that_do_not_go_together(given: dict[str, Any], error: str) -> None:
    with pytest.raises(AmqError, match=error):
        SearchSettings.make(model="m", output="o", **given)


def test_a_speed_that_nothing_reaches_is_refused_before_the_bank(
    tiny_folder: Path, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(AmqError, match="the fastest formats reach"):
        search(str(tiny_folder), tmp_path / "run", **QUICK, min_speed=1e9)
    assert not (cache / "banks").exists() and not (tmp_path / "run").exists()


def test_drawn_weights_are_of_the_format() -> None:
    for name in ("int2", "int3", "int5", "int8"):
        packed = draw(get_format(name), 8, 70, 32)
        assert packed.in_features == 70 and packed.format.name == name


def test_quiet_is_the_least_median_of_a_part() -> None:
    assert quiet([9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0, 8.0, 8.0, 8.0]) == 2.0


@pytest.mark.usefixtures("one_thread")
def test_bench_writes_a_table(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    assert bench([str(tiny_folder), "--table", str(path), "--group-size", "32", "--depth", "0,20", "--batch", "2"]) == 0
    table = SpeedTable.read(path)
    assert table.group_size == 32 and table.rows == 2 and set(table.depths) == {"0", "20"}
    assert table.model == Skeleton.of(tiny_folder).key and KEPT.name in table.linears["256x64"]
    assert "µs per linear, 2 rows" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_the_model_of_time_beside_the_engine(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The benchmark runs; a tiny model's times are of nothing but overhead, and say nothing of its error."""
    path = tmp_path / "found.json"
    speed_model.main([
        str(tiny_folder), "--configurations", "3", "--rounds", "1", "--group-size", "32", "--depths", "0",
        "--formats", "int2,int4", "--json", str(path),
    ])  # fmt: skip
    rows = json.loads(path.read_text())["rows"]
    assert [row["head"] for row in rows][2] == KEPT.name and all(row["measured"] > 0 for row in rows)
    assert "median error" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_shapes_of_a_mixture_count_what_a_token_reads(make_folder: Any) -> None:
    from helpers.tiny_models import ARCHITECTURES

    folder = make_folder(ARCHITECTURES["mixtral"].build())
    model = Skeleton.of(folder)
    spec = model.drawn({}, 32).spec
    shapes, reads = shapes_of(spec)
    experts = [share for name, share in reads.items() if ".experts." in name]
    assert experts and all(0 < share < 1 for share in experts) and not any(n.endswith(".gate") for n in shapes)
    table = measure(model, {}, How(group_size=32, threads=1, depths=(0,)), times=1)
    assert set(table.linears) == {shape_key(*shape) for shape in shapes.values()}
