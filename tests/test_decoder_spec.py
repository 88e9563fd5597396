"""What the module refuses of a DecoderSpec before it computes. No family makes it: it would read or write elsewhere, or
give numbers that depend on threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.random_specs import project

from amq.kernels.cpu import NO_MEMORY, cpu_module, memory
from amq.runtime.decoder_spec import (
    RELU2,
    Array,
    Attention,
    DecoderSpec,
    DeltaNet,
    Heads,
    Linear,
    Mixture,
    Mlp,
    Operator,
    PerLayerInput,
    Rope,
    Router,
    ShortConv,
    Step,
    Table,
)

HIDDEN, VOCABULARY, CONTEXT, EXPERTS = 32, 20, 64, 4

ATTENTION = Attention(2, 1, 16, project(HIDDEN, q=32, k=16, v=16), project(32, o=HIDDEN), 0.25)
DELTA = DeltaNet(
    1, 2, 16, 16, 3, project(HIDDEN, delta=100), project(32, delta_out=HIDDEN), Heads(0, 16), Heads(16, 16),
    Heads(32, 32), Heads(64, 32), Heads(96, 2), Heads(98, 2), Array("convolution", (3, 64)), Array("rate", (2,)),
    Array("dt_bias", (2,)), Array("delta_norm", (16,)),
)  # fmt: skip
CONV = ShortConv(3, project(HIDDEN, bcx=96), project(32, conv_out=HIDDEN), Array("kernel", (3, 32)))
MLP = Mlp(project(HIDDEN, gate=24, up=24), project(24, down=HIDDEN))
FUSED = Mlp(project(HIDDEN, gate_up=48), project(24, down=HIDDEN))
MIXTURE = Mixture(Router(Linear("router", EXPERTS, HIDDEN), 2), (MLP,) * EXPERTS)
TWO = project(32, one=16, two=16)
"""Two linears in the place of an operator's last one."""


def spec_of(*ops: Operator, ropes: Sequence[Rope] = ()) -> DecoderSpec:
    return DecoderSpec(
        HIDDEN, VOCABULARY, CONTEXT, 1e-6, Table("embedding", VOCABULARY, HIDDEN), Table("head", VOCABULARY, HIDDEN),
        Array("norm", (HIDDEN,)), tuple(Step(op) for op in ops), tuple(ropes),
    )  # fmt: skip


