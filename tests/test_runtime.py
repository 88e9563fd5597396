"""amq.runtime and amq.generate: load, which engine it takes, stream, stop; what wrong input says; what is imported."""

from __future__ import annotations

import ast
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import ARCHITECTURES

from amq import generate as command
from amq.errors import AmqError
from amq.kernels.backends import choose_backend
from amq.kernels.modules import StoredLinear
from amq.model.open import LoadedModel, load_model
from amq.runtime import Runtime, Sampling, generate, load
from amq.runtime.families import Unsupported
from amq.runtime.tokenizer import Tokenizer
from amq.runtime.torch_engine import TorchEngine
from amq.util.settings import run_command

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = {"dtype": "float32", "backend": "reference", "activations": "fp32"}
"""What runs in transformers, whatever the native engine can do."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(ARCHITECTURES["llama"].build(), tmp_path_factory.mktemp("runtime") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    """transformers' model, to compare with."""
    from amq.integrations.transformers import AmqConfig

    return load_model(str(folder), quantization_config=AmqConfig(activations="fp32", backend="reference"))


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return load(folder, **EXACT)


def text(runtime: Runtime, prompt: Any = "hello", **options: Any) -> str:
    return "".join(generate(runtime, prompt, Sampling(**options)))


def plain(loaded: LoadedModel, prompt: str, new_tokens: int, **options: Any) -> str:
    """The same from transformers' generate."""
    tokens = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    ids = loaded.model.generate(tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options)
    return loaded.tokenizer.decode(ids[0, tokens.shape[1] :], skip_special_tokens=True)


def test_streams_what_generate_gives(runtime: Runtime, loaded: LoadedModel) -> None:
    generation = generate(runtime, "hello", Sampling(max_new_tokens=12))
    assert "".join(generation) == plain(loaded, "hello", 12)
    assert (generation.prompt_tokens, generation.new_tokens, generation.finished) == (5, 12, "length")
    assert generation.first_token_seconds > 0 and generation.tokens_per_second > 0
    assert generation.prompt_tokens_per_second == 5 / generation.first_token_seconds
    penalized = text(runtime, max_new_tokens=30, repetition_penalty=1.3)
    assert penalized == plain(loaded, "hello", 30, repetition_penalty=1.3) != text(runtime, max_new_tokens=30)


def test_sampling_repeats_with_its_seed(runtime: Runtime) -> None:
    options = {"temperature": 1.5, "max_new_tokens": 12}
    assert text(runtime, seed=1, **options) == text(runtime, seed=1, **options) != text(runtime, seed=2, **options)
    assert text(runtime, temperature=2.0, top_k=1, max_new_tokens=12) == text(runtime, max_new_tokens=12)
    assert text(runtime, temperature=2.0, top_p=1e-6, max_new_tokens=12) == text(runtime, max_new_tokens=12)


def test_stop_texts_and_the_context_end_a_text(runtime: Runtime) -> None:
    drawn = {"temperature": 1.0, "seed": 3, "max_new_tokens": 60}
    whole = text(runtime, **drawn)
    stop = next(c for c in whole[10:] if c.isascii())  # a random model's other bytes are not UTF-8
    stopped = generate(runtime, "hello", Sampling(**drawn, stop=(stop,)))
    assert "".join(stopped) == whole[: whole.index(stop)]
    assert stopped.new_tokens < 60 and stopped.finished == "stop"
    context = runtime.engine.context
    generation = generate(runtime, "x" * (context - 3), Sampling(max_new_tokens=50))
    list(generation)
    assert generation.new_tokens == 3


def test_leaving_early_stops_the_model(runtime: Runtime) -> None:
    generation = generate(runtime, "hello", Sampling(max_new_tokens=400))
    pieces = iter(generation)
    next(pieces)
    assert runtime.engine.cached_tokens()[0] > 0
    pieces.close()
    assert generation.new_tokens < 400 and runtime.engine.cached_tokens()[0] == 0
    assert text(runtime, max_new_tokens=2)  # the only slot is free again


def test_a_failure_of_the_model_reaches_the_reader(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.engine, "forward", fail)
        with pytest.raises(AmqError, match="the engine failed.*broken"):
            text(runtime)
    assert text(runtime, max_new_tokens=2)


