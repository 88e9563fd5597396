"""DeltaNet and short convolutions of kernels/cuda on the shim: against the CPU engine and float64, and to the bit
however texts are cut into passes and whatever lies beside them.

AMQ_TEST_CUDA_LIBRARY names another build: test_cuda_sanitizers.py runs parts of this file that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cuda_shim.build import chosen_build
from helpers.state_models import EPSILON, OPERATORS, Model, delta_net, model, text
from torch import Tensor

from amq.errors import AmqError
from amq.kernels import cuda
from amq.kernels.cuda_calls import KINDS, Call, DeltaCall, ShortConvCall
from amq.runtime.decoder_spec import DeltaNet, Heads

STATES, FIRST = 6, 4
"""States of a pool; floats of other steps before this one's part of each."""
EPS = torch.finfo(torch.float32).eps
WIDE = {
    "delta-of-a-9b": delta_net(4, 1, 2, 128, 128, fused=False),
    "delta-wide-keys": delta_net(4, 1, 2, 160, 16, fused=True),
    "delta-wide-values": delta_net(5, 1, 1, 16, 176, fused=False),
}
"""A real model's head; S that stays in memory; more columns than a block has at a time."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda.Library:
    return cuda.Library(chosen_build(tmp_path_factory.mktemp("shim")))


@cache
def wide_model(name: str) -> Model:
    return Model(WIDE[name])


def any_model(name: str) -> Model:
    return model(name) if name in OPERATORS else wide_model(name)


every_operator = pytest.mark.parametrize("name", [*OPERATORS, *WIDE])
Part = tuple[int, int, int, bool]
"""First row and rows of a segment, its state, whether it begins."""


def floats_of(made: Model) -> int:
    """Of a state in a pool: a multiple of 16 bytes."""
    return FIRST + -(-made.decoder.state_floats // 4) * 4


def pool(made: Model) -> Tensor:
    return torch.full((STATES, floats_of(made)), torch.nan)


def heads(places: Heads) -> dict[str, int]:
    return {"first": places.first, "stride": places.stride}


def call_of(made: Model, inputs: Tensor, parts: Sequence[Part], states: Tensor, out: Tensor) -> Call:
    """All of it lies beside memory that is not a number: rows of the input, of the output and of what is between."""
    op, t = made.op, made.tensors
    first, count, state, begins = (torch.tensor(each, dtype=torch.int32) for each in zip(*parts, strict=True))
    fields: dict[str, Any] = {
        "segments": {"n": len(parts), "longest": int(count.max()), "first": first, "count": count, "state": state,
                     "begins": begins},
        "kernel": op.kernel, "out_kind": KINDS[out.dtype], "in_": inputs, "in_stride": inputs.stride(0),
        "convolution": t["convolution"], "states": states, "state_floats": states.shape[1], "state_offset": FIRST,
        "out": out, "out_stride": out.stride(0),
    }  # fmt: skip
    if not isinstance(op, DeltaNet):
        width = t["convolution"].shape[1]
        return Call(ShortConvCall, {**fields, "channels": width, "bias": t.get("bias")})
    width = t["convolution"].shape[1] + 2 * op.n_value_heads
    mixed = torch.full((len(inputs), -(-width // 4) * 4), torch.nan)
    sizes = {name: getattr(op, name) for name in ("n_key_heads", "n_value_heads", "key_dim", "value_dim")}
    places = {name: heads(getattr(op, name)) for name in "qkvzba"}
    weights = {"rate": t["rate"], "dt_bias": t["dt_bias"], "norm": t["gated_norm"], "epsilon": EPSILON}
    return Call(DeltaCall, {**fields, **sizes, **places, **weights, "mixed": mixed, "mixed_stride": mixed.stride(0)})


def run(library: cuda.Library, made: Model, inputs: Tensor, parts: Sequence[Part], states: Tensor,
        dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """[rows, what the last projection reads] of a pass; NaN in rows of no segment."""
    # A row of both is followed by 3 elements of nobody's.
    width = sum(part.in_features for part in made.op.out.linears)
    wide_in = torch.full((len(inputs), inputs.shape[1] + 3), torch.nan)
    wide_in[:, :-3] = inputs
    wide_out = torch.full((len(inputs), width + 3), torch.nan, dtype=dtype)
    library.calls.run(call_of(made, wide_in, parts, states, wide_out), 0)
    assert wide_out[:, -3:].isnan().all() and states[:, :FIRST].isnan().all()
    return wide_out[:, :-3]


@every_operator
def test_as_the_cpu_engine(library: cuda.Library, name: str) -> None:
    """The state lies in memory as the CPU's does, number by number; outputs are those of float64, as the CPU's are."""
    made, tokens = any_model(name), text(40)
    inputs, states, expected = made.inputs(tokens).float(), pool(made), made.states()
    found = run(library, made, inputs, [(0, 40, 2, True)], states)
    made.forward(expected, [(tokens, 0, 2, [])])
    kept = states[2, FIRST : FIRST + made.decoder.state_floats]
    # A rounding of float32 in each of the sums' some hundred additions, in another order: far below their worst case.
    for mine, theirs in ((kept, expected[2]), (found, made.mixed(inputs))):
        assert (mine - theirs).abs().max() <= 20 * EPS * theirs.abs().max()


@every_operator
def test_outputs_of_16_bits_are_rounded_once(library: cuda.Library, name: str) -> None:
    made = any_model(name)
    inputs = made.inputs(text(5)).float()
    exact = run(library, made, inputs, [(0, 5, 0, True)], pool(made))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(run(library, made, inputs, [(0, 5, 0, True)], pool(made), dtype), exact.to(dtype))


@every_operator
def test_cuts_and_neighbours_change_no_bit(library: cuda.Library, name: str) -> None:
    """Three texts by turns in parts of random length, beside each other, beside segments of no rows and rows of no
    segment."""
    rng, made, length = np.random.default_rng(1), any_model(name), 20
    texts = [made.inputs(text(length, seed)).float() for seed in range(3)]
    alone, kept = [], []
    for inputs in texts:
        states = pool(made)
        alone.append(run(library, made, inputs, [(0, length, 0, True)], states))
        kept.append(states[0])
    states, done = pool(made), [0, 0, 0]
    while any(place < length for place in done):
        chosen = [int(i) for i in rng.permutation(3)[: rng.integers(1, 4)] if done[i] < length]
        lengths = [int(min(length - done[i], rng.choice([1, 1, 2, 5, 17]))) for i in chosen]
        parts, rows, first = [(7, 0, 0, True)], [torch.full((1, texts[0].shape[1]), torch.nan)], 1
        for i, n in zip(chosen, lengths, strict=True):
            parts.append((first, n, i + 1, done[i] == 0))
            rows.append(texts[i][done[i] : done[i] + n])
            first += n
        parts.append((0, 0, 99, False))
        found = run(library, made, torch.cat(rows), parts, states)
        assert found[0].isnan().all()
        for i, n, part in zip(chosen, lengths, found[1:].split(lengths) if lengths else (), strict=True):
            assert torch.equal(part, alone[i][done[i] : done[i] + n])
            done[i] += n
    for i in range(3):
        assert torch.equal(states[i + 1, FIRST:].nan_to_num(7), kept[i][FIRST:].nan_to_num(7))
    assert states[[0, 4, 5]].isnan().all()


def test_orders_of_threads_change_no_bit(library: cuda.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("delta-fused", "delta-wide-values", "conv-wide-biased"):
        made, found = any_model(name), []
        inputs = made.inputs(text(19)).float()
        for order in ("forward", "reverse", "random:7"):
            monkeypatch.setenv("AMQ_SHIM_ORDER", order)
            states = pool(made)
            found.append((run(library, made, inputs, [(0, 12, 1, True), (12, 7, 3, True)], states), states))
        for out, states in found[1:]:
            assert torch.equal(out, found[0][0]) and torch.equal(states.nan_to_num(7), found[0][1].nan_to_num(7))


def test_a_row_that_is_no_number_harms_no_other_sequence(library: cuda.Library) -> None:
    for name in ("delta", "conv"):
        made = any_model(name)
        inputs = made.inputs(text(6)).float()
        good = run(library, made, inputs[:3], [(0, 3, 0, True)], pool(made))
        inputs[4] = torch.nan
        found = run(library, made, inputs, [(0, 3, 0, True), (3, 3, 1, True)], pool(made))
        assert torch.equal(found[:3], good) and found[3].isfinite().all() and found[4:].isnan().all()


def test_nothing_to_do(library: cuda.Library) -> None:
    """No segments are none, whatever else the call says."""
    for kind in (DeltaCall, ShortConvCall):
        library.calls.run(Call(kind, {}), 0)


@pytest.mark.parametrize(
    ("name", "field", "value", "status"),
    (
        ("delta", "key_dim", 24, -6),
        ("delta", "value_dim", 528, -6),
        ("delta", "n_key_heads", 3, -6),
        ("delta", "kernel", 0, -6),
        ("delta", "mixed_stride", 402, -6),
        ("delta", "state_offset", 2, -6),
        ("delta", "norm", None, -6),
        ("delta", "out_kind", 3, -5),
        ("conv", "channels", 0, -6),
        ("conv", "out_kind", -1, -5),
        ("conv", "states", None, -6),
    ),
)
def test_refusals(library: cuda.Library, name: str, field: str, value: int | None, status: int) -> None:
    made = any_model(name)
    out = torch.zeros(1, 512)
    call = call_of(made, made.inputs(text(1)).float(), [(0, 1, 0, True)], pool(made), out)
    setattr(call.struct, field, value)
    with pytest.raises(AmqError, match=rf"refuse the call \({status}: "):
        library.calls.run(call, 0)
    assert not out.any()