class Model:
    """Everything that a spec names, of float32 numbers."""

    def __init__(self, spec: DecoderSpec) -> None:
        shapes: dict[str, Sequence[int]] = {array.key: array.shape for array in spec.parts(Array)}
        shapes |= {each.name: (each.out_features, each.in_features) for each in spec.parts(Linear)}
        shapes |= {table.name: (table.rows, table.columns) for table in spec.parts(Table)}
        for index, rope in enumerate(spec.ropes):
            shapes |= {f"rope.{index}.{name}": (CONTEXT, rope.rotary // 2) for name in ("cos", "sin")}
        self.tensors = {name: torch.ones(tuple(shape)) for name, shape in shapes.items()}
        held = {name: ("float32", memory(tensor), NO_MEMORY, NO_MEMORY, 0) for name, tensor in self.tensors.items()}
        self.decoder = cpu_module().Decoder(
            spec=spec, weights=held, context=CONTEXT, group_size=32, int8=False, cache="float32", max_rows=8, threads=2
        )


OPERATORS: dict[str, Operator] = {
    "attention": ATTENTION,
    "delta": DELTA,
    "conv": CONV,
    "mlp": MLP,
    "fused": FUSED,
    "mixture": MIXTURE,
}
UP_ALONE = Mlp(project(HIDDEN, up=24), project(24, down=HIDDEN), RELU2)


def changed(op: Operator, **fields: Any) -> Any:
    return replace(op, **fields)


def routed(**fields: Any) -> Any:
    return replace(MIXTURE, router=replace(MIXTURE.router, **fields))


WRONG: dict[str, tuple[Operator, str]] = {
    "attention-last": (changed(ATTENTION, o=TWO), "o: expected one linear, got 2"),
    "delta-last": (changed(DELTA, out=TWO), "out: expected one linear, got 2"),
    "conv-last": (changed(CONV, out=TWO), "out: expected one linear, got 2"),
    "mlp-last": (changed(MLP, down=project(24, one=16, two=16)), "down: expected one linear, got 2"),
    "delta-convolution": (changed(DELTA, convolution=None), "convolution: expected an array"),
    "delta-rate": (changed(DELTA, rate=None), "rate: expected an array"),
    "delta-dt_bias": (changed(DELTA, dt_bias=None), "dt_bias: expected an array"),
    "delta-norm": (changed(DELTA, norm=None), "norm: expected an array"),
    "delta-heads": (changed(DELTA, a=Heads(99, 2)), "a: expected heads within 100 features, got 101"),
    "conv-convolution": (changed(CONV, convolution=None), "convolution: expected an array"),
    "experts": (changed(MIXTURE, experts=(*(MLP,) * 3, UP_ALONE)), "experts: expected one shape"),
    "fewer experts": (changed(MIXTURE, experts=(MLP,) * 3), "experts: expected 4, as the router scores, got 3"),
    "halves": (changed(MIXTURE, experts=(FUSED,) * EXPERTS), "in_: expected .* a multiple of 16 each, got 24"),
    "shared halves": (changed(MIXTURE, shared=FUSED), "in_: expected .* a multiple of 16 each, got 24"),
    "groups of one": (routed(groups=4, top_groups=2), "groups: expected of two experts at least"),
    "too many chosen": (routed(groups=2, top_k=3), "top_k: expected at most .*, 2, got 3"),
    "no embedding": (PerLayerInput(project(HIDDEN, a=8), project(8, b=HIDDEN), 0), "per_layer: a step reads it"),
    "a rope that is not there": (changed(ATTENTION, rope=1), "rope: expected below 1, got 1"),
    "a rope for larger heads": (changed(ATTENTION, rope=0), "rotary: expected at most head_dim 16, got 32"),
    "a later cache": (changed(ATTENTION, cache_of=0, qkv=project(HIDDEN, q=32)), "cache_of: expected an earlier step"),
    "no number": (changed(ATTENTION, scale="large"), "scale: expected a value .* got 'large'"),
    "beyond 64 bits": (changed(ATTENTION, window=1 << 70), f"window: expected a value .* got {1 << 70}"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_a_spec_that_fits_is_taken(name: str) -> None:
    assert Model(spec_of(OPERATORS[name])).decoder.page_bytes == (name == "attention") * 64 * 2 * 16 * 4


@pytest.mark.parametrize("name", WRONG)
def test_a_spec_that_does_not_fit_is_refused(name: str) -> None:
    op, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Model(spec_of(op, ropes=[Rope(32, torch.ones(16))]))


def test_a_state_is_of_one_sequence_or_snapshot() -> None:
    """Threads write states side by side."""
    model = Model(spec_of(CONV))
    tokens, logits, states = torch.zeros(4, dtype=torch.int32), torch.zeros(VOCABULARY), torch.zeros(4, 64)

    def run(*segments: tuple[int, Sequence[tuple[int, int]]]) -> None:
        described: list[Any] = [(2, 0, NO_MEMORY, False, state, list(shots)) for state, shots in segments]
        model.decoder.forward(memory(tokens), described, [0], memory(logits), NO_MEMORY, memory(states), 2)

    run((0, [(1, 2)]), (1, [(1, 3)]))
    assert logits.isfinite().all()
    wrong: list[list[tuple[int, Sequence[tuple[int, int]]]]] = [
        [(1, []), (1, [])], [(1, [(1, 1)])], [(0, [(1, 1)]), (1, [])], [(0, [(1, 2)]), (1, [(2, 2)])],
        [(0, [(1, 2), (2, 2)])],
    ]  # fmt: skip
    for segments in wrong:
        with pytest.raises(ValueError, match="state"):
            run(*segments)