def test_loading(folder: Path, tiny_folder: Path) -> None:
    exact, full = load(folder, activations="fp32", dtype="bfloat16", max_sequences=3, context=99), load(tiny_folder)
    assert isinstance(exact.engine, TorchEngine) and isinstance(full.engine, TorchEngine)
    linears = [m for m in exact.engine._model.modules() if isinstance(m, StoredLinear)]
    assert {m.activations for m in linears} == {"fp32"}
    assert exact.engine._model.dtype == torch.bfloat16 and full.engine._model.dtype == torch.float32
    assert (exact.engine.max_sequences, exact.engine.context, full.engine.context) == (3, 99, 512)
    assert text(full, max_new_tokens=2) and text(exact, max_new_tokens=2)
    assert f"{len(linears)} linears in int" in exact.engine.banner and "backend cpu and float32" in exact.engine.banner
    assert "not quantized" in full.engine.banner
    for options, message in (
        ({"activations": "int4"}, "activations must be one of"),
        ({"backend": "gpu"}, "backend must be one of .*, got 'gpu'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "warp"}, "device 'warp' cannot be used here"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"max_sequences": 0}, "max_sequences must be at least 1"),
        ({"context": 513, **EXACT}, "context must be from 2 to the model's 512"),
    ):
        with pytest.raises(AmqError, match=message):
            load(folder, **options)
    with pytest.raises(AmqError, match="the model is not quantized"):
        load(tiny_folder, activations="int8")


@pytest.mark.parametrize(
    "options, expected",
    (
        ({"device": "cuda"}, "fp32"),
        ({"device": "cuda:1", "backend": "triton"}, "fp32"),
        ({"device": "cuda", "backend": "cuda"}, "fp32"),
        ({"device": "cuda", "backend": "cuda", "activations": "int8"}, "int8"),
        ({"backend": "reference"}, "fp32"),
        ({"dtype": "bfloat16"}, "int8"),
        ({"dtype": "bfloat16", "backend": "cpu"}, "int8"),
    ),
)
def test_activations_where_nobody_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict, expected: str
) -> None:
    """Exact on a GPU, where int8 costs a launch for each linear and Triton has none."""
    seen = []

    def stop(*_: Any, quantization_config: Any, **__: Any) -> None:
        seen.append(quantization_config.activations)
        raise AmqError("far enough")

    monkeypatch.setattr("amq.model.open.check_device", lambda device: None)
    monkeypatch.setattr("amq.model.open.load_model", stop)
    with pytest.raises(AmqError, match="far enough"):
        load(folder, **options)
    assert seen == [expected]


def test_a_packed_head_runs_in_transformers_too(tmp_path: Path) -> None:
    folder = tiny_checkpoint(ARCHITECTURES["llama"].build(tie_word_embeddings=True), tmp_path / "head", head="int8")
    packed = load(folder, **EXACT)
    assert text(packed, max_new_tokens=5)
    engine = packed.engine._model
    stored = sum(m.packed.nbytes for m in engine.modules() if isinstance(m, StoredLinear))
    assert packed.weight_bytes == stored + sum(p.nbytes for p in engine.parameters())  # no float table is left


