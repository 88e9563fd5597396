"""How many bits each channel gets: means are exact, learning follows its formula, budgets are kept, states resume."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import amq
from amq.search.knapsack import select_exact
from amq.split import quantizer
from amq.split.data import samples_of, windows_of
from amq.split.policy import BACKWARD, FORWARD, REFRESH, Amaq, Policy, fill, scheduled, spread
from amq.split.quantizer import WIDTHS
from amq.split.settings import POLICIES
from amq.split.stream import Stream
from amq.split.terms import Terms
from amq.split.wire import NotFinite, Type

CHANNELS, WINDOWS, LENGTH = 32, 2, 24
TOKENS = WINDOWS * LENGTH


def terms(**changed: Any) -> Terms:
    base = Terms(
        policy="waterfill", coder="none", start_bits=6.0, target_bits=3.0, backward_bits=None, beta=1.0, range_tokens=0,
        half=False, steps=60, version=amq.__version__, model="m", dtype="float32", cut=1, lora=4, lora_alpha=8.0,
        labels="server", seed=0, samples=8, window_length=LENGTH, unscored=0, batch=2 * WINDOWS, micro_batches=2,
        learning_rate=1e-3, clip=1.0, save_every=2, text="t",
    )  # fmt: skip
    return replace(base, **changed)


def hidden(seed: int) -> Tensor:
    """[batch, length, channels], channels of growing size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WINDOWS, LENGTH, CHANNELS, generator=generator) * torch.logspace(-1, 1, CHANNELS)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, CHANNELS).t().contiguous()


def test_spread_has_the_very_mean() -> None:
    for bits in (1.0, 2.5, 3.0, 3.25, 4.71875, 8.0):
        widths = spread(bits, CHANNELS)
        assert float(widths.double().mean()) == bits
        assert set(widths.tolist()) <= {math.floor(bits), math.ceil(bits)}


def test_the_schedule_falls_as_a_cosine_and_then_rests() -> None:
    values = [scheduled(step, 100, 6.0, 3.0) for step in range(100)]
    assert values[0] == 6.0 and values[30] == pytest.approx(4.5) and values[60:] == [3.0] * 40
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("bits", [1.0, 2.3, 3.0, 5.7, 8.0])
def test_fill_is_the_best_of_its_mean(bits: float) -> None:
    x = flat(hidden(0))
    costs = torch.stack([quantizer.error_of(x, width, TOKENS) for width in WIDTHS], 1).double()
    widths = fill(costs, bits)
    assert float(widths.double().mean()) <= bits
    sizes = np.broadcast_to(np.array(WIDTHS), costs.shape)
    best = select_exact(costs.numpy(), sizes.astype(np.int64), math.floor(bits * CHANNELS))
    rows = np.arange(CHANNELS)
    found = costs.numpy()[rows, widths.numpy() - WIDTHS[0]].sum()
    assert found <= costs.numpy()[rows, best].sum() * (1 + 1e-6)


def run_steps(policy: Policy, first: int, last: int) -> list[bytes]:
    """Payloads of steps, each of two micro-batches whose gradients come back; the first channels matter most."""
    payloads = []
    for step in range(first, last):
        policy.begin(step)
        for part in range(2):
            x = flat(hidden(10 * step + part))
            payloads.append(policy.encode(x, [2 * part, 2 * part + 1]))
            generator = torch.Generator().manual_seed(1000 + 10 * step + part)
            policy.returned(
                torch.randn(CHANNELS, TOKENS, generator=generator) / torch.logspace(-1, 1, CHANNELS).unsqueeze(1)
            )
        policy.end(step)
    return payloads


