"""Pages of the KV cache and who shares them: no page that others may read is written, and no owner finds another's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engines import text
from helpers.tiny_models import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amq.errors import AmqError
from amq.runtime.engine import Segment, Slot
from amq.runtime.native_engine import NativeEngine, PagedSlot, open_native
from amq.runtime.page_keys import owner_root, page_key, page_keys
from amq.runtime.pages import PagePool, PageTable
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.runtime.tokenizer import Tokenizer

PAGE, PAGES = 4, 12
OWNERS = ("", "a", None)
Content = tuple[str | None, tuple[int, ...]]


class Modelled:
    """A sequence, and what the engine does with its pages. content: of every page of the pool, by position in it; of a
    companion as of its page."""

    def __init__(
        self, pool: PagePool, content: list[list[Content]], table: PageTable, owner: str | None, prompt: list[int]
    ) -> None:
        self.pool, self.content, self.table, self.owner = pool, content, table, owner
        self.tokens: list[int] = []
        self.prompt = prompt
        self.follow()

    @property
    def pages(self) -> list[int]:
        """Without the companion."""
        pages = self.table.pages.tolist()
        return pages[:-1] if self.pool._has_companions else pages

    def places(self, position: int) -> list[int]:
        """Pages that have a part of a position."""
        first = self.pool._has_companions and position < PAGE
        return [self.pages[position // PAGE], *([int(self.table.pages[-1])] if first else [])]

    def follow(self) -> None:
        """What was found: it must be what this sequence would have computed."""
        found = len(self.table.keys) * PAGE
        if found > len(self.tokens):
            self.tokens = list(self.table.prompt[:found])
        self.check()

    def check(self) -> None:
        for position in range(len(self.tokens)):
            for page in self.places(position):
                owner, history = self.content[page][position % PAGE]
                assert history == tuple(self.tokens[: position + 1])
                assert owner == self.owner

    def write(self, tokens: list[int], others: list[Modelled]) -> None:
        for token in tokens:
            written = self.places(len(self.tokens))
            assert written[0] not in self.pool._known.values(), "a page that others may find is written"
            assert not any(page in other.table.pages for page in written for other in others if other is not self)
            self.tokens.append(token)
            for page in written:
                self.content[page][(len(self.tokens) - 1) % PAGE] = (self.owner, tuple(self.tokens))
        self.pool.computed(self.table, self.tokens)

    def adopt(self) -> None:
        while (key := self.pool.wanted(self.table, self.tokens)) is not None and self.pool.adopt(self.table, key):
            self.follow()


Action = tuple[str, int, int, int, bool]
ACTIONS = st.tuples(
    st.sampled_from(["open", "open", "write", "write", "adopt", "close"]), st.integers(0, 3), st.integers(1, 30),
    st.integers(0, len(OWNERS) - 1), st.booleans(),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(ACTIONS, max_size=60), st.booleans())
def test_pages_are_never_shared_by_different_texts_nor_written_where_others_read(
    actions: list[Action], companions: bool
) -> None:
    """Random sequences over few texts and owners, which run side by side."""
    pool = PagePool(PAGES, PAGE, companions=companions)
    content: list[list[Content]] = [[("nobody", ())] * PAGE for _ in range(PAGES)]
    running: list[Modelled] = []
    for what, kind, length, owner, reuse in actions:
        if what == "open":
            prompt = [kind % 2] * 6 + [kind] * length
            table = pool.take(prompt, length + 8, OWNERS[owner], reuse)
            if table is None:
                held = {page for one in running for page in one.table.pages.tolist()}
                assert len(held) + -(-(length + 8) // PAGE) + companions > PAGES
                continue
            assert len(table.pages) == -(-(length + 8) // PAGE) + companions and len(table.keys) * PAGE < len(prompt)
            assert not (table.keys and (OWNERS[owner] is None or not reuse))
            running.append(Modelled(pool, content, table, OWNERS[owner], prompt))
        elif running:
            one = running[kind % len(running)]
            if what == "write":
                room = len(one.pages) * PAGE - len(one.tokens)
                coming = [*one.prompt, *[7] * 8][len(one.tokens) :]
                one.write(coming[: min(length, room)], running)
            elif what == "adopt":
                one.adopt()
            else:
                pool.give_back(one.table)
                running.remove(one)
        for one in running:
            one.check()
        held = {page for one in running for page in one.table.pages.tolist()}
        assert pool.used == len({page for one in running for page in one.pages})
        kept = [*pool._idle, *(pool._companions[page] for page in pool._idle if page in pool._companions)]
        assert sorted([*held, *kept, *pool._free]) == list(range(PAGES))
    for one in running:
        pool.give_back(one.table)
    assert pool.used == 0 and pool.take([9], (PAGES - companions) * PAGE) is not None


def test_what_is_evicted_first_is_the_end_of_what_was_used_longest_ago() -> None:
    pool = PagePool(6, PAGE)
    texts = [[kind] * 9 for kind in range(3)]
    for tokens in texts:
        table = pool.take(tokens, 8)
        assert table is not None
        pool.computed(table, tokens[:8])
        pool.give_back(table)
    assert pool.take([9], PAGE * 3) is not None  # three of the six
    keys = [list(page_keys(owner_root(b"", ""), tokens, PAGE)) for tokens in texts]
    found = [[key in pool._known for key in both] for both in keys]
    assert found == [[False, False], [True, False], [True, True]]


def test_keys_tell_texts_and_owners_apart() -> None:
    roots = {owner_root(root, owner) for root in (b"", b"model") for owner in ("", "a", "ab")}
    assert len(roots) == 6
    root = roots.pop()
    keys = list(page_keys(root, list(range(11)), PAGE))
    assert len(keys) == 2 and keys[1] == page_key(keys[0], [4, 5, 6, 7]) != page_key(root, [4, 5, 6, 7])
    assert page_key(root, [1, 2]) != page_key(root, [1, 2, 0])
    with pytest.raises(AmqError, match="beyond every vocabulary"):
        page_key(root, [2**63])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(ARCHITECTURES["llama"].build(num_hidden_layers=2), tmp_path_factory.mktemp("pages") / "m")


def opened(
    engine: NativeEngine, prompt: list[int], new_tokens: int = 0, owner: str = "", reuse: bool = True
) -> PagedSlot:
    slot = engine.open(prompt, new_tokens, owner, reuse)
    assert slot is not None
    return slot


def test_a_sequence_that_runs_is_found_by_others_of_its_owner(folder: Path) -> None:
    tokens = text(300)
    expected = open_native(folder).all_logits(tokens)[-1]
    engine = open_native(folder, context=512, max_sequences=4)
    first = opened(engine, tokens, owner="a")
    engine.forward([Segment(first, tokens[:200])])
    assert opened(engine, tokens, owner="b").length == 0
    assert opened(engine, tokens, owner="a", reuse=False).length == 0
    second = opened(engine, tokens, owner="a")
    assert second.length == 192 and second.pages[0] == first.pages[0] and second.pages[3] != first.pages[3]
    assert torch.equal(engine.forward([Segment(second, tokens[192:])])[0], expected)
    assert torch.equal(engine.forward([Segment(first, tokens[200:])])[0], expected)
    assert first.pages[3] == second.pages[3]  # both computed it, one copy is kept
    engine.close(first)
    engine.forward([Segment(second, [5])])


def test_sequences_that_begin_together_compute_their_prompt_once(folder: Path) -> None:
    tokens = text(300)
    expected = open_native(folder).all_logits(tokens)[-1]
    engine = open_native(folder, context=512, max_sequences=4)
    slots: list[PagedSlot] = [opened(engine, tokens, 4) for _ in range(3)]
    other = opened(engine, text(300, seed=1), 4)
    assert [slot.catch_up() for slot in (slots[0], other, *slots[1:])] == [False, False, True, True]
    assert [slot.catch_up() for slot in slots] == [False, True, True]  # asked again before the pass
    engine.forward([Segment(slots[0], tokens[:130])])
    assert [slot.catch_up() for slot in slots] == [False, True, True]
    assert [slot.length for slot in slots] == [130, 128, 128]
    engine.forward([Segment(slots[0], tokens[130:140]), Segment(slots[1], tokens[128:150])])
    engine.close(slots[0])  # who has been waited for is gone: the next goes on
    assert [slot.catch_up() for slot in slots[1:]] == [False, True]
    engine.forward([Segment(slots[1], tokens[150:299])])
    assert [slot.catch_up() for slot in slots[1:]] == [False, False]
    assert [slot.length for slot in slots[1:]] == [299, 256]
    for slot in slots[1:]:
        assert torch.equal(engine.forward([Segment(slot, tokens[slot.length :])])[0], expected)
    assert other.length == 0
    with pytest.raises(AmqError, match="closed already"):
        slots[0].catch_up()


def test_a_begun_page_is_given_up_for_a_full_one(folder: Path) -> None:
    tokens = text(150)
    expected = open_native(folder).all_logits(tokens)[-1]
    engine = open_native(folder, context=512, max_sequences=3)
    first, second, strange = (opened(engine, tokens) for _ in range(3))
    engine.forward([Segment(second, tokens[:70]), Segment(strange, [*tokens[:69], 3 - tokens[69] % 2])])
    engine.forward([Segment(first, tokens[:140])])
    used = engine.cached_tokens()[0]
    assert not second.catch_up() and second.length == 128
    assert not strange.catch_up() and strange.length == 70  # it went on with something else than it said
    assert engine.cached_tokens()[0] == used - 64
    assert torch.equal(engine.forward([Segment(second, tokens[128:])])[0], expected)


def test_perplexity_shares_nothing(folder: Path) -> None:
    tokens = text(200)
    engine = open_native(folder, context=512)
    engine.all_logits(tokens)
    assert opened(engine, tokens).length == 0


def test_a_slot_of_an_engine_without_pages_finds_nothing() -> None:
    assert not Slot(8).catch_up()


def answers(
    engine: NativeEngine, tokenizer: Tokenizer, prompts: list[list[int]]
) -> tuple[list[Request], list[str], int]:
    """Requests that come at once: they, their texts, and how many tokens the engine computed."""
    texts, computed = [""] * len(prompts), 0
    forward = engine.forward

    def count(segments: Sequence[Segment[PagedSlot]]) -> Tensor:
        nonlocal computed
        computed += sum(len(segment.tokens) for segment in segments)
        return forward(segments)

    def listen(i: int, piece: Piece) -> None:
        texts[i] += piece.text

    requests = [
        Request(prompt, Sampling(max_new_tokens=5, ignore_end=True), partial(listen, i), owner="a")
        for i, prompt in enumerate(prompts)
    ]
    scheduler = Scheduler(engine, tokenizer)
    engine.forward = count  # type: ignore[method-assign]
    for request in requests:
        scheduler.submit(request)
    while scheduler.step():
        pass
    engine.forward = forward  # type: ignore[method-assign]
    assert not any(request.error for request in requests)
    return requests, texts, computed


def test_requests_that_come_at_once_read_a_common_beginning_once(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    shared = text(300)
    prompts = [shared, shared, shared + text(40, seed=1), shared[:200] + text(30, seed=2), text(90, seed=3)]
    expected = []
    for prompt in prompts:
        expected += answers(open_native(folder, context=512), tokenizer, [prompt])[1]
    engine = open_native(folder, context=512, max_sequences=5)
    requests, texts, computed = answers(engine, tokenizer, prompts)
    assert texts == expected and len(set(expected)) > 1
    # the first whole; then 300 − 256, 340 − 256, 230 − 192; the last, which has nothing in common
    assert [request.cached_tokens for request in requests] == [0, 256, 256, 192, 0]
    assert computed == 300 + 44 + 84 + 38 + 90 + 5 * 4
    assert engine.cached_tokens()[0] == 0


def test_a_restarted_scheduler_answers_from_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amq.runtime.paged_engine.READ_BYTES", 1)  # page by page
    tokenizer, prompts = Tokenizer.from_folder(folder), [text(300)] * 2
    results = []
    for _ in range(2):
        engine = open_native(
            folder, context=512, max_sequences=2, prompt_cache=1 << 30, prompt_cache_folder=tmp_path / "prompts"
        )
        results.append(answers(engine, tokenizer, prompts))
        engine.shutdown()
    assert results[0][1] == results[1][1]
    assert [[request.cached_tokens for request in result[0]] for result in results] == [[0, 256], [256, 256]]
    assert [result[2] for result in results] == [300 + 44 + 8, 2 * 44 + 8]
