"""Every file that a stage writes: its reader gives back what its writer wrote, and names a wrong value by its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.analytic import AnalyticLosses, space
from helpers.runs import make_run

from amq.bench.cases import Case
from amq.bench.result import BenchResult, EngineFacts, MachineEntry, ReadBandwidth, Row, SettingsEntry, TextEntry
from amq.checkpoint.record import QuantizationRecord
from amq.configuration import Configuration, Memory, MemoryItem
from amq.errors import AmqError
from amq.eval.order_settings import OrderSettings
from amq.eval.order_table import OrderEntry, OrderRow, OrderTable
from amq.eval.predictor_settings import PredictorSettings
from amq.eval.predictor_table import PredictorRow, PredictorTable
from amq.eval.result import Evaluation, EvaluationSettings
from amq.eval.result import Row as EvaluationRow
from amq.eval.simulated import Simulated
from amq.eval.strategy_settings import StrategySettings
from amq.eval.strategy_table import SeedEntry, StrategyRow, StrategyTable
from amq.eval.tasks import TaskRow
from amq.kernels.launch_table import Entry, LaunchTable
from amq.model.answers import AnswersIndex
from amq.model.gguf.convert import Manifest
from amq.model.own_text import OwnTextIndex
from amq.model.speed_table import SpeedTable
from amq.quantize.bank import BankIndex, BankRecipe
from amq.quantize.log import LinearOutcome, OuterOutcome, PerplexityFigures, QuantizationLog, SourceEntry, Tuning
from amq.quantize.resume import Facts, Identity
from amq.quantize.settings import QuantizeSettings
from amq.search.archive import read_archive
from amq.search.front_file import Front, FrontPoint, make_band
from amq.search.records import Cost, RunFile, SurrogateScores
from amq.search.run_folder import RunFolder
from amq.search.select import select_from_run
from amq.search.sensitivity import Sensitivity
from amq.search.share import Share, Shares
from amq.split.records import EvaluationRow as EvaluationLine
from amq.split.records import SplitEvaluation, SplitRun
from amq.util.files import read_json, write_json
from amq.util.records import JsonFile, read_record, to_json

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@dataclass(frozen=True)
class Artifact:
    """A record, the type that reads it, and what of its JSON may be of any type (names of keys)."""

    record: Any
    kind: Any
    free: frozenset[str] = frozenset()

    def write(self, path: Path) -> None:
        if isinstance(self.record, (JsonFile, Configuration)):
            self.record.write(path) if isinstance(self.record, JsonFile) else self.record.save(path)
        else:
            write_json(path, to_json(self.record))

    def read(self, path: Path) -> Any:
        if self.kind is Configuration:
            return Configuration.load(path)
        is_file = isinstance(self.kind, type) and issubclass(self.kind, JsonFile)
        return self.kind.read(path) if is_file else read_record(path, self.kind)


def row(engine: str) -> Row:
    return Row(
        engine=engine, test="tg4", kind="decode", tokens=4, sequences=1, depth=0, threads=2, configuration="",
        file_bytes=None, weight_bytes_per_token=2e3, tokens_per_second=8.0, lowest=7.5, highest=8.5, samples=(7.5, 8.5),
        first_token_seconds=None, weights_bytes_per_second=1.6e4, share_of_memory_bandwidth=0.5,
        share_of_model_size_bandwidth=0.25, others=None,
    )  # fmt: skip


BENCH = BenchResult(
    model="m",
    settings=SettingsEntry(
        repetitions=2, threads=2, seed=0, device="cpu", backend=None, activations="int8", dtype="auto",
        tests=(Case(True, 4).name,),
    ),
    counted="so",
    machine=MachineEntry(processor="a CPU", cores=2, isa="avx2", environment={"OMP_NUM_THREADS": "2"}),
    read_bandwidth={"memory": ReadBandwidth(bytes=10, bytes_per_second=1.5, lowest=1.0, highest=2.0)},
    engines={
        "amq": EngineFacts(
            version="1", description="cpu", file_bytes=3000, weight_bytes=2000, vocab_size=100, load_seconds=0.5,
            startup_seconds=(1.5, 1.25), resident_memory_bytes=1, peak_memory_bytes=2, perplexity=5.5,
        )
    },
    rows=(row("amq"),),
    ratios={},
    scaling={"amq": {"tg4 x2": 1.5}},
    perplexity=TextEntry(text="pydoc", windows=2, window_length=32, window_prefix=("<s>",)),
    trials=({"configuration": "as stored", "tg24": 2.5},),
    left_out={"llama.cpp": "it is not installed"},
    warnings=("busy",),
)  # fmt: skip
BANK = BankRecipe("gptq", 64, "pydoc", 24, 512, 0)
EVALUATION = Evaluation(
    settings=EvaluationSettings(
        model="m", text="pydoc", tokens=128, window_length=32, stride=31, window_prefix=("<s>",), backend="reference",
        activations="fp32", bank=BANK, tasks={"limit": None, "lm_eval": "0.4"},
    ),
    rows=(
        EvaluationRow("full", 16.0, 5.5, 1.7, 100),
        EvaluationRow("full, simulated", 16.0, 6.5, 1.9, 100, Simulated("int4", 64, True)),
        EvaluationRow("int2", 2.5, None, None, 20),
    ),
    tasks=(TaskRow("full", "piqa", "acc", "none", 0.75, 0.01, 0, 100),),
)  # fmt: skip
STRATEGIES = StrategyTable(
    settings=StrategySettings.make(model="m", output="out"), fingerprint="f" * 32, measured_by="native engine",
    texts={"calibration": "0" * 64}, ends=(2.5, 4.5), hv_budgets=(2.75, 3.0), full=16.5,
    provenance={"commit": "c"}, seeds={"0": SeedEntry("b", "w")},
    rows=(StrategyRow(strategy="uniform", seed=0, evaluations=2, singles=0, passes=0, seconds=1.5, equivalents=2.0,
                      hv7=0.5, losses={"3": None}, bits={"3": 2.5}, perplexity={"3": 20.5}),),
)  # fmt: skip
SHARES = Shares(
    memory=1 << 20, context=700, windows=2, length=700, scored=256, chosen="shared", final=0.1, final_in_default=0.09,
    shares=(Share("shared", {"layers.0-1": "int8"}, 4096, 3.25, {"layers.0.q_proj": "int4"}, 0.12, 0.1),),
)  # fmt: skip
ORDER = OrderTable(
    settings=OrderSettings.make(model="m", output="out"), fingerprint="f" * 32, measured_by="native engine",
    text="0" * 64, windows="w", banks={"gptq": "b"}, provenance={"commit": "c"},
    rows=(OrderRow(part="3", bank="gptq", method="awq", configurations=2, spearman=1.0, kendall=1.0, regret=0.25),),
    entries=(OrderEntry(part="3", point="0120", bits=3.0, banks={"gptq": 0.5}, deployed={"awq": None}),),
)  # fmt: skip
PREDICTOR = PredictorTable(
    settings=PredictorSettings.make(table="t", output="out"), costs="0" * 64, linears=4, provenance={"commit": "c"},
    rows=(PredictorRow(case="clean", predictor="rbf", evaluations=50, seed=0, spearman=0.5, kendall=0.25,
                       within_spearman=0.5, within_kendall=0.25),),
)  # fmt: skip
SPEEDS = SpeedTable(
    processor="a CPU", isa="avx2", threads=2, kernels="0" * 16, model="1" * 16, activations="int8", cache="float16",
    group_size=64, linears={"64x128": {"int4": 1.5e-6, "16bit": 4e-6}}, depths={"0": 1e-5, "1024": 2.5e-5},
)  # fmt: skip
MEMORY = Memory.of([MemoryItem("linears: codes", 96), MemoryItem("lm_head", 64, "int8")])
LOG = QuantizationLog(
    settings=QuantizeSettings(model="m", output="out", uniform="int4", pin=["a=16bit"]),
    model=SourceEntry("m", "f" * 32),
    calibration_sha256="0" * 64,
    window_prefix=("<s>",),
    bits_per_weight=4.25,
    memory=MEMORY,
    perplexity=PerplexityFigures(text="docstrings", tokens=64, window_length=32, rows={"full": 5.5, "gptq": None}),
    linears={"a": LinearOutcome("16bit", (8, 64)), "b": LinearOutcome("int4", (8, 64), 0.125)},
    not_quantized={"c": "its weight is shared"},
    head=OuterOutcome(name="lm_head", format="int8", shape=(256, 64), bytes=64, relative_error=0.01),
    tuning=Tuning(
        text="self",
        windows=64,
        held_out=8,
        start=0.5,
        best=0.25,
        steps=9,
        best_step=9,
        seconds=60.5,
        end="the time was over",
    ),
    notes=("a note",),
    seconds=1.5,
    peak_memory_bytes=1 << 20,
)
IDENTITY = replace(
    Identity.of(QuantizeSettings(model="m", output="out", uniform="int4", method="autoround")),
    model="f" * 32, formats={"b": "int4"}, group_size=64, inputs={"calibration text": "0" * 64},
)  # fmt: skip
TABLE = LaunchTable(
    gpu="H1", torch="2", triton="3", date="2026-11-29",
    entries={"cuda in_features=64": Entry(parameters=8, microseconds=1.5, tried={"warps 8": 1.5}),
             "triton": Entry(parameters=[0, 32, 1, 4, 3])},
)  # fmt: skip
SPLIT = SplitRun(
    model="m", architecture="LlamaForCausalLM", blocks=30, parameters=1 << 40, trainable=9, hidden_size=64,
    link="20mbit", text="docstrings", terms={"seed": 1, "text": "t"}, status="finished", sent=1 << 40, received=0,
    machine={"threads": 1}, versions={"torch": "2"},
)  # fmt: skip
SPLIT_EVALUATION = SplitEvaluation(
    text="docstrings, held out", tokens=512,
    rows=(EvaluationLine(name="tuned", perplexity=2.5, loss=0.5),
          EvaluationLine(name="tuned, quantized cut", perplexity=2.75, loss=0.625, bits=3.25)),
)  # fmt: skip
ANY_SETTING = frozenset({"memory", "time", "cache_memory"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """One run of each solver that leaves other files."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "additive": make_run(folder / "additive", pin=["layers.0.attn.q_proj=16bit"], target_bits=4.0),
        "paper": make_run(folder / "paper", solver="paper"),
    }


