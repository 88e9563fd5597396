"""What single dense families have beside tests/test_engine_families.py: angles of long texts, windows at page edges,
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


def step_by_step(engine: NativeEngine, tokens: Sequence[int], first: int) -> Tensor:
    """Logits after each token from number `first` on."""
    slot = engine.open(tokens, 0, reuse=False)
    assert slot is not None
    rows = [engine.forward([Segment(slot, tokens[:first])])[0].clone()]
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


def test_a_sequence_that_grows_long_is_turned_anew(phi3: Path) -> None:
    """As transformers generates it: up to the border with the angles of short texts, beyond with those of long ones."""
    tokens, start = text(2 * BORDER), BORDER - 20
    long, short = transformers_logits(phi3, tokens), transformers_logits(phi3, tokens[:BORDER])
    assert not close(long[: BORDER - 1], short[: BORDER - 1])
    engine = open_native(phi3, "fp32", context=512, max_sequences=2)
    beside = engine.open(text(40, seed=1), 300)
    assert beside is not None
    engine.forward([Segment(beside, text(40, seed=1), logits=False)])
    slot = engine.open(tokens[:start], 2 * BORDER)
    assert slot is not None
    rows = [engine.forward([Segment(slot, tokens[:start])])[0].clone()]
    rows += [engine.forward([Segment(slot, [token])])[0].clone() for token in tokens[start:]]
    assert close(torch.stack(rows), torch.cat([short[start - 1 :], long[BORDER:]]))
    expected = open_native(phi3, "fp32").all_logits([*text(40, seed=1), 5])[-1]
    assert torch.equal(engine.forward([Segment(beside, [5])])[0], expected)


def test_a_part_may_reach_over_the_border(phi3: Path) -> None:
    tokens = text(2 * BORDER)
    engine = open_native(phi3, "fp32", context=512)
    expected = engine.all_logits(tokens)[-1]
    for cut in (1, BORDER - 1, BORDER, BORDER + 1):
        slot = engine.open([*tokens[:cut]], 2 * BORDER, reuse=False)
        assert slot is not None
        engine.forward([Segment(slot, tokens[:cut], logits=False)])
        assert torch.equal(engine.forward([Segment(slot, tokens[cut:])])[0], expected)
        engine.close(slot)


def test_long_and_short_texts_share_no_pages(phi3: Path) -> None:
    """Of a text that may yet become long nothing is shared."""
    assert BORDER > PAGE
    short, long = text(BORDER), text(2 * BORDER)
    engine = open_native(phi3, "fp32", context=512)
    for tokens, more, known in (
        (short, 0, 0), (long, 0, 0), (short, 0, PAGE), (long, 9, 2 * PAGE), (short, 99, 0), (short, 0, PAGE),
    ):  # fmt: skip
        slot = engine.open(tokens, more)
        assert slot is not None and slot.length == known
        row = engine.forward([Segment(slot, tokens[known:])])[0].clone()
        engine.close(slot)
        assert torch.equal(row, engine.all_logits(tokens)[-1])


@pytest.mark.parametrize("window", [1, 2, PAGE - 1, PAGE, PAGE + 1, 150])
def test_windows_end_where_they_do(window: int, tmp_path: Path) -> None:
    options = {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    sizes = {"head_dim": 16, "query_pre_attn_scalar": 16}
    folder = tiny_checkpoint(text_model("Gemma3", {**sizes, **options}, "Gemma3Text")(), tmp_path / "model")
    tokens = text(200)
    engine, expected = open_native(folder, "fp32"), transformers_logits(folder, tokens)
    assert close(engine.all_logits(tokens), expected)
    assert close(step_by_step(engine, tokens, 126), expected[125:])


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
    assert close(step_by_step(engine, tokens, 90), expected[89:])
