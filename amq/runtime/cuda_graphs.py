"""A decode step as a CUDA graph: captured once, and run again without Python."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
TORCH = str(Path(torch.__file__).parent)


def cuda_graph(device: torch.device) -> Capture:
    """Captures steps on `device` in CUDA graphs; they share their scratch memory, since they never run at once.

    What comes back keeps the step, and with it the memory that only the step refers to: a graph knows addresses alone.

    A step runs once before it is captured, and one that waits for the GPU is refused then, by the place in it that
    does: CUDA would refuse the capture itself, and could not say where.
    A step that cannot be captured raises what stood in the way, and leaves the current stream, the allocator and the
    device's random numbers as they were: `torch.cuda.graph` would go on on its own stream.
    """
    pool = torch.cuda.graph_pool_handle()
    graphs: list[torch.cuda.CUDAGraph] = []

    def capture(step: Step) -> Step:
        with torch.cuda.device(device):
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), _no_waiting():
                step()  # libraries allocate their workspaces for the stream that a graph is captured on
            torch.cuda.current_stream().wait_stream(side)
            empty_cache(device)
            with torch.cuda.stream(side):
                graph.capture_begin(pool=pool)
                try:
                    result = step()
                    graph.capture_end()
                except BaseException:
                    _abandon(graph, device, pool, shared=bool(graphs))
                    raise
        graphs.append(graph)

        def replay(kept: Step = step) -> Tensor:
            graph.replay()
            return result

        return replay

    return capture


@contextmanager
def _no_waiting() -> Iterator[None]:
    """What waits for the GPU is an error; the mode of the process is as before afterwards."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(TORCH)]
        where = f"{Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line}"
        raise RuntimeError(f"the step waits for the GPU ({where})") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int], shared: bool) -> None:
    """Ends the capture that `graph` began.

    torch's own ending gives up where CUDA calls the capture invalid, and then has not told the allocator (before torch
    2.12, which would never give memory back again), nor the random number generator (which would refuse every draw),
    and it keeps the pool.
    shared: whether other graphs use the pool; it then stays theirs.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        index = device.index if device.index is not None else torch.cuda.current_device()
        with suppress(RuntimeError):  # which says that the allocator has been told already
            torch._C._cuda_endAllocateToPool(index, pool)
        if not shared:
            with suppress(RuntimeError):
                torch._C._cuda_releasePool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # a clone is not being captured
    graph.reset()


def empty_cache(device: torch.device) -> None:
    """Gives back what nobody holds any more: a capture wants memory of its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
