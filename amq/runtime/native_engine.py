"""The engine for the Llama family on a CPU: one call of amq._cpu per pass, transformers not even imported.

The block of csrc/cpu/decoder.h is filled from config.json and the checkpoint's tensors (`describe`). What it cannot
compute exactly as transformers does is refused with `Unsupported`, and the caller takes another path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amq import native
from amq.backends import check_activations
from amq.checkpoint import Checkpoint, open_checkpoint
from amq.errors import AmqError
from amq.formats import get_format
from amq.native import cpu_module, empty_bytes, prepared_bytes
from amq.packing import PreparedWeight
from amq.runtime.engine import Segment, Slot
from amq.runtime.pages import PagePool

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s whose block decoder.h computes. Others look alike and differ in a detail: a scale, a norm, a layer
without rotary embedding."""
DEFAULT_CONTEXT = 8192
MAX_ROWS = 512
ALIGNMENT = 64
"""Of weights in memory: a cache line."""


class Unsupported(AmqError):
    """This model or setting is not for the native engine; the message says why."""


class PagedSlot(Slot):
    """pages: int32 numbers of its pages in the cache. tokens: all that were computed, or found there."""

    def __init__(self, capacity: int, pages: Sequence[int], tokens: Sequence[int]) -> None:
        super().__init__(capacity, len(tokens))
        self.pages, self.tokens = np.array(pages, np.int32), list(tokens)


