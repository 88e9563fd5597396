"""An entropy coder for quantized activations: codes of channels, each with a model that two bytes describe.

A channel c has L = levels[c] codes, 0 … L − 1. Its two bytes are the encoder's choice and go along with the data:
`center` is a place in the range of codes, m = center/255 · (L − 1); of `scale` the lowest bit is the shape of the
density and the rest a rate r, which stands for the half-life h = 2^(r/8 − 5) codes. With t = 2^−(|k − m|/h), code k has
the weight

    shape 0 (Laplace): t             shape 1 (logistic): 4·t/(1 + t)²

Frequencies add up to 2^16. Of these, ⌊512/L⌋ go to every code alike, so that an outlier costs about 7 + log₂ L bits and
not more; the rest is divided by weight, and what rounding leaves goes to the most frequent code. A channel of one level
costs nothing. Activations look logistic and their gradients Laplace: at 8 levels on 576 channels × 512 tokens after
block 10 of SmolLM2, the wrong one of the two costs 0.01 to 0.015 bits per code more.

The two ends may be unlike machines, so all of this is integers: t is a product of eight constants of 32 bits, rounded
down at each step (`_power`), a density is a quotient rounded down. `frequencies` is the specification, and
csrc/cpu/coder.cpp gives the same numbers.

The coder is an asymmetric numeral system. A state x, 2^31 ≤ x < 2^63, takes a code of frequency f that begins at the
cumulative frequency s by x ← 2^16·⌊x/f⌋ + x mod f + s; if x ≥ 2^47·f its low 32 bits go out before. Tokens take turns
on two states, even ones on the first. The decoder undoes the steps in reverse, therefore the encoder begins with the
last token of the last channel, from x = 2^31, and writes from the end. Layout, little-endian: both states, 8 bytes
each; then 32-bit words in the order in which a decoder wants them, which goes through channels and their tokens from
the first. Where it ends, no word may be left and both states must be 2^31.

Left out: adapting models, dependence between channels or tokens, a checksum. A changed byte shows at the end of nearly
every message (a state that is wrong ends right once in about 2^31), but what carries the bytes should check them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.kernels.cpu import cpu_module, memory

MOST_LEVELS = 256
TOTAL_BITS = 16
TOTAL = 1 << TOTAL_BITS
SHARED = 512
"""Of TOTAL, what all codes of a channel share evenly."""
POSITIONS = 255
"""Steps of `center` from the first code to the last."""
RATES_PER_OCTAVE = 8
FASTEST = 5
"""Octaves of the shortest half-life below one code."""
STEPS = 256
"""Of an octave, in which distances are counted."""
ONE = 30
"""Fraction bits of a weight."""
RATE_BITS = 24
"""Fraction bits of a rate."""
STATES = 2
STATE_BYTES, WORD_BYTES = 8, 4
LEAST_STATE, MOST_STATE = 1 << 31, 1 << 63
MOST_CODES = 2**31 - 1
"""In one message."""
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""Of levels."""
GOOD, TOO_SHORT, BAD_START, TRAILING, BAD_END = range(5)
"""As `Coded` in csrc/cpu/coder.h."""


