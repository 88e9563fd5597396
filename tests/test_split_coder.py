"""The entropy coder of activations: the native one against plain Python, against `constriction`, and against damage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.split import coder

LEVELS = (1, 2, 3, 4, 5, 7, 8, 11, 16, 32, 63, 64, 128, 255, 256)
EXTREMES = (0, 1, 127, 128, 254, 255)
HEAD = coder.STATES * coder.STATE_BYTES


def channels(levels: Tensor, tokens: int, seed: int = 0) -> Tensor:
    """uint8 [channels, tokens]: normal around the middle, Laplace at one end, constant and uniform in turn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for channel, count in enumerate(levels.tolist()):
        normal, uniform = torch.randn(tokens, generator=generator), torch.rand(tokens, generator=generator)
        row = (
            count / 2 + normal * count / 6,
            -uniform.log() * count / 8,
            torch.full((tokens,), (count - 1) // 3),
            uniform * count,
        )[channel % 4]
        rows.append(row.floor().clamp(0, count - 1).to(torch.uint8))
    return torch.stack(rows)


def ideal_bits(codes: Tensor, levels: Tensor, center: Tensor, scale: Tensor) -> float:
    """The information in the codes under the frequencies themselves."""
    total = 0.0
    for row, *model in zip(codes.tolist(), levels.tolist(), center.tolist(), scale.tolist(), strict=True):
        made = coder.frequencies(*model)
        total += sum(coder.TOTAL_BITS - math.log2(made[code]) for code in row)
    return total


def longest(bits: float, count: int) -> float:
    """Bytes that the coder may need for so many bits in `count` codes.

    A step of the state x ≥ 2^15 · f rounds ⌊x/f⌋ up to at most x/f + 1, a factor of 1 + 2^−15. Both states end with at
    most 32 bits more than the information that went in, from 31 bits at the start.
    """
    return (bits + count * 2**-15 / math.log(2)) / 8 + HEAD


@pytest.mark.parametrize("tokens", (1, 2, 3, 37, 512))
def test_what_was_encoded_comes_back(tokens: int) -> None:
    levels = torch.tensor(LEVELS)
    codes = channels(levels, tokens, seed=tokens)
    model = coder.fit(codes, levels)
    data = coder.encode(codes, levels, *model)
    assert torch.equal(coder.decode(data, levels, *model, tokens), codes)
    assert torch.equal(coder.decode(memoryview(data), levels, *model, tokens), codes)
    assert len(data) <= longest(ideal_bits(codes, levels, *model), codes.numel())


@pytest.mark.parametrize("count", LEVELS)
def test_native_and_reference_are_equal_bit_for_bit(count: int) -> None:
    models = [(center, scale) for center in EXTREMES for scale in (*EXTREMES, 80, 81)]
    levels = torch.full((len(models),), count, dtype=torch.int16)
    center, scale = torch.tensor(models, dtype=torch.uint8).T
    codes = channels(levels, 9, seed=count)
    data = coder.encode(codes, levels, center, scale)
    assert data == coder.encode_reference(codes, levels, center, scale)
    assert torch.equal(coder.decode(data, levels, center, scale, 9), codes)
    assert torch.equal(coder.decode_reference(data, levels, center, scale, 9), codes)


def test_nothing_and_what_costs_nothing() -> None:
    none, bytes_ = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)
    for levels, tokens in ((none, 5), (torch.tensor([1, 1]), 100), (torch.tensor([4]), 0)):
        model = (bytes_.new_zeros(len(levels)),) * 2
        codes = torch.zeros(len(levels), tokens, dtype=torch.uint8)
        data = coder.encode(codes, levels, *model)
        assert data == coder.encode_reference(codes, levels, *model)
        assert len(data) == HEAD
        assert torch.equal(coder.decode(data, levels, *model, tokens), codes)
        assert all(len(part) == len(levels) for part in coder.fit(codes, levels))


def test_the_wire_format_stays() -> None:
    """Written once by the reference; another arithmetic, order or layout would not read what is stored."""
    levels = torch.tensor([8, 1, 5, 256])
    codes = torch.tensor([[3, 4, 3, 7, 0], [0] * 5, [2, 2, 1, 2, 4], [0, 99, 128, 131, 255]], dtype=torch.uint8)
    center, scale = (torch.tensor(part, dtype=torch.uint8) for part in ([120, 0, 128, 100], [81, 0, 70, 121]))
    golden = "f8728d8c9ba923009391621d5f2525006cf74aa3"
    assert coder.encode(codes, levels, center, scale).hex() == golden
    assert coder.encode_reference(codes, levels, center, scale).hex() == golden
    assert torch.equal(coder.decode(bytes.fromhex(golden), levels, center, scale, 5), codes)


