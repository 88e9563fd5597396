"""What Prometheus reads at /metrics. The registry is the app's own: two apps in a process do not mix.

What vLLM has too has its name, its labels and its meaning (docs.vllm.ai, "Production Metrics", v0.11 and later), so
that dashboards made for it fit; the rest begins with amq_.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from amq.serve.worker import Job

SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.1, 0.15, 0.25),
    *(0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
SPEED_WINDOW = 5.0
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""How a job ended, in vLLM's words."""


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


class PromptCache(Protocol):
    """Counters of the pages that an engine keeps on disk (amq.runtime.page_store)."""

    hits: int
    misses: int
    written: int
    dropped: int
    bytes: int


class _PromptCacheCollector:
    def __init__(self, store: PromptCache) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        pages = CounterMetricFamily("amq_prompt_cache_pages", "Pages of the prompt cache on disk", labels=["event"])
        for event in ("hits", "misses", "written", "dropped"):
            pages.add_metric([event], getattr(self._store, event))
        yield pages
        yield GaugeMetricFamily("amq_prompt_cache_bytes", "Size of the prompt cache on disk", self._store.bytes)


class Snapshots(Protocol):
    """Counters of the recurrent states that an engine keeps (amq.runtime.state_pool)."""

    taken: int
    found: int
    dropped: int
    n_kept: int

    @property
    def kept(self) -> int: ...


class _SnapshotCollector:
    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        text = "Snapshots of recurrent states from which conversations go on"
        events = CounterMetricFamily("amq_state_snapshots", text, labels=["event"])
        for event in ("taken", "found", "dropped"):
            events.add_metric([event], getattr(self._snapshots, event))
        yield events
        yield GaugeMetricFamily("amq_state_snapshots_kept", "Those that are there", self._snapshots.kept)
        yield GaugeMetricFamily("amq_state_snapshots_room", "Those that there is room for", self._snapshots.n_kept)


class Metrics:
    """Written from the event loop only. model: what clients call it; vLLM's label model_name."""

    def __init__(self, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self.requests = Counter("amq_requests", "Answered requests", ["endpoint", "status"], registry=registry)
        self.rejected = Counter("amq_rejected", "Requests refused because the queue was full", registry=registry)
        self.cancelled = Counter("amq_cancelled", "Requests that ended early", ["reason"], registry=registry)
        self.connections_closed = Counter(
            "amq_connections_closed", "Connections that the server ended", ["reason"], registry=registry
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self.new_tokens = self._counter("generation_tokens", "Generated tokens")
        self.prefix_queries = self._counter("prefix_cache_queries", "Tokens of prompts that were looked for")
        self.prefix_hits = self._counter("prefix_cache_hits", "Tokens of prompts that an earlier request had computed")
        self.first_token = self._histogram("time_to_first_token_seconds", "From the request to its first token")
        self.between_tokens = self._histogram("inter_token_latency_seconds", "From a token of a request to its next")
        self.per_token = self._histogram("request_time_per_output_token_seconds", "Mean of a request's tokens")
        self.whole = self._histogram("e2e_request_latency_seconds", "From the request to its last token")
        self.waited = self._histogram("request_queue_time_seconds", "From the request to its slot")
        self.inside = self._histogram("request_inference_time_seconds", "From the slot to the last token")
        self.reading = self._histogram("request_prefill_time_seconds", "From the slot to the first token")
        self.writing = self._histogram("request_decode_time_seconds", "From the first token to the last")
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a request's prompt", TOKENS)
        self.new_length = self._histogram("request_generation_tokens", "Tokens of a request's answer", TOKENS)
        self._ended = Counter(
            "vllm:request_success", "Requests that ended", [*self._labels, "finished_reason"], registry=registry
        )
        for reason in REASONS.values():
            self._ended.labels(**self._labels, finished_reason=reason)  # they are there, at 0, before the first
        self.speed = Speed()
        self.gauge("amq_tokens_per_second", f"Generated tokens, over the last {SPEED_WINDOW:.0f} s", self.speed)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, [*self._labels], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        made = Histogram(f"vllm:{name}", text, [*self._labels], buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for; one of vLLM's names gets its labels."""
        if name.startswith("vllm:"):
            Gauge(name, text, [*self._labels], registry=self.registry).labels(**self._labels).set_function(value)
        else:
            Gauge(name, text, registry=self.registry).set_function(value)

    def prompt_cache(self, store: PromptCache) -> None:
        """What is kept on disk: read when it is asked for."""
        self.registry.register(_PromptCacheCollector(store))

    def snapshots(self, snapshots: Snapshots) -> None:
        """What is kept of recurrent states: read when it is asked for."""
        self.registry.register(_SnapshotCollector(snapshots))

    def begun(self, job: Job) -> None:
        """A job's prompt has been read."""
        self.prompt_tokens.inc(len(job.prompt))
        self.prefix_queries.inc(len(job.prompt))
        self.prefix_hits.inc(job.request.cached_tokens)
        self.prompt_length.observe(len(job.prompt))

    def ended(self, job: Job, finished: str, now: float) -> None:
        """A job has ended; times of what it never reached are left out."""
        self._ended.labels(**self._labels, finished_reason=REASONS[finished]).inc()
        self.whole.observe(now - job.visit.created)
        if not job.started:
            return
        self.waited.observe(job.started - job.visit.created)
        if not job.first:
            return
        tokens = job.request.new_tokens
        self.inside.observe(job.last - job.started)
        self.reading.observe(job.first - job.started)
        self.writing.observe(job.last - job.first)
        self.new_length.observe(tokens)
        if tokens > 1:
            self.per_token.observe((job.last - job.first) / (tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
