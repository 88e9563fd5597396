"""The search report: run folders that the search's own code made, to one offline HTML page and its charts as PNG."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import vl_convert
from helpers import chromium
from helpers.analytic import AnalyticLosses, expert_linears, space, untied_head
from helpers.report_pages import Page, browse, pixels, rows
from helpers.runs import make_run

from amq.configuration import Configuration, memory_items
from amq.errors import AmqError
from amq.report import charts, write_report
from amq.report.__main__ import main
from amq.report.data import Shown, count_formats, show_bytes, show_change, show_loss
from amq.report.look import VEGA_LITE, Missing
from amq.report.page import NEIGHBOURS
from amq.search.run_folder import RunFolder
from amq.search.select import select_from_run

MARKUP = "</script><img src=x onerror=alert(1)> & $x$"


@pytest.fixture(scope="module")
def additive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the additive solver with a pinned linear, its page written."""
    folder = make_run(tmp_path_factory.mktemp("additive"), model=MARKUP, pin=("0.mlp.up_proj=int4",)).path
    assert main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("paper"), solver="paper", initial=20).path


def test_a_page_and_its_pictures_show_the_same_charts_and_load_nothing(additive: Path) -> None:
    names = ["memory", "bits", "cost", "front", "heldout", "predicted"]
    assert not list(additive.glob(".*")), "temporary files left behind"
    page, run = Page(additive), Shown(RunFolder.open(additive))
    assert page.loads == [] and "default-src 'none'" in page.html
    assert page.specs.keys() == set(names)
    assert {path.stem for path in additive.glob("*.png")} == set(names)
    for name in names:
        chart = charts.CHARTS[name](run)
        assert not isinstance(chart, Missing)
        spec = chart.to_dict()  # Altair validates it against Vega-Lite's schema
        assert page.specs[name] == {key: value for key, value in spec.items() if key != "config"}
        assert vl_convert.vegalite_to_vega(page.specs[name], vl_version=VEGA_LITE)["marks"]
        assert f'id="chart-{name}"' in page.html and page.specs[name]["description"]
        assert len(pixels(additive / f"{name}.png")) > 200, f"{name}.png looks blank"


def test_the_page_answers_in_order_and_escapes_the_models_name(additive: Path) -> None:
    page = Page(additive)
    assert page.headings == [
        "What the budget buys, and what it costs", "Where the bits went", "One step more or less", "Can it be trusted?",
    ]  # fmt: skip
    assert page.words.startswith(f"{MARKUP}: where its bits go") and "img" not in page.tags
    assert page.tags.count("script") == 2, "Vega and the page's own"
    assert "asked for: target 3.3" in page.words and "times as much" in page.words
    assert "On held-out windows the front loses 1." in page.words and "Spearman" in page.words
    assert "An orange frame marks pinned linears." in page.words
    assert "banner" not in page.html.partition("<h1>")[2].partition("<noscript>")[0]


def test_steps_are_the_neighbours_on_the_front_with_what_they_take(additive: Path) -> None:
    folder, words = RunFolder.open(additive), Page(additive).words
    assert folder.front is not None and folder.configuration is not None
    points = sorted(folder.front.front, key=lambda p: p.bits_per_weight)
    at = next(i for i, p in enumerate(points) if p.configuration == dict(folder.configuration.formats))
    for i, point in enumerate(points):
        whole = memory_items(folder.inventory, Configuration(point.configuration, folder.settings.group_size))
        total = sum(item.bytes for item in whole)
        row = f"{abs(i - at)} {'smaller' if i < at else 'larger'} {point.bits_per_weight:.2f} {show_bytes(total)} "
        row += f"{show_loss(point.loss)} {show_loss(point.loss_confirm)}"
        assert (row in words) == (0 < abs(i - at) <= NEIGHBOURS)


