"""What a search costs: evaluations, sensitivities, the cost table, the bank, memory.

    python -m pytest benchmarks/bench_search.py --benchmark-json=benchmarks/results/FILE.json

SmolLM2-135M-Instruct, group 128, the default windows (4 of 512 tokens) unless an id says otherwise. Ratios are taken
within one run; `extra_info` holds them.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from amq.formats import FORMATS, parse_formats
from amq.model.inventory import take_inventory
from amq.model.open import load_model
from amq.model.text import WindowSampler, load_corpus
from amq.proxy.evaluator import Evaluator
from amq.proxy.fisher import fisher_passes
from amq.proxy.native import NativeStates
from amq.quantize.bank import BankSettings, open_bank
from amq.search.space import SearchSpace

LIST = "int2,int3,int4"


@pytest.fixture(scope="session")
def stage(model_name, smoke, tmp_path_factory):
    """Model, windows and a gptq bank in a cache of its own."""
    loaded = load_model(model_name)
    everything = take_inventory(loaded.model)
    inventory = everything.only({s.name for s in everything.linears})  # the head stays as it is
    length = 32 if smoke else 512
    corpus = load_corpus("pydoc", loaded.tokenizer, loaded.embedding_rows)
    sampler = WindowSampler(corpus, length, 0)
    bank_windows, windows = sampler.take(4 if smoke else 24), {"search": sampler.take(2 if smoke else 4)}
    settings = BankSettings("gptq", 64 if smoke else 128, bank_windows)
    cache = tmp_path_factory.mktemp("banks")
    start = time.perf_counter()
    bank = open_bank(loaded.model, inventory, parse_formats(LIST), settings, cache=cache)
    built = time.perf_counter() - start
    evaluator = Evaluator(loaded, inventory, bank, windows, unscored=corpus.unscored)
    space = SearchSpace.build(inventory.linears, parse_formats(LIST), settings.group_size)
    return SimpleNamespace(**locals())


def test_bank_build_and_open(stage, benchmark):
    """Build once (seconds in extra_info); what is timed is the second start."""
    benchmark.extra_info.update(build_seconds=round(stage.built, 2), formats=LIST, linears=len(stage.inventory.linears))
    opened = benchmark.pedantic(
        open_bank,
        (stage.loaded.model, stage.inventory, parse_formats(LIST), stage.settings),
        {"cache": stage.cache},
        rounds=5,
    )
    name = stage.inventory.linears[0].name
    assert opened.get(name, "int3").nbytes == stage.bank.get(name, "int3").nbytes


@pytest.mark.parametrize(
    ("backend", "activations"),
    [("reference", "fp32"), ("cpu", "fp32"), ("cpu", "int8"), ("native", "int8"), ("native", "fp32")],
)
def test_evaluation(stage, benchmark, backend, activations):
    """One configuration in which every linear changes, as on a front; share of time outside the model's forward."""
    rng = np.random.default_rng(0)
    points = itertools.cycle(rng.integers(0, 3, (7, len(stage.space.variables))))
    stage.evaluator.restore()
    native = None
    if backend == "native":
        group_size = stage.settings.group_size
        native, backend = NativeStates(stage.loaded, stage.inventory, group_size, activations), "cpu"
    evaluator = Evaluator(
        stage.loaded, stage.inventory, stage.bank, stage.windows, backend=backend, activations=activations,
        unscored=stage.corpus.unscored, native=native,
    )  # fmt: skip
    first = evaluator.evaluate(stage.space.decode(next(points)))
    model, total = evaluator.seconds_in_model, evaluator.seconds
    losses = []
    benchmark.pedantic(lambda: losses.append(evaluator.evaluate(stage.space.decode(next(points)))), rounds=5)
    model, total = evaluator.seconds_in_model - model, evaluator.seconds - total
    evaluator.restore()
    benchmark.extra_info.update(
        evaluations_per_second=round(1 / benchmark.stats.stats.median, 3),
        share_outside_model=round(1 - model / total, 4),
        first_loss=first,  # of the same configuration for every backend
    )
    assert np.isfinite(losses).all()


def test_sensitivities_against_full_evaluations(stage, benchmark, smoke):
    """All single-linear sensitivities by recomputing only later blocks, against evaluating some of them in full."""
    base = stage.space.uniform(FORMATS["int4"])
    linears = [s.name for s in stage.inventory.linears]
    sample = linears[:: 1 if smoke else 15]
    found = {}

    def sweep() -> None:
        for name, _, loss in stage.evaluator.sensitivities(base, [(name, "int2") for name in linears]):
            found[name] = loss

    stage.evaluator.evaluate(base)
    start = time.perf_counter()
    full = {name: stage.evaluator.evaluate({**base, name: "int2"}) for name in sample}
    each = (time.perf_counter() - start) / len(sample)
    benchmark.pedantic(sweep, rounds=1)
    cached = benchmark.stats.stats.median / len(linears)
    benchmark.extra_info.update(
        seconds_full_each=round(each, 3), seconds_cached_each=round(cached, 3), speed_up=round(each / cached, 3)
    )
    assert full == {name: found[name] for name in sample}  # to the last bit


def test_cost_table(stage, benchmark, smoke):
    """The 16-pass Fisher table in units of one evaluation, both on the same windows' length."""
    passes = 2 if smoke else 16
    windows = stage.sampler.take(passes)
    configuration = stage.space.uniform(FORMATS["int3"])
    stage.evaluator.evaluate(stage.space.uniform(FORMATS["int2"]))
    start = time.perf_counter()
    stage.evaluator.evaluate(configuration)
    evaluation = time.perf_counter() - start
    tables = []
    with stage.evaluator.full_precision():
        benchmark.pedantic(
            lambda: tables.extend(
                fisher_passes(
                    stage.loaded.model,
                    stage.inventory,
                    stage.bank,
                    windows,
                    ["int2", "int3", "int4"],
                    0,
                    unscored=stage.corpus.unscored,
                )  # fmt: skip
            ),
            rounds=1,
        )
    benchmark.extra_info.update(
        passes=passes,
        evaluation_seconds=round(evaluation, 3),
        evaluation_equivalents=round(benchmark.stats.stats.median / evaluation, 2),
    )
    assert len(tables) == passes


def test_peak_memory_of_a_search(model_name, benchmark, smoke, tmp_path):
    """Peak resident memory of a whole `python -m amq.search` in a process of its own (bank from the user's cache)."""
    small = [
        "--window-length",
        "32",
        "--bank-windows",
        "4",
        "--cost-passes",
        "2",
        "--windows",
        "2",
        "--group-size",
        "64",
    ]
    command = [
        sys.executable,
        "-m",
        "amq.search",
        model_name,
        "--output",
        str(tmp_path / "run"),
        "--points",
        "4",
        *(small if smoke else []),
    ]
    code = (
        "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20); sys.exit(r.returncode)"
    )
    result = benchmark.pedantic(
        subprocess.run, ([sys.executable, "-c", code, *command],), {"capture_output": True, "text": True}, rounds=1
    )
    assert result.returncode == 0, result.stderr
    assert Path(tmp_path / "run" / "report.html").is_file()
    benchmark.extra_info["peak_resident_gib"] = round(float(result.stdout.split()[-1]), 3)