@pytest.mark.parametrize("count", LEVELS[1:])
def test_frequencies_native_and_reference(count: int) -> None:
    for center in (0, 1, 100, 127, 255):
        for scale in range(0, 256, 3):  # every part of an octave
            made = coder.frequencies(count, center, scale)
            assert cpu_module().coder_frequencies(count, center, scale) == made
            assert sum(made) == coder.TOTAL
            assert min(made) >= coder.SHARED // count >= 1
            assert max(made) < coder.TOTAL


@pytest.mark.parametrize("shape", (0, 1))
@pytest.mark.parametrize("count", (2, 5, 16, 255))
def test_frequencies_are_the_density_of_the_formula(count: int, shape: int) -> None:
    """Against floats. Distances are rounded down to 1/256 octave, by a rate and powers whose own roundings add less
    than a fiftieth of that at the largest distance; so a weight, and likewise their sum, is too large by a step at
    most. A weight is a multiple of 2^−30 (4 of them in the logistic's tail), a frequency is rounded down, and the
    largest gets what is left, less than one for each code.
    """
    step = 2 ** (1.02 / coder.STEPS) - 1
    for center in (0, 90, 128, 255):
        for rate in range(0, 128, 9):
            half_life = 2 ** (rate / 8 - 5)
            position = center * (count - 1) / 255
            t = [2 ** (-abs(code - position) / half_life) for code in range(count)]
            weights = [4 * x / (1 + x) ** 2 for x in t] if shape else t
            base = coder.SHARED // count
            given = (coder.TOTAL - base * count) / sum(weights)
            made = coder.frequencies(count, center, 2 * rate + shape)
            expected = [base + weight * given for weight in weights]
            unit = given * (4 if shape else 1) / 2**coder.ONE
            largest = made.index(max(made))
            for code, (got, wanted) in enumerate(zip(made, expected, strict=True)):
                left = count if code == largest else 0
                assert abs(got - wanted) <= wanted * step + unit + 1 + left, (center, rate, code)


def test_the_roots_are_exact_and_the_module_has_them() -> None:
    """c = ⌊2^32 · 2^(−1/2^j)⌋ means c^(2^j) ≤ 2^(32·2^j − 1) < (c + 1)^(2^j). A root that is one off shows in no
    frequency of a hundred thousand, but two machines would differ one day."""
    for j, root in enumerate(coder._roots(), 1):
        assert root ** (2**j) <= 1 << (32 * 2**j - 1) < (root + 1) ** (2**j)
    assert cpu_module().coder_powers() == [coder._power(i) for i in range(coder.STEPS)]


def test_constant_channels_cost_little() -> None:
    """All but the shared frequency goes to the one code: log₂(1/(1 − 511/65536)) bits for each."""
    levels = torch.tensor([2, 8, 256] * 20)
    codes = torch.tensor([[1], [5], [255]] * 20, dtype=torch.uint8).expand(60, 512)
    model = coder.fit(codes, levels)
    data = coder.encode(codes, levels, *model)
    assert torch.equal(coder.decode(data, levels, *model, 512), codes)
    assert len(data) <= longest(codes.numel() * -math.log2(1 - coder.SHARED / coder.TOTAL), codes.numel())