def test_the_map_holds_every_configuration_of_the_front(additive: Path) -> None:
    run = Shown(RunFolder.open(additive))
    spec = charts.bits_chart(run).to_dict()
    given = {param["name"]: param["value"] for param in spec["params"] if "value" in param}
    cells = rows(spec)
    assert run.is_chosen(run.choices[given["at"]]) and given["labels"][given["at"]][0].endswith("(chosen)")
    for i, point in enumerate(run.choices):
        assert {cell["linear"]: given["names"][cell["value"][i]] for cell in cells} == point.formats
    assert {cell["linear"] for cell in rows(spec["layer"][1])} == set(run.folder.run.pinned) != set()


def test_the_band_of_held_out_losses_is_drawn_where_the_run_has_one(additive: Path) -> None:
    run = Shown(RunFolder.open(additive))
    assert run.folder.front is not None and run.folder.front.band is not None
    low, high = run.folder.front.band.around(run.front[0].loss or 0.0)
    for draw in (charts.front_chart, charts.heldout_chart):
        spec = draw(run).to_dict()
        edges = rows(spec["layer"][0])
        assert edges and spec["layer"][0]["mark"]["type"] == "area"
        assert all(row["low"] < row["high"] for row in edges) and "clamp" not in json.dumps(spec)
    assert {"bits": run.front[0].bits, "low": low, "high": high} in rows(charts.front_chart(run).to_dict())


def test_the_paper_solver_shows_its_surrogate_and_sensitivities(paper: Path) -> None:
    (paper / "predicted.png").write_bytes(b"of an earlier report")
    written = write_report(paper)
    assert [path.stem for path in written] == ["report", "memory", "bits", "cost", "front", "heldout", "surrogate"]
    assert not (paper / "predicted.png").exists(), "a chart of an earlier report must not survive"
    words, run = Page(paper).words, Shown(RunFolder.open(paper))
    assert run.folder.sensitivity is not None and run.folder.surrogate
    assert f"times the median of {show_loss(run.folder.sensitivity.median)} a linear is pinned" in words
    scores = [row["value"] for row in rows(charts.surrogate_chart(run).to_dict()) if row["score"] == "kendall"]
    assert scores == [row.kendall for row in run.folder.surrogate]
    cells = rows(charts.cost_chart(run).to_dict())
    assert {cell["linear"]: cell["value"] for cell in cells} == run.folder.sensitivity.loss


def test_a_stopped_run_says_so_and_shows_what_it_has(tmp_path: Path) -> None:
    run = make_run(tmp_path, stop_after=3)
    write_report(tmp_path)
    page = Page(tmp_path)
    assert run.run.status == "stopped" and "This run is stopped: what it has found so far follows." in page.words
    assert "There is no error band: 1 of" in page.words
    assert "predicted" in page.specs, "its cost table is there"


def test_a_run_that_has_only_begun_gives_a_page_of_reasons(tmp_path: Path) -> None:
    make_run(tmp_path)
    text = (tmp_path / "run.json").read_text().replace('"finished"', '"running"')
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "archive.jsonl").write_text('{"index": 0, "phase": "unif')  # a line that is being written
    assert [path.name for path in write_report(tmp_path)] == ["report.html"]
    assert (tmp_path / "archive.jsonl").read_text().endswith("unif"), "the report must change nothing of a run"
    page = Page(tmp_path)
    assert page.specs == {} and page.words.count(" chart: ") == 6
    for reason in (
        "nothing was chosen yet",
        "neither a front nor",
        "no sensitivity.json and no cost.json",
        "has a loss",
    ):
        assert reason in page.words
    assert "0 evaluations so far" in page.words and "no other point to compare with" in page.words


