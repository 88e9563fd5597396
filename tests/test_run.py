"""A whole search on a tiny model, from the command line to the run folder, and every bad input that it must refuse."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama

import amq
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.search.__main__ import main
from amq.settings import run_command

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
    assert details["bits_per_weight"] <= 3.4 and details["loss"] is not None and details["loss_confirm"] is not None
    assert details["memory"]["total"] == sum(i["bytes"] for i in details["memory"]["items"])
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
        assert len(measured["loss"]) == 14 and measured["pinned"] == []


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


def test_select_chooses_again_without_a_model(folder, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    amq.search(str(folder), run, **QUICK, target_bits=3.4)
    monkeypatch.setattr("amq.models.load_model", lambda *a, **k: pytest.fail("select must not load a model"))
    status, out, err = command("select", run, "--target-bits", 2.9, capsys=capsys)
    assert status == 0, err
    chosen = Configuration.load(run / "configuration-2.9.json")
    assert chosen.details["bits_per_weight"] <= 2.9 and chosen.details["provenance"]["proxy"] == "gptq"
    total = chosen.details["memory"]["total"]
    status, out, err = command("select", run, "--memory", total, "--context", 0, capsys=capsys)
    assert status == 0 and Configuration.load(run / f"configuration-{total}.json").details["memory"]["total"] <= total
    status, out, err = command("select", run, "--memory", "1KiB", "--context", 8, capsys=capsys)
    assert status == 2 and "below the smallest configuration" in err and "KV cache" in err
    status, out, err = command("select", run, "--target-bits", 9, capsys=capsys)
    assert status == 2 and "reachable range" in err
    status, out, err = command("select", run, capsys=capsys)
    assert status == 2 and "exactly one budget" in err
    status, out, err = command("select", tmp_path, "--target-bits", 3, capsys=capsys)
    assert status == 2 and "not a run folder" in err


def test_memory_budget_counts_everything(folder, tmp_path):
    small = amq.search(str(folder), tmp_path / "a", **QUICK, memory="64KiB", context=32)
    items = {i["name"]: i["bytes"] for i in small.configuration.details["memory"]["items"]}
    assert items["KV cache"] == 2 * 2 * 2 * 2 * 16 * 32  # K and V, 2 bytes, 2 blocks, 2 heads of 16, 32 tokens
    assert items["lm_head"] == 0 and items["embeddings"] == 2 * 256 * 64
    assert small.configuration.details["memory"]["total"] <= 64 * 1024


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
        (["--formats", "int2,int7"], "unknown format 'int7'"),
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
    from amq.evaluator import Evaluator

    real = Evaluator.evaluate

    def sometimes_nan(self, formats, windows="search"):
        loss = real(self, formats, windows)
        return float("nan") if formats["model.layers.0.mlp.up_proj"] == "int2" else loss

    monkeypatch.setattr(Evaluator, "evaluate", sometimes_nan)
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
