"""The fused Jensen–Shannon kernel and the torch losses, against the definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.kernels import cpu as native
from amq.model.losses import LN2, LOSSES

ISAS = native.cpu_module().isas()
VOCABULARIES = (1, 7, 1000, 1025, 49152)
SCALES = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)
INF = math.inf
ROUNDING = 2.0**-24
"""Of one float32 operation, relative to its result."""
BLOCK = 1024
"""Logits that the kernel sums in float32 before the sum goes on in double (csrc/cpu/divergence.cpp)."""
LANES = 4
"""Partial sums of a block, of SSE2 at least, which every x86-64 has; more of them make shorter sums."""
TORCH_SUM = 4 * 16 + 64
"""Additions that a term goes through in torch's sum at most: four levels of 16, then the partial sums of a vector."""


def exact_loss(name: str, reference: Tensor, log_q: Tensor) -> Tensor:
    """The definition in float64, of log-probabilities; a vanishing p or q adds its limit where that is finite."""
    log_p, log_q = reference.double(), log_q.double()
    p, q = log_p.exp(), log_q.exp()
    if name == "kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "ce":
        return -(p * log_q).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - LN2
    terms = torch.where(p > 0, p * (log_p - log_m), 0.0) + torch.where(q > 0, q * (log_q - log_m), 0.0)
    return 0.5 * terms.sum(-1)


def exact_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def divergence_of_roundings(reference: Tensor) -> Tensor:
    """What the kernel may find at most between `reference` and logits of the same distribution, per token.

    Probabilities off by factors of up to 1 + e are a divergence of e²/8. A reference whose probabilities sum to 1 + δ,
    as those of a float32 log_softmax do, is off by δ; the kernel's logarithms are off by the roundings of a logit, of
    its two differences and of the reference itself, and by the error of its log-sum-exp.
    """
    off = reference.double().exp().sum(-1).log().abs()
    largest = reference.abs().amax(-1).double()
    return (off + (4 * largest + BLOCK / LANES + 8) * ROUNDING).square() / 8


def random_pair(vocabulary: int, scale: float, tokens: int = 4) -> tuple[Tensor, Tensor]:
    """Reference log-probabilities, and logits that differ from the reference's by normal noise and an offset."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(tokens, vocabulary, generator=generator) + 11
    noise = torch.randn(tokens, vocabulary, generator=generator)
    return logits.log_softmax(-1), logits + scale * noise - 5


def one_hot(vocabulary: int, index: int, gap: float) -> Tensor:
    """Logits [1, vocabulary], 0 at `index` and −gap elsewhere."""
    return torch.full((1, vocabulary), -gap).index_fill(1, torch.tensor(index), 0.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_kernel_matches_float64(vocabulary: int, scale: float, isa: str) -> None:
    reference, logits = random_pair(vocabulary, scale)
    expected = exact_loss("jsd", reference, exact_softmax(logits))
    actual = native._jensen_shannon_rows(reference, logits, isa)
    assert (actual >= 0).all()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)  # 1e-3 of a loss of 1e-6
    if scale >= 1e-2 and vocabulary > 1:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_torch_losses_match_float64(vocabulary: int, scale: float, name: str) -> None:
    """Of the same float32 log-probabilities, so that torch's log_softmax does not count: to the roundings of the terms
    (an exponential's two, softplus's three, a difference, a product) and of their sum."""
    reference, logits = random_pair(vocabulary, scale)
    log_q = logits.log_softmax(-1)
    p, q, difference = reference.double().exp(), log_q.double().exp(), (log_q - reference).double().abs()
    terms = {"kl": p * difference, "ce": p * log_q.double().abs(), "jsd": (p + q) * (LN2 + difference) / 2}[name]
    error = (LOSSES[name](reference, log_q).double() - exact_loss(name, reference, log_q)).abs()
    assert (error <= (TORCH_SUM + 7) * ROUNDING * terms.sum(-1)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_equal_distributions(vocabulary: int, isa: str) -> None:
    """With the reference from float32 and from float64."""
    reference, logits = random_pair(vocabulary, 0.0)
    for same in (reference, exact_softmax(logits).float()):
        assert (native._jensen_shannon_rows(same, logits, isa) <= divergence_of_roundings(same)).all()
        assert (divergence_of_roundings(same) < 1e-9).all()  # a thousandth of what the search tells apart


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gap", (30.0, 104.0, 200.0, 1e30, INF))
def test_disjoint_distributions(gap: float, isa: str) -> None:
    """Two different certainties: ln 2, whether the other tokens underflow or are excluded altogether."""
    reference = one_hot(1000, 3, gap).log_softmax(-1)
    actual = native._jensen_shannon_rows(reference, one_hot(1000, 998, gap), isa)
    torch.testing.assert_close(actual, torch.full((1,), LN2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert native._jensen_shannon_rows(reference, one_hot(1000, 3, gap), isa) < 1e-12


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("excluded", (-200.0, -1e30, -INF))
def test_vanishing_probabilities_contribute_their_limit(excluded: float, isa: str) -> None:
    """Tokens without any p, without any q, and without both, a whole first block of the kernel among them."""
    reference, logits = random_pair(5000, 0.5)
    without_p, without_q = reference.clone(), logits.clone()
    without_p[:, :1500] = excluded
    without_q[:, :1200] = excluded
    without_q[:, 4000:] = excluded
    for p, x in ((without_p.log_softmax(-1), logits), (reference, without_q), (without_p.log_softmax(-1), without_q)):
        expected = exact_loss("jsd", p, exact_softmax(x))
        assert expected.isfinite().all() and (expected > 1e-3).all()
        torch.testing.assert_close(native._jensen_shannon_rows(p, x, isa), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocabulary", (1, 7, 1000, 3000))
@pytest.mark.parametrize("bad", (math.nan, INF, -math.nan))
def test_bad_logits_give_nan_for_their_token_only(bad: float, vocabulary: int, isa: str) -> None:
    for position in {0, vocabulary // 2, vocabulary - 1}:
        reference, logits = random_pair(vocabulary, 0.1)
        logits[1, position] = bad
        actual = native._jensen_shannon_rows(reference, logits, isa)
        assert actual.isnan().tolist() == [False, True, False, False]
        reference, logits = random_pair(vocabulary, 0.1)
        reference[2, position] = bad
        actual = native._jensen_shannon_rows(reference, logits, isa)
        assert actual.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_without_any_logit_gives_nan(isa: str) -> None:
    reference, logits = random_pair(3000, 0.1)
    logits[0] = -INF
    logits[1] = -INF
    logits[1, 1500] = math.nan
    assert native._jensen_shannon_rows(reference, logits, isa).isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("isa", ISAS)
def test_logits_may_be_large_and_offset(isa: str) -> None:
    """Only differences matter, to the precision that float32 leaves; a range beyond float32's must not overflow."""
    reference, logits = random_pair(1000, 0.3)
    expected = exact_loss("jsd", reference, exact_softmax(logits))
    for offset in (-1000.0, 1000.0):
        actual = native._jensen_shannon_rows(reference, logits + offset, isa)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)
    certain = one_hot(1000, 3, 0.0)
    certain[0, :2], certain[0, 3] = -3e38, 3e38
    actual = native._jensen_shannon_rows(one_hot(1000, 3, INF), certain, isa)
    assert 0 <= actual < 1e-12


