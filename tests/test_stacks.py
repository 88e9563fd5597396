"""Stacks of signs and low ranks: rounds that come nearer to a weight, their bytes, and how a budget is filled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import tiny_llama

from amq.model.inventory import get_weight, take_inventory
from amq.proxy.rows import installed
from amq.proxy.stacks import RANK, ROUNDS, decompose, fill, in_stacks, round_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
LINEARS = take_inventory(tiny_llama()).linears


def drawn(rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, features, generator=generator)
    return weight, torch.rand(features, generator=generator) ** 3 * 10


@pytest.mark.parametrize(("rows", "features"), [(64, 96), (96, 61), (3, 40)])
def test_a_round_is_signs_and_the_nearest_low_rank(rows: int, features: int) -> None:
    weight, squares = drawn(rows, features)
    first = decompose(weight, squares, 0, 1)[0]
    scaled = weight * squares.sqrt()
    u, s, v = torch.linalg.svd(scaled.abs(), full_matrices=False)
    nearest = scaled.sign() * (u[:, :RANK] * s[:RANK] @ v[:RANK])
    best = float((scaled - nearest).norm())
    assert best <= float((scaled - first.weight() * squares.sqrt()).norm()) * (1 + 1e-4) < best * 1.03 + 1e-2
    spec = replace(LINEARS[0], out_features=rows, in_features=features)
    assert round_bytes(spec) == first.signs.nbytes + first.left.nbytes + first.right.nbytes or rows < RANK


def test_each_round_takes_what_the_ones_before_left() -> None:
    weight, squares = drawn(64, 96)
    stack, left = decompose(weight, squares, 0), weight
    errors = [float((left * squares.sqrt()).norm())]
    for one in stack:
        left = left - one.weight()
        errors.append(float((left * squares.sqrt()).norm()))
    assert len(stack) == ROUNDS and all(
        after < 0.75 * before for before, after in zip(errors, errors[1:], strict=False)
    )
    again = decompose(weight, squares, 0)
    assert all(a.left.equal(b.left) and a.signs.equal(b.signs) for a, b in zip(stack, again, strict=True))


def test_inputs_that_never_fire() -> None:
    weight, squares = drawn(64, 96)
    squares[::3] = 0.0
    for own in (squares, torch.zeros(96)):
        assert all(bool(one.weight().isfinite().all()) for one in decompose(weight, own, 0))


def test_rounds_are_stacked_in_turn() -> None:
    size = sum(map(round_bytes, LINEARS))
    assert set(fill(LINEARS, size).values()) == {1} and set(fill(LINEARS, 100 * size).values()) == {ROUNDS}
    more = fill(LINEARS, size + round_bytes(LINEARS[0]))
    assert more == {**dict.fromkeys(more, 1), LINEARS[0].name: 2}
    assert fill(LINEARS, size + round_bytes(LINEARS[0]) - 1) == dict.fromkeys(more, 1)
    assert fill(LINEARS[::-1], 0) == dict.fromkeys(more, 0)


def test_they_are_put_in_and_taken_out() -> None:
    model, (first, second, *_) = tiny_llama(), LINEARS
    own = {s.name: get_weight(model, s.name).clone() for s in (first, second)}
    stacks = {name: decompose(weight, torch.ones(weight.shape[1]), 0) for name, weight in own.items()}
    with installed(model, in_stacks(model, stacks, {first.name: 2, second.name: 0})):
        one, two = stacks[first.name][:2]
        assert get_weight(model, first.name).equal(one.weight() + two.weight())
        assert not get_weight(model, second.name).any()
    assert all(get_weight(model, name).equal(weight) for name, weight in own.items())
