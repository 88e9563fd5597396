"""amq.runtime and amq.generate: load, stream, sample, stop; what wrong input says; what the runtime never imports."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from tiny_models import ARCHITECTURES

from amq import generate as command
from amq.errors import AmqError
from amq.models import LoadedModel
from amq.quantized_linear import StoredLinear
from amq.runtime import Sampling, generate, load
from amq.settings import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(ARCHITECTURES["llama"].build(), tmp_path_factory.mktemp("runtime") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load(folder)


def text(loaded: LoadedModel, prompt: Any = "hello", **options: Any) -> str:
    return "".join(generate(loaded, prompt, Sampling(**options)))


def plain(loaded: LoadedModel, prompt: str, new_tokens: int) -> str:
    """The same, greedily, from transformers' generate without a streamer."""
    tokens = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    ids = loaded.model.generate(tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return loaded.tokenizer.decode(ids[0, tokens.shape[1] :], skip_special_tokens=True)


def test_streams_what_generate_gives(loaded: LoadedModel) -> None:
    generation = generate(loaded, "hello", Sampling(max_new_tokens=12))
    assert "".join(generation) == plain(loaded, "hello", 12)
    assert (generation.prompt_tokens, generation.new_tokens) == (5, 12)
    assert generation.first_token_seconds > 0 and generation.tokens_per_second > 0
    assert generation.prompt_tokens_per_second == 5 / generation.first_token_seconds


def test_sampling_repeats_with_its_seed(loaded: LoadedModel) -> None:
    options = {"temperature": 1.5, "max_new_tokens": 12}
    assert text(loaded, seed=1, **options) == text(loaded, seed=1, **options) != text(loaded, seed=2, **options)
    assert text(loaded, temperature=2.0, top_k=1, max_new_tokens=12) == text(loaded, max_new_tokens=12)
    assert text(loaded, temperature=2.0, top_p=1e-6, max_new_tokens=12) == text(loaded, max_new_tokens=12)


def test_stop_texts_and_the_context_end_a_text(loaded: LoadedModel) -> None:
    drawn = {"temperature": 1.0, "seed": 3, "max_new_tokens": 60}
    whole = text(loaded, **drawn)
    stop = next(c for c in whole[10:] if c.isascii())  # a random model's other bytes are not UTF-8
    stopped = generate(loaded, "hello", Sampling(**drawn, stop=(stop,)))
    assert "".join(stopped) == whole[: whole.index(stop) + 1]
    assert stopped.new_tokens < 60
    context = loaded.config.max_position_embeddings
    generation = generate(loaded, "x" * (context - 3), Sampling(max_new_tokens=50))
    list(generation)
    assert generation.new_tokens == 3


def test_leaving_early_stops_the_model(loaded: LoadedModel) -> None:
    generation = generate(loaded, "hello", Sampling(max_new_tokens=400))
    pieces = iter(generation)
    next(pieces)
    pieces.close()
    assert generation.new_tokens < 400


def test_a_failure_of_the_model_reaches_the_reader(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(loaded.model, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        text(loaded)


def test_loading(folder: Path, tiny_folder: Path) -> None:
    default, exact = load(folder), load(folder, activations="fp32", dtype="bfloat16")
    assert {m.activations for m in default.model.modules() if isinstance(m, StoredLinear)} == {"int8"}
    assert {m.activations for m in exact.model.modules() if isinstance(m, StoredLinear)} == {"fp32"}
    assert default.model.dtype == torch.float32 and exact.model.dtype == torch.bfloat16
    assert text(load(tiny_folder), max_new_tokens=2)
    for options, message in (
        ({"activations": "int4"}, "activations must be one of"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
    ):
        with pytest.raises(AmqError, match=message):
            load(folder, **options)
    with pytest.raises(AmqError, match="the model is not quantized"):
        load(tiny_folder, activations="int8")


def test_wrong_prompts(loaded: LoadedModel) -> None:
    for prompt, message in (
        ("", "the prompt is empty"),
        ("x" * 512, "the prompt has 512 tokens, the model's context 512"),
        ([{"role": "user", "content": "hello"}], "has no chat template"),
    ):
        with pytest.raises(AmqError, match=message):
            generate(loaded, prompt)
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(AmqError, match=next(iter(options))):
            Sampling(**options)


def test_chat_template(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.tokenizer, "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    chat = [{"role": "user", "content": "hi"}]
    assert text(loaded, chat, max_new_tokens=5) == plain(loaded, "<hi>", 5)


def test_command(
    folder: Path, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    options = ["--prompt", "-", "--max-new-tokens", "6", "--threads", "1", "--json", str(tmp_path / "figures.json")]
    assert run_command(command.main, [str(folder), *options]) == 0
    out, err = capsys.readouterr()
    assert out == text(loaded, max_new_tokens=6) + "\n"
    assert "prompt 5 tokens" in err and "generated 6 tokens" in err and "peak RSS" in err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["new_tokens"] == 6 and figures["peak_memory_bytes"] > 1 << 20 and figures["threads"] == 1


def test_command_with_wrong_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    for options, message in (
        ([str(folder), "--prompt", "-"], "the prompt is empty"),
        ([str(tmp_path), "--prompt", "hello"], "has no config.json"),
        ([str(folder), "--prompt", "hello", "--threads", "0"], "--threads must be at least 1"),
    ):
        assert run_command(command.main, options) == 2
        assert message in capsys.readouterr().err


def test_the_runtime_never_imports_the_stages_that_make_checkpoints() -> None:
    """By the import statements of everything that it reaches, the lazy ones included."""
    root = Path(command.__file__).parents[1]

    def imported(name: str) -> set[str]:
        path = root / Path(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not file.exists():
            return set()
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        return found

    reached, todo = set(), {"amq.generate", "amq.runtime"}
    while todo:
        reached |= todo
        todo = {name for module in todo if module.startswith("amq.") for name in imported(module)} - reached
    heavy = {"hqq", "pymoo", "sklearn", "matplotlib", "plotly", "scipy", "datasets"}
    stages = {"search", "quantizers", "quantize", "eval", "export", "bank", "evaluator", "fisher"}
    assert "amq.quantized_linear" in reached
    assert not {
        name
        for name in reached
        if name.split(".")[0] in heavy or name.startswith("amq.") and name.split(".")[1] in stages
    }
