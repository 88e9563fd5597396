"""What the benchmarks share: which model they measure, and a smoke mode that keeps them from rotting.

`--smoke` replaces the real model by a tiny random one and tiny texts: every line of every benchmark runs in seconds,
the figures mean nothing. `tests/test_benchmarks.py` runs it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # helpers.tiny_models, for --smoke


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


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Threads and versions beside what pytest-benchmark records itself."""
    import transformers

    machine_info["torch"] = torch.__version__
    machine_info["transformers"] = transformers.__version__
    machine_info["threads"] = torch.get_num_threads()