ARTIFACTS: dict[str, Callable[[dict[str, RunFolder]], Artifact]] = {
    "run": lambda runs: Artifact(runs["additive"].run, RunFile, ANY_SETTING),
    "front": lambda runs: Artifact(runs["additive"].front, Front),
    "front of the paper's solver": lambda runs: Artifact(runs["paper"].front, Front),
    "cost": lambda runs: Artifact(runs["additive"].cost, Cost),
    "speed": lambda _: Artifact(SPEEDS, SpeedTable),
    "context": lambda _: Artifact(SHARES, Shares, frozenset({"kinds", "formats"})),
    "sensitivity": lambda runs: Artifact(runs["paper"].sensitivity, Sensitivity),
    "surrogate": lambda runs: Artifact(runs["paper"].surrogate, tuple[SurrogateScores, ...]),
    "configuration": lambda runs: Artifact(runs["additive"].configuration, Configuration),
    "quantization log": lambda _: Artifact(LOG, QuantizationLog),
    "identity": lambda _: Artifact(IDENTITY, Identity),
    "facts of a block": lambda _: Artifact(Facts(["b"], {"b": 0.125}, ["a note"]), Facts),
    "bank": lambda _: Artifact(BankIndex(proxy="gptq", group_size=64, model="LlamaForCausalLM", linears=7), BankIndex),
    "own text": lambda _: Artifact(OwnTextIndex(model="M", length=512, seed=0, kinds=("plain", "chat")), OwnTextIndex),
    "answers": lambda _: Artifact(AnswersIndex(model="M", kind="chat", limit=64, seed=0, half=1), AnswersIndex),
    "bench": lambda _: Artifact(BENCH, BenchResult, frozenset({"configuration", "tg24"})),
    "evaluation": lambda _: Artifact(EVALUATION, Evaluation, frozenset({"lm_eval"})),
    "strategies": lambda _: Artifact(
        STRATEGIES, StrategyTable, frozenset({"calibration", "commit", "0", "3", "cache_memory"})
    ),
    "order": lambda _: Artifact(ORDER, OrderTable, frozenset({"commit", "awq", "cache_memory"})),
    "predictor": lambda _: Artifact(PREDICTOR, PredictorTable, frozenset({"commit"})),
    "launch table": lambda _: Artifact(TABLE, LaunchTable, frozenset({"parameters", "warps 8"})),
    "split run": lambda _: Artifact(SPLIT, SplitRun, frozenset({"seed", "text", "threads"})),
    "evaluation of a split run": lambda _: Artifact(SPLIT_EVALUATION, SplitEvaluation),
    "conversion": lambda _: Artifact(Manifest(2, {"config.json": "f" * 128}), Manifest),
}


