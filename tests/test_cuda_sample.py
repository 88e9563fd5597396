"""kernels/cuda/sample.cu on a CPU: each row's token, against amq.runtime.sampling and its generator written again.

A draw is the survivors' running sum, by token, passing a random number's share of their total. The number follows from
seed and place by steps that can be undone, so a seed can be had for any share: with the middle of every survivor's part
asked for, each must come back, which it does only if the survivors and their weights are those of `survivors`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_shim.build import chosen_build
from helpers.cuda_kernels import check_resources, compile_kernels
from scipy.stats import chi2
from torch import Tensor

from amq.errors import AmqError
from amq.kernels import cuda
from amq.kernels.cuda_calls import Call, SampleCall
from amq.runtime.sampling import survivors
from amq.runtime.settings import Sampling

GOLDEN, FACTORS, WORD = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), 2**64
ERROR = 2**-20
"""Of a running sum of weights, as a share of their total: each of the two float32 exponentials is within 2 ulp (2^-22),
float32 sums of the reference add log2(vocabulary) halves of one, the kernels' units 2^-25."""
STEPS = 3


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda.Library:
    return cuda.Library(chosen_build(tmp_path_factory.mktemp("shim")))


def mixed(v: int) -> int:
    v = (v ^ v >> 30) * FACTORS[0] % WORD
    v = (v ^ v >> 27) * FACTORS[1] % WORD
    return v ^ v >> 31


def unmixed(v: int) -> int:
    v ^= v >> 31 ^ v >> 62
    v = v * pow(FACTORS[1], -1, WORD) % WORD
    v ^= v >> 27 ^ v >> 54
    v = v * pow(FACTORS[0], -1, WORD) % WORD
    return v ^ v >> 30 ^ v >> 60


def random_number(seed: int, place: int) -> int:
    return mixed((mixed((seed + GOLDEN) % WORD) + GOLDEN * (place + 1)) % WORD)


def seed_for(share: float, place: int) -> int:
    """The seed whose number at `place` is this share of 2^64."""
    number = min(int(share * WORD), WORD - 1)
    return (unmixed((unmixed(number) - GOLDEN * (place + 1)) % WORD) - GOLDEN) % WORD


