"""Which page of the KV cache belongs to whom, and prefix caching.

A sequence holds pages for all the positions that it may come to, from the start, so that nothing is evicted in
mid-text. A full page is never written again. When its sequence ends, it stays as it is, known by the tokens that
it holds and those before it, until its place is needed: the next message of a conversation computes only what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

Key = tuple[int, ...]
"""(serial number of the page before, or 0; its tokens): pages of equal keys hold equal keys and values."""


class PagePool:
    """Pages 0 … n_pages − 1 of `page` positions each."""

    def __init__(self, n_pages: int, page: int) -> None:
        self.n_pages, self.page = n_pages, page
        self._free = list(range(n_pages - 1, -1, -1))  # low numbers first: memory that was touched is used again
        self._users = [0] * n_pages
        self._keys: dict[int, Key] = {}
        self._known: dict[Key, int] = {}
        self._serials = [0] * n_pages  # of known pages; never used twice, so that a key outlives no page before it
        self._next_serial = count(1)
        self._idle: dict[int, None] = {}  # known pages that no sequence holds, the one that waits longest first

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.n_pages - len(self._free) - len(self._idle)

    def take(self, tokens: Sequence[int], positions: int) -> tuple[list[int], int] | None:
        """Pages for `positions` positions of a sequence that begins with `tokens`, and how many of these are there.

        None where too few pages are free. At least the last token is left to be computed.
        """
        found: list[int] = []
        serial = 0
        for start in range(0, len(tokens) - 1 - (len(tokens) - 1) % self.page, self.page):
            page = self._known.get((serial, *tokens[start : start + self.page]))
            if page is None:
                break
            found.append(page)
            serial = self._serials[page]
        missing = -(-positions // self.page) - len(found)
        if missing > len(self._free) + len(self._idle) - sum(page in self._idle for page in found):
            return None
        for page in found:
            self._users[page] += 1
            self._idle.pop(page, None)
        return found + [self._new_page() for _ in range(missing)], len(found) * self.page

    def _new_page(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page], self._known[self._keys.pop(page)]
        self._users[page] = 1
        return page

    def give_back(self, pages: Sequence[int], tokens: Sequence[int]) -> None:
        """Ends a sequence that computed `tokens`, in `pages`; those that they fill stay known."""
        serial = 0
        for i, page in enumerate(pages):
            self._users[page] -= 1
            content = tuple(tokens[i * self.page : (i + 1) * self.page])
            if len(content) == self.page:
                serial = self._remember(page, (serial, *content))
            if self._users[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _remember(self, page: int, key: Key) -> int:
        """The serial number of the page that is known by `key`: this one, or one that was there before."""
        if key not in self._known:
            self._known[key], self._keys[page] = page, key
            self._serials[page] = next(self._next_serial)
        return self._serials[self._known[key]]
