"""A whole search on a tiny model, from the command line to the run folder, and every bad input that it must refuse."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, byte_tokenizer, tiny_llama

import amq
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.search.__main__ import main
from amq.search.run import _check_output, _engine
from amq.search.run_folder import RunFolder
from amq.search.settings import SearchSettings
from amq.search.working import working_bytes
from amq.util.progress import Progress
from amq.util.settings import run_command

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {
    "group_size": 64, "window_length": 32, "windows": 2, "confirm_windows": 2, "bank_windows": 4, "cost_passes": 2,
    "points": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AMQ_CACHE", str(tmp_path_factory.getbasetemp() / "amq-cache"))


def flags(**given):
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def command(*arguments, capsys):
    """Exit status, stdout, stderr of `python -m amq.search …`, in process."""
    status = run_command(main, [str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def archive(run):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (run / "archive.jsonl").read_text().splitlines()
    ]


def test_the_run_folder_is_complete_and_true(folder, tmp_path, capsys):
    run = tmp_path / "run"
    status, out, err = command(folder, "--output", run, *flags(**QUICK, target_bits=3.4), capsys=capsys)
    assert status == 0, err
    assert "chosen: " in out and "plan: 14 linears" in err and "hypervolume" in err
    assert "40 of --refine if the linears get less than 2.7 bits per weight" in err
    for name in (
        "configuration.json",
        "front.json",
        "run.json",
        "cost.json",
        "report.html",
        "front.png",
        "bits.png",
        "memory.png",
    ):
        assert (run / name).stat().st_size > 0, name
    configuration = Configuration.load(run / "configuration.json")
    details = configuration.details
    assert details.bits_per_weight <= 3.4 and details.loss is not None and details.loss_confirm is not None
    assert details.memory.total == sum(i.bytes for i in details.memory.items)
    state = json.loads((run / "run.json").read_text())
    assert state["status"] == "finished" and state["settings"]["target_bits"] == 3.4
    assert state["evaluations"]["count"] == len([r for r in archive(run) if r["windows"] == "search"])
    front = json.loads((run / "front.json").read_text())
    losses = [p["loss"] for p in front["front"]]
    assert losses == sorted(losses, reverse=True) and [u["name"] for u in front["uniform"]] == ["int2", "int3", "int4"]
    assert all(p["loss_confirm"] is not None for p in front["front"])


VARIANTS = [
    {},
    {"cost": "sensitivity"},
    {"cost": "weight", "proxy": "rtn"},
    {"loss": "kl", "proxy": "hqq"},
    {"solver": "random", "initial": 6, "iterations": 0},
    {"refine": 3},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_interrupted_and_resumed_equals_uninterrupted(folder, tmp_path, options):
    settings = {**QUICK, **options, "target_bits": 3.3}
    whole = amq.search(str(folder), tmp_path / "whole", **settings)
    part = tmp_path / "part"
    part.mkdir()
    for name in ("run.json",):
        (part / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    lines = (tmp_path / "whole" / "archive.jsonl").read_bytes().splitlines(keepends=True)
    (part / "archive.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    resumed = amq.search(str(folder), part, resume=True, **settings)
    assert archive(part) == archive(tmp_path / "whole")
    assert resumed.configuration.formats == whole.configuration.formats
    if options.get("cost") == "sensitivity":
        measured = json.loads((part / "sensitivity.json").read_text())
        assert len(measured["loss"]) == 14 + 1 and measured["pinned"] == []


def test_fisher_passes_resume_where_they_stopped(folder, tmp_path):
    whole = amq.search(str(folder), tmp_path / "whole", **QUICK)
    one = amq.search(str(folder), tmp_path / "one", **{**QUICK, "cost_passes": 1})
    part = tmp_path / "part"
    part.mkdir()
    (part / "run.json").write_bytes((whole.output / "run.json").read_bytes())
    (part / "cost.json").write_bytes((one.output / "cost.json").read_bytes())
    amq.search(str(folder), part, resume=True, **QUICK)
    mine, theirs = (json.loads((p / "cost.json").read_text()) for p in (part, whole.output))
    assert mine["passes"] == theirs["passes"] == 2 and mine["cost"] == theirs["cost"]


def test_a_fisher_table_of_before_runs_is_not_taken_up(folder, tmp_path):
    run = amq.search(str(folder), tmp_path / "run", **QUICK).output
    old = (run / "cost.json").read_text().replace("amq/cost/2", "amq/cost/1")
    (run / "cost.json").write_text(old)
    with pytest.raises(AmqError, match=r"amq/cost/1.*do not compare: delete it"):
        amq.search(str(folder), run, resume=True, **QUICK)
    assert (run / "cost.json").read_text() == old
    (run / "cost.json").unlink()
    amq.search(str(folder), run, resume=True, **QUICK)


def test_a_run_on_a_bank_of_other_quantizers_is_not_resumed(folder, tmp_path, monkeypatch):
    """Its losses would stand beside those of other weights."""
    run = amq.search(str(folder), tmp_path / "run", **QUICK).output
    before = archive(run)
    monkeypatch.setattr("amq.quantize.bank.VERSION", 0)
    with pytest.raises(AmqError, match="--resume: .* was measured on weights of the bank .* quantizers have changed"):
        amq.search(str(folder), run, resume=True, **QUICK)
    assert archive(run) == before


def test_select_chooses_again_without_a_model(folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    amq.search(str(folder), run, **QUICK, target_bits=3.4)
    monkeypatch.setattr("amq.model.open.load_model", lambda *a, **k: pytest.fail("select must not load a model"))
    status, out, err = command("select", run, "--target-bits", 2.9, capsys=capsys)
    assert status == 0, err
    chosen = Configuration.load(run / "configuration-2.9.json")
    assert chosen.details.bits_per_weight <= 2.9 and chosen.details.provenance.proxy == "gptq"
    total = chosen.details.memory.total
    status, out, err = command("select", run, "--memory", total, "--context", 0, capsys=capsys)
    assert status == 0 and Configuration.load(run / f"configuration-{total}.json").details.memory.total <= total
    status, out, err = command("select", run, "--memory", "1KiB", "--context", 8, capsys=capsys)
    assert status == 2 and "below the smallest configuration" in err and "KV cache" in err
    status, out, err = command("select", run, "--target-bits", 9, capsys=capsys)
    assert status == 2 and "reachable range" in err
    status, out, err = command("select", run, capsys=capsys)
    assert status == 2 and "select needs a budget" in err
    status, out, err = command("select", tmp_path, "--target-bits", 3, capsys=capsys)
    assert status == 2 and "not a run folder" in err


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A finished run of a few evaluations; read-only."""
    cache = tmp_path_factory.getbasetemp() / "amq-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMQ_CACHE", str(cache))
        patch.setattr("amq.report.write_report", lambda run: [])
        return amq.search(str(folder), tmp_path_factory.mktemp("runs") / "run", **QUICK, target_bits=3.4).output


