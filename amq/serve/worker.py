"""The one thread that owns engine and scheduler, and the jobs that pass between it and the event loop.

The event loop submits and cancels under a lock; the thread takes jobs from the fair queue when a slot is free, steps
the scheduler, and hands over what its steps made with one `call_soon_threadsafe`, however many requests they served.
With nothing to do it sleeps on a condition. What is below "in the thread" runs there, everything else on the event
loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from amq.errors import AmqError
from amq.runtime.sampling import Constraint
from amq.runtime.scheduler import Piece, Request, Scheduler
from amq.runtime.settings import Sampling
from amq.serve.errors import ApiError
from amq.serve.metrics import Metrics
from amq.serve.queue import FairQueue
from amq.serve.settings import ServeSettings
from amq.serve.visits import Visit
from amq.serve.watchdog import Watchdog

if TYPE_CHECKING:
    from amq.runtime.loading import Runtime

log = logging.getLogger("amq.serve")

BUFFERED_PIECES = 1024
"""Pieces that a stream may lag behind; `write_timeout` seconds above it end the request."""

RETRY_SECONDS = (1, 120)
POSITIONS_SECONDS = 0.1
"""How often the use of the KV cache is looked at; a scrape sees no more."""

FLUSH_SECONDS = 0.03
"""Tokens are handed over at most so often, but first and last ones at once: waking the event loop for each of 400
tokens per second takes a fifth of the processors' time from the engine, and nobody reads 30 times a second."""

STOP_SECONDS = 10.0
"""How long the end of the server waits for the pass that is running."""

FAILED_PASSES = 10
"""So many passes that fail one after another are an engine that has failed: such as a GPU after a fault of its own."""

RESTART_SECONDS = 10
"""When to come back to a server whose engine has failed: a supervisor starts it again."""


