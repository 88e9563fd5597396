"""Hybrids in the native engine: what goes on from a snapshot is a fresh run to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache as remember
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engines import text
from helpers.families import FAMILIES
from helpers.states import KINDS, LONGEST, OWNERS, Checked
from helpers.tiny_models import ARCHITECTURES
from helpers.turns import conversation
from torch import Tensor

from amq.errors import AmqError
from amq.runtime.native_engine import NativeEngine, open_native
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer

PAGE, CONTEXT = 64, 512
HYBRIDS = ("qwen3_5", "lfm2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @remember
    def folder(name: str) -> Path:
        family = FAMILIES[name]
        long = replace(family, options={**family.options, "max_position_embeddings": 2048})
        return tiny_checkpoint(long.build(), tmp_path_factory.mktemp(name) / "model")

    return folder


def checked(folder: Path, activations: str = "int8", kept: int | None = None, sequences: int = 3) -> Checked:
    """A new engine with room for `kept` snapshots; another one's logits are what it has to give."""
    fresh = open_native(folder, activations, context=CONTEXT)

    @remember
    def logits(tokens: tuple[int, ...]) -> Tensor:
        return fresh.all_logits(tokens)

    def expected(tokens: list[int]) -> Tensor:
        whole = next((one for one in known if list(one[: len(tokens)]) == tokens), tuple(tokens))
        return logits(whole)[len(tokens) - 1]

    state_bytes = fresh.states.memory[0].nbytes if fresh.states is not None else 0
    engine = open_native(
        folder, activations, context=CONTEXT, max_sequences=sequences,
        state_cache=None if kept is None else kept * state_bytes,
    )  # fmt: skip
    one = Checked(engine, PAGE, expected)
    known = [tuple(tokens) for tokens in one.texts()]
    return one


@pytest.mark.parametrize("activations", ["int8", "fp32"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_a_snapshot_goes_on_as_the_sequence_it_was_taken_of(
    name: str, activations: str, folders: Callable[[str], Path]
) -> None:
    """Parts of all lengths around page edges, snapshots in the middle of a part, several sequences in a pass."""
    one = checked(folders(name), activations)
    tokens = text(300)
    assert one.finish(one.opened(tokens, 0), 101) == 300
    for length, found in ((300, 256), (320, 256), (257, 256), (256, 0), (250, 192), (192, 0)):
        slot = one.opened((tokens + text(20, seed=1))[:length], 0)
        assert slot.length == found
        one.finish(slot, 7)
    slots = [one.opened(tokens[:280] + text(40, seed=seed), 0) for seed in (2, 3, 4)]
    assert [slot.length for slot in slots] == [256] * 3
    while one.left(slots[0]):
        one.run([(slot, 13 + i) for i, slot in enumerate(slots) if one.left(slot)])
    one.check()


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("kept", [1, 3, 8])
def test_sequences_side_by_side(name: str, kept: int, folders: Callable[[str], Path]) -> None:
    """As the property test of test_state_pool.py, with one draw of what is done."""
    one, draw = checked(folders(name), kept=kept), random.Random(kept)
    what = ("open", "open", "whole", "run", "read", "read", "decode", "fail", "close")
    for _ in range(40):
        one.act(
            (draw.choice(what), draw.randrange(KINDS), draw.randint(1, LONGEST - 4), draw.randrange(len(OWNERS)), True)
        )
    for slot in list(one.running):
        one.finish(slot)
    one.check()
    assert one.engine.states is not None and one.engine.states.pool.found > 0


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_conversation_reads_what_is_new_in_it(name: str, folders: Callable[[str], Path]) -> None:
    """Ten turns; what stands behind the answer's last page edge is read again."""
    engine = open_native(folders(name), context=2048, threads=1)
    turns = conversation(engine, 10, message=90, answer=70)
    before = 0
    for turn in turns:
        assert turn.read == turn.prompt - before // PAGE * PAGE
        before = turn.prompt + turn.answer
    assert engine.states is not None and engine.states.pool.found == 9
    whole = sum(turn.prompt for turn in turns)
    assert whole > 5 * sum(turn.read for turn in turns)


def answers(engine: NativeEngine, tokenizer: Tokenizer, prompts: list[list[int]]) -> tuple[list[str], list[int]]:
    """Requests that come at once: their texts, and how many tokens of each were computed for another."""
    texts = [""] * len(prompts)

    def listen(i: int, piece: Piece) -> None:
        texts[i] += piece.text

    sampling = Sampling(max_new_tokens=5, ignore_end=True)
    requests = [Request(prompt, sampling, partial(listen, i), owner="a") for i, prompt in enumerate(prompts)]
    scheduler = Scheduler(engine, tokenizer)
    for request in requests:
        scheduler.submit(request)
    while scheduler.step():
        pass
    assert not any(request.error for request in requests)
    return texts, [request.cached_tokens for request in requests]


@pytest.mark.parametrize("name", HYBRIDS)
def test_requests_that_come_at_once_read_a_common_beginning_once(name: str, folders: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_folder(folders(name))
    shared = text(300)
    prompts = [shared, shared, shared + text(40, seed=1), shared[:200] + text(30, seed=2), text(90, seed=3)]
    expected = [answers(open_native(folders(name), context=CONTEXT), tokenizer, [prompt])[0][0] for prompt in prompts]
    engine = open_native(folders(name), context=CONTEXT, max_sequences=5)
    assert answers(engine, tokenizer, prompts) == (expected, [0, 256, 256, 192, 0])
    assert engine.cached_tokens()[0] == 0


def test_what_an_engine_refuses(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("lfm2")
    with pytest.raises(AmqError, match="a prompt cache on disk holds pages only, and .* of the type lfm2"):
        open_native(folder, prompt_cache=1 << 30, prompt_cache_folder=tmp_path / "prompts")
    with pytest.raises(AmqError, match="a state cache of 3 bytes holds no state of this model"):
        open_native(folder, state_cache=3)
    llama = tiny_checkpoint(ARCHITECTURES["llama"].build(), tmp_path / "llama")
    with pytest.raises(AmqError, match="a state cache is for models with recurrent layers, .* of the type llama"):
        open_native(llama, state_cache=1 << 30)
    assert open_native(llama).states is None and "states" not in open_native(llama).banner
    engine = open_native(folder, context=CONTEXT, max_sequences=2)
    assert engine.states is not None
    assert engine.banner.endswith(f"MB a sequence, {engine.states.pool.n_kept} kept")


def test_another_conversation_finds_nothing_of_this_one(folders: Callable[[str], Path]) -> None:
    one = checked(folders("lfm2"))
    tokens = text(300)
    one.finish(one.opened(tokens, 0))
    other = one.open(tokens, 0, owner="b")
    assert other is not None and other.length == 0
    own = one.open(tokens, 0, reuse=False)
    assert own is not None and own.length == 0
    for slot in (other, own):
        one.finish(slot)
    assert torch.isfinite(one.expected(tokens)).all()
