"""Operators that carry a state on, each alone in a native decoder: against plain recurrences in float64, and to the bit
however a text is cut into passes, whatever lies beside it, and from wherever a snapshot was taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engine_cases_delta import DELTA
from helpers.state_models import OPERATORS, STATES, Model, model, text

from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.runtime.decoder_spec import Heads
from amq.runtime.families import Unsupported, read_spec

ISAS = cpu_module().isas()

each_operator = pytest.mark.parametrize("name", OPERATORS)
each_isa = pytest.mark.parametrize("isa", ISAS)


@each_isa
@each_operator
def test_as_plain_recurrence(name: str, isa: str) -> None:
    tokens = text(70)
    logits = model(name).forward(model(name).states(), [(tokens, 0, 0, [])], isa=isa)
    expected = model(name).plain(tokens)
    # A rounding of float32 in each of the sums' some hundred additions, in another order: far below their worst case.
    assert (logits - expected).abs().max() <= 100 * torch.finfo(torch.float32).eps * expected.abs().max()


@each_isa
@each_operator
def test_cuts_neighbours_and_threads_change_no_bit(name: str, isa: str) -> None:
    """Three texts by turns in parts of random length, in passes of one to three of them."""
    rng, made = np.random.default_rng(1), model(name)
    texts = [text(60, seed) for seed in range(3)]
    alone = [made.forward(made.states(), [(tokens, 0, 0, [])], isa=isa) for tokens in texts]
    states, done = made.states(), [0, 0, 0]
    while any(place < 60 for place in done):
        chosen = [i for i in rng.permutation(3)[: rng.integers(1, 4)] if done[i] < 60]
        if not chosen:
            continue
        lengths = [int(min(60 - done[i], rng.choice([1, 1, 2, 5, 23]))) for i in chosen]
        segments = [
            (texts[i][done[i] : done[i] + n], done[i], int(i) + 1, []) for i, n in zip(chosen, lengths, strict=True)
        ]
        logits = made.forward(states, segments, int(rng.integers(1, 5)), isa)
        for i, n, part in zip(chosen, lengths, logits.split(lengths), strict=True):
            assert torch.equal(part, alone[i][done[i] : done[i] + n])
            done[i] += n
    assert states[[0, 4, 5]].isnan().all()


@each_isa
@each_operator
def test_snapshot_is_the_state_of_a_text_that_ends_there(name: str, isa: str) -> None:
    rng, made, tokens = np.random.default_rng(2), model(name), text(40)
    expected = made.forward(made.states(), [(tokens, 0, 0, [])], isa=isa)
    for start in (0, 1, 17):
        places = sorted(rng.choice(np.arange(1, 41 - start), 3, replace=False).tolist())
        states = made.states()
        if start:
            made.forward(states, [(tokens[:start], 0, 0, [])], isa=isa)
        shots = [(rows, state + 2) for state, rows in enumerate(places)]
        made.forward(states, [(tokens[start:], start, 0, shots)], 2, isa)
        assert states[[1, 5]].isnan().all()
        for rows, state in shots:
            end, ended = start + rows, made.states()
            made.forward(ended, [(tokens[:end], 0, 1, [])], isa=isa)
            assert torch.equal(states[state], ended[1])
            if end < len(tokens):
                assert torch.equal(made.forward(states, [(tokens[end:], end, state, [])], isa=isa), expected[end:])


@each_operator
def test_text_begins_with_no_state(name: str) -> None:
    """What a number's last sequence left is not read, be it not even a number."""
    made, states = model(name), model(name).states()
    first = made.forward(states, [(text(9), 0, 3, [])])
    made.forward(states, [(text(30, 1), 9, 3, [])])
    assert torch.equal(made.forward(states, [(text(9), 0, 3, [])]), first)


@pytest.mark.parametrize("shots", ([(0, 1)], [(3, 1), (3, 2)], [(6, 1)], [(2, 0)], [(2, STATES)]))
def test_snapshots_out_of_place_are_refused(shots: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="snapshot"):
        model("conv").forward(model("conv").states(), [(text(5), 0, 0, shots)])


def test_state_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="state"):
        model("conv").forward(model("conv").states(), [(text(5), 0, STATES, [])])


def test_heads_beyond_their_row_are_refused() -> None:
    op = OPERATORS["delta"]
    with pytest.raises(ValueError, match="heads within"):
        Model(replace(op, a=Heads(op.a.first + 1, op.a.stride)))


CONFIG = {**DELTA, "model_type": "qwen3_5_text", "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
          "rope_parameters": {"rope_theta": 1e4}}  # fmt: skip


def test_sizes_of_delta_nets_that_contradict_are_refused() -> None:
    with pytest.raises(AmqError, match=r"config\.json.*expected linear_num_key_heads to divide .* 4, got 3"):
        read_spec({**CONFIG, "linear_num_key_heads": 3}, "config.json", ())
    with pytest.raises(AmqError, match=r"config\.json.*linear_conv_kernel_dim"):
        read_spec({**CONFIG, "linear_conv_kernel_dim": 0}, "config.json", ())


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    (
        ("linear_value_head_dim", 24, "delta nets with multiples of 16 features a head up to 512, not 24"),
        ("hidden_act", "gelu_new", "delta nets with silu alone, not gelu_new"),
        ("layer_types", ["linear_attention", "mamba"] * 2, "no layers of type mamba"),
        ("linear_key_head_dim", None, "does not say linear_key_head_dim"),
    ),
)
def test_what_is_beyond_the_engine_is_told(key: str, value: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        read_spec({**CONFIG, key: value}, "config.json", ())


def test_layers_by_interval_as_by_their_types() -> None:
    """Qwen3-Next's file says how often attention comes."""
    by_types = read_spec({**CONFIG, "num_hidden_layers": 4}, "config.json", ())
    by_interval = read_spec({**CONFIG, "layer_types": None, "full_attention_interval": 4}, "config.json", ())
    assert [type(step.op) for step in by_types.steps] == [type(step.op) for step in by_interval.steps]
