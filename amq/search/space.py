"""SearchSpace: which formats each linear may take, as vectors of small integers with exact sizes.

A variable is one linear, or several that are tied and share a format. Pinned linears have a single choice and are no
variables; those pinned to `16bit` are kept as they are in every configuration. A point is an int array [n_variables] of
indices into `formats` (cheapest first).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from amq.configuration import linear_bytes
from amq.errors import AmqError
from amq.formats import BitFormat, Kept
from amq.model.inventory import LinearSpec
from amq.util.records import shorten


@dataclass(frozen=True)
class SearchSpace:
    """linears: all of them, pinned ones included. formats: candidates, cheapest first. pinned: {linear: format
    name}."""

    linears: tuple[LinearSpec, ...]
    formats: tuple[BitFormat, ...]
    group_size: int
    pinned: Mapping[str, BitFormat | Kept]
    variables: tuple[tuple[LinearSpec, ...], ...]

    @staticmethod
    def build(
        linears: Sequence[LinearSpec],
        formats: Sequence[BitFormat],
        group_size: int,
        pinned: Mapping[str, BitFormat | Kept] | None = None,
        ties: Sequence[str] = (),
    ) -> SearchSpace:
        """ties: group names such as `qkv` or `gate_up`, see `tie_pattern`."""
        pinned = dict(pinned or {})
        free = [s for s in linears if s.name not in pinned]
        leaders: dict[str, LinearSpec] = {}
        for tie in ties:
            pattern = tie_pattern(tie)
            members = [s for s in free if pattern.fullmatch(s.role.rpartition(".")[2])]
            if not members:
                roles = ", ".join(sorted({s.role for s in linears}))
                raise AmqError(f"--tie {tie}: no linear to tie; this model's roles are {roles}")
            for spec in members:
                first = next(m for m in members if m.block == spec.block)
                leaders[spec.name] = first
        groups: dict[str, list[LinearSpec]] = {}
        for spec in free:
            groups.setdefault(leaders.get(spec.name, spec).name, []).append(spec)
        if not groups:
            raise AmqError("every linear is pinned: nothing is left to search")
        variables = tuple(tuple(g) for g in groups.values())
        return SearchSpace(tuple(linears), tuple(formats), group_size, pinned, variables)

    @property
    def numel(self) -> int:
        return sum(s.numel for s in self.linears)

    @property
    def kept(self) -> dict[str, str]:
        """{linear: `16bit`} of the linears that no configuration quantizes."""
        return {name: fmt.name for name, fmt in self.pinned.items() if isinstance(fmt, Kept)}

    @property
    def quantized(self) -> tuple[LinearSpec, ...]:
        kept = self.kept
        return tuple(s for s in self.linears if s.name not in kept)

    @property
    def format_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.formats)

    @cached_property
    def linear_sizes(self) -> dict[str, dict[str, int]]:
        """{linear: {format: stored bytes}}, in every format of a configuration: candidates and pinned ones."""
        by_name = {f.name: f for f in (*self.formats, *self.pinned.values())}
        return {s.name: {n: linear_bytes(s, f, self.group_size) for n, f in by_name.items()} for s in self.linears}

    @cached_property
    def sizes(self) -> np.ndarray:
        """Stored bytes, int64 [n_variables, n_formats]."""
        return np.array(
            [[sum(linear_bytes(s, f, self.group_size) for s in v) for f in self.formats] for v in self.variables]
        )

    @cached_property
    def pinned_bytes(self) -> int:
        return sum(linear_bytes(s, self.pinned[s.name], self.group_size) for s in self.linears if s.name in self.pinned)

    @property
    def log10_size(self) -> float:
        return len(self.variables) * math.log10(len(self.formats))

    @property
    def bits_range(self) -> tuple[float, float]:
        """Bits per weight of the smallest and the largest configuration."""
        low, high = self.sizes.min(axis=1).sum(), self.sizes.max(axis=1).sum()
        return self._bits(low), self._bits(high)

    def _bits(self, variable_bytes: float) -> float:
        return 8 * (float(variable_bytes) + self.pinned_bytes) / self.numel

    def bits(self, points: np.ndarray) -> np.ndarray:
        """Bits per weight of points [..., n_variables] → [...]."""
        chosen = np.take_along_axis(self.sizes[None], points.reshape(-1, len(self.variables), 1), axis=2)[..., 0]
        return (8 * (chosen.sum(axis=1) + self.pinned_bytes) / self.numel).reshape(points.shape[:-1])

    def capacity(self, bits_per_weight: float) -> float:
        """Bytes that the variables may take under a budget in bits per weight."""
        return bits_per_weight * self.numel / 8 - self.pinned_bytes

    def decode(self, point: np.ndarray) -> dict[str, str]:
        """A point → {linear: format name}, in the model's order."""
        chosen = {s.name: self.formats[i].name for v, i in zip(self.variables, point, strict=True) for s in v}
        return {s.name: self.pinned[s.name].name if s.name in self.pinned else chosen[s.name] for s in self.linears}

    def encode(self, formats: Mapping[str, str]) -> np.ndarray:
        """The inverse of `decode`."""
        index = {name: i for i, name in enumerate(self.format_names)}
        return np.array([index[formats[v[0].name]] for v in self.variables])

    def uniform(self, fmt: BitFormat) -> dict[str, str]:
        """Every linear in one format, pinned ones too unless they are kept: the baseline a search must beat."""
        return {**dict.fromkeys((s.name for s in self.linears), fmt.name), **self.kept}

    def bits_of(self, formats: Mapping[str, str]) -> float:
        """Bits per weight of any configuration of these linears."""
        return 8 * sum(self.linear_sizes[name][fmt] for name, fmt in formats.items()) / self.numel

    def check(self, formats: Mapping[str, str]) -> None:
        """Raises ValueError unless `formats` gives every linear, and no other, a format of this space."""
        sizes = self.linear_sizes
        for name in formats.keys() ^ sizes.keys():
            what = "names {}, which is not in the model" if name in formats else "lacks the linear {}"
            raise ValueError(f"the configuration {what.format(shorten(name))}")
        for name, fmt in formats.items():
            if fmt not in sizes[name]:
                known = ", ".join(sizes[name])
                raise ValueError(f"the configuration has {name} in {shorten(fmt)}: expected one of {known}")

    def variable_costs(self, table: Mapping[str, Mapping[str, float]]) -> np.ndarray:
        """A cost table {linear: {format: cost}} → float64 [n_variables, n_formats]; tied linears add up."""
        try:
            return np.array([[sum(table[s.name][f] for s in v) for f in self.format_names] for v in self.variables])
        except KeyError as missing:
            raise AmqError(f"the cost table lacks {missing}: measure it again for these linears and formats") from None


def tie_pattern(tie: str) -> re.Pattern[str]:
    """`qkv` → roles q, k, v, each alone or followed by `_…` (q_proj); `gate_up` → gate, up."""
    names = tie.split("_") if "_" in tie else list(tie)
    if not all(names):
        raise AmqError(f"--tie {tie!r}: expected names like qkv or gate_up")
    return re.compile("(" + "|".join(map(re.escape, names)) + ")(_.*)?")
