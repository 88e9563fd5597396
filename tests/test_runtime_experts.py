"""`amq.runtime.load` on checkpoints with experts and packed embeddings: which engine runs them, and that it does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.packed_models import CASES, checkpoint_in
from helpers.tiny_models import ARCHITECTURES, random_tokens
from transformers import AutoModelForCausalLM

from amq.checkpoint.store import open_checkpoint
from amq.integrations.transformers import AmqConfig
from amq.kernels.modules import StoredLinear
from amq.model.experts import experts_of
from amq.runtime import load
from amq.runtime.engine import Segment
from amq.runtime.native_engine import NativeEngine
from amq.runtime.torch_engine import TorchEngine

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]
TOKENS = random_tokens(1, 30)[0].tolist()
PARTS = [10, 1, 1, 12, 1, 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.partial(checkpoint_in, tmp_path_factory.mktemp("checkpoints"))


def logits_after(engine: TorchEngine | NativeEngine, tokens: list[int]) -> torch.Tensor:
    """The logits after each of PARTS."""
    slot, start, rows = engine.open(tokens, 1), 0, []
    for part in PARTS:
        rows.append(engine.forward([Segment(slot, tokens[start : start + part])])[0].clone())
        start += part
    engine.close(slot)
    return torch.stack(rows)


def whole(folder: Path, activations: str) -> torch.Tensor:
    """The same of transformers' own forward over all tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=AmqConfig(activations=activations))
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0][torch.tensor(PARTS).cumsum(0) - 1]


@pytest.fixture
def no_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native engine knows none, as of every model that is not in its table."""
    monkeypatch.setattr("amq.runtime.families.FAMILIES", {})


@pytest.mark.usefixtures("no_families")
@pytest.mark.parametrize("case", CASES)
def test_transformers_runs_it(case: str, folders: Callable[[str], Path]) -> None:
    """Parts of a prompt and single tokens give what one forward gives, in the mode that is the CPU's own."""
    runtime = load(folders(case))
    assert isinstance(runtime.engine, TorchEngine) and "the native engine runs" in runtime.engine.banner
    found, expected = logits_after(runtime.engine, TOKENS), whole(folders(case), "int8")
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-2  # a route may turn on a rounding
    exact = logits_after(load(folders(case), activations="fp32").engine, TOKENS)
    torch.testing.assert_close(exact, whole(folders(case), "fp32"), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_native_engine_runs_it(case: str, folders: Callable[[str], Path]) -> None:
    engine = load(folders(case), activations="fp32").engine
    assert isinstance(engine, NativeEngine)
    torch.testing.assert_close(logits_after(engine, TOKENS), whole(folders(case), "fp32"), atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_families")
def test_bytes_of_a_token_are_those_of_the_experts_that_it_is_routed_to(folders: Callable[[str], Path]) -> None:
    engine = load(folders("experts, head and embedding")).engine
    model = engine._model
    in_experts = {m for _, layer in experts_of(model) for m in layer.modules() if isinstance(m, StoredLinear)}
    linears = [m for m in model.modules() if isinstance(m, StoredLinear)]
    assert len(in_experts) == 3 * 6 * 3
    expected = sum(m.packed.nbytes * (2 / 6 if m in in_experts else 1) for m in linears)
    assert engine.weight_bytes == round(expected + sum(p.nbytes for p in model.parameters()))


def test_the_native_engine_reads_an_embedding_of_its_own(tmp_path: Path) -> None:
    """Packed by itself, in another format than the head: a row is read, and none of its bytes count for a token."""
    model = ARCHITECTURES["qwen3"].build(num_hidden_layers=2)
    folder = tiny_checkpoint(model, tmp_path / "own", head="int4", embeddings="int6")
    record = open_checkpoint(folder).record
    assert record.embedding == {"model.embed_tokens": "model.embed_tokens"} and record.version == 3
    runtime = load(folder, activations="fp32")
    assert isinstance(runtime.engine, NativeEngine)
    torch.testing.assert_close(logits_after(runtime.engine, TOKENS), whole(folder, "fp32"), atol=2e-4, rtol=1e-3)
    assert isinstance(load(folder).engine, NativeEngine)
    plain = tiny_checkpoint(model, tmp_path / "plain", head="int4")
    assert runtime.weight_bytes == load(plain).weight_bytes