def stand_in(monkeypatch: pytest.MonkeyPatch, engine: Any) -> list[tuple[Any, ...]]:
    """Replaces the native engine; `engine` None: one that refuses. Returns the calls of open_native."""
    module, calls = ModuleType("amq.runtime.native_engine"), []

    def open_native(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if engine is None:
            raise Unsupported("it has no wings")
        return engine

    module.open_native = open_native
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_more_threads_than_a_quota_are_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("amq.util.limits.processors", lambda: 1)
    try:
        with pytest.raises(AmqError, match="--threads 2: this process may use 1 of the machine's processors"):
            load(tiny_folder, threads=2)
        load(tiny_folder)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_which_engine_runs(
    folder: Path,
    tiny_folder: Path,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = runtime.engine
    calls = stand_in(monkeypatch, engine)
    native = load(folder, context=64, max_sequences=2, threads=1)
    assert native.engine is engine and native.weight_bytes == engine.weight_bytes and native.device == "cpu"
    assert load(str(folder), backend="cpu", dtype="float32", activations="fp32").engine is engine
    assert [(call[0].folder, *call[1:]) for call in calls] == [
        (folder, "int8", 64, 2, 1, "auto"), (folder, "fp32", None, 1, None, "auto"),
    ]  # fmt: skip
    assert text(native, max_new_tokens=5) == text(runtime, max_new_tokens=5)
    for model, options in ((folder, {"dtype": "bfloat16"}), (folder, EXACT), (tiny_folder, {})):
        assert isinstance(load(model, **options).engine, TorchEngine) and len(calls) == 2
    stand_in(monkeypatch, None)
    assert load(folder).engine.banner.endswith("(it has no wings)")

    def missing() -> None:
        raise AmqError("the native module is not built")

    monkeypatch.setattr("amq.kernels.modules._choose", choose_backend)  # forgets what earlier loads have found
    monkeypatch.setattr("amq.kernels.cpu.cpu_module", missing)
    slow = load(folder, activations="fp32")
    assert slow.engine.banner.endswith("(backend cpu does not run its formats here)")
    assert "the native module is not built" in caplog.text


def test_wrong_prompts(runtime: Runtime) -> None:
    for prompt, message in (
        ("", "the prompt is empty"),
        ("x" * 512, "the prompt has 512 tokens, the model's context 512"),
        ([{"role": "user", "content": "hello"}], "has no chat template"),
    ):
        with pytest.raises(AmqError, match=message):
            generate(runtime, prompt)


def test_chat_template(runtime: Runtime, loaded: LoadedModel) -> None:
    from helpers.tiny_models import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    chatting = Runtime("chat", runtime.engine, Tokenizer.from_transformers(tokenizer, []), 0)
    assert text(chatting, [{"role": "user", "content": "hi"}], max_new_tokens=5) == plain(loaded, "<hi>", 5)


def test_command(folder: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    options = ["--prompt", "-", "--max-new-tokens", "6", "--threads", "1", "--json", str(tmp_path / "figures.json")]
    exact = ["--backend", "reference", "--activations", "fp32", "--min-p", "0.1", "--context", "64"]
    assert run_command(command.main, [str(folder), *options, *exact]) == 0
    out, err = capsys.readouterr()
    assert out == text(runtime, max_new_tokens=6) + "\n"
    assert err.startswith("transformers on cpu") and "context 64" in err
    assert "prompt 5 tokens" in err and "generated 6 tokens" in err and "peak RSS" in err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["new_tokens"] == 6 and figures["peak_memory_bytes"] > 1 << 20 and figures["threads"] == 1


def test_command_in_a_chat(folder: Path, tmp_path: Path, capsys: Any) -> None:
    copy = tmp_path / "chat"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role[0] }}{{ m.content }}>{% endfor %}")
    figures = tmp_path / "figures.json"
    options = ["--prompt", "hi", "--chat", "--max-new-tokens", "1", "--threads", "1", "--json", str(figures)]
    for system, tokens in (([], len("<uhi>")), (["--system", "x"], len("<sx><uhi>"))):
        assert run_command(command.main, [str(copy), *options, *system]) == 0
        assert json.loads(figures.read_text())["prompt_tokens"] == tokens
    capsys.readouterr()


def test_command_with_wrong_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    for options, message in (
        ([str(folder), "--prompt", "-"], "the prompt is empty"),
        ([str(tmp_path), "--prompt", "hello"], "has no config.json"),
        ([str(folder), "--prompt", "hello", "--system", "Be kind."], "--system is for a chat"),
        ([str(folder), "--prompt", "hello", "--threads", "0"], "threads must be at least 1"),
        ([str(folder), "--prompt", "hello", "--threads", "99999"], "--threads 99999: this process may use "),
        ([str(folder), "--prompt", "hello", "--repetition-penalty", "0"], "--repetition-penalty must be"),
    ):
        assert run_command(command.main, options) == 2
        assert message in capsys.readouterr().err


def test_transformers_is_imported_only_where_a_model_needs_it(folder: Path) -> None:
    code = (
        "import sys; from amq import generate; import amq.runtime\n"
        "assert 'transformers' not in sys.modules, 'on import'\n"
        f"generate.main([{str(folder)!r}, '--prompt', 'hello', '--max-new-tokens', '2'])\n"
        "from amq.runtime.chat import render_chat; render_chat('x', [], {})\n"
        "native = 'amq.runtime.torch_engine' not in sys.modules\n"
        "assert native and 'transformers' not in sys.modules, 'while it runs'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


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
    heavy = {"hqq", "pymoo", "sklearn", "altair", "vl_convert", "scipy", "datasets", "starlette", "uvicorn"}
    stages = {"search", "quantizers", "quantize", "eval", "export", "bank", "evaluator", "fisher", "serve", "bench"}
    assert "amq.kernels.modules" in reached
    assert not {
        name
        for name in reached
        if name.split(".")[0] in heavy or name.startswith("amq.") and name.split(".")[1] in stages
    }