@pytest.mark.parametrize("count", (2, 3, 5, 8, 16, 64, 200))
def test_fit_is_near_the_best_of_all_models(count: int) -> None:
    levels, every = torch.full((12,), count), max(3, count // 16)
    codes = channels(levels, 200, seed=count)
    model = coder.fit(codes, levels)
    assert all(map(torch.equal, model, coder.fit(codes, levels)))
    grid = [(center, scale) for center in range(0, 256, every) for scale in range(256)]
    tables = torch.tensor([cpu_module().coder_frequencies(count, *some) for some in grid]).double()
    for rows in zip(codes, levels, *model, strict=True):
        counts = rows[0].long().bincount(minlength=count).double()
        best = (counts @ (coder.TOTAL_BITS - tables.log2()).T).min().item()
        # A local search may stop in a hollow, and above 64 levels it sees codes by the pair: as much as is lost by the
        # other shape on real activations would make it useless.
        assert ideal_bits(*(part[None] for part in rows)) <= best + 0.01 * codes.shape[1]


def test_fit_beats_any_one_shape_on_both() -> None:
    """Logistic samples take the logistic shape and Laplace ones the other, where there are enough of them."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(20, 4000, generator=generator).clamp(1e-6, 1 - 1e-6)
    logistic = (uniform / (1 - uniform)).log() * 8
    laplace = -(1 - 2 * (uniform - 0.5).abs()).log() * (uniform - 0.5).sign() * 8
    for samples, shape in ((logistic, 1), (laplace, 0)):
        codes = (samples + 128).round().clamp(0, 255).to(torch.uint8)
        _, scale = coder.fit(codes, torch.full((20,), 256))
        assert ((scale & 1) == shape).all()


def test_as_short_as_constriction() -> None:
    """The range coder of PyPI's constriction, with our frequencies as its probabilities."""
    constriction: Any = pytest.importorskip("constriction", reason="constriction is the peer of this coder")
    import numpy as np

    levels = torch.tensor(LEVELS)
    codes = channels(levels, 3000)  # enough for a thousandth to be more than the 16 bytes
    model = coder.fit(codes, levels)
    ours = coder.encode(codes, levels, *model)
    peer = constriction.stream.queue.RangeEncoder()
    for row, count, *bytes_ in zip(codes.numpy(), LEVELS, *(part.tolist() for part in model), strict=True):
        if count > 1:
            made = np.array(coder.frequencies(count, *bytes_), np.float64) / coder.TOTAL
            family = constriction.stream.model.Categorical(made, perfect=False)
            peer.encode(row.astype(np.int32), family)
    theirs = 4 * len(peer.get_compressed())
    assert abs(len(ours) - theirs) <= theirs / 1000 + 16


def any_of(most: int, generator: torch.Generator) -> int:
    return int(torch.randint(most, (), generator=generator))


def damaged(data: bytes, generator: torch.Generator) -> bytes:
    """Cut off, lengthened, with some bytes changed, or others altogether."""
    kind, changed = any_of(4, generator), bytearray(data)
    if kind == 0:
        return data[: any_of(len(data), generator)]
    if kind == 1:
        return data + bytes(any_of(256, generator) for _ in range(1 + any_of(9, generator)))
    if kind == 2:
        changed = bytearray(torch.randint(256, (16 + any_of(200, generator),), generator=generator).tolist())
        for top in range(coder.STATE_BYTES - 1, HEAD, coder.STATE_BYTES):
            changed[top] >>= 1  # a state that a decoder takes, mostly
        return bytes(changed)
    for _ in range(1 + any_of(3, generator)):
        changed[any_of(len(data), generator)] ^= 1 + any_of(255, generator)
    return bytes(changed)


def test_damaged_data_are_refused_and_never_harm() -> None:
    """Of 2,500, half with models that are none of an encoder's."""
    levels, generator = torch.tensor(LEVELS), torch.Generator().manual_seed(1)
    codes = channels(levels, 20)
    fitted = coder.fit(codes, levels)
    data, refused = coder.encode(codes, levels, *fitted), 0
    for case in range(2500):
        others = torch.randint(256, (2, len(LEVELS)), generator=generator, dtype=torch.uint8)
        try:
            got = coder.decode(damaged(data, generator), levels, *(others if case % 2 else fitted), 20)
        except AmqError as error:
            refused += 1
            assert "coded data" in str(error)
        else:
            assert (got < levels[:, None]).all()
    assert refused >= 2499  # a state that is wrong ends right once in 2^31


def test_native_and_reference_refuse_alike() -> None:
    levels = torch.tensor([2, 8, 33, 256])
    codes = channels(levels, 6)
    model = coder.fit(codes, levels)
    data, generator = coder.encode(codes, levels, *model), torch.Generator().manual_seed(2)
    for _ in range(80):
        wrong, said = damaged(data, generator), []
        for decode in (coder.decode, coder.decode_reference):
            try:
                said.append(str(decode(wrong, levels, *model, 6).tolist()))
            except AmqError as error:
                said.append(str(error))
        assert said[0] == said[1]


def test_models_that_differ_are_noticed() -> None:
    levels = torch.full((40,), 8)
    codes = channels(levels, 50)
    center, scale = coder.fit(codes, levels)
    data = coder.encode(codes, levels, center, scale)
    for changed in ((levels, center, scale ^ 8), (levels, center ^ 16, scale), (levels - 1, center, scale)):
        with pytest.raises(AmqError, match="levels, center, scale or tokens are not those that they were made with"):
            coder.decode(data, *changed, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda data: b"", "0 bytes are not what encode writes for 2 channels of 30 tokens: they end before the last"),
        (lambda data: data[:-4], "they end before the last code"),
        (lambda data: data + bytes(1), "bytes are left after the last code"),
        (lambda data: bytes(8) + data[8:], "their first bytes are no states, which lie between"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "the states after the last code are not those|left|before"),
    ),
)
def test_what_is_wrong_with_data(change: Callable[[bytes], bytes], message: str) -> None:
    levels = torch.tensor([8, 200])
    codes = channels(levels, 30)
    model = coder.fit(codes, levels)
    data = change(coder.encode(codes, levels, *model))
    for decode in (coder.decode, coder.decode_reference):
        with pytest.raises(AmqError, match=message):
            decode(data, levels, *model, 30)