def edit(**values):
    """An edit of a JSON file: {key: value}, `a__b` for nested keys; a key given as `...` is removed."""

    def apply(path):
        data = json.loads(path.read_text())
        for key, value in values.items():
            *outer, last = key.split("__")
            where = data
            for part in outer:
                where = where[int(part) if part.isdigit() else part]
            if value is ...:
                del where[last]
            else:
                where[last] = value
        path.write_text(json.dumps(data))

    return apply


def text(content):
    return lambda path: path.write_text(content)


LINEAR = "model.layers.0.mlp.up_proj"
PARTS = ("settings", "model", "linears", "others", "kv_cache", "head_is_tied", "calibration")
WRONG = {
    "run.json": [
        *((text(t), "run.json") for t in ("", "[]", "3", "{", "null", "[" * 100_000, "{}", '{"a":' + "9" * 5000 + "}")),
        *((edit(**{key: ...}), f"run.json.*missing required field `{key}`") for key in PARTS),
        *((edit(**{key: 5}), rf"run.json at \$\.{key}: expected `\w+`, got `int`") for key in PARTS),
        (edit(settings__evil=1), "settings has 'evil', unknown to this version"),
        (edit(settings__formats="int99,int4"), r"run.json at \$\.settings: unknown format 'int99'"),
        (edit(settings__points="3"), r"run.json at \$\.settings\.points: expected `int`, got `str`"),
        (edit(settings__model=...), r"object missing required field `model` .*|missing required field `model`"),
        (edit(linears__0__out_features="x"), r"run.json at \$\.linears\[0\]\.out_features"),
        (edit(linears__0__out_features=0), "expected out_features from 1 to"),
        (edit(linears__0__in_features=2**200), "expected in_features from 1 to .* a number of 201 bits"),
        (edit(linears__1__name="model.layers.0.self_attn.q_proj"), "linears with distinct names"),
        (edit(linears=[]), "expected linears"),
        (edit(model__blocks=10**9), "expected blocks from 1 to"),
        (edit(kv_cache__entries__0__layers=2**40), "expected layers from 1 to"),
        (edit(kv_cache__entries__0__per_token=-1), "expected per_token from 0 to"),
        (edit(kv_cache__entries="x"), r"\$\.kv_cache\.entries"),
        (edit(kv_cache__num_hidden_layers=2**40), "expected num_hidden_layers from 0 to"),
        (edit(kv_cache__head_dim="x"), r"\$\.kv_cache\.head_dim"),
    ],
    "cost.json": [
        *((text(t), "cost.json") for t in ("", "[]", "{", "{}", '{"cost": null, "passes": 4}')),
        (edit(cost=None), r"cost.json at \$\.cost: expected `object`, got `null`"),
        (edit(**{"cost__" + LINEAR: {"int2": "x"}}), "expected `float`, got `str`"),
        (edit(**{"cost__" + LINEAR: ...}), f"the table lacks the linear '{LINEAR}'"),
        (edit(**{"cost__" + LINEAR: {"int2": 1.0, "int3": 1.0}}), f"the table lacks {LINEAR} in int4"),
        (edit(cost__evil={}), "has a linear 'evil' that the run does not"),
        (edit(passes=0), "expected passes from 1 to"),
        (lambda p: p.write_text(p.read_text().replace('"int4": ', '"int4": 1e999, "x": ', 1)), "expected a finite"),
        (lambda p: p.write_text(p.read_text().replace('"int4": ', '"int4": NaN, "x": ', 1)), "holds NaN"),
    ],
}


