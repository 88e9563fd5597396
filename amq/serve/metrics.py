"""What Prometheus reads at /metrics. The registry is the app's own: two apps in a process do not mix."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.1, 0.15, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
SPEED_WINDOW = 5.0


class Speed:
    """Tokens per second over the last few seconds; one entry per tenth of a second, however fast tokens come."""

    def __init__(self, window: float = SPEED_WINDOW) -> None:
        self._window = window
        self._counts: deque[list[float]] = deque()  # [start of the tenth, tokens]

    def add(self, tokens: int, now: float) -> None:
        if self._counts and now - self._counts[-1][0] < 0.1:
            self._counts[-1][1] += tokens
            return
        self._forget(now)
        self._counts.append([now, tokens])

    def __call__(self) -> float:
        self._forget(time.perf_counter())
        return sum(tokens for _, tokens in self._counts) / self._window

    def _forget(self, now: float) -> None:
        while self._counts and self._counts[0][0] < now - self._window:
            self._counts.popleft()


class Metrics:
    """Written from the event loop only."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("amq_requests", "Answered requests", ["endpoint", "status"], registry=registry)
        self.rejected = Counter("amq_rejected", "Requests refused because the queue was full", registry=registry)
        self.cancelled = Counter("amq_cancelled", "Requests that ended early", ["reason"], registry=registry)
        self.prompt_tokens = Counter("amq_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter(
            "amq_cached_prompt_tokens", "Tokens of prompts that an earlier request had computed", registry=registry
        )
        self.new_tokens = Counter("amq_completion_tokens", "Generated tokens", registry=registry)
        self.first_token = Histogram(
            "amq_time_to_first_token_seconds", "From the request to its first token", buckets=SECONDS, registry=registry
        )
        self.between_tokens = Histogram(
            "amq_inter_token_seconds", "From one token of a request to its next", buckets=SECONDS, registry=registry
        )
        self.speed = Speed()
        self.gauge("amq_tokens_per_second", f"Generated tokens, over the last {SPEED_WINDOW:.0f} s", self.speed)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
