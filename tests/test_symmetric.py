"""Sums of xᵀx and Cholesky factors against float64: as exact as torch's, on every instruction set, on any threads."""

from __future__ import annotations

import pytest
import torch
from helpers.quantizing import random_gram
from helpers.reference import ISAS, torch_threads

from amq.errors import AmqError
from amq.util.symmetric import add_gram, cholesky, mirror

by_isa = pytest.mark.parametrize("isa", ISAS)
SIZES = (1, 3, 64, 100, 130, 300)


@by_isa
@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("tokens", [1, 7, 128, 500])
def test_grams_are_as_exact_as_torch_s(isa: str, tokens: int, features: int) -> None:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens))
    gram, before = torch.full((features, features), 3.0), torch.full((features, features), 3.0)
    add_gram(gram, x, isa)
    truth = 3.0 + x.double().T @ x.double()
    assert torch.equal(gram.tril(-kept(features)), before.tril(-kept(features)))
    ours, theirs = (float((g - truth).triu().norm()) for g in (gram, before.addmm_(x.T, x)))
    assert ours <= 2 * theirs + 1e-6 * features
    mirror(gram)
    assert torch.equal(gram, gram.T)


def kept(features: int) -> int:
    """Diagonals below the first that nothing may write: beyond a rectangle of 128 lanes."""
    return min(features, 128)


@by_isa
@pytest.mark.parametrize("size", SIZES)
def test_factors_are_as_exact_as_torch_s(isa: str, size: int) -> None:
    matrix = random_gram(size) + 0.1 * torch.eye(size)
    factor = matrix.clone()
    assert cholesky(factor, isa)
    truth = torch.linalg.cholesky(matrix.double(), upper=True)
    theirs = torch.linalg.cholesky(matrix, upper=True)
    assert float((factor.triu() - truth).norm()) <= 2 * float((theirs - truth).norm()) + 1e-6 * float(truth.norm())


@pytest.mark.parametrize("size", [3, 130, 300])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_not_positive_definite_has_no_factor(size: int, value: float) -> None:
    matrix = random_gram(size) + 0.1 * torch.eye(size)
    matrix[size - 1, size - 1] = value
    assert not cholesky(matrix)


def test_the_same_bits_on_any_threads() -> None:
    x, matrix = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)), random_gram(400) + torch.eye(400)
    results = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            gram, factor = torch.zeros(400, 400), matrix.clone()
            add_gram(gram, x)
            mirror(gram)
            assert cholesky(factor)
            results.append((gram, factor))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_what_it_cannot_use_is_named() -> None:
    with pytest.raises(AmqError, match="x must be float32, contiguous and on cpu, got torch.float64"):
        add_gram(torch.zeros(4, 4), torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(AmqError, match=r"gram must be \[4, 4\] for x of 4 features, got \[5, 5\]"):
        add_gram(torch.zeros(5, 5), torch.zeros(2, 4))
    with pytest.raises(AmqError, match=r"the matrix must be square, got \[4, 5\]"):
        cholesky(torch.zeros(4, 5))
    gram = torch.ones(4, 4)
    add_gram(gram, torch.zeros(0, 4))
    assert torch.equal(gram, torch.ones(4, 4))