def test_every_kind_of_file_is_listed(runs: dict[str, RunFolder]) -> None:
    listed = {make(runs).kind for make in ARTIFACTS.values()}
    assert {kind for kind in JsonFile.__subclasses__() if kind.__module__.startswith("amq.")} <= listed


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_is_written_is_read_back(runs: dict[str, RunFolder], tmp_path: Path, name: str) -> None:
    artifact, path = ARTIFACTS[name](runs), tmp_path / "file.json"
    artifact.write(path)
    assert artifact.read(path) == artifact.record
    before = path.read_bytes()
    artifact.write(path)
    assert path.read_bytes() == before


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of what is inside a JSON value; of a long list or object the first three and the last."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in [*items[:3], *items[-1:]] if len(items) > 40 else items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_value_of_another_type_is_named_with_its_place(runs: dict[str, RunFolder], tmp_path: Path, name: str) -> None:
    """Each value in turn: a number becomes a text, everything else a number."""
    artifact, path = ARTIFACTS[name](runs), tmp_path / "file.json"
    artifact.write(path)
    whole = json.loads(path.read_text())
    accepted, tried = set(), 0
    for place in places(whole):
        data = json.loads(json.dumps(whole))
        *outer, last = place
        inner = data
        for key in outer:
            inner = inner[key]
        if inner[last] is None or last == "schema":
            continue
        number = isinstance(inner[last], (int, float)) and not isinstance(inner[last], bool)
        inner[last] = "x" if number else 5
        path.write_text(json.dumps(data))
        tried += 1
        try:
            artifact.read(path)
        except AmqError as error:
            text = str(error)
            assert text.startswith(f"{path} at $") and "expected `" in text and ", got `" in text, (place, text)
            assert "\n" not in text
        else:
            accepted.add(last)
    assert tried >= 2 and accepted <= artifact.free, accepted - artifact.free


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize(
    "text", ["", "{", "5", "[[5]]", '{"schema": "amq/other/1"}', "[" * 100_000], ids=lambda t: t[:12]
)
def test_a_file_of_something_else_is_named(runs: dict[str, RunFolder], tmp_path: Path, name: str, text: str) -> None:
    artifact, path = ARTIFACTS[name](runs), tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(AmqError) as raised:
        artifact.read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("tied", [False, True])
