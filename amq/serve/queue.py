"""The waiting room: bounded, round robin between clients, first come first served within one."""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """client: who asks; every client has a line of its own."""

    client: str


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[W]] = {}  # in the order of their next turns
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, item: W, full: bool) -> W | None:
        """Lets `item` in; returns who has to leave because the room is `full`, perhaps `item` itself.

        Whoever has the longest line loses its newest, so that one busy client does not lock the others out.
        """
        line = self._lines.get(item.client)
        refused = None
        if full:
            longest = max(self._lines.values(), key=len, default=deque())
            if len(longest) <= len(line or ()) + 1:
                return item
            refused = longest.pop()  # it keeps one at least, so the line stays
        if line is None:
            line = self._lines[item.client] = deque()
        line.append(item)
        self._length += refused is None
        return refused

    def pop(self) -> W | None:
        """The next, of the client whose turn it is; None when nobody waits."""
        if not self._lines:
            return None
        client = next(iter(self._lines))
        line = self._lines.pop(client)
        item = line.popleft()
        self._length -= 1
        if line:
            self._lines[client] = line  # to the end
        return item

    def remove(self, item: W) -> bool:
        """Whether it waited here."""
        line = self._lines.get(item.client, deque())
        if item not in line:
            return False
        line.remove(item)
        self._length -= 1
        if not line:
            del self._lines[item.client]
        return True

    def clear(self) -> list[W]:
        """Empties the room; returns who was there."""
        everyone = [item for line in self._lines.values() for item in line]
        self._lines.clear()
        self._length = 0
        return everyone
