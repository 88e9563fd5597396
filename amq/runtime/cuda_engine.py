"""The engine for the families of amq.runtime.families on an NVIDIA GPU: kernels of our own for all of a pass.

Tokens of sequences that decode run up to 8 at a time, in one CUDA graph for each of 1, 2, 4 and 8 rows; prompts run as
calls, up to MAX_ROWS rows a pass. Sequences can also decode on their own (`begin`, `step`, `end`): the next token is
chosen on the GPU and fed back inside the graph, and the host reads tokens one pass late.

Nothing here knows a GPU but through torch's device: on a CPU, where AMQ_CUDA_LIBRARY names a build of the kernels for
one, the same code runs without graphs, as tests have it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.kernels import cuda
from amq.kernels.backends import current
from amq.kernels.cuda_calls import MOST_ROWS, Refused
from amq.kernels.warming import warm
from amq.model.shape import DEFAULT_CACHE
from amq.packing import PreparedWeight
from amq.runtime.cache_kinds import choose_kinds, kinds_text
from amq.runtime.cuda_buffers import CACHES, PAGE, Buffers, Inputs, KeyCache, StepPlaces
from amq.runtime.cuda_graphs import Capture, cuda_graph, empty_cache
from amq.runtime.cuda_own import OwnRows
from amq.runtime.cuda_parts import PassCalls
from amq.runtime.cuda_pass import SPLITS, Many, PassBuilder
from amq.runtime.cuda_weights import CudaWeights, check_supported
from amq.runtime.decoder_spec import DecoderSpec, Linear
from amq.runtime.engine import MAX_SCORED, Segment
from amq.runtime.families import Unsupported, read_spec
from amq.runtime.paged_engine import MAX_ROWS, PagedEngine, PagedSlot, check_state_cache, context_of
from amq.runtime.settings import AUTO_CACHE, Sampling
from amq.runtime.state_pool import FLOAT, RecurrentStates, Snapshots, room_for
from amq.runtime.trial import REFUSALS
from amq.util.files import is_out_of_memory
from amq.util.limits import free_on

BUCKETS = (1, 2, 4, 8)
"""Rows that a decode pass is made for; a pass of fewer has empty ones."""

WORKSPACE = 128 << 20
"""Of the libraries, the graphs and the decode passes' logits, bytes."""

log = logging.getLogger(__name__)