def run_of(path):
    """A run with its settings and files, read as `select` reads it."""
    run = RunFolder.open(path)
    return run, run.space, run.archive, run.cost


@pytest.mark.parametrize("name", WRONG)
def test_select_and_resume_name_what_is_damaged_in_a_run(finished, tmp_path, name):
    run_of(finished)
    for number, (change, message) in enumerate(WRONG[name]):
        run = tmp_path / str(number)
        run.mkdir()
        for file in ("run.json", "cost.json", "archive.jsonl"):
            shutil.copy(finished / file, run)
        change(run / name)
        with pytest.raises(AmqError, match=message) as raised:
            run_of(run)
        assert str(run) in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 700
        if name == "run.json":
            with pytest.raises(AmqError, match=message):
                _check_output(run, SearchSettings(str(tmp_path), str(run)), resume=True)


def test_a_pin_that_would_match_for_ever_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("amq.model.inventory.MATCH_SECONDS", 0.05)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    edit(settings__pin=["(.|..)+$y=int4"])(run / "run.json")
    with pytest.raises(AmqError, match="takes longer than|no linear matches"):
        run_of(run)


def test_a_fisher_table_of_another_search_is_not_resumed(folder, finished, tmp_path):
    for change, message in (
        (edit(kind="weight"), "got 'weight' of 2"),
        (edit(passes=3), "got 'fisher' of 3"),
        (edit(passes=...), "got 'fisher' of None"),
    ):
        run = tmp_path / message.replace(" ", "-")
        shutil.copytree(finished, run)
        change(run / "cost.json")
        with pytest.raises(AmqError, match=f"cost.json: expected a Fisher table of at most 2 passes, {message}"):
            amq.search(str(folder), run, resume=True, **QUICK, target_bits=3.4)


