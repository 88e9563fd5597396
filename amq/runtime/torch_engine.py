"""`TorchEngine`: any causal LM of transformers, run by its own forward; quantized linears inside multiply with ours.

Where their caches hold keys and values alone, sequences that decode share a call; else they run one after another. On
a CPU each has a cache of its own, which grows (amq.runtime.torch_places, .torch_batch). On CUDA they are rows of one
that is allocated at load, and decode steps are CUDA graphs, captured once (.torch_captured), because there a step costs
more to launch than to compute.

What a sequence has read stays when it ends, for those of its owner that begin alike (amq.runtime.torch_kept).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.kernels.modules import QuantizedLinear, StoredLinear
from amq.kernels.warming import warm_model
from amq.model.experts import Layer, experts_of, top_k_of
from amq.runtime.cuda_graphs import Capture, cuda_graph, empty_cache
from amq.runtime.engine import MAX_SCORED, Segment, Slot
from amq.runtime.rotary import Renewed, RotaryTables
from amq.runtime.torch_attention import attention_of, choose_attention, register
from amq.runtime.torch_batch import decodes_together, step_together
from amq.runtime.torch_captured import SMALLEST, Captured, CapturedSteps, buckets
from amq.runtime.torch_kept import KeptCaches, agreement
from amq.runtime.torch_places import CachedModel, Growing, Stepping
from amq.runtime.trial import REFUSALS, exact_activations, try_cache
from amq.util.limits import free_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ROWS = 512
CONTEXT = 4096
"""Where neither the caller nor the model says one."""
GRAPH_CONTEXT = 8192
"""On CUDA the caches are allocated at load: no more than this unless the caller asks for it."""
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""What models call their cache: in transformers 5.24, before it, and Mamba and its like before it."""
STATE_IN_MODULES = frozenset({"recurrent_gemma"})
"""Models of transformers whose state is not in the cache but in the model itself: sequences would share it."""
OPENING = 8
"""Tokens at a prompt's end that the next turn's prompt may have otherwise: a template opens the answer there, which it
may write in another way once it is there (without its thoughts). A state that cannot be cropped is kept before them."""
STEP_COST = 8
"""Tokens of a prompt that are read at once in the time of one step, at least."""
KEPT_SHARE = 4
"""Kept caches take at most this part (a quarter) of the memory that is free at load."""
SPARED_SHARE = 10
"""Static caches leave this part (a tenth) of the memory that is free at load to what passes and graphs need."""

log = logging.getLogger(__name__)


class _TorchSlot(Slot):
    """place: what of the engine it holds. sequence: what runs its tokens there, which holds `length` of them."""

    def __init__(
        self, capacity: int, place: Growing | Captured, tables: RotaryTables, prompt: int, owner: str, length: int
    ) -> None:
        super().__init__(capacity, length)
        self.place, self.owner = place, owner
        self.sequence = Renewed(place, tables, prompt, place.tokens) if tables else place


