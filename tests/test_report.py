"""The search report: from a synthetic run folder to one offline HTML file and its PNG charts."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.report.charts import (
    FrontData,
    Omitted,
    SensitivityData,
    bits_data,
    front_data,
    memory_data,
    sensitivity_data,
)
from amq.report.data import count_formats, load_run, show_bytes, show_loss
from amq.report.style import format_colors, log_ticks, pick_ticks
from amq.report.write import write_report

pytest.importorskip("plotly", reason="the report needs plotly")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

ROLES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
GROUP = 128
FORMAT_NAMES = ("int2", "int3", "int4")
CHARTS = ("front", "bits", "sensitivity", "surrogate", "memory")


class SyntheticRun:
    """Writes run folders that look like a search's; losses follow an additive cost with a few sensitive linears."""

    def __init__(self, folder: Path, blocks: int = 3, formats: tuple[str, ...] = FORMAT_NAMES, seed: int = 0) -> None:
        self.folder, self.blocks, self.formats, self.random = folder, blocks, formats, random.Random(seed)
        self.linears = [
            {"name": f"model.layers.{b}.{role}", "block": b, "role": role, "out_features": out, "in_features": inner}
            for b in range(blocks)
            for role, (out, inner) in ROLES.items()
        ]
        self.weight = {spec["name"]: self._weight(spec) for spec in self.linears}
        self.numel = {spec["name"]: spec["out_features"] * spec["in_features"] for spec in self.linears}
        self.model: dict[str, Any] = {"name": "smollm2", "parameters": 134515008, "blocks": blocks}
        self.lines: list[dict[str, Any]] = []

    def _weight(self, spec: dict[str, Any]) -> float:
        edge = 1 + 2.5 * (spec["block"] in (0, self.blocks - 1))
        kind = 6 if spec["role"] == "mlp.down_proj" else 2 if "v_proj" in spec["role"] else 1
        kind *= 8 if spec["name"].endswith("1.mlp.down_proj") else 1
        return edge * kind * math.exp(self.random.gauss(0, 0.5)) * 0.6 / len(self.weight_names())

    def weight_names(self) -> list[str]:
        return [spec["name"] for spec in self.linears]

    def cost(self, linear: str, name: str) -> float:
        return self.weight[linear] * 4.0 ** (2 - FORMATS[name].code_bits)

    def loss(self, configuration: dict[str, str]) -> float:
        return math.log(2) * -math.expm1(-1.3 * sum(self.cost(*pair) for pair in configuration.items()))

    def bits(self, configuration: dict[str, str]) -> float:
        total = sum(self.numel[k] * FORMATS[v].bits_per_weight(GROUP) for k, v in configuration.items())
        return total / sum(self.numel.values())

    def at(self, slope: float) -> dict[str, str]:
        """Per linear the format that minimises cost + slope · bytes: a point of the convex front."""
        return {
            k: min(self.formats, key=lambda v: self.cost(k, v) + slope * self.numel[k] * FORMATS[v].code_bits)
            for k in self.weight_names()
        }

    def record(self, phase: str, configuration: dict[str, str], **more: Any) -> dict[str, Any]:
        line = {"index": len(self.lines), "solver": "additive", "phase": phase, "windows": "search"}
        line |= {"configuration": configuration, "bits_per_weight": self.bits(configuration), "seed": 0, "seconds": 1.1}
        self.lines.append(line | {"loss": self.loss(configuration) * self.random.uniform(0.93, 1.07)} | more)
        return self.lines[-1]

    def row(self, line: dict[str, Any], **more: Any) -> dict[str, Any]:
        confirm = line["loss"] * self.random.uniform(0.9, 1.15)
        kept = {key: line[key] for key in ("bits_per_weight", "loss", "configuration")}
        return kept | {"loss_confirm": confirm, "archive_index": line["index"]} | more

    def write(self, name: str, document: Any) -> None:
        (self.folder / name).write_text(json.dumps(document))

    def write_archive(self) -> None:
        (self.folder / "archive.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def write_run(self, **settings: Any) -> None:
        common = {"group_size": GROUP, "formats": list(self.formats), "target_bits": 3.5}
        self.write(
            "run.json",
            {
                "schema": "amq/run/1",
                "status": "finished",
                "model": self.model,
                "settings": common | {"solver": "additive"} | settings,
                "versions": {"amq": "0.1.0", "torch": "2.13.0"},
                "machine": {"cpu": "AMD EPYC 9654 96-Core Processor", "threads": 2},
                "linears": self.linears,
                "pinned": {},
                "timings": {"load": 2.0, "bank": 40.1, "evaluate": 18.0, "total": 61.5},
                "evaluations": {"count": len(self.lines), "sensitivities": 21, "seconds_each": 1.1},
            },
        )

    def write_additive(self, points: int = 5) -> None:
        """A finished run of the additive solver."""
        uniform = []
        for name in self.formats:
            line = self.record("uniform", dict.fromkeys(self.weight_names(), name))
            uniform.append(self.row(line, name=name))
        slopes = [10 ** (-12 + 6 * i / (points - 1)) for i in range(points)]
        found = {json.dumps(c): c for c in map(self.at, slopes)}
        front = []
        for i, configuration in enumerate(found.values()):
            line = self.record("refine" if i % 4 == 3 else "front", configuration)
            front.append(self.row(line, predicted=self.loss(configuration)))
        front.sort(key=lambda row: row["bits_per_weight"])
        curve = [{"bits_per_weight": row["bits_per_weight"], "loss": row["predicted"]} for row in front]
        chosen = min(front, key=lambda row: abs(row["bits_per_weight"] - 3.5))
        fit = {"a": 1.3, "p": 1.0, "points": len(self.lines), "spearman": 0.993, "kendall": 0.95, "rmse": 0.0042}
        self.write("front.json", self.front_document(uniform, front) | {"curve": curve, "fit": fit})
        self.write_configuration(chosen)
        costs = {k: {v: self.cost(k, v) for v in self.formats} for k in self.weight_names()}
        self.write("cost.json", {"schema": "amq/cost/1", "kind": "fisher", "unit": "nats/token", "cost": costs})
        self.write_archive()
        self.write_run()

    def front_document(self, uniform: list[dict[str, Any]], front: list[dict[str, Any]]) -> dict[str, Any]:
        top = {"schema": "amq/front/1", "bits_range": [2.25, 4.25], "hypervolume": 0.55}
        return top | {"uniform": uniform, "front": front, "curve": None, "fit": None}

    def write_configuration(self, row: dict[str, Any]) -> None:
        codes = sum(self.numel[k] * FORMATS[v].code_bits / 8 for k, v in row["configuration"].items())
        items = [
            {"name": "linears: codes", "bytes": int(codes)},
            {"name": "linears: scales and zero points", "bytes": sum(self.numel.values()) // 32},
            {"name": "embeddings", "bytes": 2 * 49152 * 576},
            {"name": "lm_head", "bytes": 0, "note": "tied to the embeddings"},
            {"name": "norms and biases", "bytes": 2 * 61 * 576},
            {"name": "KV cache", "bytes": 8192 * 23040, "note": "8192 tokens, fp16"},
        ]
        kept = {key: row[key] for key in ("bits_per_weight", "loss", "loss_confirm")}
        document = {"schema": "amq/configuration/1", "model": self.model["name"], "group_size": GROUP} | kept
        memory = {"items": items, "total": sum(item["bytes"] for item in items)}
        extra = {"formats": row["configuration"], "predicted_loss": 0.2, "memory": memory, "provenance": {}}
        self.write("configuration.json", document | extra)

    def write_paper(self, evaluations: int = 60, iterations: int = 6) -> None:
        """A run of the iterative solver, with sensitivities, pinned linears and surrogate scores."""
        lowest, highest = self.formats[0], self.formats[-1]
        base = self.loss(dict.fromkeys(self.weight_names(), highest))
        losses = {}
        for linear in self.weight_names():
            configuration = dict.fromkeys(self.weight_names(), highest) | {linear: lowest}
            losses[linear] = self.record("sensitivity", configuration)["loss"]
        median = sorted(losses.values())[len(losses) // 2]
        pinned = [linear for linear, loss in losses.items() if loss > 2 * median]
        document = {"base_loss": base, "loss": losses, "median": median, "threshold": 2.0, "pinned": pinned}
        sensitivity = {"schema": "amq/sensitivity/1", "lowest": lowest, "highest": highest} | document
        self.write("sensitivity.json", sensitivity)
        for i in range(evaluations):
            rate = self.random.random()
            configuration = self.at(10 ** self.random.uniform(-12, -6)) | dict.fromkeys(pinned, highest)
            for linear in self.random.sample(self.weight_names(), int(rate * len(self.linears))):
                configuration[linear] = self.random.choice(self.formats)
            iteration = max(0, (i - evaluations // 4) * iterations // evaluations)
            self.record("initial" if i < evaluations // 4 else "iteration", configuration, iteration=iteration)
        front: list[dict[str, Any]] = []
        for line in sorted(self.lines, key=lambda line: line["bits_per_weight"]):
            if not front or line["loss"] < front[-1]["loss"]:
                front.append(self.row(line, predicted=None))
        self.write("front.json", self.front_document([], front))
        self.write_configuration(min(front, key=lambda row: abs(row["bits_per_weight"] - 3.5)))
        scores = []
        for i in range(iterations):
            row = {"iteration": i, "evaluations": 250 + 50 * i, "surrogate": "rbf", "rmse": 0.02 / (i + 1) + 0.002}
            row |= {"spearman": 1 - 0.2 / (i + 1), "kendall": 1 - 0.4 / (i + 1), "hypervolume": 0.55 - 0.05 / (i + 1)}
            scores.append(row | {"best_loss_at_budget": None if i == 0 else 0.2 + 0.1 / (i + 1)})
        self.write("surrogate.json", scores)
        self.write_archive()
        self.write_run(solver="paper")


class Page(HTMLParser):
    """Collects what a page would load, its sections' text, and how much JavaScript it carries."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[int] = []
        self.tags: list[str] = []
        self.text = ""
        self.in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.in_script = tag in ("script", "style")
        self.loads += [f"{tag} {key}={value}" for key, value in attrs if key in ("src", "href", "data", "poster")]
        if tag == "link":
            self.loads.append("link")

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts.append(len(data))
        else:
            self.text += data


@pytest.fixture
def run(tmp_path: Path) -> SyntheticRun:
    return SyntheticRun(tmp_path)


def read_page(run: SyntheticRun) -> Page:
    return Page((run.folder / "report.html").read_text(encoding="utf-8"))


def check_pngs(written: list[Path], names: tuple[str, ...]) -> None:
    assert [path.name for path in written] == ["report.html", *(f"{name}.png" for name in names)]
    for path in written[1:]:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 8000, f"{path.name} has {len(data)} bytes"


def test_additive_run_has_every_chart_in_one_offline_file(run: SyntheticRun) -> None:
    run.write_additive()
    written = write_report(run.folder)
    check_pngs(written, CHARTS)
    page = read_page(run)
    assert page.loads == [], "the page must load nothing"
    assert sum(size > 1_000_000 for size in page.scripts) == 1, "plotly's JavaScript must be there exactly once"
    assert "Omitted" not in page.text
    assert "Fisher cost at int2" in page.text and "Predicted and true loss: Spearman 0.993, RMSE 0.0042" in page.text
    for name in CHARTS:
        assert f'id="chart-{name}"' in written[0].read_text(encoding="utf-8")
    assert not list(run.folder.glob(".*")), "temporary files left behind"


def test_paper_run_shows_surrogate_scores_and_pinned_linears(run: SyntheticRun) -> None:
    run.write_paper()
    check_pngs(write_report(run.folder), CHARTS)
    page = read_page(run)
    assert "Surrogate rbf over 6 iterations, 500 evaluations" in page.text
    assert "Sensitivity: one linear at int2, all others at int4" in page.text
    data = sensitivity_data(load_run(run.folder))
    assert isinstance(data, SensitivityData) and data.threshold is not None
    bars = [bar for _, bars in data.panels for bar in bars]
    assert any(bar.pinned for bar in bars) and "With every linear at int4 the loss is" in page.text
    assert {bar.linear for bar in bars if bar.pinned} == {bar.linear for bar in bars if bar.value > data.threshold}


def test_missing_files_and_null_losses_leave_reasons(run: SyntheticRun) -> None:
    run.model = {"name": "<script>alert(1)</script> $x$", "fingerprint": None, "parameters": None, "blocks": None}
    run.write_additive()
    for name in ("cost.json", "configuration.json", "front.json"):
        (run.folder / name).unlink()
    for line in run.lines[::2]:
        line["loss"] = None
    run.write_archive()
    (run.folder / "memory.png").write_bytes(b"of an earlier report")
    check_pngs(write_report(run.folder), ("front",))
    page = read_page(run)
    assert page.text.count("Omitted:") == 4
    assert "infeasible candidates (loss NaN or infinite) not drawn" in page.text
    for reason in ("no sensitivity.json and no cost.json", "no surrogate.json (additive", "no memory breakdown"):
        assert reason in page.text
    assert not (run.folder / "memory.png").exists(), "a chart of an earlier report must not survive"
    assert "<script>alert(1)</script> $x$" in page.text, "the name must arrive as text"
    assert page.tags.count("script") == 2, "plotly and one chart"


def test_names_from_the_run_cannot_inject_into_charts(run: SyntheticRun) -> None:
    for spec in run.linears:
        spec["role"] = spec["role"].replace("mlp", "</script><img src=x>")
    run.write_additive()
    write_report(run.folder)
    page = read_page(run)
    assert page.loads == [] and "img" not in page.tags


def test_missing_run_json_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(AmqError, match=r"run\.json does not exist.*python -m amq\.search MODEL --output"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", r"run\.json is not valid JSON"),
        ("run.json", '{"schema": "amq/run/9"}', r"run\.json: expected schema 'amq/run/2', got 'amq/run/9'"),
        ("front.json", "[1,", r"front\.json is not valid JSON"),
        ("archive.jsonl", '{"a"\n{}\n', r"archive\.jsonl line 1 is damaged"),
        ("run.json", '{"schema": "amq/run/1", "linears": 5}', r"run\.json at \$\.linears: expected `array \| null`"),
        ("run.json", "[" * 100_000, r"run\.json is not valid JSON: it is nested too deeply"),
        ("front.json", '{"front": [5]}', r"front\.json at \$\.front\[0\]: expected `object`"),
        ("front.json", '{"front": [{"configuration": {"a": 5}}]}', r"front\.json at .*expected `str`, got `int`"),
        ("cost.json", '{"cost": null, "kind": []}', r"cost\.json at \$\.kind"),
        ("sensitivity.json", "3", r"sensitivity\.json: expected `object`"),
        ("surrogate.json", '{"a": 1}', r"surrogate\.json: expected `array`"),
        ("configuration.json", '{"formats": [1]}', r"configuration\.json at \$\.formats"),
        ("archive.jsonl", '{"index": 0, "loss": -5}\n', r"archive\.jsonl line 1 is damaged"),
    ],
)
def test_broken_files_are_named(run: SyntheticRun, name: str, text: str, message: str) -> None:
    run.write_additive()
    (run.folder / name).write_text(text)
    with pytest.raises(AmqError, match=message):
        write_report(run.folder)


def test_torn_last_archive_line_is_left_out(run: SyntheticRun) -> None:
    run.write_additive()
    with (run.folder / "archive.jsonl").open("a") as file:
        file.write('{"index": 99, "bits_per')
    assert len(load_run(run.folder).archive) == len(run.lines)


def test_nearly_empty_run_still_gives_a_page(run: SyntheticRun) -> None:
    nothing = dict.fromkeys(("model", "settings", "linears", "timings", "machine"))
    run.write("run.json", {"schema": "amq/run/1", "status": "stopped"} | nothing)
    assert [path.name for path in write_report(run.folder)] == ["report.html"]
    page = read_page(run)
    assert page.text.count("Omitted:") == 5 and "stopped before it finished" in page.text


def test_unevaluated_choice_is_mapped_and_called_predicted(run: SyntheticRun) -> None:
    run.write_additive()
    path = run.folder / "configuration.json"
    document = json.loads(path.read_text())
    document["formats"] = document["formats"] | {run.linears[0]["name"]: "int8"}
    path.write_text(json.dumps(document | {"loss": None, "loss_confirm": None}))
    loaded = load_run(run.folder)
    bits, front = bits_data(loaded), front_data(loaded)
    assert not isinstance(bits, Omitted) and isinstance(front, FrontData) and front.chosen is not None
    assert bits.formats == ["int2", "int3", "int4", "int8"]
    assert bits.maps[bits.shown].label.endswith("(chosen)") and bits.maps[bits.shown].cells[0][0] == 3
    assert "predicted loss 0.200" in front.chosen.name


def test_memory_at_16_bits_counts_two_bytes_per_weight(run: SyntheticRun) -> None:
    run.model["parameters"] = sum(run.numel.values()) + 49152 * 576 + 61 * 576
    run.write_additive()
    data = memory_data(load_run(run.folder))
    assert not isinstance(data, Omitted) and data.compared
    assert data.total_16 == 2 * run.model["parameters"] + 8192 * 23040
    assert data.total == json.loads((run.folder / "configuration.json").read_text())["memory"]["total"]


def test_many_experts_share_panels_and_zero_losses_stay_on_the_log_axis(run: SyntheticRun) -> None:
    for spec in run.linears[:]:
        if spec["role"].startswith("mlp"):
            copies = ({"name": f"{spec['name']}.{i}", "role": f"{spec['role']}.{i}"} for i in range(8))
            run.linears += [spec | copy for copy in copies]
    run.weight = {spec["name"]: 1e-4 for spec in run.linears}
    run.numel = dict.fromkeys(run.weight, 1000)
    run.write_additive()
    document = json.loads((run.folder / "front.json").read_text())
    document["front"][-1]["loss"] = 0.0
    run.write("front.json", document)
    write_report(run.folder)
    loaded = load_run(run.folder)
    data, front = sensitivity_data(loaded), front_data(loaded)
    assert isinstance(data, SensitivityData) and [title for title, _ in data.panels][-1] == "mlp.down_proj.*"
    assert isinstance(front, FrontData) and front.loss_range()[0] > 0


def test_numbers_read_well() -> None:
    assert [show_loss(x) for x in (0.31, 0.0123, 1.5, 0.0, None)] == ["0.310", "0.0123", "1.50", "0", "–"]
    assert [show_bytes(x) for x in (12, 2**20, 150 * 2**20, 1.5 * 2**30)] == ["12 B", "1.00 MiB", "150 MiB", "1.50 GiB"]
    assert count_formats(["int4", "int2", "int4"]) == "1 × int2, 2 × int4"
    assert log_ticks(0.01, 0.5) == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    assert log_ticks(1e-6, 1.0) == pytest.approx([10.0**i for i in range(-6, 1)])
    for low in (0.0101, 0.021, 0.051, 0.09):
        assert len(log_ticks(low, 1.6 * low)) >= 3
    assert pick_ticks(7, 40) == list(range(7)) and len(pick_ticks(80, 40)) == 40 and len(pick_ticks(1000, 40)) <= 40
    for count in range(len(FORMATS) + 3):
        assert len(format_colors(count)) == count