def test_one_point_needs_no_slider_and_has_no_neighbour(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert folder.front is not None and folder.configuration is not None
    chosen = [p for p in folder.front.front if p.configuration == dict(folder.configuration.formats)]
    replace(folder.front, front=tuple(chosen)).write(tmp_path / "front.json")
    write_report(tmp_path)
    page = Page(tmp_path)
    assert "no other point to compare with" in page.words
    assert not any("bind" in param for param in page.specs["bits"]["params"])


def test_candidates_without_a_finite_loss_are_counted_and_not_drawn(tmp_path: Path) -> None:
    losses = AnalyticLosses(space(), nan_when="layers.0.mlp.up_proj")  # in int2, so uniform int2 has none
    run = Shown(make_run(tmp_path, losses=losses, target_bits=4.0))
    write_report(tmp_path)
    page, failed = Page(tmp_path), sum(record.loss is None for record in run.evaluated)
    assert failed and f"{failed} of {len(run.evaluated)} evaluations gave no finite loss" in page.words
    assert re.search(r"int2 2\.50 [\d.]+ KiB – – –", page.words), "uniform int2 in its table"
    drawn = [row for row in rows(page.specs["front"]) if row.get("kind") in ("evaluated", "uniform")]
    assert len([row for row in drawn if row["kind"] == "evaluated"]) == len(run.evaluated) - failed
    assert {row["bits"] for row in drawn if row["kind"] == "uniform"} == {p.bits for p in run.uniform if p.loss}


@pytest.mark.parametrize(
    ("given", "refined"), [({"target_bits": 2.6}, True), ({"target_bits": 2.6, "refine": 0}, False)]
)
def test_held_out_windows_that_refinement_looked_at_are_not_called_unseen(
    tmp_path: Path, given: dict[str, float], refined: bool
) -> None:
    """By default too, which `settings.refine` does not tell."""
    folder = make_run(tmp_path, **given).path
    write_report(folder)
    words = Page(folder).words
    assert ("except that --refine looked at them" in words) is refined
    assert ("on windows that --refine looked at" in words) is refined
    assert ("on unseen windows" in words) is not refined


def test_losses_of_nothing_stay_off_the_logarithmic_axes(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert folder.front is not None
    points = (*folder.front.front[:-1], replace(folder.front.front[-1], loss=0.0, loss_confirm=-1e-9))
    replace(folder.front, front=points).write(tmp_path / "front.json")
    run = Shown(RunFolder.open(tmp_path))
    for draw in (charts.front_chart, charts.heldout_chart, charts.predicted_chart):
        marks = {row["bits"] for row in rows(draw(run).to_dict()) if row.get("kind") in ("front", "chosen")}
        assert marks == {point.bits_per_weight for point in points[:-1]}


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("run.json", '"amq/run/3"', '"amq/run/9"', r"run\.json: expected schema 'amq/run/3'"),
        ("front.json", '"int2"', '"int9"', r"front\.json: the configuration has .* expected one of"),
        ("front.json", '"front": [', '"front": [5, ', r"front\.json at \$\.front\[0\]: expected `object`"),
        ("configuration.json", '"layers.0.attn.q_proj"', '"x"', r"the configuration names 'x'"),
        ("cost.json", '"cost": {', '"cost": {"x": {}, ', r"cost\.json: the table has a linear 'x'"),
        ("archive.jsonl", '"loss":0.', '"loss":-5.', r"archive\.jsonl line 1 is damaged"),
    ],
)
def test_broken_files_are_named(additive: Path, tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    for path in additive.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(AmqError, match=message):
        write_report(tmp_path)


def test_a_folder_that_is_no_run_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AmqError, match=r"not a run folder.*run\.json.*python -m amq\.search MODEL --output"):
        write_report(tmp_path)


def test_figures_read_well() -> None:
    assert [show_loss(x) for x in (0.31, 0.0123, 1.5, 0.0, None, math.inf)] == [
        "0.310",
        "0.0123",
        "1.50",
        "0",
        "–",
        "–",
    ]
    assert [show_bytes(x) for x in (12, 2**20, 150 * 2**20, 1.5 * 2**30)] == ["12 B", "1.00 MiB", "150 MiB", "1.50 GiB"]
    assert [show_bytes(x, "+") for x in (-(2**20), 0, 2**20)] == ["−1.00 MiB", "0 B", "+1.00 MiB"]
    assert [show_change(*x) for x in ((1.1, 1.0), (0.5, 1.0), (1.0, 1.0), (None, 1.0))] == [
        "+10 %",
        "−50 %",
        "0 %",
        "–",
    ]
    assert count_formats(["int4", "int2", "int4"]) == "1 × int2, 2 × int4"


@pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs a Chromium browser on PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_wide_and_narrow_without_a_network(additive: Path, tmp_path: Path, scheme: str) -> None:
    with browse(additive / "report.html", tmp_path, scheme, 6) as page:
        slide = (
            "const i = document.querySelector('input[type=range]'); i.value = 0; i.dispatchEvent(new Event('input'));"
        )
        first = page.run("document.querySelector('#chart-bits .role-title').textContent")
        page.run(f"(() => {{ {slide} }})()")
        page.wait(f"document.querySelector('#chart-bits .role-title').textContent != {json.dumps(first)}")


@pytest.fixture(scope="module", params=["tied", "untied"])
def experts(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run over experts, tied or not, with an untied head and embedding; its page written."""
    untie = "experts" if request.param == "untied" else ""
    weights = (*expert_linears(), *untied_head(2))
    folder = make_run(tmp_path_factory.mktemp(request.param), weights=weights, untie=untie, pin=("embed=int8",)).path
    write_report(folder)
    return folder


def test_experts_are_one_cell_and_head_and_embeddings_bars(experts: Path) -> None:
    run, untied = Shown(RunFolder.open(experts)), "untied" in str(experts)
    spec = charts.bits_chart(run).to_dict()
    cells = [row for layer in spec["layer"] for row in rows(layer) if "value" in row]
    assert {cell["role"] for cell in cells if cell["block"] is None} == {"embed", "lm_head"}
    within = [cell for cell in cells if cell["block"] is not None]
    assert len(within) == 2 * 4 and "layers.1.mlp.experts.up_proj.0-3" in {cell["linear"] for cell in within}
    assert any("spread" in cell for cell in within) == untied
    spread = [texts for cell in within for texts in cell.get("spread", ())]
    assert not untied or any(re.fullmatch(r"\d × int2, \d × int3.*", text) for text in spread)
    bars = [layer["encoding"] for layer in spec["layer"] if "x" not in layer["encoding"]]
    assert len(bars) == 2 and {layer["y"]["field"] for layer in bars} == {"role"}, (
        "the bars, and the pinned one's frame"
    )
    costs = {row["linear"]: row for layer in charts.cost_chart(run).to_dict()["layer"] for row in rows(layer)}
    table = run.folder.cost.cost if run.folder.cost else {}
    whole = costs["layers.0.mlp.experts.up_proj.0-3"]
    assert whole["value"] == pytest.approx(sum(table[f"layers.0.mlp.experts.up_proj.{e}"]["int2"] for e in range(4)))
    assert re.fullmatch(r"\S+ to \S+ each", whole["spread"])
    assert "The experts of a layer and role are one cell." in Page(experts).words


def test_sizes_count_the_head_and_say_what_a_token_reads(experts: Path) -> None:
    run, words = Shown(RunFolder.open(experts)), Page(experts).words
    assert run.chosen is not None and run.chosen.formats["embed"] == "int8"
    assert run.size(run.chosen.formats) == sum(item.bytes for item in run.memory)
    assert run.size(run.widest) == 2 * run.folder.run.model.parameters
    read = run.read(run.chosen.formats)
    assert read < run.size(run.chosen.formats) - 256 * 64, "one row of the embedding, half of the experts"
    assert f"For each token {show_bytes(read)} of weights are read" in words
    assert json.loads((experts / "configuration.json").read_text())["bytes_read"] == round(read)
    chosen = select_from_run(experts, memory=str(run.size(run.chosen.formats)))
    assert chosen.details.memory is not None and chosen.details.memory.total <= run.size(run.chosen.formats)
    assert chosen.formats["embed"] == "int8"


def test_a_run_over_experts_is_written_short_and_read_whole(experts: Path) -> None:
    folder, weights = RunFolder.open(experts), (*expert_linears(), *untied_head(2))
    assert folder.inventory.weights == folder.space.weights == weights
    assert len(json.loads((experts / "run.json").read_text())["linears"]) == 2 * 4
    assert all(record.configuration.keys() == {s.name for s in weights} for record in folder.archive)
    if "untied" not in str(experts):
        line = json.loads((experts / "archive.jsonl").read_text().splitlines()[0])
        assert len(line["configuration"]) == 2 * 4 + 2
