"""What the benchmarks share: which model they measure, and a smoke mode that keeps them from rotting.

`--smoke` replaces the real model by a tiny random one and tiny texts: every line of every benchmark runs in seconds,
the figures mean nothing. `tests/test_benchmarks.py` runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # helpers.tiny_models, for --smoke
sys.path.insert(0, str(Path(__file__).parent))

from provenance import provenance  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="tiny random model and texts: checks the benchmarks, measures nothing"
    )
    parser.addoption("--model", default="smollm2", help="model to measure")


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--smoke")


@pytest.fixture(scope="session")
def model_name(request: pytest.FixtureRequest, smoke: bool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """MODEL as every command takes it."""
    if not smoke:
        return request.config.getoption("--model")
    from helpers.tiny_models import byte_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark of cases has them in a function `grid` of its file, which takes whether they are to be small."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.grid(metafunc.config.getoption("--smoke")), ids=str)


@pytest.fixture
def threads(case: Any) -> Iterator[None]:
    """torch on as many threads as the case says."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """What every file of results says, beside what pytest-benchmark records itself."""
    output_json["provenance"] = provenance()
