"""Mixtures of experts in the native engine, beyond what test_engine_families.py asks of every family: batches of
experts, ties, scores that are no numbers, and experts that are not quantized."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engine_cases_mixture import CASES, ROUTED, model_of
from helpers.engines import text, transformers_logits
from torch import nn

from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.runtime.engine import Segment
from amq.runtime.native_engine import NativeEngine, open_native
from amq.runtime.sampling import Sampler, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"num_hidden_layers": 1, "moe_intermediate_size": 16}
MANY = model_of("Qwen3Moe", **{**ROUTED, **TINY}, num_experts=300, norm_topk_prob=True)
MOST = model_of("Qwen3Moe", **{**ROUTED, **TINY, "num_experts_per_tok": 200}, num_experts=300, norm_topk_prob=True)
"""More experts than one batch holds, of a prompt's rows and of one row's."""


def run(engine: NativeEngine, tokens: Sequence[int], rows: int) -> torch.Tensor:
    """Logits after the last token of every part of `rows` tokens."""
    slot = engine.open(tokens, 0, reuse=False)
    assert slot is not None
    parts = [tokens[start : start + rows] for start in range(0, len(tokens), rows)]
    found = torch.stack([engine.forward([Segment(slot, part)])[0].clone() for part in parts])
    engine.close(slot)
    return found


@pytest.mark.parametrize("isa", cpu_module().isas())
@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["gpt_oss", "glm4_moe", "granitemoehybrid"])
def test_batches_of_experts_change_nothing(name: str, activations: str, isa: str, tmp_path: Path) -> None:
    """500 rows have 1000 to 2000 rows of experts, which are several batches; parts of 40 rows are one."""
    engine = open_native(tiny_checkpoint(CASES[name](), tmp_path / "model"), activations, context=512)
    engine.isa = isa
    tokens = text(500)
    expected = engine.all_logits(tokens)
    for rows in (40, 5, 2, 1):
        length = 500 if rows > 5 else 60
        ends = [min(end, length) - 1 for end in range(rows, length + rows, rows)]
        assert torch.equal(run(engine, tokens[:length], rows), expected[ends]), rows


@pytest.mark.parametrize("build", [MANY, MOST], ids=["many", "most"])
def test_more_experts_than_a_batch_holds(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    folder = tiny_checkpoint(build(), tmp_path / "model")
    tokens = text(150)
    engine = open_native(folder, "fp32", context=256, threads=3)
    logits, expected = engine.all_logits(tokens), transformers_logits(folder, tokens)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    for rows in (1, 2, 30):
        assert torch.equal(run(engine, tokens, rows), logits[rows - 1 :: rows]), rows


@pytest.mark.parametrize("kept", ["up_proj", r"experts\.down_proj", r"experts.*[02]$", "mlp|moe"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_experts_may_be_kept_unquantized(name: str, kept: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(CASES[name](), tmp_path / "model", kept=kept)
    tokens = text(70)
    engine, expected = open_native(folder, "fp32", context=512), transformers_logits(folder, tokens)
    logits = engine.all_logits(tokens)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    for rows in (1, 2, 35):
        assert torch.equal(run(engine, tokens, rows), logits[rows - 1 :: rows]), rows


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "gpt_oss", "qwen2_moe", "granitemoehybrid"])
def test_a_row_that_is_no_number_harms_no_other(name: str, tmp_path: Path) -> None:
    """Its scores choose experts that exist; its logits are NaN, and the sampler says so."""
    model, bad = CASES[name](), 7
    weight = model.get_input_embeddings().weight
    model.lm_head.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    weight[bad] = torch.nan
    folder = tiny_checkpoint(model, tmp_path / "model")
    for activations in ("fp32", "int8"):
        engine = open_native(folder, activations, context=128, max_sequences=2)
        for good, others in (([3], [bad]), ([5, 6, 8, 9, 10], [1, 2, bad, 4]), ([3], [bad] * 30)):
            alone = engine.all_logits(good)[-1]
            slots = [engine.open(tokens, 0, reuse=False) for tokens in (others, good)]
            found = engine.forward([Segment(slots[0], others), Segment(slots[1], good)]).clone()
            for slot in slots:
                engine.close(slot)
            assert found[0].isnan().all() and torch.equal(found[1], alone)
            with pytest.raises(AmqError, match="nan as a logit"):
                Sampler(Sampling(temperature=0), others).choose(found[0])


def set_router(model: nn.Module, weight: Callable[[torch.Tensor], Any], bias: Sequence[float]) -> nn.Module:
    """Of every layer of a gpt-oss."""
    for block in model.model.layers:
        block.mlp.router.weight.copy_(weight(block.mlp.router.weight))
        block.mlp.router.bias.copy_(torch.tensor(bias))
    return model


def test_of_equal_scores_the_first_are_chosen(tmp_path: Path) -> None:
    """As if the others had far lower ones, in passes of few rows and of many."""
    tied = set_router(CASES["gpt_oss"](), torch.zeros_like, [0.0] * 8)
    first = set_router(CASES["gpt_oss"](), torch.zeros_like, [0.0] * 4 + [-90.0] * 4)
    engines = [
        open_native(tiny_checkpoint(model, tmp_path / name), context=128)
        for model, name in ((tied, "tied"), (first, "first"))
    ]
    tokens = text(60)
    for rows in (1, 3, 60):
        one, other = (run(engine, tokens, rows) for engine in engines)
        assert torch.equal(one, other), rows


def test_experts_that_nobody_chooses_are_not_read(tmp_path: Path) -> None:
    """Their weights may hold anything."""
    chosen = [0.0, -90.0, 0.0, -90.0, 0.0, -90.0, 0.0, -90.0]
    model = set_router(CASES["gpt_oss"](), torch.zeros_like, chosen)
    whole = open_native(tiny_checkpoint(model, tmp_path / "whole"), context=128)
    for block in model.model.layers:
        for expert in (1, 3, 5, 7):
            block.mlp.experts.up_proj[expert].bias.fill_(torch.nan)
    holed = open_native(tiny_checkpoint(model, tmp_path / "holed"), context=128)
    tokens = text(60)
    for rows in (1, 2, 20):
        assert torch.equal(run(whole, tokens, rows), run(holed, tokens, rows))


@pytest.mark.parametrize("experts", [3, 5])
def test_another_number_of_experts_than_the_files_hold_is_named(experts: int, tmp_path: Path) -> None:
    folder = tiny_checkpoint(CASES["mixtral"](), tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": experts}))
    with pytest.raises(AmqError, match=r"layers\.0\.mlp\.(gate|experts)"):
        open_native(folder)
