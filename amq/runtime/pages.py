"""Which page of the KV cache belongs to whom, and prefix caching.

A sequence holds pages for all the positions that it may come to, from the start, so that nothing is evicted in
mid-text. A full page is never written again, so it is known by its key (amq.runtime.page_keys) from the moment it is
full: another sequence of the same owner that begins with the same tokens holds it too, beside the one that computed
it. When nobody holds it any more it stays as it is until its place is needed.

The first page of a sequence may have a companion, which holds a part of it (csrc/cpu/vector.h): the two are held,
found and evicted as one.

A sequence with a recurrent state beside its pages can go on only behind a page whose snapshot is kept too
(amq.runtime.state_pool), and a snapshot goes with its page.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from amq.runtime.page_keys import Key, owner_root, page_key, page_keys
from amq.runtime.state_pool import StatePool


class PageTable:
    """The pages of one sequence; made by `PagePool.take`.

    pages: int32, their numbers in the order of positions, and last the first one's companion where the pool has such;
        none once they are given back.
    root: what stands before the first page's key; None where the sequence shares its pages with nobody.
    prompt: what it may find computed, without the last token, which is always left to be computed; ahead: the keys of
        the full pages of that.
    keys: of the sequence's own full pages, as far as they are computed or found.
    known: how many pages of `ahead` were there when the sequence was begun, whether it could go on behind them or not.
    """

    def __init__(self, pages: Sequence[int], root: Key | None, prompt: Sequence[int], ahead: list[Key]) -> None:
        self.pages, self.root, self.prompt, self.ahead = np.array(pages, np.int32), root, prompt, ahead
        self.keys: list[Key] = []
        self.known = 0

    def common(self, other: PageTable) -> int:
        """Full pages that the prompts of both begin with."""
        pairs = zip(self.ahead, other.ahead, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class PagePool:
    """Pages 0 … n_pages − 1 of `page` positions each.

    root: of `page_keys.model_root`, where keys outlive this pool. snapshots: without which no sequence goes on behind a
    page; None for a model without recurrent state. companions: whether first pages have one.
    """

    def __init__(
        self, n_pages: int, page: int, root: Key = b"", snapshots: StatePool | None = None, companions: bool = False
    ) -> None:
        self.n_pages, self.page, self._root, self._snapshots = n_pages, page, root, snapshots
        self._has_companions = companions
        self._companions: dict[int, int] = {}  # of first pages that are not free
        self._free = list(range(n_pages - 1, -1, -1))  # low numbers first: memory that was touched is used again
        self._users = [0] * n_pages
        self._keys: dict[int, Key] = {}
        self._known: dict[Key, int] = {}
        self._idle: dict[int, None] = {}  # known pages that no sequence holds, the one that waits longest first

    @property
    def used(self) -> int:
        """Pages that sequences hold, without companions."""
        return self.n_pages - len(self._free) - len(self._idle) - len(self._companions)

    def _available(self, without: Sequence[int]) -> int:
        """Pages that are free, or would be if all idle ones but `without` were evicted."""
        lost = sum((page in self._idle) * (1 + (page in self._companions)) for page in without)
        return len(self._free) + len(self._idle) + len(self._companions.keys() & self._idle.keys()) - lost

    def take(
        self, tokens: Sequence[int], positions: int, owner: str | None = "", reuse: bool = True
    ) -> PageTable | None:
        """Pages for `positions` positions of a sequence that begins with `tokens`; None where too few are free.

        `keys` of the result are those of the pages that are there already, which only sequences of the same owner have
        made. owner: None shares nothing. reuse: False finds nothing, but is found by others.
        """
        root = None if owner is None else owner_root(self._root, owner)
        prompt = tokens[:-1] if reuse and root is not None else tokens[:0]
        ahead = [] if root is None else list(page_keys(root, prompt, self.page))
        known = list(takewhile(self._known.__contains__, ahead))
        keys = self._up_to_snapshot(known)
        found = [self._known[key] for key in keys]
        missing = -(-positions // self.page) - len(found)
        if missing + (self._has_companions and not found) > self._available(found):
            return None
        for page in found:
            self._hold(page)
        pages = found + [self._new_page() for _ in range(missing)]
        if self._has_companions:
            if not found:
                self._companions[pages[0]] = self._new_page()
            pages.append(self._companions[pages[0]])
        table = PageTable(pages, root, prompt, ahead)
        table.keys, table.known = keys, len(known)
        return table

    def _up_to_snapshot(self, keys: Sequence[Key]) -> list[Key]:
        """Those keys without the last ones that a sequence cannot go on behind."""
        count = len(keys)
        while count and self._snapshots is not None and keys[count - 1] not in self._snapshots:
            count -= 1
        return list(keys[:count])

    def wanted(self, table: PageTable, tokens: Sequence[int]) -> Key | None:
        """The key of the page that comes next in a sequence that has computed `tokens`, where it may be found: None
        where the prompt has no more full pages, or the tokens are not the prompt's."""
        done = len(table.keys)
        if done >= len(table.ahead) or (done and table.keys[-1] != table.ahead[done - 1]):
            return None
        started = tokens[done * self.page :]
        return table.ahead[done] if list(table.prompt[done * self.page :][: len(started)]) == list(started) else None

    def adopt(self, table: PageTable, key: Key) -> bool:
        """Gives a sequence the page of `key`, which is its next, in place of its own; returns whether it is known."""
        page, place = self._known.get(key), len(table.keys)
        if page is None:
            return False
        own = int(table.pages[place])
        if own != page:
            self._hold(page)
            table.pages[place] = page
            if self._has_companions and place == 0:
                table.pages[-1] = self._companions[page]
            self._drop(own)
        table.keys.append(key)
        return True

    def jump(self, table: PageTable, tokens: Sequence[int]) -> bool:
        """Gives a sequence that has computed `tokens` all that is known of its prompt by now, as far as it can go on
        from there; returns whether that is more than it had."""
        if self.wanted(table, tokens) is None:
            return False
        done = len(table.keys)
        keys = self._up_to_snapshot(list(takewhile(self._known.__contains__, table.ahead)))
        for key in keys[done:]:
            self.adopt(table, key)
        return len(keys) > done

    def fill(self, table: PageTable, key: Key) -> None:
        """The sequence's next page has the content of `key` from now on."""
        if not self.adopt(table, key):  # else another sequence has computed the same beside this one: one is enough
            page = int(table.pages[len(table.keys)])
            self._known[key], self._keys[page] = page, key
            table.keys.append(key)

    def computed(self, table: PageTable, tokens: Sequence[int]) -> range:
        """The sequence has computed `tokens`; returns the places in its table that became full."""
        done = len(table.keys)
        if table.root is None:
            return range(0)
        for start in range(done * self.page, len(tokens) - self.page + 1, self.page):
            before = table.keys[-1] if table.keys else table.root
            self.fill(table, page_key(before, tokens[start : start + self.page]))
        return range(done, len(table.keys))

    def give_back(self, table: PageTable) -> None:
        """Ends a sequence. What it shares is evicted from its end on: a page is found only through those before it."""
        pages = table.pages.tolist()
        for page in reversed(pages[:-1] if self._has_companions else pages):
            self._drop(page)
        table.pages = table.pages[:0]

    def _hold(self, page: int) -> None:
        self._users[page] += 1
        self._idle.pop(page, None)

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page]:
            return
        if page in self._keys:
            self._idle[page] = None
        else:
            self._free.append(page)
            self._free_companion(page)

    def _free_companion(self, page: int) -> None:
        if (companion := self._companions.pop(page, None)) is not None:
            self._users[companion] = 0
            self._free.append(companion)

    def _new_page(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            key = self._keys.pop(page)
            del self._idle[page], self._known[key]
            self._free_companion(page)
            if self._snapshots is not None:
                self._snapshots.drop(key)
        self._users[page] = 1
        return page