def test_every_thread_count_gives_the_same_bits() -> None:
    reference, logits = random_pair(5000, 0.3, tokens=37)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            results.append(native.jensen_shannon(reference, logits))
    finally:
        torch.set_num_threads(threads)
    assert results[0].dtype == torch.float64
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_rows_at_any_address_and_nothing_beside_them() -> None:
    """Not aligned to vectors, NaN on either side."""
    reference, logits = random_pair(1003, 0.3)
    expected = native.jensen_shannon(reference, logits)
    for offset in range(1, 9):
        views = []
        for tensor in (reference, logits):
            buffer = torch.full((tensor.numel() + 32,), math.nan)
            view = buffer[offset : offset + tensor.numel()].view(tensor.shape)
            views.append(view.copy_(tensor))
        assert torch.equal(native.jensen_shannon(*views), expected)


def test_no_tokens() -> None:
    assert native.jensen_shannon(torch.empty(0, 10), torch.empty(0, 10)).shape == (0,)


def test_errors_name_what_was_expected() -> None:
    good = torch.zeros(2, 6)
    for bad, message in (
        (good.double(), "must be float32 on cpu, got torch.float64 on cpu"),
        (good.to("meta"), "must be float32 on cpu, got torch.float32 on meta"),
        (good[0], r"must be \[tokens, vocabulary\], got \[6\]"),
        (good[:, :0], r"must be \[tokens, vocabulary\], got \[2, 0\]"),
        (torch.zeros(6, 2).T, r"must be contiguous, got strides \[1, 2\]"),
    ):
        with pytest.raises(AmqError, match=f"jensen_shannon: logits {message}"):
            native.jensen_shannon(good, bad)
        with pytest.raises(AmqError, match=f"jensen_shannon: reference {message}"):
            native.jensen_shannon(bad, good)
    with pytest.raises(AmqError, match=r"must have one shape, got \[2, 6\] and \[2, 5\]"):
        native.jensen_shannon(good, torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"isa": "sse9"}, "isa: expected one of isas.*got 'sse9'"),
        ({"rows": -1}, "rows: expected at least 0, got -1"),
        ({"vocabulary": 0}, "vocabulary: expected at least 1, got 0"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"logits": (0, 48)}, "logits: expected an address"),
        ({"logits": (1, 47)}, "logits: expected at least 48 bytes, got 47"),
        ({"reference": (1, 24)}, "reference: expected at least 48 bytes, got 24"),
        ({"divergence": (1, 8)}, "divergence: expected at least 16 bytes, got 8"),
        ({"rows": 1 << 61}, "rows: expected at most 2147483647"),
    ),
)
def test_module_checks_its_arguments(change: dict, message: str) -> None:
    """With addresses that would crash if they were used."""
    arguments = dict(reference=(1, 48), logits=(1, 48), divergence=(1, 16), rows=2, vocabulary=6, threads=1)
    with pytest.raises(ValueError, match=message):
        native.cpu_module().jensen_shannon(**(arguments | change))
