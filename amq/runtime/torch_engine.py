"""`TorchEngine`: any causal LM of transformers, run by its own forward; quantized linears inside multiply with ours.

Sequences have a KV cache each and run one after another. On a CPU caches grow; on CUDA they are preallocated, and the
decode step of each is a CUDA graph, captured once at load, because there a step costs more to launch than to compute.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.kernels.modules import QuantizedLinear, StoredLinear
from amq.model.experts import Layer, experts_of, top_k_of
from amq.runtime.engine import MAX_SCORED, Segment, Slot
from amq.runtime.rotary import Renewed, RotaryTables
from amq.runtime.trial import REFUSALS, try_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ROWS = 512
CONTEXT = 4096
"""Where neither the caller nor the model says one."""
GRAPH_CONTEXT = 8192
"""On CUDA the caches are allocated at load: no more than this unless the caller asks for it."""
WARM_UPS = 3
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""What models call their cache: in transformers 5.24, before it, and Mamba and its like before it."""
STATE_IN_MODULES = frozenset({"recurrent_gemma"})
"""Models of transformers whose state is not in the cache but in the model itself: sequences would share it."""

Forward = Callable[[Tensor, Any, bool], Tensor]
"""`TorchEngine._forward`."""
Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]

log = logging.getLogger(__name__)


class _Growing:
    """A sequence whose cache grows as it goes."""

    def __init__(self, forward: Forward, config: Any, device: torch.device) -> None:
        self._forward, self._config, self._device = forward, config, device
        self.reset()

    def reset(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._config)

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor | None:
        """The logits [1, vocabulary] after the last token, with `every` [tokens, vocabulary] after each; None while it
        waits for more, which `logits` and `every` rule out."""
        return self._forward(torch.tensor([tokens], device=self._device), self._cache, every)


class _Recurrent(_Growing):
    """A sequence of a model with a recurrent state (Mamba and its like).

    Not all of these go on from a state with more than one token (checked: Mamba, RecurrentGemma), so a prompt waits
    until it is whole, and what comes later goes token by token.
    """

    def reset(self) -> None:
        super().reset()
        self._started, self._waiting = False, list[int]()

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor | None:
        waiting = [*self._waiting, *tokens]
        if not (logits or every):
            self._waiting = waiting
            return None
        whole = 0 if self._started else len(waiting) - (len(tokens) - 1) * every
        parts = [waiting[:whole]] * bool(whole) + [[token] for token in waiting[whole:]]
        self._started, self._waiting = True, []
        rows = [self._forward(torch.tensor([part], device=self._device), self._cache, False) for part in parts]
        return torch.cat(rows[-len(tokens) :]) if every else rows[-1]


class _Captured:
    """A place for sequences of up to `context` positions, one after another, with a captured decode step.

    transformers' static cache keeps its length in a tensor and moves it on itself, so the captured step needs nothing
    but the token. Its sliding windows count in Python instead, which a graph cannot: here every layer keeps all
    positions, and the model's mask does the sliding.
    """

    def __init__(
        self,
        forward: Forward,
        layers: int,
        context: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        self._forward, self._device = forward, device
        self._cache = Cache(layers=[StaticLayer(context) for _ in range(layers)])
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)

        def step() -> Tensor:
            return forward(self._token, self._cache, False)

        for _ in range(WARM_UPS):  # allocates the cache, prepares weights, compiles what is compiled when first used
            step()
            self.reset()
        self._step = capture(step)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        for layer in self._cache.layers:
            layer.reset()

    def run(self, tokens: Sequence[int], logits: bool, every: bool = False) -> Tensor:
        if len(tokens) > 1:
            return self._forward(torch.tensor([tokens], device=self._device), self._cache, every)
        self._token.fill_(tokens[0])
        return self._step()


class _TorchSlot(Slot):
    """place: what of the engine it holds. sequence: what runs its tokens there."""

    def __init__(self, capacity: int, place: _Growing | _Captured, tables: RotaryTables, prompt: int) -> None:
        super().__init__(capacity)
        self.place = place
        self.sequence = Renewed(place, tables, prompt) if tables else place


