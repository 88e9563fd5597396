"""Which attention a model of transformers runs with, and one of ours for steps of one token over a static cache.

transformers' own sdpa of a masked step copies keys and values for every query head (in 5.14, no more in 5.24), and
torch's kernel for it gives each head to one block of threads, however many positions it has: eight blocks on a GPU of a
hundred processors. Here the queries of a group are rows of one product, and positions are split into chunks that
run side by side, whose results are weighed by what their softmax would have been divided by (flash decoding). Keys and
values are views of the cache throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from amq.errors import AmqError
from amq.runtime.trial import REFUSALS, differ, exact_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "amq_decode"
"""Of our attention, among those of transformers."""
CHUNK = 256
"""Positions that one block of threads reads: with eight heads of keys 8192 positions are 256 blocks."""
SPLIT = 4 * CHUNK
"""Positions from which on they are split: a block is through with fewer in about the time of the four launches that it
takes to weigh the chunks' results (on paper)."""
HIDDEN = -30000.0
"""Added to the scores of what is not seen: its exponential is 0 in float32, also where scores are thousands apart. Not
−∞, nor the lowest number of a dtype, which becomes −∞ where a kernel takes powers of 2: a chunk of positions may have
nothing to see, and then its weight is 0, but its result must be a number."""
OTHER_SCORES = ("softcap", "s_aux", "position_bias")
"""Arguments of an attention that changes its scores before the softmax: left to transformers."""
SHORT_TEXT = 8


def attention_of(model: PreTrainedModel) -> str:
    """The name that transformers gives it, such as `sdpa` or `eager`."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def choose_attention(model: PreTrainedModel) -> None:
    """Switches a model from transformers' eager attention to sdpa, where it has both and gets the same logits.

    One that caps its scores (Gemma 2) is switched the other way: sdpa refuses to or, in transformers 5.14, which
    chooses it for such a model, leaves the cap out.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        if attention_of(model) == "sdpa":
            model.set_attn_implementation("eager")
        return
    if attention_of(model) != "eager" or not getattr(model, "_supports_sdpa", False):
        return
    text = torch.arange(min(SHORT_TEXT, config.vocab_size), device=model.device)[None]
    try:
        with torch.inference_mode(), exact_activations(model):
            expected = model(input_ids=text, use_cache=False).logits
            model.set_attn_implementation("sdpa")
            agrees = not differ(model(input_ids=text, use_cache=False).logits, expected)
    except AmqError:  # of a quantized linear
        raise
    except REFUSALS:
        agrees = False
    if not agrees:
        model.set_attn_implementation("eager")


def register() -> str:
    """Makes our attention known to transformers; returns its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, _decode_mask)
    return NAME


def _decode_mask(*, q_length: int, dtype: torch.dtype, **options: Any) -> Tensor | None:
    """A mask as sdpa's; for one token what is added to the scores, made once for all layers."""
    from transformers.masking_utils import sdpa_mask

    seen = sdpa_mask(q_length=q_length, dtype=dtype, **options)
    return seen if seen is None or q_length > 1 else bias(seen, dtype)


def bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Of bool, what is added to scores: 0 where `seen`, else HIDDEN."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, HIDDEN)


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers calls attention: query [sequences, heads, n, features], key and value [sequences, key heads,
    positions, features] → ([sequences, n, heads, features], None). Ours where n is 1 and a bias is given."""
    plain = not any(options.get(name) is not None for name in OTHER_SCORES) and key.shape[-1] == value.shape[-1]
    mask = attention_mask
    if plain and query.shape[2] == 1 and mask is not None and mask.dtype == query.dtype and mask.shape[1] == 1:
        found = flash_decode(query, key, value, mask, scaling)
        return found.transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found, weights = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
    )
    return found, weights


def flash_decode(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """query [sequences, heads, 1, features], key and value [sequences, key heads, positions, features] of the same
    features, bias [sequences or 1, 1, 1, positions] → [sequences, heads, 1, features].

    A result differs from that of one softmax by roundings of float32 and one of each chunk's to the dtype of `value`,
    of which it is a mean: at most one unit of its largest element.
    """
    sequences, heads, _, features = query.shape
    shared, positions = key.shape[1], key.shape[2]
    group, rows = heads // shared, sequences * shared
    kernel = KERNELS.get(query.device.type)
    chunks = positions // CHUNK if kernel is not None and positions >= SPLIT and positions % CHUNK == 0 else 1

    def chunked(tensor: Tensor) -> Tensor:
        """[chunks, sequences · key heads, positions of one, features]; a view, or an error."""
        parts = tensor.unflatten(2, (chunks, -1)).permute(2, 0, 1, 3, 4)
        return parts.view(chunks, rows, positions // chunks, features)

    queries = query.reshape(1, rows, group, features).expand(chunks, -1, -1, -1)
    added = bias.expand(sequences, -1, -1, -1).view(sequences, chunks, 1, -1).transpose(0, 1)
    added = added.expand(-1, -1, shared, -1).reshape(chunks, rows, 1, -1).expand(-1, -1, group, -1)
    if chunks == 1 or kernel is None:
        found = scaled_dot_product_attention(queries, chunked(key), chunked(value), attn_mask=added, scale=scale)
    else:
        parts, logsumexp = kernel(queries, chunked(key), chunked(value), added, scale)
        weights = logsumexp[..., :group].softmax(0)[..., None]  # of the chunks; a kernel may pad the rows
        found = (parts * weights).sum(0).to(value.dtype)
    return found.reshape(sequences, heads, 1, features)


Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
"""(query, key, value, bias, scale) → (result, natural logarithm of the softmax's denominator, float32)."""


def _on_cuda(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
    return found[0], found[1]


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found: tuple[Tensor, Tensor] = attend(query, key, value, attn_mask=bias, scale=scale)
    return found


KERNELS: dict[str, Kernel] = {"cuda": _on_cuda, "cpu": _on_cpu}
"""torch's public function does not say the denominator; these, which it calls, do."""
