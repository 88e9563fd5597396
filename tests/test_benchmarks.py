"""The benchmarks run (at tiny sizes), so that they cannot rot. Their figures are measured elsewhere."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ablation
import bank
import calibration
import large
import objectives
import pytest
import quality
import random_models
import serve_schemas
import split
import witness
from helpers.processes import python_path
from helpers.split_runs import make_split_run
from helpers.tiny_models import byte_tokenizer, tiny_llama
from provenance import checkout

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.model.inventory import take_inventory
from amq.split.figures import read_runs

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
"""For commands that run pytest: pytest-benchmark measures nothing in what looks like a worker of pytest-xdist."""


def test_benchmarks_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--smoke", "-p", "no:cacheprovider"]
    environment = {**ENVIRONMENT, "AMQ_CACHE": str(tmp_path), "AMQ_BENCH_PEERS": "none"}  # peers: see below
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_bank_smoke(tiny_folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One block by both, the others by the kernels, and a whole bank."""
    results = tmp_path / "bank.json"
    flags = ["--blocks", "1", "--bank-windows", "1", "--window-length", "32", "--group-size", "32", "--total"]
    assert bank.main([str(tiny_folder), *flags, "--json", str(results)]) == 0
    written = json.loads(results.read_text())
    assert written["provenance"]["commit"] == checkout(ROOT)[0] and written["total"]["wall"] > 0
    assert sum("torch" in row for row in written["blocks"]) == 1 and "| ratio |" in capsys.readouterr().out


def test_split_smoke(tmp_path: Path) -> None:
    """Two processes a run; the second takes the first one's mean bits."""
    results, policies = tmp_path / "split.json", ("amaq:4-3", "fixed:=amaq:4-3", "step:4+range")
    command = [sys.executable, "benchmarks/split.py", str(tmp_path), "--smoke", "--policies", ",".join(policies),
               "--json", str(results)]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "AMQ_CACHE": str(tmp_path)}
    )
    assert result.returncode == 0, result.stderr
    rows = {row["policy"]: row for row in json.loads(results.read_text())["rows"]}
    assert tuple(rows) == policies and all(f"| {policy} |" in result.stdout for policy in policies)
    assert abs(rows[policies[0]]["forward_bits"] - rows[policies[1]]["forward_bits"]) < 0.02
    assert all(row["perplexity"] > 1 and row["mib"] > 0 for row in rows.values())


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    folder = split.folder_of(tmp_path, "fixed:3", 0)
    (folder / "run" / "adapter").mkdir(parents=True)
    (folder / split.ASKED).write_text("smollm2 --cut 10 --steps 100")
    args = argparse.Namespace(folder=tmp_path, model="smollm2", cut=10, steps=50, train_args="--batch 2")
    with pytest.raises(AmqError, match=r"has a run of smollm2 --cut 10 --steps 100, expected .* --steps 50 .* another"):
        split.one_run(args, split.Policy.parse("fixed:3"), 0, None)


def test_bits_that_no_run_has_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(AmqError, match=r"takes the bits of 'amaq:4-3': expected one of \['none'\]; add it"):
        split.main([str(tmp_path), "--policies", "none,fixed:=amaq:4-3"])


@pytest.mark.parametrize("labels", ["server", "client"])
def test_bits_of_a_split_run_are_those_of_its_report(tmp_path: Path, labels: str) -> None:
    run = make_split_run(tmp_path / "run", labels=labels)
    assert split.row_of(tmp_path, "waterfill", 0).bits == read_runs([run])[0].wire_bits