class TorchEngine:
    """An `Engine` (amq.runtime.engine) over a causal LM of transformers, in evaluation mode on its device.

    context: positions of a sequence at most; None takes the model's own, on CUDA at most GRAPH_CONTEXT. Only a model
        with dynamic rotary tables takes more than its own; every token beyond that reads its whole text anew.
    why: the reason that this engine runs the model, for the banner.
    capture: makes a decode step into one that runs without Python; None takes a CUDA graph on CUDA, else nothing.
    weight_bytes: that one decoded token reads: all linears and norms, the embedding only where it is the head too; of
        experts, as many as a token is routed to.
    Raises AmqError for a context that the model does not have, and for a model that takes no KV cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        context: int | None = None,
        max_sequences: int = 1,
        max_rows: int = MAX_ROWS,
        why: str = "",
        capture: Capture | None = None,
    ) -> None:
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        self._device = model.device
        self._use = try_cache(model, CACHE_ARGUMENTS)
        self._tables = RotaryTables(self._config, self._run_short_text)
        self.vocab_size, self.max_rows = self._config.vocab_size, max_rows
        if not 1 <= max_sequences <= max_rows:
            raise AmqError(f"max_sequences must be from 1 to {max_rows}, got {max_sequences}")
        if max_sequences > 1 and self._config.model_type in STATE_IN_MODULES:
            raise AmqError(f"{self._config.model_type} runs one sequence at a time: give max_sequences 1")
        self.max_sequences = max_sequences
        if capture is None and self._device.type == "cuda":
            capture = _cuda_graph(self._device)
        self.context = self._context(context, GRAPH_CONTEXT if capture is not None else None)
        self.weight_bytes = weight_bytes(model)
        self._free: list[_Captured] | None = None
        how = "" if capture is None else self._capture(capture)
        self._open: set[_TorchSlot] = set()
        self.banner = f"transformers on {self._device}, {str(model.dtype).removeprefix('torch.')}, {_linears(model)}"
        beyond = self._tables.dynamic is not None and self.context > self._tables.dynamic
        slow = f", whole texts anew beyond {self._tables.dynamic} (dynamic rotary tables)" if beyond else ""
        self.banner += f"{how}; context {self.context}{slow}{f' ({why})' if why else ''}"

    def open(self, prompt: Sequence[int], new_tokens: int, owner: str = "", reuse: bool = True) -> _TorchSlot | None:
        """See `Engine`. Nothing of earlier sequences is kept: `length` is 0."""
        capacity = len(prompt) + new_tokens
        if capacity > self.context:
            raise AmqError(
                f"a prompt of {len(prompt)} tokens and {new_tokens} new ones do not fit the context of {self.context}"
            )
        if len(self._open) == self.max_sequences:
            return None
        place: _Growing | _Captured
        if self._free is None:
            recurrent = self._use.recurrent or self._config.model_type in STATE_IN_MODULES
            place = (_Recurrent if recurrent else _Growing)(self._forward, self._config, self._device)
        else:
            place = self._free.pop()
            place.reset()
        slot = _TorchSlot(capacity, place, self._tables, len(prompt))
        self._open.add(slot)
        return slot

    def close(self, slot: _TorchSlot) -> None:
        """See `Engine`."""
        self._open.remove(slot)
        if self._free is not None and isinstance(slot.place, _Captured):
            self._free.append(slot.place)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment[_TorchSlot]]) -> Tensor:
        """See `Engine`."""
        self._check(segments)
        rows = []
        for segment in segments:
            logits = segment.slot.sequence.run(list(segment.tokens), segment.logits, segment.every)
            segment.slot.length += len(segment.tokens)
            if (segment.logits or segment.every) and logits is not None:
                rows.append(logits.float().cpu())  # now: the next replay may write where this one's logits are
        return torch.cat(rows) if rows else torch.empty(0, self.vocab_size)

    def cached_tokens(self) -> tuple[int, int]:
        """See `Engine`."""
        return sum(slot.length for slot in self._open), self.max_sequences * self.context

    def _forward(self, tokens: Tensor, cache: Any, every: bool) -> Tensor:
        """int64 [1, n] → [1, vocabulary] after the last of them, with `every` [n, vocabulary] after each."""
        use = self._use
        options = {} if every else use.options  # without them, the model gives all logits
        logits = self._model(input_ids=tokens, use_cache=True, **{use.argument: cache}, **options).logits[0]
        return logits if every else logits[-1:]

    def _run_short_text(self) -> None:
        self._model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self._device), use_cache=False)

    def _check(self, segments: Sequence[Segment[_TorchSlot]]) -> None:
        rows = sum(len(segment.tokens) for segment in segments)
        if rows > self.max_rows:
            raise AmqError(f"a pass has {rows} tokens, expected at most {self.max_rows}")
        scored = sum(len(segment.tokens) for segment in segments if segment.every)
        if scored > MAX_SCORED:
            raise AmqError(f"logits after each of {scored} tokens are wanted, expected at most {MAX_SCORED}")
        for segment in segments:
            slot, tokens = segment.slot, segment.tokens
            if slot not in self._open:
                raise AmqError("a segment's slot is closed, or of another engine")
            if not tokens or slot.length + len(tokens) > slot.capacity:
                raise AmqError(
                    f"{len(tokens)} tokens after {slot.length} in a slot for {slot.capacity}: expected at least one, "
                    "and none beyond it"
                )
            if min(tokens) < 0 or max(tokens) >= self.vocab_size:
                raise AmqError(f"a token id is outside the model's vocabulary of {self.vocab_size}")

    def _context(self, asked: int | None, most: int | None) -> int:
        own = getattr(self._config, "max_position_embeddings", None)
        if asked is None:
            return min(own or CONTEXT, most or own or CONTEXT)
        if asked < 2 or (own is not None and asked > own and self._tables.dynamic is None):
            raise AmqError(f"context must be from 2 to the model's {own or 'limit'}, got {asked}")
        return asked

    def _capture(self, capture: Capture) -> str:
        """Makes the places for sequences with their decode steps; returns what the banner says of it."""
        if self._use.recurrent:
            return self._uncaptured("its cache keeps other state than keys and values")
        if any(experts_of(self._model)):
            return self._uncaptured("tokens are sorted to experts on the host")
        places = range(self.max_sequences)
        try:
            with torch.inference_mode():
                self._free = [
                    _Captured(self._forward, self._use.layers, self.context, self._device, capture) for _ in places
                ]
            return ", decode steps captured"
        except (ImportError, *REFUSALS) as error:  # of memory for the caches, or an operation that a graph cannot hold
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _empty_cache(self._device)  # the caches went with the error
        return self._uncaptured(reason)

    def _uncaptured(self, reason: str) -> str:
        self._free = None
        log.warning("decode steps run without CUDA graphs, which is slower: %s", reason)
        return f", no CUDA graphs ({reason})"


def _cuda_graph(device: torch.device) -> Capture:
    """Captures steps on `device` in CUDA graphs; they share their scratch memory, since they never run at once.

    A step that cannot be captured raises what stood in the way, and leaves the current stream, the allocator and the
    device's random numbers as they were: `torch.cuda.graph` would go on on its own stream.
    """
    pool = torch.cuda.graph_pool_handle()
    graphs: list[torch.cuda.CUDAGraph] = []

    def capture(step: Step) -> Step:
        with torch.cuda.device(device):
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()  # libraries allocate their workspaces for the stream that a graph is captured on
            torch.cuda.current_stream().wait_stream(side)
            _empty_cache(device)
            with torch.cuda.stream(side):
                graph.capture_begin(pool=pool)
                try:
                    result = step()
                    graph.capture_end()
                except BaseException:
                    _abandon(graph, device, pool, shared=bool(graphs))
                    raise
        graphs.append(graph)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return capture


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


def _empty_cache(device: torch.device) -> None:
    """Gives back what nobody holds any more: a capture wants memory of its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def weight_bytes(model: PreTrainedModel) -> int:
    """See `TorchEngine`."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    share = {  # of a linear's bytes, which a token reads
        linear: top_k_of(model.config, Layer(layer.experts, layer)) / layer.experts
        for _, layer in experts_of(model)
        for role in layer.roles
        for linear in layer.linears(role)
    }
    seen: set[int] = set()
    total = 0.0
    for module in model.modules():
        size = 0
        if isinstance(module, StoredLinear):
            size = module.packed.nbytes if module.packed is not None else 0
        elif isinstance(module, QuantizedLinear):
            size = module.weight.nbytes
        for parameter in module.parameters(recurse=False):
            looked_up = isinstance(module, nn.Embedding) and parameter is not head
            if not looked_up and id(parameter) not in seen:
                seen.add(id(parameter))
                size += parameter.nbytes
        total += size * share.get(module, 1.0)
    return round(total)


def _linears(model: nn.Module) -> str:
    quantized = [module for module in model.modules() if isinstance(module, StoredLinear)]
    if not quantized:
        return "not quantized"
    execution = quantized[0].execution
    return f"{len(quantized)} linears in {', '.join(execution.formats)} ({execution.activations} activations)"