def test_select_writes_nothing_into_the_run_of_a_search_that_goes_on(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with open(run / "archive.jsonl", "ab") as file:
        file.write(b'{"index": 7, "sol')
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with open(run / "archive.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the search's
        status, _, err = command("select", run, "--target-bits", 2.9, "--output", tmp_path / "c.json", capsys=capsys)
    assert status == 0, err
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_second_search_on_the_folder_is_refused(folder, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("amq.search.run.open_model", lambda *a, **k: pytest.fail("a model was loaded first"))
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "run.json").read_bytes()
    with open(run / "archive.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AmqError, match="is being written by another search"):
            amq.search(str(folder), run, resume=True, **QUICK, target_bits=3.4)
    assert (run / "run.json").read_bytes() == before


def test_a_text_that_was_rewritten_meanwhile_is_refused(folder, tmp_path, monkeypatch):
    """Under the same name: else losses on two texts would lie in one archive."""
    monkeypatch.setattr("amq.report.write_report", lambda run: [])
    path, run = tmp_path / "text.txt", tmp_path / "run"
    whole = "The quick brown fox jumps over the lazy dog. " * 60
    path.write_text(whole)
    settings = {**QUICK, "calibration": str(path), "target_bits": 3.4}
    first = amq.search(str(folder), run, **settings)
    path.write_text(whole[::-1])
    with pytest.raises(AmqError, match=r"--resume: the text '.*text.txt' is not the one that .* was begun with"):
        amq.search(str(folder), run, resume=True, **settings)
    path.write_text(whole)
    again = amq.search(str(folder), run, resume=True, **settings)
    assert again.configuration == first.configuration
    edit(calibration__windows="0" * 32)(run / "run.json")  # as if the tokenizer had changed
    with pytest.raises(AmqError, match="gives other windows of tokens than when"):
        amq.search(str(folder), run, resume=True, **settings)


def test_equal_runs_write_equal_files(folder, finished, tmp_path, monkeypatch):
    """With a cache of its own, so that the bank is built again: its bytes are equal too."""
    cache = os.environ["AMQ_CACHE"]
    monkeypatch.setenv("AMQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("amq.report.write_report", lambda run: [])
    other = amq.search(str(folder), tmp_path / "run", **QUICK, target_bits=3.4).output
    for name in ("configuration.json", "front.json", "cost.json"):
        assert (other / name).read_bytes() == (finished / name).read_bytes(), name
    assert archive(other) == archive(finished)
    (bank,) = (tmp_path / "cache" / "banks").iterdir()
    for path in bank.iterdir():
        assert path.read_bytes() == (Path(cache) / "banks" / bank.name / path.name).read_bytes(), path.name


@pytest.mark.parametrize("where", ["below a file", "too long", "cache"])
def test_places_that_cannot_be_written_are_one_line(folder, tmp_path, capsys, monkeypatch, where):
    (tmp_path / "file").write_text("x")
    places = {"below a file": tmp_path / "file" / "run", "too long": tmp_path / ("n" * 256), "cache": tmp_path / "run"}
    if where == "cache":
        monkeypatch.setenv("AMQ_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.setattr("amq.search.run.open_model", lambda *a, **k: pytest.fail("a model was loaded first"))
    status, _, err = command(folder, "--output", places[where], *flags(**QUICK), capsys=capsys)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err
    assert str(tmp_path) in errors[0] and ("AMQ_CACHE" in errors[0]) == (where == "cache")


def test_memory_budget_counts_everything(folder, tmp_path):
    small = amq.search(str(folder), tmp_path / "a", **QUICK, memory="64KiB", context=32)
    items = {i.name: i.bytes for i in small.configuration.details.memory.items}
    assert items["KV cache"] == 2 * 2 * 2 * 2 * 16 * 32  # K and V, 2 bytes, 2 blocks, 2 heads of 16, 32 tokens
    assert items["embeddings"] == 0 and items["lm_head"] == 256 * (64 + 4), "the tied head in int8"
    assert small.configuration.formats["lm_head"] == "int8"
    assert small.configuration.details.memory.total <= 64 * 1024
    kept = amq.search(str(folder), tmp_path / "b", **QUICK, memory="64KiB", context=32, head="16bit")
    items = {i.name: i.bytes for i in kept.configuration.details.memory.items}
    assert items["lm_head"] == 0 and items["embeddings"] == 2 * 256 * 64
    assert kept.configuration.details.memory.total <= 64 * 1024 and "lm_head" not in kept.configuration.formats
    with pytest.raises(AmqError, match="it only fits with lm_head quantized too, which takes"):
        amq.search(str(folder), tmp_path / "c", **QUICK, memory="48KiB", context=32, head="16bit")


def test_no_room_for_a_second_copy_of_the_model(folder, tmp_path, monkeypatch, capsys):
    """The same search with one block's working copies at a time; refused where not even these fit."""
    plenty = amq.search(str(folder), tmp_path / "plenty", **QUICK, target_bits=3.4, backend="reference").output
    monkeypatch.setattr("amq.report.write_report", lambda run: [])
    asked = []

    def working(*how, whole=True):
        asked.append(working_bytes(*how, whole=whole))
        return asked[-1]

    monkeypatch.setattr("amq.search.run.working_bytes", working)
    monkeypatch.setattr("amq.util.limits.free_memory", lambda: asked[1] - 1 if asked[1:] else 1 << 40)
    monkeypatch.setattr("amq.search.run.free_memory", lambda: 0)
    run = tmp_path / "run"
    status, _, said = command(folder, *flags(**QUICK, target_bits=3.4, output=run), capsys=capsys)
    assert status == 0 and "(working copies of one block at a time)" in said
    assert "the native engine needs" in said
    assert asked[2] < asked[1] and archive(run) == archive(plenty)
    asked.clear()
    monkeypatch.setattr("amq.util.limits.free_memory", lambda: asked[-1] - 1 if asked else 1 << 40)
    with pytest.raises(AmqError, match="not enough memory for the working copy of one block, --cache-memory and --gpu"):
        amq.search(str(folder), tmp_path / "other", **QUICK, target_bits=3.4)


def test_time_bound_stops_and_resume_goes_on(folder, tmp_path):
    settings = {**QUICK, "solver": "random", "initial": 30, "iterations": 0, "max_loss": 0.6}
    stopped = amq.search(str(folder), tmp_path / "run", **settings, time="0.0001s")
    assert stopped.status == "stopped" and (tmp_path / "run" / "configuration.json").exists()
    assert len([r for r in archive(tmp_path / "run") if r["windows"] == "search"]) == 1  # the trial evaluation
    finished = amq.search(str(folder), tmp_path / "run", **settings, resume=True)
    assert finished.status == "finished" and len(archive(tmp_path / "run")) > 30


def test_resume_refuses_other_settings_models_and_folders(folder, tmp_path, capsys):
    run = tmp_path / "run"
    amq.search(str(folder), run, **QUICK, target_bits=3.4)
    base = [folder, "--output", run, *flags(**QUICK, target_bits=3.4)]
    status, _, err = command(*base, capsys=capsys)
    assert status == 2 and "not empty" in err and "--resume" in err
    status, _, err = command(*base, "--resume", "--seed", "7", capsys=capsys)
    assert status == 2 and "--seed was 0, is 7" in err
    other = tmp_path / "other-model"
    tiny_llama(seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    state = json.loads((run / "run.json").read_text())
    state["settings"]["model"] = str(other)
    (run / "run.json").write_text(json.dumps(state))
    status, _, err = command(other, *base[1:], "--resume", capsys=capsys)
    assert status == 2 and "another model" in err
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    status, _, err = command(folder, "--output", stranger, *flags(**QUICK), "--resume", capsys=capsys)
    assert status == 2 and "no run.json" in err
    assert [p.name for p in stranger.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-bits", "1.5"], r"reachable range is 2\.5"),
        (["--target-bits", "7"], "above the largest"),
        (["--group-size", "48"], "group size 48 is not supported"),
        (["--formats", "int2,int9"], "unknown format 'int9'"),
        (["--formats", "int3"], "at least two formats"),
        (["--memory", "1KiB"], "below the smallest configuration"),
        (["--memory", "lots"], "not a size"),
        (["--time", "soon"], "not a time"),
        (["--context", "100"], "give --memory"),
        (["--target-bits", "3", "--max-loss", "0.1"], "give one budget"),
        (["--pin", "nope=int4"], "no linear matches"),
        (["--tie", "xyz"], "roles are"),
        (["--windows", "0"], "--windows must be at least 1"),
        (["--calibration", "/no/such/text"], "no text '/no/such/text'"),
        (["--window-length", "999999999"], "less than one window"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--max-loss", "1e-12"], "no evaluated configuration has a loss"),
    ],
)
def test_bad_input_is_one_clear_error_and_writes_no_configuration(folder, tmp_path, capsys, arguments, message):
    run = tmp_path / "run"
    given = [folder, "--output", run, *flags(**QUICK), *arguments]
    status, out, err = command(*given, capsys=capsys)
    assert status == 2 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    import re

    assert re.search(message, errors[0]), errors[0]
    assert not (run / "configuration.json").exists()


@pytest.mark.parametrize("model", ["no-such-alias", "/no/such/folder.gguf"])
def test_unknown_models(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = command(model, "--output", tmp_path / "run", capsys=capsys)
    assert status == 2 and model in err and not (tmp_path / "run").exists()


def test_non_finite_weights_name_the_linear(tmp_path, capsys):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    status, _, err = command(tmp_path / "model", "--output", tmp_path / "run", *flags(**QUICK), capsys=capsys)
    assert status == 2 and "model.layers.1.mlp.up_proj holds 1 non-finite" in err and not (tmp_path / "run").exists()


def test_nan_losses_are_infeasible_and_the_search_goes_on(folder, tmp_path, monkeypatch):
    from amq.proxy.evaluator import Evaluator

    real = Evaluator.evaluate_many

    def sometimes_nan(self, configurations, windows="search"):
        left = iter(configurations)
        for losses in real(self, configurations, windows):
            broken = [next(left)["model.layers.0.mlp.up_proj"] == "int2" for _ in losses]
            yield [float("nan") if nan else loss for nan, loss in zip(broken, losses, strict=True)]

    monkeypatch.setattr(Evaluator, "evaluate_many", sometimes_nan)
    result = amq.search(str(folder), tmp_path / "run", **QUICK, target_bits=4.45)
    assert any(r["loss"] is None for r in archive(tmp_path / "run"))
    assert result.configuration.formats["model.layers.0.mlp.up_proj"] != "int2"


def test_not_enough_memory_says_needed_and_free_before_loading(folder, tmp_path, capsys, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 1000})())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    status, _, err = command(folder, "--output", tmp_path / "run", *flags(**QUICK), capsys=capsys)
    assert status == 2 and "GiB needed" in err and "GiB free" in err


def test_bf16_search_runs(folder, tmp_path):
    result = amq.search(str(folder), tmp_path / "run", **QUICK, dtype="bfloat16")
    assert result.status == "finished" and torch.get_default_dtype() == torch.float32


def test_unknown_setting_in_python_is_an_error(tmp_path):
    with pytest.raises(AmqError, match="unknown search setting 'bits'"):
        amq.search("smollm2", tmp_path, bits=3)


def test_auto_is_the_native_engine_and_says_so(folder, tmp_path, capsys):
    run = tmp_path / "run"
    status, _, err = command(folder, "--output", run, *flags(**QUICK, target_bits=3.3), capsys=capsys)
    assert status == 0 and "plan: evaluations by the native engine with int8 activations" in err
    assert RunFolder.open(run).run.measured_by == "native engine with int8 activations"
    plain = amq.search(str(folder), tmp_path / "plain", **QUICK, target_bits=3.3, backend="reference")
    assert RunFolder.open(plain.output).run.measured_by == "reference engine with fp32 activations"
    exact = amq.search(str(folder), tmp_path / "exact", **QUICK, target_bits=3.3, activations="fp32")
    folders = (plain.output, exact.output, run)
    losses = [[r["loss"] for r in archive(path) if r["phase"] == "uniform"] for path in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6)
    assert losses[0] != losses[2] and losses[0] == pytest.approx(losses[2], rel=0.1)


def test_a_run_is_not_resumed_by_another_engine(folder, tmp_path, capsys):
    run = amq.search(str(folder), tmp_path / "run", **QUICK, target_bits=3.3).output
    state = json.loads((run / "run.json").read_text())
    state["measured_by"] = "reference engine with fp32 activations"
    (run / "run.json").write_text(json.dumps(state))
    before = (run / "archive.jsonl").read_bytes()
    status, _, err = command(folder, "--output", run, "--resume", *flags(**QUICK, target_bits=3.3), capsys=capsys)
    assert (
        status == 2 and "measured by the reference engine with fp32 activations, now they would be by the native" in err
    )
    assert (run / "archive.jsonl").read_bytes() == before
    state["measured_by"] = "native engine with int8 activations"  # what `auto` was, by its own name
    (run / "run.json").write_text(json.dumps(state))
    amq.search(str(folder), run, **QUICK, target_bits=3.3, resume=True, backend="native", activations="int8")
    assert (run / "archive.jsonl").read_bytes() == before
    state["measured_by"] = ""  # as runs of before, which have the flags alone
    (run / "run.json").write_text(json.dumps(state))
    with pytest.raises(AmqError, match="--backend was auto, is native"):
        amq.search(str(folder), run, **QUICK, target_bits=3.3, resume=True, backend="native")


def test_what_a_gpu_has_in_the_place_of_the_native_engine():
    with pytest.raises(AmqError, match=r"model is on cuda; take --backend cuda"):
        _engine(SearchSettings("m", "run", device="cuda", activations="int8"), None, None, None, Progress())


def test_a_family_that_the_native_engine_lacks(tmp_path, capsys):
    ARCHITECTURES["opt"].build().save_pretrained(tmp_path / "opt")
    byte_tokenizer().save_pretrained(tmp_path / "opt")
    given = flags(**{**QUICK, "group_size": 32}, target_bits=3.4)
    status, _, err = command(tmp_path / "opt", "--output", tmp_path / "run", *given, capsys=capsys)
    assert status == 0, err
    assert "plan: evaluations by the reference engine with fp32 activations: the native engine runs " in err
    for more in (("--backend", "native"), ("--activations", "int8")):
        status, _, err = command(tmp_path / "opt", "--output", tmp_path / "other", *given, *more, capsys=capsys)
        assert status == 2 and "not opt" in err and "take --backend" in err
        assert not (tmp_path / "other").exists()