def test_gemv_smoke_against_the_peers_that_are_installed_and_its_picture(tmp_path: Path) -> None:
    """Each peer computes the right product or says why it cannot run; what the picture needs is in the JSON."""
    results, picture = tmp_path / "gemv.json", tmp_path / "gemv.png"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_gemv.py", "--smoke", "-p", "no:cacheprovider",
               "-k", "M1-int8 and 64x512 and cold]", f"--benchmark-json={results}"]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ": failed: " not in result.stdout, result.stdout
    written = json.loads(results.read_text())
    assert written["provenance"]["commit"] == checkout(ROOT)[0] and written["provenance"]["versions"]["torch"]
    cases = [b["extra_info"] for b in written["benchmarks"]]
    assert {case["format"] for case in cases} >= {"int2", "int3", "int4"}
    for case in cases:
        assert case["versus"]["torch-float32"] > 0 and case["bandwidth_share"] > 0 and case["bytes"] > 0
        rivals = set(case["versus"]) - {"torch-float32", "torch-bfloat16"}
        assert case.get("best_peer") in (rivals or {None})
    command = [sys.executable, "benchmarks/plot_gemv.py", str(results), str(picture), "--shapes", "64x512"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert picture.stat().st_size > 10_000


def test_quality_table_goes_on_with_what_is_missing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods on a tiny model; a second call measures nothing that is there and adds the third."""
    folder, results = tmp_path / "model", tmp_path / "quality.json"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(15_000)))

    def run(methods: str) -> str:
        arguments = f"quality --model {folder} --uniform int3 --group-size 32 --method {methods} --text {text} "
        arguments += f"--calibration {text} --windows 2 --max-tokens 1024 --json {results}"
        monkeypatch.setattr(sys, "argv", arguments.split())
        quality.main()
        return capsys.readouterr().out

    run("rtn,awq")
    first = json.loads(results.read_text())["rows"]
    assert [row["method"] for row in first] == ["full", "rtn", "awq"]
    shown = run("rtn,awq,bank")
    rows = json.loads(results.read_text())["rows"]
    assert rows[:3] == first and rows[3]["method"] == "bank" and {"commit", "dirty", "date"} <= rows[3].keys()
    assert "| 32 | 4.000 | uniform int3 |" in shown


def test_quality_of_a_configuration_that_names_the_head(tiny_folder: Path, tmp_path: Path, cache: Path) -> None:
    """The head is rounded and counted, and what the configuration keeps stays."""
    results = tmp_path / "quality.json"
    parts = take_inventory(tiny_llama())
    formats = {spec.name: "int4" for spec in parts.linears} | {parts.linears[0].name: "16bit"}
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(15_000)))
    arguments = f"--model {tiny_folder} --method rtn,bank --text {text} --calibration {text} --windows 2 "
    arguments += "--max-tokens 1024"
    for name, head in (("plain", {}), ("head", {parts.outer[-1].name: "int2"})):
        Configuration(formats | head, 32).save(tmp_path / f"{name}.json")
        arguments += f" --configuration {tmp_path / name}.json"
    quality.main([*arguments.split(), "--json", str(results)])
    _, *rows = json.loads(results.read_text())["rows"]
    for method in ("rtn", "bank"):
        plain, head = (row for row in rows if row["method"] == method)
        assert head["bits"] < plain["bits"] and head["perplexity"] != plain["perplexity"]


def test_calibration_texts_are_compared_and_a_second_call_adds_what_is_missing(
    tiny_folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pair of texts of the bank and of the costs, on a tiny model."""
    results, text = tmp_path / "calibration.json", tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(5_000)))
    arguments = f"--model {tiny_folder} --text {text} --max-tokens 256 --bits 3.5 --group-size 32 --bank-windows 2 "
    arguments += f"--passes 2 --window-length 32 --json {results} --calibration {text},self"
    calibration.main(arguments.split())
    first = json.loads(results.read_text())["rows"]
    assert [(row["bank"], row["fisher"]) for row in first] == [
        (None, None), (str(text), None), (str(text), str(text)), (str(text), "self"),
        ("self", None), ("self", str(text)), ("self", "self"),
    ]  # fmt: skip
    assert len({row["perplexity"]["text.txt"] for row in first}) > 4
    calibration.main([*arguments.split(), "--seeds", "0,1"])
    rows = json.loads(results.read_text())["rows"]
    assert rows[:7] == first and [row["seed"] for row in rows[7:]] == [1] * 6
    assert "| self | self |  | " in capsys.readouterr().out