class Rows:
    """A SampleCall's tensors, the same settings for each row where one is given; `run` takes one step."""

    def __init__(
        self, library: cuda.Library, logits: Tensor, how: Sampling | Sequence[Sampling], seeds: Sequence[int] = ()
    ) -> None:
        rows, vocabulary = logits.shape
        hows = [how] * rows if isinstance(how, Sampling) else how
        self.library, self.logits = library, logits
        self.tokens = torch.full((rows,), 77, dtype=torch.int32)
        self.positions = torch.arange(5, 5 + rows, dtype=torch.int32)
        self.drawn = torch.zeros(rows, dtype=torch.int32)
        self.out = torch.full((STEPS, rows), -7, dtype=torch.int32)
        self.step = torch.zeros(1, dtype=torch.int32)
        self.settings = {
            name: torch.tensor([getattr(h, name) for h in hows], dtype=dtype)
            for name, dtype in (("temperature", torch.float32), ("top_p", torch.float32), ("min_p", torch.float32),
                                ("top_k", torch.int32))
        }  # fmt: skip
        seeds = seeds or [0] * rows
        self.seed = torch.from_numpy(np.array([seed % WORD for seed in seeds], np.uint64).view(np.int64))
        fields = {
            **{"rows": rows, "vocabulary": vocabulary, "logits": logits, "steps": STEPS},
            **{name: getattr(self, name) for name in ("tokens", "positions", "seed", "drawn", "out", "step")},
            **self.settings,
        }
        size = library.calls.size("amq_cuda_sample_scratch", Call(SampleCall, fields))
        assert size % 4 == 0
        self.guarded = torch.full((size // 4 + 16,), torch.nan)
        self.call = Call(SampleCall, {**fields, "scratch": self.guarded})

    def run(self) -> list[int]:
        """The tokens of a step."""
        place = int(self.step[0]) % STEPS
        self.library.calls.run(self.call, 0)
        assert torch.isnan(self.guarded[-16:]).all()
        return self.out[place].tolist()


def logits_of(kind: str, vocabulary: int, seed: int) -> np.ndarray:
    """float32: like a model's; with many equals; with none but a few; nearly the same all."""
    draw = np.random.default_rng(seed)
    scores = draw.normal(0, 3, vocabulary).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "few":
        scores[draw.random(vocabulary) < 0.9] = -np.inf
        scores[draw.integers(vocabulary)] = 2.0
    elif kind == "flat":
        scores = (7 + scores / 1000).astype(np.float32)
    return scores


def settled(scores: np.ndarray, how: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """`survivors` by token; nothing where a rounding would change them."""
    tokens, weights = survivors(scores, how)
    tokens = np.arange(len(scores)) if tokens is None else tokens
    order = np.argsort(tokens)
    ranked = np.sort(np.exp((scores - scores.max()).astype(np.float64) / how.temperature))[::-1]
    if how.top_k:
        kth = np.sort(scores)[::-1][min(how.top_k, len(scores)) - 1]
        ranked = ranked[: int((scores >= kth).sum())]
    sums = np.concatenate([[0.0], np.cumsum(ranked)])
    near = how.top_p < 1 and np.abs(sums / sums[-1] - how.top_p).min() < 2 * ERROR
    below = ranked[ranked < 1]  # the largest is 1 exactly
    if near or (how.min_p and len(below) and np.abs(below / how.min_p - 1).min() < 2 * ERROR):
        return tokens[:0], weights[:0]
    return tokens[order], weights[order].astype(np.float64)


def asked(tokens: np.ndarray, weights: np.ndarray) -> tuple[list[float], list[int]]:
    """Shares of the total at both ends of some survivors' parts, and whose they are."""
    ends = np.cumsum(weights) / weights.sum()
    starts = np.concatenate([[0.0], ends[:-1]])
    wide = np.flatnonzero(ends - starts > 3 * ERROR)
    wide = wide[np.linspace(0, len(wide) - 1, min(len(wide), 5)).astype(int)]
    shares = [share for place in wide for share in (starts[place] + ERROR * (place > 0), ends[place] - ERROR)]
    return shares, [int(tokens[place]) for place in wide for _ in range(2)]


SETTINGS = [
    {},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 36},
    {"top_k": 300},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999, "min_p": 0.01},
    {"top_p": 0.999, "min_p": 1.0},
    {"top_k": 20, "top_p": 0.95},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.03, "temperature": 0.6},
    {"temperature": 1e-30},
    {"temperature": 50.0, "top_p": 0.5},
]


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 1000])
@pytest.mark.parametrize("kind", ["model", "ties", "few", "flat"])
def test_survivors(library: cuda.Library, kind: str, vocabulary: int) -> None:
    """Every survivor comes back where its part of the total lies, at both of its ends: none is missing or too many."""
    compared = 0
    for index, options in enumerate(SETTINGS):
        how = Sampling(**{"temperature": 1.0, **options})
        scores = logits_of(kind, vocabulary, index)
        tokens, weights = settled(scores, how)
        if not len(tokens):
            continue
        shares, expected = asked(tokens, weights)
        logits = torch.from_numpy(scores).expand(len(shares), -1).contiguous()
        assert Rows(library, logits, how, [seed_for(s, 0) for s in shares]).run() == expected, options
        compared += 1
    assert compared > len(SETTINGS) - 5


def test_sums_that_meet_a_limit_exactly(library: cuda.Library) -> None:
    """Of eight equals a half is four, and the one at which the sum comes to it is the last."""
    for top_p, kept in ((0.5, 4), (0.25, 2), (0.125, 1), (0.1250001, 2), (0.4999999, 4), (1.0, 8)):
        shares = [(place + 0.5) / kept for place in range(kept)]
        how = Sampling(temperature=1.0, top_p=top_p)
        found = Rows(library, torch.full((kept, 8), -3.0), how, [seed_for(share, 0) for share in shares]).run()
        assert found == list(range(kept)), top_p
        assert len(survivors(np.full(8, -3, np.float32), how)[1]) == kept


def test_a_vocabulary_of_many_regions(library: cuda.Library) -> None:
    """As large as a model's, whatever it is filtered by; and settings that differ by row."""
    scores = logits_of("model", 200_003, 1)
    scores[200_002] = scores[5] = scores.max() + 0.5
    hows, seeds, expected = [Sampling()], [0], [5]
    for options in ({}, {"top_k": 64}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.95}, {"top_k": 20}):
        how = Sampling(temperature=0.8, **options)
        shares, tokens = asked(*settled(scores, how))
        hows, expected = hows + [how] * len(shares), expected + tokens
        seeds += [seed_for(share, 0) for share in shares]
    assert Rows(library, torch.from_numpy(scores).expand(len(hows), -1).contiguous(), hows, seeds).run() == expected
    assert len(hows) > 30


