"""What llama.cpp has in another order or in other numbers than transformers, each with the way back.

Orders are int64 [rows]: which row of transformers' tensor comes next in the file. They are undone by writing rows to
where they came from. Numbers are a pair of functions; their shapes need no way back, a tensor is reshaped to what the
model has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amq.model.shape import kv_heads, need

Config = Mapping[str, Any]
BLOCK = 32
"""Codes of a packed weight that move together along its rows."""


@dataclass(frozen=True)
class Numbers:
    """make: of transformers' tensor the file's. unmake: numbers of the file's tensor, in any shape, as transformers has
    them."""

    make: Callable[[Tensor, Config], Tensor]
    unmake: Callable[[Tensor], Tensor] = lambda tensor: tensor


def _minus_exp(weight: Tensor, config: Config) -> Tensor:
    return -torch.exp(weight.float())


def _log_minus(weight: Tensor) -> Tensor:
    return torch.log(-weight)


PLUS_ONE = Numbers(lambda weight, config: weight.float() + 1, lambda weight: weight - 1)
FLAT_KERNEL = Numbers(lambda weight, config: weight.squeeze(1))
"""A depthwise convolution's [channels, 1, width]."""
VECTOR = Numbers(lambda weight, config: weight.reshape(-1))
COLUMN = Numbers(lambda weight, config: weight.float().unsqueeze(-1))
MINUS_EXP = Numbers(_minus_exp, _log_minus)
COLUMN_OF_MINUS_EXP = Numbers(lambda weight, config: _minus_exp(weight, config).unsqueeze(-1), _log_minus)
GROUPED_NORM = Numbers(
    lambda weight, config: weight.float().view(need(config, "mamba_n_groups", "n_groups"), -1),
)


def neox_order(heads: int, rows: int) -> Tensor:
    """Within each head, row i of the first half and row i of the second half become neighbours."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def query_rows(config: Config, rows: int) -> Tensor:
    return neox_order(need(config, "num_attention_heads"), rows)


def key_rows(config: Config, rows: int) -> Tensor:
    return neox_order(kv_heads(config) or 1, rows)


def value_order(config: Config, features: int) -> Tensor:
    """Heads of values of linear attention: those of one key are together in transformers, far apart in llama.cpp.

    features: of a head. Returns int64 [heads · features].
    """
    heads, keys = need(config, "linear_num_value_heads"), need(config, "linear_num_key_heads")
    return torch.arange(heads * features).view(keys, heads // keys, features).transpose(0, 1).reshape(-1)


def value_rows(config: Config, rows: int) -> Tensor:
    """Of a tensor whose rows are those heads."""
    return value_order(config, rows // need(config, "linear_num_value_heads"))


def query_key_value_rows(config: Config, rows: int) -> Tensor:
    """Of a tensor with the rows of queries and keys before them."""
    before = 2 * need(config, "linear_num_key_heads") * need(config, "linear_key_head_dim")
    values = before + value_order(config, need(config, "linear_value_head_dim"))
    return torch.cat([torch.arange(before), values])


def value_blocks(config: Config) -> Tensor:
    return value_order(config, need(config, "linear_value_head_dim") // BLOCK)


def _by_key_head(config: Config, rows: int) -> tuple[Tensor, int, int]:
    """(row numbers [key heads, rows of each], features of a key, features of its values): a projection of Qwen3-Next,
    which has query, key, values and gates of one key head together."""
    keys = need(config, "linear_num_key_heads")
    values = need(config, "linear_num_value_heads") // keys * need(config, "linear_value_head_dim")
    return torch.arange(rows).view(keys, -1), need(config, "linear_key_head_dim"), values


def joint_query_key_value(config: Config, rows: int) -> Tensor:
    """Queries of all heads, then keys, then values."""
    numbers, key, values = _by_key_head(config, rows)
    return torch.cat([part.reshape(-1) for part in numbers[:, : 2 * key + values].split([key, key, values], 1)])


def joint_gate(config: Config, rows: int) -> Tensor:
    numbers, _, values = _by_key_head(config, rows)
    return numbers[:, -values:].reshape(-1)


def part_of(index: int, count: int) -> Callable[[Config, int], Tensor]:
    """One of `count` parts of equal size that follow one another."""
    return lambda config, rows: torch.arange(rows).chunk(count)[index]