def test_the_record_in_config_json_is_read_back(tmp_path: Path, tied: bool) -> None:
    shapes = {"a.q": (64, 32), "a.k": (32, 32), "lm_head": (256, 32)}
    formats = {"a.q": "int3", "a.k": "int4", "lm_head": "int8"}
    shared, embedding = (("a.q", "a.k"),), {"embed": "lm_head"} if tied else {}
    kept, kinds = {"a.v": (32, 32)}, {"layers.0": "int4", "layers.1": "int4", "layers.2": "a kind of later"}
    record = QuantizationRecord(formats, shapes, 32, "gptq", shared, "lm_head", embedding, kept, cache=kinds)
    assert record.json()["cache"] == {"layers.0-1": "int4", "layers.2": "a kind of later"}
    assert record.version == replace(record, cache={}).version  # what does not know it reads the same weights
    assert record.configuration.cache == kinds
    write_json(tmp_path / "config.json", record.json())
    assert QuantizationRecord.parse(read_json(tmp_path / "config.json"), "config.json") == record
    plain = QuantizationRecord({"a.q": "int3"}, {"a.q": (64, 32)}, 32)
    assert not plain.json().keys() & {"head", "embedding", "kept", "cache"}
    assert QuantizationRecord.parse(json.loads(json.dumps(plain.json())), "config.json") == plain


def test_the_archive_is_read_back_line_by_line(runs: dict[str, RunFolder]) -> None:
    for run in runs.values():
        lines = (run.path / "archive.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [to_json(record) for record in run.archive]
        assert tuple(read_archive(run.path / "archive.jsonl")) == run.archive
    assert any(record.iteration is not None for record in runs["paper"].archive)
    assert all("iteration" not in to_json(record) for record in runs["additive"].archive)


def test_figures_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    broken = replace(EVALUATION, rows=(EvaluationRow("int2", 2.5, math.inf, math.nan, 20),))
    broken.write(tmp_path / "eval.json")
    assert Evaluation.read(tmp_path / "eval.json").rows == (EvaluationRow("int2", 2.5, None, None, 20),)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("bench-*.json")), ids=lambda p: p.stem)