def test_objectives_go_on_with_what_is_missing(
    tiny_folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every loss of every configuration, the full-precision model's own order among them: int8 loses least."""
    results = tmp_path / "objectives.json"
    arguments = f"--model {tiny_folder} --formats int2,int4,int8 --uniform int2,int4,int8 --bits 3.0 --neighbours 2 "
    arguments += "--group-size 32 --calibration docstrings --bank-windows 1 --passes 1 --windows 1 --window-length 32 "
    arguments += f"--answers 2 --held-out 3 --answer-tokens 5 --json {results}"
    objectives.main(arguments.split())
    assert "within budgets" in capsys.readouterr().out
    (entry,) = json.loads(results.read_text())["models"].values()
    rows = {row["name"]: row for row in entry["rows"]}
    assert len(rows) == 3 + 1 + 2
    for judge in objectives.JUDGES:
        found = objectives.correlations(entry["rows"], judge)
        assert found.keys() == rows["uniform int2"]["losses"].keys() and found[judge][:2] == pytest.approx((1, 1))
    from_the_full_model = ("first difference", "beside the full model's", "q / p", "differing tokens", "JSD")
    for name, loss in rows["uniform int8"]["losses"].items():
        assert not name.endswith(from_the_full_model) or loss <= rows["uniform int2"]["losses"][name], name
    entry["rows"].pop()
    results.write_text(json.dumps({"schema": objectives.SCHEMA, "models": {str(tiny_folder): entry}}))
    objectives.main(arguments.split())
    (again,) = json.loads(results.read_text())["models"].values()
    assert [row["losses"] for row in again["rows"]] == [row["losses"] for row in rows.values()]
    with pytest.raises(SystemExit, match="with other settings"):
        objectives.main([*arguments.split(), "--seed", "1"])
    capsys.readouterr()
    objectives.main(["--table", "--json", str(results)])
    assert objectives.table(again) in capsys.readouterr().out


def test_ablation_adds_what_is_missing_and_leaves_out_what_it_has_no_setting_of(
    tiny_folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of variant on a tiny model, and one of another version."""
    results, text = tmp_path / "ablation.json", tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(5_000)))
    monkeypatch.setitem(ablation.VARIANTS, "of tomorrow", ablation.Variant({"of_tomorrow": True}))
    arguments = f"--model {tiny_folder} --text {text} --max-tokens 256 --bits 3.6 --group-size 32 --bank-windows 2 "
    arguments += f"--passes 2 --windows 1 --window-length 32 --json {results} --variants"
    given, prepared, prepare = arguments.split(), [], ablation.prepare
    monkeypatch.setattr(ablation, "prepare", lambda of, *more: prepared.append(of) or prepare(of, *more))
    variants = ["none of them", "Fisher runs", "refine", "rows", "of tomorrow"]
    ablation.main([*given, ",".join(variants[:2])])
    first = json.loads(results.read_text())["rows"]
    ablation.main([*given, ",".join(variants)])
    rows = json.loads(results.read_text())["rows"]
    assert rows[:3] == first and [row["variant"] for row in rows] == ["full precision", *variants[:-1]]
    assert all(row["bits"] <= 3.6 + 1e-6 and row["perplexity"]["text"] > 1 for row in rows[1:])
    refined = rows[3]
    assert refined["search_refined"] <= refined["search_start"]
    assert refined["confirm_refined"] <= refined["confirm_start"]
    assert rows[4]["perplexity"] != rows[1]["perplexity"], "blocks of rows choose otherwise than whole linears"
    assert rows[1]["steps"]["bank"]["seconds"] > 0
    assert {of.backend for of in prepared} == {"reference"}, "rows were measured by another engine, or not at all"
    shown, said = capsys.readouterr()
    assert "| rows | " in shown and "left out: of tomorrow" in said


def run_smoke(script: str, tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """A benchmark of the server at its tiny size; its JSON and what it printed."""
    pytest.importorskip("uvicorn", reason="not an environment with the test extra: it has no server")
    results = tmp_path / "results.json"
    command = [sys.executable, f"benchmarks/{script}.py", "--smoke", "--json", str(results), *arguments]
    environment = {**os.environ, **python_path(), "AMQ_CACHE": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    written = json.loads(results.read_text())
    assert written["provenance"]["commit"] == checkout(ROOT)[0] and written["schema"].startswith(f"amq/{script}/")
    return written, result.stdout


def test_attacks_on_the_others_of_a_server(tmp_path: Path) -> None:
    """Every attack runs and is watched; what it did to others is not judged on a machine that runs tests."""
    written, shown = run_smoke("serve_attacks", tmp_path, "--only", "requests,silent,templates")
    rows = {row["attack"]: row for row in written["rows"]}
    watched = {"long prompts", "empty messages", "wrong messages", "flood of prompts", "endless uploads"}
    watched |= {"slow headers", "template that loops", "template that takes memory"}
    assert set(rows) == watched | {"silent connections"}
    for name in watched:
        seen, (before, peak, _) = rows[name]["seen"], rows[name]["memory"]
        assert seen["pause"] > 0 and seen["second"] > 0 and seen["health"] > 0 and 0 < before <= peak, name
        assert not seen["refused"] and not seen["unwell"] and not seen["broken"], rows[name]
        assert f"| {name}: " in shown
    assert "3 × 400" in rows["wrong messages"]["happened"]
    assert "second client 200" in rows["silent connections"]["happened"]


def test_attacks_by_name_and_on_the_engine(tmp_path: Path) -> None:
    written, _ = run_smoke("serve_attacks", tmp_path, "--only", "names,turns,faults")
    verdicts = {row["attack"]: row["verdict"] for row in written["rows"]}
    assert verdicts.pop("prefix probing across keys") == "left out"  # this engine computes everything anew
    assert len(verdicts) == 8 and set(verdicts.values()) == {"held"}, written["rows"]


def test_the_witness_sees_what_was_slow_and_what_never_came() -> None:
    """Times from 0 to 10: a stream that stood still from 2 to 5 and ended well, one cut off; /health once at 4."""
    watched = object.__new__(witness.Witness)
    notes = witness.Notes(
        streams=[[0.0, 1.0, 2.0, 5.0, 5.5], [6.0, 6.5]],
        ends=["", "closed without a word"],
        health=[(0.0, 0.1, 200), (4.0, 0.3, 503)],
        second=[(0.5, 0.2, 200), (1.6, 0.1, 429), (7.0, None, 200)],
    )
    watched._notes = notes
    quiet, seen = watched.seen(0.0, 1.5), watched.seen(1.5, 10.0)
    assert (quiet.pause, quiet.second, quiet.health, quiet.unwell) == (1.0, 0.2, 0.1, ())
    assert (seen.pause, seen.second, seen.refused, seen.unwell) == (3.0, 3.0, (429,), (503,))
    assert seen.broken == ("closed without a word",)
    notes.ends.pop()  # the second stream still runs: it has stood still ever since
    assert watched.seen(1.5, 10.0).pause == 3.5


def test_clients_talk_in_three_turns_with_tools(tmp_path: Path) -> None:
    written, shown = run_smoke("serve_clients", tmp_path)
    assert [talk["through"] for talk in written["talks"]] == [
        "openai, whole answers",
        "openai, streamed",
        "pydantic-ai",
    ]
    for talk in written["talks"]:
        assert talk["checks"] and all(good for _, good, _ in talk["checks"]), talk
        assert [who for who, _ in talk["transcript"]].count("user") == 3
    assert "| openai, streamed |" in shown


def test_answers_to_random_schemas(tmp_path: Path) -> None:
    written, shown = run_smoke("serve_schemas", tmp_path)
    assert set(written["ends"]) <= {"valid", "cut"} and written["ends"]["valid"] > 0, written["ends"]
    for answer in written["answers"]:
        assert answer["end"] == "cut" or not serve_schemas.fault(answer["text"], answer["schema"])
    assert "| schemas | ended | valid |" in shown


def test_what_a_wrong_answer_to_a_schema_is() -> None:
    schema = {"type": "object", "properties": {"born": {"type": "string", "format": "date"}}, "required": ["born"]}
    assert serve_schemas.fault('{"born": "2024-02-29"}', schema) == ""
    assert "not JSON" in serve_schemas.fault('{"born": "2024', schema)
    assert serve_schemas.fault('{"born": "yesterday"}', schema) and serve_schemas.fault("{}", schema)


def test_lm_eval_over_http_says_what_it_says_in_process(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra, not a test requirement")
    written, shown = run_smoke("serve_lm_eval", tmp_path)
    assert written["equal"] and written["same_texts"] == 4 and 0 < written["tolerance"] < 1e-3
    assert "| multiple choice, acc | local-completions |" in shown


def test_table_of_families(tmp_path: Path) -> None:
    results = tmp_path / "families.json"
    command = [sys.executable, "benchmarks/families.py", "--only", "llama,mixtral", "--json", str(results)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    llama, mixtral = json.loads(results.read_text())["rows"]
    assert llama["before"] < llama["after"] < 1 and mixtral["before"] < 0.05 and mixtral["experts"] > 0.9
    assert "| mixtral | 46.7 | 2.87 % | 99.99 % |" in result.stdout


def run_on(tmp_path: Path, script: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a benchmark wrote to --json, and what it printed."""
    results = tmp_path / "results.json"
    command = [sys.executable, f"benchmarks/{script}.py", *arguments, "--json", str(results)]
    environment = {**os.environ, "AMQ_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(results.read_text()), result.stdout


def test_mixtures_of_a_dense_model(tmp_path: Path, tiny_folder: Path) -> None:
    """Three experts of 32 features: groups hold the same weights as in the dense model."""
    search = {"formats": "int2,int4", "group_size": 32, "window_length": 64, "windows": 1, "confirm_windows": 1,
              "bank_windows": 2, "cost": "weight", "proxy": "rtn", "points": 2}  # fmt: skip
    written, shown = run_on(
        tmp_path, "mixture", str(tmp_path / "made"), "--model", str(tiny_folder), "--experts", "3",
        "--only", "mixtral,qwen2_moe,qwen3_moe", "--max-tokens", "1100", "--target-bits", "4.2",
        "--search", json.dumps(search),
    )  # fmt: skip
    for row in written["rows"]:
        dense, mixture = row["of_dense"], row["of_mixture"]
        assert row["same_function"] and abs(mixture["perplexity"] / dense["perplexity"] - 1) < 1e-5, row
        assert mixture["formats"] and 0 <= row["same"] <= 1 and dense["loss"] > 0, row
    assert "| qwen3_moe | qwen3 |" in shown


def test_families_of_the_engine(tmp_path: Path) -> None:
    arguments = ("--smoke", "--only", "qwen3_moe", "--threads", "1", "--generate", "4", "--repetitions", "1")
    written, shown = run_on(tmp_path, "engine_families", str(tmp_path / "models"), *arguments)
    (row,) = written["rows"]
    (case,) = row["exact"]
    assert case["difference"] < 1e-4 and case["margin"] is None and case["same"] == 4, row
    assert row["speed"]["bytes_per_token"] > row["speed"]["weight_bytes"] > 0 and not row["left_out"], row
    assert "| qwen3_moe | 1 | " in shown and "| 1 of 1 | tiny | " in shown


@pytest.mark.parametrize("shape", ["30B-A3B", "qwen3.5-9B"])
def test_large_models_of_the_engine(tmp_path: Path, shape: str) -> None:
    """Without peers, which need minutes to start; tests/test_bench_peers.py has them."""
    arguments = ("--smoke", "--shape", shape, "--peers", "", "--threads", "1", "--repetitions", "1")
    sizes = ("--prompt", "8", "--generate", "4", "--batch", "1,2")
    written, shown = run_on(tmp_path, "engine_large", str(tmp_path / "models"), *arguments, *sizes)
    assert [row["test"] for row in written["rows"]] == ["pp8", "tg4", "tg4 x2"]
    for row in written["rows"]:
        assert 0 < row["whole"] <= row["tokens_per_second"]
    assert "native engine" in written["bench"]["engines"]["amq"]["description"] and "| amq | tg4 | " in shown
    assert not list((tmp_path / "models").iterdir())


def test_turns_of_a_conversation(tmp_path: Path) -> None:
    written, shown = run_on(tmp_path, "conversation", str(tmp_path / "models"), "--smoke", "--threads", "1")
    turns, anew = written["one_client"], written["anew"]
    assert written["same"] == [True] * 3 and [turn["prompt"] for turn in turns] == [turn["prompt"] for turn in anew]
    assert all(turn["read"] == turn["prompt"] for turn in (turns[0], *anew))
    assert all(turn["read"] < turn["prompt"] / 2 for turn in turns[1:]), turns
    assert f"| 3 | {turns[2]['prompt']} | {turns[2]['read']} | " in shown


def test_layers_of_a_random_model_are_as_many_as_fit() -> None:
    shape, formats = random_models.SHAPES["tiny-hybrid"], random_models.Formats(group_size=32)
    rest, more = random_models.sizes_by_layers(shape, formats)
    whole = random_models.Bytes.of(take_inventory(shape.model(shape.layers)), formats)
    assert whole.stored == rest.stored + 2 * more.stored and whole.read == rest.read + 2 * more.read
    assert random_models.layers_that_fit(shape, formats, int(whole.stored)) == shape.layers
    assert random_models.layers_that_fit(shape, formats, int(whole.stored) - 1) == shape.period
    assert random_models.layers_that_read(shape, formats, int(rest.read + more.read) + 1, 1 << 30) == 2 * shape.period
    with pytest.raises(AmqError, match=r"takes 0\.0 GiB with 4 layers: give --most more"):
        random_models.layers_that_fit(shape, formats, int(rest.stored))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_a_model_larger_than_memory_smoke(tmp_path: Path, tiny_folder: Path) -> None:
    for shape in ("tiny", "tiny-moe"):
        arguments = ("--shape", shape, "--layers", "2", "--tokenizer", str(tiny_folder), "--memory", "3GiB")
        written, shown = run_on(tmp_path, "large", str(tmp_path / "large"), *arguments)
        run = written["runs"]["quantize"]
        assert written["layers"] == 2 and 0 < run["own_gib"] < 3 and run["resident_gib"] >= run["own_gib"]
        assert "plan: memory: " in run["said"] and "| quantize, extrapolated, at most | 4 |" in shown
    with pytest.raises(AmqError, match=r"took 0\.\d\d GiB, more than 0\.0078125: "):
        code = "import time; x = bytearray(b'1') * (1 << 28); time.sleep(60)"  # it ends when it is seen, however late
        large.run_within([sys.executable, "-c", code], 8 << 20)


def test_a_search_on_a_gpu_is_derived_from_the_code_as_it_is() -> None:
    """Stages add up, a card of 24 GB holds it, and ten minutes on an RTX 4090 are not exceeded on paper."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "derive_search.py")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **python_path()})
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    times = [[float(cell.split()[0]) for cell in cells] for _, *cells in rows if cells[-1].endswith((" s", " min"))]
    *stages, together = times
    assert len(stages) == 8
    for column, minutes in enumerate(together):
        assert abs(sum(stage[column] for stage in stages) / 60 - minutes) <= 0.05 + len(stages) / 120
    assert together[1] <= 10
    sizes = [float(cells[0]) for _, *cells in rows if len(cells) == 1 and cells[0] != "GiB"]
    assert len(sizes) == 5 and all(15 <= size <= 22 for size in sizes)
