"""`PagedEngine`: sequences in a paged KV cache, with the states beside it where a model is recurrent, of any engine of
our own: what of a prompt is there already, who waits for whom, what a pass leaves behind. A subclass computes passes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.runtime.decoder_spec import DecoderSpec
from amq.runtime.engine import MAX_SCORED, Segment, Slot
from amq.runtime.page_keys import Key, page_key
from amq.runtime.page_store import PageStore
from amq.runtime.pages import PagePool, PageTable
from amq.runtime.state_pool import RecurrentStates, SequenceState, Snapshots

MAX_ROWS = 512
READ_BYTES = 8 << 20
"""Of pages that one call reads from disk at least: a few milliseconds, in which other sequences wait for their pass."""
DEFAULT_CONTEXT = 8192


class PagedSlot(Slot):
    """table: of its pages in the cache. tokens: all that were computed, or found there. on_disk: whether its next page
    may be in the prompt cache on disk. state: beside its pages, where the model is recurrent. is_long: see
    `Rope.border`."""

    def __init__(
        self,
        engine: PagedEngine,
        table: PageTable,
        page: int,
        on_disk: bool,
        state: SequenceState | None,
        is_long: bool,
    ) -> None:
        length = len(table.keys) * page
        more = engine.spare + engine.companions
        super().__init__(min((len(table.pages) - more) * page, engine.context), length)
        self._engine, self.table, self.on_disk, self.state, self.is_long = engine, table, on_disk, state, is_long
        self.tokens = list(table.prompt[:length])

    @property
    def pages(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """Their numbers; none once the slot is closed."""
        return self.table.pages

    def catch_up(self) -> bool:
        return self._engine.catch_up(self)


class PagedEngine:
    """See `amq.runtime.engine.Engine`. A subclass says `_pass`, and `_page_memory` where pages can be on disk.

    page: positions of one. page_bytes: of one, over all steps. states: of its sequences, with the snapshots, or None.
    root: of `page_keys.model_root`. prompt_cache: the pages on disk, with their counters, or None.
    spare: pages of a sequence's own that stand behind those of its positions. companions: whether first pages have one
        (`PagePool`), which stands behind these.
    """

    banner: str

    def __init__(
        self,
        spec: DecoderSpec,
        context: int,
        max_sequences: int,
        page: int,
        page_bytes: int,
        states: RecurrentStates | None,
        root: Key = b"",
        prompt_cache: PageStore | None = None,
        spare: int = 0,
        companions: bool = False,
    ) -> None:
        self.max_sequences, self.vocab_size, self.context = max_sequences, spec.vocabulary, context
        self.spare, self.companions = spare, companions
        self.max_rows = MAX_ROWS
        self._border = max((rope.border for rope in spec.ropes), default=0)
        self._busy = threading.Lock()
        self._page_bytes = page_bytes
        n_pages = max_sequences * (-(-context // page) + spare + companions)
        self.cache_bytes = n_pages * page_bytes
        self.states = states
        self._pool = PagePool(n_pages, page, root, None if states is None else states.pool, companions)
        self._logits = torch.empty(max_sequences, self.vocab_size)
        self._open = 0
        self._claims: dict[Key, PagedSlot] = {}  # pages that slots compute in the next pass, since the last one
        self._asked: dict[PagedSlot, None] = {}  # of a recurrent model: that read on in the next pass, since the last
        self.prompt_cache = prompt_cache

    def _pass(
        self, segments: Sequence[Segment[PagedSlot]], plans: Sequence[Snapshots], wanted: list[int], logits: Tensor
    ) -> None:
        """Computes the tokens of `segments` and takes the snapshots of `plans`; logits [wanted, vocabulary] ← those
        after rows `wanted`, counted over all segments."""
        raise NotImplementedError

    def _page_memory(self, slot: PagedSlot, place: int) -> Any:
        """uint8 [page_bytes], of a page by its place in the slot's table."""
        raise NotImplementedError

    def _parts(self, slot: PagedSlot, place: int, key: Key) -> list[tuple[Key, Any]]:
        """What is on disk of a page, each under its own key: its memory, and that of a first page's companion."""
        parts = [(key, self._page_memory(slot, place))]
        if self.companions and place == 0:
            parts.append((page_key(key, ()), self._page_memory(slot, -1)))
        return parts

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuses a second thread, which would write into the same rows, pages and logits: wrong tokens, or a hang."""
        if not self._busy.acquire(blocking=False):
            raise AmqError("the engine is in use by another thread: one thread at a time may call it (take a lock)")
        try:
            yield
        finally:
            self._busy.release()

    def open(self, prompt: Sequence[int], new_tokens: int, owner: str = "", reuse: bool = True) -> PagedSlot | None:
        if not prompt:
            raise AmqError("a sequence must begin with at least one token")
        with self._alone():
            slot = self._open_slot(prompt, len(prompt) + new_tokens, owner, reuse)
            if slot is not None and slot.state is None:
                self._find_more(slot)
            return slot

    def _open_slot(
        self, prompt: Sequence[int], positions: int, owner: str | None = None, reuse: bool = True
    ) -> PagedSlot | None:
        """A slot of `positions` positions that begins with what memory has of `prompt`; owner: None shares nothing."""
        if not 1 <= positions <= self.context:
            raise AmqError(f"a sequence can have 1 to {self.context} positions, this one wants {positions}")
        if self._open == self.max_sequences:
            return None
        is_long = 0 < self._border < len(prompt)
        if not is_long and 0 < self._border < positions:  # it may come to be long: its pages are written twice then
            owner = None
        if self._border and owner is not None:
            owner = f"{'long' if is_long else 'short'} {owner}"
        table = self._pool.take(prompt, positions + self.spare * self._pool.page, owner, reuse)
        if table is None:
            return None
        self._open += 1
        on_disk = self.prompt_cache is not None and owner is not None
        state = None
        if self.states is not None:
            state = self.states.begin(len(prompt), table.known, owner is not None)
            if table.keys:
                self.states.restore(state, table.keys[-1])
        return PagedSlot(self, table, self._pool.page, on_disk, state, is_long)

    def catch_up(self, slot: PagedSlot) -> bool:
        """See `Slot.catch_up`."""
        with self._alone():
            if not len(slot.pages):
                raise AmqError("this slot is closed already")
            if slot.state is not None:
                return self._catch_up_with_state(slot, slot.state)
            coming = self._find_more(slot)
            return coming is not None and (slot.on_disk or self._claims.setdefault(coming, slot) is not slot)

    def _catch_up_with_state(self, slot: PagedSlot, state: SequenceState) -> bool:
        """As `catch_up`: on from the last snapshot there is; a slot that was asked before takes one where both prompts
        part, and is waited for if it is ahead and not there yet."""
        assert self.states is not None
        if self._pool.jump(slot.table, slot.tokens):
            self._follow(slot)
            self.states.restore(state, slot.table.keys[-1])
        if not self.states.pool.n_kept or self._pool.wanted(slot.table, slot.tokens) is None:
            return False
        for other in self._asked:
            end = other.table.common(slot.table) * self._pool.page
            if other is not slot and slot.length <= other.length < end and other.state is not None:
                other.state.mark(end)
                return True
        self._asked[slot] = None
        return False

    def _follow(self, slot: PagedSlot) -> None:
        """The slot has more pages than it computed."""
        slot.length = len(slot.table.keys) * self._pool.page
        slot.tokens = list(slot.table.prompt[: slot.length])

    def _find_more(self, slot: PagedSlot) -> Key | None:
        """Moves the slot on over pages of its prompt that are in memory, and over READ_BYTES of those on disk; returns
        the key of the page that comes after them, if that may yet be found."""
        pool, read = self._pool, 0
        while (key := pool.wanted(slot.table, slot.tokens)) is not None:
            if not pool.adopt(slot.table, key):
                if read >= READ_BYTES or not self._read_page(slot, key):
                    break
                pool.fill(slot.table, key)
                read += self._page_bytes
        if len(slot.table.keys) * pool.page > slot.length:
            self._follow(slot)
        return key

    def _read_page(self, slot: PagedSlot, key: Key) -> bool:
        """Reads the slot's next page from disk; from the first that is not there, or is begun, the slot computes on."""
        place = len(slot.table.keys)
        if slot.on_disk and self.prompt_cache is not None:
            begun = slot.length > place * self._pool.page
            cache = self.prompt_cache
            slot.on_disk = not begun and all(cache.read(*part) for part in self._parts(slot, place, key))
        return slot.on_disk

    def _computed(self, segments: Sequence[Segment[PagedSlot]], plans: Sequence[Snapshots]) -> None:
        """After a pass: the pages that it filled are there for others, and the snapshots that it took."""
        self._claims.clear()
        self._asked.clear()
        for segment, plan in zip(segments, plans, strict=True):
            slot, begin = segment.slot, segment.slot.length
            slot.tokens.extend(segment.tokens)
            slot.length += len(segment.tokens)
            self._keep_pages(slot, self._pool.computed(slot.table, slot.tokens))
            if self.states is not None and slot.state is not None:
                self.states.keep(slot.state, begin, plan, slot.table.keys)

    def _keep_pages(self, slot: PagedSlot, places: Iterable[int]) -> None:
        if self.prompt_cache is not None:
            for place in places:
                for part in self._parts(slot, place, slot.table.keys[place]):
                    self.prompt_cache.keep(*part)

    def close(self, slot: PagedSlot) -> None:
        with self._alone():
            self._close_slot(slot)

    def _close_slot(self, slot: PagedSlot) -> None:
        if not len(slot.pages):
            raise AmqError("this slot is closed already")
        self._keep_pages(slot, reversed(range(len(slot.table.keys))))  # the first page is used last: it is needed most
        self._claims = {key: claimant for key, claimant in self._claims.items() if claimant is not slot}
        self._asked.pop(slot, None)
        if self.states is not None and slot.state is not None:
            self.states.end(slot.state)
        self._pool.give_back(slot.table)
        slot.capacity = 0
        self._open -= 1

    def shutdown(self) -> None:
        """Ends the writing to the prompt cache, once what waits is written; without one there is nothing to end."""
        if self.prompt_cache is not None:
            self.prompt_cache.close()

    def cached_tokens(self) -> tuple[int, int]:
        more = (self.spare + self.companions) * self.max_sequences
        used = self._pool.used - self.spare * self._open
        return used * self._pool.page, (self._pool.n_pages - more) * self._pool.page

    def forward(self, segments: Sequence[Segment[PagedSlot]]) -> Tensor:
        wanted: list[int] = []
        rows = scored = 0
        for segment in segments:
            last = rows + len(segment.tokens)
            wanted += range(rows, last) if segment.every else [last - 1] if segment.logits else []
            scored += len(segment.tokens) * segment.every
            rows = last
        if scored > MAX_SCORED or len(wanted) - scored > len(self._logits):
            raise AmqError(
                f"logits of {len(wanted) - scored} segments and {scored} single tokens are wanted, the engine has room "
                f"for {len(self._logits)} and {MAX_SCORED}"
            )
        logits = self._logits[: len(wanted)] if not scored else torch.empty(len(wanted), self.vocab_size)
        with self._alone():
            self._run(segments, wanted, logits)
        return logits

    def all_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits after every token of a text, float32 [len(tokens), vocab_size]: for perplexity, and for tests."""
        with self._alone():
            slot = self._open_slot((), len(tokens))
            if slot is None:
                raise AmqError("the engine has no room left: close a slot first")
            slot.is_long = 0 < self._border < len(tokens)
            try:
                logits = torch.empty(len(tokens), self.vocab_size)
                for start in range(0, len(tokens), MAX_ROWS):
                    part = tokens[start : start + MAX_ROWS]
                    self._run([Segment(slot, part)], list(range(len(part))), logits[start : start + len(part)])
            finally:
                self._close_slot(slot)
        return logits

    def _run(self, segments: Sequence[Segment[PagedSlot]], wanted: list[int], logits: Tensor) -> None:
        for segment in segments:
            slot, length = segment.slot, segment.slot.length + len(segment.tokens)
            if length > slot.capacity:
                raise AmqError(f"the sequence has room for {slot.capacity} positions, not for more")
            if not slot.is_long and 0 < self._border < length:
                self._renew(slot)
        plans = [self._plan(segment) for segment in segments]
        try:
            self._pass(segments, plans, wanted, logits)
        except BaseException as error:
            if self.states is not None:
                for plan in plans:
                    self.states.release(plan)
            if isinstance(error, (ValueError, OverflowError)):
                raise AmqError(str(error)) from error
            raise
        self._computed(segments, plans)

    def _plan(self, segment: Segment[PagedSlot]) -> Snapshots:
        slot = segment.slot
        if self.states is None or slot.state is None:
            return []
        return self.states.plan(slot.state, slot.length, len(segment.tokens))

    def _renew(self, slot: PagedSlot) -> None:
        """Computes a sequence anew that becomes a long text: its keys were turned by the angles of a short one."""
        tokens, slot.is_long, slot.length, slot.tokens = slot.tokens, True, 0, []
        for start in range(0, len(tokens), MAX_ROWS):
            self._run([Segment(slot, tokens[start : start + MAX_ROWS])], [], self._logits)


def check_state_cache(spec: DecoderSpec, checkpoint: Checkpoint, state_cache: int | None) -> None:
    if not spec.recurrent and state_cache is not None:
        raise AmqError(
            f"a state cache is for models with recurrent layers, and {checkpoint.folder} is of the type "
            f"{checkpoint.config.get('model_type')}: leave --state-cache out"
        )


def context_of(spec: DecoderSpec, asked: int | None) -> int:
    """Positions of a sequence."""
    if asked is None:
        return min(spec.longest, DEFAULT_CONTEXT)
    if not 1 <= asked <= spec.longest:
        raise AmqError(f"the context must be 1 to {spec.longest}, which the model was made for, got {asked}")
    return asked
