"""Bodies of requests while they arrive: their memory, all clients together, is bounded."""

from __future__ import annotations

from collections import Counter

import anyio


class Upload:
    """A body that arrives. client: whose. size: bytes so far, in `parts`.

    scope: of the task that waits for more; cancelled when the upload has to end.
    """

    def __init__(self, client: str) -> None:
        self.client, self.size = client, 0
        self.parts: list[bytes] = []
        self.scope = anyio.CancelScope()

    @property
    def ended(self) -> bool:
        return self.scope.cancel_called

    def add(self, part: bytes) -> None:
        self.parts.append(part)
        self.size += len(part)


class Uploads:
    """At most `limit` bytes of them together: above it the oldest of the client that has most is ended.

    size: bytes of all together.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._open: dict[Upload, None] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._open)

    def add(self, upload: Upload, part: bytes) -> None:
        """Keeps the part, unless its upload has ended."""
        if upload.ended:
            return
        self._open[upload] = None
        upload.add(part)
        self.size += len(part)
        while self.size > self.limit:
            sizes: Counter[str] = Counter()
            for other in self._open:
                sizes[other.client] += other.size
            most = max(sizes, key=sizes.__getitem__)
            oldest = next(other for other in self._open if other.client == most)
            self.remove(oldest)
            oldest.parts.clear()
            oldest.scope.cancel()

    def remove(self, upload: Upload) -> None:
        """It is complete, or has ended."""
        if upload in self._open:
            del self._open[upload]
            self.size -= upload.size
