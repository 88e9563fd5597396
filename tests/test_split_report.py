"""The report of split runs: folders that the records' own writers made, to one offline HTML page and its charts."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import vl_convert
from helpers import chromium
from helpers.report_pages import Page, browse, pixels, rows
from helpers.split_runs import make_split_run

from amq.errors import AmqError
from amq.report.data import show_bytes
from amq.report.look import GLOBALS, VEGA_LITE, Missing
from amq.split import charts
from amq.split.figures import LAST, LINKS, ShownRun, read_runs
from amq.split.records import RUN, STEPS, WIDTHS, SplitRun, StepRecord, WidthsRecord, read_lines, write_lines
from amq.split.report import write_report

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)> & $x$"
ALONE = ["loss", "bits", "channels-forward", "channels-backward", "links", "parties"]
COMPARED = ["loss", "bits", "widths-forward", "widths-backward", "links", "parties"]


def shown(folder: Path) -> ShownRun:
    return read_runs([folder])[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, evaluated run over a slow link, its page written."""
    folder = make_split_run(tmp_path_factory.mktemp("split") / "waterfill", name=MARKUP, link="20mbit,30ms")
    write_report([folder])
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs, one of them without quantization and one interrupted; the page in the folder `page`."""
    base = tmp_path_factory.mktemp("several")
    runs = [
        make_split_run(base / "none", policy="none", coder="none", target_bits=3.0),
        make_split_run(base / "fixed", policy="fixed", coder="none", status="interrupted", evaluated=False, seed=1),
        make_split_run(base / "<b>bold"),
    ]
    write_report(runs, base / "page")
    return runs


def test_a_page_and_its_pictures_show_the_same_charts_and_load_nothing(run: Path) -> None:
    page, of = Page(run), shown(run)
    drawn = charts.draw([of])
    assert list(drawn) == ALONE and page.specs.keys() == {path.stem for path in run.glob("*.png")} == set(ALONE)
    assert page.loads == [] and "default-src 'none'" in page.html and not list(run.glob(".*"))
    for name, chart in drawn.items():
        assert not isinstance(chart, Missing)
        spec = chart.to_dict()  # Altair validates it against Vega-Lite's schema
        assert page.specs[name] == {key: value for key, value in spec.items() if key != "config"}
        assert vl_convert.vegalite_to_vega(page.specs[name], vl_version=VEGA_LITE)["marks"]
        assert f'id="chart-{name}"' in page.html and page.specs[name]["description"]
        assert len(pixels(run / f"{name}.png")) > 200, f"{name}.png looks blank"
    assert page.headings == [
        "What it cost, and what it brought", "Held-out perplexity", "Where the bits went",
        "Where the time went, and would go",
    ]  # fmt: skip
    assert "banner" not in page.html.partition("<h1>")[2].partition("<noscript>")[0]


def test_names_from_files_are_escaped(run: Path, several: list[Path]) -> None:
    page, compared = Page(run), Page(several[0].parent / "page")
    assert page.words.startswith(f"{MARKUP}: split fine-tuning") and "img" not in page.tags
    assert page.tags.count("script") == 2, "Vega and the page's own"
    assert "<b>bold" in compared.words and "b" not in compared.tags


def test_tiles_and_tables_give_the_records_figures(run: Path) -> None:
    words, steps = Page(run).words, read_lines(run / STEPS, StepRecord)
    record = SplitRun.read(run / RUN)
    sent, last = record.sent + record.received, steps[-1]
    assert sent == last.sent + last.received
    half = 4 * 128 * record.hidden_size * 2 * 2  # 4 windows of 128 tokens, 2 bytes a value, 2 directions
    forward = statistics.fmean(step.forward_bits for step in steps)
    backward = statistics.fmean(step.backward_bits for step in steps)
    payload = sum(step.forward_bytes + step.backward_bytes for step in steps)
    assert f"loss, nats/token {statistics.fmean(s.loss for s in steps[-LAST:]):.3f}" in words
    assert f"sent {show_bytes(sent)} {show_bytes(sent / len(steps))} per step" in words
    assert f"against float16 {half * len(steps) / sent:.1f} × less {show_bytes(half)} per step" in words
    assert f"bits per value {forward:.2f} backward {backward:.2f}" in words
    assert f"{8 * payload / (len(steps) * half / 2):.2f} on the wire" in words
    quality = 15 + 4 / 3
    assert f"held-out perplexity {quality:.2f} 15.00 with the cut unquantized" in words
    for row in ("base 18.25", "tuned 15.00", f"tuned, quantized cut {quality:.2f}"):
        assert f"waterfill {row}" in words
    encode = sum(s.client.encode + s.server.encode for s in steps)
    compute = sum(s.client.compute + s.server.compute for s in steps)
    assert f"encoding {100 * encode / (encode + compute):.1f} %" in words


def test_steps_are_drawn_at_the_bytes_and_bits_that_they_had(run: Path) -> None:
    page, steps = Page(run), read_lines(run / STEPS, StepRecord)
    points = [row for row in rows(page.specs["loss"]["layer"][0]) if "loss" in row]
    assert [(row["MiB"], row["loss"]) for row in points] == [((s.sent + s.received) / 2**20, s.loss) for s in steps]
    means = [row["loss"] for row in rows(page.specs["loss"]["layer"][1])]
    assert means[10] == pytest.approx(statistics.fmean(s.loss for s in steps[8:13]), rel=len(steps) * 2**-52)
    drawn = {(row["direction"], row["step"]): row["bits"] for row in rows(page.specs["bits"])}
    assert drawn == {
        **{("forward", s.step): s.forward_bits for s in steps},
        **{("backward", s.step): s.backward_bits for s in steps},
    }


@pytest.mark.parametrize("channels", [7, 96, 131])
def test_the_map_of_channels_keeps_every_tables_mean(tmp_path: Path, channels: int) -> None:
    of = shown(make_split_run(tmp_path / "run", channels=channels))
    for stream in ("forward", "backward"):
        chart = charts.channels_chart(of, stream)
        assert not isinstance(chart, Missing)
        cells = rows(chart.to_dict())
        for table in of.widths[stream]:
            column = [cell for cell in cells if cell["from"] == table.step]
            assert [cell["low"] for cell in column[1:]] == [cell["high"] for cell in column[:-1]]
            assert (column[0]["low"], column[-1]["high"], len(column)) == (0, channels, min(charts.BINS, channels))
            total = sum(cell["bits"] * (cell["high"] - cell["low"]) for cell in column)
            assert abs(total - sum(table.widths)) <= 0.005 * channels, "cells are rounded to 2 digits"
        last = [cell["bits"] for cell in cells if cell["from"] == of.widths[stream][-1].step]
        assert last == sorted(last)
        assert {cell["to"] for cell in cells} == {table.step for table in of.widths[stream][1:]} | {of.terms.steps}


def test_a_long_run_of_a_wide_model_stays_a_small_page(tmp_path: Path) -> None:
    folder = make_split_run(tmp_path / "run", steps=320, channels=4096)
    write_report([folder])
    page = Page(folder)
    assert len(read_lines(folder / WIDTHS, WidthsRecord)) > 2 * charts.BINS
    assert all(0 < len(rows(page.specs[name])) <= charts.BINS**2 for name in page.specs if "channels" in name)
    assert len(rows(page.specs["loss"])) == len(rows(page.specs["bits"])) == 2 * charts.POINTS
    steps = {row["step"] for row in rows(page.specs["bits"])}
    assert {0, 319} <= steps
    bundle = len(vl_convert.javascript_bundle(GLOBALS, vl_version=VEGA_LITE).encode())
    numbers = 2 * charts.BINS**2 + 4 * charts.POINTS
    assert len(page.html.encode()) - bundle < 120 * numbers + 100_000, "a row of at most 120 characters each"


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_on_a_link_is_the_slower_of_work_and_transfer(tmp_path: Path, parts: int) -> None:
    folder = make_split_run(tmp_path / "run", micro_batches=parts, policy="none", coder="none", channels=4096)
    of, steps = shown(folder), read_lines(folder / STEPS, StepRecord)
    bytes_ = (steps[-1].sent + steps[-1].received) / len(steps)
    client = statistics.median(s.client.compute for s in steps) + statistics.median(s.client.encode for s in steps)
    server = statistics.median(s.server.compute for s in steps) + statistics.median(s.server.encode for s in steps)
    assert server > client
    for rate in LINKS.values():
        transfer = 8 * bytes_ / rate
        assert transfer > server, "the link is what limits this run"
        expected = transfer + client + server if parts == 1 else transfer
        assert of.step_seconds(rate) == pytest.approx(expected, rel=8 * 2**-52)
    assert of.step_seconds(1e15) == pytest.approx(client + server if parts == 1 else server, rel=1e-5)
    chart = charts.links_chart([of])
    assert not isinstance(chart, Missing)
    kinds = {row["what"] for row in rows(chart.to_dict())}
    assert kinds == {"both parties" if parts == 1 else "slower party", "at 20 Mbit/s", "at 100 Mbit/s"}


def test_only_runs_over_a_link_show_a_measured_step(run: Path) -> None:
    of = shown(run)
    measured = [row["seconds"] for row in rows(Page(run).specs["links"]) if row["what"] == "measured"]
    assert measured == [of.measured] == [statistics.median(step.seconds for step in of.steps)]


def test_the_seconds_of_both_parties_are_stacked(run: Path) -> None:
    of, found = shown(run), {(r["who"], r["part"]): r["seconds"] for r in rows(Page(run).specs["parties"])}
    for party in ("client", "server"):
        for part in ("compute", "encode", "wait"):
            assert found[party, part] == statistics.median(getattr(getattr(s, party), part) for s in of.steps)


def test_several_runs_are_compared(several: list[Path]) -> None:
    page = Page(several[0].parent / "page")
    assert page.specs.keys() == set(COMPARED)
    for name in ("loss", "bits", "links"):
        assert {row["run"] for row in rows(page.specs[name])} == {"none", "fixed", "<b>bold"}
    for stream in ("forward", "backward"):
        shares = rows(page.specs[f"widths-{stream}"])
        assert {row["run"] for row in shares} == {"fixed", "<b>bold"}, "without quantization there are no widths"
        for name in ("fixed", "<b>bold"):
            assert math.isclose(sum(row["share"] for row in shares if row["run"] == name), 100, rel_tol=1e-12)
    colors = page.specs["loss"]["layer"][1]["encoding"]["color"]["scale"]
    assert colors["domain"] == ["none", "fixed", "<b>bold"] and len(set(colors["range"])) == 3
    assert "The run fixed is interrupted, at 40 of 40 steps" in page.words and "The run none is" not in page.words
    assert "term none fixed <b>bold" in page.words and "policy none fixed waterfill" in page.words
    assert (
        "seed 0 1 0" in page.words and "window_length" not in page.words.partition("In what the runs differ")[2][:200]
    )
    assert "These runs differ in" not in page.words


def test_many_runs_have_a_colour_each(tmp_path: Path) -> None:
    folders = [make_split_run(tmp_path / f"run{i}", steps=2, channels=8, evaluated=False) for i in range(21)]
    chart = charts.loss_chart(read_runs(folders))
    assert not isinstance(chart, Missing)
    scale = chart.to_dict()["layer"][1]["encoding"]["color"]["scale"]
    assert len(set(scale["range"])) == len(scale["domain"]) == 21


def test_runs_of_different_things_say_that_their_losses_differ_for_that(tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    make_split_run(one)
    make_split_run(other, text="notes.txt", batch=8)
    assert [path.parent for path in write_report([one, other])][:1] == [one]
    words = Page(one).words
    assert "These runs differ in text, batch: the loss of one says little" in words
    assert "term a/run b/run" in words, "folders of one name are told apart"


def test_a_u_shaped_run_has_maps_of_both_cuts_and_twice_the_values(tmp_path: Path) -> None:
    of = shown(make_split_run(tmp_path / "u", labels="client"))
    assert of.float16 == 2 * shown(make_split_run(tmp_path / "plain")).float16
    names = [path.stem for path in write_report([of.path])]
    assert {"channels-forward-1", "channels-backward-1"} <= set(names)
    assert Page(of.path).specs["channels-forward-1"]["title"]["text"] == "Widths of 96 channels, forward, second cut"


def test_a_run_that_has_only_begun_gives_a_page_of_reasons(tmp_path: Path) -> None:
    folder = make_split_run(tmp_path / "run", status="running", evaluated=False)
    (folder / WIDTHS).unlink()
    (folder / STEPS).write_text('{"step": 0, "lo')  # a line that is being written
    (folder / "loss.png").write_bytes(b"of an earlier report")
    record = replace(SplitRun.read(folder / RUN), sent=0, received=0)
    record.write(folder / RUN)
    assert [path.name for path in write_report([folder])] == ["report.html"]
    assert not (folder / "loss.png").exists(), "a chart of an earlier report must not survive"
    assert (folder / STEPS).read_text().endswith('"lo'), "the report must change nothing of a run"
    page = Page(folder)
    assert page.specs == {} and page.words.count(" chart: ") == len(ALONE)
    assert "This run is running, at 0 of 40 steps" in page.words and "the run has no step yet" in page.words
    assert "policy waterfill has written no table of widths" in page.words
    assert "amq split eval has not measured it" in page.words and "Not measured: amq split eval RUN" in page.words


def test_a_running_run_is_counted_by_its_steps(tmp_path: Path) -> None:
    folder = make_split_run(tmp_path / "run", status="running", evaluated=False)
    replace(SplitRun.read(folder / RUN), sent=0, received=0).write(folder / RUN)  # as written at the start
    last = read_lines(folder / STEPS, StepRecord)[-1]
    assert shown(folder).sent == last.sent + last.received > 0


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    folder = make_split_run(tmp_path / "run", steps=12)
    steps = read_lines(folder / STEPS, StepRecord)
    write_lines(folder / STEPS, [*steps[:-1], replace(steps[-1], loss=math.nan)])
    write_report([folder])
    page = Page(folder)
    assert len(rows(page.specs["loss"]["layer"][0])) == 11
    assert "loss, nats/token – mean of the last 10 steps" in page.words
    write_lines(folder / STEPS, [replace(step, loss=math.inf) for step in steps])
    assert charts.loss_chart([shown(folder)]) == Missing("no step has a finite loss")


def test_a_report_of_several_takes_the_place_of_one(tmp_path: Path) -> None:
    runs = [make_split_run(tmp_path / name, steps=8, channels=8) for name in ("a", "b")]
    write_report(runs[:1])
    kept = {path.name: path.read_bytes() for path in runs[0].glob("*.json*")}
    write_report(runs)
    assert {path.stem for path in runs[0].glob("*.png")} == set(COMPARED)
    assert {path.name: path.read_bytes() for path in runs[0].glob("*.json*")} == kept


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (RUN, '"amq-split/1"', '"amq/run/2"', r"split\.json: expected schema 'amq-split/1', got 'amq/run/2'"),
        (RUN, '"batch": 4', '"batch": 0', r"split\.json at \$\.terms: expected batch from 1 to .* got 0"),
        (RUN, '"policy": "waterfill"', '"p": 1', r"split\.json at \$\.terms: .*missing required field `policy`"),
        (STEPS, '"loss": ', '"loss": "x", "was": ', r"steps\.jsonl line 1 at \$\.loss: expected `float`, got `str`"),
        (STEPS, '{"step": 0', '{"step" 0', r"steps\.jsonl line 1 is not valid JSON"),
        (WIDTHS, '"stream": "forward"', '"stream": "sideways"', r"line 1: expected a stream of forward, .*'sideways'"),
        (WIDTHS, '"widths": [', '"widths": [3, ', r"widths\.jsonl line 3: expected 97 widths, got 96"),
        (WIDTHS, '"widths": [', '"widths": [99, ', r"widths\.jsonl line 1: expected widths from 1 to 8, got 99"),
        (STEPS, '"seconds": ', '"seconds": -', r"steps\.jsonl line 1: expected seconds from 0 to .*, got -1\."),
        (STEPS, '"wait": ', '"wait": NaN, "was": ', r"steps\.jsonl line 1: expected wait from 0 to .*, got nan"),
        ("evaluation.json", '"tokens": 8192', '"tokens": "x"', r"evaluation\.json at \$\.tokens: expected `int`"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    folder = make_split_run(tmp_path / "run")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))
    with pytest.raises(AmqError, match=message):
        write_report([folder])
    assert not (folder / "report.html").exists()


def test_a_folder_that_is_no_run_is_named_with_the_remedy(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            AmqError, match=r"not the folder of a split run: expected split\.json.*amq split train MODEL"
        ):
            write_report([folder])
    with pytest.raises(AmqError, match="expected the folder of a run, got none"):
        write_report([])


def test_a_folder_given_twice_and_a_place_that_is_a_file_are_refused(tmp_path: Path) -> None:
    folder = make_split_run(tmp_path / "run", steps=2)
    with pytest.raises(AmqError, match=r"run is given twice: expected different runs"):
        write_report([folder, tmp_path / "x" / ".." / "run"])
    (tmp_path / "file").write_text("")
    with pytest.raises(AmqError, match=r"--output .*file is a file: expected a folder"):
        write_report([folder], tmp_path / "file")


def test_without_its_extra_it_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("amq.split.page", "amq.split.charts", "amq.report.look"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(AmqError, match=r'amq split report needs the extra "split" \(vl_convert is not installed\)'):
        write_report([tmp_path])


@pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs a Chromium browser on PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it_wide_and_narrow_without_a_network(
    run: Path, several: list[Path], tmp_path: Path, scheme: str
) -> None:
    for i, folder in enumerate((run, several[0].parent / "page")):
        with browse(folder / "report.html", tmp_path / str(i), scheme, 6) as page:
            titles = page.run("[...document.querySelectorAll('.chart .role-title')].map(e => e.textContent)")
            assert any("Loss against MiB sent" in title for title in titles), json.dumps(titles)
