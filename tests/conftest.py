"""Shared fixtures: a tiny model, the same model as a Hugging Face folder, and a user cache of the test's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

pytest.register_assert_rewrite("helpers")  # its asserts then show values, as those of test files do


def pytest_configure(config: pytest.Config) -> None:
    """Code that models bring along is copied into a folder of this process's own: two that run tests at once would find
    each other's half-made modules. transformers reads the name when it is imported, and Python looks for all of them
    where it found the first: a test that names another folder finds its own or not, by what ran before it."""
    from helpers.skips import SkipGate

    config.pluginmanager.register(SkipGate(config))
    modules = tempfile.TemporaryDirectory(prefix="amq-modules-")
    config.add_cleanup(modules.cleanup)
    os.environ["HF_MODULES_CACHE"] = modules.name


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m "not slow"` does not import slow files either."""
    from helpers.slow import SLOW

    return True if config.option.markexpr == "not slow" and collection_path.stem in SLOW else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from helpers.slow import SLOW

    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not run again, because its inputs have not changed (unchanged.py)."""
    reports = terminalreporter.stats.get("passed", [])
    properties = [entry for report in reports for entry in getattr(report, "user_properties", [])]
    for said in sorted({value for name, value in properties if name == "unchanged"}):
        terminalreporter.write_line(f"not run again: {said} (AMQ_SWEEPS=all runs everything)")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache for this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AMQ_CACHE", str(folder))
    return folder


@pytest.fixture
def tiny_llama() -> nn.Module:
    """A random 2-block Llama: hidden 64, vocabulary 256 (bytes), tied embeddings, float32, no gradients."""
    from helpers.tiny_models import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module], Path]:
    """Saves a tiny model and the byte-level tokenizer as a new Hugging Face folder."""
    from helpers.tiny_models import byte_tokenizer

    def make(model: nn.Module) -> Path:
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_folder(make_folder: Callable[[nn.Module], Path]) -> Path:
    """The model of `tiny_llama` with its tokenizer, as `load_model` loads it; read-only."""
    from helpers.tiny_models import tiny_llama

    return make_folder(tiny_llama())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch on one thread: for tiny models, faster and less at the mercy of what else the machine runs."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