class TorchEngine:
    """An `Engine` (amq.runtime.engine) over a causal LM of transformers, in evaluation mode on its device.

    context: positions of a sequence at most; None takes the model's own, on CUDA at most GRAPH_CONTEXT. Only a model
        with dynamic rotary tables takes more than its own; every token beyond that reads its whole text anew.
    why: the reason that this engine runs the model, for the banner.
    capture: makes a decode step into one that runs without Python; None takes a CUDA graph on CUDA, else nothing.
    kept_bytes: of caches that are kept when their sequences have ended, the least recently used going first; None: a
        quarter of the memory that is free now. There are at most as many as sequences, twice as many where a cache
        cannot be cropped and is kept at the end of the prompt too. Captured places keep what they hold.
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
        kept_bytes: int | None = None,
    ) -> None:
        self._model = model
        choose_attention(model)
        self._config = model.config.get_text_config(decoder=True)
        self._device = model.device
        warm_model(model, model.dtype, max_rows)
        self._use = try_cache(model, CACHE_ARGUMENTS)
        self._cached = CachedModel(self._forward, self._new_cache, self._device)
        self._tables = RotaryTables(self._config, self._run_short_text)
        self.vocab_size, self.max_rows = self._config.vocab_size, max_rows
        if not 1 <= max_sequences <= max_rows:
            raise AmqError(f"max_sequences must be from 1 to {max_rows}, got {max_sequences}")
        in_modules = self._config.model_type in STATE_IN_MODULES
        if max_sequences > 1 and in_modules:
            raise AmqError(f"{self._config.model_type} runs one sequence at a time: give max_sequences 1")
        self.max_sequences = max_sequences
        if capture is None and self._device.type == "cuda":
            capture = cuda_graph(self._device)
        self.context = self._context(context, GRAPH_CONTEXT if capture is not None else None)
        self.weight_bytes = weight_bytes(model)
        self._captured: CapturedSteps | None = None
        self._free: list[Captured] = []
        how = "" if capture is None else self._capture(capture, context)
        alone = self._alone()
        self._together = not alone
        if max_sequences > 1:
            how += f", one sequence after another ({alone})" if alone else ", sequences decode together"
        self._open: set[_TorchSlot] = set()
        self._steps = in_modules or not self._use.continues
        kept = 0 if in_modules or self._captured is not None else max_sequences * (1 if self._use.plain else 2)
        budget = free_on(str(self._device)) // KEPT_SHARE if kept_bytes is None else kept_bytes
        self._kept = KeptCaches(kept, budget, self._use.crops, self._usable)
        self.banner = f"transformers on {self._device}, {str(model.dtype).removeprefix('torch.')}, "
        self.banner += f"{attention_of(model)} attention, {_linears(model)}"
        beyond = self._tables.dynamic is not None and self.context > self._tables.dynamic
        slow = f", whole texts anew beyond {self._tables.dynamic} (dynamic rotary tables)" if beyond else ""
        self.banner += f"{how}; context {self.context}{slow}{f' ({why})' if why else ''}"

    @torch.inference_mode()
    def open(self, prompt: Sequence[int], new_tokens: int, owner: str = "", reuse: bool = True) -> _TorchSlot | None:
        """See `Engine`."""
        capacity = len(prompt) + new_tokens
        if capacity > self.context:
            raise AmqError(
                f"a prompt of {len(prompt)} tokens and {new_tokens} new ones do not fit the context of {self.context}"
            )
        if len(self._open) == self.max_sequences:
            return None
        place: Growing | Captured
        if self._captured is None:
            place = self._growing(prompt, owner, reuse)
        else:
            place = self._row(prompt, owner, reuse)
        slot = _TorchSlot(capacity, place, self._tables, len(prompt), owner, len(place.tokens))
        self._open.add(slot)
        return slot

    @torch.inference_mode()
    def close(self, slot: _TorchSlot) -> None:
        """See `Engine`."""
        self._open.remove(slot)
        place = slot.place
        if isinstance(place, Captured):
            self._free.append(place)
        elif place.sound:
            self._kept.keep(slot.owner, place.tokens, lambda: place.cache)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment[_TorchSlot]]) -> Tensor:
        """See `Engine`. After a pass that failed, its sequences can only be closed."""
        self._check(segments)
        try:
            rows = self._step_together(segments)
            for number, segment in enumerate(segments):
                if number not in rows:
                    logits = segment.slot.sequence.run(list(segment.tokens), segment.logits, segment.every)
                    if (segment.logits or segment.every) and logits is not None:
                        rows[number] = logits.float().cpu()  # now: the next replay may write where this one's are
        except BaseException as error:
            for segment in segments:  # some are computed and some are not
                segment.slot.place.sound = False
            if isinstance(error, torch.OutOfMemoryError):
                raise AmqError(self._out_of_memory()) from error
            raise
        for segment in segments:
            segment.slot.length += len(segment.tokens)
        wanted = [rows[n] for n, segment in enumerate(segments) if (segment.logits or segment.every) and n in rows]
        return torch.cat(wanted) if wanted else torch.empty(0, self.vocab_size)

    def cached_tokens(self) -> tuple[int, int]:
        """See `Engine`."""
        return sum(slot.length for slot in self._open), self.max_sequences * self.context

    def _growing(self, prompt: Sequence[int], owner: str, reuse: bool) -> Growing:
        """A place that goes on from what was kept, as far as that holds the prompt; `reuse` as of `open`."""
        found, cache = self._kept.find(owner, prompt) if reuse else (0, None)

        def snapshot(place: Growing) -> None:
            self._kept.keep(owner, place.tokens, lambda: place.cache, in_use=True)

        mark = 0 if self._use.plain or self._tables else len(prompt) - (1 if self._steps else OPENING)
        kind = Stepping if self._steps else Growing
        return kind(self._cached, prompt[:found], cache, max(mark, 0), snapshot)

    def _row(self, prompt: Sequence[int], owner: str, reuse: bool) -> Captured:
        """The free place that holds most of the prompt, or else the one that has been free for the longest time."""

        def held(place: Captured) -> int:
            if not (reuse and place.sound and place.owner == owner):
                return 0
            count = agreement(place.tokens, prompt[:-1])
            return count if count and self._usable(count, len(place.tokens), len(prompt)) else 0

        place = max(self._free, key=held)  # of equal ones the first
        count = held(place)
        self._free.remove(place)
        if count:
            place.crop(count)
        else:
            place.reset()
        place.owner = owner
        return place

    def _usable(self, start: int, held: int, prompt: int) -> bool:
        """See amq.runtime.torch_kept.Usable."""
        if self._tables.change(start, held) or self._tables.change(start, prompt):
            return False  # what was computed with other tables would be computed anew
        return not self._steps or (prompt - start) * STEP_COST <= prompt

    def _step_together(self, segments: Sequence[Segment[_TorchSlot]]) -> dict[int, Tensor]:
        """Runs the segments of one token that can share a call; {number of the segment: logits [1, vocabulary]}."""
        growing: dict[int, Growing] = {}
        captured: dict[int, Captured] = {}
        for number, segment in enumerate(segments):
            place = segment.slot.place
            if not self._together or len(segment.tokens) > 1:
                continue
            if isinstance(place, Captured):
                captured[number] = place
            elif place.tokens:
                growing[number] = place
        numbers = [*growing, *captured]
        if len(numbers) < 2:
            return {}
        tokens = [segments[number].tokens[0] for number in numbers]
        if self._captured is not None:
            rows = self._captured.run(list(captured.values()), tokens)
        else:
            rows = step_together(self._cached, list(growing.values()), tokens).float().cpu()
        return dict(zip(numbers, rows.split(1), strict=True))

    def _alone(self) -> str:
        """Why sequences run one after another; "" where they need not."""
        if not self._use.plain:
            return "the cache holds more than keys and values, or windows of them"
        if self._tables:
            return "rotary tables depend on the length"
        if self._captured is not None:
            together = self.max_sequences == 1 or self._captured.together
            return "" if together else "the model takes no sequences of different lengths"
        with exact_activations(self._model):
            together = self.max_sequences == 1 or decodes_together(self._cached)
        return "" if together else "the model takes no sequences of different lengths"

    def _forward(self, tokens: Tensor, cache: Any, every: bool = False, **more: Tensor) -> Tensor:
        """See amq.runtime.torch_places.Forward."""
        use = self._use
        options = {} if every else use.options  # without them, the model gives all logits
        logits = self._model(input_ids=tokens, use_cache=True, **{use.argument: cache}, **options, **more).logits
        return logits[0] if every else logits[:, -1]

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._config)

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
            if not slot.place.sound:
                raise AmqError("an earlier pass of a segment's slot failed: close it, and read its text again")
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

    def _capture(self, capture: Capture, asked: int | None) -> str:
        """Makes the places for sequences with their decode steps; returns what the banner says of it."""
        if self._use.recurrent:
            return self._uncaptured("its cache keeps other state than keys and values")
        if any(experts_of(self._model)):
            return self._uncaptured("tokens are sorted to experts on the host")
        self._fit_context(asked)
        attention = attention_of(self._model)
        try:
            with torch.inference_mode():
                self._captured = self._tried_steps()
                self._captured.capture(capture)
            self._free = list(self._captured.places)
            return ", decode steps captured"
        except (ImportError, *REFUSALS) as error:  # of memory, or of an operation that a graph cannot hold
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, torch.OutOfMemoryError):
                reason += "; a smaller context or fewer sequences leave room for them"
        self._captured = None
        if attention_of(self._model) != attention:
            self._model.set_attn_implementation(attention)
        empty_cache(self._device)  # the caches went with the error
        return self._uncaptured(reason)

    def _tried_steps(self) -> CapturedSteps:
        """Steps that give the logits of caches that grow: of several sequences if they do, with our attention if they
        do and the model has no other than sdpa."""
        own = attention_of(self._model)
        plain = self.max_sequences > 1 and self._use.plain and not self._tables
        steps = CapturedSteps(
            self._cached, self._use.layers, self.context, self.max_sequences, self._model.dtype
        )  # fmt: skip
        for together in (True, False) if plain else (False,):
            steps.together = together
            for name in (register(), own) if own == "sdpa" else (own,):
                if name != attention_of(self._model):
                    self._model.set_attn_implementation(name)
                with exact_activations(self._model):
                    if steps.agree():
                        return steps
        raise RuntimeError("its logits over a static cache are others than over one that grows")

    def _fit_context(self, asked: int | None) -> None:
        """Lowers a context that nobody asked for to what the static cache has room for.

        Raises AmqError where that is none, or the one `asked` for does not fit.
        """
        empty_cache(self._device)
        position, free = self._use.token_bytes * self.max_sequences, free_on(str(self._device))
        needed = buckets(self.context)[-1] + 1
        most = (free - free // SPARED_SHARE) // position
        if needed <= most:
            return
        fitting = (most - 1) // SMALLEST * SMALLEST
        reason = (
            f"not enough memory for the KV cache of {self.max_sequences} sequences of {self.context} tokens: "
            f"{needed * position / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free on {self._device}; {fitting} "
            "tokens fit for each"
        )
        if asked is not None or fitting < SMALLEST:
            raise AmqError(f"{reason}: use a smaller context, fewer sequences, or a model of fewer bits")
        log.warning("%s, which is the context now; with fewer sequences it can be longer", reason)
        self.context = fitting

    def _out_of_memory(self) -> str:
        held, free = sum(slot.length for slot in self._open), free_on(str(self._device))
        return (
            f"out of memory on {self._device}: its caches hold {held} tokens of {len(self._open)} sequences, and "
            f"{free // self._use.token_bytes} more fit, without what a pass needs beside them; use a smaller context "
            "or fewer sequences"
        )

    def _uncaptured(self, reason: str) -> str:
        log.warning("decode steps run without CUDA graphs, which is slower: %s", reason)
        return f", no CUDA graphs ({reason})"


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