def test_results_of_earlier_versions_are_still_read(path: Path) -> None:
    result = BenchResult.read(path)
    assert result.rows and set(result.engines) >= {row.engine for row in result.rows}


def test_a_run_of_schema_1_is_still_chosen_from(tmp_path: Path) -> None:
    """It lacks what later versions added; only `--resume` refuses it."""
    run = make_run(tmp_path / "run")
    data = json.loads((run.path / "run.json").read_text()) | {"schema": "amq/run/1"}
    del data["calibration"]["windows"], data["calibration"]["window_prefix"], data["model"]["architecture"]
    (run.path / "run.json").write_text(json.dumps(data))
    front = json.loads((run.path / "front.json").read_text())
    del front["band"], front["band_missing"]
    (run.path / "front.json").write_text(json.dumps(front))
    old = RunFolder.open(run.path)
    assert old.run.schema == "amq/run/1" and old.front is not None and old.front.band is None
    assert select_from_run(run.path, target_bits=3.3).formats == run.configuration.formats


def test_a_stopped_run_has_its_choice_and_no_band(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stop_after=6)
    assert run.run.status == "stopped" and run.configuration is not None and run.front is not None
    assert run.front.band is None and "it takes 4" in run.front.band_missing


def test_the_readers_of_a_run_write_nothing(tmp_path: Path) -> None:
    """Not even where the search that goes on has written half of a line, and with a folder that cannot be written."""
    run = make_run(tmp_path / "run")
    with open(run.path / "archive.jsonl", "ab") as file:
        file.write(b'{"index":99,"solv')
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.iterdir()}
    reader = RunFolder.open(run.path)
    assert reader.archive == run.archive and reader.cost and reader.front and reader.configuration
    assert reader.sensitivity is None and reader.surrogate is None
    select_from_run(run.path, target_bits=3.0)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.path.iterdir()} == before


def point(loss: float, confirm: float | None) -> FrontPoint:
    return FrontPoint(
        bits_per_weight=3.0, loss=loss, loss_confirm=confirm, predicted=None, archive_index=0, configuration={}
    )


def test_the_band_is_where_held_out_losses_lie(tmp_path: Path) -> None:
    """On the analytic problem the held-out windows see costs 1.1 times as high."""
    front = make_run(tmp_path / "run", points=10).front
    assert front is not None and front.band is not None and front.band.points == len(front.front) >= 8
    assert 1.08 < front.band.ratio < 1.1 and front.band.low < front.band.ratio < front.band.high
    inside = 0
    for p in front.front:
        low, high = front.band.around(p.loss)
        assert p.loss_confirm is not None
        inside += low <= p.loss_confirm <= high
    assert inside >= 0.9 * len(front.front)


def test_the_band_by_hand() -> None:
    losses = (0.1, 0.2, 0.3, 0.4)
    equal = make_band([point(loss, 2 * loss) for loss in losses])
    assert not isinstance(equal, str) and equal.low == equal.ratio == equal.high == 2.0
    factors = (1.0, 2.0, 1.0, 2.0)  # ln: mean ln 2 / 2, deviation ln 2 / √3
    band = make_band([point(loss, f * loss) for loss, f in zip(losses, factors, strict=True)])
    reach = 2 * math.log(2) / math.sqrt(3) * math.sqrt(1.25)
    assert not isinstance(band, str)
    assert band.ratio == pytest.approx(math.sqrt(2), rel=1e-5)
    assert band.low == pytest.approx(math.sqrt(2) * math.exp(-reach), rel=1e-5)
    assert band.high == pytest.approx(math.sqrt(2) * math.exp(reach), rel=1e-5)
    few = [*(point(loss, loss) for loss in losses[:3]), point(0.4, None), point(0.0, 0.1), point(-1e-6, 0.1)]
    assert make_band(few) == "3 of 6 points of the front have a loss on held-out windows; it takes 4"


def test_losses_that_are_not_finite_go_through_every_file(tmp_path: Path) -> None:
    """A configuration that overflows is infeasible: null in the archive, and the run is read like any other."""
    losses = AnalyticLosses(space(), nan_when="layers.0.attn.q_proj")
    run = make_run(tmp_path / "run", solver="paper", losses=losses)
    assert any(record.loss is None for record in run.archive) and run.front is not None
    assert run.front.uniform[0].loss is None
    assert run.sensitivity is not None and run.sensitivity.loss["layers.0.attn.q_proj"] is None
    assert "layers.0.attn.q_proj" in run.sensitivity.pinned
