"""Every family of the native engine computes what transformers does, whatever shares a pass, however a prompt is cut.

A case is a row of helpers/engine_cases*.py: a tiny random model, quantized in formats of several widths.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engine_cases import CASES
from helpers.engines import assert_shared_passes_change_nothing, text, transformers_logits

from amq.runtime.engine import Segment
from amq.runtime.families import FAMILIES
from amq.runtime.native_engine import NativeEngine, open_native

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 200
"""More than a span of 128 positions, three pages, and every window."""
NEW = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made where a test asks for one first."""

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            self[name] = tiny_checkpoint(CASES[name](), tmp_path_factory.mktemp("family") / name)
            return self[name]

    return Made()


def greedy(engine: NativeEngine, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The NEW likeliest tokens after a prompt, and the logits that each was chosen from."""
    slot = engine.open(prompt, NEW)
    found: list[int] = []
    rows = []
    part = prompt[slot.length :]
    while len(found) < NEW:
        rows.append(engine.forward([Segment(slot, part)])[0].clone())
        part = [int(rows[-1].argmax())]
        found += part
    engine.close(slot)
    return found, torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    engine = open_native(folders[name], "fp32", context=512)
    prompt = text(LENGTH)
    new, rows = greedy(engine, prompt)
    tokens = [*prompt, *new]
    expected = transformers_logits(folders[name], tokens)
    allowed = 1e-4 * expected.abs().max()
    assert (engine.all_logits(tokens) - expected).abs().max() < allowed
    assert (rows - expected[LENGTH - 1 : -1]).abs().max() < allowed
    # Greedy text is transformers' own, token by token, unless two logits lie closer than both are computed.
    likeliest = expected[LENGTH - 1 : -1]
    missed = likeliest.amax(-1) - likeliest[torch.arange(NEW), new]
    assert missed.max() <= 2 * allowed, "another token is clearly likelier"


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_does_not_depend_on_what_shares_its_passes(folders: dict[str, Path], name: str) -> None:
    engine = open_native(folders[name], "int8", context=512, max_sequences=4)
    assert_shared_passes_change_nothing(engine, LENGTH, 130)


@pytest.mark.parametrize("name", CASES)
def test_threads_change_nothing_and_what_is_kept_is_right(folders: dict[str, Path], name: str) -> None:
    tokens = text(LENGTH)
    one, three = (open_native(folders[name], context=512, threads=threads) for threads in (1, 3))
    expected = one.all_logits(tokens)
    assert torch.equal(three.all_logits(tokens), expected)
    for _ in range(2):  # the second time over what the first one left
        slot = one.open(tokens, 0)
        logits = one.forward([Segment(slot, tokens[slot.length :])])
        assert torch.equal(logits[0], expected[-1])
        one.close(slot)


def test_every_family_has_a_case() -> None:
    """By the `model_type` of its text model."""
    cased = set()
    for build in CASES.values():
        config = build().config
        cased.add(config.get_text_config(decoder=True).model_type)
    assert set(FAMILIES) == cased
