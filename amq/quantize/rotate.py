"""Rounding of rotated weights: codes of W H for inputs H x (`amq.rotation`), where that lowers the error.

(W H)(H x) = W x, and the second moments of H x are H G H: any quantizer rounds W H for these as it rounds W for G.
Whether it pays differs between inputs: q, k, v and down gain 20 to 25 % of their output error on SmolLM2, gate and up
6 %, and a model whose weights lie on a grid already loses. `auto` tries both on a sample of rows, since rows do not
interact, and decides once for all linears that read one tensor, for they are multiplied in one call; likewise for the
experts of a layer and role. What counts are output errors (w − ŵ) G (w − ŵ)ᵀ, each as a share of w G wᵀ, summed over
linears: those in narrow formats, which have most to lose, decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.formats import FORMATS, NO_ROTATION, BitFormat
from amq.kernels.dense import dequantized
from amq.model.calibration import InputGroup
from amq.model.inventory import EXPERT, LinearSpec
from amq.model.settings import AUTO
from amq.model.token_weights import OutputMoments
from amq.packing import PackedWeight
from amq.quantize.quantizers import Quantizer
from amq.quantize.quantizers.grid import check_scales, out_of_range
from amq.quantize.shown import layer_role
from amq.rotation import WIDTH, check_width, divides, rotate

ROWS, LEAST = 64, 8
"""Rows that are tried of all linears that read one tensor, and at least of each of them."""
LINEARS, INPUTS = 16, 4
"""Linears of an input, and inputs of a layer of experts, that are tried, evenly spread."""

WeightOf = Callable[[LinearSpec], Tensor]
FormatsOf = Callable[[LinearSpec], Sequence[BitFormat]]


class Rotator:
    """What is decided of the inputs of one block, and the quantizer that follows it.

    setting: of `ROTATIONS`: `auto`, which needs `decide` before anything is quantized; `64` for all; `none`.
    quantize: what rounds. known: {linear: rotation}, decided by an earlier process. outputs: what a quantizer of
    `NEEDS_OUTPUTS` takes.
    """

    def __init__(
        self,
        setting: str,
        quantize: Quantizer,
        group_size: int,
        zero_points: str = "fractional",
        known: Mapping[str, int] | None = None,
        outputs: OutputMoments | None = None,
    ) -> None:
        self._outputs = outputs
        self._setting, self._quantize, self._how = setting, quantize, (group_size, zero_points)
        self._known, self._decided = known or {}, dict[str, int]()
        self._inputs: list[int] = []

    def decide(self, groups: Sequence[InputGroup], weight_of: WeightOf, formats_of: FormatsOf) -> None:
        """Decides for the linears of `groups`, all that are measured at once. formats_of: what each is judged by."""
        together: dict[str, list[InputGroup]] = {}
        for group in groups:
            together.setdefault(_key(group.linears[0]), []).append(group)
        for alike in together.values():
            specs = [spec for group in alike for spec in group.linears]
            found = next((r for r in map(self._found, specs) if r is not None), None)
            if found is None:
                found = WIDTH * self._pays(alike, weight_of, formats_of)
            self._decided |= dict.fromkeys(map(_key, specs), found)
            self._inputs += [found] * len(alike)

    def of(self, spec: LinearSpec) -> int:
        """The rotation of that linear's weight."""
        return self._found(spec) or 0

    def quantize(
        self, specs: Sequence[LinearSpec], weights: Sequence[Tensor], formats: Sequence[BitFormat], gram: Tensor | None
    ) -> list[dict[str, PackedWeight]]:
        """What the quantizer makes of `weights` of linears that share an input, rotated where that is decided."""
        rotation, group_size, name = self.of(specs[0]), self._how[0], specs[0].name
        outputs = None if self._outputs is None else [self._outputs.get(spec.name) for spec in specs]
        if not rotation:
            return self._round(name, weights, formats, gram, outputs)
        turned = [_rotated(weight) for weight in weights]
        for spec, weight in zip(specs, turned, strict=True):
            for fmt in formats:
                check_scales(spec.name, weight, fmt, group_size)
        made = self._round(name, turned, formats, None if gram is None else _both_sides(gram), outputs)
        return [{name: replace(packed, rotation=rotation) for name, packed in found.items()} for found in made]

    def _round(
        self,
        name: str,
        weights: Sequence[Tensor],
        formats: Sequence[BitFormat],
        gram: Tensor | None,
        outputs: Sequence[Tensor | None] | None = None,
    ) -> list[dict[str, PackedWeight]]:
        """As it is given. name: of a linear that reads this input, for errors. outputs: of `NEEDS_OUTPUTS`; a sample of
        rows has none."""
        group_size, zero_points = self._how
        more = {} if outputs is None else {"outputs": outputs}
        try:
            return self._quantize(weights, formats, group_size, gram, zero_points, **more)
        except AmqError as error:
            raise AmqError(f"{name}: {error}") from None

    @property
    def text(self) -> str:
        """`3 of 4 inputs rotated`, for a line of progress; empty where nothing may be."""
        if self._setting == NO_ROTATION or not self._inputs:
            return ""
        return f"{sum(map(bool, self._inputs))} of {len(self._inputs)} inputs rotated"

    def _found(self, spec: LinearSpec) -> int | None:
        """None before it is decided."""
        if self._setting != AUTO:
            return 0 if self._setting == NO_ROTATION else WIDTH
        return self._known.get(spec.name, self._decided.get(_key(spec)))

    def _pays(self, groups: Sequence[InputGroup], weight_of: WeightOf, formats_of: FormatsOf) -> bool:
        if not divides(groups[0].linears[0].in_features):
            return False
        gain = 0.0
        chosen = groups[:: -(-len(groups) // INPUTS)]
        for group in chosen:
            gain += self._gain(group, len(chosen), weight_of, formats_of)
        return gain > 0 and all(self._fits(weight_of(spec)) for group in groups for spec in group.linears)

    def _gain(self, group: InputGroup, inputs: int, weight_of: WeightOf, formats_of: FormatsOf) -> float:
        """Relative error as it is, less that of rotated weights, summed over a sample of the group's linears."""
        specs = group.linears[:: -(-len(group.linears) // LINEARS)]
        rows = max(LEAST, ROWS // (len(specs) * inputs))
        alike: dict[tuple[BitFormat, ...], list[Tensor]] = {}
        for spec in specs:
            weight = weight_of(spec)
            sample = weight[:: -(-len(weight) // rows)].float()
            alike.setdefault(tuple(formats_of(spec)), []).append(sample)
        gain, turned_gram = 0.0, _both_sides(group.gram)
        for formats, weights in alike.items():
            gain += self._error(specs[0].name, weights, formats, group.gram)
            gain -= self._error(specs[0].name, [_rotated(weight) for weight in weights], formats, turned_gram)
        return gain

    def _error(self, name: str, weights: Sequence[Tensor], formats: Sequence[BitFormat], gram: Tensor) -> float:
        """(w − ŵ) G (w − ŵ)ᵀ over w G wᵀ, both summed over the rows of a weight; the sum over weights and formats."""
        total = 0.0
        made = self._round(name, weights, formats, gram)
        for weight, results in zip(weights, made, strict=True):
            energy = max(_energy(weight, gram), 1e-30)
            total += sum(_energy(dequantized(results[f.name]).sub_(weight), gram) / energy for f in formats)
        return total

    def _fits(self, weight: Tensor) -> bool:
        """Whether its scales fit fp16 when it is rotated, in every format: they may be eight times what they were."""
        turned, by_levels = _rotated(weight), sorted(FORMATS.values(), key=lambda fmt: fmt.levels)
        return not any(out_of_range(turned, fmt, self._how[0]) for fmt in (by_levels[0], by_levels[-1]))


def check_widths(setting: str, linears: Sequence[LinearSpec]) -> None:
    """Raises AmqError where `64` is asked for and does not divide the inputs of one of `linears`."""
    for spec in linears if setting == str(WIDTH) else ():
        check_width(spec.in_features, spec.name)


def _key(spec: LinearSpec) -> str:
    """What is decided together with that linear, besides those that share its input."""
    return layer_role(spec) if spec.kind == EXPERT else spec.name


def _energy(rows: Tensor, gram: Tensor) -> float:
    return float((rows @ gram).mul_(rows).sum(dtype=torch.float64))


def _rotated(weight: Tensor) -> Tensor:
    """W H, float32 [rows, in_features], as a product: three times faster than the stages of `rotate`, whose last bits
    only the reader of a packed weight must have."""
    block = rotate(torch.eye(WIDTH, device=weight.device))
    return (weight.float().unflatten(1, (-1, WIDTH)) @ block).flatten(1)


def _both_sides(gram: Tensor) -> Tensor:
    """H G H, float32 [in_features, in_features]."""
    return _rotated(_rotated(gram).t())
