"""The engine for the families of amq.runtime.families on a CPU: one call of amq._cpu per pass.

The steps of csrc/cpu/decoder.h are made of config.json, and filled from the checkpoint's tensors. What they cannot
compute exactly as transformers does is refused with `Unsupported`, and the caller takes another path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint, open_checkpoint
from amq.errors import AmqError
from amq.kernels.backends import check_activations
from amq.kernels.cpu import NO_MEMORY, cpu_module, empty_bytes, memory
from amq.model.shape import DEFAULT_CACHE
from amq.runtime.cache_kinds import choose_kinds, kinds_text
from amq.runtime.decoder_spec import DecoderSpec
from amq.runtime.engine import Segment
from amq.runtime.families import read_spec
from amq.runtime.native_weights import NativeWeights
from amq.runtime.page_keys import Key, model_root
from amq.runtime.page_store import PageStore
from amq.runtime.paged_engine import MAX_ROWS, PagedEngine, PagedSlot, check_state_cache, context_of
from amq.runtime.settings import AUTO_CACHE
from amq.runtime.state_pool import FLOAT, RecurrentStates, Snapshots, room_for
from amq.util.files import cache_dir, is_out_of_memory


class NativeEngine(PagedEngine):
    """See `PagedEngine`; made by `open_native`.

    how: `int8` and `cache` of csrc/decoder_module.cpp.
    root: of `page_keys.model_root`. store: makes the pages on disk from the bytes of a page; `shutdown` ends it.
    state_cache: bytes of snapshots, where the model is recurrent; None: `state_pool.room_for` says.
    """

    def __init__(
        self,
        weights: NativeWeights,
        context: int,
        how: Mapping[str, Any],
        banner: str,
        max_sequences: int,
        threads: int,
        root: Key = b"",
        store: Callable[[int], PageStore] | None = None,
        state_cache: int | None = None,
    ) -> None:
        self._keep = weights.keep  # everything that the decoder holds the address of
        self.banner, self._threads = banner, threads
        self.weight_bytes: int = weights.bytes
        try:
            self._decoder = cpu_module().Decoder(
                spec=weights.spec,
                weights=weights.held,
                context=context,
                group_size=weights.checkpoint.record.group_size,
                **how,
                max_rows=MAX_ROWS,
                threads=threads,
            )
        except (ValueError, TypeError) as error:  # TypeError: a number beyond 64 bits
            raise AmqError(f"the native engine cannot hold this model: {error}") from error
        page, page_bytes, spare = cpu_module().PAGE, self._decoder.page_bytes, self._decoder.spare_pages
        first = self._decoder.first_pages
        cache_bytes = max_sequences * (-(-context // page) + spare + first) * page_bytes
        states = self._make_states(page, max_sequences, cache_bytes, state_cache)
        kept = store(page_bytes) if store else None
        super().__init__(weights.spec, context, max_sequences, page, page_bytes, states, root, kept, spare, bool(first))
        self._cache = empty_bytes(cache_bytes)  # a page takes memory once it is written to
        self.isa = ""  # one of cpu_module().isas(), for tests; empty: AMQ_CPU_ISA or the best

    def _make_states(
        self, page: int, max_sequences: int, cache_bytes: int, limit: int | None
    ) -> RecurrentStates | None:
        """None for a model without recurrent state."""
        state_bytes = self._decoder.state_floats * FLOAT
        if not state_bytes:
            return None
        n_kept = room_for(state_bytes, max_sequences, cache_bytes, limit)
        self.banner += f", states: {state_bytes / 1e6:.3g} MB a sequence, {n_kept} kept"
        return RecurrentStates(self._decoder.state_floats, page, max_sequences, n_kept)

    def _page_memory(self, slot: PagedSlot, place: int) -> Any:
        size, page = self._page_bytes, int(slot.pages[place])
        return self._cache[page * size : (page + 1) * size].numpy()

    def _pass(
        self, segments: Sequence[Segment[PagedSlot]], plans: Sequence[Snapshots], wanted: list[int], logits: Tensor
    ) -> None:
        numbers = np.array([token for segment in segments for token in segment.tokens], np.int32)
        described = [self._describe(segment, plan) for segment, plan in zip(segments, plans, strict=True)]
        self._decoder.forward(
            (numbers.ctypes.data, numbers.nbytes), described, wanted, memory(logits) if wanted else NO_MEMORY,
            memory(self._cache), NO_MEMORY if self.states is None else memory(self.states.memory), self._threads,
            self.isa,
        )  # fmt: skip

    def _describe(self, segment: Segment[PagedSlot], plan: Snapshots) -> tuple[Any, ...]:
        """As csrc/decoder_module.cpp takes a segment."""
        slot = segment.slot
        pages = (slot.pages.ctypes.data, slot.pages.nbytes)
        state = 0 if slot.state is None else slot.state.number
        return len(segment.tokens), slot.length, pages, slot.is_long, state, plan


def open_native(
    folder: Path | Checkpoint,
    activations: str = "int8",
    context: int | None = None,
    max_sequences: int = 1,
    threads: int | None = None,
    cache: str | Sequence[str] = AUTO_CACHE,
    verify: bool = True,
    prompt_cache: int | None = None,
    prompt_cache_folder: Path | None = None,
    state_cache: int | None = None,
) -> NativeEngine:
    """Opens a checkpoint of one of amq.runtime.families.

    folder: or what `open_checkpoint` made of it.
    activations: `int8`, or `fp32` (exact).
    context: positions of a sequence; None: the model's, up to DEFAULT_CONTEXT.
    threads: None: torch's.
    cache: what keys and values are kept as (docs/cpu.md): a kind for all layers, or one for each that keeps any;
        `auto`: what the checkpoint says, else float16, float32 where activations are exact.
    verify: compare the hash of every tensor.
    prompt_cache: bytes of pages to keep on disk, in prompt_cache_folder (None: `prompts` in the user's cache).
    state_cache: bytes of snapshots of recurrent states; None: `state_pool.room_for` says.
    Raises Unsupported where the model or a setting is not for this engine, AmqError for a damaged checkpoint.
    """
    check_activations("cpu", activations)
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder, verify=False)
    record = checkpoint.record
    spec = read_spec(
        checkpoint.config, str(checkpoint.folder / "config.json"), {*checkpoint.other_names, *record.formats}
    )
    _check_caches(spec, checkpoint, prompt_cache, state_cache)
    context = context_of(spec, context)
    threads = threads or torch.get_num_threads()
    default = "float32" if activations == "fp32" else DEFAULT_CACHE
    kinds = choose_kinds(cache, checkpoint, spec, "native", cpu_module().CACHES, default)
    if verify:
        checkpoint.verify()
    formats = "+".join(sorted(set(record.formats.values())))
    banner = (
        f"native engine ({checkpoint.config.get('model_type')}): {formats}, {activations} activations, "
        f"{kinds_text(kinds)} cache, {cpu_module().isa()}, {threads} threads, context {context}"
    )
    how = {"int8": activations == "int8", "cache": kinds}
    try:
        weights = NativeWeights(checkpoint, spec, context)
        if prompt_cache is None:
            return NativeEngine(weights, context, how, banner, max_sequences, threads, state_cache=state_cache)
        root = model_root(checkpoint, weights.tables, {"activations": activations, "cache": kinds})
        store = partial(PageStore, prompt_cache_folder or cache_dir() / "prompts", prompt_cache)
        return NativeEngine(weights, context, how, banner, max_sequences, threads, root, store)
    except (OSError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise AmqError(
            f"there is no memory for {checkpoint.folder} with a context of {context} and {max_sequences} "
            f"sequences ({error}): take fewer or shorter ones, or a larger machine"
        ) from error


def _check_caches(spec: DecoderSpec, checkpoint: Checkpoint, prompt_cache: int | None, state_cache: int | None) -> None:
    if spec.recurrent and prompt_cache is not None:
        raise AmqError(
            f"a prompt cache on disk holds pages only, and {checkpoint.folder} is of the type "
            f"{checkpoint.config.get('model_type')}, whose sequences have a recurrent state beside them: "
            "leave --prompt-cache out"
        )
    check_state_cache(spec, checkpoint, state_cache)