def call(**changes: Any) -> Any:
    arguments = {
        "codes": torch.tensor([[0, 1, 2], [3, 0, 1]], dtype=torch.uint8),
        "levels": torch.tensor([3, 4]),
        "center": torch.zeros(2, dtype=torch.uint8),
        "scale": torch.zeros(2, dtype=torch.uint8),
    } | changes
    return coder.encode(**arguments), coder.encode_reference(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"levels": torch.tensor([3, 0])}, "channel 1 must have 1 to 256 levels, got 0"),
        ({"levels": torch.tensor([2**32 + 3, 4])}, "channel 0 must have 1 to 256 levels, got 4294967299"),
        ({"levels": torch.tensor([3, 3])}, "channel 1 has 3 levels, so its codes must be less than that; got 3"),
        ({"levels": torch.tensor([3.0, 4.0])}, r"levels must be \[channels\] of int64, .*, got torch.float32 \[2\]"),
        ({"levels": torch.tensor([3])}, r"codes must be uint8 \[channels, tokens\] of 1 channels.*got .* \[2, 3\]"),
        ({"codes": torch.zeros(2, 3)}, r"codes must be uint8 .* got torch.float32 \[2, 3\]"),
        ({"center": torch.zeros(3, dtype=torch.uint8)}, r"center must be uint8 \[2\], .* got torch.uint8 \[3\]"),
        ({"scale": torch.zeros(2)}, r"scale must be uint8 \[2\], .* got torch.float32 \[2\]"),
        ({"codes": torch.zeros(2, 3, dtype=torch.uint8, device="meta")}, r"codes must be on cpu, got meta; call .cpu"),
    ),
)
def test_wrong_arguments_are_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(AmqError, match=message):
        call(**changes)


@pytest.mark.parametrize("tokens", (-1, 2**31, 2**62))
def test_sizes_beyond_a_message_are_refused(tokens: int) -> None:
    levels, model = torch.tensor([3, 4]), torch.zeros(2, dtype=torch.uint8)
    for decode in (coder.decode, coder.decode_reference):
        with pytest.raises(AmqError, match=f"2 channels of {tokens} tokens are not 0 to 2147483647 codes"):
            decode(bytes(16), levels, model, model, tokens)
    with pytest.raises(AmqError, match="1 to 256 levels, and a center and a scale of 0 to 255, got 0, 1 and 2"):
        coder.frequencies(0, 1, 2)


def test_the_module_checks_for_itself() -> None:
    """Lengths and values that would read or write beyond memory, given past the checks of Python."""
    byte, size = torch.zeros(2, dtype=torch.uint8), torch.ones(2, dtype=torch.int32)

    def arguments(**changes: Any) -> dict[str, Any]:
        tensors = {"codes": byte, "levels": size, "center": byte, "scale": byte} | changes
        return {name: (part.data_ptr(), part.numel() * part.element_size()) for name, part in tensors.items()}

    module, sizes = cpu_module(), {"channels": 2, "tokens": 1}
    out = {"out": (byte.data_ptr(), 2)}
    for changes, message in (
        ({"levels": size * 257}, "levels: expected 1 to 256, got 257"),
        ({"codes": byte + 1}, "codes: expected less than 1, got 1"),
        ({"scale": byte[:1]}, "scale: expected 2 bytes, got 1"),
        ({}, "out: expected memory for two bytes per code and more, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            module.coder_encode(**arguments(**changes), **out, **sizes)
    with pytest.raises(ValueError, match="codes: expected 4 bytes, got 2"):
        module.coder_decode(data=(0, 0), **arguments(), channels=2, tokens=2)
    with pytest.raises(ValueError, match="codes: expected at most 2147483647, got 2147483648"):
        module.coder_fit(**arguments(), channels=2, tokens=2**30)