class CudaEngine(PagedEngine):
    """See `PagedEngine`; made by `open_cuda`.

    dtype: of what is multiplied. int8: round it to 8 bits. cache: of CACHES, one for each
        layer that keeps any. capture: makes a pass into one that
    runs without Python, or None. many: see `cuda_pass.Many`. fixed: whether a context that does not fit is refused, not
        lowered.
    launches: {rows: calls of a decode pass, and of its head}.
    """

    def __init__(
        self,
        weights: CudaWeights,
        context: int,
        max_sequences: int,
        dtype: torch.dtype,
        int8: bool,
        cache: Sequence[str],
        banner: str,
        capture: Capture | None,
        many: Many | None = None,
        state_cache: int | None = None,
        fixed: bool = True,
    ) -> None:
        spec, self._device = weights.spec, weights.device
        self.weight_bytes = weights.bytes
        self._library = cuda.library().calls
        places = StepPlaces.of(spec, self._library, cache)
        rotates = bool(weights.checkpoint.record.rotation)
        self._buffers = Buffers(spec, MAX_ROWS, MOST_ROWS * SPLITS, dtype, self._device, rotates)
        free = free_on(str(self._device)) - _spare(spec) - max_sequences * places.state_floats * FLOAT
        context = self._fitting(context, fixed, free // max_sequences // max(places.page_bytes, 1), places.page_bytes)
        self.banner = f"{banner}, context {context}"
        n_pages = max_sequences * -(-context // PAGE)
        states = self._make_states(places, max_sequences, n_pages, free, state_cache)
        super().__init__(spec, context, max_sequences, PAGE, places.page_bytes, states)
        pages = torch.zeros(max_sequences, -(-context // PAGE), dtype=torch.int32, device=self._device)
        self.inputs = Inputs(MAX_ROWS, pages)
        memory = None if states is None else states.memory
        key_cache = KeyCache(places, n_pages, self._device)

        def builder(inputs: Inputs) -> PassBuilder:
            return PassBuilder(self._library, weights, self._buffers, inputs, key_cache, memory, int8, many)

        self._builder = builder(self.inputs)
        self._free_places = list(range(max_sequences - 1, -1, -1))
        self._places: dict[PagedSlot, int] = {}
        self._tables: dict[int, Any] = {}  # pages of each place, as the device has them
        self._prompts: dict[int, PassCalls] = {}
        self._heads: dict[int, tuple[PassCalls, Tensor]] = {}
        self._picked = torch.zeros(MAX_SCORED, spec.hidden, device=self._device)
        self._weights = weights
        self._capture = capture
        self.launches: dict[int, tuple[int, int]] = {}
        most = min(max_sequences, BUCKETS[-1])
        sizes = [rows for rows in BUCKETS if rows < 2 * most]
        self._decodes = {rows: self._decode_pass(rows) for rows in sizes}
        self._own = OwnRows(self, builder, sizes)

    # -- making

    def _fitting(self, context: int, fixed: bool, pages: int, page_bytes: int) -> int:
        """The context, or where that is not `fixed` less of it, of which each sequence has room for `pages`."""
        if -(-context // PAGE) <= pages:
            return context
        reason = (
            f"a KV cache of {context} tokens takes {-(-context // PAGE) * page_bytes / 2**30:.2f} GiB a sequence, and "
            f"{self._device} has {max(pages, 0) * page_bytes / 2**30:.2f} GiB for each beside weights and passes: "
            f"{max(pages, 0) * PAGE} tokens fit"
        )
        if fixed or pages <= 0:
            raise AmqError(
                f"{reason}; give a smaller --context, fewer sequences, --cache int8, or a model of fewer bits"
            )
        log.warning("%s, which is the context now; with fewer sequences or --cache int8 it can be longer", reason)
        return pages * PAGE

    def _make_states(
        self, places: StepPlaces, running: int, n_pages: int, free: int, limit: int | None
    ) -> RecurrentStates | None:
        size, cache_bytes = places.state_floats * FLOAT, n_pages * places.page_bytes
        if not size:
            return None
        n_kept = room_for(size, running, cache_bytes, limit, free)
        if limit is None:
            n_kept = min(n_kept, (free - cache_bytes) // size)
        self.banner += f", states: {size / 1e6:.3g} MB a sequence, {n_kept} kept"
        return RecurrentStates(places.state_floats, PAGE, running, n_kept, self._device)

    def _decode_pass(self, rows: int) -> Callable[[], Tensor]:
        body, head, logits = self.decode_calls(self._builder, rows)
        self.launches[rows] = len(body.parts), len(head.parts)
        return self.decode_run(body, head, logits)

    def decode_calls(self, builder: PassBuilder, rows: int) -> tuple[PassCalls, PassCalls, Tensor]:
        """Of a pass of up to `rows` tokens of as many sequences, and of its head; and the logits that they give,
        float32 [rows, vocabulary]."""
        body = builder.build(rows, decode=True)
        logits = torch.zeros(rows, self.vocab_size, device=self._device)
        return body, builder.build_head(self._buffers.stream[:rows], logits), logits

    def decode_run(self, body: PassCalls, head: PassCalls, logits: Tensor) -> Callable[[], Tensor]:
        """What launches a decode pass and returns its logits, valid until the next pass."""

        def run() -> Tensor:
            self.launch(body)
            self.launch(head)
            return logits

        return self.captured(run)

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """`run` as a CUDA graph, or, with one warning, as it is where it cannot be captured."""
        if self._capture is None:
            return run
        try:
            return self._capture(run)
        except AmqError:  # of the pass itself, which would fail without a graph too
            raise
        except REFUSALS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("the decode step runs without CUDA graphs, which is slower: %s", reason)
            self.banner += f", no CUDA graphs ({reason})"
            self._capture = None
            return run

    def launch(self, calls: PassCalls) -> None:
        """On the current stream; the device is the current one then (`_on_device`, or a capture)."""
        calls.run(torch.cuda.current_stream().cuda_stream if self._device.type == "cuda" else 0)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    # -- passes

    def _pass(
        self, segments: Sequence[Segment[PagedSlot]], plans: Sequence[Snapshots], wanted: list[int], logits: Tensor
    ) -> None:
        """Single tokens in decode passes, the others together; results go where `wanted` has their rows."""
        self._check_tokens(segments)
        places = {row: place for place, row in enumerate(wanted)}
        singles: list[tuple[int, Segment[PagedSlot], Snapshots]] = []
        others: list[tuple[int, Segment[PagedSlot], Snapshots]] = []
        row = 0
        for segment, plan in zip(segments, plans, strict=True):
            (singles if len(segment.tokens) == 1 else others).append((row, segment, plan))
            row += len(segment.tokens)
        try:
            with self._on_device():
                for begin in range(0, len(singles), BUCKETS[-1]):
                    self._decode(singles[begin : begin + BUCKETS[-1]], places, logits)
                if any(plan for _, _, plan in others):
                    for one in others:
                        self._in_pieces(*one, places, logits)
                elif others:
                    parts = [(first, segment.slot, segment.tokens, 0) for first, segment, _ in others]
                    self._prompt(parts, places, logits)
        except torch.OutOfMemoryError as error:
            raise AmqError(
                f"out of memory on {self._device} in a pass of {row} tokens, where something else took memory since "
                "the model was loaded: end that, or load with a smaller --context or fewer sequences"
            ) from error

    def _check_tokens(self, segments: Sequence[Segment[PagedSlot]]) -> None:
        rows = 0
        for segment in segments:
            rows += len(segment.tokens)
            if segment.slot in self._own:
                raise AmqError("a sequence that decodes on its own takes part in a pass: end that first")
            if not segment.tokens or min(segment.tokens) < 0 or max(segment.tokens) >= self.vocab_size:
                raise AmqError(f"a token id is outside the model's vocabulary of {self.vocab_size}")
        if rows > self.max_rows:
            raise AmqError(f"a pass has {rows} tokens, expected at most {self.max_rows}")

    def _decode(
        self, group: list[tuple[int, Segment[PagedSlot], Snapshots]], places: dict[int, int], logits: Tensor
    ) -> None:
        rows = next(size for size in BUCKETS if size >= len(group))
        slots = [segment.slot for _, segment, _ in group]
        fields = self.row_fields(slots, [slot.length for slot in slots])
        fields["tokens"] = [segment.tokens[0] for _, segment, _ in group]
        self.inputs.write(rows, fields)
        found = self._decodes[rows]()
        wanted = [(index, places[row]) for index, (row, _, _) in enumerate(group) if row in places]
        if wanted:
            source, target = (list(each) for each in zip(*wanted, strict=True))
            logits[target] = found[: len(group)].cpu()[source]
        for _, segment, plan in group:
            self._take_snapshots(segment.slot, plan)

    def row_fields(self, slots: Sequence[PagedSlot], positions: Sequence[int]) -> dict[str, list[int]]:
        """Of `Inputs`, for one token of each of `slots`; their pages are on the device then."""
        return {
            "positions": list(positions), "slots": [self.place_of(slot) for slot in slots],
            "long_text": [int(slot.is_long) for slot in slots], "first": list(range(len(slots))),
            "count": [1] * len(slots), "state": [slot.state.number if slot.state else 0 for slot in slots],
            "begins": [int(position == 0) for position in positions],
        }  # fmt: skip

    def place_of(self, slot: PagedSlot) -> int:
        """The number of the slot's pages in `Inputs.tables`, which are brought up to date."""
        if slot not in self._places:
            self._places[slot] = self._free_places.pop()
        place = self._places[slot]
        known = self._tables.get(place)
        if known is None or not np.array_equal(known, slot.pages):
            self._tables[place] = slot.pages.copy()
            self.inputs.tables[place, : len(slot.pages)] = torch.from_numpy(self._tables[place])
        return place

    def _in_pieces(
        self, row: int, segment: Segment[PagedSlot], plan: Snapshots, places: dict[int, int], logits: Tensor
    ) -> None:
        """A segment of a recurrent model, cut where snapshots are taken."""
        ends = sorted({rows for rows, _ in plan} | {len(segment.tokens)})
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            self._prompt([(row + begin, segment.slot, segment.tokens[begin:end], begin)], places, logits)
            self._take_snapshots(segment.slot, [each for each in plan if each[0] == end])

    def _take_snapshots(self, slot: PagedSlot, plan: Snapshots) -> None:
        if self.states is not None and slot.state is not None:
            for _, number in plan:
                self.states.memory[number].copy_(self.states.memory[slot.state.number])

    def _prompt(
        self, parts: list[tuple[int, PagedSlot, Sequence[int], int]], places: dict[int, int], logits: Tensor
    ) -> None:
        """parts: (row of the pass, slot, tokens, tokens of the slot's segment before them)."""
        rows = sum(len(tokens) for _, _, tokens, _ in parts)
        fields: dict[str, list[int]] = {name: [] for name in Inputs.FIELDS}
        source: list[int] = []  # row here, of each that is wanted
        target: list[int] = []
        for row, slot, tokens, before in parts:
            first, position = len(fields["tokens"]), slot.length + before
            fields["first"].append(first)
            fields["count"].append(len(tokens))
            fields["state"].append(slot.state.number if slot.state else 0)
            fields["begins"].append(int(position == 0))
            fields["tokens"] += tokens
            fields["positions"] += range(position, position + len(tokens))
            fields["slots"] += [self.place_of(slot)] * len(tokens)
            fields["long_text"] += [int(slot.is_long)] * len(tokens)
            hits = [i for i in range(len(tokens)) if row + i in places]
            source += [first + i for i in hits]
            target += [places[row + i] for i in hits]
        size = _rounded(rows)
        if size not in self._prompts:
            self._prompts[size] = self._builder.build(size, decode=False)
        self.inputs.write(size, fields)
        self.launch(self._prompts[size])
        for begin in range(0, len(source), MAX_SCORED):
            some = slice(begin, begin + MAX_SCORED)
            logits[target[some]] = self._logits_of(source[some]).cpu()

    def _logits_of(self, rows: list[int]) -> Tensor:
        """[len(rows), vocabulary] after these rows of the stream, up to MAX_SCORED of them."""
        count = len(rows)
        picked = self._picked[:count]
        torch.index_select(self._buffers.stream, 0, torch.tensor(rows, device=self._device), out=picked)
        if count not in self._heads:
            logits = torch.zeros(count, self.vocab_size, device=self._device)
            self._heads = {count: (self._builder.build_head(picked, logits), logits)}
        calls, logits = self._heads[count]
        self.launch(calls)
        return logits

    def _close_slot(self, slot: PagedSlot) -> None:
        self._own.end(slot)
        super()._close_slot(slot)
        if slot in self._places:
            self._free_places.append(self._places.pop(slot))

    # -- sequences that decode on their own

    def can_sample(self, how: Sampling) -> bool:
        """See `SamplingEngine`. A text that might become a long one, and be computed anew, is left to the host."""
        return self._own.can_sample(how) and not self._border

    def begin(self, slot: PagedSlot, token: int, how: Sampling, seed: int, passes: int) -> None:
        """See `SamplingEngine`."""
        with self._alone():
            self._own.begin(slot, token, how, seed, passes)

    def step(self) -> dict[PagedSlot, int]:
        """See `SamplingEngine`."""
        with self._alone(), self._on_device():
            return self._own.step()

    def end(self, slot: PagedSlot) -> None:
        """See `SamplingEngine`."""
        with self._alone():
            self._own.end(slot)

    def fed(self, slot: PagedSlot, token: int) -> None:
        """`token` is the next of those that the slot has computed by itself."""
        slot.tokens.append(token)
        if self._pool.computed(slot.table, slot.tokens):
            self.place_of(slot)  # the page may be another's now, with the same content, and its own be given away


def _rounded(rows: int) -> int:
    """Rows of the prompt pass that `rows` run in: few sizes, each made once."""
    unit = 8 if rows <= 64 else 64
    return min(-(-rows // unit) * unit, MAX_ROWS)


def open_cuda(
    checkpoint: Checkpoint,
    device: str = "cuda",
    activations: str = "fp32",
    dtype: str = "auto",
    context: int | None = None,
    max_sequences: int = 1,
    cache: str | Sequence[str] = AUTO_CACHE,
    state_cache: int | None = None,
) -> CudaEngine:
    """Opens a checkpoint of one of amq.runtime.families on a GPU.

    activations: `fp32`: products of `dtype` numbers, summed exactly in float32; or `int8`, rounded per group.
    dtype: float16 or bfloat16; `auto`: the checkpoint's own of the two, else float16.
    Raises Unsupported where the model or a setting is not for this engine, AmqError for a damaged checkpoint and where
    memory does not suffice.
    """
    record = checkpoint.record
    spec = read_spec(
        checkpoint.config, str(checkpoint.folder / "config.json"), {*checkpoint.other_names, *record.formats}
    )
    check_supported(spec, record.formats)
    check_state_cache(spec, checkpoint, state_cache)
    kinds = choose_kinds(cache, checkpoint, spec, "CUDA", CACHES, DEFAULT_CACHE)
    fixed, context, kind = context is not None, context_of(spec, context), _dtype(checkpoint, dtype)
    place = _numbered(torch.device(device))
    formats = "+".join(sorted(set(record.formats.values())))
    short = str(kind).removeprefix("torch.")
    banner = (
        f"CUDA engine ({checkpoint.config.get('model_type')}) on {_name(place)}: {formats}, {short} "
        f"{'rounded to int8' if activations == 'int8' else 'activations'}, {kinds_text(kinds)} cache"
    )
    capture = cuda_graph(place) if place.type == "cuda" else None
    many = _many(activations == "int8") if place.type == "cuda" else None
    try:
        with current(place):
            weights = CudaWeights(checkpoint, spec, context, place)
            if many is not None:
                warm([[weight] for weight in weights.of_many_rows()], kind, MAX_ROWS, out=torch.float32)
                empty_cache(place)  # of what preparing weights took
            return CudaEngine(
                weights, context, max_sequences, kind, activations == "int8", kinds, banner, capture, many,
                state_cache, fixed,
            )  # fmt: skip
    except Refused as error:
        raise Unsupported(f"the CUDA engine does not compute it: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise AmqError(
            f"{checkpoint.folder} does not fit {place} with a context of {context} and {max_sequences} sequences "
            f"({reason}): take fewer or shorter ones, or a model of fewer bits"
        ) from error


def _dtype(checkpoint: Checkpoint, asked: str) -> torch.dtype:
    config = checkpoint.config
    said = asked
    if asked == "auto":
        text = config.get("text_config") or {}
        said = str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float16")
        said = said if said in ("float16", "bfloat16") else "float16"
    if said not in ("float16", "bfloat16"):
        raise Unsupported(f"the CUDA engine multiplies float16 or bfloat16, not {asked}")
    return torch.float16 if said == "float16" else torch.bfloat16


def _numbered(device: torch.device) -> torch.device:
    """Which GPU `cuda` is: each thread has a current one of its own, and the engine may be used from others."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _spare(spec: DecoderSpec) -> int:
    """Bytes that passes take for a while: the largest weight in 16 bits and its products, and WORKSPACE."""
    sizes = [(2 * each.in_features + 4 * MAX_ROWS) * each.out_features for each in spec.parts(Linear)]
    return max(sizes) + WORKSPACE


def _name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)


def _many(int8: bool) -> Many:
    """Triton's kernels, for the rows of prompts: a gemm; from many rows on a dequantized weight and torch's product."""
    from amq.kernels import triton
    from amq.kernels.backends import quantize_activations

    def multiply(x: Tensor, weights: Sequence[PreparedWeight], y: Tensor) -> None:
        x = x.contiguous()
        if int8:  # as a decode step rounds it
            x = quantize_activations(x.float(), weights[0].group_size).to(x.dtype)
        if len(x) < triton.dense_rows():
            triton.linear_into(y, x, weights, None, triton.measured)
            return
        for weight, part in zip(weights, y.split([weight.out_features for weight in weights], -1), strict=True):
            # in float32, as all other sums: beyond 65504 float16 is infinite
            part.copy_(torch.mm(x, triton.dequantize(weight, x.dtype).T, out_dtype=torch.float32))

    return multiply