class NativeEngine:
    """See `amq.runtime.engine.Engine`; made by `open_native`."""

    def __init__(
        self,
        model: Mapping[str, Any],
        banner: str,
        max_sequences: int,
        threads: int,
    ) -> None:
        self._keep = model["keep"]  # everything that the decoder holds the address of
        self.banner, self.max_sequences, self._threads = banner, max_sequences, threads
        self.vocab_size, self.context = model["sizes"]["vocabulary"], model["sizes"]["context"]
        self.max_rows = MAX_ROWS
        self.weight_bytes: int = model["weight_bytes"]
        self._decoder = cpu_module().Decoder(
            **{name: model[name] for name in ("sizes", "arrays", "blocks", "int8", "half_cache")},
            max_rows=MAX_ROWS,
            threads=threads,
        )
        page = cpu_module().PAGE
        self._pool = PagePool(max_sequences * -(-self.context // page), page)
        self.cache_bytes = self._pool.n_pages * self._decoder.page_bytes
        self._cache = empty_bytes(self.cache_bytes)  # a page takes memory once it is written to
        self._logits = torch.empty(max_sequences, self.vocab_size)
        self._open = 0
        self.isa = ""  # one of cpu_module().isas(), for tests; empty: AMQ_CPU_ISA or the best

    def open(self, prompt: Sequence[int], new_tokens: int) -> Slot | None:
        if not prompt:
            raise AmqError("a sequence must begin with at least one token")
        return self._open_slot(prompt, len(prompt) + new_tokens)

    def _open_slot(self, known: Sequence[int], positions: int) -> PagedSlot | None:
        """A slot of `positions` positions that starts with what an earlier sequence left of `known`."""
        if not 1 <= positions <= self.context:
            raise AmqError(f"a sequence can have 1 to {self.context} positions, this one wants {positions}")
        if self._open == self.max_sequences:
            return None
        taken = self._pool.take(known, positions)
        if taken is None:
            return None
        self._open += 1
        pages, length = taken
        return PagedSlot(len(pages) * self._pool.page, pages, known[:length])

    def close(self, slot: Slot) -> None:
        assert isinstance(slot, PagedSlot)
        if not len(slot.pages):
            raise AmqError("this slot is closed already")
        self._pool.give_back(slot.pages.tolist(), slot.tokens)
        slot.pages, slot.capacity = slot.pages[:0], 0
        self._open -= 1

    def cached_tokens(self) -> tuple[int, int]:
        return self._pool.used * self._pool.page, self._pool.n_pages * self._pool.page

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        wanted, rows = [], 0
        for segment in segments:
            rows += len(segment.tokens)
            if segment.logits:
                wanted.append(rows - 1)
        if len(wanted) > len(self._logits):
            raise AmqError(f"logits of {len(wanted)} segments are wanted, the engine has room for {len(self._logits)}")
        logits = self._logits[: len(wanted)]
        self._run(segments, wanted, logits)
        return logits

    def all_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits after every token of a text, float32 [len(tokens), vocab_size]: for perplexity, and for tests."""
        slot = self._open_slot((), len(tokens))
        if slot is None:
            raise AmqError("the engine has no room left: close a slot first")
        logits = torch.empty(len(tokens), self.vocab_size)
        try:
            for start in range(0, len(tokens), MAX_ROWS):
                part = tokens[start : start + MAX_ROWS]
                self._run([Segment(slot, part)], list(range(len(part))), logits[start : start + len(part)])
        finally:
            self.close(slot)
        return logits

    def _run(self, segments: Sequence[Segment], wanted: list[int], logits: Tensor) -> None:
        described, tokens = [], []
        for segment in segments:
            slot = segment.slot
            assert isinstance(slot, PagedSlot)
            if slot.length + len(segment.tokens) > slot.capacity:
                raise AmqError(f"the sequence has room for {slot.capacity} positions, not for more")
            tokens.extend(segment.tokens)
            described.append((len(segment.tokens), slot.length, slot.pages.ctypes.data, len(slot.pages)))
        numbers = np.array(tokens, np.int32)
        try:
            self._decoder.forward(
                numbers.ctypes.data, described, wanted, logits.data_ptr() if wanted else 0, self._cache.data_ptr(),
                self._pool.n_pages, self._threads, self.isa,
            )  # fmt: skip
        except ValueError as error:
            raise AmqError(str(error)) from error
        for segment in segments:
            segment.slot.tokens.extend(segment.tokens)
            segment.slot.length += len(segment.tokens)


def open_native(
    folder: Path,
    activations: str = "int8",
    context: int | None = None,
    max_sequences: int = 1,
    threads: int | None = None,
    cache: str | None = None,
    verify: bool = True,
) -> NativeEngine:
    """Opens a checkpoint of the Llama family.

    activations: `int8`, or `fp32` (exact).
    context: positions of a sequence; None: the model's, up to DEFAULT_CONTEXT.
    threads: None: torch's.
    cache: `float16` or `float32` keys and values; None: float32 where activations are exact.
    verify: compare the hash of every tensor.
    Raises Unsupported where the model or a setting is not for this engine, AmqError for a damaged checkpoint.
    """
    check_activations("cpu", activations)
    checkpoint = open_checkpoint(folder, verify=False)
    sizes = read_sizes(checkpoint.config, checkpoint.record.group_size, context)
    threads = threads or torch.get_num_threads()
    if verify:
        checkpoint.verify()
    model = describe(checkpoint, sizes)
    cache = cache or ("float32" if activations == "fp32" else "float16")
    if cache not in ("float16", "float32"):
        raise AmqError(f"the KV cache must be float16 or float32, got {cache}")
    model |= {"int8": activations == "int8", "half_cache": cache == "float16"}
    formats = "+".join(sorted(set(checkpoint.record.formats.values())))
    banner = (
        f"native engine ({checkpoint.config['model_type']}): {formats}, {activations} activations, {cache} cache, "
        f"{cpu_module().isa()}, {threads} threads, context {sizes['context']}"
    )
    return NativeEngine(model, banner, max_sequences, threads)


def read_sizes(config: Mapping[str, Any], group_size: int, context: int | None) -> dict[str, Any]:
    """The numbers of decoder.h's DecoderModel from config.json."""
    kind = config.get("model_type")
    if kind not in FAMILY:
        raise Unsupported(f"the native engine runs {', '.join(FAMILY)}, not {kind}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise Unsupported(f"the native engine has no activation {config['hidden_act']}")
    try:
        heads, hidden, longest = (
            config[key] for key in ("num_attention_heads", "hidden_size", "max_position_embeddings")
        )
        head_dim = config.get("head_dim") or hidden // heads
        sizes = {
            "hidden": hidden,
            "n_heads": heads,
            "n_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "intermediate": config["intermediate_size"],
            "vocabulary": config["vocab_size"],
            "context": min(longest, DEFAULT_CONTEXT),
            "group_size": group_size,
            "rotary": head_dim,
            "epsilon": config["rms_norm_eps"],
            "attention_scale": head_dim**-0.5,
        }
    except KeyError as error:
        raise Unsupported(f"config.json does not say {error.args[0]}") from None
    if head_dim % 16:
        raise Unsupported(f"the native engine wants heads of a multiple of 16 features, these have {head_dim}")
    if context is not None:
        if not 1 <= context <= longest:
            raise AmqError(f"the context must be 1 to {longest}, which the model was made for, got {context}")
        sizes["context"] = context
    return sizes


def rotary_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of features, float32 [head_dim / 2], and what cos and sin are multiplied by.

    All but the plain kind come from transformers, whose import takes seconds.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if theta is None:
        raise Unsupported("config.json does not say rope_theta")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise Unsupported("the native engine rotates whole heads, this model a part of each")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / theta**exponents, 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise Unsupported(f"the native engine has no rotary embedding of kind {kind}")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = AutoConfig.for_model(**{key: v for key, v in config.items() if key != "quantization_config"})
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](known, torch.device("cpu"))
    return frequencies, factor


def windows(config: Mapping[str, Any]) -> list[int]:
    """Positions that each layer's tokens see, 0 for all."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    kinds = config.get("layer_types")
    if kinds:
        if strange := set(kinds) - {"full_attention", "sliding_attention"}:
            raise Unsupported(f"the native engine has no layers of type {', '.join(sorted(strange))}")
        return [window if kind == "sliding_attention" else 0 for kind in kinds]
    if config["model_type"] == "mistral":
        return [window] * layers
    if config.get("use_sliding_window"):
        raise Unsupported("config.json does not say which layers have a sliding window (layer_types)")
    return [0] * layers


class _Weights:
    """Arrays and prepared weights of a checkpoint, as addresses, and a reference to each of them.

    Prepared weights lie one after another in one piece of memory, in the order in which they are asked for: on large
    pages, which single weights of a small model would not fill.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.formats = checkpoint, checkpoint.record.formats
        self._sizes = {name: self._prepared_bytes(name) for name in self.formats}
        self._memory = empty_bytes(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in self._sizes.values()))
        self._prepared: dict[str, PreparedWeight] = {}
        self.keep: list[Any] = []
        self.bytes = 0
        self.names = set(checkpoint.other_names)
        self._used: set[str] = set()  # of `names`

    def check_complete(self) -> None:
        """A linear or tensor that the block has no place for means that the model is another one than it seems."""
        if strange := sorted(set(self.formats) - set(self._prepared)):
            raise Unsupported(f"the native engine has no place for the linear {strange[0]}")
        if strange := sorted(self.names - self._used - {"lm_head.weight"}):  # a tied one may be stored all the same
            raise Unsupported(f"the native engine has no place for the tensor {strange[0]}")

    def _tensor(self, name: str) -> Tensor:
        if name not in self.names:
            raise Unsupported(f"the checkpoint has no {name}")
        self._used.add(name)
        return self.checkpoint.tensor(name)

    def vector(self, name: str) -> int:
        tensor = self._tensor(name).float().contiguous()
        self.keep.append(tensor)
        self.bytes += tensor.nbytes
        return tensor.data_ptr()

    def optional(self, name: str) -> int:
        return self.vector(name) if name in self.names else 0

    def _prepared_bytes(self, name: str) -> int:
        record = self.checkpoint.record
        return prepared_bytes(get_format(self.formats[name]), *record.shapes[name], record.group_size)

    def prepared(self, name: str) -> PreparedWeight:
        if name not in self.formats:
            raise Unsupported(f"the native engine wants all linears quantized, {name} is not")
        if name in self._prepared:  # the head, which an embedding is tied to
            return self._prepared[name]
        packed, size = self.checkpoint.packed(name), self._sizes[name]
        weight = PreparedWeight.of(packed, "cpu", native.prepare(packed, self._memory[:size]))
        self._memory = self._memory[-(-size // ALIGNMENT) * ALIGNMENT :]
        self.keep.append(weight.data)
        self.bytes += weight.data.numel()
        self._prepared[name] = weight
        return weight

    def projection(self, names: Sequence[str]) -> tuple[list[tuple[str, int, int, int]], int]:
        weights = [self.prepared(name) for name in names]
        biased = [f"{name}.bias" in self.names for name in names]
        bias = 0
        if any(biased):
            parts = [
                self._tensor(f"{name}.bias").float() if has else torch.zeros(weight.out_features)
                for name, weight, has in zip(names, weights, biased, strict=True)
            ]
            self.keep.append(torch.cat(parts))
            bias = self.keep[-1].data_ptr()
        return [(w.format.name, w.data.data_ptr(), w.data.numel(), w.out_features) for w in weights], bias

    def table(self, name: str) -> tuple[str, int, int]:
        """An embedding or a head: packed where it is quantized, else as the file has it."""
        linear = self.checkpoint.record.embedding.get(name, name)
        if linear in self.formats:
            weight = self.prepared(linear)
            return weight.format.name, weight.data.data_ptr(), weight.data.numel()
        tensor = self._tensor(f"{name}.weight").contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in ("float32", "float16", "bfloat16"):
            raise Unsupported(f"{name}.weight is {kind}")
        self.keep.append(tensor)
        return kind, tensor.data_ptr(), tensor.nbytes


def describe(checkpoint: Checkpoint, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What amq._cpu.Decoder is made from; `keep` is what it points to, `weight_bytes` what a decoded token reads."""
    config, weights = checkpoint.config, _Weights(checkpoint)
    frequencies, factor = rotary_frequencies(config, sizes["head_dim"])
    angles = torch.outer(torch.arange(sizes["context"]).float(), frequencies)
    cos, sin = (angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous()
    weights.keep += [cos, sin]
    blocks = []
    for layer, window in enumerate(windows(config)):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        blocks.append(
            {
                "attention_norm": weights.vector(f"{prefix}.input_layernorm.weight"),
                "mlp_norm": weights.vector(f"{prefix}.post_attention_layernorm.weight"),
                "q_norm": weights.optional(f"{attention}.q_norm.weight"),
                "k_norm": weights.optional(f"{attention}.k_norm.weight"),
                "qkv": weights.projection([f"{attention}.{role}_proj" for role in "qkv"]),
                "o": weights.projection([f"{attention}.o_proj"]),
                "gate_up": weights.projection([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
                "down": weights.projection([f"{mlp}.down_proj"]),
                "window": window,
            }
        )
    tied = bool(config.get("tie_word_embeddings"))
    head = weights.table("model.embed_tokens" if tied and "lm_head" not in weights.formats else "lm_head")
    embedding = weights.table("model.embed_tokens")
    arrays = {
        "cos": cos.data_ptr(),
        "sin": sin.data_ptr(),
        "final_norm": weights.vector("model.norm.weight"),
        "embedding": embedding,
        "head": head,
    }
    read = weights.bytes + (head[2] if head[0] in ("float32", "float16", "bfloat16") else 0)
    weights.check_complete()
    return {"sizes": dict(sizes), "arrays": arrays, "blocks": blocks, "keep": weights.keep, "weight_bytes": read}