class Job:
    """A request from the time it is accepted until its last piece. Times are of time.perf_counter."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        visit: Visit,
        constraint: Constraint | None = None,
    ) -> None:
        self.prompt, self.sampling, self.visit, self.constraint = prompt, sampling, visit, constraint
        self.client = visit.client
        self.request: Request = None  # type: ignore[assignment]  # the worker makes it
        self.started = self.first = self.last = 0.0  # got a slot; its first and latest token
        self.finished: str | None = None  # as Piece.finished, once nothing more will come
        self.failure: ApiError | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.lagging = 0.0  # since when too many pieces wait to be sent
        self.refused: ApiError | None = None  # why the scheduler did not take it
        self._pieces: list[Piece] = []
        self._reader: asyncio.Future[None] | None = None

    def add(self, piece: Piece) -> int:
        """Returns how many pieces wait to be sent."""
        self._pieces.append(piece)
        self.wake()
        return len(self._pieces)

    def wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def pieces(self) -> list[Piece]:
        """All that came since the last call, at least one. Raises the ApiError that ended the request."""
        while not self._pieces and self.failure is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self.failure is not None:
            raise self.failure
        pieces, self._pieces = self._pieces, []
        return pieces


class EngineThread:
    """Runs jobs. `start` and `stop` it on the event loop that uses it."""

    def __init__(self, runtime: Runtime, settings: ServeSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = runtime.engine, settings, metrics
        self.draining = False
        self.failed = ""  # why the engine is of no more use
        self.positions = self.engine.cached_tokens()  # of the KV cache, used and total, after the latest pass
        self._scheduler = Scheduler(runtime.engine, runtime.tokenizer)
        self._wake = threading.Condition()
        self._waiting: FairQueue[Job] = FairQueue()
        self._leaving: list[Job] = []
        self._stopping = False
        self._live: set[Job] = set()
        self._seconds = 1.0  # that a request held its slot, recently
        self._inside: set[Job] = set()  # what the scheduler has; the thread's
        self._arrivals: list[tuple[Job, Piece, float]] = []  # since they were handed over; the thread's
        self._urgent = False  # whether a first or a last one is among them; the thread's
        self._looked = 0.0  # when `positions` was read
        self._flushed = 0.0  # when arrivals were handed over
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pass = 0  # the number of the one that runs, from 1; 0 while the thread sleeps
        self._thread = threading.Thread(target=self._run, name="amq-engine", daemon=True)
        self._watchdog = Watchdog(lambda: self._pass, settings.stall, self.fail)
        self._declare(metrics)

    def _declare(self, metrics: Metrics) -> None:
        gauge = metrics.gauge
        gauge("vllm:num_requests_waiting", "Requests that wait for a slot", lambda: len(self._waiting))
        gauge("vllm:num_requests_running", "Requests that hold one", lambda: len(self._live) - len(self._waiting))
        gauge("vllm:kv_cache_usage_perc", "Of the KV cache, from 0 to 1", lambda: self.positions[0] / self.positions[1])
        gauge("amq_kv_positions_used", "Positions of the KV cache in use", lambda: self.positions[0])
        gauge("amq_kv_positions_total", "Positions of the KV cache", lambda: self.positions[1])
        if (store := getattr(self.engine, "prompt_cache", None)) is not None:
            metrics.prompt_cache(store)
        if (states := getattr(self.engine, "states", None)) is not None:
            metrics.snapshots(states.pool)
        gauge("amq_engine_failed", "1 once the engine is of no more use", lambda: bool(self.failed))

    # on the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watchdog.start()

    async def stop(self) -> None:
        """Ends what still runs, and the thread."""
        self.drain()
        self.abort()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._watchdog.stop()
        if not self.failed:  # else it may never end
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    @property
    def idle(self) -> bool:
        return not self._live

    @property
    def alive(self) -> bool:
        """Whether the thread runs, or hangs."""
        return self._thread.is_alive()

    def admit(self) -> None:
        """Raises ApiError 503 while draining, and when the engine has failed."""
        if self.failed:
            text = "the engine of this server has failed: it answers nothing until it is started again"
            raise ApiError(503, text, "engine_failure", None, RESTART_SECONDS)
        if self.draining:
            raise _draining()

    def fail(self, reason: str) -> None:
        """From now on nothing is accepted, and who waits or runs is told at once. `Server` ends the process."""
        if self.failed:
            return
        self.failed = reason
        log.critical("the engine has failed: %s; all requests are ended, and the server with them", reason)
        with self._wake:
            self._stopping = True
            self._waiting.clear()
            self._wake.notify()
        for job in list(self._live):
            self._end(job, "error", _failed())

    def submit(self, job: Job) -> None:
        """Queues a job. Raises ApiError 429 when too many wait, 503 while draining."""
        self.admit()
        job.request = Request(job.prompt, job.sampling, partial(self._arrived, job), job.visit.owner, job.constraint)
        job.visit.jobs.append(job)
        full = len(self._live) >= self.settings.queue + self.engine.max_sequences
        with self._wake:
            refused = self._waiting.push(job, full)
            self._wake.notify()
        if refused is job:
            raise self.full()
        if refused is not None:
            self._end(refused, "error", self.full())
        self._live.add(job)
        left = self.settings.timeout - (time.perf_counter() - job.visit.created)
        job.timer = asyncio.get_running_loop().call_later(left, self.cancel, job, "timeout", self._late())

    def cancel(self, job: Job, reason: str, failure: ApiError | None = None) -> None:
        """Ends a job, waiting or running; nothing happens if it has ended."""
        if job.finished is not None:
            return
        self.metrics.cancelled.labels(reason).inc()
        self._end(job, "cancelled", failure)
        with self._wake:
            if not self._waiting.remove(job):
                self._leaving.append(job)
                self._wake.notify()

    def drain(self) -> None:
        """From now on nothing is accepted; who waits is sent away, who runs goes on."""
        self.draining = True
        with self._wake:
            waiting = self._waiting.clear()
        for job in waiting:
            self.metrics.cancelled.labels("drain").inc()
            self._end(job, "cancelled", _draining())

    def abort(self) -> None:
        """Ends what runs."""
        for job in list(self._live):
            self.cancel(job, "drain", _draining())

    def _end(self, job: Job, finished: str, failure: ApiError | None = None) -> None:
        job.finished, job.failure = finished, failure
        self.metrics.ended(job, finished, time.perf_counter())
        self._live.discard(job)
        if job.timer is not None:
            job.timer.cancel()
        job.wake()

    def full(self) -> ApiError:
        """The answer to one request too many; when to come back is estimated from how long requests took lately."""
        self.metrics.rejected.inc()
        rounds = (len(self._waiting) + 1) / self.engine.max_sequences
        seconds = min(max(math.ceil(self._seconds * rounds), RETRY_SECONDS[0]), RETRY_SECONDS[1])
        return ApiError(429, "too many requests are waiting: try again later", "rate_limit_exceeded", None, seconds)

    def _late(self) -> ApiError:
        return ApiError(504, f"the request took longer than {self.settings.timeout:g} s", "timeout")

    def _deliver(self, arrivals: list[tuple[Job, Piece, float]]) -> None:
        """What passes of the engine made."""
        tokens = 0
        for job, piece, now in arrivals:
            if job.finished is not None:
                continue  # it was cancelled meanwhile
            if piece.choices or piece.finished in ("stop", "length"):
                self._time(job, len(piece.choices), now)
                tokens += len(piece.choices)
            if piece.finished in ("error", "cancelled"):
                log.error("request %s failed: %s", job.visit.id, job.refused or job.request.error or piece.finished)
                self._end(job, "error", job.refused or _failed(job))
                continue
            waiting = job.add(piece)
            if piece.finished is not None:
                held = now - job.started
                self._seconds += 0.2 * (held - self._seconds)
                self._end(job, piece.finished)
            elif waiting <= BUFFERED_PIECES:
                job.lagging = 0.0
            elif not job.lagging:
                job.lagging = now
            elif now - job.lagging > self.settings.write_timeout:
                self.cancel(job, "slow_reader", ApiError(504, "the answer was not read fast enough", "slow_reader"))
        if tokens:
            self.metrics.new_tokens.inc(tokens)
            self.metrics.speed.add(tokens, arrivals[-1][2])

    def _time(self, job: Job, tokens: int, now: float) -> None:
        metrics = self.metrics
        if not job.first:
            job.first = now
            metrics.first_token.observe(now - job.visit.created)
            metrics.begun(job)
        elif tokens:
            metrics.between_tokens.observe(now - job.last)
        job.last = now

    # in the thread

    def _run(self) -> None:
        moving, passes = False, 0
        try:
            while True:
                with self._wake:
                    self._pass = 0
                    admitted = self._next()
                    while not (self._stopping or self._leaving or admitted or moving):
                        self._wake.wait()
                        admitted = self._next()
                    if self._stopping:
                        break
                    leaving, self._leaving = self._leaving, []
                passes += 1
                self._pass = passes
                for job in leaving:
                    self._scheduler.cancel(job.request)
                for job in admitted:
                    self._enter(job)
                moving = self._step()
                self._hand_over(moving)
            if not self.failed and (shutdown := getattr(self.engine, "shutdown", None)):
                shutdown()
        except BaseException as error:  # noqa: BLE001 (SystemExit too: nothing else would tell that the thread is gone)
            log.critical("the engine's thread ended", exc_info=True)
            self._on_loop(self.fail, f"its thread ended ({type(error).__name__})")

    def _arrived(self, job: Job, piece: Piece) -> None:
        """The scheduler's listener."""
        self._arrivals.append((job, piece, time.perf_counter()))
        if piece.finished is not None:
            self._inside.discard(job)
            self._urgent = True
        elif job.request.new_tokens == 1:
            self._urgent = True

    def _next(self) -> list[Job]:
        """Jobs for the free slots; none while the scheduler itself has one waiting for room in the KV cache."""
        if not len(self._waiting) or self._scheduler.waiting:
            return []
        free = self.engine.max_sequences - self._scheduler.running
        taken = (self._waiting.pop() for _ in range(min(free, len(self._waiting))))
        return [job for job in taken if job is not None]

    def _enter(self, job: Job) -> None:
        job.started = time.perf_counter()
        try:
            self._scheduler.submit(job.request)
        except AmqError as error:
            job.refused = ApiError(400, str(error), "invalid_value")
            job.request.listener(Piece("", (), "error"))
        else:
            self._inside.add(job)

    def _step(self) -> bool:
        try:
            moving = self._scheduler.step()
        except Exception:
            log.exception("a pass of the engine failed: the requests in it are ended")
            for job in list(self._inside):
                self._scheduler.cancel(job.request)
            return True
        if self._scheduler.failed_passes == FAILED_PASSES:
            self._on_loop(self.fail, f"its last {FAILED_PASSES} passes failed")
        return moving

    def _hand_over(self, moving: bool) -> None:
        now = time.perf_counter()
        if self._urgent or now - self._looked > POSITIONS_SECONDS:
            self.positions, self._looked = self.engine.cached_tokens(), now
        if self._arrivals and (self._urgent or not moving or now - self._flushed > FLUSH_SECONDS):
            arrivals, self._arrivals = self._arrivals, []
            self._urgent, self._flushed = False, now
            self._on_loop(self._deliver, arrivals)

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None  # `start` set it before it started the thread
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():  # after the end there is nobody to tell
                raise


def _draining() -> ApiError:
    return ApiError(503, "the server is shutting down: try again later", "draining", None, RETRY_SECONDS[0])


def _failed(job: Job | None = None) -> ApiError:
    """What is wrong with the text of `job` alone, its client is told."""
    why = f": {job.request.error}" if job is not None and job.request.own_error else ""
    return ApiError(500, f"the model failed on this request{why}", "engine_failure")
