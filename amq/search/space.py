"""SearchSpace: which formats each weight may take, as vectors of small integers with exact sizes.

A variable is one weight, or several that are tied and share a format, as the experts of a layer and role do unless they
are untied. Linears of the blocks choose among the candidate formats; head and embeddings, where they are searched, also
among wider ones and their own 16 bits. Pinned weights have a single choice and are no variables; those pinned to
`16bit` are kept as they are in every configuration. A point is an int array [n_variables], each an index into the
choices of its variable (cheapest first).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from amq.configuration import linear_bytes, parse_pins
from amq.errors import AmqError
from amq.formats import FORMATS, KEPT, BitFormat, Kept, get_format
from amq.model.inventory import EMBEDDING, EXPERT, HEAD, Inventory, LinearSpec
from amq.model.settings import AUTO
from amq.search.settings import SearchSettings
from amq.util.records import shorten

Choice = BitFormat | Kept
WIDER = ("int6", "int8")
"""What head and embeddings may take besides the candidates of the linears and their own 16 bits."""


@dataclass(frozen=True)
class SearchSpace:
    """weights: all that a configuration names, pinned ones included: the blocks' linears, then head and embeddings
    where they are searched. formats: candidates of the linears, cheapest first. pinned: {weight: format}."""

    weights: tuple[LinearSpec, ...]
    formats: tuple[BitFormat, ...]
    group_size: int
    pinned: Mapping[str, Choice]
    variables: tuple[tuple[LinearSpec, ...], ...]

    @staticmethod
    def of(inventory: Inventory, settings: SearchSettings) -> SearchSpace:
        """The space of a search: with head and embeddings unless `--head 16bit` leaves them out."""
        outer = () if settings.head == KEPT.name else inventory.outer
        weights = (*inventory.linears, *outer)
        pinned: dict[str, Choice] = {}
        if settings.head not in (AUTO, KEPT.name):
            pinned = dict.fromkeys((s.name for s in outer), get_format(settings.head))
        pinned |= parse_pins(settings.pin, weights)
        return SearchSpace.build(
            weights, settings.bit_formats, settings.group_size, pinned, settings.ties, settings.untied
        )

    @staticmethod
    def build(
        weights: Sequence[LinearSpec],
        formats: Sequence[BitFormat],
        group_size: int,
        pinned: Mapping[str, Choice] | None = None,
        ties: Sequence[str] = (),
        untied: bool = False,
    ) -> SearchSpace:
        """ties: group names such as `qkv` or `gate_up`, see `tie_pattern`. untied: each expert has its own format."""
        pinned = dict(pinned or {})
        free = [s for s in weights if s.name not in pinned]
        patterns = {tie: tie_pattern(tie) for tie in ties}
        for tie, pattern in patterns.items():
            if not any(pattern.fullmatch(s.role.rpartition(".")[2]) for s in free):
                roles = ", ".join(sorted({s.role for s in weights}))
                raise AmqError(f"--tie {tie}: no linear to tie; this model's roles are {roles}")
        groups: dict[object, list[LinearSpec]] = {}
        for spec in free:
            groups.setdefault(_tied_with(spec, patterns, untied), []).append(spec)
        if not groups:
            raise AmqError("every linear is pinned: nothing is left to search")
        variables = tuple(tuple(g) for g in groups.values())
        return SearchSpace(tuple(weights), tuple(formats), group_size, pinned, variables)

    @property
    def numel(self) -> int:
        return sum(s.numel for s in self.weights)

    @property
    def outer(self) -> tuple[LinearSpec, ...]:
        """The head and embeddings that a configuration names."""
        return tuple(s for s in self.weights if is_outer(s))

    @property
    def kept(self) -> dict[str, str]:
        """{weight: `16bit`} of those that no configuration quantizes."""
        return {name: fmt.name for name, fmt in self.pinned.items() if isinstance(fmt, Kept)}

    @property
    def quantized(self) -> tuple[LinearSpec, ...]:
        kept = self.kept
        return tuple(s for s in self.weights if s.name not in kept)

    @property
    def format_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.formats)

    @cached_property
    def _wide(self) -> tuple[Choice, ...]:
        """The choices of head and embeddings."""
        found: set[BitFormat] = {*self.formats, *(FORMATS[name] for name in WIDER)}
        return (*sorted(found, key=lambda f: f.code_bits), KEPT)

    @cached_property
    def choices(self) -> tuple[tuple[Choice, ...], ...]:
        """Of each variable, cheapest first."""
        return tuple(self._wide if is_outer(v[0]) else self.formats for v in self.variables)

    @cached_property
    def counts(self) -> np.ndarray:
        """Choices of each variable, int64 [n_variables]: points are below them."""
        return np.array([len(c) for c in self.choices])

    def formats_of(self, spec: LinearSpec) -> tuple[Choice, ...]:
        """Every format that `spec` may have in a configuration: a linear also those that others are pinned to."""
        if is_outer(spec):
            return (self.pinned[spec.name],) if spec.name in self.pinned else self._wide
        return self._of_linears

    @cached_property
    def _of_linears(self) -> tuple[Choice, ...]:
        pins = (self.pinned[s.name] for s in self.weights if s.name in self.pinned and not is_outer(s))
        return tuple(dict.fromkeys((*self.formats, *pins)))

    @cached_property
    def weight_sizes(self) -> dict[str, dict[str, int]]:
        """{weight: {format: stored bytes}}, in every format that it may have in a configuration."""
        return {s.name: {f.name: linear_bytes(s, f, self.group_size) for f in self.formats_of(s)} for s in self.weights}

    @cached_property
    def sizes(self) -> np.ndarray:
        """Stored bytes, int64 [n_variables, most choices]; a variable with fewer repeats its last."""
        rows = [
            [sum(linear_bytes(s, f, self.group_size) for s in v) for f in choices]
            for v, choices in zip(self.variables, self.choices, strict=True)
        ]
        most = int(self.counts.max())
        return np.array([[*row, *[row[-1]] * (most - len(row))] for row in rows])

    @cached_property
    def pinned_bytes(self) -> int:
        return sum(linear_bytes(s, self.pinned[s.name], self.group_size) for s in self.weights if s.name in self.pinned)

    @property
    def log10_size(self) -> float:
        return float(np.log10(self.counts).sum())

    def widest(self, names: Iterable[str]) -> dict[str, Choice]:
        """{weight: its last choice} of those called `names` that are no pinned ones."""
        wanted = set(names)
        pairs = zip(self.variables, self.choices, strict=True)
        return {s.name: choices[-1] for v, choices in pairs for s in v if s.name in wanted}

    @property
    def smallest(self) -> np.ndarray:
        """The point with every variable at its first choice."""
        return np.zeros(len(self.variables), dtype=int)

    @property
    def largest(self) -> np.ndarray:
        """The point with every variable at its last choice: head and embeddings, where they are searched, in 16
        bits."""
        return self.counts - 1

    @property
    def bits_range(self) -> tuple[float, float]:
        """Bits per weight of the smallest and the largest configuration."""
        return self._bits_at(self.smallest), self._bits_at(self.largest)

    @property
    def front_range(self) -> tuple[float, float]:
        """`bits_range` up to the largest configuration that keeps no variable in 16 bits: where there is a choice to
        speak of, and where points of the front are looked for."""
        kept = np.array([isinstance(c[-1], Kept) for c in self.choices])
        return self._bits_at(self.smallest), self._bits_at(self.largest - kept)

    def _bits_at(self, point: np.ndarray) -> float:
        return float(self.bits(point))

    def bits(self, points: np.ndarray) -> np.ndarray:
        """Bits per weight of points [..., n_variables] → [...]."""
        chosen = np.take_along_axis(self.sizes[None], points.reshape(-1, len(self.variables), 1), axis=2)[..., 0]
        return (8 * (chosen.sum(axis=1) + self.pinned_bytes) / self.numel).reshape(points.shape[:-1])

    def capacity(self, bits_per_weight: float) -> float:
        """Bytes that the variables may take under a budget in bits per weight."""
        return bits_per_weight * self.numel / 8 - self.pinned_bytes

    def decode(self, point: np.ndarray) -> dict[str, str]:
        """A point → {weight: format name}, in the model's order."""
        chosen = {
            s.name: choices[i].name
            for v, choices, i in zip(self.variables, self.choices, point, strict=True)
            for s in v
        }
        return {s.name: self.pinned[s.name].name if s.name in self.pinned else chosen[s.name] for s in self.weights}

    def encode(self, formats: Mapping[str, str]) -> np.ndarray:
        """The inverse of `decode`."""
        indices = {choices: {f.name: i for i, f in enumerate(choices)} for choices in set(self.choices)}
        return np.array([indices[c][formats[v[0].name]] for v, c in zip(self.variables, self.choices, strict=True)])

    def uniform(self, fmt: BitFormat) -> dict[str, str]:
        """Everything in one format, pinned linears too unless they are kept: the baseline a search must beat.

        A head or embedding that is pinned stays so: it is the same in all that is compared.
        """
        stays = {s.name: self.pinned[s.name].name for s in self.outer if s.name in self.pinned}
        return {**dict.fromkeys((s.name for s in self.weights), fmt.name), **stays, **self.kept}

    def bits_of(self, formats: Mapping[str, str]) -> float:
        """Bits per weight of any configuration of these weights."""
        return 8 * sum(self.weight_sizes[name][fmt] for name, fmt in formats.items()) / self.numel

    def bits_of_linears(self, formats: Mapping[str, str]) -> float:
        """`bits_of` without head and embeddings."""
        linears = [s for s in self.weights if not is_outer(s)]
        return 8 * sum(self.weight_sizes[s.name][formats[s.name]] for s in linears) / sum(s.numel for s in linears)

    def check(self, formats: Mapping[str, str]) -> None:
        """Raises ValueError unless `formats` gives every weight, and no other, a format of this space."""
        sizes = self.weight_sizes
        for name in formats.keys() ^ sizes.keys():
            what = "names {}, which is not in the model" if name in formats else "lacks the linear {}"
            raise ValueError(f"the configuration {what.format(shorten(name))}")
        for name, fmt in formats.items():
            if fmt not in sizes[name]:
                known = ", ".join(sizes[name])
                raise ValueError(f"the configuration has {name} in {shorten(fmt)}: expected one of {known}")

    def variable_costs(self, table: Mapping[str, Mapping[str, float]]) -> np.ndarray:
        """A cost table {weight: {format: cost}} → float64 [n_variables, most choices]; tied weights add up.

        16 bits cost nothing; where a variable has fewer choices, the rest is infinite.
        """
        costs = np.full((len(self.variables), int(self.counts.max())), np.inf)
        try:
            for row, v, choices in zip(costs, self.variables, self.choices, strict=True):
                row[: len(choices)] = [0.0 if f is KEPT else sum(table[s.name][f.name] for s in v) for f in choices]
        except KeyError as missing:
            raise AmqError(f"the cost table lacks {missing}: measure it again for these linears and formats") from None
        return costs

    def pinned_cost(self, table: Mapping[str, Mapping[str, float]]) -> float:
        """The summed cost of what is pinned: in every configuration the same."""
        kept = self.kept
        return sum(table[name][fmt.name] for name, fmt in self.pinned.items() if name not in kept)


def is_outer(spec: LinearSpec) -> bool:
    """Whether it is a head or an embedding."""
    return spec.kind in (HEAD, EMBEDDING)


def _tied_with(spec: LinearSpec, patterns: Mapping[str, re.Pattern[str]], untied: bool) -> object:
    """Equal for weights that share a format: of one block and parent, in one tie or experts of one role."""
    parent, _, last = spec.role.rpartition(".")
    tied = [tie for tie, pattern in patterns.items() if pattern.fullmatch(last)]
    if is_outer(spec) or not (tied or spec.kind == EXPERT):
        return spec.name
    return spec.block, parent, tied[-1] if tied else last, spec.expert if untied else None


def tie_pattern(tie: str) -> re.Pattern[str]:
    """`qkv` → roles q, k, v, each alone or followed by `_…` (q_proj); `gate_up` → gate, up."""
    names = tie.split("_") if "_" in tie else list(tie)
    if not all(names):
        raise AmqError(f"--tie {tie!r}: expected names like qkv or gate_up")
    return re.compile("(" + "|".join(map(re.escape, names)) + ")(_.*)?")