def test_the_likeliest_and_what_is_written(library: cuda.Library) -> None:
    """Temperature 0: the lowest of equals, as argmax has it, whatever else is asked for; what the next pass reads; rows
    that are empty keep what they have; the outputs go round."""
    logits = torch.from_numpy(np.stack([logits_of(kind, 1000, 3) for kind in ("ties", "few", "model", "flat")]))
    logits[1] = torch.where(logits[1] > 0, -torch.inf, logits[1])
    logits[1, 600] = logits[1, 7] = 0.0
    logits[1, 7] *= -1  # −0 equals 0
    rows = Rows(library, logits, Sampling(top_k=3, top_p=0.5, min_p=0.1))
    rows.positions[2] = -1
    best = logits.numpy().argmax(axis=1).tolist()
    assert best[1] == 7
    for step in range(1, 5):
        assert rows.run() == [best[0], best[1], -1, best[3]]
        assert rows.tokens.tolist() == [best[0], best[1], 77, best[3]]
        assert rows.positions.tolist() == [5 + step, 6 + step, -1, 8 + step]
        assert rows.drawn.tolist() == [step, step, 0, step] and rows.step.item() == step
    assert (rows.out != -7).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_stay_in_their_row(library: cuda.Library, temperature: float) -> None:
    logits = torch.from_numpy(np.stack([logits_of("model", 600, 4)] * 6))
    logits[1, 599], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 0] = -torch.from_numpy(np.array([np.nan], np.float32))[0]
    logits[5, 0] = -torch.inf
    rows = Rows(library, logits, Sampling(temperature=temperature), [9] * 6)
    found = rows.run()
    assert found[1:5] == [-1] * 4 and found[0] == found[5] >= 0
    assert rows.tokens.tolist() == [found[0], 0, 0, 0, 0, found[0]] and rows.positions.tolist() == [6, 7, 8, 9, 10, 11]


def test_draws_follow_the_weights(library: cuda.Library) -> None:
    """χ² of the kernels' own draws, and of many more by the same numbers in Python, each with a bound that a right
    generator passes but once in 1e9 times."""
    scores = np.log(np.array([0.02, 0.3, 0.08, 0.25, 0.05, 0.3], np.float32))
    expected = np.exp(scores.astype(np.float64)) / np.exp(scores.astype(np.float64)).sum()
    rows = Rows(library, torch.from_numpy(scores).expand(64, -1).contiguous(), Sampling(temperature=1.0), range(64))
    ends = np.cumsum(expected)
    found = []
    for place in range(6):
        drawn = rows.run()
        shares = [random_number(seed, place) / WORD for seed in range(64)]
        assert np.abs(np.subtract.outer(shares, ends)).min() > 2 * ERROR  # none lies at a limit
        assert drawn == np.searchsorted(ends, shares, side="right").tolist()
        found += drawn
    many = np.searchsorted(ends, [random_number(s, p) / WORD for s in range(40) for p in range(5000)], side="right")
    for draws in (np.array(found), many):
        counts = np.bincount(draws, minlength=6)
        statistic = ((counts - expected * len(draws)) ** 2 / (expected * len(draws))).sum()
        assert statistic < chi2.isf(1e-9, 5), counts


def test_rows_and_orders_of_threads_change_nothing(library: cuda.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.from_numpy(np.stack([logits_of(kind, 900, 5) for kind in ("model", "ties", "flat")] * 3))
    hows = [Sampling(temperature=0.9, **options) for options in SETTINGS[:9]]
    seeds = list(range(9))
    together = Rows(library, logits, hows, seeds)
    first, second = together.run(), together.run()
    assert first != second
    for order in ("forward", "reverse", "random:7"):
        monkeypatch.setenv("AMQ_SHIM_ORDER", order)
        again = Rows(library, logits, hows, seeds)
        assert (again.run(), again.run()) == (first, second)
    for row in range(9):
        alone = Rows(library, logits[row : row + 1].clone(), hows[row], [seeds[row]])
        assert [*alone.run(), *alone.run()] == [first[row], second[row]]


def test_refusals(library: cuda.Library) -> None:
    """Before anything is launched; no rows are no work."""
    rows = Rows(library, torch.zeros(2, 10), Sampling())
    for field, value, status in (
        ("rows", -1, r"\(-1: "), ("vocabulary", 0, r"\(-6: "), ("vocabulary", 2**19 + 1, r"\(-6: "),
        ("steps", 0, r"\(-6: "), ("logits", None, r"\(-6: "), ("scratch", rows.guarded[1:].data_ptr(), r"\(-6: "),
    ):  # fmt: skip
        before = getattr(rows.call.struct, field)
        setattr(rows.call.struct, field, value)
        with pytest.raises(AmqError, match="SampleCall: the kernels refuse the call " + status):
            library.calls.run(rows.call, 0)
        setattr(rows.call.struct, field, before)
    rows.call.struct.rows = 0
    library.calls.run(rows.call, 0)
    assert rows.step.item() == 0 and (rows.out == -7).all()


def test_what_nvcc_makes_of_it(tmp_path: Path) -> None:
    """For every architecture: no spill, no stack, and at most 128 registers, with which a block of 512
    threads fits any multiprocessor."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine: the CUDA kernels are compiled where there is one")
    registers = dict.fromkeys(("sample_scan_kernel", "sample_gather_kernel", "sample_finish_kernel"), 128)
    check_resources(compile_kernels(("sample.cu",), tmp_path), registers, shared=48 << 10)