def fit(codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The model of each channel: center and scale, uint8 [channels], with nearly the shortest code of all.

    codes: uint8 [channels, tokens] on CPU, below their channel's levels.
    levels: [channels] of an integer dtype, 1 to 256.
    For each shape it walks downhill from the median and the mean distance from it, with the frequencies themselves.
    The choice is made in floating-point, and another machine may choose otherwise; nothing depends on it.
    Raises AmqError for codes or levels that are none, naming the channel.
    """
    levels = _checked_levels(levels)
    codes = _checked_codes(codes, levels)
    center, scale = (torch.zeros(len(levels), dtype=torch.uint8) for _ in range(2))
    cpu_module().coder_fit(
        codes=memory(codes), levels=memory(levels), center=memory(center), scale=memory(scale),
        channels=codes.shape[0], tokens=codes.shape[1],
    )  # fmt: skip
    return center, scale


def encode(codes: Tensor, levels: Tensor, center: Tensor, scale: Tensor) -> bytes:
    """The coded bytes; at least 16, and about the sum of −log₂(frequency/2^16) over all codes.

    codes, levels: as for `fit`. center, scale: uint8 [channels]; any are right, those of `fit` are short.
    Raises AmqError for codes or levels that are none, naming the channel, and for tensors that do not fit together.
    """
    levels = _checked_levels(levels)
    codes = _checked_codes(codes, levels)
    center, scale = _checked_model(center, scale, levels)
    # A code adds at most 16 bits and, by rounding, a 30,000th of one.
    out = torch.empty(2 * codes.numel() + codes.numel() // 1024 + 64, dtype=torch.uint8)
    begin = cpu_module().coder_encode(
        codes=memory(codes), levels=memory(levels), center=memory(center), scale=memory(scale), out=memory(out),
        channels=codes.shape[0], tokens=codes.shape[1],
    )  # fmt: skip
    return out[begin:].numpy().tobytes()


def decode(data: bytes | memoryview, levels: Tensor, center: Tensor, scale: Tensor, tokens: int) -> Tensor:
    """The codes that `encode` was given: uint8 [channels, tokens], each below its channel's levels.

    data: of any origin; no more than it is read, and at most channels · tokens codes come of it.
    levels, center, scale: as they were for `encode`.
    Raises AmqError where `encode` cannot have written the data for these levels and models.
    """
    levels = _checked_levels(levels)
    center, scale = _checked_model(center, scale, levels)
    _check_tokens(tokens, len(levels))
    read = np.frombuffer(bytes(data), np.uint8)  # of memory that nobody can change meanwhile
    codes = torch.empty(len(levels), tokens, dtype=torch.uint8)
    fault = cpu_module().coder_decode(
        data=(read.ctypes.data, read.nbytes), levels=memory(levels), center=memory(center), scale=memory(scale),
        codes=memory(codes), channels=len(levels), tokens=tokens,
    )  # fmt: skip
    if fault != GOOD:
        raise _fault(fault, read.nbytes, len(levels), tokens)
    return codes


def frequencies(levels: int, center: int, scale: int) -> list[int]:
    """What each code weighs, of 2^16: the specification. Every one is at least ⌊512/levels⌋."""
    if not 1 <= levels <= MOST_LEVELS or not 0 <= center <= 255 or not 0 <= scale <= 255:
        raise AmqError(
            f"frequencies: expected 1 to {MOST_LEVELS} levels, and a center and a scale of 0 to 255, got {levels}, "
            f"{center} and {scale}"
        )
    rate, shape = _rate(scale >> 1), scale & 1
    weights = []
    for code in range(levels):
        steps = abs(code * POSITIONS - center * (levels - 1)) * rate >> RATE_BITS
        t = _power(steps % STEPS) >> steps // STEPS
        weights.append((t << 32) // ((t + (1 << ONE)) ** 2 >> ONE) if shape else t)
    base = SHARED // levels
    factor = ((TOTAL - base * levels) << 40) // sum(weights)
    made = [base + (weight * factor >> 40) for weight in weights]
    made[made.index(max(made))] += TOTAL - sum(made)
    return made


def _rate(index: int) -> int:
    """Steps of 1/256 octave per 1/255 code: 256/(255·h) with RATE_BITS fraction bits, h = 2^(index/8 − 5)."""
    octaves, part = divmod(index, RATES_PER_OCTAVE)
    fastest = (STEPS << FASTEST + RATE_BITS) // POSITIONS
    return (fastest * _power(part * STEPS // RATES_PER_OCTAVE) >> ONE) >> octaves


@lru_cache(maxsize=STEPS)
def _power(index: int) -> int:
    """2^(−index/256) with ONE fraction bits, index < 256: a product of the roots that its binary digits name."""
    power = 1 << ONE
    for j, root in enumerate(_roots(), 1):
        if index >> (8 - j) & 1:
            power = power * root >> 32
    return power


@lru_cache(maxsize=1)
def _roots() -> tuple[int, ...]:
    """⌊2^32 · 2^(−1/2^j)⌋ for j = 1 … 8, exactly: ⌊2^(32·2^j − 1)⌋ under j square roots, each rounded down."""
    roots = []
    for j in range(1, 9):
        root = 1 << (32 * 2**j - 1)
        for _ in range(j):
            root = isqrt(root)
        roots.append(root)
    return tuple(roots)


def encode_reference(codes: Tensor, levels: Tensor, center: Tensor, scale: Tensor) -> bytes:
    """`encode`, in plain Python: the specification."""
    levels = _checked_levels(levels)
    codes = _checked_codes(codes, levels)
    center, scale = _checked_model(center, scale, levels)
    states = [LEAST_STATE] * STATES
    words: list[int] = []
    models = torch.stack((levels, center.int(), scale.int()), 1).tolist()
    for row, model in zip(reversed(codes.tolist()), reversed(models), strict=True):
        if model[0] < 2:
            continue
        made = frequencies(*model)
        starts = [0, *accumulate(made)]
        for token in reversed(range(len(row))):
            x, frequency = states[token % STATES], made[row[token]]
            if x >= frequency << (63 - TOTAL_BITS):
                words.append(x & 0xFFFFFFFF)
                x >>= 32
            states[token % STATES] = (x // frequency << TOTAL_BITS) + x % frequency + starts[row[token]]
    head = b"".join(x.to_bytes(STATE_BYTES, "little") for x in states)
    return head + b"".join(word.to_bytes(WORD_BYTES, "little") for word in reversed(words))


def decode_reference(data: bytes | memoryview, levels: Tensor, center: Tensor, scale: Tensor, tokens: int) -> Tensor:
    """`decode`, in plain Python: the specification."""
    levels = _checked_levels(levels)
    center, scale = _checked_model(center, scale, levels)
    _check_tokens(tokens, len(levels))
    data, at, size = bytes(data), STATES * STATE_BYTES, (len(levels), tokens)
    if len(data) < at:
        raise _fault(TOO_SHORT, len(data), *size)
    states = [int.from_bytes(data[i : i + STATE_BYTES], "little") for i in range(0, at, STATE_BYTES)]
    if not all(LEAST_STATE <= x < MOST_STATE for x in states):
        raise _fault(BAD_START, len(data), *size)
    codes = torch.zeros(size, dtype=torch.uint8)
    for channel, model in enumerate(torch.stack((levels, center.int(), scale.int()), 1).tolist()):
        if model[0] < 2:
            continue
        made = frequencies(*model)
        owners = [code for code, frequency in enumerate(made) for _ in range(frequency)]
        starts = [0, *accumulate(made)]
        for token in range(tokens):
            x = states[token % STATES]
            slot = x % TOTAL
            code = owners[slot]
            x = made[code] * (x >> TOTAL_BITS) + slot - starts[code]
            if x < LEAST_STATE:
                if len(data) - at < WORD_BYTES:
                    raise _fault(TOO_SHORT, len(data), *size)
                x = x << 32 | int.from_bytes(data[at : at + WORD_BYTES], "little")
                at += WORD_BYTES
            states[token % STATES], codes[channel, token] = x, code
    if at != len(data):
        raise _fault(TRAILING, len(data), *size)
    if states != [LEAST_STATE] * STATES:
        raise _fault(BAD_END, len(data), *size)
    return codes


def _fault(fault: int, size: int, channels: int, tokens: int) -> AmqError:
    """What is wrong with data that do not decode."""
    found = {
        TOO_SHORT: "they end before the last code",
        BAD_START: "their first bytes are no states, which lie between 2^31 and 2^63",
        TRAILING: "bytes are left after the last code",
        BAD_END: "the states after the last code are not those that an encoder starts from",
    }[fault]
    return AmqError(
        f"coded data: {size} bytes are not what encode writes for {channels} channels of {tokens} tokens: {found}; "
        "they were damaged, or levels, center, scale or tokens are not those that they were made with"
    )


def _checked_levels(levels: Tensor) -> Tensor:
    """int32 [channels], contiguous."""
    if levels.dim() != 1 or levels.dtype not in INTEGERS:
        raise AmqError(
            f"coder: levels must be [channels] of int64, int32, int16 or uint8, got {levels.dtype} {list(levels.shape)}"
        )
    _check_cpu("levels", levels)
    wrong = (levels < 1) | (levels > MOST_LEVELS)
    if wrong.any():
        channel = int(wrong.nonzero()[0])
        raise AmqError(f"coder: channel {channel} must have 1 to {MOST_LEVELS} levels, got {int(levels[channel])}")
    return levels.to(torch.int32).contiguous()


def _checked_codes(codes: Tensor, levels: Tensor) -> Tensor:
    """The codes, contiguous."""
    if codes.dim() != 2 or codes.dtype != torch.uint8 or len(codes) != len(levels):
        raise AmqError(
            f"coder: codes must be uint8 [channels, tokens] of {len(levels)} channels, as levels has them, got "
            f"{codes.dtype} {list(codes.shape)}"
        )
    _check_cpu("codes", codes)
    _check_tokens(codes.shape[1], len(codes))
    codes = codes.contiguous()
    if codes.numel() == 0:
        return codes
    largest = codes.amax(1)
    wrong = largest >= levels
    if wrong.any():
        channel = int(wrong.nonzero()[0])
        raise AmqError(
            f"coder: channel {channel} has {int(levels[channel])} levels, so its codes must be less than that; got "
            f"{int(largest[channel])}"
        )
    return codes


def _checked_model(center: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Center and scale, contiguous."""
    for name, tensor in (("center", center), ("scale", scale)):
        if tensor.dtype != torch.uint8 or tensor.shape != levels.shape:
            raise AmqError(
                f"coder: {name} must be uint8 [{len(levels)}], as levels has channels, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        _check_cpu(name, tensor)
    return center.contiguous(), scale.contiguous()


def _check_tokens(tokens: int, channels: int) -> None:
    if not 0 <= tokens <= MOST_CODES // max(1, channels):
        raise AmqError(
            f"coder: {channels} channels of {tokens} tokens are not 0 to {MOST_CODES} codes, the most of one message; "
            "send fewer tokens at a time"
        )


def _check_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise AmqError(f"coder: {name} must be on cpu, got {tensor.device}; call .cpu() on it")
