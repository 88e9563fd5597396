"""A step that no CUDA graph can hold leaves stream, allocator and random numbers as they were.

No GPU: torch.cuda is stood in for by objects that keep its books as torch's C++ does (2.11 and 2.12 differ in what a
capture that CUDA calls invalid leaves behind).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers.tiny_models import tiny_llama

from amq.runtime.cuda_graphs import Step, cuda_graph
from amq.runtime.torch_engine import TorchEngine
from amq.runtime.torch_static import Store

POOL = (1, 0)


class Generator:
    """A device's random numbers; `capturing`: every draw outside of a capture is refused."""

    def __init__(self) -> None:
        self.capturing = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, state: Generator) -> None:
        self.capturing = state.capturing


class Cuda:
    """The books: the current stream, the pool that allocations go to, who holds the pool.

    early: whether the end of an invalid capture tells the allocator before it raises (torch 2.12).
    """

    def __init__(self, early: bool) -> None:
        self.early, self.stream, self.recording, self.holders = early, "main", False, 0
        self.capturing = self.invalid = False
        self.generator = Generator()
        self.sync_mode, self.begun = 1, 0

    @contextmanager
    def on(self, stream: object) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def synchronizing(self) -> None:
        """What an operation that waits for the GPU does before it starts."""
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")

    def set_sync_mode(self, mode: int | str) -> None:
        self.sync_mode = ("default", "warn", "error").index(mode) if isinstance(mode, str) else mode

    def end_allocate(self, index: int, pool: tuple[int, int]) -> None:
        if not self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording = False

    def release(self, index: int, pool: tuple[int, int]) -> None:
        assert self.holders > 0
        self.holders -= 1


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.ended = cuda, False

    def capture_begin(self, pool: tuple[int, int]) -> None:
        cuda = self.cuda
        cuda.capturing = cuda.recording = cuda.generator.capturing = True
        cuda.holders += 1
        cuda.begun += 1

    def capture_end(self) -> None:
        cuda, was = self.cuda, self.cuda.capturing
        cuda.capturing = False
        if cuda.invalid or not was:
            if cuda.early and cuda.recording:
                cuda.recording = False
            raise RuntimeError("operation failed due to a previous error during capture")
        cuda.recording = cuda.generator.capturing = False
        self.ended = True

    def reset(self) -> None:
        if self.ended:
            self.cuda.holders -= 1

    def replay(self) -> None:
        assert self.ended


@pytest.fixture(params=(False, True), ids=("torch 2.11", "torch 2.12"))
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda(request.param)
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    main = stream()
    cuda.stream = main
    fakes = {
        "graph_pool_handle": lambda: POOL, "CUDAGraph": lambda: Graph(cuda), "Stream": stream, "stream": cuda.on,
        "current_stream": lambda: cuda.stream, "current_device": lambda: 0, "device": lambda _: nullcontext(),
        "synchronize": lambda _: None, "empty_cache": lambda: None, "default_generators": (cuda.generator,),
        "get_sync_debug_mode": lambda: cuda.sync_mode, "set_sync_debug_mode": cuda.set_sync_mode,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release, raising=False)
    return cuda


def step_that(cuda: Cuda, error: Exception | None, invalid: bool):
    """A step that raises while it is captured."""

    def step() -> torch.Tensor:
        if cuda.capturing:
            cuda.invalid = invalid
            if error is not None:
                raise error
        return torch.zeros(1)

    return step


@pytest.mark.parametrize(
    "error, invalid",
    (
        (RuntimeError("operation not permitted when stream is capturing"), True),
        (RuntimeError("of Python"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (None, True),  # the end itself finds out
    ),
)
def test_a_failed_capture_leaves_everything_as_it_was(cuda: Cuda, error: Exception | None, invalid: bool) -> None:
    main, capture = cuda.stream, cuda_graph(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=str(error or "previous error")):
        capture(step_that(cuda, error, invalid))
    assert cuda.stream is main and not cuda.recording and not cuda.capturing
    assert cuda.holders == 0 and not cuda.generator.capturing and cuda.sync_mode == 1


def test_a_failed_second_capture_leaves_the_pool_to_the_first(cuda: Cuda) -> None:
    capture = cuda_graph(torch.device("cuda", 0))
    replay = capture(step_that(cuda, None, False))
    with pytest.raises(RuntimeError):
        capture(step_that(cuda, RuntimeError("no"), True))
    assert callable(replay) and cuda.holders >= 1 and not cuda.recording


def test_a_graph_keeps_what_its_step_refers_to(cuda: Cuda) -> None:
    """It writes into the scratch memory of its calls, which nobody but the step may hold."""

    def step_with_scratch() -> tuple[Step, weakref.ref[torch.Tensor]]:
        scratch = torch.zeros(4)
        return lambda: scratch.sum(), weakref.ref(scratch)

    step, scratch = step_with_scratch()
    replay = cuda_graph(torch.device("cuda", 0))(step)
    del step
    gc.collect()
    assert scratch() is not None and float(replay()) == 0
    del replay
    gc.collect()
    assert scratch() is None


def test_a_step_that_waits_for_the_gpu_is_refused_by_name_before_any_capture(cuda: Cuda) -> None:
    def step() -> torch.Tensor:
        cuda.synchronizing()  # this line is named
        return torch.zeros(1)

    main = cuda.stream
    with pytest.raises(RuntimeError, match=r"waits for the GPU \(test_graph_capture.py, line \d+: ") as caught:
        cuda_graph(torch.device("cuda", 0))(step)
    assert "called a synchronizing" in str(caught.value.__cause__)
    assert cuda.begun == cuda.holders == 0 and cuda.stream is main and cuda.sync_mode == 1


def test_the_mode_comes_back_after_any_error_and_after_none(cuda: Cuda) -> None:
    def broken() -> torch.Tensor:
        assert cuda.sync_mode == 2
        raise RuntimeError("of the model")

    capture = cuda_graph(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="^of the model$"):
        capture(broken)
    assert cuda.begun == 0 and cuda.sync_mode == 1
    modes = []
    capture(lambda: modes.append(cuda.sync_mode) or torch.zeros(1))
    assert modes == [2, 1]  # what is captured runs in the mode of the process
    assert cuda.begun == 1 and cuda.sync_mode == 1


def test_what_cannot_be_captured_holds_no_cache() -> None:
    """On any device: the static caches of the places go when their steps cannot be captured."""

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    engine = TorchEngine(tiny_llama(), context=64, capture=refuse)
    assert "no CUDA graphs (operation not permitted when stream is capturing)" in engine.banner
    assert not [o for o in gc.get_objects() if isinstance(o, Store) and o.allocated()]