@pytest.mark.parametrize("coder", ["none", "range"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("forward", [True, False])
def test_a_loaded_state_goes_on_as_if_nothing_had_been(name: str, forward: bool, coder: str) -> None:
    agreed = terms(policy=name, coder="none" if name == "none" else coder)
    kind = (FORWARD if forward else BACKWARD)[name]
    if name == "amaq" and not forward:
        return  # its widths are the forward stream's: test_amaqs_gradients_have_the_widths_of_its_hidden_states
    policy, again = (kind(agreed, CHANNELS, TOKENS, forward) for _ in range(2))
    run_steps(policy, 0, REFRESH + 2)
    again.load({name: tensor.clone() for name, tensor in policy.state().items()})
    assert run_steps(policy, REFRESH + 2, REFRESH + 5) == run_steps(again, REFRESH + 2, REFRESH + 5)


def test_waterfill_keeps_its_mean_and_gives_bits_to_what_matters() -> None:
    policy = FORWARD["waterfill"](terms(policy="waterfill"), CHANNELS, TOKENS)
    for step in range(60):
        run_steps(policy, step, step + 1)
        assert policy.widths is not None
        due = scheduled(step + 1 if step == 0 else (step + 1) // REFRESH * REFRESH or 1, 60, 6.0, 3.0)
        assert due - 1 / CHANNELS < float(policy.widths.double().mean()) <= due + 1e-6
    alike = FORWARD["waterfill"](terms(policy="waterfill", start_bits=3.0), CHANNELS, TOKENS, forward=False)
    run_steps(alike, 0, 2)
    assert policy.widths is not None and alike.widths is not None
    assert alike.widths[0] < alike.widths[-1], "gradients by their size"
    difference = (policy.widths - alike.widths)[:4].float().mean() - (policy.widths - alike.widths)[-4:].float().mean()
    assert difference > 0, "hidden states by size and by the gradients that came back, which the first channels have"


def test_what_amaq_learns_is_the_derivative_through_straight_through_rounding() -> None:
    """Against autograd: x̂ = low + round(u)·s with the gradient of round taken as 1, s = range / (2^b − 1)."""
    agreed = terms(policy="amaq", beta=0.0, start_bits=4.0)
    policy = FORWARD["amaq"](agreed, CHANNELS, TOKENS)
    assert isinstance(policy, Amaq)
    policy.begin(0)
    assert policy.widths is not None
    x, g = flat(hidden(1)), torch.randn(CHANNELS, TOKENS, generator=torch.Generator().manual_seed(2))
    policy.encode(x, [0, 1])
    policy.returned(g)
    codes = quantizer.ranged(x, (1 << policy.widths).to(torch.int32), TOKENS)
    bits = policy.widths.float().requires_grad_()
    low, own = (t.float() * 2.0**codes.exponent for t in (codes.low, codes.step))
    span = own * (codes.levels - 1).unsqueeze(1)
    step = span / (2 ** bits.unsqueeze(1) - 1)
    u = (x - low) / step
    (low + (u + (u.round() - u).detach()) * step).backward(g)
    assert bits.grad is not None
    floor = 1e-4 * float((g * own).abs().sum(1).max())  # float32's rounding of u · step, summed
    torch.testing.assert_close(policy._slope, bits.grad, rtol=1e-3, atol=floor)


def test_amaq_falls_to_its_target_and_rests_there() -> None:
    policy = FORWARD["amaq"](terms(policy="amaq", target_bits=3.5, beta=1e4), CHANNELS, TOKENS)
    assert isinstance(policy, Amaq)
    means = [policy.mean()]
    for step in range(60):
        run_steps(policy, step, step + 1)
        means.append(policy.mean())
    assert means[0] == pytest.approx(6.0) and min(means) > 3.0
    assert all(abs(mean - 3.5) < 0.35 for mean in means[45:])
    assert policy.widths is not None and abs(float(policy.widths.double().mean()) - means[-2]) <= 0.5


@pytest.mark.parametrize("coder", ["none", "range"])
def test_step_keeps_to_its_bytes(coder: str) -> None:
    """Spent in all: what the schedule allows, within a twentieth; side information counts, so tensors are larger."""
    agreed = terms(policy="step", coder=coder, start_bits=5.0, target_bits=2.5, steps=40, range_tokens=0)
    policy, spent, allowed = FORWARD["step"](agreed, CHANNELS, 1024), 0.0, 0.0
    for step in range(40):
        policy.begin(step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(CHANNELS, 1024, generator=generator) * torch.logspace(-1, 1, CHANNELS).unsqueeze(1)
        spent += 8 * len(policy.encode(x, [0])) / x.numel()
        allowed += scheduled(step, 40, 5.0, 2.5)
        policy.end(step)
    assert abs(spent / allowed - 1) < 0.05


def test_step_bears_a_target_out_of_reach() -> None:
    """Side information alone is more than the target: it gives the least there is, for as long as it takes."""
    policy = FORWARD["step"](terms(policy="step", coder="range", start_bits=0.1, target_bits=0.1), CHANNELS, TOKENS)
    for step in range(300):
        policy.begin(step)
        least = len(policy.encode(flat(hidden(0)), [0, 1]))
        policy.end(step)
    assert 8 * least / (CHANNELS * TOKENS) < 40 / TOKENS + 1, "five bytes a channel, and next to no codes"


def test_step_comes_back_from_a_start_out_of_reach() -> None:
    """As soon as the schedule allows what codes of at most 8 bits can give, it gives that."""
    agreed = terms(policy="step", coder="range", start_bits=8.0, target_bits=2.0, steps=200)
    policy, spent, allowed = FORWARD["step"](agreed, CHANNELS, 1024), 0.0, 0.0
    for step in range(200):
        policy.begin(step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(CHANNELS, 1024, generator=generator) * torch.logspace(-1, 1, CHANNELS).unsqueeze(1)
        bits = 8 * len(policy.encode(x, [0])) / x.numel()
        spent, allowed = spent + bits, allowed + scheduled(step, 200, 8.0, 2.0)
        policy.end(step)
    assert abs(spent / allowed - 1) < 0.05 and abs(bits - 2.0) < 0.2


def test_aq_sgd_refuses_what_its_cache_cannot_hold() -> None:
    sender, receiver = ends(terms(policy="aq-sgd", target_bits=8.0))
    sender.begin(0)
    x = torch.zeros(WINDOWS, LENGTH, CHANNELS)
    pass_on(sender, receiver, x + 6e4, 0, [0, 1])
    x[..., 3] = 7e4
    with pytest.raises(NotFinite, match="kept in float16, which ends at 65504, holds NaN or infinity in channel 3"):
        list(sender.frames(x, 1, 0, [0, 1]))


def ends(agreed: Terms, forward: bool = True) -> tuple[Stream, Stream]:
    """A stream's two ends."""
    sender, receiver = (Stream(agreed, CHANNELS, 0, forward=forward, sender=sends) for sends in (True, False))
    return sender, receiver


def pass_on(sender: Stream, receiver: Stream, x: Tensor, step: int, samples: list[int]) -> Tensor:
    """What arrives of x; [batch, length, channels]."""
    for frame in sender.frames(x, step, 0, samples):
        if frame.type is Type.WIDTHS:
            receiver.take_widths(frame)
        else:
            came = receiver.shaped(receiver.tensor(frame, samples))
    return came


@pytest.mark.parametrize("coder", ["none", "range"])
@pytest.mark.parametrize("name", POLICIES)
def test_what_arrives_is_what_was_sent(name: str, coder: str) -> None:
    """Over steps in which tables change; both ends count the same bytes and bits."""
    agreed = terms(policy=name, coder="none" if name == "none" else coder, half=name == "none" and coder == "range")
    sender, receiver = ends(agreed)
    assert sender.policy is not None
    for step in range(REFRESH + 2):
        for end in (sender, receiver):
            end.begin(step)
        x = hidden(step)
        came = pass_on(sender, receiver, x, step, [0, 1])
        sender.policy.returned(flat(torch.ones_like(x)))
        sender.end(step)
        assert float((came - x).abs().max()) <= 0.5 * float(x.abs().max()), "within a code of one bit"
        assert sender.bits == receiver.bits > 0 and sender.bytes == receiver.bytes
    if name == "none":
        assert torch.equal(came, x.half().float() if agreed.half else x)


def test_differences_come_nearer_with_every_visit() -> None:
    """aq-sgd: whole in float16 first, then differences; both caches are the same bits."""
    sender, receiver = ends(terms(policy="aq-sgd", target_bits=3.0))
    x, errors = hidden(0), []
    for step in range(4):
        for end in (sender, receiver):
            end.begin(step)
        errors.append(
            float(
                (pass_on(sender, receiver, x + 0.05 * hidden(step), step, [4, 9]) - x - 0.05 * hidden(step))
                .abs()
                .mean()
            )
        )
        sender.end(step)
        assert sender.bits == (16.0 if step == 0 else 3.0)
    direct = quantizer.error_of(flat(x), 3, TOKENS).sqrt().mean()
    assert max(errors[1:]) < 0.3 * float(direct)
    kept, theirs = sender.state(), receiver.state()
    for sample in (4, 9):
        assert torch.equal(kept[f"policy.cache.{sample}"], theirs[f"cache.{sample}"])


def test_amaqs_gradients_have_the_widths_of_its_hidden_states() -> None:
    agreed = terms(policy="amaq")
    forward = ends(agreed)
    client = Stream(agreed, CHANNELS, 0, forward=False, sender=False, partner=forward[0])
    server = Stream(agreed, CHANNELS, 0, forward=False, sender=True, partner=forward[1])
    for step in range(3):
        for stream in (*forward, client, server):
            stream.begin(step)
        pass_on(*forward, hidden(step), step, [0, 1])
        frames = list(server.frames(hidden(step + 50), step, 0, [0, 1]))
        assert [frame.type for frame in frames] == [Type.BACKWARD], "no table of its own"
        came = client.tensor(frames[0], [0, 1])
        assert torch.equal(server.widths, forward[0].widths)  # type: ignore[arg-type]
        assert came.shape == (CHANNELS, TOKENS)
        assert forward[0].policy is not None
        forward[0].policy.returned(came)
        forward[0].end(step)


def test_tables_travel_only_when_they_change() -> None:
    sender, receiver = ends(terms(policy="fixed"))
    kinds = []
    for step in range(3):
        sender.begin(step)
        frames = list(sender.frames(hidden(step), step, 0, [0, 1]))
        kinds.append([frame.type for frame in frames])
    assert kinds == [[Type.WIDTHS, Type.FORWARD], [Type.FORWARD], [Type.FORWARD]]


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    orders = [[s for step in range(5) for s in samples_of(seed, 20, 4, 5 * epoch + step)]
              for seed, epoch in ((0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert samples_of(0, 6, 4, 1) == [*samples_of(0, 6, 6, 0)[4:], *samples_of(0, 6, 6, 1)[:2]], "over an epoch's end"
    assert samples_of(0, 5, 5, 0) == [2, 0, 3, 4, 1], "the order is part of the format: both machines make it"


def test_held_out_windows_are_not_trained_on() -> None:
    from amq.errors import AmqError
    from amq.model.text import Corpus

    corpus = Corpus(torch.arange(1000), "numbers", "")
    train, rest = windows_of(corpus, 10, 0)
    assert len(train) == 90 and len(rest) == 10 and not set(train.flatten().tolist()) & set(rest.flatten().tolist())
    few, same = windows_of(corpus, 10, 7)
    assert torch.equal(few, train[:7]) and torch.equal(same, rest)
    with pytest.raises(AmqError, match="'numbers' has 90 windows of 10 tokens beside those held out: expected 91"):
        windows_of(corpus, 10, 91)
