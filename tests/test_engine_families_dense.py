"""What single dense families have beside tests/test_engine_families.py: angles of long texts, windows at edges of pages,
keys and values of other layers, inputs per layer from a packed table, and a scale that steps far into a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engine_cases_dense import CASES, GEMMA4, LONGROPE, text_model
from helpers.engines import text, transformers_logits
from torch import Tensor

from amq.runtime.engine import Segment
from amq.runtime.native_engine import NativeEngine, open_native

BORDER = int(str(LONGROPE["original_max_position_embeddings"]))
PAGE = 64


def close(found: Tensor, expected: Tensor) -> bool:
    """Within what sums in another order may differ by in float32."""
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max())


def step_by_step(engine: NativeEngine, tokens: Sequence[int], more: int, first: int) -> Tensor:
    """Logits after each token from number `first` on, of a sequence that may have `more` tokens behind `tokens`."""
    slot = engine.open(tokens, more)
    assert slot is not None
    rows = [engine.forward([Segment(slot, tokens[slot.length : first])])[0].clone()]
    rows += [engine.forward([Segment(slot, [token])])[0].clone() for token in tokens[first:]]
    engine.close(slot)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(CASES["phi3 longrope"](), tmp_path_factory.mktemp("phi3") / "model")


@pytest.mark.parametrize("length", [BORDER - 1, BORDER, BORDER + 1, 3 * BORDER])
def test_a_text_has_the_angles_of_its_length(phi3: Path, length: int) -> None:
    tokens = text(length)
    assert close(open_native(phi3, "fp32").all_logits(tokens), transformers_logits(phi3, tokens))


def test_a_sequence_has_the_angles_of_the_length_that_it_may_come_to(phi3: Path) -> None:
    """From its first token on: what is in the cache is not turned again at the border."""
    tokens = text(2 * BORDER)
    long, short = transformers_logits(phi3, tokens), transformers_logits(phi3, tokens[:BORDER])
    engine = open_native(phi3, "fp32", max_sequences=2)
    start = BORDER - 20
    assert close(step_by_step(engine, tokens[:BORDER], 0, start), short[start - 1 :])
    assert close(step_by_step(engine, tokens, 0, start), long[start - 1 :])
    assert not close(long[: BORDER - 1], short[: BORDER - 1])


def test_long_and_short_texts_share_no_pages(phi3: Path) -> None:
    tokens = text(BORDER)
    assert BORDER > PAGE
    fresh = {more: step_by_step(open_native(phi3, "fp32"), tokens, more, BORDER) for more in (0, 100)}
    engine, found = open_native(phi3, "fp32", max_sequences=2), []
    for more, known in ((0, 0), (100, 0), (0, PAGE), (100, PAGE)):
        slot = engine.open(tokens, more)
        assert slot is not None and slot.length == known
        found.append((more, engine.forward([Segment(slot, tokens[slot.length :])])[0].clone()))
        engine.close(slot)
    for more, row in found:
        assert torch.equal(row, fresh[more][0])


@pytest.mark.parametrize("window", [1, 2, PAGE - 1, PAGE, PAGE + 1, 150])
def test_windows_end_where_they_do(window: int, tmp_path: Path) -> None:
    options = {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    sizes = {"head_dim": 16, "query_pre_attn_scalar": 16}
    folder = tiny_checkpoint(text_model("Gemma3", {**sizes, **options}, "Gemma3Text")(), tmp_path / "model")
    tokens = text(200)
    engine, expected = open_native(folder, "fp32"), transformers_logits(folder, tokens)
    assert close(engine.all_logits(tokens), expected)
    assert close(step_by_step(engine, tokens, 0, 126), expected[125:])


def gemma4(options: dict[str, Any], folder: Path, **packed: Any) -> Path:
    return tiny_checkpoint(text_model("Gemma4", {**GEMMA4, **options}, "Gemma4Text")(), folder, **packed)


def test_shared_keys_and_values_are_kept_once(tmp_path: Path) -> None:
    own, shared = (
        open_native(gemma4({"num_kv_shared_layers": count}, tmp_path / str(count)), "fp32", context=256)
        for count in (0, 2)
    )
    kv_heads, full, sliding = 2, 32, 16
    position = 2 * kv_heads * 4 * (full + sliding)  # bytes of keys and values in float32, of one layer of each kind
    assert own.cache_bytes == 256 * 2 * position and shared.cache_bytes == 256 * position


@pytest.mark.parametrize("formats", [("", ""), ("int8", "int4"), ("int3", "int2"), ("int6", "int5")])
def test_tables_of_embeddings_may_be_packed(formats: tuple[str, str], tmp_path: Path) -> None:
    head, embeddings = formats
    options = {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    folder = gemma4(options, tmp_path / "model", head=head, embeddings=embeddings)
    tokens = text(100)
    assert close(open_native(folder, "fp32").all_logits(tokens), transformers_logits(folder, tokens))


def test_queries_are_scaled_step_by_step(tmp_path: Path) -> None:
    folder = tiny_checkpoint(CASES["ministral3"](), tmp_path / "model")
    tokens = text(200)  # the scale steps every 48 positions
    expected = transformers_logits(folder, tokens)
    engine = open_native(folder, "fp32")
    assert close(engine.all_logits(tokens), expected)
    assert close(step_by_step(engine, tokens, 0, 90), expected[89:])
